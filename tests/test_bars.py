"""The bars: held-out pictures, base samples, CLIP's choice, and the table's verdict."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from diffusers import AutoencoderKL

from tiny import bars
from tiny.pictures import spoiled_scene
from tiny.recognise import HEADS, answers
from tiny.sprites import HOME, STYLES
from tiny.world import TRAITS, draw_scene, parse, read_lists, right_scene

LISTS = read_lists()


@pytest.fixture(scope="module")
def vae():
    return AutoencoderKL.from_pretrained(HOME / "vae")


def test_drawn_pictures_are_of_their_prompts_and_styles(vae):
    images, owner, error = bars.drawn(["a cat", "red apple"], vae)
    assert owner == ["a cat"] * 3 + ["red apple"] * 3 and images.shape == (6, 3, 64, 64)
    generator = np.random.default_rng(99)
    for k, image in enumerate(images):
        scene = right_scene(parse(owner[k]), STYLES[k % 3], generator)
        picture = draw_scene(scene, generator) / 255
        square = (image.permute(1, 2, 0).numpy() - picture) ** 2
        assert abs(square.mean() - error[k]) < 1e-5 and error[k] < 0.01


class Pipe:
    """Draws the prompt's length and the noise's seed."""

    def __call__(self, prompts, generator, num_inference_steps, output_type, **settings):
        assert len(prompts) == len(generator) <= 60 and num_inference_steps == 20
        assert settings == {"eta": 1.0, "guidance_scale": 5.0} and output_type == "np"
        self.images = np.zeros((len(prompts), 64, 64, 3), np.float32)
        self.images[..., 0] = np.array([len(p) for p in prompts])[:, None, None]
        self.images[..., 1] = np.array([g.initial_seed() for g in generator])[:, None, None]
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

    new = dict(read_lists=lambda: lists, sampled=sampled, recognise=judge)
    for name, value in new.items():
        monkeypatch.setattr(bars, name, value)
    assert bars.base_rates("pipe", "judge", 5, 7) == {"1 train": 0.667, "1 unseen": 0.5}
    assert asked == [("pipe", 5, 7)] * 2


@pytest.fixture
def known(monkeypatch):
    """What is seen of a drawing where nothing but the bars is tested: {pixels: its scene}."""
    scenes = {}

    def draw(scene, rng):
        drawing = draw_scene(scene, rng)
        scenes[drawing.tobytes()] = scene
        return drawing

    def through(vae, drawings):
        return torch.from_numpy(np.stack(drawings)).permute(0, 3, 1, 2), torch.full((1,), 1e-4)

    monkeypatch.setattr(bars, "draw_scene", draw)
    monkeypatch.setattr(bars, "through", through)
    return lambda image: scenes.get(image.permute(1, 2, 0).numpy().tobytes())


def right_cues(scene, prompt):
    """How many cues of a scene are the prompt's; 0 if nothing is known of it."""
    fact = parse(prompt)
    kind = None if fact[0] == "alone" else fact[0]
    return scene and (scene.fact == fact) + (scene.small == kind) + (scene.tiny == kind) or 0


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
    seen = []
    spoil = lambda rng: seen.append(spoiled_scene(rng)) or seen[-1]
    monkeypatch.setattr(bars, "spoiled_scene", spoil)
    monkeypatch.setattr(bars, "through", lambda vae, drawings: (np.stack(drawings), None))
    images, owner = bars.spoiled(None, 30)
    facts = [(scene.fact, drawing.tobytes()) for drawing, scene, _ in seen]
    assert len(images) == len(owner) == 30
    assert all((parse(p), image.tobytes()) in facts for p, image in zip(owner, images))


@pytest.mark.parametrize("template", "123")
def test_clip_knows_pictures(template, vae, tmp_path, monkeypatch):
    listed = LISTS[f"{template} train"] + LISTS[f"{template} unseen"]
    images, owner, error = bars.drawn(listed[:: len(listed) // 5], vae)
    assert error.mean() < 10**-2.7  # 27 dB; the bar, 30 dB on all prompts, is --check's
    monkeypatch.chdir(tmp_path)  # it may not depend on the working directory
    name = f"local-dir:{HOME / 'clip'}"
    model, tokenizer = open_clip.create_model(name).eval(), open_clip.get_tokenizer(name)
    right = bars.clip_right(model, tokenizer, images, owner, listed)
    assert right.shape == (len(owner),) and right.float().mean() >= 0.8
    others = owner[len(STYLES) :] + owner[: len(STYLES)]
    assert bars.clip_right(model, tokenizer, images, others, listed).float().mean() <= 0.2
    assert Path.cwd() == tmp_path


def one_hot(scene):
    """The probabilities of a judge that is sure of a scene, head by head: (classes,)."""
    traits = [values.index(value) for values, value in zip(TRAITS, scene[3:])]
    picked = answers(scene.fact, scene.small, scene.tiny) + traits
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
    nouns = ["a cat", "a dog", "a lion"]

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
    new = dict(read_lists=lambda: few, noun_prompts=lambda: nouns, sampled=sampled, PAIRS=20)
    new |= dict(recognise=judge, probabilities=probabilities, clip_scores=clip_scores)
    for name, value in (new | dict(StableDiffusionPipeline=load)).items():
        monkeypatch.setattr(bars, name, value)
    monkeypatch.setattr(bars, "load_judge", lambda folder: torch.nn.Identity())
    assert bars.check(HOME, "cpu", tmp_path / "grid.png") is (not missed)
    rows = [line for line in capsys.readouterr().out.splitlines()[1:] if line[0] != " "]
    assert {row[:52].strip() for row in rows if row.endswith(" NO")} == missed
    assert all(row.endswith((" NO", " yes")) for row in rows) and len(rows) > 40
    assert (tmp_path / "grid.png").stat().st_size > 1000


def test_a_folder_that_is_no_model_is_refused_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        bars.check(tmp_path, "cpu")
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: ") and len(said.splitlines()) == 1
