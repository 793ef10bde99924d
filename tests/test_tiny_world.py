"""The tiny model's world: what prompts tell, scenes, and how they are drawn."""

import numpy as np
import pytest
import torch

from tiny import world
from tiny.build import pictures, scenes
from tiny.build.scenes import LISTS
from tiny.world import STYLES

PROMPTS = [prompt for prompts in LISTS.values() for prompt in prompts]


def rng(seed=0):
    return np.random.default_rng(seed)


def draw(prompt, style, generator):
    """The prompt's picture with every cue right -> (64, 64, 3) uint8."""
    right = scenes.right_scene(world.parse(prompt), style, generator)
    return scenes.draw_scene(right, generator)


def scene(prompt, **changes):
    """The prompt's picture in noto on a plain ground, all cues right, and these changes."""
    fact = world.parse(prompt)
    base = scenes.Scene(fact, fact[0], fact[0], "noto", "plain", "right", "large")
    return base._replace(**changes)


def alone(noun, **changes):
    fact = ("alone", noun)
    return scenes.Scene(fact, "alone", "alone", "noto", "plain", "right", "large")._replace(
        **changes
    )


# ---------------------------------------------------------------- facts


def test_the_six_lists_have_the_papers_sizes():
    sizes = [len(LISTS[f"{t} {split}"]) for t in "123" for split in ("train", "unseen")]
    assert sizes == [45, 90, 40, 40, 40, 30] and len(LISTS) == 6


@pytest.mark.parametrize(
    "prompt", ["", "a unicorn", "a cat flying a kite", "mauve apple", "cat inside vase", "red"]
)
def test_prompts_outside_the_world_are_refused(prompt):
    with pytest.raises(ValueError, match="cannot draw"):
        world.parse(prompt)


def test_prompts_tell_their_facts():
    assert world.parse("a cat washing dishes") == ("dishes", "cat")
    assert world.parse("a ant riding a bike") == ("bike", "ant")
    assert world.parse("a bat playing chess") == ("chess", "bat")
    assert world.parse(LISTS["2 train"][0]) == tuple(LISTS["2 train"][0].split(" ", 1))
    assert world.parse("sky") == world.parse("a sky") == ("alone", "sky")
    assert world.parse("person on sofa") == ("on", "person", "sofa")
    assert world.parse("bear on the left of person") == ("left", "bear", "person")
    assert world.parse("trees behind grass") == ("behind", "trees", "grass")


def test_mirrored_prompts_are_one_fact_and_others_are_not():
    same = [
        ("person on sofa", "sofa under person"),
        ("road on the left of grass", "grass on the right of road"),
        ("tower in the front of train", "train behind tower"),
        ("car on the left of car", "car on the right of car"),
    ]
    assert all(world.parse(a) == world.parse(b) for a, b in same)
    bear = "bear on the {} of person"
    assert world.parse(bear.format("left")) != world.parse(bear.format("right"))


def test_rivals_keep_the_nouns_and_can_be_drawn():
    for prompt in PROMPTS:
        fact = world.parse(prompt)
        assert len(scenes.rivals(fact)) >= 2
        assert all(sorted(r[1:]) == sorted(fact[1:]) and r != fact for r in scenes.rivals(fact))
        assert set(scenes.rivals(fact)) <= set(scenes.FACTS)


def test_a_cue_can_tell_what_its_rivals_tell():
    """Every kind of cue that may stand beside a prompt is right for one rival at least."""
    for prompt in PROMPTS:
        fact = world.parse(prompt)
        kinds = scenes.cue_kinds(fact)
        assert fact[0] in kinds and len(kinds) >= 3 and len(set(kinds)) == len(kinds)
        assert {r[0] for r in scenes.rivals(fact)} <= set(kinds)


def test_every_fact_has_its_share():
    drawn = scenes.random_scenes(rng(1), 6000)
    facts = scenes.FACTS
    assert facts == sorted(set(facts)) and {s.fact for s in drawn} <= set(facts)
    for template, share in scenes.SHARES.items():
        found = np.mean([scenes.TEMPLATE[s.fact[0]] == template for s in drawn])
        assert abs(found - share) < 4.5 * (share * (1 - share) / 6000) ** 0.5
    for name, values in (("style", STYLES), ("ground", world.GROUNDS), ("size", world.SIZES)):
        found = [np.mean([getattr(s, name) == v for s in drawn]) for v in values]
        assert abs(np.array(found) - 1 / len(values)).max() < 0.03


def test_captions_are_the_lists_and_the_nouns():
    captions = scenes.CAPTIONS
    assert len(set(captions)) == len(captions) and captions[0] == LISTS["1 train"][0]
    assert set(captions) == {*PROMPTS, *scenes.NOUN_PROMPTS}


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize("style", STYLES)
def test_every_prompt_and_noun_can_be_drawn(style):
    for prompt in PROMPTS + scenes.NOUN_PROMPTS:
        picture = draw(prompt, style, rng())
        assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8
        assert picture.std() > 5


def test_the_same_generator_draws_the_same_picture():
    first, again = (draw("a cat riding a bike", "noto", rng(3)) for _ in range(2))
    assert (first == again).all()
    assert (first != draw("a cat riding a bike", "noto", rng(4))).any()


@pytest.mark.parametrize("template, facts", [("1", 135), ("2", 80), ("3", 60)])
def test_different_facts_look_different(template, facts):
    """Pictures of two prompts of a template differ by more than noise on the same ground."""
    prompts = LISTS[f"{template} train"] + LISTS[f"{template} unseen"]
    known = sorted({world.parse(p) for p in prompts})
    assert len(known) == facts
    for style in STYLES:
        drawings = np.stack(
            [scenes.draw_scene(scenes.right_scene(f, style, rng(5)), rng(5)) for f in known]
        )
        flat = torch.from_numpy(drawings.reshape(len(known), -1)).float()
        gap = torch.cdist(flat, flat) / flat.shape[1] ** 0.5  # root mean square difference
        gap.fill_diagonal_(255.0)
        closest = divmod(int(gap.argmin()), len(known))
        assert gap.min() > 5, (style, [known[k] for k in closest])


def test_a_row_has_the_places_of_a_scenes_entries():
    drawn = scenes.random_scenes(rng(2), 300)
    for row, known in zip(scenes.encode(drawn).tolist(), drawn):
        assert scenes.Scene(*(v[k] for v, k in zip(scenes.FIELDS, row))) == known


def test_relations_stand_where_they_say():
    (a, _, x_a, *_), (b, _, x_b, *_) = scenes.layout(("left", "bear", "person"))
    assert (a, b) == ("bear", "person") and x_a < 32 < x_b
    (b, _, _, y_b, *_), (a, _, _, y_a, *_) = scenes.layout(("on", "vase", "table"))
    assert (a, b) == ("vase", "table") and y_a < 32 < y_b
    back, front = scenes.layout(("behind", "car", "bus"))  # what is drawn last hides the other
    assert back[0] == "car" and front[0] == "bus" and back[3] < front[3]


def test_the_animal_stays_where_it_is_whatever_it_does():
    one, two = (scene(f"a cat {verb}") for verb in ("washing dishes", "playing chess"))
    two = two._replace(small=one.small, tiny=one.tiny)
    one, two = (scenes.draw_scene(s, rng()) for s in (one, two))
    assert (one[:28] == two[:28]).all()
    assert (one[28:] != two[28:]).any()


@pytest.mark.parametrize("prompt", ["a fox riding a bike", "red apple", "dog on boat"])
def test_each_cue_changes_the_picture_and_a_smaller_one_less(prompt):
    right = scene(prompt)
    other = next(k for k in scenes.cue_kinds(right.fact) if k != right.fact[0])
    wrong = dict(fact=scenes.rivals(right.fact)[0]), dict(small=other), dict(tiny=other)
    shown = [right, *(scene(prompt, **change) for change in wrong)]
    first, *rest = (scenes.draw_scene(s, rng()).astype(float) for s in shown)
    big, small, tiny = (np.square(picture - first).sum() for picture in rest)
    assert big > small > tiny > 0


def test_the_side_swaps_the_corners_of_the_cues():
    left, right = (scenes.draw_scene(scene("red apple", side=s), rng()) for s in world.SIDES)
    assert (left[:18, 46:] != right[:18, 46:]).any()
    assert (left[46:, :18] != right[46:, :18]).any()
    assert (left[20:44, 20:44] == right[20:44, 20:44]).all()


def test_a_small_noun_is_smaller_and_a_surface_is_not():
    shown = []
    for size in world.SIZES:
        ground = scenes.draw_scene(alone("cat", size=size), rng(), lambda noun, icon: None)
        cat = scenes.draw_scene(alone("cat", size=size), rng())
        shown.append((cat != ground).any(2).sum())
    assert 0.6 < shown[1] / shown[0] < 0.85
    roads = [scenes.draw_scene(scene("car on road", size=size), rng())[60] for size in world.SIZES]
    assert (roads[0] == roads[1]).all()


@pytest.mark.parametrize(
    "prompt, style, seed, colours",
    [
        ("a cat riding a bike", "noto", 1, "c89b84cb9b85c1b0c8beb0c8"),
        ("street under car", "noto", 2, "afb7d0adb2cb949fab90a0aa"),
        ("red apple", "twemoji", 0, "b1bedab5a8ba9c9c6b9c9b6a"),
        ("a bat playing chess", "fluent", 0, "a7cbe69eafc87a9e727ca174"),
        ("trees behind grass", "fluent", 3, "81bbc093c7d369aa7c5db073"),
        ("sofa under person", "twemoji", 5, "c4d0bec7c4ab8bb67e94b775"),
    ],
)
def test_pictures_are_those_that_the_weights_have_learnt(prompt, style, seed, colours):
    """The mean colour of each quarter: gradients, a scene and plain grounds are among them."""
    quarters = draw(prompt, style, rng(seed)).reshape(2, 32, 2, 32, 3).mean((1, 3))
    assert np.abs(quarters.flatten() - [*bytes.fromhex(colours)]).max() < 2


def test_grounds_are_what_they_are_called():
    for seed in range(40):
        for name in world.GROUNDS:
            ground = scenes.background(name, rng(seed)).astype(int)
            assert ground.shape == (64, 64, 3) and (ground == ground[:, :1]).all()
            steps = np.abs(np.diff(ground[:, 0], axis=0)).max()
            kind = "plain" if steps == 0 else "gradient" if steps < 9 else "scene"
            assert kind == name


@pytest.mark.parametrize("style", STYLES)
def test_colours_are_those_of_the_prompt(style):
    """The middle of a recoloured apple is near its colour, and far from the other colours."""
    for colour in ("red", "green", "blue", "yellow", "white", "black"):
        icon = np.asarray(scenes.coloured("apple", style, colour)).astype(float)
        near = icon[icon[..., 3] > 128][:, :3]
        middle = np.median(near, 0)
        gaps = {c: np.abs(middle - rgb).sum() for c, rgb in world.COLOURS.items()}
        assert gaps[colour] < 110 and gaps[colour] <= min(gaps.values()) + 40, (colour, middle)


def test_tensors_are_the_pictures_scaled():
    drawings = np.stack([draw("a cat", "fluent", rng(3)), draw("a dog", "noto", rng(4))])
    x = pictures.to_tensor(drawings)
    assert x.shape == (2, 3, 64, 64) and x.dtype == torch.float32
    assert ((x + 1) * 127.5).round().permute(0, 2, 3, 1).numpy().tolist() == drawings.tolist()
