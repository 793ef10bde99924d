"""Table 5: the share of branches whose pictures differ in alignment, by branching step.

    python studies/table5.py     # the tiny model; latents of Stable Diffusion take 2.5 GB

Each of R paths x_T..x_0 is branched K times at x_t, t = 2, 4, .., T. The paper does not
define "differ". Here [ours] a branch differs
    in a score, if max - min is above --differ standard deviations within the branches
    at T, which share x_T alone: an ordinary difference of two pictures of a prompt;
    to the judge (tiny), if some but not all of its K pictures are recognised.
The variance of r_hat within a branch says how much there is to choose from: scores are
divided by their prompt's std over all steps t, and the variance is relative to that at T.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from eval import LABELS
from studies.common import main, markdown, rate, study_parser
from support.command import positive
from support.report import pyplot

NAMES = LABELS | {"recognised": "judge"}
# Branching at t = 2, 4, ..., 20; every share is a multiple of 1/256, hence 256 roots
PAPER = (0.082, 0.168, 0.156, 0.281, 0.289, 0.340, 0.430, 0.445, 0.523, 0.664)


def differs(scores, threshold):
    """Branches (R, K) whose pictures differ, max - min being above `threshold`: (R,)."""
    return scores.max(1).values - scores.min(1).values > threshold


def relative_variance(scores, owners):
    """Scores (steps, R, K) of R prompts -> variance of r_hat within a branch over that at T."""
    r_hat = torch.zeros_like(scores)
    for prompt in set(owners):
        rows = [p for p, owner in enumerate(owners) if owner == prompt]
        r_hat[:, rows] = scores[:, rows] / scores[:, rows].std().clamp(min=1e-8)
    within = r_hat.var(2).mean(1)
    return within / within[-1].clamp(min=1e-8)


def table5(pipeline, rewards, judge, prompts, args):
    """Shares, thresholds and std within a branch by metric, printed; and their figure."""
    policy, T = pipeline.policy, pipeline.policy.schedule.T
    R, K = args.roots, args.branches
    owners = [prompts[p % len(prompts)] for p in range(R)]
    each = [owner for owner in owners for _ in range(K)]
    roots = [(args.seed, "table5", p) for p in range(R)]
    x_T = policy.noise([(*root, "x_T") for root in roots])
    path, _ = policy.branch(x_T, T, 0, owners, [[(*root, "path")] for root in roots])
    steps = sorted({*range(2, T + 1, 2), T})
    rated = []
    for t in steps:
        keys = [[(*root, t, k) for k in range(K)] for root in roots]
        x, _ = policy.branch(path[:, 0, T - t], t, 0, owners, keys)  # (R, K, t + 1, ...)
        rated.append(rate(pipeline, x[:, :, -1].flatten(0, 1), each, rewards, judge))
    result = {"steps": steps, "roots": R, "branches": K, "differ": args.differ}
    result |= {"share": {}, "threshold": {}, "relative_variance": {}}
    for name in rated[-1]:
        scores = torch.stack([at_t[name].view(R, K) for at_t in rated])  # (steps, R, K)
        within = scores[-1].var(1).mean().sqrt().item()  # of the branches that share x_T alone
        threshold = 0.0 if name == "recognised" else args.differ * within
        result["share"][name] = [differs(s, threshold).float().mean().item() for s in scores]
        result["threshold"][name] = threshold
        result["relative_variance"][name] = relative_variance(scores, owners).tolist()
    print("\n".join(table(result)))
    return result, draw(result)


def draw(result):
    """The shares over the branching step, beside the paper's where T is its 20."""
    figure, ax = pyplot().subplots(figsize=(5, 3.5))
    for name, share in result["share"].items():
        ax.plot(result["steps"], share, "o-", label=NAMES.get(name, name))
    if result["steps"][-1] == 20:
        ax.plot(result["steps"], PAPER, "k--", label="paper, SD 1.4")
    ax.set(xlabel="branching step t", xticks=result["steps"], ylim=(0, 1))
    ax.set_ylabel("share of branches that differ")
    ax.legend()
    return figure


def table(result):
    """The shares and the paper's, Markdown lines; of 256 roots a share has an error of 3 points."""
    rows = []
    for name, share in result["share"].items():
        label = NAMES.get(name, name)
        rows.append([f"{label} differs, %", *(f"{100 * p:.1f}" for p in share)])
        variance = [f"{v:.2f}" for v in result["relative_variance"][name]]
        rows.append([f"{label}, variance of r_hat over that at T", *variance])
        if result["steps"] == list(range(2, 21, 2)):
            gaps = [100 * (p - q) for p, q in zip(share[1:], PAPER[1:])]
            rms = (sum(gap**2 for gap in gaps) / len(gaps)) ** 0.5
            rows.append([f"{label}, RMS to the paper, t = 4..20: {rms:.1f} points"] + 10 * [""])
    if result["steps"][-1] == 20:
        rows.append(["paper, %", *(f"{100 * p:.1f}" for p in PAPER)])
    return markdown(["branching at t", *result["steps"]], rows)


def parser():
    parser = study_parser(__doc__.split("\n")[0], "table5", 256)
    parser.add_argument("--branches", type=positive, default=3, help="K (3) [Table 6]")
    text = "standard deviations that make a difference of scores (1)"
    parser.add_argument("--differ", type=float, default=1.0, help=text)
    return parser


if __name__ == "__main__":
    main(table5, parser())
