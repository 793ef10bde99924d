"""What surrounds a run and is not the paper: loading, run folder, resuming, pictures, processes.

A run writes one folder, nothing but text, pictures and safetensors, each file aside first and then
renamed, so that a stop at any moment leaves the old file or the new one:
    config.json, metrics.jsonl (a line a round), checkpoint.safetensors (LoRA, optimizer, and in
    its header the round and the reward history), pytorch_lora_weights.safetensors (what diffusers'
    `load_lora_weights(folder)` reads), webui_lora.safetensors (the same for web UIs), README.md (a
    model card), grids/*.png, before.json, after.json, summary.json; tensorboard/ with its flag.
There is no random state to keep: all noise comes from keyed generators (see `ddim_logprob.py`).
"""

import contextlib
import ctypes
import hashlib
import importlib.util
import json
import logging
import math
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

HERE = Path(__file__).resolve().parent
SD = "CompVis/stable-diffusion-v1-4"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Settings for Stable Diffusion at 512x512 by the memory of one GPU; the gradient is the same in
# all (trap 10). `python bench.py --part memory` measures what a sample in training holds.
PRESETS = {
    "16gb": dict(sample_batch=8, micro_batch=4, decode_batch=2, offload=True),
    "24gb": dict(sample_batch=16, micro_batch=8, decode_batch=4, offload=True),
    # in each of 8 processes: torchrun --nproc_per_node 8
    "8x24gb": dict(sample_batch=16, micro_batch=8, decode_batch=4, offload=True),
}


# Flags that may be given beside --resume: they change no expectation
WITH_RESUME = ("resume", "threads", "checkpointing", "offload", "tensorboard", "compile",
               "channels_last", "sample_batch", "micro_batch", "decode_batch")  # fmt: skip


def add_flags(add):
    """The flags of what surrounds a run, for argparse's `add_argument`."""
    add("--model", help="tiny, a hub id, a diffusers folder or a .safetensors checkpoint")
    add("--precision", choices=tuple(DTYPES), help="of the frozen weights; LoRA, latents and "
        "log p are float32 (default fp16 on CUDA, else fp32)")  # fmt: skip
    add("--prediction-type", choices=("epsilon", "v_prediction"), help="what the UNet predicts "
        "(default: as the model's files say; a single file of SD 2.x may need it)")  # fmt: skip
    add("--device", help="cuda, cpu or mps (default: cuda where there is one, else cpu)")
    add("--threads", type=int, help="CPU threads (default: torch's choice)")
    add("--image-size", type=int, help="pixels a side (default: the model's own)")
    add("--preset", choices=tuple(PRESETS), help="batch sizes and --offload for "
        "Stable Diffusion in this much GPU memory; flags that you give win")  # fmt: skip
    add("--checkpointing", action="store_true", help="compute the UNet's activations twice instead "
        "of keeping them: far less memory, about a third more time in training")  # fmt: skip
    add("--offload", action="store_true", help="keep the reward model, VAE and text encoder off "
        "the device while the UNet trains")  # fmt: skip
    add("--compile", action="store_true", help="torch.compile the UNet: minutes at the start, then "
        "faster calls; needs a C++ compiler on the CPU")  # fmt: skip
    add("--channels-last", action="store_true", help="the other memory format of UNet and VAE: "
        "faster for some models and machines, slower for others")  # fmt: skip
    add("--out", help="run folder (default runs/<model>-<reward>-<prompts>-<method>-seed<seed>)")
    add("--resume", metavar="RUN", help="go on with the run in this folder, with its settings")
    add("--tensorboard", action="store_true", help="write the metrics for TensorBoard as well")


def fill_preset(args):
    """Settings of --preset where the user gave none."""
    for name, value in PRESETS.get(args.preset, {}).items():
        if getattr(args, name) is None or getattr(args, name) is False:
            setattr(args, name, value)


def die(message):
    """Bad input: one clear line, exit code 2, no traceback."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


class Stop(Exception):
    """The run can not go on; the message says why and what to do."""


def stop_if_hopeless(in_a_row):
    """Raises Stop once so many updates in a row had a NaN or infinite gradient."""
    if in_a_row >= 5:
        raise Stop(f"{in_a_row} updates in a row had a NaN or infinite gradient. Lower --lr or "
                   "--clip-range, or take --precision bf16 or fp32")  # fmt: skip


@contextlib.contextmanager
def resumable(folder):
    """Inside, a stop of any kind ends with the reason and the command that resumes the run."""
    here, rank = os.environ.get("LOCAL_WORLD_SIZE"), os.environ.get("RANK", "0")
    command = f"torchrun --nproc_per_node {here}" if here else "python"
    again = f"Finished rounds are saved. To go on: {command} train.py --resume {folder}"

    def end(reason):
        saved = (Path(folder) / "checkpoint.safetensors").exists()
        return f"{reason}. {again}" if saved else f"{reason}."

    try:
        yield
    except KeyboardInterrupt:
        if rank == "0":
            print("\n" + end("Stopped"), file=sys.stderr)
        raise SystemExit(130) from None
    except Stop as problem:
        die(end(problem))
    except torch.OutOfMemoryError:
        die(end("out of GPU memory: lower --micro-batch (the gradient stays the same), "
                "--sample-batch or --decode-batch, or add --checkpointing --offload"))  # fmt: skip
    except OSError as problem:
        die(end(f"cannot write to {folder}: {problem.strerror or problem}"))


# ---------------------------------------------------------------- prompts


def read_prompts(path):
    """A prompt file -> {section: [prompts]}; a file without [section] lines has one, ""."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        die(f"cannot read the prompt file {path}: {getattr(problem, 'strerror', problem)}")
    lists, section = {}, ""
    for line in map(str.strip, lines):
        if line.startswith("[") and line.endswith("]"):
            section = line[1:-1]
        elif line and not line.startswith("#"):
            lists.setdefault(section, []).append(line)
    return lists or die(f"the prompt file {path} holds no prompt: write one a line")


def load_prompts(template, path=None):
    """Training and unseen prompts: of a template of the paper (App. H), or of the user's file.

    A user's file without sections has no unseen prompts; one with [train] and [unseen] has both.
    """
    lists = read_prompts(path or HERE / "prompts.txt")
    if path is None:
        return lists[f"{template} train"], lists[f"{template} unseen"]
    train = lists.get("train", lists.get(""))
    return train or die(f"{path} has sections but none is called [train]"), lists.get("unseen", [])


# ---------------------------------------------------------------- the model


@dataclass
class Model:
    """What the method needs of a pipeline. `embed` caches a prompt's text embedding (L, d)."""

    pipe: object
    schedule: object
    device: torch.device
    tiny: Path | None
    cache: dict
    image_size: int | None = None

    unet = property(lambda self: self.pipe.unet)

    @property
    def latent_shape(self):
        """(C, h, w) of a latent: of `image_size` pixels, or the model's own size."""
        config, size = self.pipe.unet.config, self.pipe.unet.config.sample_size
        size = self.image_size // self.pipe.vae_scale_factor if self.image_size else size
        return (config.in_channels, size, size)

    @torch.no_grad()
    def embed(self, prompts):
        """B prompts -> (B, L, d) in the UNet's dtype, each prompt encoded once a run."""
        for prompt in dict.fromkeys(prompts):
            if prompt not in self.cache:
                encoded = self.pipe.encode_prompt(prompt, self.device, 1, False)[0][0]
                self.cache[prompt] = encoded.to(self.unet.dtype)
        return torch.stack([self.cache[p] for p in prompts])

    @torch.no_grad()
    def decode(self, latents, batch):
        """x_0 (B, C, h, w) on any device -> pictures (B, 3, H, W) float32 in [0, 1] on the CPU."""
        vae, out = self.pipe.vae, []
        for part in latents.split(batch):
            part = part.to(self.device, vae.dtype) / vae.config.scaling_factor
            out.append((vae.decode(part, return_dict=False)[0].float().cpu() / 2 + 0.5).clamp(0, 1))
        return torch.cat(out)


@contextlib.contextmanager
def offloaded(model, reward, args):
    """Inside, with --offload, only the UNet is on the device."""
    others = (model.pipe.vae, model.pipe.text_encoder, reward) if args.offload else ()
    for part in others:
        part.to("cpu")
    if args.offload and model.device.type == "cuda":
        torch.cuda.empty_cache()
    try:
        yield
    finally:
        for part in others:
            part.to(model.device)


def tiny_folder(model):
    """The folder of the bundled tiny model if `model` names it (or a copy of it), else None."""
    path = HERE / "tiny" if model == "tiny" else Path(model)
    return path if (path / "judge").is_dir() else None


def choose_device(args):
    """Fill in args.device, or refuse one that torch can not see.

    Of torchrun's processes each takes its own GPU, before anything touches the first one.
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


def default_precision(device, is_tiny):
    return "fp16" if device.startswith("cuda") and not is_tiny else "fp32"


def load_pipeline(model, dtype=torch.float32):
    """A `StableDiffusionPipeline` from a folder, a hub id or one .safetensors checkpoint.

    Ends with a clear line for another model family, a missing file, an unreachable hub.
    """
    import diffusers
    import transformers
    from diffusers import DiffusionPipeline, StableDiffusionPipeline

    diffusers.utils.logging.set_verbosity(logging.CRITICAL)  # its errors come as exceptions, too
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    name = str(HERE / "tiny") if model == "tiny" else model
    options = dict(dtype=dtype, safety_checker=None, requires_safety_checker=False)
    try:
        if name.endswith(".ckpt"):
            die(f"{name} is a pickle, which can run code: convert it to .safetensors first")
        if name.endswith(".safetensors"):
            if not Path(name).is_file():
                die(f"no checkpoint at {name}")
            pipe = StableDiffusionPipeline.from_single_file(name, **options)
        else:
            family = DiffusionPipeline.load_config(name)["_class_name"]
            if family != "StableDiffusionPipeline":
                die(f"{model} is a {family}; only Stable Diffusion 1.x and 2.x are supported")
            pipe = StableDiffusionPipeline.from_pretrained(name, use_safetensors=True, **options)
    except (OSError, ValueError, KeyError) as problem:  # hub errors are OSErrors
        first = (str(problem).strip() or repr(problem)).splitlines()[0][:200]
        die(f"cannot load {model}: {first}. Is the name or folder right and the hub reachable? "
            "The bundled model needs neither: --model tiny")  # fmt: skip
    unet = pipe.unet.config
    if unet.addition_embed_type or unet.in_channels != unet.out_channels:
        die(f"{model} is an SDXL, inpainting or other model; only Stable Diffusion 1.x and 2.x "
            "that draw from text alone are supported")  # fmt: skip
    return pipe


def keep_freed_memory():
    """Let the C library keep the memory of freed tensors, where it has the choice (glibc).

    By default it hands them back to the system, which clears their pages anew at the next touch,
    one by one. Tensors of a GB and more still get their own pages, which are never kept.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # no glibc
        mallopt, trim_threshold, mmap_threshold = ctypes.CDLL(None).mallopt, -1, -3
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 2**30) or mallopt(mmap_threshold, 2**25)  # older ones take no more


def load_model(args, device):
    """Load and prepare a pipeline: DDIM without clipping (trap 11), no safety checker, frozen."""
    from diffusers import DDIMScheduler
    from diffusers.models.attention_processor import AttnProcessor

    from ddim_logprob import make_schedule

    if device.type == "cpu":
        keep_freed_memory()
    pipe = load_pipeline(args.model, DTYPES[args.precision])
    told = {"prediction_type": args.prediction_type} if args.prediction_type else {}
    # steps_offset 1 keeps sigma above 0 at the last step (trap 3); from_config alone would take
    # over whatever the old scheduler left out, clip_sample=True among it.
    pipe.scheduler = DDIMScheduler.from_config(
        pipe.scheduler.config, clip_sample=False, thresholding=False, set_alpha_to_one=False,
        steps_offset=1, timestep_spacing="leading", **told)  # fmt: skip
    try:
        schedule = make_schedule(pipe.scheduler, args.T, args.eta)
    except ValueError as problem:
        die(f"{args.model}: {problem}")
    if args.image_size and args.image_size % (8 * pipe.vae_scale_factor):
        die(f"--image-size {args.image_size} must be a multiple of {8 * pipe.vae_scale_factor}")
    pipe.to(device)
    if args.checkpointing:
        pipe.unet.enable_gradient_checkpointing()
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.eval().requires_grad_(False)
    if args.compile:  # in place and at the first call, so LoRA is in it and keeps its names
        if device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
            die("--compile needs a C++ compiler on the CPU (g++, or the one that CXX names)")
        pipe.unet.compile()
    if device.type == "cpu" and (args.compile or args.precision != "fp32"):
        # torch's fused attention is faster in float32 alone: its half-precision backward takes
        # more than twice the time, and out of plain attention the compiler makes faster code
        pipe.unet.set_attn_processor(AttnProcessor())
    for part in (pipe.unet, pipe.vae) if args.channels_last else ():
        part.to(memory_format=torch.channels_last)
    return Model(pipe, schedule, device, tiny_folder(args.model), {}, args.image_size)


def load_judge(model, candidates):
    """The tiny model's judge, never a reward: (pictures, prompts) -> (B,) bool; None elsewhere."""
    if model.tiny is None:
        return None
    import tiny

    judge = tiny.load_judge(model.tiny / "judge")
    try:
        [tiny.parse(prompt) for prompt in candidates]
    except ValueError:  # a user's own prompts, which the judge has never seen
        return None
    return lambda images, prompts: tiny.recognise(judge, images, prompts, candidates)


# ---------------------------------------------------------------- files


@contextlib.contextmanager
def aside(path):
    """A name to write to; renamed to `path` once the writing is done."""
    part = Path(f"{path}.part")
    yield part
    os.replace(part, path)


def write_json(path, data):
    with aside(path) as part:
        part.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def write_safetensors(path, tensors, metadata=None):
    """Tensors by name, and a flat dict of strings for the file's header."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with aside(path) as part:
        try:
            save_file({k: v.contiguous() for k, v in tensors.items()}, part, metadata=metadata)
        except SafetensorError as problem:  # how the library reports a full disk
            raise OSError(str(problem)) from problem


def write_lora(folder, state):
    """The LoRA `state` under diffusers' names and under those of web UIs."""
    from lora import webui_state

    write_safetensors(folder / "pytorch_lora_weights.safetensors", state)
    write_safetensors(folder / "webui_lora.safetensors", webui_state(state))


def method_slug(args):
    """The algorithm and its strategies for the name of a folder, e.g. ddpo-bpt-bs."""
    bpt = [] if args.no_bpt else ["bpt" if args.interval == "backward" else "forward"]
    return "-".join([args.algo, *bpt, *([] if args.no_bs else ["bs"])])


def default_folder(args):
    """runs/<model>-<reward>-<prompts>-<method>-seed<seed>"""
    prompts = Path(args.prompts).stem if args.prompts else f"template{args.template}"
    parts = [Path(args.model).stem, Path(args.reward).name.replace(".py:", "-"), prompts]
    return "runs/" + "-".join([*parts, method_slug(args), f"seed{args.seed}"])


def first_line(args, world):
    """Which model is trained on what, and which flag chooses the other."""
    processes = f", {world} processes" if world > 1 else ""
    other = f"--model {SD}" if tiny_folder(args.model) else "--model tiny"
    name = "the bundled tiny model" if tiny_folder(args.model) else args.model
    return f"Training {name} on {args.device} ({args.precision}{processes}); {other} for the other."


def holds_run(args):
    """args.out if a run is in it and it is not to be resumed, else None.

    Only the first process looks: by the time that another does, the first may have begun.
    """
    if args.resume or os.environ.get("RANK", "0") != "0":
        return None
    return args.out if (Path(args.out) / "config.json").exists() else None


def open_folder(args, first, rank):
    """The run folder: made new, or of the run to resume with its metrics cut to `first` rounds."""
    folder = Path(args.resume or args.out)
    if rank > 0:
        return folder
    if args.resume:
        keep_metrics(folder, first)
        return folder
    (folder / "grids").mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", {k: v for k, v in vars(args).items() if k != "resume"})
    return folder


def read_config(folder):
    """The settings of the run in `folder`."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        assert config["rounds"] and config["model"]
        return config
    except (OSError, ValueError, KeyError, TypeError, AssertionError):
        die(f"{folder} holds no run: there is no config.json of a run in it")


def resumed_settings(args, parser, check):
    """The settings of the run that args.resume names, but for the flags of `WITH_RESUME`.

    `check` refuses what cannot work, among these flags and in a config.json that was edited.
    """
    given = [k for k, v in vars(args).items() if v != parser.get_default(k)]
    if other := [f"--{k.replace('_', '-')}" for k in given if k not in WITH_RESUME]:
        die(f"--resume takes all settings from the run: leave out {', '.join(other)}")
    kept = {k: v for k, v in vars(args).items() if k in given}
    before = {"skip_last": 0}  # what a run of an earlier version did not write down
    args.__dict__.update(before | read_config(args.resume) | kept)
    choose_device(args)
    try:
        return check(args)
    except TypeError:
        die(f"{args.resume}/config.json is damaged: a setting is missing or not a number")


def fingerprint(folder):
    """Of the settings and the prompt file that a checkpoint belongs to; "" outside of a run.

    Where the run lies and what `WITH_RESUME` may change do not count.
    """
    if not (Path(folder) / "config.json").exists():
        return ""
    config = read_config(folder)
    config = {k: v for k, v in config.items() if v and k not in (*WITH_RESUME, "out", "device")}
    prompts = Path(config.pop("prompts", ""))  # ".", no file, for the paper's own
    text = prompts.read_text(encoding="utf-8") if prompts.is_file() else ""
    return hashlib.sha256(json.dumps([sorted(config.items()), text]).encode()).hexdigest()


def save_checkpoint(folder, done, lora, optimizer, history, in_a_row):
    """After `done` rounds: everything that a bit-exact resume needs, in one file and one rename,
    so that weights and round can not disagree (trap 8: a wrong round is a wrong tau).

    in_a_row: how many updates were skipped in a row up to here.
    """
    tensors = {name: value.detach().cpu() for name, value in lora.items()}
    for name, parameter in lora.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}:{name}"] = value.detach().cpu()
    header = {"rounds_done": str(done), "history": json.dumps(history),
              "skipped_in_a_row": str(in_a_row), "settings": fingerprint(folder)}  # fmt: skip
    write_safetensors(folder / "checkpoint.safetensors", tensors, header)


def load_checkpoint(folder, lora, optimizer):
    """Restore weights and optimizer in place.

    Returns rounds done, reward history and skipped updates in a row; 0, {}, 0 if there is none.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(folder) / "checkpoint.safetensors"
    if not path.exists():
        print(f"{folder} has no checkpoint yet: starting from its first round")
        return 0, {}, 0
    try:
        with safe_open(path, "pt") as file:
            meta, saved = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
        done, history = int(meta["rounds_done"]), json.loads(meta["history"])
        if meta.get("settings", now := fingerprint(folder)) != now:  # older ones do not say
            die(f"{path} belongs to other settings or prompts than {folder}/config.json and its "
                "prompt file: put those back, or start anew with another --out")  # fmt: skip
        with torch.no_grad():
            for name, parameter in lora.items():
                if saved[name].shape != parameter.shape:
                    raise ValueError(f"{name} is {tuple(saved[name].shape)}")
                parameter.copy_(saved[name])
                state = {k.split(":")[0]: v for k, v in saved.items() if k.endswith(":" + name)}
                if state:  # "step" stays on the CPU, as AdamW makes it
                    optimizer.state[parameter] = {
                        k: v.to("cpu" if k == "step" else parameter.device)
                        for k, v in state.items()
                    }
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as problem:
        die(f"{path} is damaged or of another model ({type(problem).__name__}: {problem})")
    return done, history, int(meta.get("skipped_in_a_row", 0))


def keep_metrics(folder, rounds):
    """Cut metrics.jsonl back to its first `rounds` lines: those that the checkpoint holds."""
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()[:rounds] if path.exists() else []
    with aside(path) as part:
        part.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def append_metrics(folder, line):
    """A line of strict JSON: what is NaN or infinite becomes null."""
    bad = [k for k, v in line.items() if isinstance(v, float) and not math.isfinite(v)]
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(line | dict.fromkeys(bad)) + "\n")


def has_tensorboard():
    return importlib.util.find_spec("tensorboard") is not None


def open_tensorboard(args, folder, first, rank):
    """A function that writes a metrics line to folder/tensorboard; without --tensorboard, nothing.

    The x axis is the reward queries. Lines after a resumed run's round are dropped.
    """
    if not args.tensorboard or rank > 0:
        return lambda line: None
    from torch.utils.tensorboard import SummaryWriter

    done = first * (args.queries // args.branches * args.branches)
    writer = SummaryWriter(folder / "tensorboard", purge_step=done + 1)

    def write(line):
        for name, value in (line | line["seconds"]).items():
            if isinstance(value, (int, float)):
                writer.add_scalar(name, value, line["queries"])
        writer.flush()

    return write


CARD = """---
{base_model}library_name: diffusers
pipeline_tag: text-to-image
tags: [lora, text-to-image, stable-diffusion, reinforcement-learning, b2-diffurl]
---
# LoRA of {base}, aligned by B2-DiffuRL

Reinforcement learning with the reward `{reward}` and the method {method}, {queries} reward queries
in {rounds} rounds, seed {seed}; every setting is in `config.json`, a line a round in
`metrics.jsonl`.

```python
from diffusers import DDIMScheduler, StableDiffusionPipeline
pipe = StableDiffusionPipeline.{load}("{base}")
pipe.scheduler = DDIMScheduler.from_config(
    pipe.scheduler.config, clip_sample=False, set_alpha_to_one=False, steps_offset=1{kind})
pipe.load_lora_weights("THIS REPOSITORY OR FOLDER")  # pipe.fuse_lora() makes it part of the model
pipe({prompt!r}, num_inference_steps={T}, guidance_scale={guidance}, eta={eta}{size}).images[0]
```

`webui_lora.safetensors` is the same LoRA for web UIs (AUTOMATIC1111, ComfyUI).

## Scores, same noise before and after

| prompts | score | before | after | gain | standard error | pictures |
|---|---|---|---|---|---|---|
{table}

![after training](grids/after-train.png)

## Training prompts

{prompts}
"""


def write_card(folder, args, summary, prompts):
    """README.md, a model card in Hugging Face's format: `hf upload NAME folder` publishes a run.

    `base_model` is left out where the base is a folder or file: the hub knows only its own names.
    """
    rows = [f"| {name.replace('_', ' | ')} | {s['before']:.4f} | {s['after']:.4f} | "
            f"{s['gain']:+.4f} | {s['error']:.4f} | {s['n']} |" for name, s in summary.items()]  # fmt: skip
    local = args.model == "tiny" or Path(args.model).exists()
    text = CARD.format(**vars(args) | dict(
        base=args.model, method=method_slug(args),
        base_model="" if local else f"base_model: {args.model}\n",
        load="from_single_file" if args.model.endswith(".safetensors") else "from_pretrained",
        kind=f', prediction_type="{args.prediction_type}"' if args.prediction_type else "",
        size=f", height={args.image_size}, width={args.image_size}" if args.image_size else "",
        queries=args.rounds * (args.queries // args.branches * args.branches),
        prompt=prompts[0], table="\n".join(rows), prompts="\n".join(f"- {p}" for p in prompts)))  # fmt: skip
    with aside(folder / "README.md") as part:
        part.write_text(text, encoding="utf-8")


def read_json(path):
    """What a run wrote, or None if it did not get that far."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def save_grid(path, images, columns, rank=0):
    """Pictures (B, 3, H, W) in [0, 1] -> one PNG, row by row, enlarged if they are tiny."""
    from torchvision.transforms.functional import to_pil_image
    from torchvision.utils import make_grid

    if rank > 0:
        return
    scale = max(1, 128 // images.shape[-1])
    big = images.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    with aside(path) as part:
        to_pil_image(make_grid(big, nrow=columns, padding=4, pad_value=1.0)).save(part, "PNG")


# ---------------------------------------------------------------- processes


def init_processes(device):
    """Join torchrun's process group if there is one; returns (rank, world size, device)."""
    if "WORLD_SIZE" not in os.environ:
        return 0, 1, device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size(), device


def parts(tensor, size):
    """`tensor` in few parts of at most `size`, about equally long; none of an empty tensor."""
    return tensor.chunk(math.ceil(len(tensor) / size)) if len(tensor) else ()


def all_sum(tensor, device):
    """The sum of `tensor` over all processes, bit for bit the tensor itself in a single one."""
    if not dist.is_initialized():
        return tensor
    there = tensor.to(device)
    dist.all_reduce(there)
    return there.to(tensor.device)


def all_totals(sums, device):
    """An update's metric sums over all processes; those called max_... are maxima."""
    if not dist.is_initialized():
        return sums
    names = [name for name in sums if not name.startswith("max_")]
    added = all_sum(torch.tensor([float(sums[name]) for name in names]), device).tolist()
    biggest = {}
    for name in sums.keys() - set(names):
        there = torch.tensor(float(sums[name]), device=device)
        dist.all_reduce(there, op=dist.ReduceOp.MAX)
        biggest[name] = there.item()
    return dict(zip(names, added)) | biggest


def loss_scale(model, args):
    """What an fp16 UNet's loss is multiplied by, and its gradient divided by; else 1.

    A mean over D, an update's trajectories and steps has gradients of about 1e-7 an element;
    below 6e-8 fp16 knows 0 alone. Powers of two: nothing else changes. DPO's loss is larger by
    about beta * D. A gradient that overflows is skipped and counted.
    """
    fp16 = model.unet.dtype == torch.float16
    return (2.0**6 if args.algo == "dpo" else 2.0**16) if fp16 else 1.0


def sum_gradients(parameters, device, scale=1.0):
    """Add up the gradients of all processes; one that trained nothing adds zeros."""
    for p in parameters if dist.is_initialized() else ():
        p.grad = all_sum(torch.zeros_like(p) if p.grad is None else p.grad, device)
    for p in parameters if scale != 1 else ():
        p.grad /= scale
