"""What a round costs, against bare calls and against the least. Prints Markdown tables.

    python studies/bench.py                             # the bundled tiny model
    python studies/bench.py --part counts --queries 16  # other flags go to train.py

    overhead  sampling and training of a round against bare calls of UNet, VAE and
              reward, LoRA in the UNet; `larger`: on a UNet ten times larger
    phases    where a round's time goes
    counts    UNet sample-steps against the least that the method needs
    variants  UNet calls under one option for speed against the default's
    ratio     |log p/p_old| before the first update, in each precision
    memory    what a training step holds, by saved-tensor hooks, and what then fits

`watch` observes the rounds of `train.main` itself. Machines are noisy: what is compared
takes turns (A B C A B C ...) and the first turn, to warm up, is left out. A ratio is the
geometric mean over the turns with a 95 % t interval of its logarithm. Models but the
bundled one get the reward jpeg, which costs little.
"""

import argparse
import contextlib
import math
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import fmean, median, stdev
from types import SimpleNamespace
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import run_folder
import train
from lora import inject_lora, lora_parameters
from model import DTYPES, ROOT, load_model, tiny_folder
from processes import die
from studies.common import markdown

# All rounds at tau0, full updates of weights that stand still, no pictures
STILL = ("--lr=1e-12", "--rounds=1000000", "--tau-rounds=1000000", "--eval-prompts=0")
DDPO = ("--no-bpt", "--no-bs")
LARGE = ("--T=6", "--tau0=4", "--epochs=1", "--queries=128")
BATCHES = (16, 32, 64, 128, 256)  # of the UNet, tried in bare calls, guidance included
OPTIONS = ("--channels-last", "--precision=bf16", "--compile", "--precision=bf16 --compile")


def t_quantile(df):
    """97.5 % of Student's t: P(|t| < sqrt(df) tan a) ~ integral of cos^(df-1) up to a."""
    a = torch.linspace(0, math.pi / 2, 100_001, dtype=torch.float64)
    area = (a.cos() ** (df - 1)).cumsum(0)
    return math.sqrt(df) * a[torch.searchsorted(area, 0.95 * area[-1])].tan().item()


def ratio_interval(a, b):
    """Paired times a, b -> geometric mean of a / b, 95 % interval (nan for one pair)."""
    logs = [math.log(x / y) for x, y in zip(a, b, strict=True)]
    mean, half, n = fmean(logs), math.nan, len(logs)
    if n > 1:
        half = t_quantile(n - 1) * stdev(logs) / math.sqrt(n)
    return tuple(math.exp(v) for v in (mean, mean - half, mean + half))


def seconds_of(call):
    """Seconds that `call()` takes, what it started on a GPU included."""
    sync = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    sync()
    clock = time.perf_counter()
    call()
    sync()
    return time.perf_counter() - clock


def interleave(calls, repeats):
    """Seconds of each call by name, taken in turn, after one turn to warm up."""
    turns = [[seconds_of(call) for call in calls.values()] for _ in range(repeats + 1)]
    return dict(zip(calls, zip(*turns[1:])))


def table(rows):
    """The lines of a Markdown table of dicts; a tuple is a ratio with its interval."""

    def cell(value):
        if isinstance(value, tuple):
            return "{:.3f} ({:.3f} to {:.3f})".format(*value)
        return f"{value:.4g}" if isinstance(value, float) else value

    return markdown(rows[0], [map(cell, row.values()) for row in rows])


# ---------------------------------------------------------------- rounds of train.py


class Enough(Exception):
    """Ends a run whose further rounds nobody wants."""


def watch(flags, pause):
    """`train.main` with these flags and `STILL`, until `pause(s)` after a round is true.

    Returns s: cfg, model, reward, and of the last round
        line    its line of metrics.jsonl
        sizes   batch sizes of the UNet in "sampling", in "training" and elsewhere
        kept    (M, 3), the trajectories trained on
    """
    s, sizes = SimpleNamespace(), defaultdict(list)
    score, split = mock.Mock(wraps=train.score), mock.Mock(wraps=train.split_updates)
    append = run_folder.append_metrics

    @torch.compiler.disable  # it stays plain Python under --compile
    def note(_, inputs):
        later = "training" if torch.is_grad_enabled() else "elsewhere"
        sizes[later if score.called else "sampling"].append(len(inputs[0]))

    def load(cfg, device):
        s.cfg, s.model = cfg, load_model(cfg, device)
        s.model.unet.register_forward_pre_hook(note)
        return s.model

    def end_round(folder, line):
        append(folder, line)
        s.line, s.sizes = line, defaultdict(list, {k: list(v) for k, v in sizes.items()})
        s.reward, s.kept = score.call_args.args[1], split.call_args.args[0]
        if pause(s):
            raise Enough
        sizes.clear()
        score.reset_mock()

    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.multiple(train, load_model=load, score=score, split_updates=split),
        mock.patch.object(run_folder, "append_metrics", end_round),
        contextlib.redirect_stdout(sys.stderr),
        contextlib.suppress(Enough),
    ):
        train.main([*flags, *STILL, f"--out={folder}/run"])
    return s


def load_one(flags):
    """Settings and a model with LoRA, without a round."""
    cfg = train.parse_args(flags)
    s = SimpleNamespace(cfg=cfg, model=load_model(cfg, torch.device(cfg.device)))
    inject_lora(s.model.unet, cfg.rank)
    return s


# ---------------------------------------------------------------- the parts


def cut(total, size):
    """Batch sizes of `total` samples, all of `size` but the last."""
    return [size] * (total // size) + [total % size] * (total % size > 0)


def bare(s, sizes, backward, pictures=0):
    """A function that calls the UNet at `sizes`, VAE and reward on so many `pictures`."""
    model, inputs, text = s.model, {}, s.model.embed([""])
    shares = cut(pictures, s.cfg.decode_batch)
    for n in {*sizes, *shares}:
        x = torch.randn(n, *model.latent_shape).to(model.device, model.unet.dtype)
        inputs[n] = x, torch.full((n,), 500, device=x.device), text.repeat(n, 1, 1)
    images = {n: model.decode(inputs[n][0]) for n in set(shares)}

    def run():
        with torch.set_grad_enabled(backward):
            for n in sizes:
                out = model.unet(*inputs[n], return_dict=False)[0]
                if backward:
                    out.float().sum().backward()
            for n in shares:
                model.pipe.vae.decode(inputs[n][0], return_dict=False)
                s.reward(images[n], [""] * n)

    return run


def overhead(flags, repeats):
    """Rounds against bare calls at their own batch sizes and at the fastest size."""
    log, fastest, rows = {"sampling": [], "training": []}, {}, []

    def pause(s):
        for phase, turns in log.items():
            sizes, total, backward = s.sizes[phase], sum(s.sizes[phase]), phase == "training"
            if not sizes:  # no branch was kept
                continue
            if phase not in fastest:
                tried = sorted({n for n in (*BATCHES, max(sizes)) if n <= total})
                times = interleave({n: bare(s, [n], backward) for n in tried}, 3)
                fastest[phase] = min(tried, key=lambda n: median(times[n]) / n)
            pictures, seconds = 0 if backward else s.line["of"], s.line["seconds"]
            turn = [seconds[phase] + (seconds["reward"] if pictures else 0), total, len(sizes)]
            for batches in (sizes, cut(total, fastest[phase])):
                turn.append(seconds_of(bare(s, batches, backward, pictures)))
            turns.append(turn)
        return len(log["sampling"]) > repeats

    million = sum(p.numel() for p in watch(flags, pause).model.unet.parameters()) / 1e6
    for phase in [phase for phase in log if len(log[phase]) > 1]:
        seconds, samples, calls, own, best = zip(*log[phase][1:])
        row = {"UNet, M": million, "phase": phase, "fastest size": fastest[phase]}
        row |= {"samples": median(samples), "calls": median(calls), "s": median(seconds)}
        row["over calls of its own sizes"] = ratio_interval(seconds, own)
        row["over calls of the fastest size"] = ratio_interval(seconds, best)
        rows.append(row)
    return rows


def larger(flags, repeats):
    """`overhead` on a random UNet of ten times the parameters, in rounds of `LARGE`."""
    from diffusers import UNet2DConditionModel

    model = train.parse_args(flags).model
    folder = ROOT / "tiny" if model == "tiny" else Path(model)
    if not folder.is_dir():
        die(f"larger needs the folder of a model, not {model}: choose another --part")
    config = dict(UNet2DConditionModel.load_config(folder, subfolder="unet"))
    widths = [16 * round(width / 5) for width in config.pop("block_out_channels")]
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(config, block_out_channels=widths)
    with tempfile.TemporaryDirectory() as out:
        shutil.copytree(folder, f"{out}/large", ignore=shutil.ignore_patterns("unet"))
        unet.save_pretrained(f"{out}/large/unet")
        return overhead([*LARGE, *flags, f"--model={out}/large"], repeats)


def variants(flags, repeats):
    """UNet calls at the default's batch sizes under each option over the default's."""
    made = {name: load_one([*flags, *name.split()]) for name in ("", *OPTIONS)}
    cfg, rows = made[""].cfg, [{"option": name} for name in OPTIONS]
    for phase, n in (("forward", cfg.sample_batch), ("backward", cfg.micro_batch)):
        calls = {k: bare(s, [2 * n], phase == "backward") for k, s in made.items()}
        log = interleave(calls, repeats)
        for row in rows:
            row[f"{phase} / default"] = ratio_interval(log[row["option"]], log[""])
    return rows


def phases(flags, repeats):
    """Mean seconds of each phase, after one round to warm up."""
    log, clock = [], []

    def pause(s):
        clock.append(time.perf_counter())
        log.append(s.line["seconds"])
        return len(log) > repeats

    of, whole = watch(flags, pause).line["of"], (clock[-1] - clock[0]) / repeats
    mean = {name: fmean(turn[name] for turn in log[1:]) for name in log[0]}
    mean |= {"KL metric, checkpoint": whole - sum(mean.values()), "round": whole}
    return [{"phase": name, "s": v, "s a query": v / of} for name, v in mean.items()]


def least(cfg, kept):
    """The least UNet sample-steps of sampling and of training, guidance doubling each.

    A root: T - tau shared steps, one at x_tau for all branches, K (tau - 1) after it.
    An epoch: n steps of each kept (M, 3). Returns as well the % of training that it
    would save if pairs shared their first state.
    """
    tau = cfg.T if cfg.no_bpt else cfg.tau0
    start, stop = train.training_interval(tau, cfg.T, cfg.interval)
    n, halves, m = start - stop, 1 if cfg.guidance == 1 else 2, len(kept)
    a_root = (cfg.T - start) + 1 + cfg.branches * (start - 1)
    passes = cfg.epochs * m + (min(m, 8) if cfg.step_weight == "rms" else 0)
    saved = cfg.epochs * (m - len(kept[:, 1].unique())) / max(1, passes * n)
    return halves * (cfg.queries // cfg.branches) * a_root, halves * passes * n, 100 * saved


def counts(flags, _=1):
    """UNet sample-steps of a round, counted by a hook on the UNet, against the least."""
    rows = []
    for method in (DDPO, (), ("--no-bpt",)):
        s = watch([*flags, *method], lambda s: True)
        sampling, training, saved = least(s.cfg, s.kept)
        for phase, want in (("sampling", sampling), ("training", training)):
            got, of = sum(s.sizes[phase]), s.line["of"]
            row = {"method": "DDPO" if s.cfg.no_bs else "B2", "tau": s.line["tau"]}
            row |= {"phase": phase, "kept": f"{len(s.kept)} of {of}"}
            row |= {"calls": len(s.sizes[phase]), "measured": got, "least": want}
            row |= {"measured / least": got / max(1, want), "least a query": want / of}
            row["sharing x_tau would save"] = f"{saved:.1f} %" if phase == "training" else ""
            rows.append(row)
    return rows


def first_ratio(flags, _=1):
    """max |log p/p_old| before any update, with random LoRA weights that are not zero.

    Equal shapes: one state a UNet call throughout. Other shapes: branches, full batches.
    In half precision a UNet's rounding depends on its batch.
    """
    rows, one = [], ("--no-bs", "--queries=6", "--sample-batch=1", "--micro-batch=1")

    def inject(*args, **options):
        torch.manual_seed(1)
        lora = inject_lora(*args, **options)
        for p in lora.values():
            torch.nn.init.normal_(p, std=0.05)
        return lora

    for precision in DTYPES:
        for shapes in (one, ("--queries=24", "--threshold=0")):
            more = (f"--precision={precision}", "--update-size=1000000", *shapes)
            with mock.patch.object(train, "inject_lora", inject):
                s = watch([*flags, *more], lambda s: True)
            largest, name = s.line["first_max_log_ratio"], "equal" if shapes == one else "other"
            row = {"precision": precision, "shapes": name, "max log ratio": f"{largest:.1e}"}
            rows.append(row | {"of the clip range": f"{largest / s.cfg.clip_range:.2%}"})
    return rows


def random_sd14(folder):
    """Stable Diffusion 1.4 at full size: random bfloat16 weights, tiny's tokenizer."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    vae = dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2)
    vae["down_block_types"] = ("DownEncoderBlock2D",) * 4
    vae["up_block_types"] = ("UpDecoderBlock2D",) * 4
    text = dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    networks = {"vae": AutoencoderKL(**vae), "unet": unet}
    networks["text_encoder"] = CLIPTextModel(CLIPTextConfig(**text))
    networks = {name: network.bfloat16() for name, network in networks.items()}
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "tiny/tokenizer", model_max_length=77)
    pipe = StableDiffusionPipeline.from_pretrained(ROOT / "tiny", **networks, tokenizer=tokenizer)
    pipe.save_pretrained(folder)
    return str(folder)


def saved_bytes(model, n):
    """Bytes that autograd keeps for the backward pass of n guided samples, but weights.

    Returns the sum and the largest share of one resnet or transformer: what
    --checkpointing holds while it computes that one again.
    """
    from diffusers.models.attention_processor import AttnProcessor2_0

    unet, kept, marks = model.unet, {}, []
    unet.set_attn_processor(AttnProcessor2_0())  # torch's fused attention, as on a GPU
    weights = {p.untyped_storage().data_ptr() for p in unet.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()  # alive as long as `graph`: no address twice
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def mark(*_):
        marks.append(sum(kept.values()))

    for block in unet.modules():  # none of these holds another
        if type(block).__name__ in ("ResnetBlock2D", "Transformer2DModel"):
            block.register_forward_pre_hook(mark)
            block.register_forward_hook(mark)
    x = torch.randn(2 * n, *model.latent_shape).to(model.device, unet.dtype)
    text = model.embed([""]).repeat(2 * n, 1, 1)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        graph = unet(x, 500, text).sample
    assert graph.requires_grad, "nothing is trained"
    return sum(kept.values()), max(b - a for a, b in zip(marks[::2], marks[1::2]))


def memory_held(flags, _=1):
    """What a training step holds, and the micro-batches that 16 and 24 GB then take.

    The difference of two batch sizes is what a sample adds. With --checkpointing a step
    holds what enters each block and the largest block's tensors; --offload takes VAE and
    text encoder away. A tenth is left to CUDA and to what a step makes and drops.
    """
    model, held = load_one(flags).model, {}
    unet, vae, text = model.unet, model.pipe.vae, model.pipe.text_encoder
    for name, network in {"UNet, LoRA": unet, "VAE": vae, "text encoder": text}.items():
        held[name] = sum(p.numel() * p.element_size() for p in network.parameters())
    lora = sum(p.numel() for p in lora_parameters(unet).values())
    held["LoRA's gradient and AdamW's state"] = 12 * lora
    unet.disable_gradient_checkpointing()
    (one, block), (two, blocks) = saved_bytes(model, 1), saved_bytes(model, 2)
    unet.enable_gradient_checkpointing()
    outer = saved_bytes(model, 2)[0] - saved_bytes(model, 1)[0]
    plain, saving, away = two - one, outer + blocks - block, held["VAE"] + held["text encoder"]
    sample = {"a guided sample": plain, "a guided sample, --checkpointing": saving}
    figures = {f"{name}, MB": v / 2**20 for name, v in (held | sample).items()}
    for gb in (16, 24):
        room = 0.9 * gb * 2**30 - sum(held.values())
        figures[f"micro-batch in {gb} GB"] = int(room / plain)
        figures[f"{gb} GB, --checkpointing --offload"] = int((room + away) / saving)
    return [{"what": name, "figure": v} for name, v in figures.items()]


PARTS = {"overhead": overhead, "larger": larger, "phases": phases, "counts": counts}
PARTS |= {"variants": variants, "ratio": first_ratio, "memory": memory_held}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--part", nargs="+", choices=PARTS, default=[*PARTS][:4], help="(default: the first 4)")
    add("--model", default="tiny", help="as of train.py, or random-sd14: SD 1.4 at full size")
    add("--repeats", type=int, default=10, help="turns of each measurement (default 10)")
    args, rest = parser.parse_known_args(argv)
    with tempfile.TemporaryDirectory() as out:
        model = random_sd14(f"{out}/sd14") if args.model == "random-sd14" else args.model
        flags = [*([] if tiny_folder(model) else ["--reward=jpeg"]), f"--model={model}", *rest]
        flags += ["--out=runs/bench"]  # a name that holds no run
        cfg = train.parse_args(flags)
        torch.set_num_threads(cfg.threads or torch.get_num_threads())
        print(f"{cfg.device}, {torch.get_num_threads()} threads, {args.repeats} turns:", *flags)
        for part in args.part:
            rows = PARTS[part](flags, args.repeats)
            print(f"\n**{part}**\n", *table(rows), sep="\n", flush=True)


if __name__ == "__main__":
    main()
