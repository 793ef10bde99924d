"""The bars: held-out pictures, base samples, CLIP's choice, and the table's verdict."""

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from conftest import ROOT
from diffusers import AutoencoderKL

from tiny import bars
from tiny.sprites import HOME, STYLES
from tiny.world import draw_scene, parse, read_lists, right_scene

LISTS = read_lists()


@pytest.fixture(scope="module")
def vae():
    return AutoencoderKL.from_pretrained(ROOT / "tiny" / "vae")


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


@pytest.mark.parametrize("cue", ["fact", "small", "tiny"])
def test_a_pair_differs_by_its_cue_alone(cue, monkeypatch):
    monkeypatch.setattr(bars, "through", lambda vae, drawings: (np.stack(drawings), None))
    right, wrong, owner = bars.cue_pairs(LISTS["1 train"], None, cue, 12)
    apart = (right != wrong).any(3)
    assert len(owner) == 12 and apart.any((1, 2)).all()
    if cue != "fact":  # a corner, but for the antialiased edges nothing else
        assert apart[:, 20:44, 20:44].sum() == 0 and apart.sum((1, 2)).max() < 300


def test_spoiled_pictures_are_of_other_than_their_prompt(vae):
    images, owner = bars.spoiled(vae, 30)
    assert images.shape == (30, 3, 64, 64) and len(owner) == 30
    assert all(parse(prompt) for prompt in owner)


@pytest.mark.parametrize("template", "123")
def test_clip_knows_pictures(template, vae, tmp_path, monkeypatch):
    known = LISTS[f"{template} train"] + LISTS[f"{template} unseen"]
    images, owner, error = bars.drawn(known[:: len(known) // 8], vae)
    assert error.mean() < 10**-2.3  # 23 dB; the bar, 25 dB on all prompts, is --check's
    monkeypatch.chdir(tmp_path)  # it may not depend on the working directory
    name = f"local-dir:{ROOT / 'tiny' / 'clip'}"
    model, tokenizer = open_clip.create_model(name).eval(), open_clip.get_tokenizer(name)
    right = bars.clip_right(model, tokenizer, images, owner, known)
    assert right.shape == (len(owner),) and right.float().mean() >= 0.8
    others = owner[len(STYLES) :] + owner[: len(STYLES)]
    assert bars.clip_right(model, tokenizer, images, others, known).float().mean() <= 0.2
    assert Path.cwd() == tmp_path


@pytest.mark.parametrize("share, met", [(1.0, False), (0.4, True), (0.0, False)])
def test_the_table_of_bars(share, met, vae, tmp_path, monkeypatch, capsys):
    """A base that is right too often misses a bar, as one that is right too rarely does."""
    few = {name: prompts[:10] for name, prompts in LISTS.items()}
    nouns = ["a cat", "a dog", "a lion"]
    monkeypatch.setattr(bars, "read_lists", lambda: few)
    monkeypatch.setattr(bars, "noun_prompts", lambda: nouns)
    monkeypatch.setattr(bars, "PAIRS", 20)

    def sampled(pipe, prompts, count):
        images, owner, _ = bars.drawn(prompts, vae)
        if prompts != nouns:  # these have to be right in any case
            keep = torch.linspace(0, 0.999, len(images)) < share
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
            keep = keep[order]
            images = torch.where(keep[:, None, None, None], images, images.roll(3, 0))
        return images, owner

    monkeypatch.setattr(bars, "sampled", sampled)
    assert bars.check(HOME, "cpu", tmp_path / "grid.png") is met
    lines = capsys.readouterr().out.splitlines()
    assert (tmp_path / "grid.png").stat().st_size > 1000
    missed = [line for line in lines if line.endswith(" NO")]
    if not met:
        assert {f"4 base, template {t} train" for t in "123"} <= {m[:25].strip() for m in missed}


def test_a_folder_that_is_no_model_is_refused_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        bars.check(tmp_path, "cpu")
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: ") and len(said.splitlines()) == 1
