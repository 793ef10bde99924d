"""One process and two give the same run: noise is keyed, statistics and selection are global."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

WORKER = """
import sys
import rewards, train
train.load_reward = lambda *a, **k: rewards.checked(lambda x, p: x.mean((1, 2, 3)), "brightness")
train.main(sys.argv[1:])
"""


def start(tmp_path, random_folder, processes, worker=WORKER):
    """A run of three rounds whose 5 roots, and their pairs, fall unevenly; folder, and what ended."""
    script, out = tmp_path / "worker.py", tmp_path / f"run{processes}"
    script.write_text(worker)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("cat\ndog\n")
    flags = ["--model", random_folder, "--device", "cpu", "--prompts", prompts, "--out", out,
             "--T", "6", "--tau0", "4", "--rounds", "3", "--queries", "15", "--branches", "3",
             "--sample-batch", "3", "--micro-batch", "1", "--decode-batch", "3", "--lr", "1e-3",
             "--clip-range", "1e-2", "--update-size", "4", "--threads", "1"]  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               f"--nproc_per_node={processes}", script, *flags]  # fmt: skip
    if processes == 1:
        command = [sys.executable, script, *flags]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return out, subprocess.run([str(c) for c in command], env=env, timeout=200, text=True,
                               capture_output=True)  # fmt: skip


def run(tmp_path, random_folder, processes):
    """Metrics and LoRA of a run that came to its end."""
    out, done = start(tmp_path, random_folder, processes)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return lines, load_file(out / "pytorch_lora_weights.safetensors")


def test_two_processes_equal_one(tmp_path, random_folder):
    one, lora_one = run(tmp_path, random_folder, 1)
    two, lora_two = run(tmp_path, random_folder, 2)
    for name in ("reward_mean", "reward_std", "kept", "trajectories_per_update"):
        assert one[0][name] == two[0][name], name  # bit-equal in the first round
    for name in ("loss", "clip_fraction", "first_ratio", "grad_norm"):
        assert one[0][name] == pytest.approx(two[0][name], rel=1e-3, abs=1e-6), name
    flat = [torch.cat([v.flatten() for v in lora.values()]) for lora in (lora_one, lora_two)]
    assert (flat[0] - flat[1]).norm() <= 1e-4 * flat[0].norm()
    assert flat[0].norm() > 0 and sum(line["kept"] for line in one) > 0


def test_a_process_that_dies_ends_the_run(tmp_path, random_folder):
    """The other one does not wait for it for ever; the finished rounds can be resumed."""
    dies = WORKER.replace("import sys\n", "import os, sys\n").replace(
        "train.main", """
real = train.train_round
def fatal(model, data, r_hat, kept, interval, optimizer, i, *rest):
    if i == 1 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), 9)
    return real(model, data, r_hat, kept, interval, optimizer, i, *rest)
train.train_round = fatal
train.main""")
    out, done = start(tmp_path, random_folder, 2, dies)
    assert done.returncode != 0 and "Signal 9 (SIGKILL)" in done.stderr
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 1
    assert (out / "checkpoint.safetensors").exists()
