"""What a round costs: against bare calls, against the least, its first ratio, its memory.

    python studies/bench.py                                      # the bundled tiny model
    python studies/bench.py --queries 48 --no-bpt --no-bs        # other flags go to train.py
    python studies/bench.py --model random-sd14 --queries 24     # full size, random weights, jpeg

Rounds of `train.main` itself are watched (ddpo or pg): all at tau0, with random LoRA weights
that a tiny learning rate leaves alone. After each round the same calls of UNet, VAE and reward
are made bare, at the round's own batch sizes, and timed: machines are noisy, so only what takes
turns is compared. A ratio is the geometric mean over the turns but the first, which warms up,
with a 95 % interval. `max |log p/p_old|` is that before the round's first update: p/p_old is to
be 1 there. A UNet in half precision rounds differently in batches of another size.
"""

import contextlib
import copy
import math
import resource
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean, stdev
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import train
from lora import inject_lora
from studies.common import markdown
from support.command import Parser, positive
from support.pipeline import DTYPES, ROOT, tiny_folder

# All rounds at tau0, of weights that stand still, without pictures
STILL = ("--lr=1e-12", "--tau-rounds=30000", "--eval-prompts=0")
# 97.5 % of Student's t with 1 to 9 degrees of freedom
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
HEAD = ["phase", "calls", "samples", "the least", "s", "s over bare calls"]


def ratio_interval(a, b):
    """Paired times a, b -> "geometric mean of a / b (95 % interval)"; more than 10 count as 10."""
    logs = [math.log(x / y) for x, y in zip(a, b, strict=True)]
    n = len(logs)
    half = STUDENT[min(n - 2, 8)] * stdev(logs) / n**0.5
    low, middle, high = (math.exp(fmean(logs) + side * half) for side in (-1, 0, 1))
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def seconds_of(call):
    """Seconds that `call()` takes, what it started on a GPU included."""
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def gflops(device, dtype, n=2048):
    """GFLOP/s of a matrix product, the best of five: what the machine gives at this moment."""
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / min(seconds_of(lambda: a @ a) for _ in range(5)) / 1e9


def peak_memory():
    """The most memory that this process has held, in MB: of the GPU if it uses one."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


# ---------------------------------------------------------------- rounds of train.py


def watch(flags, rounds, look=lambda *rest: None):
    """So many rounds of `train.main`; after each look(cfg, pipeline, reward, metrics).

    Returns their metrics, with the peak memory in MB and with `sizes`, the batch sizes of the
    UNet in "sampling" and in "training", and of the decoder in "reward".
    """
    sizes = {"sampling": [], "reward": [], "training": []}
    found = []

    @torch.compiler.disable  # it stays plain Python under --compile
    def note(_, inputs):
        sizes["training" if torch.is_grad_enabled() else "sampling"].append(len(inputs[0]))

    def inject(unet, rank, seed):
        unet.register_forward_pre_hook(note)
        lora = inject_lora(unet, rank, seed=seed)
        torch.manual_seed(1)
        for parameter in lora.values():
            torch.nn.init.normal_(parameter, std=0.05)
        return lora

    def end_round(_, cfg, pipeline, reward, lists, metrics, *rest):
        pictures = torch.arange(metrics["of"]).split(cfg.decode_batch)
        sizes["reward"] = [len(part) for part in pictures]
        found.append(metrics | {"peak": peak_memory(), "sizes": copy.deepcopy(sizes)})
        look(cfg, pipeline, reward, found[-1])
        sizes["sampling"].clear()
        sizes["training"].clear()

    parts = dict(inject_lora=inject, end_round=end_round, kl_to_base=lambda *rest: 0.0)
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.multiple(train, **parts),
        contextlib.redirect_stdout(sys.stderr),
    ):
        train.main([*flags, *STILL, f"--rounds={rounds}", f"--out={folder}/run"])
    return found


def least(cfg, tau, kept):
    """The least samples that the UNet, and in "reward" the decoder, must see in a round.

    A root: T - tau shared steps, one at x_tau for all branches, K (tau - 1) after it. An
    epoch: tau steps of each of the `kept`; the step weights measure eight more. Guidance
    doubles what the UNet sees.
    """
    a_root = cfg.T - tau + 1 + cfg.branches * (tau - 1)
    walks = cfg.epochs * kept + (min(kept, 8) if cfg.step_weight == "rms" else 0)
    double = 1 if cfg.guidance == 1 else 2
    sampling = double * a_root * (cfg.queries // cfg.branches)
    return {"sampling": sampling, "reward": cfg.queries, "training": double * tau * walks}


def bare(pipeline, reward, phase, sizes):
    """A function that makes a phase's calls at these batch sizes, and does nothing else."""
    unet, vae = pipeline.policy.unet, pipeline.pipe.vae
    network = vae if phase == "reward" else unet
    text = pipeline.embed([""])
    shape = pipeline.latent_shape
    x = {n: torch.randn(n, *shape).to(pipeline.device, network.dtype) for n in {*sizes}}
    images = {n: pipeline.decode(x[n]) for n in x if phase == "reward"}

    def run():
        with torch.set_grad_enabled(phase == "training"):
            for n in sizes:
                if phase == "reward":
                    vae.decode(x[n], return_dict=False)
                    reward(images[n], [""] * n)
                    continue
                out = unet(x[n], 500, text.expand(n, -1, -1), return_dict=False)[0]
                if phase == "training":
                    out.float().sum().backward()

    return run


def round_rows(flags, turns):
    """A row a phase, as HEAD says; and the metrics of a round."""
    seconds = {"sampling": [], "reward": [], "training": []}
    wanted = {}

    def look(cfg, pipeline, reward, metrics):
        wanted.update(least(cfg, metrics["tau"], metrics["kept"]))
        for phase, sizes in metrics["sizes"].items():
            if sizes:  # else no branch was kept
                calls = seconds_of(bare(pipeline, reward, phase, sizes))
                seconds[phase].append((metrics["seconds"][phase], calls))

    first, *_, metrics = watch(flags, turns + 1, look)
    metrics["peak"] = first["peak"]  # later the bare calls have added theirs
    rows = []
    for phase, sizes in metrics["sizes"].items():
        own, calls = zip(*seconds[phase][1:])
        row = [phase, len(sizes), sum(sizes), wanted[phase], f"{fmean(own):.3g}"]
        rows.append([*row, ratio_interval(own, calls)])
    return rows, metrics


def first_ratio(flags, precision):
    """max |log p/p_old| of a round before its first update."""
    more = ("--queries=12", "--threshold=0", "--update-size=1000000", f"--precision={precision}")
    return watch([*flags, *more], 1)[0]["first_max_log_ratio"]


# ---------------------------------------------------------------- the command


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


def main(argv=None):
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("--model", default="tiny", help="as of train.py, or random-sd14")
    parser.add_argument("--turns", type=positive, default=10, help="2 or more (10)")
    args, rest = parser.parse_known_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        model = random_sd14(f"{folder}/sd14") if args.model == "random-sd14" else args.model
        reward = [] if tiny_folder(model) else ["--reward=jpeg"]  # it costs little
        flags = [*reward, f"--model={model}", *rest]
        cfg = train.parse_args([*flags, f"--out={folder}/new"])
        rows, metrics = round_rows(flags, args.turns)
        speed = gflops(cfg.device, DTYPES[cfg.precision])
        print(
            f"{cfg.device}, {cfg.precision}, {torch.get_num_threads()} threads: {speed:.0f} "
            f"GFLOP/s in a matrix product; tau {metrics['tau']}, {metrics['kept']} of "
            f"{metrics['of']} kept, peak memory {metrics['peak']:.0f} MB\n"
        )
        print("\n".join(markdown(HEAD, rows)), flush=True)
        ratios = [[name, f"{first_ratio(flags, name):.1e}"] for name in DTYPES]
        print("\n" + "\n".join(markdown(["precision", "max |log p/p_old|"], ratios)))


if __name__ == "__main__":
    main()
