"""What a run shows to people: curves, pictures before and after, trackers."""

import importlib.util
from pathlib import Path

import torch

from b2rl import micro_batches
from ddim_logprob import log_prob
from processes import Stop, all_sum, die
from model import SD, tiny_folder
from run_folder import aside, method_slug, read_metrics

TRACKERS = ("tensorboard", "wandb")
HOPELESS = (
    "5 updates in a row had a NaN or infinite gradient. Lower --lr or --clip-range, or take "
    "--precision bf16 or fp32"
)
CURVES = {  # metrics.jsonl's key -> title
    "reward_mean": "reward",
    "kl_to_base": "KL to the base model, nats a step",
    "spread_within_prompt": "spread within a prompt",
    "clip_fraction": "share of clipped ratios",
}


def check_trackers(names):
    """Refuse an unknown tracker, or one that is not installed, before anything is loaded."""
    for name in filter(None, (names or "").split(",")):
        if name not in TRACKERS:
            die(f"unknown --report-to {name}: one of {', '.join(TRACKERS)}, several by commas")
        if importlib.util.find_spec(name) is None:
            die(f"--report-to {name}: pip install {name}")


def open_trackers(cfg, folder):
    """A function (values, queries) for the trackers of --report-to; x axis: reward queries.

    A value is a number, or the path of a PNG. What the run writes is the same without
    them.
    """
    names, calls = (cfg.report_to or "").split(","), []
    if "tensorboard" in names:
        from torch.utils.tensorboard import SummaryWriter
        from torchvision.io import read_image

        done = max((line["queries"] for line in read_metrics(folder)), default=-1)
        writer = SummaryWriter(folder / "tensorboard", purge_step=done + 1)

        def to_tensorboard(values, queries):
            for name, value in values.items():
                if isinstance(value, Path):
                    writer.add_image(name, read_image(str(value)), queries)
                elif isinstance(value, (int, float)):
                    writer.add_scalar(name, value, queries)
            writer.flush()

        calls.append(to_tensorboard)
    if "wandb" in names:
        import wandb

        identity = {"id": folder.resolve().name[-64:], "name": folder.name, "resume": "allow"}
        try:
            run = wandb.init(project="b2-diffurl", dir=str(folder), config=vars(cfg), **identity)
        except wandb.errors.Error as problem:
            raise Stop(f"--report-to wandb: {problem} (WANDB_MODE=offline needs no key)") from None
        run.define_metric("*", step_metric="queries")

        def to_wandb(values, queries):
            pictures = {k: wandb.Image(str(v)) for k, v in values.items() if isinstance(v, Path)}
            numbers = {k: v for k, v in values.items() if isinstance(v, (int, float))}
            run.log(numbers | pictures | {"queries": queries})

        calls.append(to_wandb)

    def track(values, queries):
        for call in calls:
            call(values, queries)

    return track


def step_energy(model, x, start, prompts, own, some, size, lora, generator):
    """|grad log p_t|^2 of a single trajectory, by step: (n,), a mean over the (m, 3) of `some`.

    The first seven are the `probe` of `train.algorithm_1`. The generator draws random
    signs: the square of a sum with such signs is on average the sum of the squares.
    """
    n, device, lora = x.shape[2] - 1, model.device, list(lora.values())
    shape = (int(some[:, 1].max()) + 1, x.shape[1], n)
    signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    total = [[torch.zeros_like(v) for v in lora] for _ in range(n)]
    for p, k, s in micro_batches(some, own, n, size):
        mu, sigma = model.policy(x[p, k, s].to(device), start - s, [prompts[q] for q in p])
        log_p = log_prob(x[p, k, s + 1].to(device), mu, sigma)
        # 2**10, as gradients of a mean over D would be 0 in fp16; weights are relative
        signed = 2.0**10 * (log_p * signs[own[p], k, s].to(device)).sum()
        for sum_, v in zip(total[s], torch.autograd.grad(signed, lora)):
            sum_ += v
    squares = [[all_sum(v, device).square().sum() for v in of_step] for of_step in total]
    return torch.stack([torch.stack(v).sum() for v in squares]).cpu() / len(some)


def first_lines(cfg, folder, workers):
    """What is trained where, and which flag chooses the other model."""
    name = "the bundled tiny model" if tiny_folder(cfg.model) else cfg.model
    other = f"--model {SD}" if tiny_folder(cfg.model) else "--model tiny"
    P, K = cfg.queries // cfg.branches, cfg.branches
    return (
        f"Training {name} on {cfg.device} ({cfg.precision}, processes: {workers}); {other} for the "
        f"other.\n{folder}: {method_slug(vars(cfg))}, {cfg.rounds} rounds of "
        f"{cfg.queries} queries ({P} roots x {K} branches), lr {cfg.lr}, seed {cfg.seed}"
    )


def round_line(line, cfg, first_reward):
    """What stays on the screen of a round; line: its metrics."""
    gain = line["reward_mean"] - first_reward
    kl = f"  KL {line['kl_to_base']:.3f}" if "kl_to_base" in line else ""
    text = (
        f"round {line['round']}/{cfg.rounds}  tau {line['tau']}  reward "
        f"{line['reward_mean']:.4f} ({gain:+.4f})  kept {line['kept']} of {line['of']}{kl}  "
        f"{sum(line['seconds'].values()):.1f} s"
    )
    if line["kept"] == 0:
        text += f"\n  no branch passed --threshold {cfg.threshold}: no update"
    alone = 4 * line["alone_on_prompt"] > line["of"] and cfg.min_count < 2
    if line["round"] == 1 and alone:
        text += (
            f"\n  {line['alone_on_prompt']} scores are the only one of their prompt and teach "
            "nothing yet: raise --queries, or pass --min-count 16 to normalise these by the round"
        )
    return text


def plot_curves(folder):
    """curves.png: reward, KL, spread and clip fraction of a run over its reward queries."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = read_metrics(folder)
    figure, axes = plt.subplots(1, 4, figsize=(16, 3.2), layout="constrained")
    for ax, (name, title) in zip(axes, CURVES.items()):
        points = [(line["queries"], line[name]) for line in lines if line.get(name) is not None]
        ax.plot(*zip(*points), ".-") if points else None
        ax.set(title=title, xlabel="reward queries")
    with aside(folder / "curves.png") as part:
        figure.savefig(part, format="png", dpi=100)
    plt.close(figure)


def before_after(folder, name):
    """before-after.png: the first grid rows of the list `name`, before above after."""
    from PIL import Image

    pictures = [Image.open(folder / f"grids/{when}-{name}.png") for when in ("before", "after")]
    height = min(min(p.height for p in pictures), pictures[0].width // 3)
    both = Image.new("RGB", (pictures[0].width, 2 * height + 12), "white")
    for j, picture in enumerate(pictures):
        both.paste(picture.crop((0, 0, picture.width, height)), (0, j * (height + 12)))
    with aside(folder / "before-after.png") as part:
        both.save(part, "PNG")
