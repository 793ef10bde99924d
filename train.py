"""B2-DiffuRL, Algorithm 1: reinforcement learning of a text-to-image diffusion model.

    python train.py --reward clip --template 1

samples pictures with DDIM, scores them against their prompts and trains LoRA weights of
the UNet by policy gradient. Two ideas against the sparse reward: BPT trains only the
last tau steps, and tau grows to T over the rounds (Sec. 3.2); BS branches K times at
x_tau and trains on the best and the worst branch (Sec. 3.3). DDPO, the baseline, is a
setting: --no-bpt --no-bs.

The loop in `algorithm_1` reads like Algorithm 1. The mathematics is in `b2rl.py` (Eq. 2
to 8) and `ddim_logprob.py` (Eq. 1); what is not the paper's is in `support/`.

    P roots, K branches; Q of the roots are this process's own (all, in a single process)
    x          (Q, K, tau + 1, C, h, w)     states x_tau..x_0, on the CPU
    log_p_old  (Q, K, tau)                  log p of the policy that sampled them
    scores     (P, K), of all processes     r_hat likewise

Deliberate departures, besides those that `b2rl.py` and `ddim_logprob.py` name, all [ours]:
an update is of about `update_size` trajectories, in UNet calls as large as memory allows;
reward queries a round are a setting (roots: queries / branches), so that methods compare;
a round in which no branch passes the threshold makes no update and says so.
"""

import support  # noqa: F401  it sets what must be set before torch is imported

import argparse
import math
import os
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from b2rl import RewardNormaliser, Rollout, StepWeights, ddpo_loss, dpo_loss, dpo_pairs
from b2rl import dpok_loss, draw_roots, kl_to_base, pg_loss, select_all, select_pairs
from b2rl import split_updates, step_energy, tau_schedule
from ddim_logprob import gaussian_kl, keyed_generator, log_prob
from eval import Run, compare, draw, draw_lists, find_judge, scores_before
from lora import inject_lora, lora_off, lora_state
from rewards import REWARDS, check_reward_name, load_reward, reward_code
from support import report, run_folder
from support.command import Parser, die, positive
from support.pipeline import DTYPES, ETA, GUIDANCE, T, add_model_flags, check_model_flags
from support.pipeline import load_pipeline, tiny_folder
from support.processes import all_sum, init_processes, sum_gradients
from support.prompts import load_prompts

ALGOS = ("ddpo", "pg", "dpok", "dpo")
# Every number of the method: flag, type, default for SD and tiny, what it is, its source
SETTINGS = (
    ("T", int, T, T, "denoising steps [paper, Table 6]"),
    ("eta", float, ETA, ETA, "weight of DDIM's noise [paper, Table 6]"),
    ("guidance", float, GUIDANCE, GUIDANCE, "guidance scale, always [paper, Table 6]"),
    ("tau0", int, 14, 14, "first training interval, BPT [official]"),
    ("branches", int, 3, 3, "branches K of a root, BS [paper, Table 6]"),
    ("threshold", float, 0.5, 0.5, "score threshold on r_hat, Eq. 5 [paper, Table 6]"),
    ("window", int, 8, 8, "past rounds in the mean and std of r_hat, App. D.1 [official]"),
    ("min_count", int, 16, 16, "with fewer scores a prompt takes the round's mean and std [ddpo]"),
    ("rounds", int, 100, 16, "rounds N [official; tiny: ours]"),
    ("queries", int, 256, 192, "reward queries a round: roots x branches [paper 25.6k]"),
    ("epochs", int, 2, 2, "passes over a round's data [official]"),
    ("update_size", int, 64, 32, "trajectories an update [Table 6: 2 x 32; DDPO 2 x 128]"),
    ("lr", float, 1e-4, 1e-3, "AdamW learning rate [paper, Table 6; tiny: ours]"),
    ("weight_decay", float, 1e-4, 1e-4, "AdamW weight decay [paper, Table 6]"),
    ("beta1", float, 0.9, 0.9, "AdamW beta_1 [paper, Table 6]"),
    ("beta2", float, 0.999, 0.999, "AdamW beta_2 [paper, Table 6]"),
    ("adam_eps", float, 1e-8, 1e-8, "AdamW epsilon [paper, Table 6]"),
    ("clip_range", float, 1e-4, 1e-3, "clip of the ratio, by mean log p [ddpo; tiny: ours]"),
    ("adv_clip", float, 5.0, 5.0, "r_hat is clipped to +- this [official, ddpo]"),
    ("max_grad_norm", float, 1.0, 1.0, "gradient norm clip [official, ddpo]"),
    ("rank", int, 4, 4, "LoRA rank [official]"),
    ("kl_beta", float, 0.01, 0.01, "weight of DPOK's KL, Eq. 7 [ours]"),
    ("dpo_beta", float, 0.1, 0.1, "beta of DPO on summed log p, Eq. 8 [D3PO's code]"),
    ("sample_batch", int, 8, 128, "states a UNet call in sampling, guidance x 2 [Table 6]"),
    ("micro_batch", int, 2, 128, "states a UNet call in training [Table 6]"),
    ("decode_batch", int, 8, 64, "pictures decoded and scored at once"),
    ("eval_images", int, 1, 2, "pictures a prompt, before and after"),
    ("grid_every", int, 10, 5, "rounds between picture grids"),
    ("save_every", int, 0, 0, "rounds between LoRAs that are kept; 0: the last alone"),
)


# ---------------------------------------------------------------- settings


def make_parser():
    parser = Parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--reward", default="clip", help=f"{', '.join(REWARDS)}, or your own file.py:function")
    add("--template", type=int, choices=(1, 2, 3), default=1, help="prompt template (App. H)")
    add("--prompts", help="your own prompts, not a template's: a text file, one a line")
    add("--algo", choices=ALGOS, default="ddpo", help="Eq. 6 clipped, Eq. 6, Eq. 7, Eq. 8")
    add("--no-bpt", action="store_true", help="tau = T in every round (Sec. 3.2)")
    add("--no-bs", action="store_true", help="no branches, train on all (Sec. 3.3)")
    text = "of steps in the loss: alike [paper], or by inverse RMS of their gradient [ours]"
    add("--step-weight", choices=("uniform", "rms"), help=f"{text} (SD uniform, tiny rms)")
    add("--seed", type=int, default=0, help="keys noise, prompts, LoRA's start")
    add_model_flags(add)
    add("--offload", action="store_true", help="keep all but the UNet off the device as it trains")
    add("--checkpointing", action="store_true", help="activations twice: less memory, more time")
    add("--compile", action="store_true", help="torch.compile the UNet: slow start")
    add("--eval-prompts", type=int, help="prompts of each list to draw before and after (100)")
    add(
        "--validation-prompt", action="append", help="draw this one, not the lists; may be repeated"
    )
    add("--tau-rounds", type=positive, help="rounds of tau's growth (default all)")
    add("--report-to", help="tensorboard, wandb, or both with a comma between")
    add("--out", help="run folder (default: in runs/, named by model, reward, method ...)")
    add("--resume", metavar="RUN", help="go on with this run, by its settings")
    for name, kind, sd, tiny, text in SETTINGS:
        flag = f"--{name.replace('_', '-')}"
        add(flag, type=kind, metavar=kind.__name__, help=f"{text} (SD {sd}, tiny {tiny})")
    return parser


def parse_args(argv):
    """Flags -> namespace with every setting; ends with one line on bad input."""
    parser = make_parser()
    defaults = vars(parser.parse_args([]))
    # Where the namespace has a name already, argparse leaves its default out
    flags = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults))))
    given = {name: value for name, value in flags.items() if value is not None}
    settings = defaults | given | {"reward_is_meant": "reward" in given}
    if "resume" not in given:
        return check(fill_in(argparse.Namespace(**settings), given))
    with run_folder.reading(Path(given["resume"]) / "config.json"):
        settings |= run_folder.resumed_settings(given, given["resume"], defaults)
        return check(fill_in(argparse.Namespace(**settings), given))


def fill_in(args, given):
    """The settings that the user left open; `given`: the flags."""
    for name, _, sd, tiny, _ in SETTINGS:
        if getattr(args, name) is None:
            setattr(args, name, tiny if tiny_folder(args.model) else sd)
    if args.step_weight is None:
        args.step_weight = "rms" if tiny_folder(args.model) else "uniform"
    if args.no_bs:
        args.branches = 1
    if args.queries > args.branches > 0:
        args.queries -= args.queries % args.branches
    if args.tau_rounds is None:
        args.tau_rounds = args.rounds
    if args.eval_prompts is None:
        args.eval_prompts = 0 if args.validation_prompt else 100
    numbers = {name: given[name] for name, *_ in SETTINGS if name in given}
    args.out = args.resume or args.out or run_folder.default_folder(vars(args), numbers)
    args.out = os.path.expanduser(args.out)
    return args


def check(args):
    """Refuse settings that cannot work, before anything heavy is loaded."""
    if problem := check_reward_name(args.reward):
        die(problem)
    check_model_flags(args)
    zero_is_fine = ("threshold", "window", "min_count", "save_every", "eval_prompts")
    zero_is_fine += ("beta1", "beta2", "kl_beta", "dpo_beta", "guidance", "weight_decay")
    for name in (*(row[0] for row in SETTINGS), "eval_prompts"):
        value, flag = getattr(args, name), f"--{name.replace('_', '-')}"
        if not 0 <= value < 1e12:
            die(f"{flag} {value} is no usable number: it must be 0 or more")
        if value == 0 and name not in zero_is_fine:
            die(f"{flag} must be above 0")
    report.check_trackers(args.report_to)
    if not all(prompt.strip() for prompt in args.validation_prompt or []):
        die("--validation-prompt is empty")
    if args.tau0 > args.T:
        die(f"--tau0 {args.tau0} is outside 1..T = {args.T}")
    if args.branches < 2 and not args.no_bs:
        die("--branches must be 2 or more, or pass --no-bs")
    if args.queries < args.branches:
        die(f"--queries {args.queries} is fewer than --branches {args.branches}")
    if max(args.beta1, args.beta2) >= 1:
        die("--beta1 and --beta2 must be below 1")
    if args.algo == "dpo" and args.micro_batch < 2:
        die("dpo needs --micro-batch 2 or more: a pair must be in one UNet call")
    if not args.resume:
        run_folder.check_new(args.out)
    return args


# ---------------------------------------------------------------- parts of a round


def score(pipeline, reward, judge, x_0, roots):
    """The reward of Eq. 2: scores of all processes' pictures (P, K), and metrics by name.

    x_0: (Q, K, C, h, w) of the own roots. judge: of the tiny model, or None; it is
    shown, never trained on.
    """
    K = x_0.shape[1]
    found = torch.zeros(2, len(roots.prompts), K)  # scores, and what the judge says
    prompts = [prompt for prompt in roots.own_prompts for _ in range(K)]
    x_0 = x_0.flatten(0, 1)
    answers = []
    thumbs = []
    count = max(1, math.ceil(len(x_0) / pipeline.decode_batch))
    parts = torch.arange(len(x_0)).tensor_split(count) if prompts else ()
    for rows in tqdm(parts, desc="scoring", leave=False, disable=None):
        images = pipeline.decode(x_0[rows])
        of_rows = [prompts[j] for j in rows]
        right = judge(images, of_rows).float() if judge else torch.zeros(len(rows))
        answers.append(torch.stack([reward(images, of_rows), right]))
        thumbs.append(torch.nn.functional.adaptive_avg_pool2d(images, 8))
    spread = 0.0
    if answers:
        found[:, roots.own] = torch.cat(answers, 1).view(2, -1, K)
        spread = report.spread(torch.cat(thumbs), prompts)
    scores, right = all_sum(found, pipeline.device)
    metrics = {"reward_mean": scores.mean().item(), "reward_std": scores.std().item()}
    metrics |= {"of": scores.numel(), "spread_within_prompt": spread}
    if judge:
        metrics["recognised"] = right.mean().item()
    return scores, metrics


def make_scaler(cfg, device):
    """In fp16 the gradients of a mean over D and an update would round to 0: the loss is scaled up.

    DPO's is larger by beta * D. The scale must be there even in a process without a share.
    """
    scale = 2.0**6 if cfg.algo == "dpo" else 2.0**16
    scaler = torch.amp.GradScaler(device.type, scale, enabled=cfg.precision == "fp16")
    scaler.scale(torch.zeros((), device=device))
    return scaler


def to_measure(kept, cfg, i):
    """Eight kept trajectories of round i: enough to measure by, and cheap."""
    order = torch.randperm(len(kept), generator=keyed_generator(cfg.seed, i, "some"))
    return kept[order[:8]]


def clip_gradient(lora, optimizer, scaler, max_norm, device):
    """The gradient of all processes, without fp16's scale, clipped; its norm before that."""
    sum_gradients(lora.values(), device)
    scaler.unscale_(optimizer)
    return torch.nn.utils.clip_grad_norm_(lora.values(), max_norm)


# ---------------------------------------------------------------- what surrounds the rounds


def prompt_lists(cfg, say):
    """The training prompts, and the lists that are drawn before and after, by name."""
    train, unseen = load_prompts(cfg.template, cfg.prompts, say)
    lists = {"validation": cfg.validation_prompt or []}
    lists["train"] = train[: cfg.eval_prompts]
    lists["unseen"] = unseen[: cfg.eval_prompts]
    return train, {name: prompts for name, prompts in lists.items() if prompts}


def end_round(run, cfg, pipeline, reward, lists, metrics, lora, optimizer, state):
    """Draw, write, track and tell a round; state: the checkpoint's header.

    The checkpoint is written last: a kill before it means that the round is done again.
    """
    done = metrics["round"]
    metrics["queries"] = done * cfg.queries
    if lists and done % cfg.grid_every == 0 and done < cfg.rounds:
        name = next(iter(lists))
        picture = f"round{done:04d}-{name}"
        draw(run, pipeline, reward, None, lists[name][:18], 1, picture)
    if run.worker != 0:
        return
    if cfg.save_every and done % cfg.save_every == 0:
        path = run.folder / f"lora-round{done:04d}.safetensors"
        run_folder.write_safetensors(path, lora_state(pipeline.policy.unet))
    run_folder.append_metrics(run.folder, metrics)
    run_folder.save_checkpoint(run.folder, lora, optimizer, state | {"rounds_done": done})
    run.track(metrics | metrics["seconds"], metrics["queries"])
    first_reward = run_folder.read_metrics(run.folder)[0]["reward_mean"]
    run.say(report.round_line(metrics, cfg, first_reward))


def finish(run, cfg, lora, lists, before, after, train_prompts):
    """The LoRA for others, the model card, and what a reader looks at first."""
    webui_name = report.write_lora(run.folder, lora)
    summary, rows = compare(before, after, cfg.reward)
    run_folder.write_json(run.folder / "summary.json", summary)
    report.write_card(run.folder, cfg, summary, train_prompts, webui_name)
    for name in list(lists)[:1]:
        scores = before[name], after[name]
        report.before_after(run.folder, name, lists[name], *scores, run.workers)
    run.say(report.last_lines(run.folder, rows, train_prompts[0]))


# ---------------------------------------------------------------- Algorithm 1


def algorithm_1(cfg):
    """Algorithm 1: the loop over rounds. Returns the run folder."""
    worker, workers, device = init_processes(torch.device(cfg.device))
    say = tqdm.write if worker == 0 else lambda text: None
    train_prompts, lists = prompt_lists(cfg, say)
    fingerprint = run_folder.fingerprint(vars(cfg), reward_code(cfg.reward))
    saved = run_folder.read_checkpoint(cfg, fingerprint)
    folder = run_folder.open_folder(cfg, fingerprint, saved, worker)
    say(report.first_lines(cfg, folder, workers))
    pipeline = load_pipeline(cfg, device)
    policy = pipeline.policy
    reward = load_reward(cfg.reward, pipeline.tiny, device, DTYPES[cfg.precision])
    judge = find_judge(pipeline, train_prompts + sum(lists.values(), []))
    lora = inject_lora(policy.unet, cfg.rank, seed=cfg.seed)
    betas = (cfg.beta1, cfg.beta2)
    optimizer = torch.optim.AdamW(lora.values(), cfg.lr, betas, cfg.adam_eps, cfg.weight_decay)
    scaler = make_scaler(cfg, device)
    normalise = RewardNormaliser(cfg.window, cfg.min_count)
    step_weights = StepWeights(cfg.step_weight)
    rounds_done = run_folder.restore(saved, lora, optimizer, scaler, normalise, step_weights)
    track = report.open_trackers(cfg, folder, worker, rounds_done)
    run = Run(folder, worker, workers, say, track)
    before = scores_before(run, cfg, pipeline, reward, judge, lists)
    D = math.prod(policy.latent_shape)
    log = report.TrainingLog(cfg.clip_range)
    clock = report.Clock()

    for i in tqdm(range(rounds_done, cfg.rounds), desc="rounds", leave=False, disable=None):
        # BPT: only the last tau steps are trained, and tau grows (Eq. 3, App. D.1). The
        # reward says most about the steps nearest to the picture, so these come first
        tau = cfg.T if cfg.no_bpt else tau_schedule(i, cfg.tau_rounds, cfg.T, cfg.tau0)

        # BS: a root is a prompt and an x_T. Its branches share the path down to x_tau, so
        # only the last tau steps can be why their rewards differ (Sec. 3.3)
        clock.start("sampling")
        roots = draw_roots(train_prompts, cfg, i, worker, workers)
        x_T = policy.noise(roots.keys("x_T"))
        x_tau = policy.denoise(x_T, cfg.T, tau, roots.own_prompts, roots.keys("shared"))
        branch_keys = roots.branch_keys(cfg.branches)
        x, log_p_old = policy.branch(x_tau, tau, 0, roots.own_prompts, branch_keys)
        rollout = Rollout(x, log_p_old, roots.own_prompts, roots.own, device)

        # The reward sees finished pictures alone and names no step: it is sparse
        clock.start("reward")
        scores, metrics = score(pipeline, reward, judge, x[:, :, -1], roots)  # (P, K)
        r_hat = normalise(i, roots.prompts, scores)  # App. D.1
        kept = select_all(r_hat) if cfg.no_bs else select_pairs(r_hat, cfg.threshold)  # Eq. 5
        if cfg.algo == "dpo":
            kept = dpo_pairs(kept, r_hat, roots.prompts, cfg.threshold)

        clock.start("training")
        if cfg.offload:
            pipeline.move_others(reward, "cpu")
        measured = to_measure(kept, cfg, i)
        if cfg.step_weight == "rms" and len(kept):
            signs = keyed_generator(cfg.seed, i, "signs")
            energy = step_energy(policy, rollout, measured, cfg.micro_batch, lora, signs)
            step_weights.measure(energy)
        weights = step_weights(tau).to(device)  # (tau + 1,), by t
        for epoch in range(cfg.epochs):
            shuffle = keyed_generator(cfg.seed, i, "shuffle", epoch)
            for update in split_updates(kept, cfg.update_size, shuffle):
                optimizer.zero_grad()
                for batch in rollout.batches(update, cfg.micro_batch):
                    mu, sigma = policy(batch.x_t, batch.t, batch.prompts)
                    log_p = log_prob(batch.x_prev, mu, sigma)  # Eq. 1
                    log_p_old = batch.log_p_old
                    advantage = r_hat[batch.root, batch.branch].to(device)
                    advantage = advantage.clamp(-cfg.adv_clip, cfg.adv_clip)  # App. D.1
                    h = None
                    if cfg.algo in ("dpok", "dpo"):
                        with torch.no_grad(), lora_off(policy.unet):  # p_pre
                            mu_ref, _ = policy(batch.x_t, batch.t, batch.prompts)
                    if cfg.algo == "ddpo":  # Eq. 6, clipped
                        loss = ddpo_loss(log_p, log_p_old, advantage, cfg.clip_range)
                    elif cfg.algo == "pg":  # Eq. 6
                        loss = pg_loss(log_p, log_p_old, advantage)
                    elif cfg.algo == "dpok":  # Eq. 7
                        loss = ddpo_loss(log_p, log_p_old, advantage, cfg.clip_range)
                        loss = dpok_loss(loss, gaussian_kl(mu, mu_ref, sigma), cfg.kl_beta)
                    elif cfg.algo == "dpo":  # Eq. 8
                        log_ref = log_prob(batch.x_prev, mu_ref, sigma)
                        loss, h = dpo_loss(log_p, log_ref, cfg.dpo_beta * D)
                    # The mean over trajectories and steps, each step with its weight
                    loss = weights[batch.t] * loss.sum() / (len(update) * tau)
                    scaler.scale(loss).backward()
                    log.add(log_p, log_p_old, loss, h)
                norm = clip_gradient(lora, optimizer, scaler, cfg.max_grad_norm, device)
                if norm.isfinite():
                    scaler.step(optimizer)  # AdamW
                scaler.update()
                log.end_update(norm, len(update))

        metrics |= {"round": i + 1, "tau": tau, "kept": len(kept), "seconds": clock.stop()}
        metrics |= log.end_round(device)
        if len(kept):
            metrics["kl_to_base"] = kl_to_base(policy, rollout, measured, cfg.micro_batch)
        if cfg.offload:
            pipeline.move_others(reward, device)
        state = {"fingerprint": fingerprint, "scaler": scaler.state_dict()}
        state |= {"history": normalise.history, "step_square": step_weights.square}
        metrics |= {"alone_on_prompt": normalise.alone}
        end_round(run, cfg, pipeline, reward, lists, metrics, lora, optimizer, state)

    after = draw_lists(run, pipeline, reward, judge, lists, cfg.eval_images, "after")
    if worker == 0:
        finish(run, cfg, lora_state(policy.unet), lists, before, after, train_prompts)
    return folder


def main(argv=None):
    """Check the flags, then run; Ctrl-C, a full disk or a bad reward ends with a line."""
    cfg = parse_args(argv)
    with run_folder.resumable(cfg.out):
        return algorithm_1(cfg)


if __name__ == "__main__":
    main(sys.argv[1:])
