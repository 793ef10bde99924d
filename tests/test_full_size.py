"""One round of Stable Diffusion 1.4 and ViT-H-14 at full size, with random weights, on the CPU.

    pytest tests/test_full_size.py --full-size -s      # about 16 GB of memory, minutes

No download: the architecture, the sizes and the dtypes are the true ones, the pictures are noise.
"""

import json
import os
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


@pytest.mark.parametrize("precision, shapes", [("fp32", "other"), ("bf16", "other"),
                                               ("bf16", "equal"), ("fp16", "other")])  # fmt: skip
def test_a_round_at_full_size(folder, tmp_path, precision, shapes):
    """The real command, 64x64 pixels: one round and an update; with branches, or one state a call."""
    script, prompts, run = tmp_path / "worker.py", tmp_path / "prompts.txt", tmp_path / "run"
    script.write_text(WORKER)
    prompts.write_text("cat\n")
    flags = ["--model", folder, "--device", "cpu", "--precision", precision, "--prompts", prompts,
             "--image-size", 64, "--T", 4, "--tau0", 2, "--rounds", 1, "--queries", 4, "--epochs",
             1, "--threshold", 0, "--decode-batch", 2, "--checkpointing", "--offload", "--out", run,
             *(["--branches", 2, "--sample-batch", 4, "--micro-batch", 2] if shapes == "other" else
               ["--no-bs", "--sample-batch", 1, "--micro-batch", 1])]  # fmt: skip
    begun = time.monotonic()
    with open(tmp_path / "log.txt", "w+", encoding="utf-8") as log:
        process = subprocess.Popen([sys.executable, script, *map(str, flags)], stdout=log,
                                   stderr=log, env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
        _, status, used = os.wait4(process.pid, 0)  # this child's own peak memory
        log.seek(0)
        assert status == 0, log.read()[-3000:]
    seconds = time.monotonic() - begun
    line = json.loads((run / "metrics.jsonl").read_text())
    print(f"\n{precision}, {shapes} batch shapes: {seconds:.0f} s in all, seconds of the round "
          f"{line['seconds']}, peak {used.ru_maxrss / 2**20:.1f} GiB, max |log ratio| before the "
          f"update {line['first_max_log_ratio']:.1e}")  # fmt: skip
    assert line["updates"] == 1 and line["kept"] >= 2 and line["reward_std"] > 0
    assert json.loads((run / "summary.json").read_text())["train_score"]["n"] == 1
    if precision == "fp32" or shapes == "equal":
        assert line["first_max_log_ratio"] <= 1e-6  # 1% of the clip range
