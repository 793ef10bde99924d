"""studies/bench.py: counts equal the least, intervals against closed forms, parts in small."""

import math
import random
from types import SimpleNamespace

import pytest
import torch
from conftest import count_unet_samples, make_small

import run_folder
import train
from lora import inject_lora, lora_parameters
from studies import bench

SMALL = "--device=cpu --T=4 --tau0=2 --branches=3 --queries=6 --sample-batch=6 --micro-batch=4 "
SMALL += "--epochs=1 --update-size=4 --decode-batch=5 --threads=1 --threshold=0 --reward=jpeg"


@pytest.fixture
def flags(random_folder, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\n")
    out = tmp_path / "no-run"
    return [f"--model={random_folder}", f"--prompts={prompts}", f"--out={out}", *SMALL.split()]


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


def test_interleave_takes_turns_and_drops_the_first():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    log = bench.interleave(calls, 2)
    assert order == list("ababab") and {name: len(times) for name, times in log.items()} == {
        "a": 2,
        "b": 2,
    }


# ---------------------------------------------------------------- rounds under watch


def test_watch_follows_rounds_that_leave_the_weights_alone(flags):
    """All turns do the same work: tau stays, gradients are real, LoRA's up weights stay ~0."""
    lines, sampled, original = [], [], (run_folder.append_metrics, train.load_model, train.score)

    def pause(s):
        lines.append(s.line)
        sampled.append(sum(s.sizes["sampling"]))
        return len(lines) == 3

    s = bench.watch([*flags, "--tau0=2"], pause)
    assert [line["round"] for line in lines] == [1, 2, 3] and {line["tau"] for line in lines} == {2}
    assert sampled[0] > 0 and set(sampled) == {sampled[0]}
    assert all(line["grad_norm"] > 0 and line["updates"] > 0 for line in lines)
    up = [v for k, v in lora_parameters(s.model.unet).items() if k.endswith("lora_B.weight")]
    assert max(v.abs().max() for v in up) < 1e-9
    assert len(s.kept) == s.line["kept"] and s.line["seconds"]["training"] > 0
    assert original == (run_folder.append_metrics, train.load_model, train.score)


@pytest.mark.parametrize(
    "more",
    [
        "--queries=12 --threshold=0.5 --epochs=2",  # pairs and singles
        "--guidance=1 --step-weight=rms",
        "--micro-batch=1 --interval=forward",
    ],
)
def test_counts_equal_the_least(flags, more):
    """Whatever the method, the batches and the weights of the steps."""
    rows = bench.counts([*flags, *more.split()])
    assert [(row["method"], row["phase"]) for row in rows] == [
        (method, phase) for method in ("DDPO", "B2", "B2") for phase in ("sampling", "training")
    ]
    assert [row["tau"] for row in rows] == [4, 4, 2, 2, 4, 4]
    for row in rows:
        assert row["measured"] == row["least"] > 0, row


def test_least_by_hand(flags):
    """T 5, tau 3, K 3, 4 roots: 2 + 1 + 3 * 2 a root; 2 epochs of 3 steps; x 2 for guidance."""
    cfg = train.parse_args([*flags, "--T=5", "--tau0=3", "--queries=12", "--epochs=2"])
    kept = torch.tensor([[0, 0, 1], [0, 0, 2], [3, 3, 0]])  # a pair and a single
    assert bench.least(cfg, kept) == (2 * 4 * 9, 2 * 2 * 9, pytest.approx(100 / 9))
    alone = torch.tensor([[0, 0, 0], [1, 1, 0]])
    assert bench.least(cfg, alone)[2] == 0


# ---------------------------------------------------------------- parts


def test_bare_makes_these_calls_and_no_others():
    model = make_small()
    inject_lora(model.unet)
    decoded, scored, decode = [], [], model.pipe.vae.decode
    reward = lambda images, prompts: scored.append((len(images), torch.is_grad_enabled()))
    s = SimpleNamespace(model=model, reward=reward, cfg=SimpleNamespace(decode_batch=3))
    run = bench.bare(s, [4, 2, 4], False, 5)
    model.pipe.vae.decode = lambda x, **o: decoded.append(len(x)) or decode(x, **o)
    with count_unet_samples(model.unet) as seen:
        run()
    assert seen == [4, 2, 4] and decoded == [3, 2]
    assert scored == [(3, False), (2, False)]
    assert all(p.grad is None for p in model.unet.parameters())
    bench.bare(s, [2], True)()
    assert any(p.grad is not None and p.grad.any() for p in model.unet.parameters())


def test_cut():
    assert [bench.cut(7, 3), bench.cut(6, 3), bench.cut(0, 3)] == [[3, 3, 1], [3, 3], []]


def test_saved_bytes_counts_what_autograd_keeps(flags):
    """It grows by the same amount with each sample, and is less with checkpointing."""
    model = bench.load_one(flags).model
    (one, block), (two, _), (three, blocks) = (bench.saved_bytes(model, n) for n in (1, 2, 3))
    assert 0 < one < two and three - two == pytest.approx(two - one, rel=0.01)
    assert one < 1.1 * (two - one)  # the weights are left out
    assert 0 < block < blocks < three
    model.unet.enable_gradient_checkpointing()
    model.unet.train()
    outer = [bench.saved_bytes(model, n)[0] for n in (1, 2)]
    assert 0 < outer[1] - outer[0] < (two - one) / 2


def test_first_ratio_is_of_weights_that_are_not_zero(flags, monkeypatch):
    found, watch = [], bench.watch
    monkeypatch.setattr(bench, "DTYPES", {"fp32": torch.float32})
    monkeypatch.setattr(bench, "watch", lambda *a: found.append(watch(*a)) or found[-1])
    rows = bench.first_ratio(flags)
    assert [row["shapes"] for row in rows] == ["equal", "other"]
    for row, s in zip(rows, found):
        assert float(row["max log ratio"]) < 1e-5 and s.line["kl_to_base"] > 0
        assert s.line["updates"] == 1 and len(s.kept) >= 4
    assert set(found[0].sizes["sampling"] + found[0].sizes["training"]) == {2}  # guidance


def test_parts_run(flags, monkeypatch, capsys):
    monkeypatch.setattr(bench, "BATCHES", (4,))
    monkeypatch.setattr(bench, "OPTIONS", ("--channels-last",))
    found = {}
    for name, part in bench.PARTS.items():
        keep = lambda *a, name=name, part=part: found.setdefault(name, part(*a))
        monkeypatch.setitem(bench.PARTS, name, keep)
    parts = ["overhead", "larger", "phases", "variants", "memory"]
    bench.main(["--part", *parts, "--repeats=1", *flags, "--queries=6"])
    printed = capsys.readouterr().out
    assert all(f"**{name}**" in printed for name in parts) and list(found) == parts
    small, large = found["overhead"], found["larger"]
    assert [row["phase"] for row in small + large] == ["sampling", "training"] * 2
    assert 5 < large[0]["UNet, M"] / small[0]["UNet, M"] < 20
    for row in small + large:
        assert row["s"] > 0 and 0 < row["over calls of its own sizes"][0] < math.inf
        assert row["samples"] > row["calls"] > 0 and row["fastest size"] in (4, 8, 12)
    *phases, whole = (row["s"] for row in found["phases"])
    assert sum(phases) == pytest.approx(whole) and all(part > 0 for part in phases)
    (option,) = found["variants"]
    assert option.pop("option") == "--channels-last"
    assert len(option) == 2 and all(0 < ratio[0] < math.inf for ratio in option.values())
    figures = [row["figure"] for row in found["memory"]]
    assert len(figures) == 10 and all(figure > 0 for figure in figures)


def test_larger_without_a_folder_ends_with_a_line(flags, capsys):
    with pytest.raises(SystemExit):
        bench.larger([*flags, "--model=nobody/nothing"], 1)
    assert "larger needs the folder" in capsys.readouterr().err
