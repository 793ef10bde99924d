"""One round of Stable Diffusion 1.4 and ViT-H-14 at full size, with random weights, on the CPU.

    pytest tests/test_full_size.py --full-size -s      # about 16 GB of memory, minutes

No download: the architecture, the sizes and the dtypes are the true ones, the pictures are noise.
"""

import json
import os
import resource
import subprocess
import sys
import time

import pytest
from conftest import ROOT

# ViT-H-14 without its weights: the one line that differs from `train.py`'s own command
WORKER = """
import sys
import rewards, train
def load(name, tiny, device, dtype):
    return rewards.checked(rewards.ClipScore("ViT-H-14", None, device, dtype), name)
train.load_reward = load
train.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def folder(request, tmp_path_factory):
    """The pipeline of SD 1.4, random weights in bfloat16, as a diffusers folder."""
    if not request.config.getoption("--full-size"):
        pytest.skip("a full-size model: pass --full-size")
    import bench

    return bench.random_sd14(tmp_path_factory.mktemp("full") / "sd14")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_round_at_full_size(folder, tmp_path, precision):
    """The real command, 64x64 pixels: one round with branches, pairs and an update."""
    script, prompts, run = tmp_path / "worker.py", tmp_path / "prompts.txt", tmp_path / "run"
    script.write_text(WORKER)
    prompts.write_text("cat\n")
    flags = ["--model", folder, "--device", "cpu", "--precision", precision, "--prompts", prompts,
             "--image-size", 64, "--T", 4, "--tau0", 2, "--rounds", 1, "--queries", 4,
             "--branches", 2, "--epochs", 1, "--threshold", 0, "--sample-batch", 4,
             "--micro-batch", 2, "--decode-batch", 2, "--checkpointing", "--offload",
             "--out", run]  # fmt: skip
    begun = time.monotonic()
    done = subprocess.run([sys.executable, script, *map(str, flags)], capture_output=True,
                          text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    seconds = time.monotonic() - begun
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    line = json.loads((run / "metrics.jsonl").read_text())
    print(f"\n{precision}: {seconds:.0f} s in all, seconds of the round {line['seconds']}, peak "
          f"{peak:.1f} GiB, max |log ratio| before the update {line['first_max_log_ratio']:.2e}")
    assert line["updates"] == 1 and line["kept"] >= 2 and line["reward_std"] > 0
    state = json.loads((run / "summary.json").read_text())
    assert state["train_score"]["n"] == 1
    if precision == "fp32":
        assert line["first_max_log_ratio"] <= 1e-6  # 1% of the clip range
