"""What is told of a round and shown of a run: metrics, curves, pictures, trackers, card."""

import importlib.util
import math
import os
from pathlib import Path

import torch

from b2rl import micro_batches
from ddim_logprob import gaussian_kl, log_prob
from files import aside, write_safetensors, write_text
from lora import lora_off, webui_state
from model import ROOT, SD, tiny_folder
from processes import Stop, all_sum, die
from run_folder import LORA, method_slug, read_metrics

TRACKERS = ("tensorboard", "wandb")
HOPELESS = (
    "5 updates in a row had a NaN or infinite gradient. Lower --lr or --clip-range, or take "
    "--precision bf16 or fp32"
)
CURVES = {  # metrics.jsonl's key -> title
    "reward_mean": "reward",
    "recognised": "recognised by the judge",
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
        from PIL import Image
        from torch.utils.tensorboard import SummaryWriter
        from torchvision.transforms.functional import pil_to_tensor

        done = max((line["queries"] for line in read_metrics(folder)), default=-1)
        writer = SummaryWriter(folder / "tensorboard", purge_step=done + 1)

        def to_tensorboard(values, queries):
            for name, value in values.items():
                if isinstance(value, Path):
                    writer.add_image(name, pil_to_tensor(Image.open(value)), queries)
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


@torch.no_grad()
def kl_to_base(model, x, start, prompts, own, some, size):
    """KL(p_theta || p_pre) of a step in nats, summed over D: mean over steps and trajectories.

    x, start, prompts, own: as in `train.algorithm_1`; some (m, 3) of those kept, in
    UNet calls of at most `size` rows.
    """
    total = torch.zeros(2, dtype=torch.float64)
    for p, k, s in micro_batches(some, own, x.shape[2] - 1, size):
        x_t, c = x[p, k, s].to(model.device), [prompts[q] for q in p]
        mu, sigma = model.policy(x_t, start - s, c)
        with lora_off(model.unet):
            mu_ref, _ = model.policy(x_t, start - s, c)
        kl = gaussian_kl(mu, mu_ref, sigma) * math.prod(model.latent_shape)
        total += torch.tensor([kl.sum().item(), len(kl)])
    total = all_sum(total, model.device)
    return (total[0] / total[1]).item()


def spread(thumbs, owners):
    """Mean std, over pictures of one prompt, of thumbnails (B, 3, 8, 8): falls on a collapse."""
    groups = [[j for j, o in enumerate(owners) if o == prompt] for prompt in dict.fromkeys(owners)]
    stds = [thumbs[g].std(0).mean() for g in groups if len(g) > 1]
    return torch.stack(stds).mean().item() if stds else 0.0


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
    """curves.png: reward, judge, KL, spread, clip fraction of a run over its reward queries."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = read_metrics(folder)
    known = {name: title for name, title in CURVES.items() if any(name in x for x in lines)}
    size = 4 * len(known), 3.2
    figure, axes = plt.subplots(1, len(known), figsize=size, layout="constrained", squeeze=False)
    for ax, (name, title) in zip(axes[0], known.items()):
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


def save_grid(path, images, columns):
    """Pictures (B, 3, H, W) in [0, 1] -> one PNG, row by row, enlarged if they are tiny."""
    from torchvision.transforms.functional import to_pil_image
    from torchvision.utils import make_grid

    scale = max(1, 128 // images.shape[-1])
    big = images.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    with aside(path) as part:
        to_pil_image(make_grid(big, nrow=columns, padding=4, pad_value=1.0)).save(part, "PNG")


def write_lora(folder, state):
    """The LoRA `state` under diffusers' names and under those of web UIs."""
    write_safetensors(folder / LORA, state)
    write_safetensors(folder / "webui_lora.safetensors", webui_state(state))


def write_card(folder, cfg, summary, prompts):
    """README.md, a model card in Hugging Face's format: `hf upload NAME folder` publishes a run.

    `base_model` is left out where the base is a folder or file: the hub knows only its
    own names.
    """
    row = "| {before:.4f} | {after:.4f} | {gain:+.4f} | {error:.4f} | {n} |"
    table = [f"| {name.replace('_', ' | ')} " + row.format(**s) for name, s in summary.items()]
    local = cfg.model == "tiny" or os.path.exists(cfg.model)
    base = f"PATH OF {Path(cfg.model).name}" if local else cfg.model
    base = "PATH OF THE FOLDER tiny OF B2-DIFFURL'S REPOSITORY" if tiny_folder(cfg.model) else base
    fields = dict(
        base=base,
        base_model="" if local else f"base_model: {base}\n",
        method=method_slug(vars(cfg)),
        load="from_single_file" if cfg.model.endswith(".safetensors") else "from_pretrained",
        kind=f', prediction_type="{cfg.prediction_type}"' if cfg.prediction_type else "",
        size=f", height={cfg.image_size}, width={cfg.image_size}" if cfg.image_size else "",
        queries=cfg.rounds * cfg.queries,
        reward=Path(cfg.reward).name,
        prompt=prompts[0],
        table="\n".join(table),
        prompts="\n".join(f"- {p}" for p in prompts),
    )
    card = (ROOT / "docs/model_card.md").read_text(encoding="utf-8")
    write_text(folder / "README.md", card.format(**vars(cfg) | fields))
