"""Table 5 and Fig. 12: how often branches differ in alignment, by the step at which they part.

    python studies/table5.py                        # the tiny model
    python studies/table5.py --metrics clip,bert    # the paper's two scores

Each of R paths x_T..x_0 is branched K times at x_t, t = 1, 2, 4, .., T. The paper does not
define "differ". Here [ours] a branch differs
    in a score, if max - min is above the standard deviation within the branches at T,
    which share x_T alone: an ordinary difference of two pictures of a prompt;
    to the judge (tiny), if some but not all of its K pictures are recognised.
The variance of r_hat within a branch says how much there is to choose from: scores are
normalised by their prompt's over all steps t, and the variance is relative to that at T.

Pictures that part at t = 1 look alike, so a steady score gives them the same. The paper holds
a difference above 0.01 to be too large (App. F.1, Fig. 12): CLIPScore has nearly none,
BERTScore many. Latents of Stable Diffusion take 2.5 GB.
"""

import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# Ours first: `support` sets what torch reads when it is imported
from eval import LABELS, base_parser, fill_in, guarded, load, load_lora
from b2rl import RewardNormaliser
from studies.common import markdown
from support.command import die, positive, progress
from support.prompts import load_prompts
from support.report import pyplot, save_figure
from support.run_folder import write_json

import torch

NAMES = LABELS | {"recognised": "judge"}
# Branching at t = 2, 4, ..., 20; every share is a multiple of 1/256, hence 256 roots
PAPER = (0.082, 0.168, 0.156, 0.281, 0.289, 0.340, 0.430, 0.445, 0.523, 0.664)


def rate(pipeline, x_0, owners, rewards):
    """Scores of latents x_0 (n, C, h, w) of n prompts: {metric: (n,)}."""
    scores = defaultdict(list)
    for rows in progress(torch.arange(len(x_0)).split(pipeline.decode_batch), "scoring"):
        images = pipeline.decode(x_0[rows])
        prompts = [owners[j] for j in rows]
        for name, reward in rewards.items():
            scores[name].append(reward(images, prompts).float())
    return {name: torch.cat(parts) for name, parts in scores.items()}


def table5(pipeline, rewards, judge, prompts, args):
    """By metric: shares, thresholds, variances, and the differences of pairs that part at t = 1."""
    policy, T = pipeline.policy, pipeline.policy.schedule.T
    R, K = args.roots, args.branches
    owners = (prompts * R)[:R]
    rewards = rewards | ({"recognised": judge} if judge else {})
    each = [owner for owner in owners for _ in range(K)]
    roots = [(args.seed, "table5", p) for p in range(R)]
    x_T = policy.noise([(*root, "x_T") for root in roots])
    path, _ = policy.branch(x_T, T, 0, owners, [[(*root, "path")] for root in roots])
    steps = sorted({1, *range(2, T + 1, 2), T})
    rated = []
    for t in steps:
        keys = [[(*root, t, k) for k in range(K)] for root in roots]
        x, _ = policy.branch(path[:, 0, T - t], t, 0, owners, keys)  # (R, K, t + 1, ...)
        rated.append(rate(pipeline, x[:, :, -1].flatten(0, 1), each, rewards))
    result = {"steps": steps, "roots": R, "branches": K}
    result |= {"share": {}, "threshold": {}, "relative_variance": {}, "last_step": {}}
    for name in rated[-1]:
        scores = torch.stack([at_t[name].view(R, K) for at_t in rated])  # (steps, R, K)
        within = scores[-1].var(1).mean().sqrt().item()  # of the branches that share x_T alone
        threshold = 0.0 if name == "recognised" else within
        differs = scores.max(2).values - scores.min(2).values > threshold
        result["share"][name] = differs.float().mean(1).tolist()
        result["threshold"][name] = threshold
        r_hat = RewardNormaliser(0)(0, owners, scores.movedim(0, 1).flatten(1))
        variance = r_hat.view(R, -1, K).var(2).mean(0)  # within a branch, by step
        result["relative_variance"][name] = (variance / variance[-1].clamp(min=1e-8)).tolist()
        pairs = scores[0] - scores[0].roll(1, 1)  # each branch and the one before it
        result["last_step"][name] = pairs.abs().flatten().tolist()
    return result


def draw(result):
    """Shares over the branching step, beside the paper's of T = 20; the last step's differences."""
    figure, (ax, last) = pyplot().subplots(1, 2, figsize=(10, 3.5))
    for name, share in result["share"].items():
        ax.plot(result["steps"], share, "o-", label=NAMES.get(name, name))
        if name != "recognised":
            last.hist(result["last_step"][name], 40, alpha=0.6, label=LABELS.get(name, name))
    if result["steps"][-1] == 20:
        ax.plot(range(2, 21, 2), PAPER, "k--", label="paper, SD 1.4")
    ax.set(xlabel="branching step t", xticks=result["steps"][1:], ylim=(0, 1))
    ax.set_ylabel("share of branches that differ")
    last.axvline(0.01, color="k", linestyle="--", linewidth=1)
    last.set(xlabel="score difference, same first T - 1 steps", ylabel="pairs")
    ax.legend()
    last.legend()
    return figure


def table(result):
    """The shares and the paper's, Markdown lines; of 256 roots a share has an error of 3 points."""
    rows, notes = [], []
    for name, share in result["share"].items():
        label = NAMES.get(name, name)
        rows.append([f"{label} differs, %", *(f"{100 * p:.1f}" for p in share)])
        variance = [f"{v:.2f}" for v in result["relative_variance"][name]]
        rows.append([f"{label}, variance of r_hat over that at T", *variance])
        if result["steps"][1:] == list(range(2, 21, 2)):
            gaps = 100 * (torch.tensor(share[2:]) - torch.tensor(PAPER[1:]))
            rms = gaps.square().mean().sqrt().item()
            notes.append(f"{label}, RMS to the paper, t = 4..20: {rms:.1f} points")
        gaps = torch.tensor(result["last_step"][name])
        text = f"mean {gaps.mean():.5f}, largest {gaps.max():.5f}, {(gaps > 0.01).sum()} above 0.01"
        notes.append(f"{label}, {len(gaps)} pairs that part at t = 1: {text}")
    if result["steps"][-1] == 20:
        rows.append(["paper, %", "", *(f"{100 * p:.1f}" for p in PAPER)])
    return [*markdown(["branching at t", *result["steps"]], rows), "", *notes]


def run(args):
    """Keep the numbers and the figure in args.out."""
    prompts, _ = load_prompts(args.template, args.prompts)
    pipeline, rewards, _, judge = load(args, prompts)
    if args.lora:
        load_lora(pipeline.pipe, args.lora[0])
    result = table5(pipeline, rewards, judge, prompts, args)
    print("\n".join(table(result)))
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "table5.json", {"settings": vars(args), **result})
    save_figure(draw(result), folder / "table5.png")
    print(f"\nNumbers and picture: {folder}/table5.json, .png")


def main(argv=None):
    parser = base_parser(__doc__.split("\n")[0], "runs/table5")
    add = parser.add_argument
    add("--seed", type=int, default=0, help="keys the noise of the study")
    add("--roots", type=positive, default=256, help="paths (256 [paper])")
    add("--branches", type=positive, default=3, help="K (3) [Table 6]")
    args = fill_in(parser.parse_args(argv))
    if len(args.lora) > 1 or args.branches < 2 or "is" in args.metrics:
        die("one --lora at most, --branches 2 or more, and no `is` in --metrics: it needs a list")
    guarded(run, args)


if __name__ == "__main__":
    main()
