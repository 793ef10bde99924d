"""SIGKILL at random moments, resume, and the same bytes as a run that nobody stopped.

pytest tests/test_kills.py --kills 20
"""

import contextlib
import os
import random
import signal
import time

from conftest import assert_same_run, metrics, run_flags, write_prompts

# Between the writing of a file and its renaming, in the NUMBERth write
KILLED_IN_A_WRITE = """
import itertools, signal
real, writes = os.replace, itertools.count(1)
def replace(*names):
    if next(writes) == NUMBER:
        os.kill(os.getpid(), signal.SIGKILL)
    real(*names)
os.replace = replace
"""


def test_killed_again_and_again(tmp_path, random_folder, request, start):
    kills = request.config.getoption("--kills")
    rounds = 30 if kills > 2 else 4
    flags = ["--T", 3, "--tau0", 2, "--rounds", rounds, "--threads", 1, "--threshold", 0.1]
    flags += ["--grid-every", 2, "--save-every", 3, "--queries", 6]
    flags = run_flags(random_folder, write_prompts(tmp_path), *flags)
    straight = tmp_path / "straight/run"

    def go_on(run, code=""):
        begun = (run / "config.json").exists()
        argv = ["--resume", str(run)] if begun else [*flags, "--out", str(run)]
        (process,), wait = start([argv, {}, code])
        return process, wait

    def finish(run):
        _, wait = go_on(run)
        assert wait() == [0], start.errors.read_text()[-2000:]

    begun = time.monotonic()
    finish(straight)
    whole = time.monotonic() - begun
    assert len(metrics(straight)) == rounds and sum(x["updates"] for x in metrics(straight)) > 4
    moment, reached, finished = random.Random(0), [], 0
    while len(reached) < kills:  # a run that got to its end in spite of them makes way for another
        run = tmp_path / f"killed{finished}/run"
        if len(reached) % 5 == 0:
            write = str(moment.randint(1, 20)) if reached else "1"  # config.json is the first
            _, wait = go_on(run, KILLED_IN_A_WRITE.replace("NUMBER", write))
        else:  # uniform over the time of a run of two thirds: while it loads, too
            process, wait = go_on(run)
            time.sleep(moment.uniform(0, 0.67) * whole)
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        (status,) = wait()
        if status == -signal.SIGKILL:
            path = run / "metrics.jsonl"
            reached.append(len(path.read_text().splitlines()) if path.exists() else 0)
        else:  # it had ended before
            assert status == 0, start.errors.read_text()[-2000:]
            assert_same_run(run, straight)
            finished += 1
    finish(run := tmp_path / f"killed{finished}/run")
    assert_same_run(run, straight)
    print(f"killed {len(reached)} times, after rounds {reached} of {rounds}; {finished + 1} runs")
