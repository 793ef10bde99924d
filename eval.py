"""Scores, pictures and studies of a model and of LoRA folders (Sec. 4, App. C and F).

    python eval.py --lora RUN --prompt "a cat washing dishes"     # base and LoRA side by side
    python eval.py --lora RUN1 RUN2 --template 1 --split unseen   # a table of scores, JSON, a grid
    python eval.py --study table5                                 # see `STUDIES`
    python eval.py --study curves --runs RUN1 RUN2 ...            # Fig. 5, 6, 8

    metric             what it is                                             source
    CLIPScore          cosine of CLIP's picture and text embeddings           Sec. 4.1
    BERTScore          recall of LLaVA's description, `--metrics clip,bert`   Sec. 4.1
    inception score    exp(E_x KL(p(y|x) || p(y))), `inception_score`         Eq. 9, App. F.2
    recognised         share that the tiny model's judge tells right          [ours], tiny only
    style entropy      of the icon styles that CLIP sees, nats                [ours], tiny only

A picture's noise is keyed by its prompt and number alone: the same for every model, method and
training seed, so models are compared in pairs. +- is a standard error over pictures.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch

import runs
from ddim_logprob import denoise, keyed_generator
from rewards import REWARDS, check_reward_name, load_reward

LABELS = {"clip": "CLIPScore", "bert": "BERTScore", "recognised": "judge"}
STUDIES = {
    "table5": "share of branches whose pictures differ in alignment (Table 5)",
    "last-step": "score differences of pairs that differ in the last step only (F.1, Fig. 12)",
    "tree": "a tree of branches with the rewards on its leaves (Fig. 11)",
    "curves": "reward and diversity against reward queries, over seeds (Fig. 5, 6, 8)",
}
# Table 5, branching at t = 2, 4, ..., 20; every share is a multiple of 1/256
PAPER_TABLE5 = (0.082, 0.168, 0.156, 0.281, 0.289, 0.340, 0.430, 0.445, 0.523, 0.664)
# What may differ between runs that are one line of the curves: it changes no expectation
SAME_LINE = {"seed", "out", "resume", "threads", "device", "precision", "sample_batch",
             "micro_batch", "decode_batch", "eval_images", "grid_every", "preset", "checkpointing",
             "offload", "tensorboard", "compile", "channels_last"}  # fmt: skip


# ---------------------------------------------------------------- scores


@torch.no_grad()
def evaluate(model, reward, prompts, each, args, judge=None, rank=0, world=1):
    """Score `each` pictures of every prompt, drawn from noise keyed by (prompt, number) alone.

    The noise is the same for every model, method and training seed, so scores can be compared in
    pairs. Processes share the work. Returns {"score": list of n, "recognised": list of n or None}
    and the pictures (m, 3, H, W) that this process made, number by number of every prompt.
    """
    owners = [(prompt, k) for k in range(each) for prompt in prompts]
    scores, recognised, images = torch.zeros(len(owners)), torch.zeros(len(owners)), []
    for at in runs.parts(torch.arange(len(owners))[rank::world], args.sample_batch):
        text = [owners[j][0] for j in at.tolist()]
        generators = [keyed_generator("evaluation", *owners[j]) for j in at.tolist()]
        x_T = torch.stack([torch.randn(model.latent_shape, generator=g) for g in generators])
        x_0 = denoise(model.unet, model.schedule, x_T.to(model.device), args.T, 0,
                      model.embed(text), model.embed([""]), args.guidance, generators)  # fmt: skip
        images.append(model.decode(x_0, args.decode_batch))
        scores[at] = reward(images[-1], text)
        if judge:
            recognised[at] = judge(images[-1], text).float()
    scores, recognised = (runs.all_sum(v, model.device).tolist() for v in (scores, recognised))
    images = torch.cat(images) if images else torch.zeros(0, 3, 8, 8)
    return {"score": scores, "recognised": recognised if judge else None}, images


def paired_gain(before, after):
    """Mean gain over the same (prompt, noise) pairs and its standard error."""
    gain = torch.tensor(after).double() - torch.tensor(before).double()
    error = gain.std() / len(gain) ** 0.5 if len(gain) > 1 else torch.zeros(())
    return gain.mean().item(), error.item()


def compare(before, after, score_name):
    """Scores before and after by prompt list -> a summary dict and the lines that print it."""
    rows, summary = [], {}
    for name in before:
        for what, label in (("score", score_name), ("recognised", "judge")):
            old, new = before[name][what], after[name][what]
            if old is None:
                continue
            gain, error = paired_gain(old, new)
            a, b = sum(old) / len(old), sum(new) / len(new)
            summary[f"{name}_{what}"] = dict(before=a, after=b, gain=gain, error=error, n=len(old))
            rows.append(f"  {name:7} {label:5}  {a:.4f} -> {b:.4f}   gain {gain:+.4f} +- "
                        f"{error:.4f} (standard error, {len(old)} pictures)")  # fmt: skip
    return summary, rows


def spread(thumbs, owners):
    """Mean std, over pictures of one prompt, of thumbnails (B, 3, 8, 8): falls on a collapse."""
    groups = [[j for j, o in enumerate(owners) if o == prompt] for prompt in dict.fromkeys(owners)]
    stds = [thumbs[g].std(0).mean() for g in groups if len(g) > 1]
    return torch.stack(stds).mean().item() if stds else 0.0


def inception_score(features):
    """Eq. 9: exp(E_x KL(p(y|x) || p(y))), p(y|x) the softmax of CLIP's raw picture embedding.

    features: (n, d), not normalised; one split [official]. Returns a number from 1 (all alike) to
    min(n, d); it depends on the scale of the features, so compare within one CLIP only.
    """
    log_p = features.double().log_softmax(1)  # log p(y|x)
    log_q = log_p.logsumexp(0) - math.log(len(log_p))  # log p(y), the mean over pictures
    return (log_p.exp() * (log_p - log_q)).sum(1).mean().exp().item()


def inception_left_out(features):
    """`inception_score` without each of the n >= 3 pictures in turn: (n,).

    With H the entropy, Eq. 9 is exp(H(mean p) - mean H(p)): both means without picture i are one
    subtraction away.
    """
    n = len(features)
    p = features.double().softmax(1)
    h = -torch.special.xlogy(p, p).sum(1)  # (n,), the entropy of each p(y|x)
    q = ((p.sum(0) - p) / (n - 1)).clamp(min=0)  # (n, d), p(y) without picture i
    return (-torch.special.xlogy(q, q).sum(1) - (h.sum() - h) / (n - 1)).exp()


def jackknife_error(left_out):
    """Standard error of a statistic from its values without each of n pictures (n,).

    The difference of two models' values, picture by picture, gives that of their difference on
    the same prompts and noise. Prompts count as random as pictures, so it errs upwards.
    """
    v = torch.tensor(left_out, dtype=torch.float64)
    return ((len(v) - 1) / len(v) * (v - v.mean()).square().sum()).sqrt().item()


def style_entropy(clip, images, prompts):
    """Entropy in nats of the tiny world's styles that CLIP sees in pictures (n, 3, H, W).

    A picture's style is the one whose caption "<prompt>, <style> style" CLIP scores highest.
    Returns the entropy (log 3 = 1.099 at most, 0 if all are of one style) and the shares.
    """
    from tiny import STYLES, style_prompts

    text = clip.embed_text([caption for p in prompts for caption in style_prompts(p)])
    seen = clip.embed_images(images)  # (n, d)
    scores = (text.view(len(images), len(STYLES), -1) * seen[:, None]).sum(2)
    share = torch.bincount(scores.argmax(1), minlength=len(STYLES)) / len(images)
    entropy = -torch.special.xlogy(share, share).sum().item() + 0.0  # + 0.0: no -0.0
    return entropy, dict(zip(STYLES, share.tolist()))


def mean_error(values):
    """Mean and standard error of a list of numbers."""
    v = torch.tensor(values).double()
    return v.mean().item(), (v.std() / len(v) ** 0.5).item() if len(v) > 1 else 0.0


def wilson(p, n, z=1.96):
    """The 95 % interval (low, high) of a share p of n; no point even where p is 0 or 1."""
    middle, half = p + z**2 / (2 * n), z * (p * (1 - p) / n + (z / (2 * n)) ** 2) ** 0.5
    return tuple(max(0.0, (middle + sign * half) / (1 + z**2 / n)) for sign in (-1, 1))


def score_model(model, rewards, clip, judge, prompts, args):
    """Every metric of one model: a row {label: value or (value, error)}, and its pictures."""
    owners = prompts * args.images
    first, *others = rewards
    scores, images = evaluate(model, rewards[first], prompts, args.images, args, judge)
    scores[first] = scores.pop("score")
    parts = list(zip(images.split(args.decode_batch), batches(owners, args.decode_batch)))
    for name in others:
        scores[name] = torch.cat([rewards[name](x, text) for x, text in parts]).tolist()
    row = {LABELS.get(name, name): mean_error(scores[name]) for name in rewards}
    if "is" in args.metrics:
        features = clip.model.embed_images(images, normalize=False)
        left_out = inception_left_out(features).tolist() if len(features) > 2 else [0.0]
        row["inception score"] = inception_score(features), jackknife_error(left_out)
        row["inception score, left out"] = left_out
    if judge:
        row["recognised"] = mean_error(scores["recognised"])
    if model.tiny and judge and clip:
        row["style entropy"], row["styles"] = style_entropy(clip.model, images, owners)
    return row | {"n": len(owners), "scores": scores}, images


def print_table(results):
    """A Markdown table, a row a model."""
    hidden = ("scores", "styles", "n", "inception score, left out")
    columns = [c for c in next(iter(results.values())) if c not in hidden]
    print("| model | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for name, row in results.items():
        cells = [f"{v[0]:.4f} +- {v[1]:.4f}" if isinstance(v, tuple) else f"{v:.4f}"
                 for v in (row[c] for c in columns)]  # fmt: skip
        print(f"| {name} | " + " | ".join(cells) + " |")


# ---------------------------------------------------------------- studies


def batches(values, size):
    return [values[lo : lo + size] for lo in range(0, len(values), size)]


def pyplot():
    """matplotlib, only where a picture needs it."""
    try:
        import matplotlib
    except ImportError:
        runs.die("the pictures of --study need matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save_figure(figure, path):
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot().close(figure)


def walk(model, owners, x, start, stop, keys, args, keep=False):
    """`denoise` in batches: x (n, C, h, w) of n prompts, keys for n * K branches, K a row of x.

    Returns x_stop (n * K, C, h, w) on the CPU, or the states x_start..x_stop with `keep`.
    """
    K, out = len(keys) // len(owners), []
    for at in torch.arange(len(owners)).split(max(1, args.sample_batch // K)):
        lo, hi = at[0].item(), at[-1].item() + 1
        generators = [keyed_generator(*key) for key in keys[lo * K : hi * K]]
        x_stop = denoise(model.unet, model.schedule, x[lo:hi].to(model.device), start, stop,
                         model.embed(owners[lo:hi]), model.embed([""]), args.guidance, generators,
                         keep)  # fmt: skip
        out.append((x_stop[1] if keep else x_stop).cpu())
    return torch.cat(out)


def first_noise(model, keys):
    """x_T of n keys: (n, C, h, w)."""
    return torch.stack(
        [torch.randn(model.latent_shape, generator=keyed_generator(*key)) for key in keys]
    )


def rate(model, x_0, owners, rewards, judge, args):
    """Scores of latents x_0 (n, C, h, w): {metric: (n,)}, and "recognised" if there is a judge."""
    out = {}
    for latents, text in zip(x_0.split(args.decode_batch), batches(owners, args.decode_batch)):
        images = model.decode(latents, args.decode_batch)
        for name, reward in rewards.items():
            out.setdefault(name, []).append(reward(images, text))
        if judge:
            out.setdefault("recognised", []).append(judge(images, text).float())
    return {name: torch.cat(parts) for name, parts in out.items()}


def differs(scores, threshold):
    """Branches (R, K) whose pictures differ: max - min of the scores is above `threshold`. (R,)"""
    return scores.max(1).values - scores.min(1).values > threshold


def table5(model, rewards, judge, prompts, args):
    """Table 5: the share of branches whose pictures differ in alignment, by branching step.

    Each of `roots` paths x_T..x_0 is branched K times at x_t, t = 2, 4, .., T. The paper does not
    define "differ". Here [ours] a branch differs
        in a score, if its max - min is above --differ times the standard deviation within the
        branches at t = T, where pictures share but their first noise: the size of an ordinary
        difference between two pictures of a prompt;
        to the judge (tiny), if some but not all of its K pictures are recognised.
    """
    R, K, T = args.roots, args.branches, args.T
    owners = [prompts[p % len(prompts)] for p in range(R)]
    x_T = first_noise(model, [(args.seed, "table5", p, "x_T") for p in range(R)])
    keys = [(args.seed, "table5", p, "path") for p in range(R)]
    path = walk(model, owners, x_T, T, 0, keys, args, keep=True)  # (R, T + 1, C, h, w)
    steps, scores = sorted({*range(2, T + 1, 2), T}), {}
    each = [owner for owner in owners for _ in range(K)]
    for t in steps:
        keys = [(args.seed, "table5", p, t, k) for p in range(R) for k in range(K)]
        x_0 = walk(model, owners, path[:, T - t], t, 0, keys, args)
        rated = rate(model, x_0, each, rewards, judge, args)
        scores[t] = {name: v.view(R, K) for name, v in rated.items()}
    result = {"steps": steps, "roots": R, "branches": K, "differ": args.differ, "share": {},
              "threshold": {}, "std_within": {}}  # fmt: skip
    for name in scores[T]:
        within = {t: scores[t][name].var(1).mean().sqrt().item() for t in steps}
        threshold = 0.0 if name == "recognised" else args.differ * within[T]
        share = [differs(scores[t][name], threshold).float().mean().item() for t in steps]
        result["share"][name], result["std_within"][name] = share, list(within.values())
        result["threshold"][name] = threshold
    print("| branching at t | " + " | ".join(map(str, steps)) + " |")
    print("|---" * (len(steps) + 1) + "|")
    plt = pyplot()
    figure, ax = plt.subplots(figsize=(5, 3.5))
    for name, share in result["share"].items():
        label = LABELS.get(name, name)
        ax.plot(steps, share, "o-", label=label)
        cells = ["{:.1f} ({:.1f} to {:.1f})".format(*(100 * v for v in (p, *wilson(p, R))))
                 for p in share]  # fmt: skip
        print(f"| {label} differs, % | " + " | ".join(cells) + " |")
        within = " | ".join(f"{v:.4f}" for v in result["std_within"][name])
        print(f"| {label}, std within a branch | {within} |")
    if T == 20:
        print("| paper, % | " + " | ".join(f"{100 * p:.1f}" for p in PAPER_TABLE5) + " |")
        ax.plot(steps, PAPER_TABLE5, "k--", label="paper, SD 1.4")
    ax.set(xlabel="branching step t", ylabel="share of branches that differ", ylim=(0, 1),
           xticks=steps)  # fmt: skip
    ax.legend()
    save_figure(figure, Path(args.out) / "table5.png")
    return result


def last_step(model, rewards, judge, prompts, args):
    """F.1, Fig. 12: score differences of pairs that share x_T..x_1 and differ in the last step.

    The pictures look alike, so a steady score gives them the same; the paper holds a difference
    above 0.01 to be too large and reports nearly none for CLIPScore, many for BERTScore.
    """
    R = args.roots
    owners = [prompts[p % len(prompts)] for p in range(R)]
    x_T = first_noise(model, [(args.seed, "last-step", p, "x_T") for p in range(R)])
    keys = [(args.seed, "last-step", p, "path") for p in range(R)]
    x_1 = walk(model, owners, x_T, args.T, 1, keys, args)
    keys = [(args.seed, "last-step", p, k) for p in range(R) for k in range(2)]
    x_0 = walk(model, owners, x_1, 1, 0, keys, args)
    rated = rate(model, x_0, [o for o in owners for _ in range(2)], rewards, None, args)
    gaps = {name: (scores[0::2] - scores[1::2]).abs() for name, scores in rated.items()}  # (R,)
    bins = torch.linspace(0, max(0.02, *(gap.max().item() for gap in gaps.values())), 41).numpy()
    result, plt = {"pairs": R}, pyplot()
    figure, ax = plt.subplots(figsize=(5, 3.5))
    print("| score | pairs | mean difference | largest | share above 0.01 |\n|---|---|---|---|---|")
    for name, gap in gaps.items():
        above, label = (gap > 0.01).float().mean().item(), LABELS.get(name, name)
        result[name] = {"above_0.01": above, "differences": gap.tolist()}
        print(f"| {label} | {R} | {gap.mean():.5f} | {gap.max():.5f} | {100 * above:.1f} % |")
        ax.hist(gap.numpy(), bins=bins, alpha=0.6, label=label)
    ax.axvline(0.01, color="k", linestyle="--", linewidth=1)
    ax.set(xlabel="score difference, same first T - 1 steps", ylabel="pairs")
    ax.legend()
    save_figure(figure, Path(args.out) / "last-step.png")
    return result


def tree(model, rewards, judge, prompts, args):
    """Fig. 11 in spirit: B branches at t = T, 0.7 T, 0.35 T; rewards on the leaves.

    An inner node bears the mean reward of its leaves, which is what its state is worth.
    """
    B, prompt = args.branches, prompts[0]
    starts = sorted({args.T, max(1, round(0.7 * args.T)), max(1, round(0.35 * args.T))})[::-1]
    x = first_noise(model, [(args.seed, "tree", prompt, "x_T")])
    for start, stop in zip(starts, [*starts[1:], 0]):
        keys = [(args.seed, "tree", prompt, start, j) for j in range(len(x) * B)]
        x = walk(model, [prompt] * len(x), x, start, stop, keys, args)
    rated = rate(model, x, [prompt] * len(x), rewards, judge, args)
    name = next(iter(rewards))
    leaves, right, depth = rated[name], rated.get("recognised"), len(starts)
    plt = pyplot()
    figure, ax = plt.subplots(figsize=(1.1 * len(x), 1.6 * depth + 1.6))
    for d, t in enumerate([*starts, 0]):  # the nodes at depth d stand above their leaves
        nodes, below = B**d, len(x) // B**d
        places = [(j + 0.5) * below - 0.5 for j in range(nodes)]
        for j, (at, value) in enumerate(zip(places, leaves.view(nodes, -1).mean(1).tolist())):
            y = 1.4 * (depth - d)
            if d:
                parent = (j // B + 0.5) * below * B - 0.5
                ax.plot([parent, at], [y + 1.4, y], color="0.6", zorder=0)
            if d < depth:
                ax.text(at, y, f"$x_{{{t}}}$\n{value:.3f}", ha="center", va="center",
                        bbox=dict(facecolor="white", edgecolor="0.6"))  # fmt: skip
            else:
                colour = "k" if right is None else "g" if right[j] else "r"
                ax.text(at, -1.05, f"{value:.3f}", ha="center", va="top", color=colour)
    for j, image in enumerate(model.decode(x, args.decode_batch)):
        ax.imshow(image.permute(1, 2, 0).numpy(), extent=(j - 0.46, j + 0.46, -0.92, 0))
    judged = "" if right is None else "; green: recognised by the judge"
    ax.set(xlim=(-0.6, len(x) - 0.4), ylim=(-1.5, 1.4 * depth + 0.6),
           title=f"{prompt}: {LABELS.get(name, name)}{judged}")  # fmt: skip
    ax.axis("off")
    save_figure(figure, Path(args.out) / "tree.png")
    print(f"{prompt}: branches at t = {', '.join(map(str, starts))}, {len(x)} leaves, "
          f"{LABELS.get(name, name)} {leaves.min():.4f} to {leaves.max():.4f}")  # fmt: skip
    return {"prompt": prompt, "starts": starts} | {k: v.tolist() for k, v in rated.items()}


def method_name(config):
    """A run's method, as the paper calls it: DDPO, BPT, BS, BPT+BS, PG, PG BPT+BS, ..."""
    bpt = [] if config["no_bpt"] else ["BPT" if config["interval"] == "backward" else "forward"]
    strategies = "+".join(bpt + ([] if config["no_bs"] else ["BS"]))
    if config["algo"] == "ddpo":
        return strategies or "DDPO"
    return f"{config['algo'].upper()} {strategies}".strip()


def read_run(folder):
    """Settings and metrics lines of the run in `folder`; ends with one line if it has none."""
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text.splitlines()]
        method_name(config)
    except (OSError, ValueError, KeyError, TypeError):
        runs.die(f"{folder} is no run: it needs a readable config.json and metrics.jsonl")
    return (config, lines) if lines else runs.die(f"the run {folder} has not finished a round")


def group_runs(folders):
    """Run folders -> {method: [metrics lines of each seed]}.

    Runs of one method that differ in more than seed and batch sizes are told apart by name.
    """
    told = [(method_name(config), config, lines) for config, lines in map(read_run, folders)]
    groups = {}
    for name, config, lines in told:
        alike = [c for n, c, _ in told if n == name]
        keys = {k for c in alike for k in c} - SAME_LINE  # a key that is not there: off or 0
        vary = [k for k in keys if len({str(c.get(k) or 0) for c in alike}) > 1]
        label = ", ".join([name, *(f"{k} {config.get(k, 0)}" for k in sorted(vary))])
        groups.setdefault(label, []).append(lines)
    return groups


def curve(seeds, what):
    """Metrics lines of each seed -> queries (n,), mean and spread (n,) over seeds of `what`.

    Only the rounds that every seed has. The spread is the unbiased std, 0 for a single seed.
    """
    tables = [{line["queries"]: line[what] for line in lines} for lines in seeds]
    queries = sorted(set.intersection(*(set(table) for table in tables)))
    values = torch.tensor([[table[q] for q in queries] for table in tables], dtype=torch.float64)
    deviation = values.std(0) if len(seeds) > 1 else torch.zeros(len(queries))
    return queries, values.mean(0).tolist(), deviation.tolist()


def curves(args):
    """Fig. 5, 6, 8: reward of the round's pictures against reward queries, by method; diversity.

    Diversity is `spread_within_prompt` over its value in the first round: pictures of a branch
    are alike, so the values themselves do not compare between methods with and without BS. Nor
    do they quite with BPT: branches are more alike at tau0, in the first round, than later at T.
    """
    groups, result, plt = group_runs(args.runs), {}, pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    for label, seeds in groups.items():
        result[label] = {"seeds": len(seeds)}
        for ax, what in zip(axes, ("reward_mean", "spread_within_prompt")):
            queries, mean, deviation = curve(seeds, what)
            if not queries:
                runs.die(f"the runs of {label} have no round with equal queries in common")
            unit = mean[0] if what == "spread_within_prompt" and mean[0] else 1.0
            mean, deviation = ([v / unit for v in values] for values in (mean, deviation))
            ax.plot(queries, mean, label=f"{label} ({len(seeds)} seeds)")
            ax.fill_between(queries, [m - s for m, s in zip(mean, deviation)],
                            [m + s for m, s in zip(mean, deviation)], alpha=0.2)  # fmt: skip
            result[label] |= {"queries": queries, what: {"mean": mean, "std": deviation}}
    axes[0].set(xlabel="reward queries", ylabel="mean reward of the round")
    axes[1].set(xlabel="reward queries", ylabel="spread within a prompt / first round")
    axes[0].legend()
    save_figure(figure, Path(args.out) / "curves.png")
    print("| method | seeds | queries | reward: first round | last round | spread over seeds |\n"
          "|---|---|---|---|---|---|")  # fmt: skip
    for label, r in result.items():
        mean, deviation = r["reward_mean"]["mean"], r["reward_mean"]["std"]
        print(f"| {label} | {r['seeds']} | {r['queries'][-1]} | {mean[0]:.4f} | {mean[-1]:.4f} | "
              f"{deviation[-1]:.4f} |")  # fmt: skip
    return result


# ---------------------------------------------------------------- the command


def read_lora(folder):
    """The LoRA tensors of a run folder or a .safetensors file; ends with a clear line if none."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(folder)
    if path.is_dir():
        path = path / "pytorch_lora_weights.safetensors"
        if not path.exists() and (path.parent / "config.json").exists():
            runs.die(f"the run {folder} is not finished: python train.py --resume {folder}")
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as problem:
        runs.die(f"no LoRA at {path} ({problem}): give a run folder or a .safetensors file")
    if not any(name.endswith("lora_A.weight") for name in state):
        runs.die(f"{path} holds no LoRA in the names that train.py writes (unet...lora_A.weight)")
    return state


def apply_lora(model, name, state):
    """Put the LoRA `state` into the UNet; ends with one line if it is of another model."""
    from lora import inject_lora, load_lora

    try:
        inject_lora(model.unet, next(v.shape[0] for k, v in state.items() if "lora_A" in k))
        load_lora(model.unet, state)
    except ValueError as problem:
        runs.die(f"{name}: {problem}")


def parse_args(argv):
    from train import SETTINGS  # here, as train.py imports this file

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: runs.die(f"{message} (see --help)")
    add = parser.add_argument
    add("--lora", nargs="*", default=[], metavar="RUN", help="run folders or LoRA files")
    add("--no-base", action="store_true", help="leave the base model out")
    add("--model", help="base model (default: that of the first run, else tiny)")
    add("--prompt", action="append", help="a prompt of your own; may be repeated")
    add("--prompts", help="a file of prompts, one a line")
    add("--template", type=int, choices=(1, 2, 3), default=1, help="prompt template (App. H)")
    add("--split", choices=("train", "unseen"), default="train", help="which list of the template")
    add("--metrics", default="clip,is", help="by commas: is (inception score), "
        f"{', '.join(REWARDS)} or your own file.py:function, whose code is run")  # fmt: skip
    add("--images", type=int, help="pictures a prompt (default 8 with --prompt, else 2)")
    add("--study", choices=tuple(STUDIES), help="; ".join(f"{k}: {v}" for k, v in STUDIES.items()))
    add("--runs", nargs="+", metavar="RUN", help="curves: run folders, grouped by method")
    add("--roots", type=int, help="table5: paths to branch (default 256 [paper, inferred]); "
        "last-step: pairs (default 768 [paper])")  # fmt: skip
    add("--branches", type=int, help="table5: branches of a path (default 3 [paper, Table 6]); "
        "tree: of a node (default 2)")  # fmt: skip
    add("--differ", type=float, help="table5: what counts as a difference of scores, in standard "
        "deviations within the branches at t = T (default 1 [ours])")  # fmt: skip
    add("--seed", type=int, default=0, help="keys the noise of a study")
    add("--T", type=int, help="denoising steps (default: the run's, else train.py's)")
    add("--eta", type=float, help="weight of DDIM's noise (likewise)")
    add("--guidance", type=float, help="guidance scale (likewise)")
    add("--image-size", type=int, help="pixels a side (likewise)")
    add("--prediction-type", choices=("epsilon", "v_prediction"), help="what the UNet predicts "
        "(default: the run's, else as the model's files say)")  # fmt: skip
    add("--device", help="cuda, cpu or mps (default: cuda where there is one, else cpu)")
    add("--precision", choices=tuple(runs.DTYPES), help="(default fp16 on CUDA, else fp32)")
    add("--batch", type=int, help="pictures at once (default 8, tiny 64)")
    add("--out", default="runs/eval", help="folder for the JSON and the pictures")
    args = parser.parse_args(argv)
    check(args)
    configs = [runs.read_json(Path(r) / "config.json") for r in args.lora if Path(r).is_dir()]
    configs = [config for config in configs if config]
    first = configs[0] if configs else {}
    for name in ("model", "T", "eta", "guidance", "image_size", "prediction_type"):
        values = sorted({str(config.get(name)) for config in configs})
        if len(values) > 1 and getattr(args, name) is None:
            flag = name.replace("_", "-")
            runs.die(f"the runs differ in {flag}, {' and '.join(values)}: choose by --{flag}")
    if args.study != "curves":
        runs.choose_device(args)
    args.model = args.model or first.get("model", "tiny")
    args.image_size, args.checkpointing = args.image_size or first.get("image_size"), False
    args.compile = args.channels_last = False
    args.prediction_type = args.prediction_type or first.get("prediction_type")
    is_tiny = runs.tiny_folder(args.model) is not None
    for name, _, sd, tiny, _ in SETTINGS:
        if name in ("T", "eta", "guidance") and getattr(args, name) is None:
            setattr(args, name, first.get(name, tiny if is_tiny else sd))
    args.precision = args.precision or runs.default_precision(args.device or "cpu", is_tiny)
    args.sample_batch = args.decode_batch = args.batch or (64 if is_tiny else 8)
    args.images = args.images or (8 if args.prompt else 2)
    args.roots = args.roots or {"last-step": 768}.get(args.study, 256)
    args.branches = args.branches or {"tree": 2}.get(args.study, 3)
    args.differ = 1.0 if args.differ is None else args.differ
    return args


def check(args):
    """Refuse flags that can not work, before anything is loaded."""
    args.metrics = [m.strip() for m in args.metrics.split(",") if m.strip()]
    problems = [check_reward_name(m) for m in args.metrics if m != "is"]
    readers = {"roots": ("table5", "last-step"), "branches": ("table5", "tree"),
               "differ": ("table5",), "runs": ("curves",)}  # fmt: skip
    rules = (
        *((p is None, p) for p in problems),
        (args.metrics, "--metrics is empty"),
        *((getattr(args, n) is None or getattr(args, n) >= 1, f"--{n} must be 1 or more")
          for n in ("images", "batch", "roots", "T")),
        (args.image_size is None or args.image_size >= 1, "--image-size must be 1 or more"),
        (args.eta is None or args.eta > 0, "--eta must be above 0"),
        (args.branches is None or args.branches >= 2, "--branches must be 2 or more"),
        (args.differ is None or args.differ > 0, "--differ must be above 0"),
        *((getattr(args, n) is None or args.study in of, f"--{n} belongs to --study "
           f"{' or '.join(of)}") for n, of in readers.items()),
        (args.study != "curves" or args.runs, "--study curves needs --runs RUN1 RUN2 ..."),
        (not args.no_base or args.lora, "--no-base leaves nothing to score without --lora"),
        (not args.study or len(args.lora) <= 1, "--study takes one --lora at most"),
        (not args.prompt or all(p.strip() for p in args.prompt), "--prompt is empty"),
    )  # fmt: skip
    for fine, message in rules:
        if not fine:
            runs.die(message)


def choose_prompts(args):
    """The prompts to draw, and those among which the judge has to tell them."""
    train, unseen = runs.load_prompts(args.template, args.prompts)
    if args.prompt:
        return args.prompt, list(dict.fromkeys(train + unseen + args.prompt))
    prompts = unseen if args.split == "unseen" else train
    return prompts or runs.die(f"{args.prompts} has no [{args.split}] list"), train + unseen


def run(args):
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    if args.study == "curves":
        runs.write_json(folder / "curves.json", curves(args))
        return
    if args.study:
        pyplot()  # a missing matplotlib should not be found out after an hour
    prompts, known = choose_prompts(args)
    loras = {str(r): read_lora(r) for r in args.lora}
    if not (args.no_base or args.study and loras):
        loras = {"base": None, **loras}

    device = torch.device(args.device)
    model = runs.load_model(args, device)
    dtype = runs.DTYPES[args.precision]
    names = [m for m in args.metrics if m != "is"] or ["clip"]
    rewards = {m: load_reward(m, model.tiny, device, dtype) for m in names}
    clip = rewards.get("clip")
    if clip is None and "is" in args.metrics and not args.study:
        clip = load_reward("clip", model.tiny, device, dtype)
    judge = runs.load_judge(model, known)
    results, rows = {}, []
    for name, state in loras.items():
        if state is not None:
            apply_lora(model, name, state)
        if args.study:
            study = {"table5": table5, "last-step": last_step, "tree": tree}[args.study]
            result = study(model, rewards, judge, prompts, args)
            runs.write_json(folder / f"{args.study}.json", {"settings": vars(args), **result})
            print(f"\nNumbers and picture: {folder}/{args.study}.json, .png")
            return
        results[name], images = score_model(model, rewards, clip, judge, prompts, args)
        rows.append(images.unflatten(0, (args.images, len(prompts))))  # (number, prompt, ...)
    print_table(results)
    print(f"\n+- is the standard error over {next(iter(results.values()))['n']} pictures a model.")
    runs.write_json(folder / "scores.json", {"settings": vars(args), "results": results})
    if args.prompt:  # for each prompt a row a model, a column a noise
        grid = [row[:, p] for p in range(len(prompts)) for row in rows]
    else:  # a row a model, a column a prompt and its noise, from all over the list
        grid = [row[0, :: max(1, len(prompts) // 9)][:9] for row in rows]
    runs.save_grid(folder / "grid.png", torch.cat(grid), len(grid[0]))
    order = "for each prompt " if len(prompts) > 1 and args.prompt else ""
    print(f"Pictures, {order}a row a model in this order, the same noise a column: "
          f"{folder}/grid.png")  # fmt: skip


def main(argv=None):
    """Print a Markdown table, write JSON and pictures; bad input ends with one line."""
    args = parse_args(argv)
    try:
        run(args)
    except runs.Stop as problem:
        runs.die(problem)
    except OSError as problem:
        runs.die(f"cannot write to {args.out}: {problem.strerror or problem}")
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    main(sys.argv[1:])
