"""Studies against brute force on the random pipeline, the matrix of runs, bad input."""

import builtins
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, brightness, make_small, randomise_lora

import eval as evaluation
import train
from b2rl import RewardNormaliser
from ddim_logprob import ddim_mean, guided_prediction, keyed_generator, log_prob
from lora import inject_lora, lora_layers, lora_state
from rewards import checked
from report import write_lora
from studies import common, compare, curves, gradient_signal, last_step, matrix, shortcuts
from studies import table5, tree
from tiny import recognise

PROMPTS = ["cat", "dog", "bird"]


def score(images, prompts):
    """A stand-in for CLIP: mean brightness and a little for each letter of the prompt."""
    return images.mean((1, 2, 3)) + torch.tensor([0.01 * len(p) for p in prompts])


def judge(images, prompts):
    """Right if the picture's corner is bright: as good as random on a random pipeline."""
    return images[:, 0, :8, :8].mean((1, 2)) > 0.5


@pytest.fixture
def small():
    return make_small(T=6, guidance=3.0, sample_batch=4, decode_batch=3)


@pytest.fixture
def args(tmp_path):
    return SimpleNamespace(roots=5, branches=3, differ=0.7, seed=3, out=str(tmp_path))


@pytest.fixture
def rewards():
    return {"clip": checked(score, "clip")}


def step(model, x, t, prompt, generator):
    """One DDIM step of one latent, straight from Eq. 1."""
    time, schedule = torch.tensor([t]), model.schedule
    cond, uncond = model.embed([prompt]), model.embed([""])
    with torch.no_grad():
        eps = guided_prediction(model.unet, schedule, x, time, cond, uncond, model.guidance)
    mu, sigma = ddim_mean(schedule, eps, x, time)
    return mu + sigma * torch.randn(x.shape[1:], generator=generator)


def draw(model, x, start, prompt, generator):
    for t in range(start, 0, -1):
        x = step(model, x, t, prompt, generator)
    return model.decode(x)


def noise(model, *key):
    return torch.randn(1, *model.latent_shape, generator=keyed_generator(*key))


# ---------------------------------------------------------------- the studies that draw


def test_differs_is_max_minus_min_above_the_threshold():
    scores = torch.tensor([[0.0, 1.0, 0.5], [0.4, 0.5, 0.6], [1.0, 1.0, 1.0]])
    assert table5.differs(scores, 0.3).tolist() == [True, False, False]
    assert table5.differs(scores, 0.0).tolist() == [True, True, False]  # judge: some, not all


def test_wilson_intervals():
    """Against the textbook's figures, and where p is 0 or 1."""
    assert common.wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert common.wilson(0.0, 128) == pytest.approx((0.0, 0.0291), abs=1e-4)
    assert common.wilson(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


def test_table5_is_the_share_that_brute_force_counts(small, rewards, args, capsys):
    args.roots = 4
    got = table5.table5(small, rewards, judge, PROMPTS, args)
    assert got["steps"] == [2, 4, 6] and (got["roots"], got["branches"]) == (4, 3)
    scores, right = ({t: [] for t in got["steps"]} for _ in range(2))
    for p in range(4):
        prompt, key = PROMPTS[p % 3], (3, "table5", p)
        x, path = noise(small, *key, "x_T"), keyed_generator(*key, "path")
        for t in range(6, 0, -1):
            if t in scores:
                keys = [keyed_generator(*key, t, k) for k in range(3)]
                pictures = [draw(small, x, t, prompt, generator) for generator in keys]
                length = 0.01 * len(prompt)
                scores[t].append([picture.mean().item() + length for picture in pictures])
                right[t].append([judge(picture, [prompt]).item() for picture in pictures])
            x = step(small, x, t, prompt, path)
    unit = math.sqrt(np.mean([np.var(row, ddof=1) for row in scores[6]]))
    for n, t in enumerate(got["steps"]):
        gaps = [max(row) - min(row) for row in scores[t]]
        assert min(abs(gap - 0.7 * unit) for gap in gaps) > 1e-5  # no coin toss in this test
        assert got["share"]["clip"][n] == pytest.approx(sum(g > 0.7 * unit for g in gaps) / 4)
        some = sum(0 < sum(row) < 3 for row in right[t]) / 4
        assert got["share"]["recognised"][n] == pytest.approx(some)
        within = math.sqrt(np.mean([np.var(row, ddof=1) for row in scores[t]]))
        assert got["std_within"]["clip"][n] == pytest.approx(within, rel=1e-2)
    assert got["threshold"] == {"clip": pytest.approx(0.7 * unit, rel=1e-3), "recognised": 0}
    assert got["share"]["clip"][2] > 0 and got["share"]["clip"][0] < 1
    assert got["std_within"]["clip"][0] < got["std_within"]["clip"][2]
    assert (ROOT / args.out / "table5.png").stat().st_size > 1000
    assert "\n".join(table5.table(got)) in capsys.readouterr().out


def test_table_5_shows_intervals_and_the_papers_shares():
    steps = list(range(2, 21, 2))
    shares = [0.5, 0.1, 0.2, 0.3, 0.3, 0.4, 0.4, 0.5, 0.5, 0.9]
    result = {"steps": steps, "roots": 100, "share": {"recognised": shares}}
    result |= {"std_within": {"recognised": [0.25] * 10}}
    lines = table5.table(result | {"relative_variance": {"recognised": [0.5] * 10}})
    assert lines[0].split(" | ")[1:3] == ["2", "4"] and len(lines) == 7
    assert lines[4].startswith("| judge, variance of r_hat over that at T | 0.50 | ")
    gaps = [p - q for p, q in zip(shares[1:], table5.PAPER[1:])]
    rms = 100 * math.sqrt(np.mean(np.square(gaps)))
    assert f"RMS to the paper, t = 4..20: {rms:.1f} points" in lines[5]
    assert lines[2].startswith("| judge differs, % | 50.0 (40.4 to 59.6) | ")
    assert lines[3].startswith("| judge, std within a branch | 0.2500 | ")
    assert lines[6] == "| paper, % | " + " | ".join(f"{100 * p:.1f}" for p in table5.PAPER) + " |"


def test_variance_within_a_branch_is_of_scores_over_their_prompts_std():
    """Two prompts whose scores differ tenfold in size count alike."""
    torch.manual_seed(0)
    first = torch.randn(5, 4000, 3) * torch.tensor([1.0, 2, 2, 3, 4])[:, None, None]
    both = torch.stack([first, 10 * first + 5], 2).flatten(1, 2)  # (5, 8000, 3)
    found = table5.relative_variance(both, ["a", "b"] * 4000)
    assert torch.allclose(found, table5.relative_variance(first, ["a"] * 4000), atol=1e-5)
    assert torch.allclose(found, torch.tensor([1.0, 4, 4, 9, 16]) / 16, atol=0.05)
    assert table5.relative_variance(torch.ones(2, 4, 3), ["a"] * 4).tolist() == [0, 0]


def test_last_step_pairs_share_all_but_the_last_step(small, rewards, args, capsys):
    got = last_step.last_step(small, rewards, judge, PROMPTS, args)
    for p in (0, 4):
        prompt, key = PROMPTS[p % 3], (3, "last-step", p)
        x, generator = noise(small, *key, "x_T"), keyed_generator(*key, "path")
        for t in range(6, 1, -1):
            x = step(small, x, t, prompt, generator)
        pair = [draw(small, x, 1, prompt, keyed_generator(*key, k)).mean() for k in range(2)]
        gap = abs(pair[0] - pair[1]).item()
        assert got["clip"]["differences"][p] == pytest.approx(gap, abs=1e-5)
    gaps = got["clip"]["differences"]
    assert len(gaps) == 5 and max(gaps) > 0 and set(got) == {"pairs", "clip"}
    assert got["clip"]["above_0.01"] == sum(g > 0.01 for g in gaps) / 5
    assert (ROOT / args.out / "last-step.png").stat().st_size > 1000
    numbers = f"{np.mean(gaps):.5f} | {max(gaps):.5f} | {sum(g > 0.01 for g in gaps) / 5:.1%}"
    assert f"| CLIPScore | 5 | {numbers} |" in capsys.readouterr().out
    scale = 0.01 / sorted(gaps)[2]  # one difference at 0.01, two below and two above
    rewards = {"own": lambda images, prompts: 1.001 * scale * score(images, prompts)}
    got = last_step.last_step(small, rewards, None, PROMPTS, args)
    assert got["own"]["above_0.01"] == pytest.approx(0.6)


def test_tree_has_rewards_on_its_leaves(small, rewards, args):
    args.branches = 2
    got = tree.tree(small, rewards, judge, PROMPTS, args)
    assert got["starts"] == [6, 4, 2] and len(got["clip"]) == len(got["recognised"]) == 8
    leaves = np.array(got["clip"])
    assert len(set(leaves)) == 8  # siblings, cousins and strangers: all noise is different
    near = np.abs(leaves[0::2] - leaves[1::2]).mean()
    assert near < leaves.std()  # those that part last are most alike
    assert (ROOT / args.out / "tree.png").stat().st_size > 1000
    x, key = noise(small, 3, "tree", "cat", "x_T"), (3, "tree", "cat")
    for start, stop, j in ((6, 4, 1), (4, 2, 2), (2, 0, 5)):  # the way to leaf 5
        generator = keyed_generator(*key, start, j)
        for t in range(start, stop, -1):
            x = step(small, x, t, "cat", generator)
    picture = small.decode(x)
    assert leaves[5] == pytest.approx(picture.mean().item() + 0.03, abs=1e-5)


# ---------------------------------------------------------------- curves, comparisons

CONFIG = {"algo": "ddpo", "no_bpt": True, "no_bs": True, "interval": "backward", "seed": 0}
CONFIG |= {"lr": 1e-3, "reward": "clip", "sample_batch": 8, "model": "tiny", "rounds": 3}


def write_run(folder, rewards, **config):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    lines = []
    for i, reward in enumerate(rewards):
        line = {"round": i + 1, "queries": 10 * (i + 1), "reward_mean": reward}
        line["seconds"] = {"sampling": 40 * reward, "training": 20 * reward}
        lines.append(line | {"spread_within_prompt": 0.2 / (i + 1), "recognised": 0.1 * i})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def test_curves_are_grouped_by_method_with_mean_and_spread_over_seeds(tmp_path, capsys):
    more = dict(out="b", sample_batch=4, tensorboard=True, eval_images=2)
    folders = [
        write_run(tmp_path / "a", [1.0, 2.0, 5.0], seed=0),
        write_run(tmp_path / "b", [3.0, 6.0], seed=1, **more),
        write_run(tmp_path / "c", [0.0, 1.0], no_bpt=False, no_bs=False),
        write_run(tmp_path / "d", [0.0, 1.0], no_bpt=False, no_bs=False, lr=2e-3),
        write_run(tmp_path / "e", [0.0, 1.0], algo="pg", no_bs=False),
    ]
    groups = curves.group_runs(folders)
    assert {k: list(v) for k, v in groups.items()} == {
        "ddpo": ["0", "1"],
        "ddpo-bpt-bs, lr 0.001": ["0"],
        "ddpo-bpt-bs, lr 0.002": ["0"],
        "pg-bs": ["0"],
    }
    queries, mean, spread = curves.curve(groups["ddpo"].values(), "reward_mean")
    assert queries == [10, 20] and mean.tolist() == [2, 4]  # only the rounds that both have
    expected = [np.std([1, 3], ddof=1), np.std([2, 6], ddof=1)]
    assert spread.tolist() == pytest.approx(expected)
    assert curves.curve(groups["pg-bs"].values(), "reward_mean")[2].tolist() == [0, 0]
    curves.main(["--runs", *folders, "--out", str(tmp_path / "out")])
    saved = json.loads((tmp_path / "out/curves.json").read_text())
    first = saved["ddpo"]["reward_mean"]
    assert first["mean"] == [2, 4] and first["std"] == pytest.approx(expected)
    assert first["queries"] == [10, 20] and first["minutes"] == [2, 6]  # a: 1, 3; b: 3, 9
    assert saved["ddpo"]["recognised"]["mean"] == pytest.approx([0, 0.1])
    assert "kl_to_base" not in saved["ddpo"]  # no run has it
    assert saved["ddpo"]["spread_within_prompt"]["mean"] == pytest.approx([1.0, 0.5])
    assert (tmp_path / "out/curves.png").stat().st_size > 1000
    assert "| ddpo | 2 | 20 | 2.0000 | 4.0000 | 2.8284 |" in capsys.readouterr().out


def test_curves_draw_what_all_runs_have(tmp_path):
    runs = [write_run(tmp_path / name, [1.0, 2.0], seed=k) for k, name in enumerate("ab")]
    metrics = tmp_path / "a/metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"round"', '"kl_to_base": 0.5, "round"'))
    curves.main(["--runs", *runs, "--out", str(tmp_path / "out")])
    saved = json.loads((tmp_path / "out/curves.json").read_text())["ddpo"]
    assert {*saved} == {"seeds", "reward_mean", "spread_within_prompt", "recognised"}


def test_style_entropy_is_drawn_where_eval_has_scored_it(tmp_path):
    """After rounds 1 and 3, the last; of round 2 one of the runs has none."""
    runs = [write_run(tmp_path / name, [1.0, 2.0, 3.0], seed=k) for k, name in enumerate("ab")]
    for name, nats in (("round0001", 1.0), ("round0003", 9.0), ("train", 0.5)):
        for k, run in enumerate(runs):
            folder = Path(run) / f"eval-{name}"
            folder.mkdir()
            row = {"style entropy": nats + 0.2 * k, "n": 8}
            (folder / "scores.json").write_text(json.dumps({"results": {"lora": row}}))
    (tmp_path / "a/eval-round0002").mkdir()
    (tmp_path / "a/eval-round0002/scores.json").write_text('{"results": {"lora": {"n": 8}}}')
    curves.main(["--runs", *runs, "--out", str(tmp_path / "out")])
    found = json.loads((tmp_path / "out/curves.json").read_text())["ddpo"]["style_entropy"]
    assert found["queries"] == [10, 30] and found["minutes"] == [1, 6]
    assert found["mean"] == pytest.approx([1.1, 0.6])
    assert found["std"] == pytest.approx([0.2 / 2**0.5] * 2)


def test_runs_that_are_no_seeds_of_one_line_are_told_apart_by_rounds(tmp_path):
    """Resuming may change the rounds, but another number of rounds is another tau schedule."""
    a = write_run(tmp_path / "a", [1.0], seed=0)
    b = write_run(tmp_path / "b", [1.0], seed=1, rounds=4)
    assert set(curves.group_runs([a, b])) == {"ddpo, rounds 3", "ddpo, rounds 4"}


def test_the_error_of_a_difference_is_that_of_seeds_and_pictures():
    """Against simulated seeds and pictures: unbiased, if both matter or only one."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)
    for S, n, of_seed, of_picture in ((3, 8, 1.0, 1.0), (4, 6, 0.0, 2.0), (6, 5, 2.0, 0.0)):
        found = []
        for _ in range(1000):
            x = of_seed * normal(S, 1) + of_picture * normal(1, n) + normal(S, n)
            found.append(compare.two_way(x))
        means, errors = np.array(found).T
        assert np.mean(errors**2) == pytest.approx(means.var(), rel=0.15)
        assert (of_seed**2 / S + of_picture**2 / n + 1 / S / n) == pytest.approx(
            np.mean(errors**2), rel=0.15
        )


def test_the_error_of_a_difference_is_numpys_where_there_is_one_kind():
    x = np.random.default_rng(0).normal(size=6)
    expected = (pytest.approx(x.mean()), pytest.approx(x.std(ddof=1) / 6**0.5))
    assert compare.two_way(torch.tensor(x)[None]) == expected  # one seed: over pictures
    assert compare.two_way(torch.tensor(x)[:, None]) == expected  # rewards of rounds: seeds
    same = torch.tensor(x)[None].repeat(4, 1)  # seeds add nothing to the same pictures
    assert compare.two_way(same) == expected
    assert compare.two_way(torch.tensor([[2.0]])) == (2.0, 0.0)
    # seeds' means 1, 0.5, pictures' too: 0.25 each; the rest is too large to take off
    assert compare.two_way(torch.tensor([[2.0, 0.0], [0.0, 1.0]])) == (0.75, 0.25)


def write_scores(folder, before, after):
    for when, scores in (("before", before), ("after", after)):
        data = {"train": {"score": scores, "recognised": None}}
        (ROOT / folder / f"{when}.json").write_text(json.dumps(data))


def test_two_methods_are_compared_by_seed_and_picture(tmp_path, capsys):
    for seed, (a, b) in enumerate((([1.0, 2.0, 6.0], [1.0, 4.0]), ([0.0, 5.0], [0.0, 1.0]))):
        run = write_run(tmp_path / f"A/{seed}", a, seed=seed, no_bs=False)
        write_scores(run, [0.0, 1.0, 2.0], [1.0 + seed, 2.0, 5.0])  # gains 1 + seed, 1, 3
        run = write_run(tmp_path / f"B/{seed}", b, seed=seed)
        write_scores(run, [0.0, 1.0, 2.0], [1.0, 1.0, 4.0])  # gains 1, 0, 2
    compare.main([str(tmp_path / "A"), str(tmp_path / "B")])
    table = capsys.readouterr().out
    # at 20 queries, which all runs have: 2 - 4 and 5 - 1; means of rounds: 1.5 - 2.5, 2.5 - .5
    assert (
        "| reward at 20 queries | 3.5000 | 2.5000 | +1.0000 +- 3.0000 | -2.0000 | +4.0000 |"
        in table
    )
    assert "| mean reward of 2 rounds | 2.0000 | 1.5000 | +0.5000 +- 1.5000 |" in table
    mean, error = compare.two_way(torch.tensor([[0.0, 1.0, 1.0], [1.0, 1.0, 1.0]]))
    gain = f"{mean:+.4f} +- {error:.4f} | +0.6667 | +1.0000 |"
    assert (
        f"| gain in train score | 1.8333 | 1.0000 | {gain}" in table and "recognised" not in table
    )
    a, b = ([str(tmp_path / f"{method}/{seed}") for seed in (1, 0)] for method in "AB")
    compare.main([*a, "--against", *b])
    assert capsys.readouterr().out.splitlines()[3:] == table.splitlines()[3:]


def test_one_seed_has_no_error_over_seeds(tmp_path, capsys):
    a = write_run(tmp_path / "a", [1.0], no_bs=False)
    b = write_run(tmp_path / "b", [0.5])
    compare.main([a, "--against", b])
    assert (
        "| reward at 10 queries | 1.0000 | 0.5000 | +0.5000 | +0.5000 |" in capsys.readouterr().out
    )


# ---------------------------------------------------------------- signal of the gradient


def test_score_vectors_are_the_gradients_of_each_sample(small):
    inject_lora(small.unet, 2)
    randomise_lora(small.unet, 0.5)
    x = torch.randn(2, 2, 3, *small.latent_shape, generator=torch.Generator().manual_seed(0))
    vectors = gradient_signal.score_vectors(small, x, 5, ["cat", "dog"], size=3)
    ups = [layer.up for layer in lora_layers(small.unet).values()]
    assert vectors.shape == (2, 2, 2, sum(up.numel() for up in ups))
    for p, k, s in ((0, 0, 0), (0, 1, 1), (1, 1, 0)):
        mu, sigma = small.policy(x[p, k, s][None], 5 - s, [["cat", "dog"][p]])
        log_p = log_prob(x[p, k, s + 1][None], mu, sigma)
        expected = torch.cat([g.flatten() for g in torch.autograd.grad(log_p.sum(), ups)])
        got = vectors[p, k, s].float()
        torch.testing.assert_close(
            got, expected, rtol=0.02, atol=1e-3 * expected.abs().max().item()
        )
    assert not any(layer._forward_hooks for layer in lora_layers(small.unet).values())


def test_the_signal_ratio_is_unbiased_and_brute_forces():
    generator, signal = torch.Generator().manual_seed(0), torch.full((50,), 0.3)
    found, noise = [], []
    for _ in range(100):
        g = torch.randn(40, 50, generator=generator)
        found.append(gradient_signal.ratio(g + signal)[0])
        noise.append(gradient_signal.ratio(g))
    assert np.mean(found) == pytest.approx(25 * 4.5 / 54.5, rel=0.05)  # |E g|^2, E |g|^2
    values, errors = np.array(noise).T
    assert abs(values.mean()) < 3 * errors.mean() / 10
    assert errors.mean() == pytest.approx(values.std(), rel=0.2)
    pairs = [(g[p] @ g[q]).item() for p in range(40) for q in range(40) if p != q]
    unit = 25 / np.mean([(g[p] @ g[p]).item() for p in range(40)])
    error = np.std(pairs, ddof=1) / (40 * 39 / 2) ** 0.5
    assert noise[-1] == pytest.approx((unit * np.mean(pairs), unit * error), rel=1e-3)


@pytest.mark.parametrize("weight", ["uniform", "rms"])
def test_the_table_of_signals_holds_each_selection(
    random_folder, tmp_path, capsys, monkeypatch, weight
):
    (tmp_path / "own.py").write_text(
        "def score(images, prompts):\n    return images.mean((1, 2, 3))\n"
    )
    monkeypatch.chdir(tmp_path)
    argv = ["--model", str(random_folder), "--reward", "own.py:score", "--device", "cpu"]
    argv += ["--queries", "8", "--branches", "2", "--T", "5", "--tau0", "4", "--threshold", "0.1"]
    argv += ["--step-weight", weight]
    seen, real = {}, gradient_signal.score_vectors

    def watched(model, x, start, names, size):
        seen.update(x=x, start=start, names=names, vectors=real(model, x, start, names, size))
        seen["raw"] = seen["vectors"].clone()
        return seen["vectors"]

    monkeypatch.setattr(gradient_signal, "score_vectors", watched)
    sample = gradient_signal.sample
    keep_scores = lambda *a: seen.update(scores=(out := sample(*a))[2]) or out
    monkeypatch.setattr(gradient_signal, "sample", keep_scores)
    gradient_signal.main([*argv, "--template", "1"])
    assert seen["x"].shape[:3] == (4, 2, 5) and seen["start"] == 4 and len(seen["names"]) == 4
    lines = capsys.readouterr().out.splitlines()
    columns = ["steps t", "share of g^2", "all (DDPO)", "pairs, threshold 0.1"]
    assert f"| {' | '.join(columns)} | all, less the root's mean |" in lines
    rows = {line.split(" | ")[0]: line[:-2].split(" | ")[1:] for line in lines if " to " in line}
    assert list(rows) == [f"| {r}" for r in ("1 to 2", "3 to 6", "3 to 20", "1 to 7", "1 to 20")]
    r_hat = RewardNormaliser()(0, seen["names"], seen["scores"])
    pairs = torch.where(r_hat.abs() >= 0.1, r_hat, 0.0)  # the best and the worst of two
    pairs = torch.where((r_hat == r_hat.max(1, True)[0]) == (r_hat > 0), pairs, 0.0)
    mean = r_hat - r_hat.mean(1, keepdim=True)
    for name, steps in (("1 to 2", (2, 3)), ("3 to 6", (0, 1))):  # steps of tau 4, from x_4 on
        expected = []
        for w in (r_hat, pairs, mean):
            g = sum((w[..., None] * seen["vectors"][:, :, s].float()).sum(1) for s in steps)
            expected.append("{:+.3f} +- {:.3f}".format(*gradient_signal.ratio(g)))
        assert rows[f"| {name}"][1:] == expected
    # Half of the roots tell the weights, the other half what each step's share is then
    w = seen["raw"][:2].float().square().sum(3).mean((0, 1)).rsqrt()
    w = w / w.mean() if weight == "rms" else torch.ones(4)
    weighted = seen["raw"].float() * w[:, None]
    gap = (seen["vectors"].float() - weighted).norm() / weighted.norm()
    assert gap < 0.01
    energy = torch.einsum("pk,pksn->psn", r_hat, weighted)[2:].square().sum((0, 2))
    (said,) = [line for line in lines if line.startswith(f"step weights {weight}")]
    most = float(said.split()[-1][:-1])
    assert most == pytest.approx(100 * (energy.max() / energy.sum()).item(), abs=1)
    assert rows["| 1 to 7"][0] == "100.0%" and rows["| 3 to 6"][0] == rows["| 3 to 20"][0]
    assert not any(tmp_path.glob("runs"))  # it prints, and leaves no folder


# ---------------------------------------------------------------- shortcuts


def test_reweighting_is_the_base_in_the_shares_of_the_other():
    values, right = ["a", "a", "b", "b"], [1.0, 1.0, 0.0, 1.0]
    assert shortcuts.reweighted(values, right, values) == pytest.approx(0.75)
    assert shortcuts.reweighted(values, right, ["b"] * 3) == pytest.approx(0.5)
    assert shortcuts.reweighted(values, right, ["a", "b", "b", "b"]) == pytest.approx(0.625)
    assert shortcuts.reweighted(values, right, ["c", "a"]) == pytest.approx((0.75 + 1) / 2)


def test_shortcuts_tell_gain_and_shares_apart(small, rewards, args, monkeypatch, capsys):
    """Of pictures that the judge sees: shares and recognition of each value, base and LoRA."""
    inject_lora(small.unet, 2)
    randomise_lora(small.unet, 1.0)
    small.tiny, args.lora, args.images, looked = ROOT / "tiny", ["a run"], 4, []
    half_of = lambda x: x.mean((1, 2)) > x.mean()

    def probabilities(_, images):
        bright = half_of(images[:, 1, 8:16])
        looked.append((bright, half_of(images[:, 0, :8])))
        heads = {"style": 3, "ground": 3, "side": 2, "size": 2}
        one = lambda n: torch.eye(n)[bright.long()]
        return [one(heads.get(name, 2)) for name in recognise.HEADS]

    monkeypatch.setattr(recognise, "load_judge", lambda folder: None)
    monkeypatch.setattr(recognise, "probabilities", probabilities)
    own = lambda images, prompts: half_of(images[:, 0, :8])
    found = shortcuts.shortcuts(small, rewards, own, PROMPTS, args)
    n = 4 * len(PROMPTS)
    bright, right = (torch.cat(column).float() for column in zip(*looked))
    bright, right = bright.view(2, n), right.view(2, n)  # base, LoRA
    assert found["n"] == n and found["gain"] == pytest.approx((right[1] - right[0]).mean().item())
    style = {row[0]: row[1:] for row in found["rows"]}
    for k, value in enumerate(("noto", "twemoji")):
        of = (bright == k).float()
        rates = 100 * (of * right).sum(1) / of.sum(1).clamp(min=1)
        want = torch.stack([100 * of.mean(1), rates], 1).flatten().tolist()
        assert style[f"style {value}"] == pytest.approx(want)
    assert style["style fluent"] == [0, 0, 0, 0]
    moved = shortcuts.reweighted(bright[0].tolist(), right[0].tolist(), bright[1].tolist())
    want = pytest.approx(moved - right[0].mean().item(), abs=1e-6)
    assert found["by reweighting"]["all four"] == want
    assert len(set(bright[1].tolist())) == len(set(right[1].tolist())) == 2
    assert "by reweighting the base by" in capsys.readouterr().out


def test_shortcuts_need_a_lora_and_the_judge(small, rewards, args, capsys):
    args.lora, args.images = [], 1
    for lora, own in (([], judge), (["a run"], None)):
        args.lora = lora
        with pytest.raises(SystemExit):
            shortcuts.shortcuts(small, rewards, own, PROMPTS, args)
        assert "--lora RUN" in capsys.readouterr().err


# ---------------------------------------------------------------- the commands


@pytest.fixture
def no_clip(monkeypatch):
    """Brightness in place of every reward."""
    monkeypatch.setattr(evaluation, "load_reward", lambda name, *_: checked(brightness, name))


def test_a_study_from_the_command_line(no_clip, random_folder, tmp_path):
    prompts, out = tmp_path / "p.txt", tmp_path / "out"
    prompts.write_text("[train]\ncat\ndog\n[unseen]\nbird\n")
    argv = ["--model", str(random_folder), "--device", "cpu", "--prompts", str(prompts)]
    argv += ["--out", str(out), "--batch", "16", "--roots", "2"]
    common.main(last_step.last_step, last_step.parser(), argv)
    data = json.loads((out / "last-step.json").read_text())
    assert data["pairs"] == len(data["clip"]["differences"]) == 2
    assert data["settings"]["roots"] == 2 and data["settings"]["T"] == 20
    with pytest.raises(SystemExit):
        common.main(last_step.last_step, last_step.parser(), argv)  # it overwrites nothing


def test_a_study_of_a_run_draws_with_its_lora_and_settings(no_clip, random_folder, model, tmp_path):
    inject_lora(model.unet, 2)
    randomise_lora(model.unet, 0.5)
    run = tmp_path / "run"
    config = {**CONFIG, "model": str(random_folder), "T": 4, "eta": 1.0, "guidance": 2.0}
    write_run(run, [1.0], **config)
    write_lora(run, lora_state(model.unet))
    leaves = {}
    for name, own in (("lora", ["--lora", str(run)]), ("base", ["--T", "4", "--guidance", "2"])):
        argv = [*own, "--model", str(random_folder), "--prompt", "cat", "--device", "cpu"]
        common.main(
            tree.tree, tree.parser(), [*argv, "--metrics", "jpeg", "--out", str(tmp_path / name)]
        )
        data = json.loads((tmp_path / name / "tree.json").read_text())
        assert (
            data["prompt"] == "cat" and data["settings"]["T"] == 4 and data["starts"] == [4, 3, 1]
        )
        leaves[name] = data["jpeg"]
    assert leaves["lora"] != leaves["base"]


def fails(capsys, study, *argv):
    """The error line of a study's command: one line after any progress bar, exit code 2."""
    with pytest.raises(SystemExit) as stop:
        if hasattr(study, "parser"):
            common.main(None, study.parser(), [str(a) for a in argv])
        else:
            study.main([str(a) for a in argv])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in error
    assert error.count("error: ") == 1 and error.splitlines()[-1].startswith("error: "), error
    return error


@pytest.mark.parametrize(
    "study, argv, words",
    [
        (table5, ["--branches", "1"], "--branches must be 2 or more"),
        (table5, ["--roots", "0"], "--roots must be 1 or more"),
        (table5, ["--differ", "0"], "--differ must be above 0"),
        (table5, ["--differ", "nan"], "--differ must be above 0"),
        (last_step, ["--branches", "3"], "--branches"),
        (last_step, ["--differ", "1"], "--differ"),
        (last_step, ["--metrics", "clip,is"], "no inception score"),
        (last_step, ["--metrics", "clip,foo"], "unknown --reward foo"),
        (last_step, ["--offload"], "--offload is for"),
        (tree, ["--lora", "a", "b"], "one --lora at most"),
        (tree, ["--lora", "nowhere"], "give a run folder or a .safetensors file"),
        (tree, ["--prompt", " "], "--prompt is empty"),
        (tree, ["--prompts", "nowhere.txt"], "cannot read the prompt file nowhere.txt"),
        (tree, ["--runs", "a"], "--runs"),
        (curves, [], "--runs"),
        (curves, ["--runs", "nowhere"], "nowhere holds no run"),
        (compare, ["a"], "--against"),
        (compare, ["a", "b", "c"], "--against"),
        (compare, ["a", "b"], "a holds no run"),
        (gradient_signal, ["--queries", "0"], "--queries must be 1 or more"),
        (matrix, ["--only", "nothing", "x*"], "no row is called main/nothing or main/x*: see"),
        (matrix, ["--again"], "name the rows with --only"),
    ],
)
def test_bad_flags_end_with_one_line(study, argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if hasattr(study, "parser"):
        argv = [*argv, "--device", "cpu"]
    assert words in fails(capsys, study, *argv)


def test_run_folders_that_do_not_serve_end_with_one_line(capsys, tmp_path):
    good = write_run(tmp_path / "good", [1.0, 2.0], seed=1)
    new = write_run(tmp_path / "new", [])
    other = {"model": "tiny", "rounds": 2}
    kind = {**CONFIG, "algo": ["ddpo"]}
    for name, config in (("other", other), ("list", [1]), ("kind", kind)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        (tmp_path / name / "metrics.jsonl").write_text('{"round": 1, "queries": 2}\n')
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn/config.json").write_text("{")
    (tmp_path / "torn/metrics.jsonl").write_bytes(b"\xff\xfe")
    cut = tmp_path / "cut"
    write_run(cut, [3.0, 4.0, 5.0], seed=2)
    (cut / "metrics.jsonl").write_text((cut / "metrics.jsonl").read_text()[:-9])
    cases = (
        (new, "has not finished a round"),
        ("other", "names no method"),
        ("kind", "names no method"),
        ("list", "holds no run"),
        ("torn", "config.json is damaged"),
        (good, f"{good} and {good} are one run: ddpo, seed 1"),
        (tmp_path / "good/../good", "are one run: ddpo, seed 1"),
    )
    for folder, words in cases:
        out = ["--out", tmp_path / "out"]
        assert words in fails(capsys, curves, "--runs", good, tmp_path / folder, *out)
        assert not (tmp_path / "out").exists()
    groups = curves.group_runs([good, str(cut)])  # a line that a crash cut off is no line
    assert len(groups["ddpo"]["2"]) == 2
    elsewhere = tmp_path / "elsewhere"
    write_run(elsewhere, [1.0], seed=3)
    line = {"round": 1, "queries": 7, "reward_mean": 1.0, "spread_within_prompt": 0.1}
    (elsewhere / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    error = fails(capsys, curves, "--runs", good, elsewhere, "--out", tmp_path / "out")
    assert "no round with reward_mean at equal queries" in error
    (tmp_path / "out").mkdir()
    (tmp_path / "out/curves.json").write_text("{}")
    assert "holds results" in fails(capsys, curves, "--runs", good, "--out", tmp_path / "out")


def test_runs_that_do_not_compare_end_with_one_line(capsys, tmp_path):
    a = write_run(tmp_path / "a", [1.0], no_bs=False)
    b = write_run(tmp_path / "b", [1.0])
    other = write_run(tmp_path / "other", [1.0], reward="jpeg")
    assert "differ in reward, clip and jpeg" in fails(capsys, compare, a, "--against", other)
    seed = write_run(tmp_path / "seed", [1.0], seed=1)
    assert "the seeds differ: 0 and 1" in fails(capsys, compare, a, "--against", seed)
    assert "runs of several methods" in fails(capsys, compare, a, seed, "--against", b, seed)
    write_scores(a, [0.0, 1.0], [1.0, 2.0])
    wanted = "gain in train score: the runs have different pictures, or one is not finished"
    assert wanted in fails(capsys, compare, a, "--against", b)
    write_scores(b, [0.0], [1.0])
    assert wanted in fails(capsys, compare, a, "--against", b)
    for data in ([0.0, 1.0], None, {"train": 3}, {"train": {"score": ["x"], "recognised": None}}):
        (tmp_path / "b/before.json").write_text(
            json.dumps({"train": data} if data is None else data)
        )
        assert "before.json or after.json is damaged" in fails(capsys, compare, b, "--against", a)


def test_a_missing_matplotlib_is_named_before_the_work(no_clip, capsys, tmp_path, monkeypatch):
    real = builtins.__import__

    def blocked(name, *args, **options):
        return real("no_such_module" if name == "matplotlib" else name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", blocked)
    for study in (table5, last_step, tree):
        assert "pip install matplotlib" in fails(capsys, study, "--out", tmp_path / "out")
    assert "pip install matplotlib" in fails(capsys, curves, "--runs", "nowhere")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- matrix.py


def test_every_row_has_flags_that_exist_equal_queries_and_updates(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # no run lies about
    configs, rows, drawn = [], matrix.rows(), []
    for name, steps in rows.items():
        for script, flags, folder in steps:
            file, *argv = matrix.command(script, flags, folder)
            if "lora-round" in str(flags.get("lora")):  # a LoRA that the row's run keeps
                assert int(flags["lora"][-16:-12]) % configs[-1]["save_every"] == 0
            if file == "train.py":
                args = train.parse_args(argv)
                configs.append(vars(args))
                assert args.out == f"runs/{name}"
                for flag, value in flags.items():
                    assert getattr(args, flag) == value, (name, flag)
            elif file == "eval.py":
                drawn.append((name, evaluation.parse_args(argv)))
            else:
                study = {"table5": table5, "last_step": last_step, "tree": tree}[file[8:-3]]
                assert (ROOT / file).exists() and study.__file__ == str(ROOT / file)
                args = study.parser().parse_args(argv)
                drawn.append((name, evaluation.fill_in(args)))
    own = {k for more in matrix.METHODS.values() for k in more} - {"no_bpt", "no_bs", "interval"}
    assert own == {"update_size", "epochs"}
    for c in configs:  # equal queries a run and trajectories an update, whatever the method
        assert c["queries"] % c["branches"] == 0
        assert c["branches"] == (1 if c["no_bs"] else matrix.BRANCHES)
        for what in ("queries", "min_count", "step_weight"):
            assert c[what] == configs[0][what], what
        assert c["rounds"] == (12 if c["seed"] == 100 else 24)  # the grid is shorter
        assert c["update_size"] == (128 if c["no_bs"] else 32)  # Table 6: four times
        assert c["epochs"] == (1 if c["no_bs"] else 2)
    for name, args in drawn:  # a line of style entropy, round 8 to the last: equal pictures
        if "seed" in name:
            assert args.images == matrix.IMAGES[args.split], (name, args.out)
        if "table5" in name:
            assert args.template == int((name + "-t1").split("-t")[1])
    base = [(name, args) for name, args in drawn if not args.lora]
    assert len(base) == 2 * 3 + 5  # the base model is drawn as it was trained
    for name, args in base:
        for what in ("T", "eta", "guidance", "model"):
            assert getattr(args, what) == configs[0][what], name
    methods = {(c["no_bpt"], c["no_bs"], c["seed"]) for c in configs if c["seed"] in matrix.SEEDS}
    assert len(methods) == 4 * len(matrix.SEEDS)
    assert not set(matrix.SEEDS) & set(matrix.TUNE["seed"])  # tuned apart from what is reported
    tuned = [flags for name, ((_, flags, _), *_) in rows.items() if name.startswith("tune/")]
    grid = {(f.get("no_bs", False), f["lr"], f["clip_range"], f["seed"]) for f in tuned}
    assert len(grid) == len(tuned) == 6 and all(flags["eval_images"] == 2 for flags in tuned)


def test_a_study_is_done_when_its_numbers_are_there(tmp_path):
    for row, numbers in (("table5-t2", "table5"), ("last-step", "last-step"), ("tree", "tree")):
        (step,) = matrix.rows()[f"main/{row}"]
        assert not matrix.is_done(tmp_path, *step)
        (tmp_path / "main" / row).mkdir(parents=True)
        (tmp_path / f"main/{row}/{numbers}.json").write_text("{}")
        assert matrix.is_done(tmp_path, *step), row


def test_the_rows_that_are_committed_are_rows_of_the_table():
    done = [
        folder for folder in (ROOT / "results").glob("*/*") if (folder / "config.json").exists()
    ]
    rows = matrix.rows()
    for folder in done:
        if folder.parent.name in ("main", "tune"):
            (_, settings, _), *_ = rows[f"{folder.parent.name}/{folder.name}"]
            assert matrix.other_settings(folder, settings) is None, folder


def test_the_papers_own_differences():
    """Tables 1 to 3 of the paper, BPT+BS less vanilla."""
    paper = {(algo, template): gains for algo, template, _, gains in matrix.MATRIX}
    assert paper["ddpo", 1] == pytest.approx((0.3748 - 0.3698, 1.3127 - 1.2886))
    assert paper["ddpo", 2] == pytest.approx((0.3252 - 0.3175, 1.3579 - 1.3323))
    assert paper["ddpo", 3] == pytest.approx((0.3183 - 0.3134, 1.3348 - 1.3273))
    assert paper["pg", 1] == (None, pytest.approx(1.2896 - 1.2462))
    assert paper["dpok", 1] == (None, pytest.approx(1.3005 - 1.2785))
    assert paper["dpo", 1] == (None, pytest.approx(1.3051 - 1.2895))


def test_no_row_replaces_another(monkeypatch):
    monkeypatch.setattr(matrix, "MATRIX", (*matrix.MATRIX, matrix.MATRIX[1]))
    with pytest.raises(AssertionError, match="two rows are called main/t2-ddpo-seed0"):
        matrix.rows()


def test_a_run_of_other_settings_is_not_taken_for_the_row(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"lr": 0.1, "update_size": 32}))
    assert matrix.other_settings(tmp_path, {"lr": 0.1, "update_size": 32}) is None
    assert "lr is 0.1, the table says 0.2" in matrix.other_settings(tmp_path, {"lr": 0.2})
    assert matrix.other_settings(tmp_path, {"epochs": 2}) == "epochs is None, the table says 2"
    assert matrix.other_settings(tmp_path / "none", {"lr": 0.2}) is None


def evaluation_of(clip, left_out, score, entropy=0.5):
    """What eval.py writes of a model on one list, as far as the report reads it."""
    row = {"CLIPScore": [np.mean(clip), 9.0], "recognised": [0.5, 9.0]}
    row |= {"inception score": [score, 9.0], "inception score, left out": left_out}
    return row | {"style entropy": entropy, "scores": {"clip": clip, "recognised": [0.0, 1.0]}}


def test_the_gain_in_inception_score_is_paired():
    """The same pictures left out of both; the seeds' spread comes on top of it."""
    column = ("inception score", "train")
    other = [2.0, 2.1, 1.9, 2.0]
    b = [{"train": evaluation_of([1.0], other, 2.0)}]
    shifted = [{"train": evaluation_of([1.0], [2.5, 2.6, 2.4, 2.5], 2.5)}]
    found = compare.two_way(matrix.figures(shifted, *column) - matrix.figures(b, *column))
    assert found == pytest.approx((0.5, 0.0), abs=1e-9)
    assert matrix.figures(b, *column)[0].tolist() == pytest.approx([2.0, 1.7, 2.3, 2.0])
    own = [2.7, 3.3, 3.1, 3.0]
    a = [{"train": evaluation_of([1.0], own, 3.2)}]
    difference = np.subtract(own, other)  # one seed: the jackknife's error of the difference
    error = math.sqrt(3 / 4 * np.square(difference - difference.mean()).sum())
    found = compare.two_way(matrix.figures(a, *column) - matrix.figures(b, *column))
    assert found == pytest.approx((1.2, error))
    two = [{"train": evaluation_of([1.0], own, score)} for score in (3.2, 5.2)]
    mean, both = compare.two_way(matrix.figures(two, *column) - matrix.figures(b, *column))
    assert mean == pytest.approx(2.2) and both == pytest.approx(math.hypot(error, 1.0))


def test_the_report_shows_means_gains_and_the_paper(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(matrix, "RESULTS", tmp_path)
    rng, scores = np.random.default_rng(0), {}
    names = ["base-t2", *(f"t2-ddpo{m}-seed{s}" for m in ("", "-bpt-bs") for s in (0, 1))]
    for name in names:
        for split in ("train", "unseen"):
            clip = scores[name, split] = rng.normal(size=2).tolist()
            folder = tmp_path / f"main/{name}/eval-{split}"
            folder.mkdir(parents=True)
            results = {"a model": evaluation_of(clip, [2.0, 2.0], 2.0, rng.random())}
            (folder / "scores.json").write_text(json.dumps({"results": results}))
    lines = matrix.comparison(*matrix.MATRIX[1])
    cells = {line.split(" | ")[0][2:]: line.split(" | ") for line in lines[2:]}
    mean = {name: np.mean(scores[name, "unseen"]) for name in names}
    over = [mean["t2-ddpo-seed0"], mean["t2-ddpo-seed1"]]
    assert cells["base"][1:4:2] == ["1", f"{mean['base-t2']:.4f}"]
    assert cells["t2-ddpo"][3] == f"{np.mean(over):.4f} +- {np.std(over, ddof=1):.4f}"
    pairs = [("t2-ddpo-bpt-bs", "t2-ddpo", "vanilla"), ("t2-ddpo", None, "base")]
    for method, against, label in pairs:
        x = [scores[f"{method}-seed{seed}", "unseen"] for seed in (0, 1)]
        y = [scores[f"{against}-seed{seed}" if against else "base-t2", "unseen"] for seed in (0, 1)]
        found = compare.two_way(torch.tensor(x).double() - torch.tensor(y).double())
        assert cells[f"{method} over {label}"][3] == "{:+.4f} +- {:.4f}".format(*found)
    difference = np.subtract(scores["t2-ddpo-seed1", "unseen"], scores["base-t2", "unseen"])
    error = difference.std(ddof=1) / 2**0.5
    assert cells["t2-ddpo-seed1 over base"][3] == f"{difference.mean():+.4f} +- {error:.4f}"
    assert cells["paper: BPT+BS over vanilla"][3:7:3] == ["+0.0077", "+0.0256"]
    assert matrix.comparison(*matrix.MATRIX[2]) == ["The base model is not scored yet."]
    for name in names[1:3]:  # with curves, the whole report
        lines = [{"round": 1, "queries": 4, "reward_mean": 0.5, "spread_within_prompt": 0.1}]
        config = {**CONFIG, "seed": int(name[-1])}
        lines = [
            line | {"seconds": {"a": 60.0}, "updates": 3, "kl_to_base": 0.25} for line in lines
        ]
        folder = tmp_path / "main" / name
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "config.json").write_text(json.dumps(config))
        part = {"gain": 0.5, "error": 0.125}
        lists = ("train_score", "unseen_score", "train_recognised")
        (folder / "summary.json").write_text(json.dumps({k: part for k in lists}))
    (tmp_path / "main/table5-t2").mkdir()
    shares = (ROOT / "results/main/table5/table5.json").read_text()
    (tmp_path / "main/table5-t2/table5.json").write_text(shares)
    matrix.main(["--report"])
    matrix.main(["--report"])  # it replaces its own picture and numbers
    text = (tmp_path / "tables.md").read_text()
    assert "## Table 5, template 2\n\n| branching at t | 2 |" in text
    assert "Table 5, template 1" not in text
    assert "| t2-ddpo over base | 2 |" in text and "(main/t2-ddpo-curves/curves.png)" in text
    assert (tmp_path / "main/t2-ddpo-curves/curves.png").stat().st_size > 1000
    gains = " | ".join(["+0.5000 +- 0.1250"] * 3)
    assert f"| t2-ddpo-seed0 | 0.001 | 3 | 1.0 | 0.250 | {gains} |" in text


def test_rows_are_run_skipped_resumed_and_copied(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(matrix, "ROOT", tmp_path)
    monkeypatch.setattr(matrix, "RESULTS", tmp_path / "results")
    row = matrix.rows()["main/ddpo-seed1"]
    monkeypatch.setattr(matrix, "rows", lambda: {"main/ddpo-seed1": row})
    called, codes = [], [9, 0, 0, 8]

    def run(words, cwd):
        """Stands for train.py and eval.py: writes what a step writes, or stops before."""
        assert cwd == tmp_path
        called.append(words[1:])
        folder = tmp_path / (words[3] if "--resume" in words else words[words.index("--out") + 1])
        (folder / "grids").mkdir(parents=True, exist_ok=True)
        if words[1] == "train.py":
            (folder / "config.json").write_text(json.dumps(row[0][1]))
        for name in ("grids/a.png", "checkpoint.safetensors", "metrics.jsonl", "README.md"):
            (folder / name).write_text("{}")
        if codes and (code := codes.pop(0)):
            return SimpleNamespace(returncode=code)
        last = "summary.json" if words[1] == "train.py" else "scores.json"
        (folder / last).write_text("{}")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(matrix.subprocess, "run", run)
    assert "ended with code 9; the same command goes on" in fails(capsys, matrix)
    assert "ended with code 8" in fails(capsys, matrix)
    assert not (tmp_path / "results").exists()
    matrix.main([])
    resumed = ["train.py", "--resume", "runs/main/ddpo-seed1"]
    assert [words[0] for words in called] == ["train.py"] * 2 + ["eval.py"] * 5
    assert called[1] == resumed and called[0][-1] == "runs/main/ddpo-seed1"
    assert called[3] == called[4] != called[2]  # the last step alone is done again
    assert called[5][2] == "runs/main/ddpo-seed1/lora-round0008.safetensors"
    assert called[5][-1] == "runs/main/ddpo-seed1/eval-round0008"
    kept = sorted(p.name for p in (tmp_path / "results/main/ddpo-seed1").rglob("*.*"))
    assert kept == ["config.json", *["metrics.jsonl"] * 5, *["scores.json"] * 4, "summary.json"]
    matrix.main(["--only", "ddpo-*"])
    assert len(called) == 7 and "main/ddpo-seed1: done" in capsys.readouterr().out
    matrix.main(["--list"])
    assert "main/ddpo-seed1: done\n    python train.py --model tiny" in capsys.readouterr().out
    matrix.main(["--only", "ddpo-seed1", "--again"])
    assert len(called) == 12 and "--resume" not in called[7]
    row[0][1]["lr"] = 0.5
    assert "lr is 0.001, the table says 0.5. --again starts anew" in fails(capsys, matrix)
