"""studies/peer.py: both sides take turns, times a query, the copy that old transformers read."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT

from studies import peer

SMALL = "--device=cpu --T=4 --tau0=2 --branches=3 --queries=6 --epochs=1 --threads=1"
FAKE = """#!{python}
import json, pathlib, sys
assert sys.argv[2] == "--worker"
setting = json.loads(sys.argv[3])
pathlib.Path("setting.json").write_text(json.dumps(setting))
for turn, _ in enumerate(sys.stdin):
    print(json.dumps({{"sampling": 3, "round": 9 + (turn == 0), "peak": 7 * 2**20}}), flush=True)
"""


class Here:
    """In place of a process pool: the job is done at once, in this process."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, job, *args):
        result = job(*args)
        return SimpleNamespace(result=lambda: result)


@pytest.fixture
def flags(random_folder, tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    monkeypatch.chdir(tmp_path)
    return [f"--model={random_folder}", "--prompts=prompts.txt", *SMALL.split()]


def test_rows_of_both_sides(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(peer, "ProcessPoolExecutor", Here)
    fake = tmp_path / "fake.py"
    fake.write_text(FAKE.format(python=sys.executable))
    fake.chmod(0o755)
    rows = peer.compare(flags, str(fake), [4, 2, 6, 4], 2)
    assert [row["method"] for row in rows] == [
        "TRL's DDPO",
        "DDPO here",
        "TRL's DDPO",
        "B2 here, tau 2",
    ]
    theirs, ours, *_ = rows
    assert theirs["sampling, s a query"] == pytest.approx(3 / 6)  # the first turn is left out
    assert theirs["training, s a query"] == pytest.approx(6 / 6) and theirs["peak, MB"] == 7
    assert theirs["times fewer seconds"] == pytest.approx((1, 1, 1))
    ratio, low, high = ours["times fewer seconds"]
    assert low <= ratio <= high and ours["peak, MB"] > 100
    seconds = 6 * (ours["sampling, s a query"] + ours["training, s a query"])
    assert low * 0.99 <= 9 / seconds <= high * 1.01
    setting = json.loads((tmp_path / "setting.json").read_text())
    assert setting["batches"] == [4, 2] and setting["prompts"] == ["a cat", "a dog"]


def test_readable_copy(random_folder, tmp_path):
    """The tokenizer's fast class, every name of the text encoder with one prefix, same values."""
    from safetensors.torch import load_file

    out = peer.readable(random_folder, tmp_path / "copy")
    index = json.loads((out / "model_index.json").read_text())
    assert index["tokenizer"] == ["transformers", "CLIPTokenizerFast"]
    before = load_file(random_folder / "text_encoder/model.safetensors")
    after = load_file(out / "text_encoder/model.safetensors")
    assert {"text_model." + k.removeprefix("text_model.") for k in before} == set(after)
    for name, value in before.items():
        assert after["text_model." + name.removeprefix("text_model.")].equal(value)


def test_worker_imports_only_the_standard_library():
    """TRL's interpreter lacks this project's packages."""
    code = "import sys; sys.argv = ['peer.py', '--worker']; import peer; "
    code += "print(sorted({'torch', 'numpy', 'train', 'diffusers'} & set(sys.modules)))"
    command = [sys.executable, "-S", "-c", code]
    studies = ROOT / "studies"
    out = subprocess.run(command, cwd=studies, text=True, capture_output=True, check=True).stdout
    assert out.strip() == "[]"


@pytest.mark.skipif("TRL_PYTHON" not in os.environ, reason="TRL_PYTHON: an interpreter with TRL")
def test_a_round_of_trl(flags):
    rows = peer.compare(flags, os.environ["TRL_PYTHON"], [4, 2], 1)
    assert all(row["training, s a query"] > 0 and row["peak, MB"] > 0 for row in rows)
