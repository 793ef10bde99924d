"""The bars: held-out pictures, base samples, CLIP's choice, and the table's verdict."""

from pathlib import Path

import numpy as np
import open_clip
import pytest
from conftest import ROOT
from diffusers import AutoencoderKL

from tiny import bars
from tiny.world import HOME, STYLES, draw_fact, parse, read_lists

LISTS = read_lists()


@pytest.fixture(scope="module")
def vae():
    return AutoencoderKL.from_pretrained(ROOT / "tiny" / "vae")


def test_drawn_pictures_are_of_their_prompts_and_styles(vae):
    images, owner, error = bars.drawn(["a cat", "red apple"], vae)
    assert owner == ["a cat"] * 3 + ["red apple"] * 3 and images.shape == (6, 3, 64, 64)
    generator = np.random.default_rng(99)
    for k, image in enumerate(images):
        picture = draw_fact(parse(owner[k]), STYLES[k % 3], generator) / 255
        square = (image.permute(1, 2, 0).numpy() - picture) ** 2
        assert abs(square.mean() - error[k]) < 1e-5 and error[k] < 0.01


class Pipe:
    """Draws the prompt's length and the noise's seed."""

    def __call__(self, prompts, generator, num_inference_steps, output_type, **settings):
        assert len(prompts) == len(generator) <= 48 and num_inference_steps == 20
        assert settings == {"eta": 1.0, "guidance_scale": 5.0} and output_type == "np"
        self.images = np.zeros((len(prompts), 64, 64, 3), np.float32)
        self.images[..., 0] = np.array([len(p) for p in prompts])[:, None, None]
        self.images[..., 1] = np.array([g.initial_seed() for g in generator])[:, None, None]
        return self


def test_samples_have_noise_of_their_own_whatever_the_batch():
    prompts = ["x" * n for n in range(1, 31)]
    images, owner = bars.sampled(Pipe(), prompts, 2)
    assert owner == [p for p in prompts for _ in range(2)] and images.shape == (60, 3, 64, 64)
    assert images[:, 0, 5, 5].tolist() == [len(p) for p in owner]
    assert images[:, 1, 5, 5].tolist() == list(range(1000, 1060))


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


@pytest.mark.parametrize("share, met", [(1.0, False), (0.5, True), (0.0, False)])
def test_the_table_of_bars(share, met, vae, tmp_path, monkeypatch, capsys):
    """A base that is right too often misses a bar, as one that is right too rarely does."""
    few = {name: prompts[:2] for name, prompts in LISTS.items()}
    nouns = ["a cat", "a dog", "a lion"]
    monkeypatch.setattr(bars, "read_lists", lambda: few)
    monkeypatch.setattr(bars, "noun_prompts", lambda: nouns)

    def sampled(pipe, prompts, each):
        images, owner, _ = bars.drawn(prompts, vae)
        if prompts != nouns:  # these have to be right in any case
            end = round(share * len(images))
            images[end:] = images.roll(len(images) // 2, 0)[end:]  # of the other prompt
        return images, owner

    monkeypatch.setattr(bars, "sampled", sampled)
    assert bars.check(HOME, "cpu", tmp_path / "grid.png") is met
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 15 and (tmp_path / "grid.png").stat().st_size > 1000
    missed = [line.split(", %")[0] for line in lines if line.endswith(" NO")]
    assert missed == ([] if met else [f"base, template {t} train" for t in "123"])


def test_a_folder_that_is_no_model_is_refused_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        bars.check(tmp_path, "cpu")
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: ") and len(said.splitlines()) == 1
