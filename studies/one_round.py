"""Fig. 2 and 3 of real data: four roots of a training round, their branches, what is trained.

    python studies/one_round.py                                # the default run's first round
    python studies/one_round.py --round 9 --lora RUN           # drawn with a trained LoRA

Other flags are train.py's; --out is the picture (runs/one_round.png). The round is sampled,
scored and selected by the functions of the training. r_hat compares with this round alone,
since past rounds are not sampled. Shown are roots of each kind that the round has (best and
worst kept, only the best, only the worst, none), of each the one whose scores differ most.
"""

import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import train
from b2rl import RewardNormaliser, draw_roots, select_pairs, tau_schedule
from ddim_logprob import guided_prediction, predict_x_0
from eval import guarded, load_lora
from rewards import load_reward
from studies.common import rate
from support.command import Parser, die, positive
from support.pipeline import DTYPES, load_pipeline
from support.prompts import load_prompts
from support.report import pyplot, save_figure

# What becomes of a branch: its colour, and the word under it
FATES = {1: ("#1a7f37", "best: kept"), -1: ("#c0271a", "worst: kept"), 0: ("0.5", "dropped")}
LEGEND = """\
$\\hat{{r}}$ is the normalised score (App. D.1). Of a root two branches at most are trained on:
the best if $\\hat{{r}}$ \u2265 {threshold} (green: it becomes more likely),
the worst if $\\hat{{r}}$ < -{threshold} (red: it becomes less likely).
$\\tau$ = {tau}: only steps {tau} to 1 are trained. Kept: {kept} of the round's {of} pictures."""


def sample_round(pipeline, reward, prompts, cfg, i, tau):
    """Round i as train.py samples it: its roots, the shared paths and the branches, scored.

    Returns the P prompts; x_T..x_tau (P, T - tau + 1, C, h, w); x_0 (P, K, C, h, w); scores
    and r_hat (P, K); fate (P, K): 1 a best that is kept, -1 a worst, 0 neither.
    """
    policy, K = pipeline.policy, cfg.branches
    roots = draw_roots(prompts, cfg, i, 0, 1)
    x_T = policy.noise(roots.keys("x_T"))
    shared = [[key] for key in roots.keys("shared")]
    path = policy.branch(x_T, cfg.T, tau, roots.prompts, shared)[0][:, 0]
    x, _ = policy.branch(path[:, -1], tau, 0, roots.prompts, roots.branch_keys(K))
    x_0 = x[:, :, -1]
    owners = [prompt for prompt in roots.prompts for _ in range(K)]
    scores = rate(pipeline, x_0.flatten(0, 1), owners, {"reward": reward})["reward"].view(-1, K)
    r_hat = RewardNormaliser(cfg.window, cfg.min_count)(i, roots.prompts, scores)
    fate = torch.zeros(r_hat.shape, dtype=torch.long)
    for _, p, k in select_pairs(r_hat, cfg.threshold).tolist():
        fate[p, k] = 1 if r_hat[p, k] > 0 else -1
    return roots.prompts, path, x_0, scores, r_hat, fate


def choose_roots(scores, fate):
    """Four of P roots: of each kind the one whose scores (K,) differ most, then the next widest."""
    kinds = [(1 in row, -1 in row) for row in fate]  # is the best kept, is the worst?
    widest = (scores.max(1).values - scores.min(1).values).argsort(descending=True).tolist()
    of_kinds = {kinds[p]: p for p in reversed(widest)}  # of a kind the last one stays
    rest = [p for p in widest if p not in of_kinds.values()]
    chosen = [*of_kinds.values(), *rest][:4]
    return sorted(chosen, key=lambda p: kinds[p], reverse=True)  # both kept, ..., none


@torch.no_grad()
def expected_pictures(pipeline, x_t, t, prompts):
    """The x_0 that the guided UNet expects, seeing x_t (B, C, h, w), as pictures (B, 3, H, W)."""
    policy = pipeline.policy
    x_t = x_t.to(policy.device)
    schedule = policy.schedule
    cond, uncond = policy.embed(prompts), policy.embed([""])
    prediction = guided_prediction(policy.unet, schedule, x_t, t, cond, uncond, policy.guidance)
    x_0, _ = predict_x_0(schedule, prediction, x_t, t)
    return pipeline.decode(x_0)


def draw(roots, steps, tau, K, legend):
    """A row a root: its prompt, its expected pictures at t in `steps`, its K branches."""
    n = len(steps)
    plt = pyplot()
    size = (1.6 * (n + K + 1.4), 2.3 * len(roots) + 1.7)
    figure, axes = plt.subplots(len(roots), n + 1 + K, figsize=size, squeeze=False)
    figure.subplots_adjust(wspace=0.12, hspace=0.6, top=1 - 0.9 / size[1], bottom=1.8 / size[1])
    for row, (prompt, pictures, scores, r_hat, fate) in zip(axes, roots):
        row[0].set_ylabel(textwrap.fill(prompt, 13), rotation=0, ha="right", va="center")
        row[n].text(0.5, 0.5, "$\\Rightarrow$", fontsize=40, ha="center", va="center")
        row[n].axis("off")
        for ax, picture in zip([*row[:n], *row[n + 1 :]], pictures):
            few_levels = (picture * 23).round() / 23  # a third of the file, and nobody sees it
            ax.imshow(few_levels.permute(1, 2, 0).numpy(), interpolation="nearest")
            ax.set(xticks=[], yticks=[])
        for k, ax in enumerate(row[n + 1 :]):
            colour, word = FATES[fate[k].item()]
            text = f"score {scores[k]:.3f}\n$\\hat{{r}}$ = {r_hat[k]:+.2f}\n{word}"
            ax.set_xlabel(text, color=colour)
            plt.setp(ax.spines.values(), color=colour, linewidth=5 if fate[k] else 2)
    for ax, t in zip(axes[0], steps):
        ax.set_title(f"t = {t}", fontsize=14, pad=9)
    titles = {0: f"shared path to t = {tau}:\nwhat the model expects\n"}
    titles[n + 1] = f"{K} branches from t = {tau} on,\neach with its own noise"
    for column, title in titles.items():
        axes[0, column].set_title(title, loc="left", fontsize=14, weight="bold", pad=9)
    figure.text(0.125, 0, legend, va="bottom")
    return figure


def run(args, cfg):
    device = torch.device(cfg.device)
    prompts, _ = load_prompts(cfg.template, cfg.prompts)
    pipeline = load_pipeline(cfg, device)
    if args.lora:
        load_lora(pipeline.pipe, args.lora)
    reward = load_reward(cfg.reward, pipeline.tiny, device, DTYPES[cfg.precision])
    i = args.round - 1
    tau = cfg.T if cfg.no_bpt else tau_schedule(i, cfg.tau_rounds, cfg.T, cfg.tau0)
    owners, path, x_0, scores, r_hat, fate = sample_round(pipeline, reward, prompts, cfg, i, tau)
    steps = range(cfg.T, tau - 1, -2)
    roots = []
    for p in choose_roots(scores, fate):
        states = [path[p, cfg.T - t][None] for t in steps]
        seen = [expected_pictures(pipeline, x, t, owners[p : p + 1]) for x, t in zip(states, steps)]
        pictures = torch.cat([*seen, pipeline.decode(x_0[p])])
        roots.append((owners[p], pictures, scores[p], r_hat[p], fate[p]))
    kept, of = fate.abs().sum().item(), fate.numel()
    legend = LEGEND.format(threshold=cfg.threshold, tau=tau, kept=kept, of=of)
    Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    with pyplot().rc_context({"font.size": 14}):
        save_figure(draw(roots, steps, tau, cfg.branches, legend), cfg.out)
    print(f"{cfg.out}: round {args.round}, tau {tau}, {kept} of {of} pictures are kept")


def main(argv=None):
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("--lora", metavar="RUN", help="a run folder or a LoRA file")
    parser.add_argument("--round", type=positive, default=1, help="from 1 on: it decides tau")
    args, flags = parser.parse_known_args(argv)
    cfg = train.parse_args(["--out=runs/one_round.png", *flags])
    if cfg.no_bs:
        die("without branches there is no best and worst of a root: leave --no-bs out")
    guarded(lambda cfg: run(args, cfg), cfg)


if __name__ == "__main__":
    main()
