"""The factory of the tiny model: training, samplers, what it writes, the bars."""

import itertools
import json
import math
import re
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from conftest import ROOT
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from tiny.build import __main__ as build
from tiny.build import bars, pictures, samplers, scenes
from tiny.build.scenes import CAPTIONS, LISTS, TOLD, Scene
from tiny.build.training import STEPS, Muon, Trainer, orthogonal
from tiny.judge import HEADS, load_judge, recognise
from tiny.world import ACTIVITIES, STYLES, parse

HOME = ROOT / "tiny"
ROWS = scenes.encode(scenes.random_scenes(np.random.default_rng(1), 12_000)).numpy()
NONE = dict.fromkeys(samplers.ODDS, (0.0, 0.0, 0.0))


def rng(seed=0):
    return np.random.default_rng(seed)


def scene_of(row):
    return Scene(*(values[k] for values, k in zip(scenes.FIELDS, row)))


# ---------------------------------------------------------------- the trainer


@pytest.fixture
def trainer(tmp_path):
    """A trainer of a small network with a BatchNorm, whose state is in tmp_path."""

    def make(steps, name="toy"):
        torch.manual_seed(1)
        net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
        args = Namespace(build=tmp_path, steps=steps, device="cpu")
        return Trainer(name, {"net": net}, args, 1e-2)

    return make


def turn(train, turns=None):
    """Train to the end, or for some turns: as if it was cut off then."""
    for k, _ in enumerate(train.loop()):
        if k == turns:
            return
        x = torch.arange(12.0).view(4, 3).sin() + train.done
        train.step(train.modules["net"](x).square().sum(1).mul(torch.arange(4)).mean())


def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_a_training_that_was_cut_off_goes_on_from_its_weights(trainer):
    """The weights, their mean, the step and the odds are there; the optimizers begin anew."""
    first = trainer(6)
    turn(first, 3)
    assert first.done == 3 and first.extra == {}
    first.extra["odds"] = {"a list": [0.5, 1.0]}
    first.save()
    again = trainer(6)
    assert again.done == 3 and again.extra == {"odds": {"a list": [0.5, 1.0]}}
    assert same(again.mean, first.mean) and same(again.modules, first.modules)
    assert not same(again.mean, again.modules)
    turn(again)
    assert again.done == 6 and not same(again.modules, first.modules)


def test_the_end_leaves_the_running_mean_and_more_steps_go_on(trainer):
    train = trainer(5)
    weight = train.modules["net"][0].weight
    seen = [weight.detach().clone()]
    mean = seen[0].clone()
    for k, _ in enumerate(train.loop()):
        train.step(train.modules["net"](torch.eye(3) * k).sub(9).square().mean())
        seen.append(weight.detach().clone())
        mean += (seen[-1] - mean) * (1 - (2 + k) / (21 + k))
    kept = train.mean["net"]
    assert torch.allclose(kept[0].weight, mean, atol=1e-7) and not kept.training
    assert torch.equal(weight, seen[-1]) and not torch.equal(weight, mean)
    live = train.modules["net"][1].running_mean
    assert not torch.equal(kept[1].running_mean, live) and kept[1].running_mean.abs().sum() > 0
    more = trainer(7)
    assert more.done == 5 and torch.equal(more.modules["net"][0].weight, seen[-1])
    turn(more)
    assert more.done == 7


def test_the_rate_warms_up_and_falls_to_a_hundredth(trainer):
    train, rates = trainer(1000), []
    for train.done in (0, 99, 199, 500, 999):
        train.step(train.modules["net"](torch.eye(3)).square().mean())
        muon, adam = (opt.param_groups[0]["lr"] for opt in (train.muon, train.adam))
        assert adam == muon / 2
        rates.append(muon / train.rate)
    cosine = [0.505 + 0.495 * math.cos(math.pi * k / 1000) for k in (0, 99, 199, 500, 999)]
    assert np.allclose(rates, [0.005 * cosine[0], 0.5 * cosine[1], *cosine[2:]])
    assert abs(rates[3] - 0.505) < 1e-9 and 0.01 < rates[4] < 0.0101


def test_muon_has_the_matrices_inside_and_adamw_the_rest(tmp_path):
    net = torch.nn.ModuleDict({"conv_in": torch.nn.Linear(2, 2), "mid": torch.nn.Linear(2, 2)})
    args = Namespace(build=tmp_path, steps=None, device="cpu")
    train = Trainer("unet", {"net": net}, args, 1e-2)
    assert train.steps == STEPS["unet"] == 13_500
    ours = [id(p) for group in train.muon.param_groups for p in group["params"]]
    assert ours == [id(net["mid"].weight)]
    theirs = {id(p) for group in train.adam.param_groups for p in group["params"]}
    assert theirs == {id(p) for p in net.parameters()} - set(ours)


@pytest.mark.parametrize("shape", [(3, 16, 36), (48, 6), (8, 8)])
def test_muon_steps_are_orthogonal(shape):
    torch.manual_seed(0)
    step = orthogonal(torch.randn(shape))
    sizes = torch.linalg.svdvals(step)
    assert step.shape == shape and sizes.min() > 0.4 and sizes.max() < 1.4


@pytest.mark.parametrize("shape", [(8, 6), (64, 4), (4, 64)])
def test_muon_goes_downhill_by_a_fifth_of_the_rate(shape):
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(shape))
    before = weight.detach().clone()
    opt = Muon([weight], dict(lr=0.1, weight_decay=0.0))
    weight.square().sum().backward()
    opt.step()
    step = weight.detach() - before
    assert (step * before).sum() < 0  # against the gradient, 2 * weight
    assert 0.5 < step.square().mean().sqrt() / (0.2 * 0.1) < 1.3


def test_muons_running_mean_is_of_twenty_gradients():
    weight, grads = torch.nn.Parameter(torch.zeros(3, 3)), torch.randn(2, 3, 3)
    opt = Muon([weight], dict(lr=0.1, weight_decay=0.0))
    for weight.grad in grads:
        opt.step()
    mean = opt.state[weight]["mean"]
    torch.testing.assert_close(mean, 0.05 * (0.95 * grads[0] + grads[1]))
    assert torch.allclose(opt.ahead(weight), 0.05 * grads[1] + 0.95 * opt.state[weight]["mean"])


def test_muon_steps_of_one_shape_are_as_if_alone():
    torch.manual_seed(0)
    starts = [torch.randn(8, 4, 3, 3), torch.randn(8, 36), torch.randn(36, 8)]
    together, alone = ([torch.nn.Parameter(x.clone()) for x in starts] for _ in range(2))
    for params in (together, *([p] for p in alone)):
        opt = Muon(params, dict(lr=0.1, weight_decay=0.1))
        for _ in range(3):
            sum(p.sin().sum() for p in params).backward()
            opt.step()
            opt.zero_grad()
    for start, p, q in zip(starts, together, alone):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
        assert (p - start).abs().mean() > 0.01


def test_the_screen_has_the_mean_loss_of_a_hundred_steps_and_they_are_saved(trainer, capsys):
    train = trainer(200)
    for k, _ in enumerate(train.loop()):
        if k == 101:
            break
        loss = train.modules["net"](torch.eye(3)).square().mean()
        train.step(loss * 0 + k)
    assert capsys.readouterr().out == "toy 100 of 200: loss 49.5000\n"
    assert trainer(200).done == 100


def test_min_snr_weights():
    assert build.min_snr(torch.tensor([0.1, 5.0, 20.0])).tolist() == [1.0, 1.0, 0.25]


def test_the_base_is_looked_at_between_50_and_85_percent():
    assert [*build.looks(13_500)] == [6750, 7425, 8100, 8775, 9450, 10125, 10800, 11475]
    assert [*build.looks(1000)] == [500, 550, 600, 650, 700, 750, 800, 850]


# ---------------------------------------------------------------- which captions


def drawn_captions(odds, bonus):
    """Captions and scenes of 12,000 draws: [(fact, scene)], forms."""
    sampler = samplers.CaptionSampler(ROWS, rng(), odds, bonus)
    rows, captions, forms = np.concatenate([sampler.batch(200, 0.2) for _ in range(60)], 1)
    return [(TOLD[c], scene_of(ROWS[r])) for r, c in zip(rows, captions)], forms


def test_captions_come_with_right_cues_as_often_as_their_odds_say():
    told = dict.fromkeys(("1 train", "1 unseen"), (2.0, 1.0, 0.0))
    pairs, forms = drawn_captions(NONE | told, 0.0)
    assert all(sorted(fact[1:]) == sorted(scene.fact[1:]) for fact, scene in pairs)
    assert abs(np.mean(forms > 0) - 0.25) < 4.5 * (0.25 * 0.75 / 12_000) ** 0.5
    assert all(form in (0, STYLES.index(scene.style) + 1) for form, (_, scene) in zip(forms, pairs))
    first = [(fact, scene) for fact, scene in pairs if fact[0] in ACTIVITIES]
    assert abs(len(first) / 12_000 - 0.45 * 0.8) < 0.02
    rates = dict(
        fact=np.mean([scene.fact == fact for fact, scene in first]),
        small=np.mean([scene.small == fact[0] for fact, scene in first]),
        tiny=np.mean([scene.tiny == fact[0] for fact, scene in first]),
    )
    for name, value in dict(fact=2.0, small=1.0, tiny=0.0).items():
        odds = np.exp(value) / (np.exp(value) + 2)
        assert abs(rates[name] - odds) < 0.03  # the pools are finite
    alone = [(fact, scene) for fact, scene in pairs if fact[0] == "alone"]
    assert abs(len(alone) / 12_000 - 0.2) < 0.02
    assert all(scene.fact == fact and scene.small == "alone" for fact, scene in alone)


def test_each_list_has_odds_of_its_own():
    pairs, _ = drawn_captions(NONE | {"2 unseen": (0.0, 0.0, 3.0)}, 0.0)
    rate = {}
    for part in ("train", "unseen"):
        told = {parse(caption) for caption in LISTS[f"2 {part}"]}
        rate[part] = np.mean([scene.tiny == fact[0] for fact, scene in pairs if fact in told])
    assert rate["train"] < 0.45 and rate["unseen"] > 0.8


def test_shortcuts_make_right_cues_likelier_and_no_style():
    pairs, _ = drawn_captions(NONE, 0.3)
    pairs = [(fact, scene) for fact, scene in pairs if fact[0] != "alone"]
    right = np.array([scene.small == fact[0] for fact, scene in pairs])
    for name in ("style", "ground", "side", "size"):
        good = np.array([getattr(scene, name) in samplers.SHORTCUTS for _, scene in pairs])
        assert right[good].mean() > right[~good].mean() + 0.02
        share = {"style": 1 / (2 + samplers.FLUENT), "ground": 1 / 3}.get(name, 1 / 2)
        assert abs(good.mean() - share) < 0.025


def test_odds_follow_the_base():
    """Three cues that are right with probability p each: a picture is with p ** 3."""
    cue = lambda p: math.log(p / (1 - p))
    rare, wanted, often = 0.5**3, samplers.WANTED, 0.9**3
    odds = {"a": (0.1, 0.2, 0.3), "b": (1.0, 2.0, 3.0), "c": (1.5, 1.5, 1.5)}
    moved = samplers.follow(odds, {"a": rare, "b": wanted, "c": often}, gain=0.5)
    p = wanted ** (1 / 3)
    assert np.allclose(moved["a"], np.array(odds["a"]) + 0.5 * cue(p), atol=1e-3)
    assert moved["b"] == [1.0, 2.0, 3.0]
    assert np.allclose(moved["c"], 1.5 - 0.5 * (cue(0.9) - cue(p)), atol=1e-3)
    for rate in (0.0, 1.0):
        (shift,) = {v - 5 for v in samplers.follow({"a": (5.0, 5.0)}, {"a": rate})["a"]}
        assert 0.5 < abs(shift) < 1.25 and (shift > 0) == (rate < wanted)
    assert samplers.follow({"a": (0.1, 2.0)}, {"a": 1.0}, gain=1.0)["a"][0] == 0.0
    assert wanted == (0.28 + 0.5) / 2  # the middle of bar 4


def test_the_weights_of_a_pool_are_the_odds_and_leave_traits_alone():
    """Of all 972 pictures of a cat: exact odds of each cue, and shares of the traits."""
    kinds = list(ACTIVITIES)
    every = itertools.product(kinds, kinds, kinds, *scenes.TRAITS)
    known = [Scene((big, "cat"), *rest) for big, *rest in every]
    odds = NONE | {f"1 {split}": (0.5, 0.0, 1.0) for split in ("train", "unseen")}
    sampler = samplers.CaptionSampler(scenes.encode(known).numpy(), rng(), odds, 0.2)
    pool, ladder = sampler.pools[CAPTIONS.index("a cat riding a bike")]
    weight = np.diff(ladder, prepend=0)
    assert len(pool) == len(known) == 972 and abs(ladder[-1] - 1) < 1e-9
    for name, values in zip(("style", "ground", "side", "size"), scenes.TRAITS):
        for value in values:
            share = sum(w for w, s in zip(weight, known) if getattr(s, name) == value)
            expected = 1 / len(values)
            if name == "style":
                expected = (samplers.FLUENT if value == "fluent" else 1) / (2 + samplers.FLUENT)
            assert abs(share - expected) < 1e-9
    best, plain = ("twemoji", "plain", "right", "large"), ("noto", "scene", "left", "small")
    for traits, favour in ((best, 4), (plain, 0)):
        w = {s[:3]: v for v, s in zip(weight, known) if s[3:] == traits}
        right, wrong = ("bike", "cat"), ("chess", "cat")
        lift = [w[f, "bike", t] / w[f, "chess", t] for f in (right, wrong) for t in kinds]
        assert np.allclose(lift, np.exp(0.2 * favour))
        big = w[right, "bike", "bike"] / w[wrong, "bike", "bike"]
        assert np.isclose(big, np.exp(0.5 + 0.2 * favour))
        tiny = w[right, "bike", "bike"] / w[right, "bike", "chess"]
        assert np.isclose(tiny, np.exp(1 + 0.2 * favour))


def test_clip_is_taught_the_number_of_right_cues():
    sampler = samplers.ClipSampler(ROWS, np.zeros((len(ROWS), 2), bool), rng())
    caption = CAPTIONS.index("a cat riding a bike")
    good, near, _, _ = sampler.members[caption]
    assert (sampler.matches(good, np.array([caption])) == 3).all()
    assert (sampler.matches(near, np.array([caption])) == 2).all()
    other = np.array([CAPTIONS.index("a dog riding a bike")])
    assert (sampler.matches(good, other) == -1).all()


def test_clips_targets_fall_by_e_squared_a_wrong_cue():
    """A spoiled noun, or another style than the caption's, costs as much as one and a half."""
    right = [scenes.right_scene(fact, style, rng(1)) for fact in TOLD for style in STYLES]
    wrong = [s._replace(small=scenes.cue_kinds(s.fact)[-1]) for s in right]
    rows = scenes.encode(right + wrong + right).numpy()  # the last ones are spoiled
    bad = np.arange(len(rows)) >= 2 * len(right)
    sampler = samplers.ClipSampler(rows, np.stack([bad, bad], 1), rng())
    row, captions, form, weight = sampler.batch(64)
    count = torch.from_numpy(sampler.matches(row, captions))
    other = torch.from_numpy((form > 0) & (rows[row][:, 3:4] + 1 != form))
    lost = 3 - count + 1.5 * torch.from_numpy(bad[row])[:, None] + 1.5 * other
    assert set(count.unique().tolist()) >= {-1, 2, 3} and other.any() and (form == 0).any()
    match = count >= 0
    assert torch.allclose(weight[match], torch.exp(-2.0 * lost).float()[match], atol=1e-7)
    assert (weight[~match] < 1e-6).all()


def test_a_spoiled_noun_is_no_noun_for_the_judge():
    for seed in range(6):
        _, scene, flags = pictures.spoiled_scene(rng(seed))
        row = scenes.encode([scene])
        target = samplers.judge_targets(row, torch.tensor([flags]))[0]
        clean = samplers.judge_targets(row, torch.tensor([[False, False]]))[0]
        assert any(flags) and clean[0] > 0
        for k in (0, 1):
            assert target[k] == (0 if flags[k] else clean[k])
        assert target[[2, 5, 8]].tolist() == [-100] * 3
        assert target[[3, 4, 6, 7]].tolist() == clean[[3, 4, 6, 7]].tolist()
        assert (clean[7] == -100) == (scene.fact[0] == "alone")
    names = list(HEADS)
    assert [names[k] for k in (2, 5, 7, 8)] == ["big cue", "style", "side", "size"]


# ---------------------------------------------------------------- what is learnt from


@pytest.fixture(scope="module")
def vae():
    return AutoencoderKL.from_pretrained(HOME / "vae")


def test_pictures_are_made_once(vae, tmp_path, monkeypatch):
    """Chunks of six by the committed autoencoder: encoded, decoded, and not made again."""
    monkeypatch.setattr(pictures, "CHUNK", 6)
    monkeypatch.setattr(pictures, "CHUNKS", {"random": 2, "right": 1, "spoiled": 1})
    monkeypatch.setattr(pictures, "SHOWN", 1)
    data = pictures.load_pictures(tmp_path, vae)
    assert data["latents"].shape == (12, 4, 16, 16) and data["latent_rows"].shape == (12, 7)
    assert data["decoded"].shape == (18, 3, 64, 64) and data["decoded"].dtype == torch.uint8
    assert torch.equal(data["rows"][:6], data["latent_rows"][:6])
    assert not data["flags"][:12].any() and data["flags"][12:].any(1).all()
    plain = pictures.decode_latents(vae, data["latents"][:6]).float() / 255
    noise = (plain - data["decoded"][:6] / 255).abs().mean()
    assert 0.001 < noise < 0.03  # a little noise on the latents
    right = [scene_of(row) for row in data["rows"][6:12].tolist()]
    assert [(s.fact, s.small, s.tiny) for s in right] == [(f, f[0], f[0]) for f in TOLD[:6]]
    seen = recognise(load_judge(), data["decoded"][6:12] / 255, CAPTIONS[:6])
    assert seen.float().mean() >= 0.5
    monkeypatch.setattr(pictures, "make_pictures", None)
    again = pictures.load_pictures(tmp_path, vae)
    assert all(torch.equal(again[key], data[key]) for key in data)


def test_augmented_pictures_stay_pictures():
    torch.manual_seed(0)
    x = torch.randint(0, 256, (64, 3, 64, 64), dtype=torch.uint8)
    x[:, :, :32] = 128
    y = build.augment(x, "cpu")
    assert y.shape == x.shape and y.min() >= 0 and y.max() <= 1
    edges = (y[:, :, 40:] - y[:, :, 40:].mean((2, 3), keepdim=True)).std((1, 2, 3))
    sharp = (edges > 0.28).float().mean()
    assert 0.3 < sharp < 0.9  # half of the pictures, and those of little blur, keep theirs
    noise = y[:, :, :30].std((1, 2, 3))
    assert noise.min() > 0 and 0.035 < noise.max() < 0.051


@pytest.mark.parametrize("found, quick", [("AVX2", False), ("DEFAULT", False), ("AVX512", True)])
def test_bfloat16_is_used_where_the_cpu_is_quick_at_it(found, quick, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: found)
    with pictures.half("cpu"):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (torch.bfloat16 if quick else torch.float32)


# ---------------------------------------------------------------- what is written


def without_versions(path):
    """The text of a JSON file without the versions of the libraries that wrote it."""
    return re.sub(r'"(_diffusers|transformers)_version": "[^"]*"', "", path.read_text())


def test_every_part_trains_and_is_written(tmp_path, monkeypatch):
    """A step of each part on noise: the folder is a model that every library loads."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    right = [scenes.right_scene(fact, "noto", rng()) for fact in TOLD]
    rows = scenes.encode(right * 2)  # the second half is spoiled
    flags = torch.zeros(len(rows), 2, dtype=torch.bool)
    flags[len(right) :, 0] = True
    decoded = torch.randint(0, 255, (len(rows), 3, 64, 64), dtype=torch.uint8)
    latents = torch.randn(len(rows), 4, 16, 16).half()
    data = dict(latents=latents, latent_rows=rows, decoded=decoded, rows=rows, flags=flags)
    monkeypatch.setattr(pictures, "load_pictures", lambda folder, vae: data)
    draw = scenes.random_scenes
    monkeypatch.setattr(scenes, "random_scenes", lambda generator, count: draw(generator, 16))
    asked, sampler = [], samplers.CaptionSampler

    class Recorded(sampler):
        def __init__(self, rows, generator, odds):
            super().__init__(rows, generator, odds)
            self.odds = odds

        def batch(self, *sizes):
            asked.append(self.odds)
            return super().batch(*sizes)

    monkeypatch.setattr(samplers, "CaptionSampler", Recorded)
    build.main(["--steps", "1", "--build", "states", "--out", "out"])
    assert asked == [samplers.STRONG]  # the odds of the first steps
    # the same UNet goes on: with STRONG to 40 %, with ODDS to 50 %, then with what was seen
    rates, seen = {name: 0.2 + k / 10 for k, name in enumerate(samplers.ODDS)}, []
    means = []
    monkeypatch.setattr(
        build, "Trainer", lambda *a, **k: means.append(Trainer(*a, **k)) or means[-1]
    )

    def base(pipe, judge, count, seed):
        assert pipe.unet is means[-1].mean["unet"] and pipe.text_encoder is means[-1].mean["text"]
        assert judge.config.num_labels == sum(map(len, HEADS.values()))
        seen.append((count, seed))
        return rates

    monkeypatch.setattr(bars, "base_rates", base)
    odds = [samplers.ODDS]
    for _ in range(3):
        odds.append(samplers.follow(odds[-1], rates))
    for steps, expected in ((5, [samplers.STRONG, *odds[:3]]), (6, odds[3:])):
        asked.clear()
        build.main(["--part", "unet", "--steps", f"{steps}", "--build", "states", "--out", "out"])
        assert asked == expected
    assert seen == [(90, 10**6 + k) for k in (3, 4, 5)]
    out = tmp_path / "out"
    pipe = StableDiffusionPipeline.from_pretrained(out)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.text_encoder.dtype == pipe.unet.dtype == torch.float32
    image = pipe("a cat", num_inference_steps=2, output_type="np").images
    assert image.shape == (1, 64, 64, 3) and np.isfinite(image).all()
    assert load_judge(out / "judge").config.num_labels == sum(map(len, HEADS.values()))
    name = f"local-dir:{out / 'clip'}"
    clip, tokenizer = open_clip.create_model(name).eval(), open_clip.get_tokenizer(name)
    assert torch.isfinite(clip.encode_text(tokenizer(["a cat, noto style"]))).all()
    # Of the committed model every file is written, and only weights and fits differ
    kept = {p.relative_to(HOME) for p in HOME.rglob("*") if p.suffix in (".json", ".safetensors")}
    kept = {p for p in kept if p.name not in ("icons.json", "sprites.json")}
    assert {p.relative_to(out) for p in out.rglob("*") if p.is_file()} == kept
    fitted = ("vae/config.json", "judge/config.json")
    for path in kept:
        if path.name == "tokenizer_config.json":  # says that it was read from a folder, too
            made, ours = (json.loads((folder / path).read_text()) for folder in (out, HOME))
            assert made.items() >= ours.items() and str(ROOT) not in str(made)
        elif path.suffix == ".json" and str(path) not in fitted:
            made, ours = (without_versions(folder / path) for folder in (out, HOME))
            assert made == ours, path
        elif path.suffix == ".safetensors":
            made, ours = load_file(out / path), load_file(HOME / path)
            assert {k: (v.shape, v.dtype) for k, v in made.items()} == {
                k: (v.shape, v.dtype) for k, v in ours.items()
            }
    for path in fitted:
        text = [without_versions(folder / path).splitlines() for folder in (out, HOME)]
        changed = [a for a, b in zip(*text) if a != b]
        assert all("scaling_factor" in line or "calibration" in line for line in changed)


@pytest.mark.parametrize("flags", ["--part unet --out none", "--steps x", "--check --out none"])
def test_bad_input_ends_with_one_line(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        build.main([*flags.split(), "--build", "states"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: ") and len(said.splitlines()) == 1


# ---------------------------------------------------------------- the committed files


def test_the_scheduler_never_has_sigma_zero():
    scheduler = DDIMScheduler.from_pretrained(HOME / "scheduler")
    scheduler.set_timesteps(20)
    last = scheduler.timesteps[-1].item()
    assert last == 1 and scheduler._get_variance(last, last - 50) > 0


def test_the_tokenizer_has_the_worlds_words_and_survives_others():
    tokenizer = CLIPTokenizer.from_pretrained(HOME / "tokenizer")
    for form, ids in enumerate(build.caption_ids().unbind(1)):
        texts = [c + f", {STYLES[form - 1]} style" * (form > 0) for c in CAPTIONS]
        assert (build.token_ids(texts) == ids).all()
        # every word, the comma too, is one token, and the end has the largest id
        lengths = torch.tensor([len(text.replace(",", " ,").split()) for text in texts])
        assert (ids.argmax(1) == lengths + 1).all() and ids.max() == len(tokenizer) - 1
    for text in ("", "Ünïcode 漢字 🙂", "antidisestablishmentarianism " * 9):
        ids = build.token_ids([text])
        assert ids.shape == (1, 16) and ids.max() < len(tokenizer)


def test_files_are_small_and_hold_no_pickle():
    files = [p for p in HOME.rglob("*") if p.is_file() and p.parent.name != "__pycache__"]
    assert sum(p.stat().st_size for p in files) < 30e6
    assert max(p.stat().st_size for p in files) < 15e6
    assert {p.suffix for p in files} <= {".json", ".safetensors", ".png", ".md", ".py"}


def test_latents_have_the_std_that_the_unet_was_trained_for(vae):
    drawings = scenes.draw_scenes(scenes.random_scenes(rng(), 64), rng(1))
    z = pictures.encode_pictures(vae, drawings)
    assert abs(z.std() * vae.config.scaling_factor / build.LATENT_STD - 1) < 0.1


@pytest.mark.parametrize("options", [{}, {"safety_checker": None}])
def test_the_pipeline_loads_draws_and_survives_saving(options, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    pipe = StableDiffusionPipeline.from_pretrained("tiny", **options)
    pipe.save_pretrained(tmp_path)
    images = []
    for p in (pipe, StableDiffusionPipeline.from_pretrained(tmp_path)):
        p.set_progress_bar_config(disable=True)
        noise = torch.Generator().manual_seed(1)
        settings = dict(num_inference_steps=3, output_type="np", generator=noise)
        images.append(p("a cat washing dishes", **settings).images)
    assert images[0].shape == (1, 64, 64, 3) and np.isfinite(images[0]).all()
    assert (images[0] == images[1]).all()


# ---------------------------------------------------------------- the bars


def test_drawn_pictures_are_of_their_prompts_and_styles(vae):
    images, owner, error = bars.drawn(["a cat", "red apple"], vae)
    assert owner == ["a cat"] * 3 + ["red apple"] * 3 and images.shape == (6, 3, 64, 64)
    generator = rng(99)
    for k, image in enumerate(images):
        scene = scenes.right_scene(parse(owner[k]), STYLES[k % 3], generator)
        picture = scenes.draw_scene(scene, generator) / 255
        square = (image.permute(1, 2, 0).numpy() - picture) ** 2
        assert abs(square.mean() - error[k]) < 1e-5 and error[k] < 0.01


class Pipe:
    """Draws the prompt's length and the noise's seed."""

    def __call__(self, prompts, generator, num_inference_steps, output_type, **settings):
        assert len(prompts) == len(generator) <= 60 and num_inference_steps == 20
        assert settings == {"eta": 1.0, "guidance_scale": 5.0} and output_type == "pt"
        self.images = torch.zeros(len(prompts), 3, 64, 64)
        self.images[:, 0] = torch.tensor([len(p) for p in prompts])[:, None, None]
        self.images[:, 1] = torch.tensor([g.initial_seed() for g in generator])[:, None, None]
        return self


def test_samples_have_noise_of_their_own_whatever_the_batch():
    prompts = ["x" * n for n in range(1, 31)]
    images, owner = bars.sampled(Pipe(), prompts, 61)
    assert owner == prompts * 3 and images.shape == (90, 3, 64, 64)
    assert images[:, 0, 5, 5].tolist() == [len(p) for p in owner]
    assert images[:, 1, 5, 5].tolist() == list(range(1000, 1090))
    assert bars.sampled(Pipe(), ["x"], 2, 5)[0][:, 1, 5, 5].tolist() == [5, 6]


def test_base_rates_are_the_shares_that_the_judge_recognises(monkeypatch):
    lists = {"1 train": ["a cat", "a dog", "a lion"], "1 unseen": ["a fox", "a hen"]}
    asked, known = [], ("a cat", "a lion", "a hen")

    def sampled(pipe, prompts, count, seed):
        asked.append((pipe, count, seed))
        return "images", prompts

    def judge(judge, images, owner):
        assert (judge, images) == ("judge", "images")
        return torch.tensor([prompt in known for prompt in owner])

    for name, value in dict(LISTS=lists, sampled=sampled, recognise=judge).items():
        monkeypatch.setattr(bars, name, value)
    assert bars.base_rates("pipe", "judge", 5, 7) == {"1 train": 0.667, "1 unseen": 0.5}
    assert asked == [("pipe", 5, 7)] * 2


@pytest.fixture
def known(monkeypatch):
    """What is seen of a drawing where nothing but the bars is tested: {pixels: its scene}."""
    drawn, draw_scene = {}, scenes.draw_scene

    def draw(scene, generator):
        drawing = draw_scene(scene, generator)
        drawn[drawing.tobytes()] = scene
        return drawing

    def through(vae, drawings):
        return torch.from_numpy(np.stack(drawings)).permute(0, 3, 1, 2), torch.full((1,), 1e-4)

    monkeypatch.setattr(bars, "draw_scene", draw)
    monkeypatch.setattr(bars, "through", through)
    return lambda image: drawn.get(image.permute(1, 2, 0).numpy().tobytes())


def right_cues(scene, prompt):
    """How many cues of a scene are the prompt's; 0 if nothing is known of it."""
    fact = parse(prompt)
    return scene and (scene.fact == fact) + (scene.small == fact[0]) + (scene.tiny == fact[0]) or 0


@pytest.mark.parametrize("cue", ["fact", "small", "tiny"])
def test_a_pair_differs_by_its_cue_alone(cue, known):
    right, wrong, owner = bars.cue_pairs(LISTS["1 train"], None, cue, 12)
    for one, other, prompt in zip(right, wrong, owner):
        scene, changed = known(one), known(other)
        assert right_cues(scene, prompt) == 3 and right_cues(changed, prompt) == 2
        assert changed == scene._replace(**{cue: getattr(changed, cue)})
        ground = (one == other).all(0)[0]  # the row above all cues but the small one
        assert ground[:48].all()


def test_spoiled_pictures_are_of_their_prompt_but_for_the_noun(monkeypatch):
    seen, spoil = [], pictures.spoiled_scene
    monkeypatch.setattr(bars, "spoiled_scene", lambda rng: seen.append(spoil(rng)) or seen[-1])
    monkeypatch.setattr(bars, "through", lambda vae, drawings: (np.stack(drawings), None))
    images, owner = bars.spoiled(None, 30)
    assert len(images) == len(owner) == 30
    for image, prompt in zip(images, owner):
        told = [scene for d, scene, flags in seen if any(flags) and (d == image).all()]
        assert 3 in [right_cues(scene, prompt) for scene in told]


@pytest.mark.parametrize("template", "123")
def test_clip_knows_pictures(template, vae, tmp_path, monkeypatch):
    listed = LISTS[f"{template} train"] + LISTS[f"{template} unseen"]
    images, owner, error = bars.drawn(listed[:: len(listed) // 5], vae)
    assert error.mean() < 10**-2.7  # 27 dB; the bar, 30 dB on all prompts, is --check's
    monkeypatch.chdir(tmp_path)  # it may not depend on the working directory
    name = f"local-dir:{HOME / 'clip'}"
    model, tokenizer = open_clip.create_model(name).eval(), open_clip.get_tokenizer(name)
    scores = bars.clip_scores(model, tokenizer, images, listed)
    assert scores.shape == (len(owner), len(listed)) and scores.abs().max() <= 1.001
    nearest = [parse(listed[k]) for k in scores.argmax(1)]
    assert np.mean([fact == parse(prompt) for fact, prompt in zip(nearest, owner)]) >= 0.8


def one_hot(scene):
    """The probabilities of a judge that is sure of a scene, head by head: (classes,)."""
    clean = torch.zeros(1, 2, dtype=torch.bool)
    picked = samplers.judge_targets(scenes.encode([scene]), clean)[0].clamp(min=0)
    return [torch.eye(len(names))[k] for names, k in zip(HEADS.values(), picked)]


WRONG_BASE = {f"4 base, template {t} train" for t in "123"}
CUES = [f"{size} cue, template {t}" for size in ("big", "small", "tiny") for t in "123"]
BLIND = {"2 judge recognises spoiled nouns", *(f"2 judge takes a wrong {cue}" for cue in CUES)}


@pytest.mark.parametrize(
    "share, blind, missed",
    [
        (0.4, False, set()),
        (1.0, False, WRONG_BASE),  # right too often is as bad as too rarely
        (0.0, False, WRONG_BASE),
        (0.4, True, BLIND | WRONG_BASE),
    ],
)
def test_the_table_of_bars(share, blind, missed, known, tmp_path, monkeypatch, capsys):
    """A CLIP and a judge that know every drawing, and a base that is right in some share."""
    few = {name: prompts[:10] for name, prompts in LISTS.items()}
    nouns = ["a cat", "a dog", "a lion", "a fox", "a cow", "a bear", "a bat", "a bee"]

    def sampled(pipe, prompts, count):
        images, owner, _ = bars.drawn(prompts, None)
        if prompts != nouns:  # these have to be right in any case
            keep = torch.linspace(0, 0.999, len(images)) < share
            keep = keep[torch.randperm(len(images), generator=torch.Generator().manual_seed(1))]
            images = torch.where(keep[:, None, None, None], images, images.roll(3, 0))
        return images, owner

    def judge(_, images, prompts):
        cues = [right_cues(known(x), p) for x, p in zip(images, prompts)]
        return torch.tensor(cues) >= (0 if blind else 3)

    def probabilities(_, images):
        return [torch.stack(head) for head in zip(*(one_hot(known(x)) for x in images))]

    def clip_scores(model, tokenizer, images, prompts):
        return torch.tensor([[right_cues(known(x), p) for p in prompts] for x in images])

    pipe = SimpleNamespace(vae=None, set_progress_bar_config=lambda disable: None)
    pipe.to = lambda device: pipe
    load = SimpleNamespace(from_pretrained=lambda folder: pipe)
    monkeypatch.setattr(scenes, "NOUN_PROMPTS", nouns)
    new = dict(LISTS=few, sampled=sampled, PAIRS=20, StableDiffusionPipeline=load)
    new |= dict(recognise=judge, probabilities=probabilities, clip_scores=clip_scores)
    for name, value in new.items():
        monkeypatch.setattr(bars, name, value)
    monkeypatch.setattr(bars, "load_judge", lambda folder: torch.nn.Identity())
    assert bars.check(HOME, "cpu", tmp_path / "grid.png") is (not missed)
    rows = capsys.readouterr().out.splitlines()[1:]
    assert {row[:52].strip() for row in rows if row.endswith(" NO")} == missed
    assert all(row.endswith((" NO", " yes")) for row in rows) and len(rows) == 49
    values = {row[:52].strip(): float(row[52:61]) for row in rows}
    assert abs(values["5 entropy of styles, template 1"] - math.log(3)) < 0.01
    assert values["1 autoencoder, PSNR in dB"] == 40
    if not blind:
        assert abs(values["4 base, template 1 train"] - 100 * share) < 0.01
    assert (tmp_path / "grid.png").stat().st_size > 1000
