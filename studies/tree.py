"""Fig. 11 in spirit: a tree of branches, pictures and their rewards on its leaves.

    python studies/tree.py --prompt "a cat washing dishes"

A state has B branches at t = T, 0.7 T and 0.35 T. An inner node bears the mean reward
of its leaves: what its state is worth.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eval import LABELS
from studies.common import main, pyplot, rate, save_figure, study_parser


def tree(model, rewards, judge, prompts, args):
    """Scores of the leaves of the first prompt's tree by metric; draws the tree."""
    B, T, prompt = args.branches, model.schedule.T, prompts[0]
    starts = sorted({T, max(1, round(0.7 * T)), max(1, round(0.35 * T))})[::-1]
    x = model.noise([(args.seed, "tree", prompt, "x_T")])
    for start, stop in zip(starts, [*starts[1:], 0]):
        key, n = (args.seed, "tree", prompt, start), len(x)
        keys = [[(*key, j * B + k) for k in range(B)] for j in range(n)]
        x = model.branch(x, start, stop, [prompt] * n, keys)[0][:, :, -1].flatten(0, 1)
    n, first = len(x), next(iter(rewards))
    rated, label = rate(model, x, [prompt] * n, rewards, judge), LABELS.get(first, first)
    figure, ax = pyplot().subplots(figsize=(1.1 * n, 1.6 * len(starts) + 1.6))
    draw(ax, model.decode(x), rated[first], rated.get("recognised"), starts, B)
    judged = "; green: recognised by the judge" if judge else ""
    ax.set(xlim=(-0.6, n - 0.4), ylim=(-1.5, 1.4 * len(starts) + 0.6))
    ax.set(title=f"{prompt}: {label}{judged}")
    ax.axis("off")
    save_figure(figure, Path(args.out) / "tree.png")
    low, high = rated[first].min(), rated[first].max()
    print(f"{prompt}: branches at t = {starts}, {n} leaves, {label} {low:.4f} to {high:.4f}")
    return {"prompt": prompt, "starts": starts} | {k: v.tolist() for k, v in rated.items()}


def draw(ax, pictures, leaves, right, starts, B):
    """Nodes above pictures and their scores (n,); right: (n,) of the judge, or None."""
    box = dict(facecolor="white", edgecolor="0.6")
    for depth in range(len(starts) + 1):
        below, y = len(leaves) // B**depth, 1.4 * (len(starts) - depth)
        for j, value in enumerate(leaves.view(-1, below).mean(1).tolist()):
            x = (j + 0.5) * below - 0.5
            if depth > 0:
                parent = (j // B + 0.5) * below * B - 0.5
                ax.plot([parent, x], [y + 1.4, y], color="0.6", zorder=0)
            if depth < len(starts):
                text = f"$x_{{{starts[depth]}}}$\n{value:.3f}"
                ax.text(x, y, text, ha="center", va="center", bbox=box)
    for j, (picture, value) in enumerate(zip(pictures.numpy(), leaves.tolist())):
        ax.imshow(picture.transpose(1, 2, 0), extent=(j - 0.46, j + 0.46, -0.92, 0))
        colour = "k" if right is None else "g" if right[j] else "r"
        ax.text(j, -1.05, f"{value:.3f}", ha="center", va="top", color=colour)


def parser():
    return study_parser(__doc__.split("\n")[0], "tree", branches=(2, "of a state"))


if __name__ == "__main__":
    main(tree, parser())
