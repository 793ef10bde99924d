"""Stable Diffusion in, pictures out: load, prepare, embed, denoise in batches, decode.

`Model` is what the method needs of a pipeline. The mathematics of a step is in
`ddim_logprob.py`. Latents and log-probabilities are float32 in every precision; only
the frozen networks may be half.
"""

import contextlib
import ctypes
import logging
import math
import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from ddim_logprob import ddim_mean, denoise, guided_prediction, keyed_generator, make_schedule
from processes import die

ROOT = Path(__file__).resolve().parent
SD = "CompVis/stable-diffusion-v1-4"
T, ETA, GUIDANCE = 20, 1.0, 5.0  # Table 6
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def add_model_flags(add):
    """The flags of the base model and the device, for argparse's `add_argument`."""
    add("--model", help="tiny, a hub id, a diffusers folder or a .safetensors checkpoint")
    add(
        "--precision",
        choices=tuple(DTYPES),
        help="of the frozen weights; LoRA, latents and log p are float32 "
        "(default fp16 on CUDA, else fp32)",
    )
    add(
        "--prediction-type",
        choices=("epsilon", "v_prediction"),
        help="what the UNet predicts (default: as the model's files say; "
        "a single file of SD 2.x may need it)",
    )
    add("--device", help="cuda, cpu or mps (default: cuda where there is one, else cpu)")
    add("--threads", type=count, help="CPU threads (default: torch's choice)")
    add("--image-size", type=count, help="pixels a side (default: the model's own)")
    add(
        "--offload",
        action="store_true",
        help="keep the reward model, VAE and text encoder off the device while the UNet trains",
    )


def count(text):
    """A whole number from 1 to 32767, for argparse, which names this function."""
    if not 1 <= int(text) < 2**15:
        raise ValueError
    return int(text)


def progress(items, name, total=None):
    """A bar called `name` over the items; none where the output is no terminal."""
    return tqdm(items, desc=name, total=total, leave=False, disable=None)


def parts(items, size):
    """A tensor or list in few slices of at most `size`, about equally long; none if it is empty.

    A short UNet call costs more a row than a full one.
    """
    count = math.ceil(len(items) / size)
    cuts = [len(items) * j // count for j in range(count + 1)] if count else []
    return [items[lo:hi] for lo, hi in zip(cuts, cuts[1:])]


@dataclass
class Model:
    """A frozen pipeline with its noise schedule (Eq. 1). P rows are P prompts, K branches each."""

    pipe: object
    schedule: object
    device: torch.device
    guidance: float = GUIDANCE
    sample_batch: int = 8  # states a UNet call in sampling; guidance doubles it
    decode_batch: int = 8
    tiny: Path | None = None  # the bundled model's folder
    image_size: int | None = None
    cache: dict = field(default_factory=dict)  # prompt -> text embedding (L, d)

    unet = property(lambda self: self.pipe.unet)

    @property
    def latent_shape(self):
        """(C, h, w) of a latent: of `image_size` pixels, or the model's own size."""
        config, size = self.unet.config, self.unet.config.sample_size
        size = self.image_size // self.pipe.vae_scale_factor if self.image_size else size
        return (config.in_channels, size, size)

    @torch.no_grad()
    def embed(self, prompts):
        """B prompts -> (B, L, d) in the UNet's dtype, each prompt encoded once a run."""
        for prompt in dict.fromkeys(prompts):
            if prompt not in self.cache:
                self.tell_cut(prompt)
                encoded = self.pipe.encode_prompt(prompt, self.device, 1, False)[0][0]
                self.cache[prompt] = encoded.to(self.unet.dtype)
        return torch.stack([self.cache[p] for p in prompts])

    def tell_cut(self, prompt):
        """Say what the text encoder does not see of a prompt that is too long for it."""
        tokenizer, most = self.pipe.tokenizer, self.pipe.tokenizer.model_max_length
        tokens = tokenizer(prompt, verbose=False).input_ids  # with a mark at the start and the end
        if len(tokens) > most:
            rest = tokenizer.decode(tokens[most - 1 : -1])
            tqdm.write(f"The text encoder takes {most} tokens, so {rest!r} is cut off {prompt!r}.")

    def noise(self, keys):
        """x_T: one standard normal a key, (len(keys), C, h, w) on the CPU."""
        draws = [torch.randn(self.latent_shape, generator=keyed_generator(*k)) for k in keys]
        return torch.stack(draws) if draws else torch.zeros(0, *self.latent_shape)

    def policy(self, x_t, t, prompts):
        """Eq. 1: mu_theta (B, C, h, w) and sigma_t (B, 1, 1, 1) of pi(a_t | s_t).

        x_t: (B, C, h, w) float32 on the device; t: an int, paper time; B prompts.
        Gradients flow.
        """
        times = torch.full((len(x_t),), t)
        cond, uncond = self.embed(prompts), self.embed([""])
        prediction = guided_prediction(
            self.unet, self.schedule, x_t, times, cond, uncond, self.guidance
        )
        return ddim_mean(self.schedule, prediction, x_t, times)

    def _batches(self, x, start, stop, prompts, keys, keep):
        """`ddim_logprob.denoise` of P roots with K keys each, in batches, results on the CPU."""
        K = len(keys[0]) if keys else 1
        for rows in progress(parts(range(len(keys)), max(1, self.sample_batch // K)), "sampling"):
            generators = [keyed_generator(*key) for p in rows for key in keys[p]]
            cond = self.embed([prompts[p] for p in rows])
            if x is None:  # x_T comes first out of each key
                draws = [torch.randn(self.latent_shape, generator=g) for g in generators]
                x_batch = torch.stack(draws).to(self.device)
            else:
                x_batch = x[rows.start : rows.stop].to(self.device)
            out = denoise(
                self.unet,
                self.schedule,
                x_batch,
                start,
                stop,
                cond,
                self.embed([""]),
                self.guidance,
                generators,
                keep,
            )
            yield [v.cpu().unflatten(0, (-1, K)) for v in (out if keep else [out])]

    def denoise(self, x, start, stop, prompts, keys):
        """Steps t = start..stop+1 of P states with a key of noise each: x_stop (P, C, h, w).

        x: (P, C, h, w), or None to draw x_T from the keys as well. Noise does not
        depend on the batches.
        """
        out = [x[:, 0] for (x,) in self._batches(x, start, stop, prompts, [[k] for k in keys], 0)]
        return torch.cat(out) if out else torch.zeros(0, *self.latent_shape)

    def branch(self, x, start, stop, prompts, keys):
        """BS, Sec. 3.3: K branches of each x_start, with all that training needs of them.

        x: (P, C, h, w); keys: P lists of K. Branches share x_start, so their first step
        is one UNet call a root. Returns the states x_start..x_stop (P, K, start - stop
        + 1, C, h, w) and log p_old of the steps between them (P, K, start - stop), on
        the CPU.
        """
        out = [v[1:] for v in self._batches(x, start, stop, prompts, keys, True)]
        if not out:
            return torch.zeros(0, 1, start - stop + 1, *self.latent_shape), torch.zeros(0)
        return tuple(torch.cat(v) for v in zip(*out))

    def finish(self, x, stop, prompts, keys):
        """The steps t = stop..1 that follow an interval and are not trained: x_0 of x_stop.

        x, x_0: (P, K, C, h, w); keys: P lists of K, as for `branch`.
        """
        if stop == 0:
            return x
        owners = [prompt for prompt in prompts for _ in range(x.shape[1])]
        rest = [(*key, "rest") for branches in keys for key in branches]
        x_0 = self.denoise(x.flatten(0, 1), stop, 0, owners, rest)
        return x_0.unflatten(0, x.shape[:2])

    @torch.no_grad()
    def decode(self, latents):
        """x_0 (B, C, h, w) on any device -> pictures (B, 3, H, W) float32 in [0, 1] on the CPU."""
        vae, out = self.pipe.vae, []
        for x_0 in latents.split(self.decode_batch):
            x_0 = x_0.to(self.device, vae.dtype) / vae.config.scaling_factor
            images = vae.decode(x_0, return_dict=False)[0].float().cpu()
            out.append((images / 2 + 0.5).clamp(0, 1))
        return torch.cat(out)

    def move_others(self, reward, device):
        """Everything but the UNet to `device`: "cpu" while the UNet trains, with --offload."""
        for other in (self.pipe.vae, self.pipe.text_encoder, reward):
            other.to(device)
        if self.device.type == "cuda" and device == "cpu":
            torch.cuda.empty_cache()


def tiny_folder(model):
    """The folder of the bundled tiny model if `model` names it (or a copy of it), else None."""
    path = ROOT / "tiny" if model == "tiny" else Path(model)
    return path if os.path.isdir(path / "judge") else None


def choose_device(args):
    """Fill in args.device and args.precision, or refuse a device that torch can not see.

    Of torchrun's processes each takes its own GPU, before anything touches the first
    one.
    """
    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cuda" and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        have = torch.cuda.device_count()
        if int(os.environ["LOCAL_RANK"]) >= have:
            die(f"this machine has {have} GPUs: torchrun --nproc_per_node {have} at most")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    try:
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError, NotImplementedError):
        die(f"--device {args.device} is not there: use cpu, or a device that torch can see")


def default_precision(args):
    """fp16 for Stable Diffusion on CUDA, fp32 elsewhere."""
    on_gpu = args.device.startswith("cuda") and not tiny_folder(args.model)
    return "fp16" if on_gpu else "fp32"


def load_pipeline(model, dtype=torch.float32):
    """A `StableDiffusionPipeline` from a folder, a hub id or one .safetensors checkpoint.

    Ends with a clear line for another model family, a missing file, an unreachable hub.
    """
    import diffusers
    import transformers
    from diffusers import DiffusionPipeline, StableDiffusionPipeline

    diffusers.utils.logging.set_verbosity(logging.CRITICAL)  # its errors come as exceptions, too
    # `Model.tell_cut` says it better
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)
    if not sys.stderr.isatty():  # on a terminal the bars of a download stay
        for library in (diffusers, transformers):
            library.utils.logging.disable_progress_bar()
    name = str(ROOT / "tiny") if model == "tiny" else model
    options = dict(dtype=dtype, safety_checker=None, requires_safety_checker=False)
    if name.endswith(".ckpt"):
        die(f"{name} is a pickle, which can run code: convert it to .safetensors first")
    if name.endswith(".safetensors") and not os.path.isfile(name):
        die(f"no checkpoint at {name}")
    try:
        if name.endswith(".safetensors"):
            pipe = StableDiffusionPipeline.from_single_file(name, **options)
        else:
            family = DiffusionPipeline.load_config(name)["_class_name"]
            if family != "StableDiffusionPipeline":
                die(f"{model} is a {family}; only Stable Diffusion 1.x and 2.x are supported")
            pipe = StableDiffusionPipeline.from_pretrained(name, use_safetensors=True, **options)
    except Exception as problem:  # the hub's errors, and what a damaged file leads to
        first = (str(problem).strip() or repr(problem)).splitlines()[0][:200]
        die(
            f"cannot load {model}: {first}. Is the name or folder right and the hub reachable? "
            "The bundled model needs neither: --model tiny"
        )
    unet = pipe.unet.config
    if unet.addition_embed_type or unet.in_channels != unet.out_channels:
        die(
            f"{model} is an SDXL, inpainting or other model; only Stable Diffusion 1.x and 2.x "
            "that draw from text alone are supported"
        )
    return pipe


def keep_freed_memory():
    """Let the C library keep the memory of freed tensors, where it has the choice (glibc).

    Otherwise each large tensor comes as new pages, which the system clears one by one:
    on two cores the tiny model's pictures are then decoded in 1.5 times the time.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # no glibc
        mallopt, trim_threshold, mmap_threshold = ctypes.CDLL(None).mallopt, -1, -3
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 2**30) or mallopt(mmap_threshold, 2**25)  # older: no more


def load_model(args, device):
    """Load and prepare a pipeline: DDIM without clipping, no safety checker, frozen weights.

    args: the flags of `add_model_flags` with T, eta, guidance, sample_batch,
    decode_batch, checkpointing, compile and channels_last. Returns a `Model`.
    """
    from diffusers import DDIMScheduler
    from diffusers.models.attention_processor import AttnProcessor

    if device.type == "cpu":
        keep_freed_memory()
    pipe = load_pipeline(args.model, DTYPES[args.precision])
    named = {"prediction_type": args.prediction_type} if args.prediction_type else {}
    # steps_offset 1 keeps sigma above 0 at the last step. from_config alone would take
    # over whatever the old scheduler left out, clip_sample=True among it: a clipped
    # step is no Gaussian.
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config,
        clip_sample=False,
        thresholding=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
        **named,
    )
    try:
        schedule = make_schedule(pipe.scheduler, args.T, args.eta)
    except ValueError as problem:
        die(f"{args.model}: {problem}")
    unit = 8 * pipe.vae_scale_factor
    if args.image_size and args.image_size % unit:
        die(f"--image-size {args.image_size} must be a multiple of {unit}")
    pipe.to(device)
    if args.checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    for network in (pipe.unet, pipe.vae, pipe.text_encoder):
        network.eval().requires_grad_(False)
    if args.compile:  # in place and at the first call, so LoRA is in it and keeps its names
        if device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
            die("--compile needs a C++ compiler on the CPU (g++, or the one that CXX names)")
        pipe.unet.compile()
    if device.type == "cpu" and (args.compile or args.precision != "fp32"):
        # On a CPU the backward pass of torch's fused attention takes more than twice
        # the time in half precision, and the compiler makes faster code out of plain
        # attention.
        pipe.unet.set_attn_processor(AttnProcessor())
    for network in (pipe.unet, pipe.vae) if args.channels_last else ():
        network.to(memory_format=torch.channels_last)
    return Model(
        pipe,
        schedule,
        device,
        args.guidance,
        args.sample_batch,
        args.decode_batch,
        tiny_folder(args.model),
        args.image_size,
    )
