"""F.1, Fig. 12: score differences of pairs that differ in the last step alone.

    python studies/last_step.py --metrics clip,bert

The pictures look alike, so a steady score gives them the same. The paper holds a
difference above 0.01 to be too large: CLIPScore has nearly none, BERTScore many.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eval import LABELS
from studies.common import main, markdown, rate, study_parser
from support.report import pyplot


def last_step(pipeline, rewards, judge, prompts, args):
    """Differences of R pairs by metric, printed; and their figure. No judge is asked."""
    policy, R = pipeline.policy, args.roots
    owners = [prompts[p % len(prompts)] for p in range(R)]
    each = [owner for owner in owners for _ in range(2)]
    roots = [(args.seed, "last-step", p) for p in range(R)]
    x_T = policy.noise([(*root, "x_T") for root in roots])
    keys = [(*root, "path") for root in roots]
    x_1 = policy.denoise(x_T, policy.schedule.T, 1, owners, keys)
    keys = [[(*root, k) for k in range(2)] for root in roots]
    x, _ = policy.branch(x_1, 1, 0, owners, keys)  # (R, 2, 2, C, h, w)
    rated = rate(pipeline, x[:, :, -1].flatten(0, 1), each, rewards)
    gaps = {name: (v[0::2] - v[1::2]).abs() for name, v in rated.items()}  # (R,)
    bounds = (0, max(0.02, *(gap.max().item() for gap in gaps.values())))
    figure, ax = pyplot().subplots(figsize=(5, 3.5))
    result, rows = {"pairs": R}, []
    for name, gap in gaps.items():
        above = (gap > 0.01).float().mean().item()
        label = LABELS.get(name, name)
        result[name] = {"above_0.01": above, "differences": gap.tolist()}
        rows.append([label, R, f"{gap.mean():.5f}", f"{gap.max():.5f}", f"{above:.1%}"])
        ax.hist(gap.numpy(), 40, range=bounds, alpha=0.6, label=label)
    head = ["score", "pairs", "mean difference", "largest", "share above 0.01"]
    print("\n".join(markdown(head, rows)))
    ax.axvline(0.01, color="k", linestyle="--", linewidth=1)
    ax.set(xlabel="score difference, same first T - 1 steps", ylabel="pairs")
    ax.locator_params(axis="x", nbins=5)
    ax.legend()
    return result, figure


def parser():
    return study_parser(__doc__.split("\n")[0], "last-step", 768)


if __name__ == "__main__":
    main(last_step, parser())
