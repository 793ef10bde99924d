"""The tiny model's world: prompt files, facts, scenes and their pictures."""

import numpy as np
import pytest
import torch

from tiny import sprites, world
from tiny.sprites import STYLES

LISTS = world.read_lists()
PROMPTS = [prompt for prompts in LISTS.values() for prompt in prompts]


def rng(seed=0):
    return np.random.default_rng(seed)


def scene(prompt, **changes):
    """The prompt's picture in noto on a plain ground, all cues right, and these changes."""
    fact = world.parse(prompt)
    base = world.Scene(fact, fact[0], fact[0], "noto", "plain", "right", "large")
    return base._replace(**changes)


def alone(noun, **changes):
    fact = ("alone", noun)
    return world.Scene(fact, None, None, "noto", "plain", "right", "large")._replace(**changes)


# ---------------------------------------------------------------- prompt files


@pytest.fixture
def read(tmp_path):
    """What read_lists makes of the bytes of a file."""

    def go(data):
        (tmp_path / "prompts.txt").write_bytes(data)
        return world.read_lists(tmp_path / "prompts.txt")

    return go


BOTH = {"train": ["a cat", "a dog"], "unseen": ["a bird"]}


@pytest.mark.parametrize(
    "data, lists",
    [
        (b"[train]\na cat\na dog\n[unseen]\na bird\n", BOTH),
        (b"\xef\xbb\xbf[train]\na cat\na dog\n[unseen]\na bird", BOTH),  # a byte-order mark
        (b"\xef\xbb\xbfa cat\na dog\n", {"": ["a cat", "a dog"]}),
        (b"[train]\r\na cat\r\n\r\na dog\r\n[unseen]\r\na bird\r\n", BOTH),
        (b"[train]\ra cat\ra dog\r[unseen]\ra bird\r", BOTH),
        (b"\t[ train ]\t\n\ta cat\t\n a\tdog\n \t \n[unseen]\t\na  bird ", BOTH),
        (b"[train]\na cat\n[empty]\n\n[train]\na dog\n[unseen]\na bird\n[last]", BOTH),
        (b"# [no]\n[train]\na cat\n \t# a fish\na dog\n#\n[unseen]\na bird", BOTH),
        (b"a cat\n[train]\na dog", {"": ["a cat"], "train": ["a dog"]}),
        (b"a cat [x]\n[y] a dog\n", {"": ["a cat [x]", "[y] a dog"]}),
        ("ein Kätzchen 🙂\n".encode(), {"": ["ein Kätzchen 🙂"]}),
        (b"[]\na cat\n", {"": ["a cat"]}),
        (b"", {}),
        (b"[train]\n", {}),
    ],
)
def test_prompt_files_in_all_their_forms(read, data, lists):
    found = read(data)
    assert found == lists and list(found) == list(lists)


def test_what_is_no_prompt_file_raises(read, tmp_path):
    with pytest.raises(FileNotFoundError):
        world.read_lists(tmp_path / "none.txt")
    with pytest.raises(IsADirectoryError):
        world.read_lists(tmp_path)
    for data in (b"a caf\xe9\n", "a cat".encode("utf-16")):
        with pytest.raises(UnicodeDecodeError):
            read(data)


def test_the_six_lists_have_the_papers_sizes():
    sizes = [len(LISTS[f"{t} {split}"]) for t in "123" for split in ("train", "unseen")]
    assert sizes == [45, 90, 40, 40, 40, 30] and len(LISTS) == 6


# ---------------------------------------------------------------- facts


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
        assert len(world.rivals(fact)) >= 2
        assert all(sorted(r[1:]) == sorted(fact[1:]) and r != fact for r in world.rivals(fact))
        assert set(world.rivals(fact)) <= set(world.facts())


def test_a_cue_can_tell_what_its_rivals_tell():
    """Every kind of cue that may stand beside a prompt is right for one rival at least."""
    for prompt in PROMPTS:
        fact = world.parse(prompt)
        kinds = world.cue_kinds(fact)
        assert fact[0] in kinds and len(kinds) >= 3 and len(set(kinds)) == len(kinds)
        assert {r[0] for r in world.rivals(fact)} <= set(kinds)


def test_every_fact_has_its_share():
    scenes = world.random_scenes(rng(1), 6000)
    facts = world.facts()
    assert facts == sorted(set(facts)) and {s.fact for s in scenes} <= set(facts)
    for template, share in world.SHARES.items():
        found = np.mean([world.template_of(s.fact) == template for s in scenes])
        assert abs(found - share) < 4.5 * (share * (1 - share) / 6000) ** 0.5
    for name, values in (("style", STYLES), ("ground", world.GROUNDS), ("size", world.SIZES)):
        found = [np.mean([getattr(s, name) == v for s in scenes]) for v in values]
        assert abs(np.array(found) - 1 / len(values)).max() < 0.03


def test_captions_are_the_lists_and_the_nouns():
    captions = world.captions()
    assert len(set(captions)) == len(captions) and captions[0] == LISTS["1 train"][0]
    assert set(captions) == {*PROMPTS, *world.noun_prompts()}
    assert world.style_prompts("a cat")[1] == "a cat, twemoji style"


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize("style", STYLES)
def test_every_prompt_and_noun_can_be_drawn(style):
    for prompt in PROMPTS + world.noun_prompts():
        picture = world.draw(prompt, style, rng())
        assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8
        assert picture.std() > 5


def test_the_same_generator_draws_the_same_picture():
    first, again = (world.draw("a cat riding a bike", "noto", rng(3)) for _ in range(2))
    assert (first == again).all()
    assert (first != world.draw("a cat riding a bike", "noto", rng(4))).any()


@pytest.mark.parametrize("template, facts", [("1", 135), ("2", 80), ("3", 60)])
def test_different_facts_look_different(template, facts):
    """Pictures of two prompts of a template differ by more than noise on the same ground."""
    prompts = LISTS[f"{template} train"] + LISTS[f"{template} unseen"]
    known = sorted({world.parse(p) for p in prompts})
    assert len(known) == facts
    for style in STYLES:
        pictures = np.stack(
            [world.draw_scene(world.right_scene(f, style, rng(5)), rng(5)) for f in known]
        )
        flat = torch.from_numpy(pictures.reshape(len(known), -1)).float()
        gap = torch.cdist(flat, flat) / flat.shape[1] ** 0.5  # root mean square difference
        gap.fill_diagonal_(255.0)
        closest = divmod(int(gap.argmin()), len(known))
        assert gap.min() > 5, (style, [known[k] for k in closest])


def test_relations_stand_where_they_say():
    (a, _, x_a, *_), (b, _, x_b, *_) = world.layout(("left", "bear", "person"))
    assert (a, b) == ("bear", "person") and x_a < 32 < x_b
    (b, _, _, y_b, *_), (a, _, _, y_a, *_) = world.layout(("on", "vase", "table"))
    assert (a, b) == ("vase", "table") and y_a < 32 < y_b
    back, front = world.layout(("behind", "car", "bus"))  # what is drawn last hides the other
    assert back[0] == "car" and front[0] == "bus" and back[3] < front[3]


def test_the_animal_stays_where_it_is_whatever_it_does():
    one, two = (scene(f"a cat {verb}") for verb in ("washing dishes", "playing chess"))
    two = two._replace(small=one.small, tiny=one.tiny)
    one, two = (world.draw_scene(s, rng()) for s in (one, two))
    assert (one[:28] == two[:28]).all()
    assert (one[28:] != two[28:]).any()


@pytest.mark.parametrize("prompt", ["a fox riding a bike", "red apple", "dog on boat"])
def test_each_cue_changes_the_picture_and_a_smaller_one_less(prompt):
    right = scene(prompt)
    other = next(k for k in world.cue_kinds(right.fact) if k != right.fact[0])
    wrong = dict(fact=world.rivals(right.fact)[0]), dict(small=other), dict(tiny=other)
    scenes = [right, *(scene(prompt, **change) for change in wrong)]
    first, *rest = (world.draw_scene(s, rng()).astype(float) for s in scenes)
    big, small, tiny = (np.square(picture - first).sum() for picture in rest)
    assert big > small > tiny > 0


def test_the_side_swaps_the_corners_of_the_cues():
    left, right = (world.draw_scene(scene("red apple", side=s), rng()) for s in world.SIDES)
    assert (left[:18, 46:] != right[:18, 46:]).any()
    assert (left[46:, :18] != right[46:, :18]).any()
    assert (left[20:44, 20:44] == right[20:44, 20:44]).all()


def test_a_small_noun_is_smaller_and_a_surface_is_not():
    shown = []
    for size in world.SIZES:
        ground = world.draw_scene(alone("cat", size=size), rng(), lambda noun, icon: None)
        cat = world.draw_scene(alone("cat", size=size), rng())
        shown.append((cat != ground).any(2).sum())
    assert 0.6 < shown[1] / shown[0] < 0.85
    roads = [world.draw_scene(scene("car on road", size=size), rng())[60] for size in world.SIZES]
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
    quarters = world.draw(prompt, style, rng(seed)).reshape(2, 32, 2, 32, 3).mean((1, 3))
    assert np.abs(quarters.flatten() - [*bytes.fromhex(colours)]).max() < 2


def test_grounds_are_what_they_are_called():
    for seed in range(40):
        for name in world.GROUNDS:
            ground = world.background(name, rng(seed)).astype(int)
            assert ground.shape == (64, 64, 3) and (ground == ground[:, :1]).all()
            steps = np.abs(np.diff(ground[:, 0], axis=0)).max()
            kind = "plain" if steps == 0 else "gradient" if steps < 9 else "scene"
            assert kind == name


@pytest.mark.parametrize("style", STYLES)
def test_colours_are_those_of_the_prompt(style):
    """The middle of a recoloured apple is near its colour, and far from the other colours."""
    for colour in ("red", "green", "blue", "yellow", "white", "black"):
        icon = np.asarray(sprites.coloured("apple", style, colour)).astype(float)
        near = icon[icon[..., 3] > 128][:, :3]
        middle = np.median(near, 0)
        gaps = {c: np.abs(middle - rgb).sum() for c, rgb in sprites.COLOURS.items()}
        assert gaps[colour] < 110 and gaps[colour] <= min(gaps.values()) + 40, (colour, middle)


def test_tensors_are_the_pictures_scaled():
    pictures = np.stack(
        [world.draw("a cat", "fluent", rng(3)), world.draw("a dog", "noto", rng(4))]
    )
    x = world.to_tensor(pictures)
    assert x.shape == (2, 3, 64, 64) and x.dtype == torch.float32
    assert ((x + 1) * 127.5).round().permute(0, 2, 3, 1).numpy().tolist() == pictures.tolist()
