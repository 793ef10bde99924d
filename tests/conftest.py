"""A pipeline of random weights with the classes of Stable Diffusion, and helpers on it."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import support  # noqa: F401  it sets what must be set before torch is imported

import pytest
import torch

torch.set_num_threads(1)
os.environ["HF_HUB_OFFLINE"] = "1"  # before any hub client is imported


def pytest_addoption(parser):
    parser.addoption(
        "--full-size",
        action="store_true",
        help="a round of the full-size Stable Diffusion 1.4 and ViT-H-14 with random weights: "
        "16 GB of memory, minutes",
    )
    parser.addoption("--kills", type=int, default=2, help="SIGKILLs of the run in test_kills.py")


@pytest.fixture(autouse=True)
def folder_of_its_own(tmp_path, monkeypatch):
    """Where a test looks at runs/, it does not find the user's."""
    monkeypatch.chdir(tmp_path)


# ---------------------------------------------------------------- the random pipeline


def make_pipeline(prediction_type="epsilon", seed=0):
    """A random `StableDiffusionPipeline`: 4x8x8 latents, 32x32 pictures, 0.2 M parameters."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(c + "</w>" for c in letters)]
    vocabulary = {w: n for n, w in enumerate(words)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=12)
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=12,
        bos_token_id=0,
        eos_token_id=1,
    )
    text = CLIPTextModel(config)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=2,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    return StableDiffusionPipeline(
        vae, text, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )


def random_sd14(folder):
    """Stable Diffusion 1.4 at full size: random bfloat16 weights, tiny's tokenizer."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    vae = dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2)
    vae["down_block_types"] = ("DownEncoderBlock2D",) * 4
    vae["up_block_types"] = ("UpDecoderBlock2D",) * 4
    text = dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
    networks = {"unet": UNet2DConditionModel(sample_size=64, cross_attention_dim=768)}
    networks |= {"vae": AutoencoderKL(**vae), "text_encoder": CLIPTextModel(CLIPTextConfig(**text))}
    networks = {name: network.bfloat16() for name, network in networks.items()}
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "tiny/tokenizer", model_max_length=77)
    pipe = StableDiffusionPipeline.from_pretrained(ROOT / "tiny", **networks, tokenizer=tokenizer)
    pipe.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def random_folder(tmp_path_factory):
    """The random pipeline as a diffusers folder."""
    folder = tmp_path_factory.mktemp("models") / "random"
    make_pipeline().save_pretrained(folder)
    return folder


def load_args(folder, precision="fp32", T=20, **more):
    """What `support.pipeline.load_pipeline` reads of the flags."""
    given = dict(model=str(folder), precision=precision, T=T, eta=1.0, guidance=5.0)
    given |= dict(image_size=None, prediction_type=None, sample_batch=8, decode_batch=8)
    given |= dict(checkpointing=False, compile=False, threads=None)
    given |= dict(model_config=None, base_lora=None)
    return SimpleNamespace(**given | more)


@pytest.fixture
def pipeline(random_folder):
    """The random pipeline, loaded as `train.py` loads it, in float32 on the CPU."""
    from support.pipeline import load_pipeline

    return load_pipeline(load_args(random_folder), torch.device("cpu"))


def make_small(T=6, prediction_type="epsilon", decode_batch=8, **more):
    """The random pipeline as `load_pipeline` would return it, T steps, straight from memory.

    more: fields of `ddim_logprob.Policy`, e.g. guidance or sample_batch.
    """
    from ddim_logprob import Policy, make_schedule
    from support.pipeline import Pipeline

    pipe = make_pipeline(prediction_type)
    for network in (pipe.unet, pipe.vae, pipe.text_encoder):
        network.eval().requires_grad_(False)
    device = torch.device("cpu")
    pipeline = Pipeline(pipe, device, (4, 8, 8), decode_batch)
    schedule = make_schedule(pipe.scheduler, T)
    pipeline.policy = Policy(
        pipe.unet, schedule, pipeline.embed, pipeline.latent_shape, device, **more
    )
    return pipeline


def randomise_lora(unet, scale=0.02, seed=1):
    """Non-zero LoRA weights: with the zero start most tests of them would be empty."""
    from lora import lora_parameters

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in lora_parameters(unet).items():
            if name.endswith("lora_B.weight"):
                p.copy_(scale * torch.randn(p.shape, generator=generator))


@contextlib.contextmanager
def count_unet_samples(unet):
    """Inside, the list yielded gets the batch size of each UNet call."""
    seen = []
    hook = unet.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    try:
        yield seen
    finally:
        hook.remove()


# ---------------------------------------------------------------- train.py on it


def brightness(images, prompts):
    """A reward that needs no model."""
    return images.mean((1, 2, 3))


def metrics(folder):
    """The lines of a run's metrics.jsonl."""
    text = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def contents(folder):
    """The bytes of every file of a run by name; of metrics.jsonl lines without seconds.

    Of config.json the settings, without the id that only this run has; the commit may change
    while the suite runs.
    """
    files = {p.relative_to(folder): p for p in Path(folder).rglob("*") if p.is_file()}
    found = {str(name): path.read_bytes() for name, path in files.items()}
    found["metrics.jsonl"] = metrics(folder)
    for line in found["metrics.jsonl"]:
        line.pop("seconds")
    found["config.json"] = json.loads(found["config.json"])
    found["config.json"].pop("wandb_id")
    found["config.json"]["made_with"].pop("commit", None)
    return found


def assert_same_run(one, two, but=()):
    """Two runs hold the same files with the same bytes; `but`: names that may differ."""
    first, second = contents(one), contents(two)
    assert first.keys() == second.keys() and len(first) > 8
    different = [name for name in first if first[name] != second[name] and name not in but]
    assert not different


def write_prompts(folder):
    """A prompt file with two prompts to train on and an unseen one."""
    path = Path(folder) / "prompts.txt"
    path.write_text("[train]\na cat\na dog\n[unseen]\na bird\n", encoding="utf-8")
    return path


def run_flags(model, prompts, *flags):
    """The flags of a small run on the random pipeline, as strings; the last of a flag counts."""
    base = ["--model", model, "--device", "cpu", "--prompts", prompts, "--T", 6, "--tau0", 4]
    base += ["--queries", 12, "--branches", 3, "--sample-batch", 12, "--micro-batch", 12]
    base += ["--decode-batch", 12, "--lr", 1e-3, "--clip-range", 1e-2, "--update-size", 4]
    return [str(flag) for flag in [*base, *flags]]


@pytest.fixture
def command(random_folder, tmp_path, monkeypatch):
    """`train.main` on the random folder with brightness as reward; returns folder, metrics.

    before-after.png is not drawn.
    """
    import rewards
    import train

    prompts = write_prompts(tmp_path)

    def go(out, *flags, reward=brightness, resume=False):
        checked = rewards.checked(reward, "brightness")
        monkeypatch.setattr(train, "load_reward", lambda *a, **k: checked)
        monkeypatch.setattr(train.report, "before_after", lambda *rest: None)  # half of the time
        if resume:
            argv = [str(flag) for flag in ["--resume", out, *flags]]
        else:
            argv = run_flags(random_folder, prompts, "--out", out, *flags)
        folder = train.main(argv)
        return folder, metrics(folder)

    return go


# Imports once, then forks for each line, a list of [flags, environment, code to begin with]
SERVER = """
import json, os, sys
import diffusers, matplotlib.pyplot, torchvision, transformers
import rewards, train

diffusers.StableDiffusionPipeline, diffusers.AutoencoderKL, diffusers.UNet2DConditionModel
transformers.CLIPTextModel, transformers.CLIPTokenizer
train.load_reward = lambda *rest: rewards.checked(lambda x, p: x.mean((1, 2, 3)), "brightness")
print("ready", flush=True)
for line in sys.stdin:
    children = []
    for flags, environment, code in json.loads(line):
        children.append(os.fork())
        if children[-1] == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.environ |= environment
            status = 1
            try:
                exec(code)
                train.main(flags)
                status = 0
            finally:
                os._exit(status)
    print(json.dumps(children), flush=True)
    ends = [os.waitpid(child, 0)[1] for child in children]
    print(json.dumps([os.waitstatus_to_exitcode(end) for end in ends]), flush=True)
"""


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """`train.main` in processes of their own, with brightness as reward, without new imports.

    start([flags, environment, code], ...) -> process ids, and a function that waits for their exit
    codes (minus the signal that ended one); `start.errors` is the file of their stderr.
    """
    folder = tmp_path_factory.mktemp("server")
    script, errors = folder / "server.py", folder / "errors.txt"
    script.write_text(SERVER)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors.open("w"))
    server = subprocess.Popen([sys.executable, str(script)], env=env, text=True, **pipes)

    def answer():
        line = server.stdout.readline()
        assert line, errors.read_text()[-2000:]
        return json.loads(line)

    def go(*runs):
        server.stdin.write(json.dumps(runs) + "\n")
        server.stdin.flush()
        return answer(), answer

    assert server.stdout.readline() == "ready\n", errors.read_text()[-2000:]
    go.errors = errors
    yield go
    server.kill()
    server.wait(timeout=60)
