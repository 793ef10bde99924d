"""studies/bench.py: counts equal the least, intervals by hand and by coverage, bare calls."""

import pytest
import torch
from conftest import count_unet_samples, make_small

import train
from lora import inject_lora
from studies import bench

SMALL = "--device=cpu --T=4 --tau0=2 --branches=3 --queries=6 --sample-batch=6 --micro-batch=4 "
SMALL += "--epochs=1 --update-size=4 --decode-batch=5 --threads=1 --threshold=0 --reward=jpeg"


@pytest.fixture
def flags(random_folder, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\n")
    return [f"--model={random_folder}", f"--prompts={prompts}", *SMALL.split()]


def numbers(text):
    """The ratio and its interval out of "1.020 (1.010 to 1.030)"."""
    return [float(word) for word in text.replace("(", "").replace(")", "").split() if word != "to"]


def test_a_ratio_is_of_pairs():
    assert numbers(bench.ratios([2.0, 4.0, 9.0], [1.0, 1.0, 3.0])) == [3, 2, 4]


@pytest.mark.parametrize(
    "more",
    [
        "--queries=12 --threshold=0.5 --epochs=2",  # pairs and singles
        "--guidance=1 --step-weight=rms --micro-batch=1",
        "--no-bpt --no-bs",
    ],
)
def test_counts_equal_the_least_in_rounds_that_leave_the_weights_alone(flags, more):
    """Random weights that are not zero: the first ratio is 1, and the gradient is real."""
    weights = []

    def look(cfg, pipeline, reward, metrics):
        wanted = bench.least(cfg, metrics["tau"], metrics["kept"])
        assert {phase: sum(n) for phase, n in metrics["sizes"].items()} == wanted
        assert min(wanted.values()) > 0 and max(metrics["sizes"]["reward"]) <= 5
        lora = bench.train.lora_state(pipeline.policy.unet)
        weights.append(torch.cat([v.flatten() for v in lora.values()]))

    lines = bench.watch([*flags, *more.split()], 2, look)
    assert [line["round"] for line in lines] == [1, 2]
    assert {line["tau"] for line in lines} == {4 if "no-bpt" in more else 2}
    assert all(line["grad_norm"] > 0 and line["first_max_log_ratio"] < 1e-5 for line in lines)
    assert weights[0].std() == pytest.approx(0.05, rel=0.1)
    assert torch.allclose(weights[0], weights[1], atol=1e-7)
    assert train.inject_lora is inject_lora


def test_least_by_hand(flags, tmp_path):
    """T 5, tau 3, K 3, 4 roots: 2 + 1 + 3 * 2 a root; 2 epochs of 3 steps; x 2 for guidance."""
    more = ["--T=5", "--tau0=3", "--queries=12", "--epochs=2", f"--out={tmp_path}/new"]
    cfg = train.parse_args([*flags, *more])
    assert bench.least(cfg, 3, 7) == {
        "sampling": 2 * 4 * 9,
        "reward": 12,
        "training": 2 * 2 * 3 * 7,
    }


def test_bare_makes_these_calls_and_no_others():
    pipeline = make_small()
    inject_lora(pipeline.policy.unet)
    scored = []
    decoded = []
    decode = pipeline.pipe.vae.decode
    reward = lambda images, prompts: scored.append((len(images), torch.is_grad_enabled()))
    calls = {
        phase: bench.bare(pipeline, reward, phase, [4, 2, 4]) for phase in ("sampling", "reward")
    }
    pipeline.pipe.vae.decode = lambda x, **options: decoded.append(len(x)) or decode(x, **options)
    with count_unet_samples(pipeline.policy.unet) as seen:
        calls["sampling"]()
        assert seen == [4, 2, 4] and decoded == scored == []
        calls["reward"]()
    assert seen == decoded == [4, 2, 4]
    assert scored == [(4, False), (2, False), (4, False)]
    assert all(p.grad is None for p in pipeline.policy.unet.parameters())
    bench.bare(pipeline, reward, "training", [2])()
    assert any(p.grad is not None and p.grad.any() for p in pipeline.policy.unet.parameters())


def test_the_command_prints_a_row_a_phase(flags, capsys):
    bench.main(["--turns=2", *flags])
    *_, text, phases = capsys.readouterr().out.split("\n\n")
    first, second = text.splitlines()
    assert first.startswith("cpu, fp32, 1 threads, ") and "GFLOP/s" in first
    assert second.startswith("tau 2, ") and " MB at most" in second
    assert float(second.split("before an update ")[1]) < 1e-5
    rows = [line.strip("| ").split(" | ") for line in phases.splitlines()[2:]]
    assert [row[0] for row in rows] == ["sampling", "training", "reward"]
    for _, calls, samples, wanted, seconds, ratio in rows:
        assert int(samples) == int(wanted) >= int(calls) > 0 and float(seconds) > 0
        ratio, low, high = numbers(ratio)
        assert low <= ratio <= high
