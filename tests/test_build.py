"""How the tiny model is built: a trainer that goes on, its data, and the files that it writes."""

import itertools
import math
import runpy
import sys
from argparse import Namespace
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from diffusers import AutoencoderKL, StableDiffusionPipeline

from tiny import build, pictures, samplers, world
from tiny.recognise import HEADS, load_judge, recognise
from tiny.sprites import STYLES
from tiny.training import Muon, Trainer, orthogonal

HOME = ROOT / "tiny"
ROWS = pictures.encode(world.random_scenes(np.random.default_rng(1), 12_000))
NONE = dict.fromkeys(samplers.ODDS, (0.0, 0.0, 0.0))


def rng(seed=0):
    return np.random.default_rng(seed)


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


def test_a_training_that_was_cut_off_goes_on_where_it_was(trainer):
    whole = trainer(6, "whole")
    turn(whole)
    cut = trainer(6)
    turn(cut, 3)
    assert cut.done == 3 and cut.extra == {}
    cut.extra["odds"] = {"a list": [0.5, 1.0]}
    cut.save()
    cut = trainer(6)
    assert cut.done == 3 and cut.extra == {"odds": {"a list": [0.5, 1.0]}}
    turn(cut)
    assert cut.done == 6
    assert cut.mean.keys() == whole.mean.keys()
    assert all(torch.equal(cut.mean[k], whole.mean[k]) for k in whole.mean)
    live, other = cut.modules.state_dict(), whole.modules.state_dict()
    assert all(torch.equal(live[k], other[k]) for k in other)


def test_the_end_leaves_the_running_mean_and_more_steps_go_on(trainer):
    train = trainer(5)
    weight = train.modules["net"][0].weight
    seen = [weight.detach().clone()]
    mean = seen[0].clone()
    for k, _ in enumerate(train.loop()):
        train.step(train.modules["net"](torch.eye(3) * k).sub(9).square().mean())
        seen.append(weight.detach().clone())
        mean += (seen[-1] - mean) * (1 - (2 + k) / (21 + k))
    assert torch.allclose(weight, mean, atol=1e-7) and not torch.equal(weight, seen[-1])
    assert not train.modules.training
    more = trainer(7)  # goes on from the last weights, not from their mean
    assert more.done == 5 and torch.equal(more.modules["net"][0].weight, seen[-1])
    turn(more)
    assert more.done == 7


def test_the_mean_can_be_tried_between_two_steps(trainer):
    train = trainer(9)
    turn(train, 5)
    live = {k: v.clone() for k, v in train.modules.state_dict().items()}
    with train.averaged():
        inside = {k: v.clone() for k, v in train.modules.state_dict().items()}
    assert all(torch.equal(inside[k], train.mean[k]) for k in train.mean)
    assert not torch.equal(inside["net.0.weight"], live["net.0.weight"])
    assert all(torch.equal(v, live[k]) for k, v in train.modules.state_dict().items())


def test_the_rate_warms_up_and_falls_to_a_hundredth(trainer):
    train, rates = trainer(1000), []
    for train.done in (0, 99, 199, 500, 999):
        train.step(train.modules["net"](torch.eye(3)).square().mean())
        muon, adam = (opt.param_groups[0]["lr"] for opt in train.opts.values())
        assert adam == muon / 2
        rates.append(muon / train.rate)
    cosine = [0.505 + 0.495 * math.cos(math.pi * k / 1000) for k in (0, 99, 199, 500, 999)]
    assert np.allclose(rates, [0.005 * cosine[0], 0.5 * cosine[1], *cosine[2:]])
    assert abs(rates[3] - 0.505) < 1e-9 and 0.01 < rates[4] < 0.0101


def test_muon_has_the_matrices_inside_and_adamw_the_rest(trainer, tmp_path):
    assert set(trainer(1).owner.values()) == {"muon", "adam"}
    net = torch.nn.ModuleDict({"conv_in": torch.nn.Linear(2, 2), "mid": torch.nn.Linear(2, 2)})
    train = Trainer("two", {"net": net}, Namespace(build=tmp_path, steps=1, device="cpu"), 1e-2)
    assert [k for k, owner in train.owner.items() if owner == "muon"] == ["net.mid.weight"]


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
    opt = Muon([weight], 0.1)
    weight.square().sum().backward()
    opt.step()
    step = weight.detach() - before
    assert (step * before).sum() < 0  # against the gradient, 2 * weight
    assert 0.5 < step.square().mean().sqrt() / (0.2 * 0.1) < 1.3


def test_muons_running_mean_is_of_twenty_gradients():
    weight, grads = torch.nn.Parameter(torch.zeros(3, 3)), torch.randn(2, 3, 3)
    opt = Muon([weight], 0.1)
    for weight.grad in grads:
        opt.step()
    mean = opt.state[weight]["exp_avg"]
    torch.testing.assert_close(mean, 0.05 * (0.95 * grads[0] + grads[1]))


def test_muon_steps_of_one_shape_are_as_if_alone():
    torch.manual_seed(0)
    starts = [torch.randn(8, 4, 3, 3), torch.randn(8, 36), torch.randn(36, 8)]
    together, alone = ([torch.nn.Parameter(x.clone()) for x in starts] for _ in range(2))
    for params in (together, *([p] for p in alone)):
        opt = Muon(params, 0.1, weight_decay=0.1)
        for _ in range(3):
            sum(p.sin().sum() for p in params).backward()
            opt.step()
            opt.zero_grad()
    for start, p, q in zip(starts, together, alone):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
        assert (p - start).abs().mean() > 0.01


def test_min_snr_weights():
    assert build.min_snr(torch.tensor([0.1, 5.0, 20.0])).tolist() == [1.0, 1.0, 0.25]


def test_the_log_has_the_mean_of_a_hundred_steps(trainer, capsys):
    train = trainer(100)
    for k, _ in enumerate(train.loop()):
        loss = train.modules["net"](torch.eye(3)).square().mean()
        train.step(loss, loss=torch.tensor(float(k)))
    line = "toy 100 of 100, 0.0 min: loss 49.5000\n"
    assert capsys.readouterr().out == line == train.path.with_suffix(".log").read_text()


# ---------------------------------------------------------------- what is learnt from


def test_a_row_tells_its_scene_again():
    scenes = world.random_scenes(rng(2), 300)
    assert [pictures.decode_row(row) for row in pictures.encode(scenes)] == scenes


def drawn_captions(odds, bonus):
    """Captions and scenes of 12,000 draws: [(fact, scene)], forms."""
    sampler = samplers.CaptionSampler(ROWS, rng(), odds, bonus)
    rows, captions, forms = np.concatenate([sampler.batch(200, 0.2) for _ in range(60)], 1)
    facts = [world.parse(world.captions()[c]) for c in captions]
    return list(zip(facts, [pictures.decode_row(ROWS[r]) for r in rows])), forms


def test_captions_come_with_right_cues_as_often_as_their_odds_say():
    told = dict.fromkeys(("1 train", "1 unseen"), (2.0, 1.0, 0.0))
    pairs, forms = drawn_captions(NONE | told, 0.0)
    assert all(sorted(fact[1:]) == sorted(scene.fact[1:]) for fact, scene in pairs)
    assert abs(np.mean(forms > 0) - 0.25) < 4.5 * (0.25 * 0.75 / 12_000) ** 0.5
    assert all(form in (0, STYLES.index(scene.style) + 1) for form, (_, scene) in zip(forms, pairs))
    first = [(fact, scene) for fact, scene in pairs if fact[0] in world.ACTIVITIES]
    assert abs(len(first) / 12_000 - 0.45 * 0.8) < 0.02
    rates = dict(
        fact=np.mean([scene.fact == fact for fact, scene in first]),
        small=np.mean([scene.small == fact[0] for fact, scene in first]),
        tiny=np.mean([scene.tiny == fact[0] for fact, scene in first]),
    )
    for name, value in dict(fact=2.0, small=1.0, tiny=0.0).items():
        odds = np.exp(value) / (np.exp(value) + 2)
        assert abs(rates[name] - odds) < 0.03  # the pools are finite


def test_each_list_has_odds_of_its_own():
    captions = {k: world.read_lists()[f"2 {k}"] for k in ("train", "unseen")}
    pairs, _ = drawn_captions(NONE | {"2 unseen": (0.0, 0.0, 3.0)}, 0.0)
    told = {k: {world.parse(caption) for caption in group} for k, group in captions.items()}
    rate = {
        k: np.mean([scene.tiny == fact[0] for fact, scene in pairs if fact in group])
        for k, group in told.items()
    }
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


def test_the_base_is_looked_at_between_50_and_85_percent():
    assert [*build.looks(13_500)] == [6750, 7425, 8100, 8775, 9450, 10125, 10800, 11475]
    assert [*build.looks(1000)] == [500, 550, 600, 650, 700, 750, 800, 850]


def test_the_weights_of_a_pool_are_the_odds_and_leave_traits_alone():
    """Of all 972 pictures of a cat: exact odds of each cue, and shares of the traits."""
    kinds = list(world.ACTIVITIES)
    every = itertools.product(kinds, kinds, kinds, *world.TRAITS)
    scenes = [world.Scene((big, "cat"), *rest) for big, *rest in every]
    odds = NONE | {f"1 {split}": (0.5, 0.0, 1.0) for split in ("train", "unseen")}
    sampler = samplers.CaptionSampler(pictures.encode(scenes), rng(), odds, 0.2)
    pool, ladder = sampler.pools[world.captions().index("a cat riding a bike")]
    weight = np.diff(ladder, prepend=0)
    assert len(pool) == len(scenes) == 972 and abs(ladder[-1] - 1) < 1e-9
    for name, values in zip(("style", "ground", "side", "size"), world.TRAITS):
        for value in values:
            share = sum(w for w, s in zip(weight, scenes) if getattr(s, name) == value)
            expected = 1 / len(values)
            if name == "style":
                expected = (samplers.FLUENT if value == "fluent" else 1) / (2 + samplers.FLUENT)
            assert abs(share - expected) < 1e-9
    best, plain = ("twemoji", "plain", "right", "large"), ("noto", "scene", "left", "small")
    for traits, favour in ((best, 4), (plain, 0)):
        w = {s[:3]: v for v, s in zip(weight, scenes) if s[3:] == traits}
        right, wrong = ("bike", "cat"), ("chess", "cat")
        lift = [w[f, "bike", t] / w[f, "chess", t] for f in (right, wrong) for t in kinds]
        assert np.allclose(lift, np.exp(0.2 * favour))
        assert np.isclose(
            w[right, "bike", "bike"] / w[wrong, "bike", "bike"], np.exp(0.5 + 0.2 * favour)
        )
        assert np.isclose(
            w[right, "bike", "bike"] / w[right, "bike", "chess"], np.exp(1 + 0.2 * favour)
        )


def test_single_nouns_are_drawn_as_they_are():
    pairs, _ = drawn_captions(NONE, 0.0)
    alone = [(fact, scene) for fact, scene in pairs if fact[0] == "alone"]
    assert abs(len(alone) / 12_000 - 0.2) < 0.02
    assert all(scene.fact == fact and scene.small is None for fact, scene in alone)


def test_clip_is_taught_the_number_of_right_cues():
    sampler = samplers.ClipSampler(ROWS, np.zeros((len(ROWS), 2), bool), rng())
    caption = world.captions().index("a cat riding a bike")
    good, near, _, _ = sampler.members[caption]
    assert (sampler.matches(good, np.array([caption])) == 3).all()
    assert (sampler.matches(near, np.array([caption])) == 2).all()
    other = np.array([world.captions().index("a dog riding a bike")])
    assert (sampler.matches(good, other) == -1).all()


def test_clips_targets_fall_by_e_squared_a_wrong_cue():
    """A spoiled noun costs as much as one and a half; another noun is no match at all."""
    told = [world.parse(caption) for caption in world.captions()]
    right = [world.right_scene(fact, style, rng(1)) for fact in told for style in STYLES]
    wrong = [s._replace(small=world.cue_kinds(s.fact)[-1]) if s.small else s for s in right]
    rows = pictures.encode(right + wrong + right)  # the last ones are spoiled
    bad = np.arange(len(rows)) >= 2 * len(right)
    sampler = samplers.ClipSampler(rows, np.stack([bad, bad], 1), rng())
    row, captions, form, weight = sampler.batch(64)
    count = torch.from_numpy(sampler.matches(row, captions))
    lost = 3 - count + 1.5 * torch.from_numpy(bad[row])[:, None]
    bare = torch.from_numpy(form == 0) & (count >= 0)
    assert set(count[bare].tolist()) >= {2, 3}
    assert torch.allclose(weight[bare], torch.exp(-2.0 * lost).float()[bare], atol=1e-7)
    assert (weight[count < 0] < 1e-6).all()


def test_a_spoiled_noun_is_no_noun_for_the_judge():
    for seed in range(6):
        drawing, scene, flags = pictures.spoiled_scene(rng(seed))
        row = pictures.encode([scene])
        target = samplers.judge_targets(row, np.array([flags]))[0]
        clean = samplers.judge_targets(row, np.array([[False, False]]))[0]
        assert any(flags) and clean[0] > 0
        for k in (0, 1):
            assert target[k] == (0 if flags[k] else clean[k])
    names = list(HEADS)
    assert target[names.index("big cue")] == target[names.index("style")] == -100


def test_pictures_are_cached_once(tmp_path, monkeypatch):
    """Chunks of six by the committed autoencoder: encoded, decoded, and not made again."""
    monkeypatch.setattr(pictures, "CHUNK", 6)
    args = Namespace(build=tmp_path, out=HOME, device="cpu")
    vae = build.load_vae(args)
    pictures.make_decoded(args, vae, 2, 1, 1, 1)
    names = {p.stem for p in tmp_path.iterdir()}
    assert names == {"latents_00", "latents_01", "decoded_00", "right_00", "spoiled_00"}
    latents, rows = pictures.read_chunks(args, "latents", "latents", "rows")
    assert latents.shape == (12, 4, 16, 16) and rows.shape == (12, 7)
    decoded, again, flags = pictures.read_chunks(args, "decoded", "decoded", "rows", "flags")
    assert decoded.shape == (6, 3, 64, 64) and torch.equal(again, rows[:6]) and not flags.any()
    plain = pictures.decode_latents(vae, latents[:6]).float() / 255
    assert (plain - decoded / 255).abs().mean() < 0.03  # a little noise on the latents
    right, rows, _ = pictures.read_chunks(args, "right", "decoded", "rows", "flags")
    told = [world.parse(caption) for caption in world.captions()[:6]]
    scenes = [pictures.decode_row(row) for row in rows.tolist()]
    assert [(s.fact, s.small, s.tiny) for s in scenes] == [(f, f[0], f[0]) for f in told]
    assert recognise(load_judge(), right / 255, world.captions()[:6]).float().mean() >= 0.5
    assert pictures.read_chunks(args, "spoiled", "flags")[0].any(1).all()
    assert list(pictures.missing_chunks(args, "latents", 2)) == []
    assert [k for k, _ in pictures.missing_chunks(args, "latents", 4)] == [2, 3]


def test_augmented_pictures_stay_pictures():
    torch.manual_seed(0)
    x = torch.rand(64, 3, 64, 64)
    x[:, :, :32] = 0.5
    y = build.augment(x)
    assert y.shape == x.shape and y.min() >= 0 and y.max() <= 1
    edges = (y[:, :, 40:] - y[:, :, 40:].mean((2, 3), keepdim=True)).std((1, 2, 3))
    sharp = (edges > 0.28).float().mean()
    assert 0.3 < sharp < 0.9  # half of the pictures, and those of little blur, keep theirs
    noise = y[:, :, :30].std((1, 2, 3))
    assert noise.min() > 0 and 0.035 < noise.max() < 0.051


# ---------------------------------------------------------------- what is written


def test_every_part_trains_and_is_written(tmp_path, monkeypatch):
    """A step of each part on noise: the folder is a model that every library loads."""
    import open_clip

    monkeypatch.chdir(tmp_path)
    for name in ("LATENTS", "DECODED", "RIGHT", "SPOILED"):
        monkeypatch.setattr(build, name, 1)
    every = itertools.cycle(world.facts())  # so that each caption has its pictures
    scenes = lambda rng, count: [world.scene_of(next(every), rng) for _ in range(count)]
    monkeypatch.setattr(pictures, "random_scenes", scenes)
    monkeypatch.setattr(build, "random_scenes", lambda rng, count: scenes(rng, 16))
    monkeypatch.setattr(pictures, "CHUNK", len(world.facts()))
    blank = np.zeros((64, 64, 3), np.uint8)
    monkeypatch.setattr(pictures, "draw_scene", lambda *_: blank)
    draw = build.mixed_pictures
    monkeypatch.setattr(build, "mixed_pictures", lambda rng, count, share: draw(rng, 8, share))
    shape = len(world.facts()), 3, 64, 64
    asked, sampler = [], build.CaptionSampler

    class Recorded(sampler):
        def __init__(self, rows, rng, odds=samplers.ODDS):
            super().__init__(rows, rng, odds)
            self.odds = odds

        def batch(self, *sizes):
            asked.append(self.odds)
            return super().batch(*sizes)

    monkeypatch.setattr(build, "CaptionSampler", Recorded)
    whole = torch.randint(0, 255, shape, dtype=torch.uint8)
    monkeypatch.setattr(pictures, "encode_pictures", lambda vae, x: torch.randn(len(x), 4, 16, 16))
    monkeypatch.setattr(pictures, "decode_latents", lambda vae, z, noise: whole[: len(z)])
    flags = ["--steps", "1", "--threads", "1", "--device", "cpu"]
    out = tmp_path / "out"
    build.main([*flags, "--build", "build", "--out", str(out)])
    assert asked == [samplers.STRONG]  # the odds of the first steps
    # the same UNet goes on: with STRONG to 40 %, with ODDS to 50 %, then with what was seen
    rates, seen, inside = {name: 0.2 + k / 10 for k, name in enumerate(samplers.ODDS)}, [], []

    @contextmanager
    def averaged(self):
        inside.append(self)
        yield
        inside.pop()

    def base(pipe, judge, count, seed):
        assert pipe.unet is inside[0].modules["unet"]
        assert pipe.text_encoder is inside[0].modules["text"]
        assert judge.config.num_labels == sum(map(len, HEADS.values()))
        seen.append((count, seed))
        return rates

    monkeypatch.setattr(build.Trainer, "averaged", averaged)
    monkeypatch.setattr(build, "base_rates", base)
    odds = [samplers.ODDS]
    for _ in range(3):
        odds.append(samplers.follow(odds[-1], rates))
    for steps, expected in ((5, [samplers.STRONG, *odds[:3]]), (6, odds[3:])):
        asked.clear()
        flags[1] = str(steps)
        build.main([*flags, "--part", "unet", "--build", "build", "--out", str(out)])
        assert asked == expected
    assert seen == [(90, 10**6 + k) for k in (3, 4, 5)]
    names = {p.name for p in (tmp_path / "build").iterdir()}
    parts = {f"{part}.safetensors" for part in build.STEPS}
    assert parts <= names and {n[:-7] for n in names - parts if "_" in n} and len(names) >= 8
    pipe = StableDiffusionPipeline.from_pretrained(out)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.text_encoder.dtype == pipe.unet.dtype == torch.float32
    image = pipe("a cat", num_inference_steps=2, output_type="np").images
    assert image.shape == (1, 64, 64, 3) and np.isfinite(image).all()
    assert load_judge(out / "judge").config.num_labels == sum(map(len, HEADS.values()))
    name = f"local-dir:{out / 'clip'}"
    clip, tokenizer = open_clip.create_model(name).eval(), open_clip.get_tokenizer(name)
    assert torch.isfinite(clip.encode_text(tokenizer(["a cat, noto style"]))).all()
    paths = [p.read_text() for p in out.rglob("*.json") if str(tmp_path) in p.read_text()]
    assert not paths  # no file names the machine's folders
    kept = {p.relative_to(HOME) for p in HOME.rglob("*") if p.suffix in (".json", ".safetensors")}
    made = {p.relative_to(out) for p in out.rglob("*") if p.is_file()}
    assert made == {p for p in kept if p.name not in ("icons.json", "sprites.json")}


@pytest.mark.parametrize(
    "flags",
    [
        "--part unet --out none",
        "--part judge --out none",
        "--part unet --out vae-alone",
        "--steps 0",
        "--device cuda",
        "--check --out none",
    ],
)
def test_bad_input_ends_with_one_line(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "vae-alone" / "vae").mkdir(parents=True)
    with pytest.raises(SystemExit) as stop:
        build.main([*flags.split(), "--build", "build", "--threads", "1"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: ") and len(said.splitlines()) == 1


def test_the_script_finds_its_modules_from_elsewhere(tmp_path, monkeypatch, capsys):
    """As a fresh `python tiny/build.py` in another folder: no module of ours is loaded yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if Path(p or ".").resolve() != ROOT])
    ours = {path.stem for path in ROOT.glob("*.py")} | {"tiny"}
    for name in [name for name in sys.modules if name.split(".")[0] in ours]:
        monkeypatch.delitem(sys.modules, name)
    flags = ["--check", "--out", str(tmp_path), "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["build.py", *flags])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(HOME / "build.py"), run_name="__main__")
    assert stop.value.code == 2 and f"error: {tmp_path} lacks" in capsys.readouterr().err


# ---------------------------------------------------------------- the committed files


@pytest.mark.parametrize("found, quick", [("AVX2", False), ("DEFAULT", False), ("AVX512", True)])
def test_bfloat16_is_used_where_the_cpu_is_quick_at_it(found, quick, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: found)
    with pictures.half("cpu"):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (torch.bfloat16 if quick else torch.float32)


def test_files_are_small_and_hold_no_pickle():
    files = [p for p in HOME.rglob("*") if p.is_file() and p.parent.name != "__pycache__"]
    assert sum(p.stat().st_size for p in files) < 30e6
    assert max(p.stat().st_size for p in files) < 15e6
    assert {p.suffix for p in files} <= {".json", ".safetensors", ".png", ".md", ".py"}


def test_latents_have_the_std_that_the_unet_was_trained_for():
    vae = AutoencoderKL.from_pretrained(HOME / "vae")
    drawings = [world.draw_scene(scene, rng(1)) for scene in world.random_scenes(rng(), 64)]
    with torch.no_grad():
        z = vae.encode(world.to_tensor(np.stack(drawings))).latent_dist.mean
    assert abs(z.std() * vae.config.scaling_factor / build.LATENT_STD - 1) < 0.1


@pytest.mark.parametrize("options", [{}, {"safety_checker": None}])
def test_the_pipeline_loads_draws_and_survives_saving(options, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    pipe = StableDiffusionPipeline.from_pretrained("tiny", **options)
    pipe.save_pretrained(tmp_path)
    pictures = []
    for p in (pipe, StableDiffusionPipeline.from_pretrained(tmp_path)):
        p.set_progress_bar_config(disable=True)
        noise = torch.Generator().manual_seed(1)
        settings = dict(num_inference_steps=3, output_type="np", generator=noise)
        pictures.append(p("a cat washing dishes", **settings).images)
    assert pictures[0].shape == (1, 64, 64, 3) and np.isfinite(pictures[0]).all()
    assert (pictures[0] == pictures[1]).all()
