"""Metrics against numpy, evaluation against single pictures, the command, and foreign input."""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, make_small, randomise_lora
from PIL import Image
from safetensors.torch import save_file

import eval as evaluation
from ddim_logprob import keyed_generator, make_schedule
from eval import compare, evaluate, inception_left_out, inception_score, jackknife_error
from eval import paired_gain, style_entropy
from files import write_json, write_safetensors
from lora import inject_lora, lora_state
from rewards import checked
from test_command import light, refused  # noqa: F401 (a fixture)

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
    return make_small(T=6, guidance=3.0, sample_batch=4, decode_batch=3)


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
    error = lambda features: jackknife_error(inception_left_out(features).tolist())
    assert inception_left_out(x).tolist() == pytest.approx(left_out, rel=1e-6)
    assert error(x) == pytest.approx(expected, rel=1e-6)
    assert error(x[:1].repeat(8, 1)) == pytest.approx(0, abs=1e-9)
    assert 0 < error(1000 * torch.eye(3)[[0, 0, 0, 1, 2]]) < 3  # p(y|x) of exact zeros
    mean = torch.tensor([1.0, 4.0, 2.0, 7.0])  # of a mean the jackknife is the usual error
    left_out = ((mean.sum() - mean) / 3).tolist()
    assert jackknife_error(left_out) == pytest.approx(mean.std().item() / 2)


@pytest.mark.parametrize(
    "styles, expected",
    [
        ([0, 0, 0, 0, 0, 0], 0.0),
        ([0, 1, 2, 0, 1, 2], math.log(3)),
        ([0, 0, 0, 1, 1, 1], math.log(2)),
    ],
)
def test_style_entropy_is_that_of_the_best_captions(styles, expected):
    from tiny.sprites import STYLES

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
    reward = checked(Brightness(), "clip")
    whole, images = evaluate(small, reward, PROMPTS, 2, judge)
    small.sample_batch, small.decode_batch = 2, 1
    cut, same = evaluate(small, reward, PROMPTS, 2, judge)
    torch.testing.assert_close(images, same, atol=1e-4, rtol=0)
    np.testing.assert_allclose(whole["score"], cut["score"], atol=1e-5)
    assert whole["recognised"] == cut["recognised"] and set(whole["recognised"]) == {0.0, 1.0}
    assert len(set(whole["score"])) == 6 and images.shape == (6, 3, 32, 32)
    generator = keyed_generator("evaluation", "dog", 1)
    x = torch.randn(1, *small.latent_shape, generator=generator)
    for t in range(6, 0, -1):
        with torch.no_grad():
            mu, sigma = small.policy(x, t, ["dog"])
        x = mu + sigma * torch.randn(small.latent_shape, generator=generator)
    torch.testing.assert_close(images[4], small.decode(x)[0], atol=1e-4, rtol=0)
    assert whole["score"][4] == pytest.approx(images[4].mean().item() + 0.03, abs=1e-5)
    alone, _ = evaluate(small, reward, ["dog"], 2)
    np.testing.assert_allclose(alone["score"], whole["score"][1::3], atol=1e-5)
    assert alone["recognised"] is None
    other, _ = evaluate(small, reward, ["dog"], 2, seed=(77,))
    assert min(abs(a - b) for a, b in zip(other["score"], alone["score"])) > 1e-5


@pytest.mark.parametrize("world", [2, 7])
def test_processes_share_the_pictures(small, world):
    """Their scores add up to those of one process; each keeps the first of its own pictures."""
    reward = checked(Brightness(), "clip")
    want, images = evaluate(small, reward, PROMPTS, 2, judge)
    small.sample_batch = 2
    shares = [evaluate(small, reward, PROMPTS, 2, judge, n, world, keep=2) for n in range(world)]
    for what in ("score", "recognised"):
        parts = list(zip(*(found[what] for found, _ in shares)))
        assert [sum(part) for part in parts] == pytest.approx(want[what], abs=1e-4)
    parts = zip(*(found["score"] for found, _ in shares))
    assert all(sum(score != 0 for score in part) == 1 for part in parts)
    for n, (_, kept) in enumerate(shares):
        torch.testing.assert_close(kept, images[n::world][:2], atol=1e-4, rtol=0) if n < 6 else None
    assert len(shares[-1][1]) == (0 if world == 7 else 2)


def test_offload_moves_the_others_around_the_unets_work(small, monkeypatch):
    """Away before it, back before decoding; prompts are encoded first."""
    did, real = [], type(small).embed
    move = lambda self, reward, device: did.append(str(device))
    monkeypatch.setattr(type(small), "move_others", move)
    embed = lambda self, prompts: did.append("embed") or real(self, prompts)
    monkeypatch.setattr(type(small), "embed", embed)
    decode = type(small).decode
    draw = lambda self, x: did.append("decode") or decode(self, x)
    monkeypatch.setattr(type(small), "decode", draw)
    evaluate(small, checked(Brightness(), "clip"), PROMPTS, 1, offload=True)
    assert did[:2] == ["embed", "cpu"] and did[-2:] == ["cpu", "decode"]
    assert set(did[2:-2]) == {"embed"}
    did.clear()
    evaluate(small, checked(Brightness(), "clip"), PROMPTS, 1)
    assert "cpu" not in did


needs_judge = pytest.mark.skipif(
    not (ROOT / "tiny/judge").exists(), reason="the tiny model is not built"
)


@needs_judge
def test_the_judge_is_for_the_tiny_models_own_prompts():
    candidates = ["a cat washing dishes", "a dog washing dishes", "a cat riding a bike"]
    tiny = SimpleNamespace(tiny=ROOT / "tiny")
    judged = evaluation.load_judge(tiny, candidates)(torch.rand(3, 3, 64, 64), candidates)
    assert judged.shape == (3,) and judged.dtype == torch.bool
    assert evaluation.load_judge(tiny, [*candidates, "a portrait of my aunt"]) is None
    assert evaluation.load_judge(SimpleNamespace(tiny=None), candidates) is None


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


@pytest.fixture
def run(model, random_folder, tmp_path):
    """A finished run of the random pipeline with T 4, guidance 2, and its LoRA in `model`.

    Its checkpoint is damaged: a finished run needs none.
    """
    inject_lora(model.unet, 2)
    randomise_lora(model.unet, 0.5)
    folder = write_run(tmp_path / "run", model=str(random_folder), T=4, guidance=2.0)
    write_safetensors(tmp_path / "run/pytorch_lora_weights.safetensors", lora_state(model.unet))
    (tmp_path / "run/checkpoint.safetensors").write_bytes(b"cut")
    return folder


def test_main_scores_base_and_lora_on_the_same_noise(no_clip, run, model, tmp_path, capsys):
    out = tmp_path / "out"
    argv = ["--lora", run, "--prompt", "cat", "--prompt", "goose", "--images", 3, "--device", "cpu"]
    run_main(*argv, "--metrics", "clip,is,jpeg", "--out", out)
    data = json.loads((out / "scores.json").read_text())
    base, lora = data["results"]["base"], data["results"][run]
    columns = ["CLIPScore", "jpeg", "inception score", "inception score, left out", "n", "scores"]
    assert list(base) == columns and base["n"] == 6
    assert base["CLIPScore"][0] == pytest.approx(np.mean(base["scores"]["clip"]))
    assert base["CLIPScore"][1] == pytest.approx(np.std(base["scores"]["clip"], ddof=1) / 6**0.5)
    assert base["scores"]["jpeg"] == base["scores"]["clip"]  # brightness twice, the same pairs
    model.schedule, model.guidance = make_schedule(model.pipe.scheduler, 4), 2.0  # the run's
    expected, images = evaluate(model, Brightness(), ["cat", "goose"], 3)
    np.testing.assert_allclose(lora["scores"]["clip"], expected["score"], atol=1e-5)
    assert lora["scores"]["clip"] != base["scores"]["clip"]
    features = Brightness().embed_images(images)
    assert lora["inception score"][0] == pytest.approx(inception_score(features), rel=1e-4)
    error = jackknife_error(inception_left_out(features).tolist())
    assert lora["inception score"][1] == pytest.approx(error, rel=1e-3)
    table = capsys.readouterr().out
    assert "| model | CLIPScore | jpeg | inception score |\n|---|---|---|---|\n" in table
    assert f"| {run} | {lora['CLIPScore'][0]:.4f} +- {lora['CLIPScore'][1]:.4f} | " in table
    grid = Image.open(out / "grid.png")
    assert grid.size == (3 * 132 + 4, 4 * 132 + 4)  # 2 prompts x 2 models
    for p, row in ((0, 1), (1, 3)):  # by the LoRA, below the base: number 1 of each prompt
        pixel = images[2 * 1 + p, :, 16, 16]
        shown = grid.getpixel((132 + 4 + 66, row * 132 + 4 + 66))
        assert shown == pytest.approx((255 * pixel).tolist(), abs=2)
    out = tmp_path / "other"
    argv = ["--lora", run, "--no-base", "--prompt", "cat", "--images", 1, "--device", "cpu"]
    run_main(*argv, "--out", out)
    assert list(json.loads((out / "scores.json").read_text())["results"]) == [run]


def test_a_seed_draws_other_pictures_of_a_prompt(no_clip, random_folder, tmp_path):
    """And the same seed the same; without one they are those of training's own evaluation."""
    argv = ["--model", random_folder, "--T", 2, "--device", "cpu", "--prompt", "cat", "--images", 2]

    def scored(name, *seed):
        run_main(*argv, *seed, "--out", tmp_path / name)
        data = json.loads((tmp_path / name / "scores.json").read_text())
        return data["results"]["base"]["scores"]["clip"]

    plain, seeds = scored("a"), [scored(str(n), "--seed", n) for n in (0, 77, 2**70)]
    assert scored("b") == plain and scored("c", "--seed", 77) == seeds[1]
    assert len({tuple(s) for s in (plain, *seeds)}) == 4


def test_the_unseen_list_from_the_command_line(no_clip, random_folder, tmp_path, monkeypatch):
    """Its folder is a new one each time, named and numbered where none is given.

    The grid has one picture of each prompt, the first.
    """
    prompts = tmp_path / "p.txt"
    prompts.write_text("[train]\ncat\ndog\n[unseen]\nbird\n")
    monkeypatch.chdir(tmp_path)
    argv = ["--model", random_folder, "--device", "cpu", "--prompts", prompts, "--batch", 16]
    argv += ["--T", 2]
    run_main(*argv, "--split", "unseen", "--images", 1)
    run_main(*argv, "--split", "train")
    one, two = (json.loads((tmp_path / f"runs/eval-{n}/scores.json").read_text()) for n in (1, 2))
    assert one["results"]["base"]["n"] == 1 and two["results"]["base"]["n"] == 4
    assert one["settings"]["T"] == 2 and one["settings"]["sample_batch"] == 16
    run_main(*argv, "--images", 1)
    grids = [Image.open(tmp_path / f"runs/eval-{n}/grid.png") for n in (2, 3)]
    assert grids[0].size == (2 * 132 + 4, 132 + 4)
    assert np.abs(np.subtract(*(np.asarray(grid, float) for grid in grids))).max() <= 2


@needs_judge
def test_the_tiny_model_has_its_judge_and_its_styles(tmp_path, capsys):
    argv = ["--model", "tiny", "--prompt", "a cat washing dishes", "--images", 2, "--T", 2]
    run_main(*argv, "--device", "cpu", "--metrics", "clip", "--out", tmp_path / "out")
    row = json.loads((tmp_path / "out/scores.json").read_text())["results"]["base"]
    assert row["recognised"][0] in (0, 0.5, 1) and len(row["scores"]["recognised"]) == 2
    assert 0 <= row["style entropy"] <= 1.0987 and sum(row["styles"].values()) == pytest.approx(1)
    assert "| CLIPScore | recognised | style entropy |" in capsys.readouterr().out


def test_defaults_are_the_runs_else_train_pys(tmp_path, monkeypatch):
    import train

    monkeypatch.chdir(tmp_path)
    sd = {name: value for name, _, value, *_ in train.SETTINGS}
    args = evaluation.parse_args(["--model", "somewhere", "--device", "cpu"])
    assert all(getattr(args, n) == sd[n] for n in ("T", "eta", "guidance"))
    assert (args.metrics, args.sample_batch, args.images, args.seed) == (["clip"], 8, 2, ())
    more = dict(T=7, eta=0.5, guidance=0, image_size=64, prediction_type="v_prediction")
    run = write_run(tmp_path / "run", **more, reward="jpeg")
    args = evaluation.parse_args(["--lora", run, "--device", "cpu", "--prompt", "cat"])
    assert (args.model, args.metrics, args.images) == ("somewhere", ["jpeg"], 8)
    assert {name: getattr(args, name) for name in more} == more
    argv = ["--lora", run, "--T", "9", "--metrics", "clip, is", "--image-size", "32"]
    args = evaluation.parse_args([*argv, "--device", "cpu", "--model", "tiny"])
    assert (args.T, args.guidance, args.image_size) == (9, 0, 32)
    assert args.metrics == ["clip", "is"] and args.sample_batch == args.decode_batch == 64


# ---------------------------------------------------------------- bad input


def fails(capsys, *argv):
    """The error line of `eval.py argv`: one line, exit code 2."""
    return refused(capsys, argv, main=evaluation.main)


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--prompt", " "], "--prompt is empty"),
        (["--images", "0"], "--images must be 1 or more"),
        (["--images", 10**30], "--images must be 1 or more, and below a million"),
        (["--batch", "-1"], "--batch must be 1 or more"),
        (["--T", "0"], "--T must be 1 or more"),
        (["--T", "1000"], "--T must be at most 999"),
        (["--T", "2.5"], "--T"),
        (["--threads", "0"], "--threads"),
        (["--image-size", "0"], "--image-size"),
        (["--eta", "0"], "--eta must be above 0"),
        (["--eta", "1.5"], "--eta must be above 0 and at most 1"),
        (["--eta", "nan"], "--eta"),
        (["--guidance", "-1"], "--guidance must be 0 or more"),
        (["--guidance", "nan"], "--guidance"),
        (["--guidance", "inf"], "--guidance"),
        (["--seed", "x"], "--seed"),
        (["--metrics", "clip,foo"], "unknown --reward foo"),
        (["--metrics", ","], "--metrics is empty"),
        (["--no-base"], "without --lora"),
        (["--flag"], "--flag"),
        (["--device", "nowhere"], "--device nowhere is not there"),
        (["--template", "4"], "--template"),
        (["--lora", "nowhere"], "give a run folder or a .safetensors file"),
        (["--lora", "x" * 300], "give a run folder or a .safetensors file"),
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


def test_results_are_not_overwritten(light, capsys, tmp_path):  # noqa: F811
    (tmp_path / "scores.json").write_text("{}")
    assert "holds results" in fails(capsys, "--device", "cpu", "--out", tmp_path)


@pytest.mark.parametrize(
    "config, words",
    [
        ("{cut", "config.json is damaged"),
        ("[]", "holds no run"),
        ("null", "holds no run"),
        ({"model": None}, "holds no run"),
        ({"model": 3}, "model can not be 3"),
        ({"model": ["a"]}, "model can not be ['a']"),
        ({"T": "many"}, "--T"),
        ({"T": "20"}, "T can not be '20'"),
        ({"T": 0}, "--T must be 1 or more"),
        ({"T": 5000}, "--T must be"),
        ({"T": True}, "--T"),
        ({"eta": "x"}, "--eta"),
        ({"eta": 7}, "--eta must be above 0 and at most 1"),
        ({"guidance": [5.0]}, "guidance can not be [5.0]"),
        ({"guidance": math.nan}, "guidance can not be nan"),
        ({"image_size": "big"}, "--image-size"),
        ({"prediction_type": "sample"}, "--prediction-type"),
        ({"reward": "beauty"}, "unknown --reward beauty"),
        ({"reward": {"clip": 1}}, "metrics can not be {'clip': 1}"),
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
    assert "differ in image_size, 64 and None: choose by --image-size" in fails(
        capsys, "--lora", a, e
    )
    args = evaluation.parse_args(["--lora", a, c, "--T", "5", "--device", "cpu"])
    assert (args.T, args.model) == (5, "a")


Q = "unet.mid.attn.to_q.lora_A.weight"


@pytest.mark.parametrize(
    "tensors, header, words",
    [
        (None, None, "no LoRA at"),
        ({}, None, "holds no LoRA"),
        ({"weight": torch.zeros(2)}, None, "holds no LoRA"),
        ({"lora_unet_mid.lora_down.weight": torch.zeros(2, 2)}, None, "holds no LoRA"),
        ({Q: torch.zeros(4)}, None, f"{Q}, of shape (4,), is no weight of a LoRA"),
        ({Q: torch.zeros(())}, None, "of shape (), is no weight of a LoRA"),
        ({Q: torch.zeros(0, 8)}, None, "of shape (0, 8), is no weight of a LoRA"),
        ({Q: torch.full((2, 2), math.nan)}, None, "not finite"),
        ({Q: torch.full((2, 2), math.inf)}, None, "not finite"),
        ({Q: torch.zeros(2, 2)}, {"run": "{cut"}, "no LoRA at"),
        ({Q: torch.zeros(2, 2)}, {"run": "[]"}, "its header is that of no run"),
        (
            {Q: torch.zeros(2, 2)},
            {"lora_adapter_metadata": '{"unet.r": 4, "unet.lora_alpha": 8}'},
            "is scaled by alpha / rank",
        ),
    ],
)
def test_foreign_lora_files(light, capsys, tmp_path, tensors, header, words):  # noqa: F811
    """One line before anything heavy is loaded."""
    path = tmp_path / "other.safetensors"
    path.write_bytes(b"no tensors") if tensors is None else save_file(tensors, path, header)
    assert words in fails(capsys, "--lora", path, "--device", "cpu")


def test_folders_that_are_no_run_end_with_one_line(light, capsys, tmp_path):  # noqa: F811
    (tmp_path / "folder").mkdir()
    assert "no LoRA at" in fails(capsys, "--lora", tmp_path / "folder", "--device", "cpu")
    write_run(tmp_path / "cut")
    wanted = "has no finished round yet: python train.py --resume"
    assert wanted in fails(capsys, "--lora", tmp_path / "cut", "--device", "cpu")
    (tmp_path / "cut/checkpoint.safetensors").write_bytes(b"cut")
    assert "no LoRA at" in fails(capsys, "--lora", tmp_path / "cut", "--device", "cpu")


def test_an_unfinished_run_is_scored_by_its_checkpoint(no_clip, run, tmp_path, capsys):
    """With the weights and without the optimizer's tensors beside them."""
    argv = ["--no-base", "--prompt", "cat", "--images", 2, "--device", "cpu", "--lora"]
    run_main(*argv, run, "--out", tmp_path / "a")
    cut = tmp_path / "cut"
    shutil.copytree(run, cut)
    lora = cut / "pytorch_lora_weights.safetensors"
    state, _ = evaluation.read_safetensors(lora)
    lora.unlink()
    moments = {f"exp_avg:{name}": 2 * value for name, value in state.items()}
    write_safetensors(cut / "checkpoint.safetensors", state | moments, {"rounds_done": 3})
    capsys.readouterr()
    run_main(*argv, cut, "--out", tmp_path / "b")
    assert f"{cut} is not finished: its LoRA after round 3" in capsys.readouterr().out
    one, two = (json.loads((tmp_path / n / "scores.json").read_text())["results"] for n in "ab")
    assert one[run]["scores"] == two[str(cut)]["scores"]


def test_a_lora_of_another_model_ends_with_one_line(no_clip, random_folder, capsys, tmp_path):
    state = {Q: torch.zeros(4, 8), Q.replace("_A", "_B"): torch.zeros(8, 4)}
    write_safetensors(tmp_path / "other.safetensors", state)
    argv = ["--lora", tmp_path / "other.safetensors", "--model", random_folder, "--no-base"]
    error = fails(capsys, *argv, "--prompt", "cat", "--device", "cpu", "--out", tmp_path / "out")
    assert "other.safetensors: this LoRA is of another model" in error


def test_a_reward_that_fails_ends_with_one_line(random_folder, capsys, tmp_path):
    (tmp_path / "bad.py").write_text("def score(images, prompts):\n    return images\n")
    argv = ["--metrics", f"{tmp_path}/bad.py:score", "--model", random_folder, "--T", 2]
    argv += ["--prompt", "cat", "--images", 1, "--device", "cpu", "--out", tmp_path / "out"]
    error = fails(capsys, *argv)
    assert "bad.py:score returned a Tensor" in error and "(1, 3, 32, 32)" in error


def test_a_full_disk_and_ctrl_c_end_with_one_line(light, monkeypatch, capsys):  # noqa: F811
    def stopped(problem):
        def stop(*_):
            raise problem

        monkeypatch.setattr(evaluation, "load_model", stop)
        with pytest.raises(SystemExit) as end:
            run_main("--model", "none", "--prompt", "cat", "--device", "cpu", "--out", "out")
        return end.value.code, capsys.readouterr().err

    code, said = stopped(OSError(28, "No space left on device"))
    assert (code, said) == (2, "error: cannot write to out: No space left on device\n")
    assert stopped(KeyboardInterrupt()) == (130, "")
