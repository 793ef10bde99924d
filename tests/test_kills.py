"""SIGKILL at random moments, resume, and the same bytes as a run that nobody stopped.

    pytest tests/test_kills.py --kills 20
"""

import json
import os
import random
import signal
import subprocess
import sys
import time

from conftest import ROOT
from test_processes import WORKER


def test_killed_again_and_again(tmp_path, random_folder, request):
    kills = request.config.getoption("--kills")
    rounds = 30 if kills > 2 else 10
    script, prompts = tmp_path / "worker.py", tmp_path / "prompts.txt"
    script.write_text(WORKER)
    prompts.write_text("cat\ndog\na cat\na dog\na cat and a dog\n")
    flags = ["--model", random_folder, "--device", "cpu", "--prompts", prompts, "--T", 6,
             "--tau0", 4, "--rounds", rounds, "--queries", 12, "--branches", 3, "--lr", 1e-3,
             "--sample-batch", 12, "--micro-batch", 12, "--decode-batch", 12, "--threads", 1,
             "--update-size", 4, "--grid-every", 10, "--threshold", 0.1]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def start(*argv):
        return subprocess.Popen([sys.executable, str(script), *map(str, argv)], env=env,
                                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)  # fmt: skip

    def finish(process):
        _, err = process.communicate(timeout=250)
        assert process.returncode == 0, err.decode()[-2000:]

    def same(run):
        """`run` ended with the bytes and, times apart, the metrics of the straight run."""
        for name in ("pytorch_lora_weights.safetensors", "after.json", "before.json",
                     "summary.json"):  # fmt: skip
            assert (run / name).read_bytes() == (tmp_path / "straight" / name).read_bytes(), name
        got, want = ([{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in
                      (folder / "metrics.jsonl").read_text().splitlines()]
                     for folder in (run, tmp_path / "straight"))  # fmt: skip
        assert got == want and len(got) == rounds
        assert not list(run.rglob("*.part"))

    def go_on(run):
        begun = (run / "config.json").exists()
        return start("--resume", run) if begun else start(*flags, "--out", run)

    begun = time.monotonic()
    finish(start(*flags, "--out", tmp_path / "straight"))
    whole = time.monotonic() - begun
    moment, reached, finished = random.Random(0), [], 0
    while len(reached) < kills:  # a run that got to its end in spite of them makes way for another
        run = tmp_path / f"killed{finished}"
        process = go_on(run)
        try:  # uniform over the time of a run of two thirds: while it loads, too
            process.communicate(timeout=moment.uniform(0, 0.67) * whole)
            same(run)
            finished += 1
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            path = run / "metrics.jsonl"
            reached.append(len(path.read_text().splitlines()) if path.exists() else 0)
    finish(go_on(run))
    same(run)
    print(f"killed {len(reached)} times, after rounds {reached} of {rounds}; {finished + 1} runs")
