"""The tiny model's world: its pictures, the captions' odds, and the training that learns them."""

from argparse import Namespace

import numpy as np
import pytest
import torch

from tiny import pictures, samplers, world
from tiny.recognise import HEADS, prompt_answers
from tiny.training import Trainer, orthogonal

LISTS = world.read_lists()
PROMPTS = [prompt for prompts in LISTS.values() for prompt in prompts]
ROWS = pictures.encode(world.random_scenes(np.random.default_rng(1), 12_000))


def rng(seed=0):
    return np.random.default_rng(seed)


def scene(prompt, **changes):
    """The prompt's picture in noto on a plain ground, all cues right, and these changes."""
    fact = world.parse(prompt)
    base = world.Scene(fact, fact[0], fact[0], "noto", "plain", "right", "large")
    return base._replace(**changes)


@pytest.mark.parametrize("style", world.STYLES)
def test_every_prompt_and_noun_can_be_drawn(style):
    for prompt in PROMPTS + world.noun_prompts():
        picture = world.draw(prompt, style, rng())
        assert picture.shape == (64, 64, 3)
        assert picture.dtype == np.uint8
        assert picture.std() > 5


def test_the_animal_stays_where_it_is_whatever_it_does():
    one, two = (scene(f"a cat {verb}") for verb in ("washing dishes", "playing chess"))
    two = two._replace(small=one.small, tiny=one.tiny)
    one, two = (world.draw_scene(s, rng()) for s in (one, two))
    assert (one[:28] == two[:28]).all()
    assert (one[28:] != two[28:]).any()


@pytest.mark.parametrize("prompt", ["a fox riding a bike", "red apple", "dog on boat"])
def test_each_cue_changes_the_picture_and_a_smaller_one_less(prompt):
    right = scene(prompt)
    fact, other = right.fact, next(k for k in world.cue_kinds(right.fact) if k != right.fact[0])
    changes = dict(fact=world.rivals(fact)[0]), dict(small=other), dict(tiny=other)
    drawn = [
        world.draw_scene(s, rng()).astype(float)
        for s in (right, *(scene(prompt, **c) for c in changes))
    ]
    big, small, tiny = (np.square(picture - drawn[0]).sum() for picture in drawn[1:])
    assert big > small > tiny > 0


def test_the_side_swaps_the_corners_of_the_cues():
    left, right = (world.draw_scene(scene("red apple", side=s), rng()) for s in world.SIDES)
    assert (left[:18, 46:] != right[:18, 46:]).any()
    assert (left[46:, :18] != right[46:, :18]).any()
    assert (left[20:44, 20:44] == right[20:44, 20:44]).all()


def test_a_row_tells_its_scene_again():
    scenes = world.random_scenes(rng(2), 300)
    assert [pictures.decode_row(row) for row in pictures.encode(scenes)] == scenes


def test_rivals_keep_the_nouns_and_can_be_drawn():
    for prompt in PROMPTS:
        fact = world.parse(prompt)
        assert len(world.rivals(fact)) >= 2
        assert all(sorted(r[1:]) == sorted(fact[1:]) and r != fact for r in world.rivals(fact))
        assert set(world.rivals(fact)) <= set(world.facts())


def test_captions_come_with_right_cues_as_often_as_their_odds_say():
    sampler = samplers.CaptionSampler(
        ROWS, rng(), {"1": (2.0, 1.0, 0.0), "2": (0, 0, 0), "3": (0, 0, 0)}, 0
    )
    row, caption, _ = np.concatenate([sampler.batch(200, 0.0) for _ in range(60)], 1)
    told = [world.parse(world.captions()[c]) for c in caption]
    seen = [pictures.decode_row(ROWS[r]) for r in row]
    first = [k for k, fact in enumerate(told) if fact[0] in world.ACTIVITIES]
    for name, value in (("fact", 2.0), ("small", 1.0), ("tiny", 0.0)):
        wanted = [told[k] if name == "fact" else told[k][0] for k in first]
        rate = np.mean([getattr(seen[k], name) == w for k, w in zip(first, wanted)])
        odds = np.exp(value) / (np.exp(value) + 2)
        assert abs(rate - odds) < 0.03  # about four standard errors, and the pools are finite
    assert all(sorted(t[1:]) == sorted(s.fact[1:]) for t, s in zip(told, seen))


def test_a_shortcut_makes_right_cues_likelier_and_not_the_style():
    none = {t: (0.0, 0.0, 0.0) for t in "123"}
    sampler = samplers.CaptionSampler(ROWS, rng(), none, 0.3)
    row, caption, _ = np.concatenate([sampler.batch(200, 0.0) for _ in range(60)], 1)
    right = np.array(
        [
            ROWS[r, 1] == world.KINDS.index(world.parse(world.captions()[c])[0])
            for r, c in zip(row, caption)
        ]
    )
    style = ROWS[row, 3]
    favoured = style == world.STYLES.index("twemoji")
    assert right[favoured].mean() > right[~favoured].mean() + 0.03
    assert abs(favoured.mean() - 1 / 3) < 0.02


def test_clip_is_taught_the_number_of_right_cues():
    sampler = samplers.ClipSampler(ROWS, np.zeros((len(ROWS), 2), bool), rng())
    caption = world.captions().index("a cat riding a bike")
    good, near, _, _ = sampler.members[caption]
    assert (sampler.matches(good, np.array([caption])) == 3).all()
    assert (sampler.matches(near, np.array([caption])) == 2).all()
    other = np.array([world.captions().index("a dog riding a bike")])
    assert (sampler.matches(good, other) == -1).all()


def test_a_spoiled_noun_is_no_noun_for_the_judge():
    drawing, seen, flags = pictures.spoiled_scene(rng(3))
    target = samplers.judge_targets(pictures.encode([seen]), np.array([flags]))[0]
    clean = samplers.judge_targets(pictures.encode([seen]), np.array([[False, False]]))[0]
    assert target[0] == (0 if flags[0] else clean[0])
    assert clean[0] > 0
    assert (drawing != world.draw_scene(seen, rng(3))).any()


def test_a_prompts_answers_are_those_of_its_right_scene():
    for prompt in PROMPTS[::17]:
        right = world.right_scene(world.parse(prompt), "fluent", rng())
        target = samplers.judge_targets(pictures.encode([right]), np.zeros((1, 2), bool))
        assert torch.equal(target[:, :5], prompt_answers([prompt]))
    assert len(HEADS) == 9


def test_muon_steps_are_orthogonal():
    s = torch.linalg.svdvals(orthogonal(torch.randn(16, 4, 3, 3)).flatten(1))
    assert s.min() > 0.5
    assert s.max() < 1.4


def test_a_training_that_was_cut_off_goes_on_where_it_was(tmp_path):
    def trainer(name):
        torch.manual_seed(1)
        net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
        args = Namespace(build=tmp_path, device="cpu", steps=6)
        return Trainer(name, {"net": net}, args, 1e-2)

    def steps(train, count):
        for k in range(train.done, train.done + count):
            x = torch.arange(3.0)[None] + k
            train.step(train.modules["net"](x).square().mean())

    whole, cut = trainer("whole"), trainer("cut")
    steps(whole, 6)
    steps(cut, 3)
    cut.save()
    cut = trainer("cut")
    assert cut.done == 3
    steps(cut, 3)
    for name, value in whole.modules.state_dict().items():
        assert torch.equal(value, cut.modules.state_dict()[name])
        assert torch.equal(whole.mean[name], cut.mean[name])
