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
from studies import one_round, table5

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
    return SimpleNamespace(roots=5, branches=3, seed=3, out=str(tmp_path))


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


def test_table5_is_the_share_that_brute_force_counts(small, rewards, args, capsys):
    args.roots = 4
    got = table5.table5(small, rewards, judge, PROMPTS, args)
    assert got["steps"] == [1, 2, 4, 6] and (got["roots"], got["branches"]) == (4, 3)
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
        near = sum(abs(gap - unit) < 1e-5 for gap in gaps) / 4  # a coin toss
        share = sum(g > unit for g in gaps) / 4
        assert got["share"]["clip"][n] == pytest.approx(share, abs=near + 1e-6)
        some = sum(0 < sum(row) < 3 for row in right[t]) / 4
        assert got["share"]["recognised"][n] == pytest.approx(some)
    assert got["threshold"] == {"clip": pytest.approx(unit, rel=1e-3), "recognised": 0}
    pairs = [abs(row[k] - row[k - 1]) for row in scores[1] for k in range(3)]  # Fig. 12
    assert got["last_step"]["clip"] == pytest.approx(pairs, abs=1e-5) and max(pairs) > 0
    assert 0 < got["share"]["clip"][-1] < 1 or max(got["share"]["recognised"]) > 0
    # The variance within a branch, relative to that at T: scores over their prompt's std
    variance = []
    for t in got["steps"]:
        of_prompt = []
        for p in range(4):
            alike = [
                row for q in range(4) if q % 3 == p % 3 for s in scores.values() for row in [s[q]]
            ]
            of_prompt.append(np.var(scores[t][p], ddof=1) / np.var(alike, ddof=1))
        variance.append(np.mean(of_prompt))
    expected = [v / variance[-1] for v in variance]
    assert got["relative_variance"]["clip"] == pytest.approx(expected, rel=1e-2)


def test_table_5_shows_the_papers_shares():
    steps = [1, *range(2, 21, 2)]
    shares = [0.7, 0.5, 0.1, 0.2, 0.3, 0.3, 0.4, 0.4, 0.5, 0.5, 0.9]
    result = {"steps": steps, "roots": 100, "share": {"recognised": shares}}
    result["last_step"] = {"recognised": [0.0, 0.0, 0.008, 0.02]}
    lines = table5.table(result | {"relative_variance": {"recognised": [0.5] * 11}})
    assert lines[0].split(" | ")[1:3] == ["1", "2"]
    gaps = [p - q for p, q in zip(shares[2:], table5.PAPER[1:])]
    rms = 100 * math.sqrt(np.mean(np.square(gaps)))
    text = "\n".join(lines)
    assert f"RMS to the paper, t = 4..20: {rms:.1f} points" in text
    assert " differs, % | 70.0 | 50.0 | 10.0 | " in text and "over that at T | 0.50 | " in text
    paper = "| paper, % |  | " + " | ".join(f"{100 * p:.1f}" for p in table5.PAPER) + " |"
    assert paper in lines
    assert "4 pairs that part at t = 1: mean 0.00700, largest 0.02000, 1 above 0.01" in text


@pytest.fixture
def no_clip(monkeypatch):
    """Brightness in place of every reward."""
    for module in (evaluation, one_round):
        monkeypatch.setattr(module, "load_reward", lambda name, *_: checked(brightness, name))


def command(random_folder, tmp_path):
    prompts = tmp_path / "p.txt"
    prompts.write_text("[train]\ncat\ndog\n[unseen]\nbird\n")
    return ["--model", str(random_folder), "--device", "cpu", "--prompts", str(prompts)]


def test_table5_from_the_command_line(no_clip, random_folder, tmp_path, capsys):
    argv = command(random_folder, tmp_path)
    argv += ["--out", str(tmp_path / "out"), "--batch", "16", "--roots", "2", "--T", "4"]
    table5.main(argv)
    data = json.loads((tmp_path / "out/table5.json").read_text())
    assert data["steps"] == [1, 2, 4] and data["settings"]["roots"] == 2
    assert len(data["last_step"]["clip"]) == 6 and len(data["share"]["clip"]) == 3
    assert (tmp_path / "out/table5.png").stat().st_size > 1000
    assert "6 pairs that part at t = 1" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        table5.main(argv)  # it overwrites nothing
    capsys.readouterr()
    for more in (["--branches", "1"], ["--metrics", "clip,is"], ["--lora", "a", "b"]):
        with pytest.raises(SystemExit):
            table5.main([*argv, "--out", str(tmp_path / "new"), *more])
        assert capsys.readouterr().err.startswith("error: one --lora at most")


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


def test_roots_are_shown_from_most_to_fewest_that_are_trained():
    fate = torch.tensor([[0, 0], [1, 0], [1, 0], [1, -1], [0, 0], [0, -1]])
    assert one_round.choose_roots(fate) == [3, 1, 5, 4]
    assert one_round.choose_roots(fate[:2]) == [1, 0]


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
    kept = sum("trained" in label and "not" not in label for label in labels)
    assert f"round 2, tau 5, trained on {kept} of 12 pictures" in capsys.readouterr().out
    assert len(labels) == 12 and kept >= 4
    with pytest.raises(SystemExit):
        one_round.main([*argv, "--no-bs"])
    assert "leave --no-bs out" in capsys.readouterr().err
