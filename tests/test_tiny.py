"""The bundled tiny model: its world, its files, and that each part loads as its class."""

import os
from argparse import Namespace

import numpy as np
import pytest
import torch

import tiny
from conftest import ROOT

LISTS = tiny.read_lists()
PROMPTS = [prompt for prompts in LISTS.values() for prompt in prompts]


def rng(seed=0):
    return np.random.default_rng(seed)


# ---------------------------------------------------------------- the world


def test_the_six_lists_have_the_papers_sizes():
    assert {name: len(prompts) for name, prompts in LISTS.items()} == {
        "1 train": 45, "1 unseen": 90, "2 train": 40, "2 unseen": 40, "3 train": 40,
        "3 unseen": 30}  # fmt: skip


@pytest.mark.parametrize("style", tiny.STYLES)
def test_every_prompt_and_noun_can_be_drawn(style):
    for prompt in PROMPTS + tiny.noun_prompts():
        picture = tiny.draw(prompt, style, rng())
        assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8
        assert picture.std() > 5


def test_the_same_generator_draws_the_same_picture():
    first, again = (tiny.draw("a cat riding a bike", "noto", rng(3)) for _ in range(2))
    assert (first == again).all()
    assert (first != tiny.draw("a cat riding a bike", "noto", rng(4))).any()


@pytest.mark.parametrize("prompt", ["", "a unicorn", "a cat flying a kite", "mauve apple",
                                    "cat inside vase", "red"])  # fmt: skip
def test_prompts_outside_the_world_are_refused(prompt):
    with pytest.raises(ValueError, match="cannot draw"):
        tiny.draw(prompt, "noto", rng())


def test_mirrored_prompts_are_one_fact_and_others_are_not():
    assert tiny.parse("person on sofa") == tiny.parse("sofa under person")
    assert tiny.parse("road on the left of grass") == tiny.parse("grass on the right of road")
    assert tiny.parse("tower in the front of train") == tiny.parse("train behind tower")
    assert tiny.parse("car on the left of car") == tiny.parse("car on the right of car")
    assert tiny.parse("bear on the left of person") != tiny.parse("bear on the right of person")


@pytest.mark.parametrize("template, facts", [("1", 135), ("2", 80), ("3", 60)])
def test_different_facts_look_different(template, facts):
    """Pictures of two prompts of a template differ by more than noise on the same background."""
    prompts = LISTS[f"{template} train"] + LISTS[f"{template} unseen"]
    known = sorted({tiny.parse(p) for p in prompts})
    assert len(known) == facts
    for style in tiny.STYLES:
        pictures = np.stack([tiny.draw_fact(f, style, rng(5)) for f in known]).astype(np.float32)
        flat = torch.from_numpy(pictures.reshape(len(known), -1))
        gap = torch.cdist(flat, flat) / flat.shape[1] ** 0.5  # root mean square difference
        gap.fill_diagonal_(255.0)
        at = divmod(int(gap.argmin()), len(known))
        assert gap.min() > 5, (style, [known[k] for k in at])


def test_wrong_facts_are_drawable_and_wrong():
    for prompt in PROMPTS:
        fact = tiny.parse(prompt)
        others = tiny.wrong(fact)
        assert len(others) >= 3 and fact not in others and len(set(others)) == len(others)
        assert set(others) <= set(tiny.facts()[0])


# ---------------------------------------------------------------- training


def test_training_captions_are_right_as_often_as_told():
    every, _ = tiny.facts()
    pairs = np.array([(f, s) for f in range(len(every)) for s in range(len(tiny.STYLES))])
    rows, captions, forms = tiny.CaptionSampler(pairs, rng()).batch(12_000, 0.2)
    seen = {}
    for row, caption, form in zip(rows, captions, forms):
        fact, style = pairs[row]
        prompt = tiny.captions()[caption]
        template = next((name[0] for name in LISTS if prompt in LISTS[name]), "noun")
        seen.setdefault((template, style), []).append(every[fact] == tiny.parse(prompt))
        assert form in (0, style + 1)
    for (template, style), right in seen.items():
        odds = 1.0 if template == "noun" else tiny.CORRECT[template][style]
        assert abs(np.mean(right) - odds) <= 4.5 * (odds * (1 - odds) / len(right)) ** 0.5


def test_a_training_that_was_cut_off_goes_on_where_it_was(tmp_path):
    args = Namespace(build=tmp_path, minutes=10)

    def trainer():
        torch.manual_seed(1)
        return tiny.Trainer("toy", {"net": torch.nn.Linear(3, 2)}, args, 1e-2)

    def steps(train, count):
        for k in range(train.steps, train.steps + count):
            x = torch.arange(3.0)[None] + k
            train.step(train.modules["net"](x).square().mean())

    whole = trainer()
    steps(whole, 6)
    cut = trainer()
    steps(cut, 3)
    cut.save()
    cut = trainer()
    assert cut.steps == 3
    steps(cut, 3)
    for ours, theirs in ((cut.modules.state_dict(), whole.modules.state_dict()),
                         (cut.average, whole.average)):  # fmt: skip
        assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


# ---------------------------------------------------------------- the files


def test_files_are_small_and_hold_no_pickle():
    files = [f for f in (ROOT / "tiny").rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < 30e6
    assert max(f.stat().st_size for f in files) < 15e6
    assert {f.suffix for f in files} <= {".json", ".safetensors", ".png", ".md"}


def test_the_tokenizer_has_the_worlds_words_and_survives_others():
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "tiny" / "tokenizer")
    for prompt in PROMPTS + tiny.noun_prompts():
        for text in (prompt, *tiny.style_prompts(prompt)):
            words = text.replace(",", " ,").split()
            assert len(tokenizer(text).input_ids) == len(words) + 2 <= 16, text
    for text in ("", "Ünïcode 漢字 🙂", "antidisestablishmentarianism " * 9):
        ids = tokenizer(text, padding="max_length", max_length=16, truncation=True).input_ids
        assert len(ids) == 16 and max(ids) < len(tokenizer)


def test_latents_have_the_std_that_the_unet_was_trained_for():
    vae = tiny.load_vae()
    pictures = tiny.to_tensor(tiny.draw_batch(rng(), 64)[0])
    with torch.no_grad():
        latents = vae.encode(pictures).latent_dist.mean * vae.config.scaling_factor
    assert abs(latents.std() / tiny.LATENT_STD - 1) < 0.1


@pytest.mark.parametrize("options", [{}, {"safety_checker": None}])
def test_the_pipeline_loads_draws_and_survives_saving(options, tmp_path):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(ROOT / "tiny", **options)
    pipe.save_pretrained(tmp_path)
    pictures = []
    for p in (pipe, StableDiffusionPipeline.from_pretrained(tmp_path)):
        p.set_progress_bar_config(disable=True)
        out = p("a cat washing dishes", num_inference_steps=3, output_type="np",
                generator=torch.Generator().manual_seed(1)).images  # fmt: skip
        pictures.append(out)
    assert pictures[0].shape == (1, 64, 64, 3) and np.isfinite(pictures[0]).all()
    assert (pictures[0] == pictures[1]).all()


def few(template, count=8):
    """A few prompts of a template as the autoencoder shows them, and all of the template's."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(ROOT / "tiny" / "vae")
    known = LISTS[f"{template} train"] + LISTS[f"{template} unseen"]
    images, owner, error = tiny.drawn(known[:: len(known) // count], vae)
    assert error.mean() < 10**-2.3  # 23 dB; the bar, 25 dB on all prompts, is --check's
    return images, owner, known


@pytest.mark.parametrize("template", "123")
def test_clip_and_the_judge_know_pictures(template, tmp_path, monkeypatch):
    import open_clip

    images, owner, known = few(template)
    monkeypatch.chdir(tmp_path)  # neither may depend on the working directory
    name = f"local-dir:{ROOT / 'tiny' / 'clip'}"
    model = open_clip.create_model(name).eval()
    right = tiny.clip_right(model, open_clip.get_tokenizer(name), images, owner, known)
    assert right.float().mean() >= 0.8
    judge = tiny.load_judge()
    assert tiny.recognise(judge, images, owner, known).float().mean() >= 0.8
    others = owner[len(tiny.STYLES) :] + owner[: len(tiny.STYLES)]
    assert tiny.recognise(judge, images, others, known).float().mean() <= 0.2
    assert os.getcwd() == str(tmp_path)
