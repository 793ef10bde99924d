"""The parts before training: they fit the committed weights, and the tokenizer fits the world."""

import json

import pytest
import torch
from conftest import ROOT
from safetensors import safe_open
from transformers import CLIPTokenizer

from tiny import networks, world

HOME = ROOT / "tiny"
PROMPTS = [prompt for prompts in world.read_lists().values() for prompt in prompts]


def new_clip():
    from open_clip.model import CLIP

    return CLIP(**networks.clip_config(981)["model_cfg"])


@pytest.mark.parametrize(
    "make, file",
    [
        (networks.new_autoencoder, "vae/diffusion_pytorch_model"),
        (networks.new_unet, "unet/diffusion_pytorch_model"),
        (lambda: networks.new_text_encoder(981), "text_encoder/model"),
        (networks.new_judge, "judge/model"),
        (new_clip, "clip/open_clip_model"),
    ],
)
def test_networks_have_the_shapes_of_the_committed_weights(make, file):
    with torch.device("meta"):
        shapes = {name: list(v.shape) for name, v in make().state_dict().items()}
    with safe_open(HOME / f"{file}.safetensors", "pt") as weights:
        names = weights.keys()
        assert shapes == {name: weights.get_slice(name).get_shape() for name in names}


@pytest.mark.parametrize(
    "make, file",
    [
        (networks.new_autoencoder, "vae/config.json"),
        (networks.new_unet, "unet/config.json"),
        (lambda: networks.new_text_encoder(981), "text_encoder/config.json"),
        (networks.new_judge, "judge/config.json"),
        (networks.new_scheduler, "scheduler/scheduler_config.json"),
    ],
)
def test_networks_have_the_settings_of_the_committed_ones(make, file):
    with torch.device("meta"):
        config = make().config
    config = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    config = json.loads(json.dumps(config, default=str))
    kept = json.loads((HOME / file).read_text())
    free = {"scaling_factor", "dtype", "architectures", "transformers_version", "calibration"}
    for name, value in kept.items():
        if not name.startswith("_") and name not in free:
            assert config[name] == value, name


def test_the_scheduler_never_has_sigma_zero():
    scheduler = networks.new_scheduler()
    scheduler.set_timesteps(20)
    last = scheduler.timesteps[-1].item()
    assert last == 1 and scheduler._get_variance(last, last - 50) > 0


def test_the_tokenizer_has_the_worlds_words_and_survives_others():
    tokenizer = CLIPTokenizer.from_pretrained(HOME / "tokenizer")
    for prompt in PROMPTS + world.noun_prompts():
        for text in (prompt, *world.style_prompts(prompt)):
            words = text.replace(",", " ,").split()
            assert len(tokenizer(text).input_ids) == len(words) + 2 <= 16, text
    for text in ("", "Ünïcode 漢字 🙂", "antidisestablishmentarianism " * 9):
        ids = networks.token_ids(tokenizer, [text])
        assert ids.shape == (1, 16) and ids.max() < len(tokenizer)


def test_a_tokenizer_is_made_once_and_kept(tmp_path):
    made = networks.new_tokenizer(tmp_path)
    texts = [text for p in world.captions() for text in world.style_prompts(p)]
    ids = networks.token_ids(made, texts)
    # the end has the largest id, and every word, the comma too, is one token
    lengths = torch.tensor([len(text.replace(",", " ,").split()) for text in texts])
    assert (ids.argmax(1) == lengths + 1).all() and ids.max() == len(made) - 1
    for kept in (
        networks.new_tokenizer(tmp_path),
        CLIPTokenizer.from_pretrained(tmp_path / "tokenizer"),
    ):
        assert (networks.token_ids(kept, texts) == ids).all()


def test_the_committed_tokenizer_is_read_as_it_is():
    ours, theirs = networks.new_tokenizer(HOME), CLIPTokenizer.from_pretrained(HOME / "tokenizer")
    texts = [*world.captions(), "Ünïcode 漢字 🙂", "", "a unicorn, noto style"]
    assert (networks.token_ids(ours, texts) == networks.token_ids(theirs, texts)).all()
