"""What a round costs: against bare calls and the least; its first ratio and its memory.

    python studies/bench.py                                      # the bundled tiny model
    python studies/bench.py --queries 48 --no-bpt --no-bs        # other flags go to train.py
    python studies/bench.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --queries 24

Rounds of `train.main` itself are watched (ddpo or pg): all at tau0, with random LoRA weights
that a tiny learning rate leaves alone. After each round the same calls of UNet, VAE and reward
are made bare, at the round's own batch sizes, and timed: machines are noisy, so only what takes
turns is compared. A ratio is the median over the turns but the first, which warms up, with the
smallest and the largest. `max |log p/p_old|` is that before the round's first update: p/p_old is to
be 1 there. A UNet in half precision rounds differently in batches of another size.
"""

import resource
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import fmean, median
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# Ours first: `support` sets what torch reads when it is imported
import train
from lora import inject_lora
from studies.common import markdown
from support.command import Parser, positive
from support.pipeline import DTYPES

import torch

# All rounds at tau0, of weights that stand still, without pictures
STILL = ("--lr=1e-12", "--tau-rounds=30000", "--eval-prompts=0")
HEAD = ["phase", "calls", "samples", "the least", "s", "s over bare calls"]


def ratios(a, b):
    """Paired times a, b -> "median of a / b (smallest to largest)"."""
    each = sorted(x / y for x, y in zip(a, b, strict=True))
    return f"{median(each):.3f} ({each[0]:.3f} to {each[-1]:.3f})"


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

    Returns their metrics with `sizes`, the batch sizes of the UNet in "sampling" and in
    "training", and of the decoder in "reward".
    """
    sizes = defaultdict(list)
    found = []

    @torch.compiler.disable  # it stays plain Python under --compile
    def note(_, inputs):
        sizes["training" if torch.is_grad_enabled() else "sampling"].append(len(inputs[0]))

    def inject(unet, rank, seed):
        unet.register_forward_pre_hook(note)
        lora = inject_lora(unet, rank, seed=seed)
        for parameter in lora.values():
            torch.nn.init.normal_(parameter, std=0.05)
        return lora

    def end_round(_, cfg, pipeline, reward, lists, metrics, *rest):
        sizes["reward"] = list(map(len, torch.arange(metrics["of"]).split(cfg.decode_batch)))
        found.append(metrics | {"sizes": dict(sizes)})
        sizes.clear()
        look(cfg, pipeline, reward, found[-1])
        sizes.clear()  # of what `look` has called

    parts = dict(inject_lora=inject, end_round=end_round, kl_to_base=lambda *rest: 0.0)
    with tempfile.TemporaryDirectory() as folder, mock.patch.multiple(train, **parts):
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
    seconds = defaultdict(list)

    def look(cfg, pipeline, reward, metrics):
        metrics["least"] = least(cfg, metrics["tau"], metrics["kept"])
        for phase, sizes in metrics["sizes"].items():
            calls = seconds_of(bare(pipeline, reward, phase, sizes))
            seconds[phase].append((metrics["seconds"][phase], calls))

    metrics = watch(flags, turns + 1, look)[-1]
    rows = []
    for phase, sizes in metrics["sizes"].items():
        own, calls = zip(*seconds[phase][1:])
        counted = [len(sizes), sum(sizes), metrics["least"][phase]]
        rows.append([phase, *counted, f"{fmean(own):.3g}", ratios(own, calls)])
    return rows, metrics


# ---------------------------------------------------------------- the command


def main(argv=None):
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("--turns", type=positive, default=10, help="2 or more (10)")
    args, flags = parser.parse_known_args(argv)
    cfg = train.parse_args([*flags, "--out=runs/bench"])
    rows, metrics = round_rows(flags, args.turns)
    print(f"\n{cfg.device}, {cfg.precision}, {torch.get_num_threads()} threads", end=", ")
    print(f"{gflops(cfg.device, DTYPES[cfg.precision]):.0f} GFLOP/s in a matrix product")
    kept = f"tau {metrics['tau']}, {metrics['kept']} of {metrics['of']} pictures kept"
    ratio = f"max |log p/p_old| before an update {metrics['first_max_log_ratio']:.1e}"
    print(f"{kept}, {peak_memory():.0f} MB at most, {ratio}\n")
    print("\n".join(markdown(HEAD, rows)))


if __name__ == "__main__":
    main()
