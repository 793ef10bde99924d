"""A pipeline of random weights with the classes of Stable Diffusion, and helpers on it."""

import contextlib
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--full-size", action="store_true", help="a round of the full-size Stable "
                     "Diffusion 1.4 and ViT-H-14 with random weights: 16 GB of memory, minutes")
    parser.addoption("--kills", type=int, default=2, help="SIGKILLs of the run in test_kills.py")


os.environ["HF_HUB_OFFLINE"] = "1"  # before any hub client is imported


def make_pipeline(prediction_type="epsilon", seed=0):
    """A random `StableDiffusionPipeline`: 4x8x8 latents, 32x32 pictures, 0.5 M parameters."""
    from diffusers import (
        AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel,
    )  # fmt: skip
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(c + "</w>" for c in letters)]
    tokenizer = CLIPTokenizer(vocab={w: n for n, w in enumerate(words)}, merges=[],
                              model_max_length=12)  # fmt: skip
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=12, bos_token_id=0, eos_token_id=1))
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=32, attention_head_dim=2)
    vae = AutoencoderKL(block_out_channels=(8, 8, 8), norm_num_groups=4,
                        down_block_types=("DownEncoderBlock2D",) * 3,
                        up_block_types=("UpDecoderBlock2D",) * 3)
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                              clip_sample=False, set_alpha_to_one=False, steps_offset=1,
                              prediction_type=prediction_type)
    return StableDiffusionPipeline(vae, text, tokenizer, unet, scheduler, None, None,
                                   requires_safety_checker=False)  # fmt: skip


@pytest.fixture(scope="session")
def random_folder(tmp_path_factory):
    """The random pipeline as a diffusers folder."""
    folder = tmp_path_factory.mktemp("models") / "random"
    make_pipeline().save_pretrained(folder)
    return folder


def load_args(folder, precision="fp32", T=20, **more):
    """What `runs.load_model` reads of the flags."""
    given = dict(model=str(folder), precision=precision, T=T, eta=1.0, image_size=None,
                 prediction_type=None, checkpointing=False, compile=False,
                 channels_last=False)  # fmt: skip
    return SimpleNamespace(**given | more)


@pytest.fixture
def model(random_folder):
    """The random pipeline, loaded as `train.py` loads it, in float32 on the CPU."""
    import runs

    args = load_args(random_folder)
    return runs.load_model(args, torch.device("cpu"))


def randomise_lora(unet, scale=0.02, seed=1):
    """Non-zero LoRA weights: with the zero start most tests of them would be empty."""
    from lora import lora_parameters

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in lora_parameters(unet).items():
            if name.endswith("lora_B.weight"):
                p.copy_(scale * torch.randn(p.shape, generator=generator))


def make_small(T=6, prediction_type="epsilon"):
    """The random pipeline as `runs.load_model` would return it, T steps, straight from memory."""
    import runs
    from ddim_logprob import make_schedule

    pipe = make_pipeline(prediction_type)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.eval().requires_grad_(False)
    return runs.Model(pipe, make_schedule(pipe.scheduler, T), torch.device("cpu"), None, {})


@contextlib.contextmanager
def count_unet_samples(unet):
    """Inside, the list yielded gets the batch size of each UNet call."""
    seen = []
    hook = unet.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    try:
        yield seen
    finally:
        hook.remove()
