"""Draw docs/branches.png: a root, its branches, and how the training interval grows."""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from b2rl import tau_schedule

T, TAU, ROUNDS = 20, 14, 100
GREY, BAND, BEST, WORST = "#767676", "#e4edf7", "#1a7f37", "#c2410c"
BRANCHES = (  # height of its end; r_hat, and what Eq. 5 does with it (threshold 0.5)
    (1.0, "+1.1, best: trained", BEST),
    (0.0, "+0.2, between: not trained", GREY),
    (-1.0, "-0.9, worst: trained", WORST),
)


def draw_root(ax):
    """One root of round 1: a shared path, then K = 3 branches with their scores."""
    ax.axvspan(TAU, 0, color=BAND)
    ax.plot([T, TAU], [0, 0], "o-", color=GREY, lw=2.5)
    ax.text(T, 0.25, "$x_T$: noise", ha="center")
    ax.text(TAU + 0.3, 0.25, "$x_\\tau$", ha="right")
    ax.text((T + TAU) / 2, -0.4, "shared path, drawn once", ha="center", color=GREY)
    ax.text(TAU - 0.4, 1.3, "training interval: K = 3 branches of one root", weight="bold")
    t = np.linspace(TAU, 0, TAU + 1)
    for end, fate, colour in BRANCHES:
        ax.plot(t, end * np.sqrt(1 - t / TAU), ".-", color=colour, lw=2.5)
        ax.text(-0.4, end, f"$x_0$: $\\hat{{r}}$ = {fate}", color=colour, va="center")


def draw_growth(ax):
    """The interval of three rounds: first 14 steps, in the end all 20."""
    for row, i in enumerate((0, ROUNDS // 2, ROUNDS - 1)):
        tau = tau_schedule(i, ROUNDS, T, TAU)
        ax.barh([-row, -row], [T, tau], color=["#eeeeee", "#9dbfe3"], height=0.6)
        ax.text(-0.4, -row, f"round {i + 1} of {ROUNDS}: $\\tau$ = {tau}", va="center")
    for t in (20, 14, 10, 5, 0):
        ax.text(t, -2.9, t, ha="center")
    ax.text(10, -3.6, "time t: noise at 20, picture at 0", ha="center")


if __name__ == "__main__":
    figure, axes = plt.subplots(2, 1, figsize=(9, 4.4), height_ratios=(1.8, 1))
    draw_root(axes[0])
    draw_growth(axes[1])
    for ax, height in zip(axes, ((-1.3, 1.6), (-3.7, 0.5))):
        ax.set(xlim=(T + 1.2, -8.6), ylim=height)
        ax.axis("off")
    figure.subplots_adjust(0.01, 0.01, 0.99, 0.99, hspace=0.06)
    figure.savefig(Path(sys.path[0]) / "docs/branches.png", dpi=130)
