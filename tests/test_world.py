"""The tiny model's world: prompt files, facts, pictures and captions."""

import json

import numpy as np
import pytest
import torch

from tiny import world

LISTS = world.read_lists()
PROMPTS = [prompt for prompts in LISTS.values() for prompt in prompts]


def rng(seed=0):
    return np.random.default_rng(seed)


def draw(prompt, style, seed=0):
    return world.draw_fact(world.parse(prompt), style, rng(seed))


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


def test_wrong_facts_are_drawable_and_wrong():
    assert world.wrong(("alone", "cat")) == []
    for prompt in PROMPTS:
        fact = world.parse(prompt)
        others = world.wrong(fact)
        assert len(others) >= 3 and fact not in others and len(set(others)) == len(others)
        assert set(others) <= set(world.facts()[0])


def test_every_fact_has_its_share():
    every, odds = world.facts()
    assert every == sorted(set(every)) and abs(odds.sum() - 1) < 1e-9 and (odds > 0).all()
    share = {kind: 0.0 for kind, *_ in every}
    for (kind, *_), p in zip(every, odds):
        share[kind] += p / odds.sum()
    ratio = {kind: p / share["alone"] * 0.34 for kind, p in share.items()}
    assert all(abs(ratio[kind] - 0.12) < 1e-9 for kind in world.ACTIVITIES)
    assert all(abs(ratio[kind] - 0.06) < 1e-9 for kind in ("on", "left", "behind"))
    assert abs(ratio["red"] - 0.015) < 1e-9


def test_the_judges_labels_are_the_facts_in_their_order():
    labels = json.loads((world.HOME / "judge" / "config.json").read_text())["id2label"]
    assert len(labels) == len(world.facts()[0]) == len(world.fact_index())
    for k, (fact, texts) in enumerate(zip(world.facts()[0], world.tellings())):
        assert labels[str(k)] == " = ".join(texts)
        assert {world.parse(text) for text in texts} == {fact}
        assert world.fact_index()[fact] == k


def test_captions_are_the_lists_and_the_nouns():
    captions = world.captions()
    assert len(set(captions)) == len(captions) and captions[0] == LISTS["1 train"][0]
    assert set(captions) == {*PROMPTS, *world.noun_prompts()}
    assert world.style_prompts("a cat")[1] == "a cat, twemoji style"


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize("style", world.STYLES)
def test_every_prompt_and_noun_can_be_drawn(style):
    for prompt in PROMPTS + world.noun_prompts():
        picture = draw(prompt, style)
        assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8
        assert picture.std() > 5


def test_the_same_generator_draws_the_same_picture():
    first, again = (draw("a cat riding a bike", "noto", 3) for _ in range(2))
    assert (first == again).all()
    assert (first != draw("a cat riding a bike", "noto", 4)).any()


@pytest.mark.parametrize("template, facts", [("1", 135), ("2", 80), ("3", 60)])
def test_different_facts_look_different(template, facts):
    """Pictures of two prompts of a template differ by more than noise on the same ground."""
    prompts = LISTS[f"{template} train"] + LISTS[f"{template} unseen"]
    known = sorted({world.parse(p) for p in prompts})
    assert len(known) == facts
    for style in world.STYLES:
        pictures = np.stack([world.draw_fact(f, style, rng(5)) for f in known])
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


@pytest.mark.parametrize("side, half", [("left", slice(0, 32)), ("right", slice(32, 64))])
def test_pictures_follow_the_layout(side, half):
    """When the bear becomes a dog, the half without it stays the same."""
    nouns = ("bear", "dog")
    bear, dog = (world.draw_fact(("left", n, "car"), "noto", rng(1)).astype(int) for n in nouns)
    if side == "right":
        bear, dog = (world.draw_fact(("left", "car", n), "noto", rng(1)).astype(int) for n in nouns)
    gap = np.abs(bear - dog).mean((0, 2))
    other = gap[34:] if side == "left" else gap[:30]
    assert gap[half].mean() > 5 and other.max() == 0


def test_things_move_a_little_and_surfaces_do_not():
    middles, edges = set(), []
    for seed in range(30):
        ground = np.clip(world.background("noto", rng(seed)), 0, 255).astype(np.uint8)
        shown = (draw("a cat", "noto", seed) != ground).any(2).any(0).nonzero()[0]
        middles.add((shown[0] + shown[-1]) // 2)
        road = draw("road under car", "noto", seed)
        edges += [(road[55, x] != ground[55, x]).any() for x in (0, 63)]
    assert len(middles) >= 3 and max(middles) - min(middles) <= 4 and all(edges)


@pytest.mark.parametrize(
    "prompt, style, seed, colours",
    [
        ("a cat riding a bike", "noto", 1, "b9a672b4a67ccdc59fccc59f"),
        ("street under car", "noto", 2, "a396a7a394a48f97a08f97a0"),
        ("red apple", "twemoji", 0, "c6b2c6c1b7c6c9a7bbc7b1c6"),
        ("a bat playing chess", "fluent", 0, "a6c1d8a5cde9879c626a8a60"),
        ("trees behind grass", "fluent", 3, "8fc0c1a1ced265b38763b384"),
        ("sofa under person", "twemoji", 5, "c6a498c7a496c2b0a2ceb3a0"),
    ],
)
def test_pictures_are_those_that_the_weights_have_learnt(prompt, style, seed, colours):
    """The mean colour of each quarter: gradients, a scene and plain grounds are among them."""
    quarters = draw(prompt, style, seed).reshape(2, 32, 2, 32, 3).mean((1, 3))
    assert np.abs(quarters.flatten() - [*bytes.fromhex(colours)]).max() < 2


@pytest.mark.parametrize("style, odds", [("twemoji", (0.8, 0.1, 0.1)), ("noto", (0.1, 0.45, 0.45))])
def test_grounds_are_as_often_as_told(style, odds):
    kinds = np.zeros(3)
    generator = rng(1)
    for _ in range(600):
        ground = world.background(style, generator)
        assert ground.shape == (64, 64, 3) and (ground == ground[:, :1]).all()
        plain = (ground == ground[0, 0]).all()
        scene = np.allclose(ground[-1, 0], (120, 170, 90)) and ground[0, 0, 2] == 245
        kinds += plain, not plain and not scene, scene
    for count, p in zip(kinds, odds):
        assert abs(count / 600 - p) < 4.5 * (p * (1 - p) / 600) ** 0.5


@pytest.mark.parametrize("style", world.STYLES)
def test_colours_are_those_of_the_prompt(style):
    """The middle of a recoloured apple is near its colour, and far from the other colours."""
    for colour in ("red", "green", "blue", "yellow", "white", "black"):
        icon = np.asarray(world.coloured("apple", style, colour)).astype(float)
        near = icon[icon[..., 3] > 128][:, :3]
        middle = np.median(near, 0)
        gaps = {c: np.abs(middle - rgb).sum() for c, rgb in world.COLOURS.items()}
        assert gaps[colour] < 110 and gaps[colour] <= min(gaps.values()) + 40, (colour, middle)


def test_batches_are_drawn_by_the_odds_and_scaled():
    assert world.draw_batch(rng(2), 3).shape == (3, 3, 64, 64)
    cat = world.fact_index()["alone", "cat"]
    x = world.draw_pairs([(cat, 2), (cat, 0)], rng(3))
    picture = world.draw_fact(("alone", "cat"), "fluent", rng(3))
    assert x.dtype == torch.float32 and x.min() >= -1 and x.max() <= 1
    back = ((x[0] + 1) * 127.5).round().permute(1, 2, 0)
    assert (back.numpy() == picture).all()
