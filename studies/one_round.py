"""Fig. 2 and 3 of real data: four roots of a training round, their branches, what is trained.

    python studies/one_round.py                                # the default run's first round
    python studies/one_round.py --round 9 --lora RUN           # drawn with a trained LoRA

Other flags are train.py's; --out is the picture (runs/one_round.png). The round is sampled,
scored and selected by the functions of the training. r_hat compares with this round alone,
since past rounds are not sampled. Shown are four roots, from those of which two branches are
kept to those of which none is.
"""

import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# Ours first: `support` sets what torch reads when it is imported
import train
from b2rl import RewardNormaliser, draw_roots, select_pairs, tau_schedule
from ddim_logprob import guided_prediction, predict_x_0
from eval import guarded, load_lora
from rewards import load_reward
from support.command import Parser, die, positive
from support.pipeline import DTYPES, load_pipeline
from support.prompts import load_prompts
from support.report import pyplot, save_figure

import torch

# Of a branch, its colour and the word under it, by its fate: 0, 1 and -1, which is the last
FATES = ("0.5", "not trained"), ("#1a7f37", "best: trained"), ("#c0271a", "worst: trained")
LEGEND = """\
$\\hat{{r}}$ is the normalised score (App. D.1). At most two branches of a root are trained on.
Green: the best, if $\\hat{{r}}$ \u2265 {0}; it becomes more likely. Red: the worst, if \
$\\hat{{r}}$ < -{0}; it becomes less likely.
$\\tau$ (tau) = {1}: only steps {1} to 1 are trained, of {2} of the round's {3} pictures."""


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
    scores, _ = train.score(pipeline, reward, None, x_0, roots, K)
    r_hat = RewardNormaliser(cfg.window, cfg.min_count)(i, roots.prompts, scores)
    fate = torch.zeros(r_hat.shape, dtype=torch.long)
    for _, p, k in select_pairs(r_hat, cfg.threshold).tolist():
        fate[p, k] = 1 if r_hat[p, k] > 0 else -1
    return roots.prompts, path, x_0, scores, r_hat, fate


def choose_roots(fate):
    """Four of P roots, from most to fewest branches kept; the best alone before the worst."""
    order = (2.1 * (fate == 1) + 2 * (fate == -1)).sum(1).argsort(descending=True, stable=True)
    return order[torch.linspace(0, len(order) - 1, min(4, len(order))).long()].tolist()


@torch.no_grad()
def expected_pictures(pipeline, x_t, t, prompts):
    """The x_0 that the guided UNet expects, seeing x_t (B, C, h, w), as pictures (B, 3, H, W)."""
    policy = pipeline.policy
    x_t = x_t.to(policy.device)
    given = policy.embed(prompts), policy.embed([""]), policy.guidance
    prediction = guided_prediction(policy.unet, policy.schedule, x_t, t, *given)
    return pipeline.decode(predict_x_0(policy.schedule, prediction, x_t, t)[0])


def draw(roots, steps, tau, K, legend):
    """A row a root: its prompt, its expected pictures at t in `steps`, its K branches."""
    n = len(steps)
    plt = pyplot()
    size = (1.6 * (n + K + 1), 2.3 * len(roots) + 1.7)
    fig, axes = plt.subplots(len(roots), n + K, figsize=size, squeeze=False, layout="constrained")
    for row, (prompt, pictures, scores, r_hat, fate) in zip(axes, roots):
        row[0].set_ylabel(textwrap.fill(prompt, 13), rotation=0, ha="right", va="center")
        for ax, picture in zip(row, pictures):
            few_levels = (picture * 23).round() / 23  # a third of the file, and nobody sees it
            ax.imshow(few_levels.permute(1, 2, 0).numpy(), interpolation="nearest")
            ax.set(xticks=[], yticks=[])
        for ax, score, normalised, kept in zip(row[n:], scores, r_hat, fate.tolist()):
            colour, word = FATES[kept]
            text = f"score {score:.3f}\n$\\hat{{r}}$ = {normalised:+.2f}\n{word}"
            ax.set_xlabel(text, color=colour)
            plt.setp(ax.spines.values(), color=colour, linewidth=5 if kept else 2)
    titles = [f"t = {t}" for t in steps] + [f"branch {k + 1}" for k in range(K)]
    titles[0] = f"shared path to t = {tau}:\nthe picture it expects\n{titles[0]}"
    titles[n] = f"{K} branches from t = {tau} on,\neach with its own noise\n{titles[n]}"
    for ax, title in zip(axes[0], titles):
        ax.set_title(title, loc="left", fontsize=14, pad=9).set_in_layout(False)
    fig.supxlabel(legend, x=0.1, ha="left", fontsize=14)
    return fig


def run(args, cfg):
    prompts, _ = load_prompts(cfg.template, cfg.prompts)
    pipeline = load_pipeline(cfg, torch.device(cfg.device))
    if args.lora:
        load_lora(pipeline.pipe, args.lora)
    reward = load_reward(cfg.reward, pipeline.tiny, pipeline.device, DTYPES[cfg.precision])
    i = args.round - 1
    tau = cfg.T if cfg.no_bpt else tau_schedule(i, cfg.tau_rounds, cfg.T, cfg.tau0)
    owners, path, x_0, scores, r_hat, fate = sample_round(pipeline, reward, prompts, cfg, i, tau)
    steps = range(cfg.T, tau - 1, -2)
    roots = []
    for p in choose_roots(fate):
        prompt = owners[p]
        seen = [expected_pictures(pipeline, path[p, cfg.T - t][None], t, [prompt]) for t in steps]
        pictures = torch.cat([*seen, pipeline.decode(x_0[p])])
        roots.append((prompt, pictures, scores[p], r_hat[p], fate[p]))
    kept = fate.abs().sum().item()
    legend = LEGEND.format(cfg.threshold, tau, kept, fate.numel())
    Path(cfg.out).parent.mkdir(parents=True, exist_ok=True)
    with pyplot().rc_context({"font.size": 14, "figure.constrained_layout.h_pad": 0.12}):
        save_figure(draw(roots, steps, tau, cfg.branches, legend), cfg.out)
    print(f"{cfg.out}: round {args.round}, tau {tau}, trained on {kept} of {fate.numel()} pictures")


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
