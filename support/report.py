"""What is told of a round and shown of a run: metrics, curves, pictures, trackers, card."""

import importlib.util
import math
import os
import textwrap
import time
from pathlib import Path

import torch

from lora import webui_state
from support.command import Stop, die
from support.pipeline import tiny_folder
from support.processes import all_max, all_sum
from support.run_folder import LORA, ROOT, aside, method_slug, paste, read_config
from support.run_folder import write_safetensors, write_text

TRACKERS = ("tensorboard", "wandb")
COLUMNS = 9  # of a grid of pictures
GRID = 8 * COLUMNS  # pictures in a grid, at most
HOPELESS = (
    "5 updates in a row had a NaN or infinite gradient. Begin a new run with a lower "
    "--lr or --clip-range, or with --precision bf16 or fp32"
)


# ---------------------------------------------------------------- a round's numbers


class Clock:
    """Seconds of the phases of a round."""

    def __init__(self):
        self.marks = []

    def start(self, phase):
        """The phase that runs ends, and this one begins."""
        self.marks.append((phase, time.perf_counter()))

    def stop(self):
        """The last phase ends; seconds by phase."""
        self.start(None)
        marks, self.marks = self.marks, []
        return {phase: end - began for (phase, began), (_, end) in zip(marks, marks[1:])}


class TrainingLog:
    """Ratios, losses, gradient norms and skipped updates of each round, for its metrics."""

    def __init__(self, clip_range):
        self.clip_range = clip_range
        self.skipped_in_a_row = 0
        self.reset()

    def reset(self):
        self.totals = torch.zeros(7, dtype=torch.float64)  # of what `end_round` names
        self.largest = torch.zeros(1, dtype=torch.float64)  # |log ratio| before the first update
        self.norms, self.sizes = [], []

    def add(self, log_p, log_p_old, loss, h=None):
        """A micro-batch: log p now and then (b,), its share of the loss, DPO's h (b / 2,)."""
        log_ratio = (log_p.detach() - log_p_old).double().cpu()
        ratio = log_ratio.exp()
        clipped = ((ratio - 1).abs() > self.clip_range).sum()
        h = torch.zeros(0) if h is None else h.detach().abs().double().cpu()
        first, first_count = 0, 0
        if not self.norms:
            first, first_count = ratio.sum(), len(ratio)
            self.largest = torch.maximum(self.largest, log_ratio.abs().max())
        now = [first, first_count, clipped, len(ratio), h.sum(), len(h), loss.item()]
        self.totals += torch.tensor(now, dtype=torch.float64)

    def end_update(self, norm, size):
        """An update of `size` trajectories; norm: its gradient's before clipping.

        One whose norm is not finite was skipped. Raises `Stop` after five in a row.
        """
        self.norms.append(norm.item())
        self.sizes.append(size)
        self.skipped_in_a_row = 0 if norm.isfinite() else self.skipped_in_a_row + 1
        if self.skipped_in_a_row == 5:
            raise Stop(HOPELESS)

    def end_round(self, device):
        """The round's numbers over all processes, for metrics.jsonl; the next round starts at 0."""
        totals = all_sum(self.totals, device).tolist()
        first, first_count, clipped, count, h, pairs, loss = totals
        skipped = sum(not math.isfinite(norm) for norm in self.norms)
        metrics = {"updates": len(self.norms) - skipped, "skipped_updates": skipped}
        metrics["trajectories_per_update"] = self.sizes
        if self.norms:
            metrics["first_ratio"] = first / first_count  # must be 1, and the next about 0
            metrics["first_max_log_ratio"] = all_max(self.largest, device).item()
            metrics["clip_fraction"] = clipped / count
            metrics["mean_abs_h"] = h / max(1, pairs)
            metrics["loss"] = loss / len(self.norms)
            metrics["grad_norm"] = sum(self.norms) / len(self.norms)
        self.reset()
        return metrics


def spread(thumbs, owners):
    """Mean std, over pictures of one prompt, of thumbnails (B, 3, 8, 8): falls on a collapse."""
    stds = []
    for prompt in dict.fromkeys(owners):
        rows = [j for j, owner in enumerate(owners) if owner == prompt]
        if len(rows) > 1:
            stds.append(thumbs[rows].std(0).mean())
    return torch.stack(stds).mean().item() if stds else 0.0


# ---------------------------------------------------------------- lines on the screen


def first_lines(cfg, folder, workers):
    """What is trained, where and how."""
    name = "the bundled tiny model" if tiny_folder(cfg.model) else cfg.model
    return (
        f"Training {name} on {cfg.device} ({cfg.precision}, processes: {workers}).\n"
        f"{folder}: {method_slug(vars(cfg))}, {cfg.rounds} rounds of {cfg.queries} queries "
        f"(roots of {cfg.branches} branches), lr {cfg.lr}, seed {cfg.seed}"
    )


def round_line(line, cfg, first_reward):
    """What stays on the screen of a round; line: its metrics."""
    seconds = sum(line["seconds"].values())
    # tau grows to T, and a round's time with it
    left = (cfg.rounds - line["round"]) * seconds / 60 * (1 + cfg.T / line["tau"]) / 2
    text = (
        f"round {line['round']}/{cfg.rounds}  tau {line['tau']}  reward "
        f"{line['reward_mean']:.4f} ({line['reward_mean'] - first_reward:+.4f})  kept "
        f"{line['kept']} of {line['of']}  KL {line.get('kl_to_base', 0):.3f}  {seconds:.1f} s, "
        f"about {left:.0f} min left"
    )
    if line["kept"] == 0:
        text += f"\n  no branch passed --threshold {cfg.threshold}: no update"
    if 2 * line["alone_on_prompt"] > line["of"]:
        text += (
            f"\n  {line['alone_on_prompt']} scores are of a root that is alone on its prompt: they "
            "are compared with their own branches only, so that nearly every root passes Eq. 5. "
            "Pass --min-count 16 to compare them with the round, or raise --queries"
        )
    return text


# ---------------------------------------------------------------- trackers


def open_trackers(cfg, folder, saved, worker):
    """A function (metrics, queries) for the trackers of --report-to; x axis: reward queries.

    saved: what `run_folder.read_checkpoint` read, as they go on after a resume where it
    does. Their own files lie beside the run folder, which can be published as it is.
    """
    names = cfg.report_to if worker == 0 else []
    for name in names:
        if importlib.util.find_spec(name) is None:
            die(f"--report-to {name}: pip install {name}")
    rounds_done = saved[1]["rounds_done"] if saved[1] else 0
    beside = Path(f"{folder.resolve()}-trackers")
    calls = []
    if "tensorboard" in names:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(beside / "tensorboard", purge_step=rounds_done * cfg.queries + 1)

        def to_tensorboard(numbers, queries):
            for name, value in numbers.items():
                writer.add_scalar(name, value, queries)
            writer.flush()

        calls.append(to_tensorboard)
    if "wandb" in names:
        import wandb

        beside.mkdir(parents=True, exist_ok=True)
        identity = dict(id=read_config(folder)["wandb_id"], name=folder.name, resume="allow")
        try:
            run = wandb.init(project="b2-diffurl", dir=str(beside), config=vars(cfg), **identity)
        except wandb.errors.Error as problem:
            raise Stop(f"--report-to wandb: {problem} (WANDB_MODE=offline needs no key)") from None
        run.define_metric("*", step_metric="queries")
        calls.append(lambda numbers, queries: run.log(numbers | {"queries": queries}))

    def track(metrics, queries):
        numbers = {k: v for k, v in metrics.items() if isinstance(v, (int, float))}
        for call in calls:
            call(numbers, queries)

    return track


# ---------------------------------------------------------------- pictures


def save_grid(path, images, columns):
    """Pictures (B, 3, H, W) in [0, 1] -> one PNG, row by row, enlarged if they are tiny."""
    from torchvision.transforms.functional import to_pil_image
    from torchvision.utils import make_grid

    scale = max(1, 128 // images.shape[-1])
    big = images.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    with aside(path) as part:
        to_pil_image(make_grid(big, nrow=columns, padding=4, pad_value=1.0)).save(part, "PNG")


def pyplot():
    """matplotlib, imported where a picture needs it; `support` sets a backend without a window."""
    import matplotlib.pyplot as plt

    return plt


def save_figure(figure, path):
    with aside(path) as part:
        figure.savefig(part, format="png", dpi=110, bbox_inches="tight")
    pyplot().close(figure)


def before_after(folder, name, prompts, before, after, workers=1):
    """before-after.png: nine prompts of the list `name`, before above after, the same noise.

    before, after: what `eval.evaluate` returned for the list; `workers` processes drew it,
    and the first one's pictures are in the grids. A tick stands where the judge agrees.
    """
    from PIL import Image

    drawn = range(0, len(before["score"]), workers)[:GRID]  # number of each picture in the grid
    first = [place for place, number in enumerate(drawn) if number < len(prompts)]
    places = first[:: max(1, len(first) // COLUMNS)][:COLUMNS]
    columns = min(len(drawn), COLUMNS)
    rows = math.ceil(len(drawn) / COLUMNS)
    figure, axes = pyplot().subplots(2, COLUMNS, figsize=(13.5, 3.6))
    for row, (when, scores) in enumerate({"before": before, "after": after}.items()):
        grid = Image.open(folder / f"grids/{when}-{name}.png")
        width, height = (grid.width - 4) // columns, (grid.height - 4) // rows
        for ax in axes[row]:
            ax.axis("off")
        for ax, place in zip(axes[row], places):
            left, top = 4 + place % COLUMNS * width, 4 + place // COLUMNS * height
            ax.imshow(grid.crop((left, top, left + width - 4, top + height - 4)))
            if row == 0:
                ax.set_title(textwrap.fill(prompts[drawn[place]], 14), fontsize=9)
            if scores["recognised"] and scores["recognised"][drawn[place]]:
                ax.text(0.5, -0.2, "\u2713 right", transform=ax.transAxes, ha="center", color="g")
        axes[row, 0].text(-0.1, 0.5, when, transform=axes[row, 0].transAxes, ha="right")
    save_figure(figure, folder / "before-after.png")


# ---------------------------------------------------------------- what others load


def write_lora(folder, state):
    """The LoRA `state` under diffusers' names and under those of web UIs; the latter's name."""
    write_safetensors(folder / LORA, state)
    name = f"{folder.resolve().name}_webui.safetensors"
    write_safetensors(folder / name, webui_state(state))
    return name


def write_card(folder, cfg, summary, prompts, webui_name):
    """README.md, a model card in Hugging Face's format: `hf upload NAME folder` publishes a run.

    `base_model` is left out where the base is a folder or file: the hub knows only its
    own names.
    """
    row = "| {before:.4f} | {after:.4f} | {gain:+.4f} | {error:.4f} | {n} |"
    table = [f"| {name.replace('_', ' | ')} " + row.format(**s) for name, s in summary.items()]
    local = cfg.model == "tiny" or os.path.exists(cfg.model)
    base = f"PATH OF {Path(cfg.model).name}" if local else cfg.model
    more = f"\n- ... {len(prompts)} in all" if len(prompts) > 20 else ""
    fields = vars(cfg) | dict(
        base=base,
        base_model="" if local else f"base_model: {base}\n",
        base_lora=f" The base has the LoRA {cfg.base_lora} in it." if cfg.base_lora else "",
        method=method_slug(vars(cfg)),
        load="from_single_file" if cfg.model.endswith(".safetensors") else "from_pretrained",
        kind=f', prediction_type="{cfg.prediction_type}"' if cfg.prediction_type else "",
        size=f", height={cfg.image_size}, width={cfg.image_size}" if cfg.image_size else "",
        queries=cfg.rounds * cfg.queries,
        reward=Path(cfg.reward).name,
        prompt=prompts[0],
        table="\n".join(table),
        prompts="\n".join(f"- {prompt}" for prompt in prompts[:20]) + more,
        webui=webui_name,
    )
    card = (ROOT / "docs/model_card.md").read_text(encoding="utf-8")
    write_text(folder / "README.md", card.format(**fields))


def last_lines(folder, rows, prompt):
    """What a finished run prints."""
    lines = ["", "Scores before and after, same noise:", *rows] if rows else []
    lines.append(f"Pictures: {folder}/before-after.png, grids/")
    lines.append(f"Draw: {paste('python', 'eval.py', '--lora', folder, '--prompt', prompt)}")
    return "\n".join(lines)
