"""Several processes: sums and shares, a run of two that equals a run of one, one that dies."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, brightness, metrics, run_flags, write_prompts

import rewards
import train
from support import processes
from support.processes import all_max, all_sum, init_processes, share, sum_gradients
from support.run_folder import LORA, read_safetensors

CPU = torch.device("cpu")


# ---------------------------------------------------------------- sums and shares


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_share_deals_the_owners_out(world):
    """Every position once, equal owners together, positions ascending; some may get nothing."""
    owners = [4, 0, 3, 0, 1, 4, 4]
    shares = [share(owners, rank, world) for rank in range(world)]
    assert all(s.dtype == torch.long and s.tolist() == sorted(s.tolist()) for s in shares)
    assert sorted(torch.cat(shares).tolist()) == list(range(7))
    for rank, positions in enumerate(shares):
        assert all(owners[p] % world == rank for p in positions.tolist())
    assert share([], 0, world).shape == (0,)
    assert share(list(range(5)), 1, 2).tolist() == [1, 3]


def test_a_single_process_sums_nothing():
    """Bit for bit what it has; a gradient that is None stays so."""
    values, p = torch.randn(3), torch.nn.Parameter(torch.zeros(2))
    assert all_sum(values, CPU) is values and all_max(values, CPU) is values
    sum_gradients([p], CPU)
    assert p.grad is None
    assert init_processes(CPU) == (0, 1, CPU)


@pytest.fixture
def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def of_world(rank, world, port):
    """The environment that torchrun gives to a process."""
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    return ranks | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def of_three(rank, port, answers):
    """What one of three processes gets; told through the queue as plain lists."""
    os.environ |= of_world(rank, 3, port)
    told = list(init_processes(CPU)[:2])
    told.append(all_sum(torch.tensor([1.0, rank]), CPU).tolist())
    own = torch.tensor([[-3.0, 1.0], [-5.0, 7.0], [-4.0, 2.0]][rank], dtype=torch.float64)
    told.append(all_max(own, CPU).tolist())
    weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    if rank != 1:  # one that trained nothing
        weights[0].grad = torch.tensor([1.0, rank])
    sum_gradients((p for p in weights), CPU)
    told.append([p.grad.tolist() for p in weights])
    answers.put((rank, told))


def test_three_processes(free_port):
    """The sum, the largest of each element, and the gradients are the same in each."""
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    workers = [context.Process(target=of_three, args=(r, free_port, answers)) for r in range(3)]
    for worker in workers:
        worker.start()
    told = dict(answers.get(timeout=60) for _ in workers)
    for worker in workers:
        worker.join()
    same = [[3.0, 3.0], [-3.0, 7.0], [[2.0, 2.0], [0.0, 0.0]]]
    assert told == {rank: [rank, 3, *same] for rank in range(3)}
    assert not processes.dist.is_initialized(), "this process took no part"


# ---------------------------------------------------------------- whole runs


def flags_of(random_folder, folder, out):
    """A run whose 5 roots, and their pairs, fall unevenly on two processes."""
    flags = ["--out", out, "--T", 3, "--tau0", 2, "--rounds", 2, "--queries", 15, "--threads", 1]
    flags += ["--sample-batch", 6, "--micro-batch", 2, "--epochs", 1, "--threshold", 0.1]
    flags += ["--step-weight", "rms", "--eval-images", 2]
    return run_flags(random_folder, write_prompts(folder), *flags)


def assert_nearly_the_same(one, two):
    """Two runs whose sums were taken in another order."""
    for first, second in zip(metrics(one), metrics(two), strict=True):
        for name in ("round", "tau", "queries", "kept", "of", "trajectories_per_update"):
            assert first[name] == second[name], name
        for name in ("reward_mean", "reward_std", "loss", "clip_fraction", "first_ratio"):
            assert first[name] == pytest.approx(second[name], rel=1e-2, abs=1e-5), name
        for name in ("grad_norm", "kl_to_base"):
            assert first[name] == pytest.approx(second[name], rel=1e-2), name
    first, second = (read_safetensors(run / LORA)[0] for run in (one, two))
    flat = [torch.cat([v.flatten() for v in lora.values()]) for lora in (first, second)]
    assert (flat[0] - flat[1]).norm() <= 1e-4 * flat[0].norm() and flat[0].norm() > 0
    first, second = (json.loads((run / "summary.json").read_text()) for run in (one, two))
    for name in first:
        assert first[name] == pytest.approx(second[name], abs=1e-4)


@pytest.fixture(scope="module")
def one(random_folder, tmp_path_factory):
    """The run in a single process."""
    out, checked = tmp_path_factory.mktemp("single"), rewards.checked(brightness, "brightness")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "load_reward", lambda *rest: checked)
        patch.setattr(train.report, "before_after", lambda *rest: None)
        folder = train.main(flags_of(random_folder, out, out / "one"))
    assert sum(line["kept"] for line in metrics(folder)) > 6
    return folder


def test_two_processes_equal_one(tmp_path, random_folder, one, start, free_port):
    """Noise is keyed, statistics and selection are global."""
    flags = flags_of(random_folder, tmp_path, tmp_path / "two")
    _, wait = start(*([flags, of_world(rank, 2, free_port), ""] for rank in range(2)))
    assert wait() == [0, 0], start.errors.read_text()[-3000:]
    assert_nearly_the_same(one, tmp_path / "two")
    first, second = metrics(one)[0], metrics(tmp_path / "two")[0]
    for name in ("reward_mean", "reward_std", "kept", "trajectories_per_update"):
        assert first[name] == second[name], name  # bit-equal in the first round


# Before the second round of this process is sampled
DIES = """
import signal
import ddim_logprob
real, calls = ddim_logprob.Policy.branch, []
def branch(*rest):
    calls.append(rest)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*rest)
ddim_logprob.Policy.branch = branch
"""


def test_a_process_that_dies_ends_the_run(tmp_path, random_folder, one, command, start, free_port):
    """The other does not wait for it for ever; any number of processes goes on from there."""
    out = tmp_path / "two"
    flags = flags_of(random_folder, tmp_path, out)
    runs = [[flags, of_world(rank, 2, free_port), ("", DIES)[rank]] for rank in range(2)]
    _, wait = start(*runs)
    ends = wait()
    assert ends[0] > 0 and ends[1] == -signal.SIGKILL
    assert len(metrics(out)) == 1 and (out / "checkpoint.safetensors").exists()
    command(out, resume=True)
    assert_nearly_the_same(one, out)


TORCHRUN = """
import os, signal, torch
from support.processes import all_sum, init_processes
rank, world, device = init_processes(torch.device("cpu"))
print("sum", all_sum(torch.ones(1), device).item(), flush=True)
if rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
all_sum(torch.ones(1), device)
"""


def test_torchrun_joins_processes_and_ends_them(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(TORCHRUN)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    options = dict(env=env, timeout=200, text=True, capture_output=True)
    done = subprocess.run([sys.executable, *torchrun], **options)
    assert done.stdout.count("2.0") == 2 == done.stdout.count("sum")  # the two mix lines
    assert done.returncode != 0 and "Signal 9 (SIGKILL)" in done.stderr
