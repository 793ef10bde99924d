"""What a run reads, writes and resumes: one folder of text, pictures and safetensors.

    config.json                        every setting, as given; the wandb id; what it was made with
    metrics.jsonl                      a line a round
    checkpoint.safetensors             LoRA, optimizer; its header has the rest of what resumes
    pytorch_lora_weights.safetensors   what diffusers' `load_lora_weights(folder)` reads
    NAME_webui.safetensors             the same LoRA under the names of web UIs
    before.json, after.json            a score a picture; summary.json: their means and gains
    grids/*.png, README.md             pictures of the same noise; a model card

Every file is written aside and then renamed, so a stop leaves the old or the new one (to
metrics.jsonl a line is added, and cut off on resume if its round has no checkpoint). JSON
and safetensors only, nothing that can run code. No random state is kept, since all noise is
keyed (`ddim_logprob.py`).
"""

import contextlib
import hashlib
import json
import math
import os
import shlex
import subprocess
import sys
import uuid
from importlib.metadata import version
from pathlib import Path

import torch

from support.command import Stop, die, first_line
from support.prompts import load_prompts

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT = "checkpoint.safetensors"
LORA = "pytorch_lora_weights.safetensors"
# Flags that may differ beside --resume: they change no expectation of what was done before
WITH_RESUME = ("resume", "rounds", "out", "device", "threads", "checkpointing", "offload")
WITH_RESUME += ("compile", "sample_batch", "micro_batch", "decode_batch", "report_to")
WITH_RESUME += ("save_every", "grid_every")
NOT_IN_CONFIG = ("resume", "out", "reward_was_given")
OUT_OF_MEMORY = (
    "out of GPU memory: lower --micro-batch (the gradient stays the same), --sample-batch or "
    "--decode-batch, or add --checkpointing --offload"
)


# ---------------------------------------------------------------- files that a stop can not harm


@contextlib.contextmanager
def aside(path):
    """A name to write to; renamed to `path` once the writing is done."""
    part = Path(f"{path}.part")
    yield part
    os.replace(part, path)


@contextlib.contextmanager
def reading(path):
    """Inside, whatever a damaged file leads to ends with one line that names the file."""
    try:
        yield
    except Exception as problem:
        reason = first_line(problem)
        die(f"{path} is damaged or of another version ({reason}): restore it, or start anew")


def write_text(path, text):
    with aside(path) as part:
        part.write_text(text, encoding="utf-8")


def write_json(path, data):
    write_text(path, json.dumps(data, indent=1) + "\n")


def read_json(path):
    """What the file holds, None if there is none; ends with one line if it is damaged."""
    with reading(path):
        return json.loads(path.read_text(encoding="utf-8")) if os.path.exists(path) else None


def write_safetensors(path, tensors, header=None):
    """Tensors by name; header: JSON data, in one key since the library keeps no order of keys."""
    from safetensors.torch import save

    metadata = header and {"run": json.dumps(header, sort_keys=True)}
    with aside(path) as part:
        part.write_bytes(save({k: v.contiguous() for k, v in tensors.items()}, metadata))


def read_safetensors(path):
    """Tensors by name and the header's data. Raises OSError; ValueError if it is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get("run", "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, RecursionError) as problem:
        raise ValueError(problem) from None
    return tensors, header


# ---------------------------------------------------------------- settings


def method_slug(cfg):
    """The algorithm and its strategies for the name of a folder, e.g. ddpo-bpt-bs."""
    words = [cfg["algo"], "" if cfg["no_bpt"] else "bpt", "" if cfg["no_bs"] else "bs"]
    return "-".join(filter(None, words))


def short_name(path, ending):
    """A path's last part for a folder's name; of a file elsewhere, four letters tell it apart."""
    name = Path(path).name.removesuffix(ending)
    if "/" in path and os.path.exists(path):
        name += "-" + hashlib.sha256(os.path.realpath(path).encode()).hexdigest()[:4]
    return name


def default_folder(cfg, given):
    """runs/<model>-<reward>-<prompts>-<method>-seed<seed>, and the numbers `given` by flags."""
    reward, _, function = cfg["reward"].rpartition(":")
    words = [short_name(cfg["model"], ".safetensors")]
    words.append(f"{short_name(reward, '.py')}-{function}" if reward else function)
    words.append(short_name(cfg["prompts"] or f"template{cfg['template']}", ".txt"))
    words += [method_slug(cfg), f"seed{cfg['seed']}"]
    words += [f"{name}{value}" for name, value in given.items()]
    return "runs/" + "-".join(words).encode()[:200].decode(errors="ignore")


def read_config(folder):
    """The settings of the run in `folder`; ends with one line if there is none."""
    config = read_json(Path(folder) / "config.json")
    if not isinstance(config, dict) or not config.get("model") or not config.get("rounds"):
        die(f"{folder} holds no run: there is no config.json of a run in it")
    return config


def refuse_changes(config, args, given):
    """End with one line if a flag `given` beside --resume says other than the run's config.

    Flags that say the same are fine, so the command that began a run resumes it with
    --resume RUN added. args: all settings, filled in.
    """
    for name in given.keys() - {*WITH_RESUME}:
        old, new = config.get(name), getattr(args, name)
        own_reward = name == "reward" and ":" in old and ":" in new
        if name in config and old != new and not own_reward:
            die(f"{args.resume} has {name} {old}, not {new}: leave it out, or start anew")


def fingerprint(cfg, reward_code):
    """What a checkpoint belongs to: its settings, and hashes of its prompts and its reward."""
    left_out = (*WITH_RESUME, *NOT_IN_CONFIG, "prompts", "reward")
    prompts = json.dumps(load_prompts(cfg["template"], cfg["prompts"]))
    return {
        "settings": {k: v for k, v in cfg.items() if k not in left_out},
        "prompts": hashlib.sha256(prompts.encode()).hexdigest(),
        "reward": reward_code or cfg["reward"],
    }


# ---------------------------------------------------------------- the folder


def check_new(folder):
    """Refuse a folder for a new run that holds another one, or files that are no run's.

    A run that failed while it loaded may be begun again. Only the first of several
    processes looks, since it writes there already while the others start.
    """
    if os.environ.get("RANK", "0") != "0" or not os.path.isdir(folder):
        return
    found = [name for name in os.listdir(folder) if not name.endswith(".part")]
    if found and "config.json" not in found:
        die(f"{folder} holds files that are no run's: take another --out")
    if "before.json" in found or CHECKPOINT in found:
        die(f"{folder} holds a run: {paste('--resume', folder)}, or --out NEW")


def open_folder(cfg, mark, saved, worker):
    """The run folder with its config.json, there before anything heavy is loaded.

    saved: what `read_checkpoint` read. The round from which on a reward has other code is
    noted; the id of a Weights & Biases run is kept.
    """
    folder, header = Path(cfg.out), saved[1]
    if worker != 0:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    old = read_config(folder) if cfg.resume else {}
    config = {k: v for k, v in vars(cfg).items() if k not in NOT_IN_CONFIG}
    config["wandb_id"] = old.get("wandb_id") or uuid.uuid4().hex[:16]
    config["reward_changed"] = old.get("reward_changed") or []
    if header and header["fingerprint"]["reward"] != mark["reward"]:
        config["reward_changed"].append(f"after round {header['rounds_done']}")
    made_with = {name: version(name) for name in ("torch", "diffusers", "transformers")}
    with contextlib.suppress(OSError):  # no git
        git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
        made_with["commit"] = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    write_json(folder / "config.json", config | {"made_with": made_with})
    (folder / "grids").mkdir(exist_ok=True)
    if cfg.resume:
        keep_metrics(folder, header["rounds_done"] if header else 0)
    return folder


def paste(*words):
    """A command that a shell reads as it is meant."""
    return shlex.join(str(word) for word in words)


@contextlib.contextmanager
def resumable(folder):
    """Inside, any stop ends with the reason and the command that resumes."""
    processes, rank = os.environ.get("LOCAL_WORLD_SIZE"), os.environ.get("RANK", "0")
    command = ["torchrun", "--nproc_per_node", processes] if processes else ["python"]
    again = f"To go on: {paste(*command, 'train.py', '--resume', folder)}"
    try:
        yield
    except KeyboardInterrupt:
        if rank == "0":
            print(f"\nStopped. Finished rounds are saved. {again}", file=sys.stderr)
        raise SystemExit(130) from None
    except Stop as problem:
        die(f"{problem}. {again}")
    except torch.OutOfMemoryError:
        die(f"{OUT_OF_MEMORY}. {again}")
    except OSError as problem:
        die(f"cannot write to {folder}: {problem.strerror or problem}. {again}")


# ---------------------------------------------------------------- checkpoint, metrics


def save_checkpoint(folder, lora, optimizer, header):
    """Everything that a bit-exact resume needs, in one file and one rename.

    lora: parameters by name. header: JSON data with the rounds done, the reward history
    and so on. So weights and round can not disagree: a wrong round is a wrong tau.
    """
    tensors = {name: value.detach().cpu() for name, value in lora.items()}
    for name, parameter in lora.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}:{name}"] = value.detach().cpu()
    write_safetensors(folder / CHECKPOINT, tensors, header)


def read_checkpoint(cfg, mark):
    """Tensors and header of the resumed run's checkpoint; (None, None) without one.

    Ends with one line if it belongs to other settings, prompts or reward code than `mark`
    (see `fingerprint`), or can not be read. A reward that is named beside --resume is meant.
    """
    path = Path(cfg.out) / CHECKPOINT
    if not cfg.resume or not path.exists():
        return None, None
    with reading(path):
        tensors, header = read_safetensors(path)
        old = header["fingerprint"]
        for name, value in mark["settings"].items():
            before = old["settings"].get(name, value)
            if before != value:
                die(f"{path} was made with {name} {before}, config.json says {value}")
        if old["prompts"] != mark["prompts"]:
            die(f"{cfg.out} was trained on other prompts: put the old ones back, or start anew")
        if old["reward"] != mark["reward"] and not cfg.reward_was_given:
            die(
                f"{cfg.out} was trained with other code of {cfg.reward}: put the old one back, "
                f"or, if you mean it: {paste('--resume', cfg.out, '--reward', cfg.reward)}"
            )
        if header["rounds_done"] > cfg.rounds:
            die(f"{cfg.out} has {header['rounds_done']} rounds, more than --rounds {cfg.rounds}")
        return tensors, header


def restore(saved, lora, optimizer, scaler, normalise, step_weights):
    """Put what `read_checkpoint` read back, in place; returns how many rounds are done."""
    tensors, header = saved
    if header is None:
        return 0
    with reading(CHECKPOINT), torch.no_grad():
        for name, parameter in lora.items():
            assert tensors[name].shape == parameter.shape, f"{name} is of another model"
            parameter.copy_(tensors[name])
        for key, value in tensors.items():
            assert value.isfinite().all(), f"{key} is not finite"
            kind, _, name = key.rpartition(":")
            if kind:  # the step stays on the CPU, as AdamW makes it
                device = "cpu" if kind == "step" else lora[name].device
                optimizer.state[lora[name]][kind] = value.to(device)
        scaler.load_state_dict(header["scaler"])
        normalise.history = header["history"]
        step_weights.square = header["step_square"]
        return header["rounds_done"]


def read_metrics(folder):
    """The whole lines of a run's metrics.jsonl; a line cut in the middle is no line."""
    path, lines = Path(folder) / "metrics.jsonl", []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.split("\n"):
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return lines


def keep_metrics(folder, rounds):
    """Cut metrics.jsonl back to the `rounds` that the checkpoint holds; each counts once."""
    with reading(folder / "metrics.jsonl"):
        lines = {line["round"]: line for line in read_metrics(folder)}
        kept = [json.dumps(lines[i]) + "\n" for i in sorted(lines) if i <= rounds]
    write_text(folder / "metrics.jsonl", "".join(kept))


def append_metrics(folder, line):
    """A line of strict JSON: what is NaN or infinite becomes null."""
    bad = [k for k, v in line.items() if isinstance(v, float) and not math.isfinite(v)]
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(line | dict.fromkeys(bad)) + "\n")
