"""bench.py: counts equal the least, intervals against closed forms, parts on micro settings."""

import json
import math
import mmap
import os
import random
import sys

import pytest
import torch
from conftest import randomise_lora

import bench

FLAGS = "--device cpu --T 5 --tau0 3 --branches 3 --queries 12 --sample-batch 4 --micro-batch 3 " \
        "--epochs 2 --update-size 5 --decode-batch 5 --threads 1"  # fmt: skip


@pytest.fixture
def flags(random_folder, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\n")
    return ["--model", str(random_folder), "--prompts", str(prompts), *FLAGS.split()]


# ---------------------------------------------------------------- intervals


def test_t_quantile_against_closed_forms_and_tables():
    assert bench.t_quantile(1) == pytest.approx(math.tan(0.475 * math.pi), rel=1e-3)  # Cauchy
    assert bench.t_quantile(2) == pytest.approx(0.95 * math.sqrt(2 / (1 - 0.95**2)), rel=1e-3)
    for df, t in ((3, 3.1824), (9, 2.2622), (10, 2.2281), (29, 2.0452), (1000, 1.9623)):
        assert bench.t_quantile(df) == pytest.approx(t, rel=1e-3)


def test_ratio_interval_by_hand_and_by_coverage():
    a, b = [2.0, 4.0, 3.0], [1.0, 1.0, 1.0]
    logs = [math.log(v) for v in a]
    mean = sum(logs) / 3
    half = 4.3027 * math.sqrt(sum((v - mean) ** 2 for v in logs) / 2) / math.sqrt(3)
    want = (math.exp(mean), math.exp(mean - half), math.exp(mean + half))
    assert bench.ratio_interval(a, b) == pytest.approx(want, rel=1e-3)
    assert bench.ratio_interval([1.5], [1.0])[0] == pytest.approx(1.5)
    assert math.isnan(bench.ratio_interval([1.5], [1.0])[1])
    draw, covered = random.Random(0), 0
    for _ in range(200):  # a true ratio of 2 under multiplicative noise
        pairs = [(2 * draw.lognormvariate(0, 0.1), draw.lognormvariate(0, 0.1)) for _ in range(10)]
        _, low, high = bench.ratio_interval(*zip(*pairs))
        covered += low < 2 < high
    assert 180 <= covered <= 198


# ---------------------------------------------------------------- counts


@pytest.mark.parametrize("method, extra", [
    ("DDPO", bench.DDPO), ("B2", []), ("B2, tau = T", ["--tau0", "5"]),
    ("B2, no guidance", ["--guidance", "1"]), ("B2, micro-batch 1", ["--micro-batch", "1"])])
def test_counts_equal_the_least(flags, method, extra):  # fmt: skip
    """Whatever the method and the batches: a micro-batch of one shares a pair's first step too."""
    s = bench.setup([*flags, *extra])
    randomise_lora(s.model.unet)
    rows = bench.counts(s, method)
    assert [row["phase"] for row in rows] == ["sampling", "training"]
    for row in rows:
        assert row["measured"] == row["least"] > 0, row


def test_least_by_hand(flags):
    """T 5, tau 3, K 3, 4 roots: 2 + 1 + 3 * 2 a root; a pair 5, a single 3; x 2 for guidance."""
    s = bench.setup(flags)
    kept = torch.tensor([[0, 0, 1], [0, 0, 2], [3, 3, 0]])
    assert bench.least(s, kept) == (2 * 4 * 9, 2 * 2 * (5 + 3))


def test_training_leaves_the_weights_alone(flags):
    """All turns do the same work: the learning rate is 0, and every update is a full step."""
    s = bench.setup(flags)
    before = {k: v.detach().clone() for k, v in s.lora.items()}
    bench.one_round(s)
    assert all(torch.equal(before[k], v) for k, v in s.lora.items())
    assert any(v.grad is not None and v.grad.any() for v in s.lora.values())


# ---------------------------------------------------------------- parts


def test_saved_bytes_counts_what_autograd_keeps(flags):
    """It grows by the same amount with each sample."""
    s = bench.setup(flags)
    one, two, three = (bench.saved_bytes(s, n)[0] for n in (1, 2, 3))
    assert 0 < one < two and three - two == pytest.approx(two - one, rel=0.01)


def test_memory_peak_falls_back_after_reset():
    """A block of 200 MB shows in the peak until the next reset, not in what is held now."""
    bench.memory("reset")
    start = bench.memory("peak")
    with mmap.mmap(-1, 200 * bench.MB) as block:  # not malloc's, which may keep what is freed
        block.write(bytes(200 * bench.MB))
    assert bench.memory("peak") - start > 150 * bench.MB
    assert bench.memory("now") - start < 50 * bench.MB
    if os.access("/proc/self/clear_refs", os.W_OK):
        bench.memory("reset")
        assert bench.memory("peak") - start < 50 * bench.MB


def test_parts_run(flags, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "BATCHES", (4, 8))
    monkeypatch.setattr(bench, "SWEEP", {"micro_batch": (2,)})
    out = tmp_path / "bench.json"
    bench.main(["--part", "overhead", "larger", "phases", "counts", "sweep", "memory", "--repeats", "2",
                "--json", str(out), *flags, "--queries", "6", "--epochs", "1"])  # fmt: skip
    results, printed = json.loads(out.read_text()), capsys.readouterr().out
    for letter in "abcdm":
        assert f"({letter})" in printed and any(k.startswith(f"({letter})") for k in results)
    small, large = (rows for title, rows in results.items() if title.startswith("(a)"))
    assert [row["phase"] for row in small] == [row["phase"] for row in large]
    assert 5 < large[0]["UNet, M"] / small[0]["UNet, M"] < 20
    for row in small + large:
        ratio, low, high = row["round / calls of its sizes"]
        assert 0 < low <= ratio <= high
    shares = next(rows for title, rows in results.items() if title.startswith("(b)"))
    *parts, whole = (row["s a round"] for row in shares)
    assert sum(parts) == pytest.approx(whole) and all(part >= 0 for part in parts)


class FakeWorker:
    """Answers as a worker would, with times that are known: TRL 6, DDPO 3, B2 2 a query at best."""

    loaded = 100 * bench.MB

    def __init__(self, mode, setting, threads, python=None):
        peer = mode == "--as-peer"
        value = lambda flag: int(setting[len(setting) - setting[::-1].index(flag)])  # noqa: E731
        self.sample = setting["sample_batch"] if peer else value("--sample-batch")
        self.micro = setting["micro_batch"] if peer else value("--micro-batch")
        assert not peer or self.sample >= self.micro and python == "old/python"
        self.cost = 6 if peer else 3 if "--no-bs" in setting else 2

    def round(self):
        """Sampling is fastest at 8, training at 4, each twice as slow elsewhere; 12 queries."""
        sampling = 4 * self.cost * (1 if self.sample == 8 else 2)
        training = 8 * self.cost * (1 if self.micro == 4 else 2)
        return {"sampling": sampling, "training": training, "round": sampling + training,
                "kept": 12, "peak": 130 * bench.MB, "peak sampling": 120 * bench.MB}  # fmt: skip

    def close(self):
        pass


def test_peer_report(flags, monkeypatch):
    """The best batches of each, TRL's sample batch not below its micro-batch; the ratios."""
    monkeypatch.setattr(bench, "Worker", FakeWorker)
    monkeypatch.setattr(bench, "PEER_BATCHES", (4, 8, 16))
    rows, ratios = bench.peer([*flags, "--queries", "16"], "old/python", 2)
    batches = {row["batches"] for row in rows}
    assert batches == {"paper's (8, 2)", "best (8, 4)"} and len(rows) == 6
    assert {(row["MB loaded"], row["MB peak"], row["peak - loaded"]) for row in rows} == {
        (100, 130, 30)}  # fmt: skip
    got = {(r["TRL's batches"], r["against"][:8], r["batches"]):
           r["times fewer seconds a query"][0] for r in ratios}  # fmt: skip
    assert got == pytest.approx({
        ("paper's", "our DDPO", "paper's"): 2, ("paper's", "our DDPO", "best"): 2 * 5 / 3,
        ("best", "our DDPO", "best"): 2, ("paper's", "our B2 a", "paper's"): 3,
        ("paper's", "our B2 a", "best"): 3 * 5 / 3, ("best", "our B2 a", "best"): 3})  # fmt: skip
    rows, ratios = bench.peer([*flags, "--queries", "16"], "old/python", 2, (8, 4))
    assert [row["batches"] for row in rows] == ["given (8, 4)"] * 3 and len(ratios) == 2
    assert ratios[0]["times fewer seconds a query"][0] == pytest.approx(2)


@pytest.mark.skipif("TRL_PYTHON" not in os.environ, reason="TRL_PYTHON: an interpreter with TRL")
def test_peer_runs(flags, monkeypatch, tmp_path):
    """A tiny round of TRL 0.23.1's DDPOTrainer against ours, on the same folder."""
    monkeypatch.setattr(bench, "PEER_BATCHES", (4,))
    monkeypatch.setattr(bench, "PAPER_BATCHES", (4, 2))
    out = tmp_path / "bench.json"
    bench.main(["--peer", os.environ["TRL_PYTHON"], "--repeats", "1", "--json", str(out), *flags])
    rows, ratios = [v for title, v in json.loads(out.read_text()).items() if title[:3] == "(e)"]
    assert len(rows) == 6 and len(ratios) == 6
    assert all(row["training, s a query"] > 0 and row["MB peak"] > 0 for row in rows)


def test_peer_imports_only_the_standard_library():
    """As the peer, bench.py is loaded by an interpreter that lacks this project's packages."""
    import subprocess

    code = "import sys; sys.argv = ['bench.py', '--as-peer']; import bench; " \
           "print(sorted({'torch', 'numpy', 'train', 'diffusers'} & set(sys.modules)))"  # fmt: skip
    out = subprocess.run([sys.executable, "-S", "-c", code], cwd=bench.HERE, text=True,
                         capture_output=True, check=True).stdout  # fmt: skip
    assert out.strip() == "[]"
