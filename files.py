"""Files that a stop can not harm: written aside and then renamed, so the old or the new is there.

JSON and safetensors only, nothing that can run code.
"""

import contextlib
import json
import os
from pathlib import Path

from processes import die


@contextlib.contextmanager
def aside(path):
    """A name to write to; renamed to `path` once the writing is done."""
    part = Path(f"{path}.part")
    yield part
    os.replace(part, path)


def write_text(path, text):
    with aside(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path, data):
    write_text(path, json.dumps(data, indent=1) + "\n")


def read_json(path):
    """What the file holds, None if there is none; ends with one line if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if os.path.exists(path) else None
    except (OSError, ValueError, RecursionError) as problem:
        die(f"{path} is damaged ({problem}): restore it, or start anew with another --out")


def write_safetensors(path, tensors, header=None):
    """Tensors by name; header: JSON data, in one key since the library keeps no order of keys."""
    from safetensors.torch import save

    metadata = header and {"run": json.dumps(header, sort_keys=True)}
    with aside(path) as part:
        part.write_bytes(save({k: v.contiguous() for k, v in tensors.items()}, metadata))


def read_safetensors(path):
    """Tensors by name and the header's data, ours or diffusers' of a LoRA.

    Raises OSError; ValueError if it is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            texts = file.metadata() or {}
            header = json.loads(texts.get("run") or texts.get("lora_adapter_metadata", "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, RecursionError) as problem:
        raise ValueError(problem) from None
    if not isinstance(header, dict):
        raise ValueError("its header is that of no run")
    return tensors, header
