"""Metrics against numpy, evaluation against single pictures, the command, LoRAs of any kind."""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, make_pipeline, make_small, randomise_lora
from PIL import Image
from safetensors.torch import load_file, save_file
from test_command import light, refused  # noqa: F401 (a fixture)

import eval as evaluation
from ddim_logprob import keyed_generator
from eval import compare, evaluate, find_judge, inception_score, load_lora, paired_gain
from lora import TARGETS, inject_lora, lora_parameters, lora_state
from rewards import checked
from support.report import write_lora
from support.run_folder import CHECKPOINT, LORA, read_json, write_json, write_safetensors

PROMPTS = ["cat", "dog", "bird"]


class Brightness:
    """A stand-in for CLIP: the score is the mean brightness, features are some pixels."""

    def __call__(self, images, prompts):
        return images.mean((1, 2, 3)) + torch.tensor([0.01 * len(p) for p in prompts])

    def embed_images(self, images, normalize=True):
        assert not normalize, "Eq. 9 is of raw embeddings"
        return 3 * images.flatten(1)[:, :6]


def judge(images, prompts):
    """Right if the picture's corner is bright, and never of a bird."""
    return (images[:, 0, :8, :8].mean((1, 2)) > 0.4) & torch.tensor([p != "bird" for p in prompts])


@pytest.fixture
def small():
    return make_small(T=4, guidance=3.0, sample_batch=4, decode_batch=3)


CLIP = {"clip": checked(Brightness(), "clip")}


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


def test_paired_gain_is_numpys():
    before, after = np.random.default_rng(1).normal(size=(2, 9))
    gain, error = paired_gain(before.tolist(), after.tolist())
    assert gain == pytest.approx((after - before).mean())
    assert error == pytest.approx((after - before).std(ddof=1) / 3)
    assert paired_gain([1.0], [3.0]) == (2.0, 0.0)
    with pytest.raises(ValueError):
        paired_gain([1.0, 2.0], [1.0])


def scores(score, recognised=None):
    return {"score": score, "recognised": recognised}


def test_compare_pairs_by_list_and_leaves_out_a_missing_judge():
    """Missing on either side."""
    before = {"train": scores([1.0, 2.0], [0.0, 1.0]), "unseen": scores([3.0]), "own": scores([0])}
    after = {"train": scores([2.0, 2.0], [1.0, 1.0]), "unseen": scores([1.0], [1.0])}
    after["own"], before["own"] = scores([0.5]), scores([0.5], [1.0])
    summary, rows = compare(before, after, "clip")
    wanted = {"train_score", "train_recognised", "unseen_score", "own_score"}
    assert set(summary) == wanted and len(rows) == 4
    expected = {"before": 1.5, "after": 2.0, "gain": 0.5, "error": 0.5, "n": 2}
    assert summary["train_score"] == expected
    assert summary["unseen_score"]["gain"] == -2.0
    line = "  train   clip   1.5000 -> 2.0000   gain +0.5000 +- 0.5000 (standard error, 2 pictures)"
    assert rows[0] == line and rows[1].startswith("  train   judge  0.5000 -> 1.0000")


# ---------------------------------------------------------------- pictures of a model


def test_evaluation_draws_noise_keyed_by_prompt_and_number(small):
    """Whatever the batches and the other prompts: picture k of prompt p stands at k * P + p."""
    whole, images = evaluate(small, CLIP, PROMPTS, 2, judge)
    small.policy.sample_batch, small.decode_batch = 2, 1
    cut, same = evaluate(small, CLIP, PROMPTS, 2, judge)
    torch.testing.assert_close(images, same, atol=1e-4, rtol=0)
    np.testing.assert_allclose(whole["clip"], cut["clip"], atol=1e-5)
    assert whole["recognised"] == cut["recognised"]
    assert len(set(whole["clip"])) == 6 and images.shape == (6, 3, 32, 32)
    generator = keyed_generator("evaluation", "dog", 1)
    x = torch.randn(1, *small.latent_shape, generator=generator)
    for t in range(4, 0, -1):
        with torch.no_grad():
            mu, sigma = small.policy(x, t, ["dog"])
        x = mu + sigma * torch.randn(small.latent_shape, generator=generator)
    torch.testing.assert_close(images[4], small.decode(x)[0], atol=1e-4, rtol=0)
    assert whole["clip"][4] == pytest.approx(images[4].mean().item() + 0.03, abs=1e-5)
    alone, _ = evaluate(small, CLIP, ["dog"], 2)
    np.testing.assert_allclose(alone["clip"], whole["clip"][1::3], atol=1e-5)
    assert alone["recognised"] is None
    other, _ = evaluate(small, CLIP, ["dog"], 2, seed=(77,))
    assert min(abs(a - b) for a, b in zip(other["clip"], alone["clip"])) > 1e-5


def test_every_metric_and_the_judge_get_the_pictures_with_their_prompts(small):
    """In parts of two pictures, of lists of three."""
    small.decode_batch = 2
    metrics = CLIP | {
        "index": checked(lambda x, p: [PROMPTS.index(name) for name in p], "index"),
        "pixel": checked(lambda x, p: x[:, 1, 2, 3], "pixel"),
    }
    known = lambda x, p: torch.tensor([name == "dog" for name in p])
    found, images = evaluate(small, metrics, PROMPTS, 2, known)
    assert list(found) == ["clip", "index", "pixel", "recognised"]
    assert found["index"] == [0, 1, 2, 0, 1, 2] and found["recognised"] == [0, 1, 0, 0, 1, 0]
    assert found["pixel"] == images[:, 1, 2, 3].tolist()
    length = torch.tensor([3, 3, 4] * 2)
    np.testing.assert_allclose(found["clip"], images.mean((1, 2, 3)) + length / 100, atol=1e-6)


@pytest.mark.parametrize("world", [2, 7])
def test_processes_share_the_pictures(small, world):
    """Their scores add up to those of one process; each returns its own pictures."""
    want, images = evaluate(small, CLIP, PROMPTS, 2, judge)
    small.policy.sample_batch = 2
    shares = [evaluate(small, CLIP, PROMPTS, 2, judge, n, world) for n in range(world)]
    for what in ("clip", "recognised"):
        parts = list(zip(*(found[what] for found, _ in shares)))
        assert [sum(part) for part in parts] == pytest.approx(want[what], abs=1e-4)
    parts = zip(*(found["clip"] for found, _ in shares))
    assert all(sum(score != 0 for score in part) == 1 for part in parts)
    for n, (_, own) in enumerate(shares):
        if n < 6:
            torch.testing.assert_close(own, images[n::world], atol=1e-4, rtol=0)
    assert len(shares[-1][1]) == (0 if world == 7 else 3)


needs_judge = pytest.mark.skipif(
    not (ROOT / "tiny/judge").exists(), reason="the tiny model is not built"
)


@needs_judge
def test_the_judge_is_for_the_tiny_models_own_prompts():
    candidates = ["a cat washing dishes", "a dog washing dishes", "a cat riding a bike"]
    tiny = SimpleNamespace(tiny=ROOT / "tiny")
    judged = find_judge(tiny, candidates)(torch.rand(3, 3, 64, 64), candidates)
    assert judged.shape == (3,) and judged.dtype == torch.bool
    assert find_judge(tiny, [*candidates, "a portrait of my aunt"]) is None
    assert find_judge(SimpleNamespace(tiny=None), candidates) is None


# ---------------------------------------------------------------- before and after a run


@pytest.fixture
def grey(monkeypatch):
    """`evaluate` without a model: a number of its own for each call, list and picture."""
    calls = []

    def evaluated(pipeline, rewards, prompts, each, judge=None, worker=0, workers=1, seed=()):
        calls.append((prompts, each, worker, workers))
        n = len(prompts) * each
        numbers = [len(calls) + j / 100 for j in range(n)]
        pictures = torch.linspace(0, 1, n).view(n, 1, 1, 1).expand(n, 3, 128, 128)
        return {name: numbers for name in rewards} | {"recognised": None}, pictures

    monkeypatch.setattr(evaluation, "evaluate", evaluated)
    return calls


def a_run(folder, worker=0):
    (folder / "grids").mkdir(parents=True, exist_ok=True)
    return evaluation.Run(folder, worker, 2, [].append, None)


class Layers(list):
    """What a pipeline has of `lora_off`: whether its LoRA is on."""

    unet = property(lambda self: self)

    def named_modules(self):
        return []


def test_scores_before_are_read_again_only_where_all_is_there(grey, tmp_path, capsys):
    """Of a resumed run: the scores, and a grid of each list."""
    pipeline = SimpleNamespace(policy=Layers())
    lists = {"train": PROMPTS, "unseen": ["fox"]}
    cfg = SimpleNamespace(resume=None, eval_images=2, reward="clip")
    before = lambda run: evaluation.scores_before(run, cfg, pipeline, None, None, lists)
    want = before(a_run(tmp_path))
    assert want == read_json(tmp_path / "before.json") and list(want) == ["train", "unseen"]
    assert want["train"]["score"] == [1, 1.01, 1.02, 1.03, 1.04, 1.05]
    assert want["unseen"] == {"score": [2, 2.01], "recognised": None}
    assert grey == [(PROMPTS, 2, 0, 2), (["fox"], 2, 0, 2)]
    names = {path.name for path in (tmp_path / "grids").iterdir()}
    assert names == {"before-train.png", "before-unseen.png"}
    before(a_run(tmp_path))
    assert len(grey) == 4, "a new run draws anew"
    cfg.resume = str(tmp_path)
    kept = read_json(tmp_path / "before.json")
    assert before(a_run(tmp_path)) == kept and len(grey) == 4
    (tmp_path / "grids/before-unseen.png").unlink()
    assert before(a_run(tmp_path)) != kept and len(grey) == 6
    (tmp_path / "before.json").unlink()
    before(a_run(tmp_path))
    assert len(grey) == 8
    cfg.eval_images = 3
    with pytest.raises(SystemExit):
        before(a_run(tmp_path))
    said = capsys.readouterr().err
    assert f"{tmp_path}/before.json is damaged" in said and said.count("\n") == 1
    after = evaluation.draw_lists(a_run(tmp_path), pipeline, None, None, lists, 1, "after")
    assert after == read_json(tmp_path / "after.json") and len(after["train"]["score"]) == 3


def test_the_base_model_is_drawn_without_the_lora(small, tmp_path, monkeypatch):
    inject_lora(small.policy.unet)
    randomise_lora(small.policy.unet, 0.5)
    cfg = SimpleNamespace(resume="yes", eval_images=1)
    run = evaluation.Run(tmp_path, 0, 1, lambda text: None, None)
    (tmp_path / "grids").mkdir()
    lists = {"train": ["cat"]}
    got = evaluation.scores_before(run, cfg, small, CLIP["clip"], None, lists)
    base = make_small(T=4, guidance=3.0, sample_batch=4, decode_batch=3)
    want, _ = evaluate(base, CLIP, ["cat"], 1)
    trained, _ = evaluate(small, CLIP, ["cat"], 1)
    assert got["train"]["score"] == want["clip"] and trained["clip"] != want["clip"]


def test_the_first_process_alone_writes(grey, tmp_path):
    pipeline = SimpleNamespace()
    evaluation.draw_lists(a_run(tmp_path, 1), pipeline, None, None, {"train": PROMPTS}, 1, "after")
    assert not list((tmp_path / "grids").iterdir()) and not (tmp_path / "after.json").exists()
    assert grey[0][2:4] == (1, 2)


# ---------------------------------------------------------------- the command


@pytest.fixture
def no_clip(monkeypatch):
    """eval.py with brightness in place of every reward."""
    monkeypatch.setattr(evaluation, "load_reward", lambda name, *_: checked(Brightness(), name))


CONFIG = {"model": "somewhere", "rounds": 1, "reward": "clip", "T": 20, "eta": 1.0}
CONFIG |= {"guidance": 5.0, "image_size": None, "prediction_type": None, "made_with": {}}


def write_run(folder, **config):
    """A run folder with these settings, and no LoRA yet."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", CONFIG | config)
    return str(folder)


def run_main(*argv):
    evaluation.main([str(a) for a in argv])


def results(folder):
    return json.loads((folder / "scores.json").read_text())["results"]


@pytest.fixture(scope="module")
def trained():
    """The random pipeline as the run below has it, with its LoRA."""
    trained = make_small(T=4, guidance=2.0)
    inject_lora(trained.policy.unet, 2)
    randomise_lora(trained.policy.unet, 0.5)
    return trained


@pytest.fixture
def run(trained, random_folder, tmp_path):
    """A finished run of the random pipeline with T 4 and guidance 2, its LoRA that of `trained`.

    Its checkpoint is damaged: a finished run needs none.
    """
    folder = write_run(tmp_path / "it's a run", model=str(random_folder), T=4, guidance=2.0)
    write_lora(tmp_path / "it's a run", lora_state(trained.policy.unet))
    (tmp_path / "it's a run" / CHECKPOINT).write_bytes(b"cut")
    return folder


def test_main_scores_base_and_lora_on_the_same_noise(no_clip, run, trained, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()  # empty
    argv = ["--lora", run, "--prompt", "cat", "--prompt", "goose", "--images", 3, "--device", "cpu"]
    run_main(*argv, "--metrics", "clip,is,jpeg", "--out", out)
    base, lora = results(out)["base"], results(out)[run]
    assert list(base) == ["CLIPScore", "jpeg", "inception score", "n", "scores"] and base["n"] == 6
    assert base["CLIPScore"][0] == pytest.approx(np.mean(base["scores"]["clip"]))
    assert base["CLIPScore"][1] == pytest.approx(np.std(base["scores"]["clip"], ddof=1) / 6**0.5)
    assert base["scores"]["jpeg"] == base["scores"]["clip"]  # brightness twice, the same pairs
    expected, images = evaluate(trained, CLIP, ["cat", "goose"], 3)
    np.testing.assert_allclose(lora["scores"]["clip"], expected["clip"], atol=1e-4)
    assert lora["scores"]["clip"] != base["scores"]["clip"]
    features = Brightness().embed_images(images, normalize=False)
    assert lora["inception score"] == pytest.approx(inception_score(features), rel=1e-4)
    table = capsys.readouterr().out
    assert "| model | CLIPScore | jpeg | inception score |\n|---|---|---|---|\n" in table
    assert f"| {run} | {lora['CLIPScore'][0]:.4f} +- {lora['CLIPScore'][1]:.4f} | " in table
    assert f" | {lora['inception score']:.4f} |\n" in table and "over 6 pictures a model" in table
    grid = Image.open(out / "grid.png")
    assert grid.size == (3 * 132 + 4, 4 * 132 + 4)  # 2 prompts x 2 models
    for p, row in ((0, 1), (1, 3)):  # by the LoRA, below the base: number 1 of each prompt
        pixel = images[2 * 1 + p, :, 16, 16]
        shown = grid.getpixel((132 + 4 + 66, row * 132 + 4 + 66))
        assert shown == pytest.approx((255 * pixel).tolist(), abs=2)


def test_a_list_is_shown_from_all_over(monkeypatch, grey, random_folder, tmp_path):
    """A row a model, nine columns: every second of 20 prompts, number 0 of each."""
    (tmp_path / "p.txt").write_text("".join(f"cat {'x' * n}\n" for n in range(20)))
    pipeline = SimpleNamespace(pipe=None, cache={})
    monkeypatch.setattr(evaluation, "load", lambda *rest: (pipeline, {"clip": None}, None, None))
    monkeypatch.setattr(evaluation, "load_lora", lambda *rest: None)
    argv = ["--prompts", tmp_path / "p.txt", "--model", "none", "--lora", "x", "--device", "cpu"]
    run_main(*argv, "--out", tmp_path / "out")
    assert [len(call[0]) * call[1] for call in grey] == [40, 40]
    grid = Image.open(tmp_path / "out/grid.png")
    assert grid.size == (9 * 132 + 4, 2 * 132 + 4)
    for j in range(9):
        for row in (0, 1):
            shown = grid.getpixel((132 * j + 68, 132 * row + 68))[0]
            assert shown == pytest.approx(255 * 2 * j / 39, abs=1), j


def test_a_seed_draws_other_pictures_of_a_prompt(no_clip, random_folder, tmp_path):
    """And the same seed the same; without one they are those of training's own evaluation."""
    argv = ["--model", random_folder, "--T", 2, "--device", "cpu", "--prompt", "cat", "--images", 2]

    def scored(name, *seed):
        run_main(*argv, *seed, "--out", tmp_path / name)
        return results(tmp_path / name)["base"]["scores"]["clip"]

    plain, seeds = scored("a"), [scored(str(n), "--seed", n) for n in (0, 77, 2**70)]
    assert scored("b") == plain and scored("c", "--seed", 77) == seeds[1]
    assert len({tuple(s) for s in (plain, *seeds)}) == 4


def test_the_unseen_list_from_the_command_line(no_clip, random_folder, tmp_path, monkeypatch):
    """Its folder is a new one each time, named and numbered where none is given."""
    prompts = tmp_path / "p.txt"
    prompts.write_text("[train]\ncat\ndog\n[unseen]\nbird\n")
    monkeypatch.chdir(tmp_path)
    argv = ["--model", random_folder, "--device", "cpu", "--prompts", prompts, "--batch", 16]
    argv += ["--T", 2]
    run_main(*argv, "--split", "unseen")
    run_main(*argv, "--split", "train", "--metrics", "is")
    one, two = (json.loads((tmp_path / f"runs/eval-{n}/scores.json").read_text()) for n in (1, 2))
    assert one["results"]["base"]["n"] == 2 and two["results"]["base"]["n"] == 4
    assert one["settings"]["T"] == 2 and one["settings"]["sample_batch"] == 16
    assert "inception score" in two["results"]["base"]
    assert Image.open(tmp_path / "runs/eval-2/grid.png").size == (2 * 132 + 4, 132 + 4)


def test_defaults_are_the_runs_else_train_pys(tmp_path, monkeypatch):
    import train

    monkeypatch.chdir(tmp_path)
    sd = {name: value for name, value, *_ in train.SETTINGS}
    args = evaluation.parse_args(["--model", "somewhere", "--device", "cpu"])
    assert all(getattr(args, n) == sd[n] for n in ("T", "eta", "guidance"))
    assert (args.metrics, args.sample_batch, args.images, args.seed) == (["clip"], 8, 2, ())
    assert (args.out, args.decode_batch, args.precision) == ("runs/eval-1", 8, "fp32")
    more = dict(T=7, eta=0.5, guidance=0, image_size=64, prediction_type="v_prediction")
    more |= dict(model_config="c", base_lora="b.safetensors")
    run = write_run(tmp_path / "run", **more, reward="jpeg")
    args = evaluation.parse_args(["--lora", run, "--device", "cpu", "--prompt", "cat"])
    assert (args.model, args.metrics, args.images) == ("somewhere", ["jpeg"], 8)
    assert {name: getattr(args, name) for name in more} == more
    argv = ["--lora", run, "--T", "9", "--metrics", "clip, is", "--image-size", "32"]
    args = evaluation.parse_args([*argv, "--device", "cpu", "--model", "tiny", "--seed", "5"])
    assert (args.T, args.guidance, args.image_size, args.seed) == (9, 0, 32, (5,))
    assert args.metrics == ["clip", "is"] and args.sample_batch == args.decode_batch == 64
    assert evaluation.parse_args(["--device", "cpu"]).model == "tiny"


def test_a_file_of_a_run_is_drawn_as_its_run(tmp_path, monkeypatch):
    """Its model and its T: the file alone would be tried on the default model."""
    monkeypatch.setenv("HOME", str(tmp_path))
    write_run(tmp_path / "run", model="somewhere", T=7)
    for path in (tmp_path / "run/lora-round0010.safetensors", "~/run", "~/run/x.safetensors"):
        args = evaluation.parse_args([f"--lora={path}", "--device", "cpu"])
        assert (args.model, args.T) == ("somewhere", 7)
        assert args.lora == [str(path).replace("~", str(tmp_path))]
    args = evaluation.parse_args(["--lora", str(tmp_path / "alone.safetensors"), "--device", "cpu"])
    assert (args.model, args.T) == ("tiny", 20)


# ---------------------------------------------------------------- bad input


def fails(capsys, *argv):
    """The error line of `eval.py argv`: one line, exit code 2."""
    return refused(capsys, argv, main=evaluation.main)


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--prompt", "cat", "--prompt", " "], "--prompt is empty"),
        (["--images", "0"], "--images"),
        (["--images", 10**30], "--images"),
        (["--batch", "-1"], "--batch"),
        (["--T", "0"], "--T goes from 1 to 999"),
        (["--T", "1000"], "--T goes from 1 to 999"),
        (["--T", "2.5"], "--T"),
        (["--threads", "0"], "--threads"),
        (["--image-size", "0"], "--image-size"),
        (["--eta", "0"], "--eta from above 0 to 1"),
        (["--eta", "1.5"], "--eta from above 0 to 1"),
        (["--eta", "nan"], "--eta"),
        (["--guidance", "-1"], "--guidance"),
        (["--guidance", "nan"], "--guidance"),
        (["--guidance", "inf"], "--guidance"),
        (["--seed", "x"], "--seed"),
        (["--metrics", "clip,foo"], "unknown --reward foo"),
        (["--metrics", ","], "--metrics is empty"),
        (["--no-base"], "without --lora"),
        (["--flag"], "--flag"),
        (["--device", "nowhere"], "--device nowhere is not there"),
        (["--template", "4"], "--template"),
        (["--prompts", "nowhere.txt"], "cannot read the prompt file nowhere.txt"),
        (["--prompts", "x" * 300], "cannot read the prompt file"),
        (["--out", "x" * 300], "cannot write to"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_flags_end_with_one_line(light, capsys, argv, words):  # noqa: F811
    """Before anything heavy is loaded."""
    device = [] if "--device" in argv else ["--device", "cpu"]
    assert words in fails(capsys, *device, *argv)


def test_bad_prompt_lists_end_with_one_line(light, capsys, tmp_path):  # noqa: F811
    out = ["--device", "cpu", "--out", tmp_path / "out"]
    (tmp_path / "empty.txt").write_text("\n# only a comment\n")
    assert "holds no prompt" in fails(capsys, "--prompts", tmp_path / "empty.txt", *out)
    (tmp_path / "one.txt").write_text("a cat\n")
    wanted = "has no [unseen] list"
    assert wanted in fails(capsys, "--prompts", tmp_path / "one.txt", "--split", "unseen", *out)


def test_files_that_are_there_are_not_overwritten(light, capsys, tmp_path):  # noqa: F811
    """Of whatever kind: results, a run, a grid.png of the user's."""
    for name in ("scores.json", "grid.png", "notes.txt", ".hidden"):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / name).write_text("mine")
        error = fails(capsys, "--device", "cpu", "--out", tmp_path / "out")
        assert error.endswith("/out is not empty: take another --out")
        assert (tmp_path / "out" / name).read_text() == "mine"
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize(
    "config, words",
    [
        ("{cut", "config.json is damaged"),
        ("[]", "holds no run"),
        ("null", "holds no run"),
        ({"model": None}, "holds no run"),
        ({"T": 0}, "--T goes from 1"),
        ({"T": 5000}, "--T goes from 1"),
        ({"eta": 7}, "--eta from above 0 to 1"),
        ({"guidance": math.nan}, "--guidance"),
        ({"reward": "beauty"}, "unknown --reward beauty"),
        ({"reward": "./none.py:score"}, "there is no file"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_settings_of_foreign_runs(light, capsys, tmp_path, config, words):  # noqa: F811
    run = tmp_path / "run"
    run.mkdir()
    text = config if isinstance(config, str) else json.dumps(CONFIG | config)
    (run / "config.json").write_text(text)
    assert words in fails(capsys, "--lora", run, "--device", "cpu")


def test_runs_of_different_models_end_with_one_line(light, capsys, tmp_path):  # noqa: F811
    a, b = (write_run(tmp_path / n, model=n) for n in "ab")
    error = fails(capsys, "--lora", a, b)
    assert "differ in model, a and b: choose by --model" in error
    c = write_run(tmp_path / "c", model="a", T=10)
    assert "differ in T, 10 and 20" in fails(capsys, "--lora", a, c)
    d = write_run(tmp_path / "d", model="a", reward="jpeg")
    assert "differ in metrics, clip and jpeg" in fails(capsys, "--lora", a, d)
    e = write_run(tmp_path / "e", model="a", image_size=64)
    error = fails(capsys, "--lora", a, e)
    assert "differ in image_size, 64 and None: choose by --image-size" in error
    args = evaluation.parse_args(["--lora", a, c, "--T", "5", "--device", "cpu"])
    assert (args.T, args.model) == (5, "a")


# ---------------------------------------------------------------- LoRAs as people have them


def weights(unet, module):
    """What a LoRA adds to a linear layer's weight (out, in), from what the layer computes."""
    layer = unet.get_submodule(module)
    base = layer.base_layer
    with torch.no_grad():
        eye = torch.eye(base.in_features)
        return (layer(eye) - base(eye)).T


def loaded(path, pipe=None):
    """What `load_lora` adds to each layer that carries a LoRA, by its module."""
    pipe = pipe or make_pipeline()
    load_lora(pipe, path)
    modules = [name for name, m in pipe.unet.named_modules() if hasattr(m, "base_layer")]
    return {module: weights(pipe.unet, module) for module in modules}


def product(state, scale=1.0):
    """By hand: scale * B A of the names that diffusers has, by module."""
    names = [name for name in state if name.endswith(".lora_A.weight")]
    modules = {name.removeprefix("unet.").removesuffix(".lora_A.weight"): name for name in names}
    return {m: scale * state[n.replace("_A", "_B")] @ state[n] for m, n in modules.items()}


def same(found, want):
    assert found.keys() == want.keys() and len(found) >= 32
    for name, value in want.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def state(trained):
    """The LoRA of `trained`, rank 2."""
    return lora_state(trained.policy.unet)


def webui(folder):
    (path,) = folder.glob("*_webui.safetensors")
    return path


def test_a_run_and_its_files_are_one_lora(run, state, tmp_path):
    for path in (run, f"{run}/{LORA}", webui(tmp_path / "it's a run")):
        same(loaded(path), product(state))


def test_one_lora_takes_the_place_of_another(run, state, tmp_path):
    """They do not add up when several are compared."""
    pipe = make_pipeline()
    write_safetensors(tmp_path / "double.safetensors", {k: 2 * v for k, v in state.items()})
    same(loaded(tmp_path / "double.safetensors", pipe), product(state, 4))
    same(loaded(run, pipe), product(state))


def test_a_file_without_a_lora_is_refused_after_one_that_has_it(run, tmp_path, capsys):
    """The first one is not scored in its place."""
    pipe = make_pipeline()
    load_lora(pipe, run)
    layer = "transformer.blocks.0.attn.to_q.lora_A.weight"
    tensors = {layer: torch.zeros(2, 8), layer.replace("_A", "_B"): torch.zeros(8, 2)}
    write_safetensors(tmp_path / "other.safetensors", tensors)
    with pytest.raises(SystemExit):
        load_lora(pipe, tmp_path / "other.safetensors")
    assert "other.safetensors holds no LoRA of a UNet" in capsys.readouterr().err


@pytest.mark.parametrize("alpha", [1, 2, 6.0])
def test_kohyas_names_with_any_alpha(run, state, tmp_path, alpha):
    """The scale is alpha / rank, as in the files of web UIs and of kohya's trainer."""
    theirs = load_file(webui(tmp_path / "it's a run"))
    alphas = [name for name in theirs if name.endswith(".alpha")]
    assert len(alphas) >= 32 and all(name.startswith("lora_unet_") for name in theirs)
    theirs |= {name: torch.tensor(float(alpha)) for name in alphas}
    save_file(theirs, tmp_path / "kohya.safetensors", {"ss_network_dim": "2"})
    same(loaded(tmp_path / "kohya.safetensors"), product(state, alpha / 2))
    half = {name: value.half() for name, value in theirs.items()}
    save_file(half, tmp_path / "half.safetensors")
    found = loaded(tmp_path / "half.safetensors")
    name = next(iter(found))
    torch.testing.assert_close(found[name], product(state, alpha / 2)[name], atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("options, scale", [({}, 4.0), ({"use_rslora": True}, 8 / 2**0.5)])
def test_a_folder_of_peft(state, tmp_path, options, scale):
    """As `model.save_pretrained(folder)` writes it, with rank 2 and alpha 8."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=list(TARGETS), **options)
    model = peft.get_peft_model(make_pipeline().unet, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            key = name.replace("base_model.model.", "unet.").replace(".default.", ".")
            if key in state:
                parameter.copy_(state[key])
    model.save_pretrained(tmp_path / "peft")
    same(loaded(tmp_path / "peft"), product(state, scale))
    same(loaded(tmp_path / "peft/adapter_model.safetensors"), product(state, scale))


def test_a_file_of_diffusers_own_scripts_has_its_alpha_in_the_header(state, tmp_path):
    """As `save_lora_weights(..., unet_lora_adapter_metadata=...)` writes it: rank 2, alpha 8."""
    alpha = {"unet.r": 2, "unet.lora_alpha": 8, "unet.target_modules": TARGETS}
    header = {"format": "pt", "lora_adapter_metadata": json.dumps(alpha)}
    (tmp_path / "trained").mkdir()
    save_file(state, tmp_path / "trained" / LORA, header)
    pipe = make_pipeline()
    pipe.load_lora_weights(tmp_path / "trained")
    module = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    theirs = weights(pipe.unet, module)
    torch.testing.assert_close(theirs, product(state, 4)[module], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(loaded(tmp_path / "trained")[module], theirs, atol=1e-5, rtol=1e-4)


def unfinished(run, folder):
    """The run, stopped after round 3: its checkpoint, with AdamW's tensors, and no LoRA."""
    shutil.copytree(run, folder)
    state = load_file(folder / LORA)
    (folder / LORA).unlink()
    moments = {f"exp_avg:{name}": 2 * value for name, value in state.items()}
    moments |= {f"step:{name}": torch.tensor(3.0) for name in state}
    write_safetensors(folder / CHECKPOINT, state | moments, {"rounds_done": 3})
    return folder


def test_an_unfinished_run_is_scored_by_its_checkpoint(run, state, tmp_path, capsys):
    """With the weights and without the optimizer's tensors beside them."""
    cut = unfinished(run, tmp_path / "cut")
    for path in (cut, cut / CHECKPOINT):
        same(loaded(path), product(state))
        assert f"{path} is not finished: its LoRA after round 3" in capsys.readouterr().out


def test_the_loras_that_a_run_kept(run, state, tmp_path):
    """--save-every: lora-round0001.safetensors."""
    write_safetensors(tmp_path / "lora-round0001.safetensors", state)
    same(loaded(tmp_path / "lora-round0001.safetensors"), product(state))


def failure(path, capsys):
    """The one line with which a LoRA is refused."""
    with pytest.raises(SystemExit) as stop:
        load_lora(make_pipeline(), path)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    assert str(path) in error
    return error


Q = "unet.mid.attn.to_q.lora_A.weight"


@pytest.mark.parametrize(
    "tensors, header, words",
    [
        (None, None, "no LoRA of this model"),
        ({}, None, "no LoRA"),
        ({"weight": torch.zeros(2)}, None, "no LoRA"),
        ({Q: torch.zeros(2, 2)}, {"run": "{cut"}, "no LoRA of this model"),
        ({Q: torch.zeros(2, 2), Q.replace("_A", "_B"): torch.zeros(2, 2)}, None, "no LoRA"),
        ({"lora_unet_mid.lora_down.weight": torch.zeros(2, 2)}, None, "no LoRA"),
        (  # of a model without a UNet
            {
                "transformer.blocks.0.attn.to_q.lora_A.weight": torch.zeros(2, 8),
                "transformer.blocks.0.attn.to_q.lora_B.weight": torch.zeros(8, 2),
            },
            None,
            "holds no LoRA of a UNet",
        ),
    ],
)
def test_files_that_are_no_lora(capsys, tmp_path, tensors, header, words):
    import diffusers

    diffusers.utils.logging.set_verbosity(50)  # as `load_diffusers` has it
    path = tmp_path / "other.safetensors"
    path.write_bytes(b"no tensors") if tensors is None else save_file(tensors, path, header)
    assert words in failure(path, capsys)


def test_a_lora_of_another_model_ends_with_one_line(state, capsys, tmp_path):
    """Of a wider one."""
    wide = {name: v.repeat(1, 2) if "_A" in name else v for name, v in state.items()}
    write_safetensors(tmp_path / "wide.safetensors", wide)
    assert "no LoRA of this model at" in failure(tmp_path / "wide.safetensors", capsys)


def test_a_place_without_a_lora_ends_with_one_line(capsys, tmp_path):
    assert "no LoRA of this model at nowhere" in failure("nowhere", capsys)
    (tmp_path / "folder").mkdir()
    assert f"folder/{LORA}" in failure(tmp_path / "folder", capsys)
    write_run(tmp_path / "cut")
    assert failure(tmp_path / "cut", capsys).endswith("): is a round finished?\n")
    (tmp_path / "cut" / CHECKPOINT).write_bytes(b"cut")
    assert f"no LoRA of this model at {tmp_path}/cut/{CHECKPOINT}" in failure(
        tmp_path / "cut", capsys
    )


def test_a_lora_of_the_text_encoder_counts_beside_the_base(no_clip, random_folder, state, tmp_path):
    """Kohya's files have one: the prompts are not those that the base has embedded."""
    layer = "text_encoder.text_model.encoder.layers.0.self_attn.v_proj.lora_A.weight"
    draw = torch.Generator().manual_seed(0)
    text = {layer: torch.randn(2, 32, generator=draw)}
    text[layer.replace("_A", "_B")] = torch.randn(32, 2, generator=draw)
    write_safetensors(tmp_path / "both.safetensors", state | text)
    argv = ["--model", random_folder, "--T", 2, "--prompt", "cat", "--device", "cpu"]
    argv += ["--lora", tmp_path / "both.safetensors", "--images", 1]
    run_main(*argv, "--out", tmp_path / "a")
    run_main(*argv, "--no-base", "--out", tmp_path / "b")
    one, two = (results(tmp_path / n)[f"{tmp_path}/both.safetensors"] for n in "ab")
    assert one["scores"] == two["scores"]


def test_the_command_reads_a_lora_of_another_model_as_one_line(
    no_clip, random_folder, state, capsys, tmp_path
):
    wide = {name: v.repeat(1, 2) if "_A" in name else v for name, v in state.items()}
    write_safetensors(tmp_path / "wide.safetensors", wide)
    argv = ["--lora", tmp_path / "wide.safetensors", "--model", random_folder, "--no-base"]
    error = fails(capsys, *argv, "--prompt", "cat", "--device", "cpu", "--out", tmp_path / "out")
    assert "no LoRA of this model at" in error


# ---------------------------------------------------------------- how it ends


def test_a_reward_that_fails_ends_with_one_line(random_folder, capsys, tmp_path):
    (tmp_path / "bad.py").write_text("def score(images, prompts):\n    return images\n")
    argv = ["--metrics", f"{tmp_path}/bad.py:score", "--model", random_folder, "--T", 2]
    argv += ["--prompt", "cat", "--images", 1, "--device", "cpu", "--out", tmp_path / "out"]
    error = fails(capsys, *argv)
    assert "bad.py:score returned a Tensor" in error and "(1, 3, 32, 32)" in error


def test_pictures_that_are_not_finite_are_never_scored(no_clip, random_folder, capsys, tmp_path):
    """A LoRA that holds NaN, as one of a run that diverged."""
    trained = make_small()
    inject_lora(trained.policy.unet, 2)
    for parameter in lora_parameters(trained.policy.unet).values():
        parameter.data.fill_(math.nan)
    write_safetensors(tmp_path / "nan.safetensors", lora_state(trained.policy.unet))
    argv = ["--model", random_folder, "--T", 2, "--prompt", "cat", "--device", "cpu"]
    argv += ["--lora", tmp_path / "nan.safetensors", "--images", 2, "--out", tmp_path / "out"]
    assert "2 of 2 latents are not finite" in fails(capsys, *argv)


def test_a_full_disk_and_ctrl_c_end_with_one_line(light, monkeypatch, capsys):  # noqa: F811
    def stopped(problem):
        def stop(*_):
            raise problem

        monkeypatch.setattr(evaluation, "load_pipeline", stop)
        with pytest.raises(SystemExit) as end:
            run_main("--model", "none", "--prompt", "cat", "--device", "cpu", "--out", "out")
        return end.value.code, capsys.readouterr().err

    code, said = stopped(OSError(28, "No space left on device"))
    assert (code, said) == (2, "error: cannot write to out: No space left on device\n")
    assert stopped(KeyboardInterrupt()) == (130, "")
