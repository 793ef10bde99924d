"""Stable Diffusion in, pictures out: load, prepare, embed prompts, decode latents.

`load_pipeline` returns a `Pipeline`, whose `policy` is what the method trains. Latents and
log-probabilities are float32 in every precision; only the frozen networks may be half.
"""

import contextlib
import ctypes
import logging
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from ddim_logprob import Policy, make_schedule
from support.command import Stop, die, first_line, positive

ROOT = Path(__file__).resolve().parent.parent
SD = "stable-diffusion-v1-5/stable-diffusion-v1-5"
T, ETA, GUIDANCE = 20, 1.0, 5.0  # Table 6
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def add_model_flags(add):
    """The flags of the base model and the device, for argparse's `add_argument`."""
    add("--model", default="tiny", help="tiny, a hub id, a diffusers folder or a .safetensors file")
    add("--model-config", help="a diffusers folder whose configs a .safetensors model takes")
    add("--base-lora", help="a LoRA that is made part of the frozen base model first")
    text = "of the frozen weights (default fp16 for Stable Diffusion on CUDA, else fp32)"
    add("--precision", choices=tuple(DTYPES), help=text)
    text = (
        "what the UNet predicts (default: as the model's files say; a file of SD 2.x may need it)"
    )
    add("--prediction-type", choices=("epsilon", "v_prediction"), help=text)
    add("--device", help="cuda, cpu or mps (default: cuda where there is one, else cpu)")
    add("--threads", type=positive, help="CPU threads (default: torch's choice)")
    add("--image-size", type=positive, help="pixels a side (default: the model's own)")


def check_model_flags(args):
    """Refuse what can not work, fill in args.device and args.precision.

    args has T, eta and guidance, too. Of torchrun's processes each takes its own GPU,
    before anything touches the first one.
    """
    if not args.model:
        die("--model is empty")
    if not (1 <= args.T <= 999 and 0 < args.eta <= 1 and 0 <= args.guidance < 1e6):
        die("--T goes from 1 to 999, --eta from above 0 to 1 (Eq. 1), --guidance from 0 on")
    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if args.device == "cuda" and "LOCAL_RANK" in os.environ:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError, NotImplementedError) as problem:
        die(f"--device {args.device} is not there ({first_line(problem)}): use cpu, or another")
    if args.precision is None:
        half = args.device.startswith("cuda") and not tiny_folder(args.model)
        args.precision = "fp16" if half else "fp32"


@dataclass
class Pipeline:
    """A frozen Stable Diffusion around the policy that is trained."""

    pipe: object
    device: torch.device
    latent_shape: tuple  # (C, h, w)
    decode_batch: int = 8
    tiny: Path | None = None  # the bundled model's folder
    offload: bool = False
    policy: Policy | None = None
    cache: dict = field(default_factory=dict)  # prompt -> text embedding (L, d)

    @torch.no_grad()
    def embed(self, prompts):
        """B prompts -> (B, L, d) in the UNet's dtype, each prompt encoded once a run."""
        for prompt in dict.fromkeys(prompts):
            if prompt not in self.cache:
                tokens = self.pipe.tokenizer(prompt, verbose=False).input_ids
                if len(tokens) > self.pipe.tokenizer.model_max_length:
                    tqdm.write(f"The text encoder cuts off the end of {prompt!r}.")
                encoded = self.pipe.encode_prompt(prompt, self.device, 1, False)[0][0]
                self.cache[prompt] = encoded.to(self.pipe.unet.dtype)
        return torch.stack([self.cache[p] for p in prompts])

    @torch.no_grad()
    def decode(self, latents):
        """x_0 (B, C, h, w) on any device -> pictures (B, 3, H, W) float32 in [0, 1] on the CPU.

        Raises `Stop` where a picture is not finite: a reward would score it all the same.
        """
        require_finite(latents, "latents", "the UNet's weights, or what it trains to, overflow")
        vae = self.pipe.vae
        x_0 = latents.to(self.device, vae.dtype) / vae.config.scaling_factor
        pictures = vae.decode(x_0, return_dict=False)[0].float().cpu()
        require_finite(pictures, "pictures", "the VAE overflows")
        return (pictures / 2 + 0.5).clamp(0, 1)

    def move_others(self, reward, device):
        """With --offload, everything but the UNet to `device`: "cpu" while the UNet trains."""
        if not self.offload:
            return
        for other in (self.pipe.vae, self.pipe.text_encoder, reward):
            other.to(device)
        if self.device.type == "cuda" and device == "cpu":
            torch.cuda.empty_cache()


def require_finite(values, what, why):
    """Raise `Stop` if one of B tensors (B, ...) holds a NaN or an infinity."""
    bad = len(values) - int(values.flatten(1).isfinite().all(1).sum())
    if bad:
        raise Stop(
            f"{bad} of {len(values)} {what} are not finite: {why}. Begin a new run with "
            "--precision bf16 or fp32, or a lower --lr"
        )


def tiny_folder(model):
    """The folder of the bundled tiny model if `model` names it (or a copy of it), else None."""
    path = ROOT / "tiny" if model == "tiny" else Path(model)
    return path if os.path.isdir(path / "judge") else None


# ---------------------------------------------------------------- loading


def load_diffusers(model, dtype=torch.float32, config=None):
    """A `StableDiffusionPipeline` from a folder, a hub id or one .safetensors checkpoint.

    Ends with a clear line for another model family, a missing or damaged file, missing
    weights, an unreachable hub.
    """
    import diffusers
    import transformers
    from safetensors import safe_open

    diffusers.utils.logging.set_verbosity(logging.CRITICAL)  # its errors come as exceptions, too
    transformers.utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():  # on a terminal the bars of a download stay
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
    name = str(ROOT / "tiny") if model == "tiny" else model
    options = dict(dtype=dtype, safety_checker=None, requires_safety_checker=False)
    if name.endswith((".ckpt", ".bin", ".pt", ".pth")):
        die(f"{name} is a pickle, which can run code: convert it to .safetensors first")
    if name.endswith(".safetensors") and not os.path.isfile(name):
        die(f"no checkpoint at {name}")
    try:
        if name.endswith(".safetensors"):
            with safe_open(name, "pt") as file:
                if any("lora" in key for key in file.keys()):  # noqa: SIM118
                    die(f"{name} is a LoRA: take --base-lora {name}, and its base as --model")
            options |= {"config": config, "local_files_only": True} if config else {}
            return diffusers.StableDiffusionPipeline.from_single_file(name, **options)
        return load_folder(name, options)
    except Exception as problem:  # the hub's errors, and what a damaged file leads to
        hint = "Is the name or folder right and the hub reachable?"
        if name.endswith(".safetensors") and not config:
            hint = "Its configs come from the hub; without it: --model-config FOLDER of that model."
        if any(Path(name).glob("*/*.bin")):
            hint = "Its weights are pickles (.bin), which can run code: convert to .safetensors."
        die(f"cannot load {model}: {first_line(problem)}. {hint} The bundled model: --model tiny")


def load_folder(name, options):
    """A pipeline in diffusers' folders, here or on the hub, each network with all its weights."""
    import diffusers
    import transformers
    from diffusers import DiffusionPipeline, StableDiffusionPipeline

    index = DiffusionPipeline.load_config(name)
    if index["_class_name"] != "StableDiffusionPipeline":
        die(f"{name} is a {index['_class_name']}; only Stable Diffusion 1.x and 2.x are supported")
    scheduler = index["scheduler"][1]
    config = getattr(diffusers, scheduler).load_config(name, subfolder="scheduler")
    if not ("beta_start" in config or config.get("trained_betas")):
        die(f"{name} has a {scheduler} without betas: it is no DDPM, DDIM can not sample it")
    networks = {}
    libraries = {"unet": diffusers, "vae": diffusers, "text_encoder": transformers}
    for part, library in libraries.items():
        network = getattr(library, index[part][1])
        where = dict(subfolder=part, dtype=options["dtype"], use_safetensors=True)
        where["output_loading_info"] = True
        if library is diffusers:
            where["low_cpu_mem_usage"] = False  # with it, missing weights are a traceback
        try:
            networks[part], info = network.from_pretrained(name, **where)
        except OSError:
            networks[part], info = network.from_pretrained(name, variant="fp16", **where)
        if missing := sorted(info["missing_keys"]):
            die(f"{name}: the {part} lacks {len(missing)} weights, {missing[0]} is the first")
    return StableDiffusionPipeline.from_pretrained(name, **networks, **options)


def keep_freed_memory():
    """Let the C library keep the memory of freed tensors, where it has the choice (glibc).

    Otherwise each large tensor comes as new pages, which the system clears one by one:
    on two cores the tiny model's pictures are then decoded in 1.5 times the time.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # no glibc
        mallopt, trim_threshold, mmap_threshold = ctypes.CDLL(None).mallopt, -1, -3
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 2**30) or mallopt(mmap_threshold, 2**25)  # older: no more


def ddim_scheduler(scheduler, prediction_type=None):
    """The DDIM scheduler of another one's betas, without clipping.

    steps_offset 1 keeps sigma above 0 at the last step. from_config alone would take over
    whatever the old scheduler left out, clip_sample=True among it: a clipped step is no
    Gaussian.
    """
    from diffusers import DDIMScheduler

    settings = dict(clip_sample=False, thresholding=False, set_alpha_to_one=False)
    settings |= dict(steps_offset=1, timestep_spacing="leading")
    if prediction_type:
        settings["prediction_type"] = prediction_type
    return DDIMScheduler.from_config(scheduler.config, **settings)


def load_pipeline(args, device):
    """Load and prepare: DDIM without clipping, no safety checker, frozen weights.

    args: the flags of `add_model_flags` with T, eta, guidance, sample_batch,
    decode_batch, checkpointing and compile. Returns a `Pipeline`.
    """
    if args.threads:
        torch.set_num_threads(args.threads)
    if device.type == "cpu":
        keep_freed_memory()
    pipe = load_diffusers(args.model, DTYPES[args.precision], args.model_config)
    unet = pipe.unet.config
    if unet.addition_embed_type or unet.in_channels != unet.out_channels:
        die(f"{args.model} is an SDXL, inpainting or other model that needs more than text")
    if any(weight.is_meta for weight in pipe.text_encoder.parameters()):
        die(f"{args.model}: the text_encoder lacks weights")
    if len(pipe.tokenizer) < pipe.text_encoder.config.vocab_size:
        die(f"{args.model}: the tokenizer lacks words, so a file of it is missing")
    if args.base_lora:
        fuse_lora(pipe, args.base_lora)
    pipe.scheduler = ddim_scheduler(pipe.scheduler, args.prediction_type)
    try:
        schedule = make_schedule(pipe.scheduler, args.T, args.eta)
    except ValueError as problem:
        die(f"{args.model}: {problem}")
    size = unet.sample_size
    if args.image_size:
        unit = 8 * pipe.vae_scale_factor
        if args.image_size % unit:
            die(f"--image-size {args.image_size} must be a multiple of {unit}")
        size = args.image_size // pipe.vae_scale_factor
    height, width = (size, size) if isinstance(size, int) else size
    pipe.to(device)
    if args.checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    for network in (pipe.unet, pipe.vae, pipe.text_encoder):
        network.eval().requires_grad_(False)
    if args.compile:  # in place and at the first call, so LoRA is in it and keeps its names
        pipe.unet.compile()
    shape = (unet.in_channels, height, width)
    pipeline = Pipeline(pipe, device, shape, args.decode_batch, tiny_folder(args.model))
    pipeline.offload = getattr(args, "offload", False)
    pipeline.policy = Policy(
        pipe.unet, schedule, pipeline.embed, shape, device, args.guidance, args.sample_batch
    )
    return pipeline


def fuse_lora(pipe, path):
    """Make a LoRA, of any kind that diffusers reads, part of the frozen weights."""
    try:
        pipe.load_lora_weights(path)
        assert pipe.get_active_adapters(), "it holds no LoRA of a UNet"
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    except Exception as problem:  # of many libraries
        die(f"cannot read --base-lora {path}: {first_line(problem)}")
