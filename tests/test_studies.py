"""Studies against brute force on the random pipeline, and as commands."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import brightness, make_small, metrics, run_flags, write_prompts

import eval as evaluation
import train
from ddim_logprob import ddim_mean, guided_prediction, keyed_generator
from rewards import checked
from studies import common, last_step, one_round, table5

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


def step(small, x, t, prompt, generator):
    """One DDIM step of one latent, straight from Eq. 1."""
    policy = small.policy
    cond, uncond = policy.embed([prompt]), policy.embed([""])
    with torch.no_grad():
        eps = guided_prediction(policy.unet, policy.schedule, x, t, cond, uncond, policy.guidance)
    mu, sigma = ddim_mean(policy.schedule, eps, x, t)
    return mu + sigma * torch.randn(x.shape[1:], generator=generator)


def draw(small, x, start, prompt, generator):
    for t in range(start, 0, -1):
        x = step(small, x, t, prompt, generator)
    return small.decode(x)


def noise(small, *key):
    return torch.randn(1, *small.latent_shape, generator=keyed_generator(*key))


def test_differs_is_max_minus_min_above_the_threshold():
    scores = torch.tensor([[0.0, 1.0, 0.5], [0.4, 0.5, 0.6], [1.0, 1.0, 1.0]])
    assert table5.differs(scores, 0.3).tolist() == [True, False, False]
    assert table5.differs(scores, 0.0).tolist() == [True, True, False]  # judge: some, not all


def test_table5_is_the_share_that_brute_force_counts(small, rewards, args, capsys):
    args.roots = 4
    got, _ = table5.table5(small, rewards, judge, PROMPTS, args)
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
        near = sum(abs(gap - 0.7 * unit) < 1e-5 for gap in gaps) / 4  # a coin toss
        share = sum(g > 0.7 * unit for g in gaps) / 4
        assert got["share"]["clip"][n] == pytest.approx(share, abs=near + 1e-6)
        some = sum(0 < sum(row) < 3 for row in right[t]) / 4
        assert got["share"]["recognised"][n] == pytest.approx(some)
    assert got["threshold"] == {"clip": pytest.approx(0.7 * unit, rel=1e-3), "recognised": 0}
    assert "\n".join(table5.table(got)) in capsys.readouterr().out


def test_table_5_shows_the_papers_shares():
    steps = list(range(2, 21, 2))
    shares = [0.5, 0.1, 0.2, 0.3, 0.3, 0.4, 0.4, 0.5, 0.5, 0.9]
    result = {"steps": steps, "roots": 100, "share": {"recognised": shares}}
    lines = table5.table(result | {"relative_variance": {"recognised": [0.5] * 10}})
    assert lines[0].split(" | ")[1:3] == ["2", "4"]
    gaps = [p - q for p, q in zip(shares[1:], table5.PAPER[1:])]
    rms = 100 * math.sqrt(np.mean(np.square(gaps)))
    text = "\n".join(lines)
    assert f"RMS to the paper, t = 4..20: {rms:.1f} points" in text
    assert " differs, % | 50.0 | 10.0 | " in text and "over that at T | 0.50 | " in text
    assert lines[-1] == "| paper, % | " + " | ".join(f"{100 * p:.1f}" for p in table5.PAPER) + " |"


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
    got, _ = last_step.last_step(small, rewards, judge, PROMPTS, args)
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
    numbers = f"{np.mean(gaps):.5f} | {max(gaps):.5f} | {sum(g > 0.01 for g in gaps) / 5:.1%}"
    assert f" | 5 | {numbers} |" in capsys.readouterr().out
    scale = 0.01 / sorted(gaps)[2]  # one difference at 0.01, two below and two above
    rewards = {"own": lambda images, prompts: 1.001 * scale * score(images, prompts)}
    got, _ = last_step.last_step(small, rewards, None, PROMPTS, args)
    assert got["own"]["above_0.01"] == pytest.approx(0.6)


@pytest.fixture
def no_clip(monkeypatch):
    """Brightness in place of every reward."""
    for module in (evaluation, one_round):
        monkeypatch.setattr(module, "load_reward", lambda name, *_: checked(brightness, name))


def command(random_folder, tmp_path):
    prompts = tmp_path / "p.txt"
    prompts.write_text("[train]\ncat\ndog\n[unseen]\nbird\n")
    return ["--model", str(random_folder), "--device", "cpu", "--prompts", str(prompts)]


def test_a_study_from_the_command_line(no_clip, random_folder, tmp_path):
    argv = command(random_folder, tmp_path)
    argv += ["--out", str(tmp_path / "out"), "--batch", "16", "--roots", "2"]
    common.main(last_step.last_step, last_step.parser(), argv)
    data = json.loads((tmp_path / "out/last-step.json").read_text())
    assert data["pairs"] == len(data["clip"]["differences"]) == 2
    assert data["settings"]["roots"] == 2 and data["settings"]["T"] == 20
    assert (tmp_path / "out/last-step.png").stat().st_size > 1000
    with pytest.raises(SystemExit):
        common.main(last_step.last_step, last_step.parser(), argv)  # it overwrites nothing


@pytest.fixture
def round_flags(random_folder, tmp_path):
    prompts = write_prompts(tmp_path)
    flags = ["--reward", "jpeg", "--threshold", 0.3, "--eval-prompts", 0]
    return run_flags(random_folder, prompts, *flags)


def test_the_round_drawn_is_the_trainings(round_flags, random_folder, tmp_path):
    """Equal scores and selection: mean, spread and number kept of a run's first round."""
    folder = train.main([*round_flags, "--rounds", "1", "--out", str(tmp_path / "run")])
    line = metrics(folder)[0]
    cfg = train.parse_args([*round_flags, "--out", str(tmp_path / "new")])
    pipeline = one_round.load_pipeline(cfg, torch.device("cpu"))
    reward = one_round.load_reward("jpeg")
    found = one_round.sample_round(pipeline, reward, ["a cat", "a dog"], cfg, 0, line["tau"])
    owners, path, x_0, scores, r_hat, fate = found
    assert len(owners) == 4 and path.shape == (4, 3, 4, 8, 8) and x_0.shape == (4, 3, 4, 8, 8)
    assert scores.mean().item() == pytest.approx(line["reward_mean"], abs=1e-5)
    assert scores.std().item() == pytest.approx(line["reward_std"], rel=1e-3)
    assert fate.abs().sum() == line["kept"] > 0
    for p in range(4):
        assert (fate[p] == 1).sum() <= 1 and (fate[p] == -1).sum() <= 1
        assert (r_hat[p][fate[p] == 1] == r_hat[p].max()).all()
        assert (r_hat[p][fate[p] == -1] == r_hat[p].min()).all()


def test_the_pictures_of_the_shared_path_are_the_predicted_x_0(small):
    """x_0 = (x_t - sqrt(1 - abar) eps) / sqrt(abar), by hand."""
    policy, x = small.policy, noise(small, "x")
    abar = policy.schedule.alpha_bar[5].item()
    cond, uncond = policy.embed(["cat"]), policy.embed([""])
    with torch.no_grad():
        eps = guided_prediction(policy.unet, policy.schedule, x, 5, cond, uncond, 3.0)
    wanted = small.decode((x - math.sqrt(1 - abar) * eps) / math.sqrt(abar))
    assert torch.allclose(one_round.expected_pictures(small, x, 5, ["cat"]), wanted, atol=1e-4)


def test_roots_of_each_kind_are_shown_the_widest_first():
    fate = torch.tensor([[0, 0], [1, 0], [1, 0], [1, -1], [0, 0], [0, -1]])
    scores = torch.tensor([[0, 1.0], [0, 2], [0, 3], [0, 1], [0, 2], [0, 9]])
    assert one_round.choose_roots(scores, fate) == [3, 2, 5, 4]
    few = torch.tensor([[0, 0], [1, -1], [0, 0], [0, 0], [0, 0]])
    wide = torch.tensor([[0, 1.0], [0, 2], [0, 3], [0, 5], [0, 4]])
    assert set(one_round.choose_roots(wide, few)) == {1, 3, 4, 2}  # filled up
    assert one_round.choose_roots(wide, few)[0] == 1


def test_a_round_is_drawn(round_flags, tmp_path, monkeypatch, capsys):
    labels = []
    set_xlabel = one_round.pyplot().Axes.set_xlabel

    def keep(ax, text, **more):
        labels.append(text)
        return set_xlabel(ax, text, **more)

    monkeypatch.setattr("matplotlib.axes.Axes.set_xlabel", keep)
    argv = [*round_flags, "--rounds", "3", "--threshold", "0", "--min-count", "0"]
    one_round.main([*argv, "--round", "2", "--out", str(tmp_path / "a/round.png")])
    assert Path(tmp_path / "a/round.png").stat().st_size > 10_000
    kept = sum("kept" in label for label in labels)
    assert f"round 2, tau 5, {kept} of 12 pictures are kept" in capsys.readouterr().out
    assert len(labels) == 12 and kept >= 4
    with pytest.raises(SystemExit):
        one_round.main([*argv, "--no-bs"])
    assert "leave --no-bs out" in capsys.readouterr().err
