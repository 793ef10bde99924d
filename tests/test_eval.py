"""Metrics against numpy, studies against brute force on the random pipeline, bad input."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, make_small, randomise_lora

import eval as evaluation
import runs
from ddim_logprob import (
    ddim_mean, denoise, guided_prediction, keyed_generator, make_schedule,
)  # fmt: skip
from eval import (
    compare, curve, differs, evaluate, group_runs, inception_left_out, inception_score,
    jackknife_error, paired_gain, style_entropy, wilson,
)  # fmt: skip
from lora import inject_lora, lora_state
from rewards import checked

PROMPTS = ["cat", "dog", "bird"]


class Brightness:
    """A stand-in for CLIP: the score is the mean brightness, features are some pixels."""

    def __call__(self, images, prompts):
        return images.mean((1, 2, 3)) + torch.tensor([0.01 * len(p) for p in prompts])

    def embed_images(self, images, normalize=True):
        return 3 * images.flatten(1)[:, :6]


def judge(images, prompts):
    """Right if the picture's corner is bright: as good as random on a random pipeline."""
    return images[:, 0, :8, :8].mean((1, 2)) > 0.5


@pytest.fixture
def small():
    return make_small(T=6)


@pytest.fixture
def args(tmp_path):
    return SimpleNamespace(T=6, guidance=3.0, sample_batch=4, decode_batch=3, roots=5, branches=3,
                           differ=0.7, seed=3, out=str(tmp_path))  # fmt: skip


# ---------------------------------------------------------------- metrics


def test_inception_score_is_equation_9():
    x = np.random.default_rng(0).normal(size=(7, 5))
    p = np.exp(x) / np.exp(x).sum(1, keepdims=True)  # p(y|x)
    q = p.mean(0)  # p(y)
    expected = np.exp(np.mean([(row * np.log(row / q)).sum() for row in p]))
    assert inception_score(torch.tensor(x).float()) == pytest.approx(expected, rel=1e-6)


def test_inception_score_limits():
    alike = torch.randn(1, 5).repeat(6, 1)
    assert inception_score(alike) == pytest.approx(1)
    assert inception_score(1000 * torch.eye(6)) == pytest.approx(6)  # n classes, each sure
    assert inception_score(1000 * torch.eye(3).repeat(4, 1)) == pytest.approx(3)


def test_inception_error_is_the_jackknife():
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    left_out = [inception_score(x[torch.arange(8) != i]) for i in range(8)]
    expected = math.sqrt(7 / 8 * np.square(left_out - np.mean(left_out)).sum())
    error = lambda features: jackknife_error(inception_left_out(features).tolist())  # noqa: E731
    assert inception_left_out(x).tolist() == pytest.approx(left_out, rel=1e-6)
    assert error(x) == pytest.approx(expected, rel=1e-6)
    assert error(x[:1].repeat(8, 1)) == pytest.approx(0, abs=1e-9)
    assert 0 < error(1000 * torch.eye(3)[[0, 0, 0, 1, 2]]) < 3  # p(y|x) of exact zeros
    mean = torch.tensor([1.0, 4.0, 2.0, 7.0])  # of a mean the jackknife is the usual error
    assert jackknife_error(((mean.sum() - mean) / 3).tolist()) == pytest.approx(
        mean.std().item() / 2)  # fmt: skip


@pytest.mark.parametrize("styles, expected", [
    ([0, 0, 0, 0, 0, 0], 0.0), ([0, 1, 2, 0, 1, 2], math.log(3)), ([0, 0, 0, 1, 1, 1], math.log(2)),
])  # fmt: skip
def test_style_entropy_is_that_of_the_best_captions(styles, expected):
    from tiny import STYLES

    class Clip:  # the picture's first pixel names its style, as far as this CLIP is concerned
        def embed_images(self, images):
            return torch.eye(3)[images[:, 0, 0, 0].long()]

        def embed_text(self, texts):
            named = [STYLES.index(t.split(", ")[1].removesuffix(" style")) for t in texts]
            return torch.eye(3)[named]

    images = torch.zeros(6, 3, 2, 2)
    images[:, 0, 0, 0] = torch.tensor(styles).float()
    entropy, shares = style_entropy(Clip(), images, ["cat"] * 6)
    assert entropy == pytest.approx(expected, abs=1e-6) and math.copysign(1, entropy) == 1
    assert list(shares) == list(STYLES) and shares[STYLES[0]] == pytest.approx(styles.count(0) / 6)


def test_paired_gain_is_numpys():
    before, after = np.random.default_rng(1).normal(size=(2, 9))
    gain, error = paired_gain(before.tolist(), after.tolist())
    assert gain == pytest.approx((after - before).mean())
    assert error == pytest.approx((after - before).std(ddof=1) / 3)
    assert paired_gain([1.0], [3.0]) == (2.0, 0.0)


def test_compare_pairs_by_list_and_leaves_out_a_missing_judge():
    before = {"train": {"score": [1.0, 2.0], "recognised": [0.0, 1.0]},
              "unseen": {"score": [3.0], "recognised": None}}  # fmt: skip
    after = {"train": {"score": [2.0, 2.0], "recognised": [1.0, 1.0]},
             "unseen": {"score": [1.0], "recognised": None}}  # fmt: skip
    summary, rows = compare(before, after, "clip")
    assert set(summary) == {"train_score", "train_recognised", "unseen_score"} and len(rows) == 3
    expected = {"before": 1.5, "after": 2.0, "gain": 0.5, "error": 0.5, "n": 2}
    assert summary["train_score"] == expected
    assert summary["unseen_score"]["gain"] == -2.0


def test_evaluate_does_not_depend_on_the_batch_and_draws_keyed_noise(small, args):
    reward = checked(Brightness(), "clip")
    args.sample_batch = 6
    whole, images = evaluate(small, reward, PROMPTS, 2, args, judge)
    args.sample_batch, args.decode_batch = 4, 1
    cut, same = evaluate(small, reward, PROMPTS, 2, args, judge)
    torch.testing.assert_close(images, same, atol=1e-4, rtol=0)
    np.testing.assert_allclose(whole["score"], cut["score"], atol=1e-5)
    assert whole["recognised"] == cut["recognised"]
    # picture number k of prompt p stands at k * P + p, from a generator of (prompt, number)
    generator = keyed_generator("evaluation", "dog", 1)
    x_T = torch.randn(1, *small.latent_shape, generator=generator)
    x_0 = denoise(small.unet, small.schedule, x_T, 6, 0, small.embed(["dog"]), small.embed([""]),
                  3.0, [generator])  # fmt: skip
    torch.testing.assert_close(images[4], small.decode(x_0, 1)[0], atol=1e-4, rtol=0)
    assert whole["score"][4] == pytest.approx(images[4].mean().item() + 0.03, abs=1e-5)
    alone, _ = evaluate(small, reward, ["dog"], 2, args)
    np.testing.assert_allclose(alone["score"], whole["score"][1::3], atol=1e-5)
    assert alone["recognised"] is None


# ---------------------------------------------------------------- studies


def step(model, x, t, prompt, generator, guidance):
    """One DDIM step of one latent, straight from Eq. 1."""
    now = torch.tensor([t])
    with torch.no_grad():
        eps = guided_prediction(model.unet, model.schedule, x, now, model.embed([prompt]),
                                model.embed([""]), guidance)  # fmt: skip
    mu, sigma = ddim_mean(model.schedule, eps, x, now)
    return mu + sigma * torch.randn(x.shape[1:], generator=generator)


def draw(model, x, start, prompt, generator, guidance):
    for t in range(start, 0, -1):
        x = step(model, x, t, prompt, generator, guidance)
    return model.decode(x, 1)


def test_differs_is_max_minus_min_above_the_threshold():
    scores = torch.tensor([[0.0, 1.0, 0.5], [0.4, 0.5, 0.6], [1.0, 1.0, 1.0]])
    assert differs(scores, 0.3).tolist() == [True, False, False]
    assert differs(scores, 0.0).tolist() == [True, True, False]  # the judge: some, not all


def test_table5_is_the_share_that_brute_force_counts(small, args):
    rewards = {"clip": checked(Brightness(), "clip")}
    got = evaluation.table5(small, rewards, judge, PROMPTS, args)
    assert got["steps"] == [2, 4, 6] and (args.roots, args.branches) == (5, 3)
    scores, right = ({t: [] for t in got["steps"]} for _ in range(2))
    for p in range(5):
        prompt, key = PROMPTS[p % 3], (3, "table5", p)
        x = torch.randn(1, *small.latent_shape, generator=keyed_generator(*key, "x_T"))
        path = keyed_generator(*key, "path")
        for t in range(6, 0, -1):
            if t in scores:
                pictures = [draw(small, x, t, prompt, keyed_generator(*key, t, k), 3.0)
                            for k in range(3)]  # fmt: skip
                scores[t].append([picture.mean().item() + 0.03 for picture in pictures])
                right[t].append([judge(picture, [prompt]).item() for picture in pictures])
            x = step(small, x, t, prompt, path, 3.0)
    unit = math.sqrt(np.mean([np.var(row, ddof=1) for row in scores[6]]))
    for n, t in enumerate(got["steps"]):
        gaps = [max(row) - min(row) for row in scores[t]]
        assert min(abs(gap - 0.7 * unit) for gap in gaps) > 1e-5  # no coin toss in this test
        assert got["share"]["clip"][n] == pytest.approx(sum(g > 0.7 * unit for g in gaps) / 5)
        some = sum(0 < sum(row) < 3 for row in right[t]) / 5
        assert got["share"]["recognised"][n] == pytest.approx(some)
    assert got["threshold"]["clip"] == pytest.approx(0.7 * unit, rel=1e-3)
    assert 0 < got["share"]["clip"][2] and got["share"]["clip"][0] < 1
    assert got["std_within"]["clip"][0] < got["std_within"]["clip"][2]
    assert (runs.Path(args.out) / "table5.png").stat().st_size > 1000


def test_last_step_pairs_share_all_but_the_last_step(small, args):
    got = evaluation.last_step(small, {"clip": checked(Brightness(), "clip")}, None, PROMPTS, args)
    for p in (0, 4):
        prompt, key = PROMPTS[p % 3], (3, "last-step", p)
        x = torch.randn(1, *small.latent_shape, generator=keyed_generator(*key, "x_T"))
        generator = keyed_generator(*key, "path")
        for t in range(6, 1, -1):
            x = step(small, x, t, prompt, generator, 3.0)
        pair = [draw(small, x, 1, prompt, keyed_generator(*key, k), 3.0).mean() for k in range(2)]
        gap = abs(pair[0] - pair[1]).item()
        assert got["clip"]["differences"][p] == pytest.approx(gap, abs=1e-5)
    gaps = got["clip"]["differences"]
    assert len(gaps) == 5 and max(gaps) > 0
    assert got["clip"]["above_0.01"] == sum(g > 0.01 for g in gaps) / 5


def test_tree_has_rewards_on_its_leaves(small, args):
    args.branches = 2
    got = evaluation.tree(small, {"clip": checked(Brightness(), "clip")}, judge, PROMPTS, args)
    assert got["starts"] == [6, 4, 2] and len(got["clip"]) == len(got["recognised"]) == 8
    leaves = np.array(got["clip"])
    assert len(set(leaves)) == 8  # siblings, cousins and strangers: all noise is different
    near = np.abs(leaves[0::2] - leaves[1::2]).mean()
    assert near < leaves.std()  # those that part last are most alike
    assert (runs.Path(args.out) / "tree.png").stat().st_size > 1000


CONFIG = {"algo": "ddpo", "no_bpt": True, "no_bs": True, "interval": "backward", "seed": 0,
          "lr": 1e-3, "reward": "clip", "out": "a", "sample_batch": 8}  # fmt: skip


def write_run(folder, rewards, **config):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    lines = [{"round": i + 1, "queries": 10 * (i + 1), "reward_mean": r,
              "spread_within_prompt": 0.2 / (i + 1)} for i, r in enumerate(rewards)]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def test_curves_are_grouped_by_method_with_mean_and_spread_over_seeds(tmp_path, capsys):
    folders = [
        write_run(tmp_path / "a", [1.0, 2.0, 5.0], seed=0),
        write_run(tmp_path / "b", [3.0, 6.0], seed=1, out="b", sample_batch=4),
        write_run(tmp_path / "c", [0.0, 1.0], no_bpt=False, no_bs=False),
        write_run(tmp_path / "d", [0.0, 1.0], no_bpt=False, no_bs=False, lr=2e-3),
        write_run(tmp_path / "e", [0.0, 1.0], algo="pg", no_bs=False),
    ]
    groups = group_runs(folders)
    assert {k: len(v) for k, v in groups.items()} == {
        "DDPO": 2, "BPT+BS, lr 0.001": 1, "BPT+BS, lr 0.002": 1, "PG BS": 1}  # fmt: skip
    queries, mean, deviation = curve(groups["DDPO"], "reward_mean")
    assert queries == [10, 20] and mean == [2.0, 4.0]  # only the rounds that both have
    assert deviation == pytest.approx([np.std([1, 3], ddof=1), np.std([2, 6], ddof=1)])
    assert curve(groups["PG BS"], "reward_mean")[2] == [0.0, 0.0]
    evaluation.main(["--study", "curves", "--runs", *folders, "--out", str(tmp_path / "out")])
    saved = json.loads((tmp_path / "out/curves.json").read_text())
    assert saved["DDPO"]["reward_mean"]["mean"] == [2.0, 4.0]
    assert saved["DDPO"]["spread_within_prompt"]["mean"] == pytest.approx([1.0, 0.5])
    assert (tmp_path / "out/curves.png").stat().st_size > 1000
    assert "| DDPO | 2 | 20 | 2.0000 | 4.0000 | 2.8284 |" in capsys.readouterr().out


# ---------------------------------------------------------------- the command


@pytest.fixture
def no_clip(monkeypatch):
    """eval.py with brightness in place of every reward."""
    monkeypatch.setattr(evaluation, "load_reward", lambda name, *_: checked(Brightness(), name))


def test_main_scores_base_and_lora_on_the_same_noise(no_clip, random_folder, model, tmp_path,
                                                     capsys):  # fmt: skip
    run = tmp_path / "run"
    run.mkdir()
    inject_lora(model.unet, 2)
    randomise_lora(model.unet, 0.5)
    runs.write_safetensors(run / "pytorch_lora_weights.safetensors", lora_state(model.unet))
    config = {"model": str(random_folder), "T": 4, "eta": 1.0, "guidance": 2.0}
    runs.write_json(run / "config.json", config)
    out = tmp_path / "out"
    evaluation.main(["--lora", str(run), "--prompt", "cat", "--prompt", "dog", "--images", "3",
                     "--metrics", "clip,is,jpeg", "--device", "cpu", "--out", str(out),
                     ])  # fmt: skip
    data = json.loads((out / "scores.json").read_text())
    base, lora = data["results"]["base"], data["results"][str(run)]
    assert list(base) == ["CLIPScore", "jpeg", "inception score", "inception score, left out",
                          "n", "scores"] and base["n"] == 6  # fmt: skip
    assert base["CLIPScore"][0] == pytest.approx(np.mean(base["scores"]["clip"]))
    assert base["CLIPScore"][1] == pytest.approx(np.std(base["scores"]["clip"], ddof=1) / 6**0.5)
    assert base["scores"]["jpeg"] == base["scores"]["clip"]  # brightness twice, the same pairs
    model.schedule = make_schedule(model.pipe.scheduler, 4)
    args = SimpleNamespace(T=4, guidance=2.0, sample_batch=8, decode_batch=8)
    expected, _ = evaluate(model, Brightness(), ["cat", "dog"], 3, args)  # the run's T and guidance
    np.testing.assert_allclose(lora["scores"]["clip"], expected["score"], atol=1e-5)
    assert lora["scores"]["clip"] != base["scores"]["clip"]
    table = capsys.readouterr().out
    assert "| model | CLIPScore | jpeg | inception score |" in table and f"| {run} | " in table
    from PIL import Image

    assert Image.open(out / "grid.png").size == (3 * 132 + 4, 4 * 132 + 4)  # 2 prompts x 2 models
    evaluation.main(["--lora", str(run), "--no-base", "--prompt", "cat", "--images", "1",
                     "--device", "cpu", "--out", str(out)])  # fmt: skip
    assert list(json.loads((out / "scores.json").read_text())["results"]) == [str(run)]


def test_the_unseen_list_and_a_study_from_the_command_line(no_clip, random_folder, tmp_path):
    prompts = tmp_path / "p.txt"
    prompts.write_text("[train]\ncat\ndog\n[unseen]\nbird\n")
    common = ["--model", str(random_folder), "--device", "cpu", "--prompts", str(prompts),
              "--out", str(tmp_path / "out"), "--batch", "16"]  # fmt: skip
    evaluation.main([*common, "--split", "unseen", "--images", "1"])
    data = json.loads((tmp_path / "out/scores.json").read_text())
    assert data["results"]["base"]["n"] == 1
    evaluation.main([*common, "--study", "last-step", "--roots", "2"])
    data = json.loads((tmp_path / "out/last-step.json").read_text())
    assert data["pairs"] == len(data["clip"]["differences"]) == 2
    assert data["settings"]["roots"] == 2 and data["settings"]["T"] == 20


def fails(capsys, *argv):
    """The error line of `eval.py argv`: one line after any progress bar, exit code 2."""
    with pytest.raises(SystemExit) as stop:
        evaluation.main([str(a) for a in argv])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in error
    assert error.count("error: ") == 1 and error.splitlines()[-1].startswith("error: "), error
    return error


@pytest.mark.parametrize("argv, words", [
    (["--prompt", " "], "--prompt is empty"), (["--images", "0"], "--images must be 1 or more"),
    (["--metrics", "clip,foo"], "unknown --reward foo"), (["--metrics", ","], "--metrics is empty"),
    (["--no-base"], "without --lora"),
    (["--branches", "3"], "--branches belongs to --study table5"),
    (["--study", "last-step", "--differ", "1"], "--differ belongs to --study table5"),
    (["--study", "table5", "--branches", "1"], "--branches must be 2 or more"),
    (["--study", "curves"], "needs --runs"), (["--runs", "a"], "--runs belongs to --study curves"),
    (["--study", "tree", "--lora", "a", "b"], "one --lora at most"), (["--flag"], "--flag"),
    (["--study", "curves", "--runs", "nowhere"], "nowhere is no run"),
    (["--lora", "nowhere", "--device", "cpu"], "give a run folder or a .safetensors file"),
    (["--prompts", "nowhere.txt", "--device", "cpu"], "cannot read the prompt file nowhere.txt"),
])  # fmt: skip
def test_bad_flags_end_with_one_line(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in fails(capsys, *argv)


def test_bad_prompt_lists_end_with_one_line(capsys, tmp_path):
    out = ["--device", "cpu", "--out", tmp_path / "out"]
    (tmp_path / "empty.txt").write_text("\n# only a comment\n")
    assert "holds no prompt" in fails(capsys, "--prompts", tmp_path / "empty.txt", *out)
    (tmp_path / "one.txt").write_text("a cat\n")
    wanted = "has no [unseen] list"
    assert wanted in fails(capsys, "--prompts", tmp_path / "one.txt", "--split", "unseen", *out)


def test_folders_that_are_no_run_end_with_one_line(capsys, tmp_path):
    out = ["--device", "cpu", "--out", tmp_path / "out"]
    (tmp_path / "folder").mkdir()
    assert "no LoRA at" in fails(capsys, "--lora", tmp_path / "folder", *out)
    write_run(tmp_path / "cut", [1.0], model="tiny")
    assert "is not finished: python train.py" in fails(capsys, "--lora", tmp_path / "cut", *out)
    write_run(tmp_path / "new", [])
    wanted = "has not finished a round"
    assert wanted in fails(capsys, "--study", "curves", "--runs", tmp_path / "new", *out)
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors")
    assert "no LoRA at" in fails(capsys, "--lora", tmp_path / "broken.safetensors", *out)
    runs.write_safetensors(tmp_path / "other.safetensors", {"weight": torch.zeros(2)})
    assert "holds no LoRA" in fails(capsys, "--lora", tmp_path / "other.safetensors", *out)


def test_defaults_are_the_runs_else_train_pys(tmp_path):
    import train

    sd = {name: value for name, _, value, _, _ in train.SETTINGS}
    args = evaluation.parse_args(["--model", "somewhere", "--device", "cpu"])
    assert all(getattr(args, n) == sd[n] for n in ("T", "eta", "guidance"))
    run = write_run(tmp_path / "run", [1.0], model="somewhere", T=7, eta=0.5, guidance=2.5)
    args = evaluation.parse_args(["--lora", run, "--device", "cpu"])
    assert (args.model, args.T, args.eta, args.guidance) == ("somewhere", 7, 0.5, 2.5)
    args = evaluation.parse_args(["--lora", run, "--T", "9", "--device", "cpu"])
    assert (args.T, args.guidance) == (9, 2.5)


def test_runs_of_different_models_end_with_one_line(capsys, tmp_path):
    a, b = (write_run(tmp_path / n, [1.0], model=n, T=20, guidance=5.0) for n in "ab")
    assert "differ in model, a and b" in fails(capsys, "--lora", a, b, "--out", tmp_path / "out")
    c = write_run(tmp_path / "c", [1.0], model="a", T=10, guidance=5.0)
    assert "differ in T, 10 and 20" in fails(capsys, "--lora", a, c, "--out", tmp_path / "out")


def test_a_lora_of_another_model_ends_with_one_line(no_clip, random_folder, capsys, tmp_path):
    state = {"unet.mid.attn.to_q.lora_A.weight": torch.zeros(4, 8),
             "unet.mid.attn.to_q.lora_B.weight": torch.zeros(8, 4)}  # fmt: skip
    runs.write_safetensors(tmp_path / "other.safetensors", state)
    error = fails(capsys, "--lora", tmp_path / "other.safetensors", "--model", random_folder,
                  "--no-base", "--prompt", "cat", "--device", "cpu",
                  "--out", tmp_path / "out")  # fmt: skip
    assert "other.safetensors: this LoRA is of another model" in error


def test_a_reward_that_fails_ends_with_one_line(random_folder, capsys, tmp_path):
    (tmp_path / "bad.py").write_text("def score(images, prompts):\n    return images\n")
    error = fails(capsys, "--metrics", f"{tmp_path}/bad.py:score", "--model", random_folder,
                  "--prompt", "cat", "--images", "1", "--device", "cpu",
                  "--out", tmp_path / "out")  # fmt: skip
    assert "bad.py:score returned shape (1, 3, 32, 32) for 1 pictures" in error


def test_a_missing_matplotlib_is_named_before_the_work(no_clip, capsys, tmp_path, monkeypatch):
    import builtins

    real = builtins.__import__

    def blocked(name, *args, **options):
        return real("no_such_module" if name == "matplotlib" else name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", blocked)
    error = fails(capsys, "--study", "tree", "--device", "cpu", "--out", tmp_path / "out")
    assert "pip install matplotlib" in error


# ---------------------------------------------------------------- results/run_all.py


@pytest.fixture(scope="module")
def run_all():
    import importlib.util

    spec = importlib.util.spec_from_file_location("run_all", ROOT / "results/run_all.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_row_has_flags_that_exist_equal_queries_and_updates(run_all, tmp_path, monkeypatch):
    import train

    monkeypatch.chdir(tmp_path)  # no run lies about
    groups, configs = run_all.rows(), []
    for name, (settings, steps) in {**groups["first"], **groups["tune"]}.items():
        for (file, *argv), _ in steps:
            args = {"train.py": train, "eval.py": evaluation}[file].parse_args(argv)
            if file == "train.py":
                configs.append(vars(args))
                for flag, value in settings.items():
                    assert getattr(args, flag.replace("-", "_")) == value, (name, flag)
    own = {k.replace("-", "_") for more in run_all.OF_METHOD.values() for k in more}
    assert own == {"epochs", "tau0", "skip_last", "update_size"}
    for c in configs:  # equal queries a run and trajectories an update, whatever the method
        assert c["queries"] % c["branches"] == 0 and c["branches"] == (
            1 if c["no_bs"] else run_all.BRANCHES)  # fmt: skip
        for what in ("rounds", "queries", "clip_range"):
            assert c[what] == configs[0][what], what
    for name, (_, steps) in groups["first"].items():  # the base model is drawn as it was trained
        for (file, *argv), _ in steps:
            drawn = evaluation.parse_args(argv) if file == "eval.py" else SimpleNamespace(lora=[1])
            if not drawn.lora:
                assert (drawn.T, drawn.eta, drawn.guidance, drawn.model) == tuple(
                    configs[0][k] for k in ("T", "eta", "guidance", "model")), name  # fmt: skip
    methods = {(c["no_bpt"], c["no_bs"], c["seed"]) for c in configs if c["seed"] in run_all.SEEDS}
    assert len(methods) == 4 * len(run_all.SEEDS)
    assert not set(run_all.SEEDS) & set(run_all.TUNE["seeds"])  # tuned apart from what is reported


def test_wilson_intervals():
    """Against the textbook's figures, and where p is 0 or 1."""
    assert wilson(0.5, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    assert wilson(0.0, 128) == pytest.approx((0.0, 0.0291), abs=1e-4)
    assert wilson(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


def test_the_gain_in_inception_score_is_paired(run_all):
    """The same pictures left out of both; the seeds' spread comes on top of it."""
    def seeds(scores, left_out):
        return [{"train": {"inception score": [score, 9.0], "inception score, left out": v}}
                for score, v in zip(scores, left_out)]  # fmt: skip

    b = seeds([2.0], [[2.0, 2.1, 1.9, 2.0]])
    shifted = seeds([2.5], [[2.5, 2.6, 2.4, 2.5]])
    assert run_all.inception_gain(shifted, b) == pytest.approx((0.5, 0.0, 0.0))
    a = seeds([3.0, 5.0], [[3.0, 3.3, 3.1, 3.0], [5.0, 5.1, 5.1, 5.0]])
    difference = np.array([4.0, 4.2, 4.1, 4.0]) - [2.0, 2.1, 1.9, 2.0]
    error = math.sqrt(3 / 4 * np.square(difference - difference.mean()).sum())
    assert run_all.inception_gain(a, b) == pytest.approx((2.0, math.sqrt(error**2 + 2 / 2), error))


def test_the_papers_own_differences(run_all):
    line = run_all.MATRIX[0]
    assert run_all.paper_gain(line, "bpt-bs", "vanilla") == pytest.approx((0.0050, 0.0241))
    assert run_all.paper_gain(line, "vanilla", "base") == pytest.approx((0.0183, -0.0293))
    assert run_all.paper_gain(line, "bs", "vanilla") == (None, None)
    dpok = next(x for x in run_all.MATRIX if x["algo"] == "dpok")
    assert run_all.paper_gain(dpok, "bpt-bs", "vanilla") == (None, pytest.approx(0.0220))


def test_no_row_replaces_another(run_all, monkeypatch):
    """A line with settings of its own needs a name of its own."""
    line = run_all.MATRIX[1] | {"settings": {"epochs": 2}}
    monkeypatch.setattr(run_all, "MATRIX", (*run_all.MATRIX, line))
    with pytest.raises(SystemExit, match="two rows are called t2-ddpo-seed0"):
        run_all.rows()
    monkeypatch.setattr(run_all, "MATRIX", (*run_all.MATRIX[:-1], line | {"name": "twice"}))
    assert run_all.rows()["first"]["twice-t2-ddpo-seed0"][0]["epochs"] == 2


def test_the_pooled_gain_is_numpys(run_all):
    rng = np.random.default_rng(0)
    after, before = rng.normal(size=(3, 8)), rng.normal(size=(1, 8))
    mean, error, (spread, none) = run_all.gain(after.tolist(), before.tolist())
    difference = after.mean(0) - before[0]
    assert mean == pytest.approx(difference.mean()) and none == 0
    assert error == pytest.approx(difference.std(ddof=1) / 8**0.5)
    assert spread == pytest.approx(after.mean(1).std(ddof=1))


def test_a_run_of_other_settings_is_not_taken_for_the_row(run_all, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"lr": 0.1, "update_size": 32}))
    assert run_all.other_settings(tmp_path, {"lr": 0.1, "update-size": 32}) is None
    assert "lr is 0.1, the table says 0.2" in run_all.other_settings(tmp_path, {"lr": 0.2})
    assert run_all.other_settings(tmp_path / "none", {"lr": 0.2}) is None
