"""B2-DiffuRL, Algorithm 1: reinforcement learning of a text-to-image diffusion model.

    python train.py --reward clip --template 1

samples pictures with DDIM, scores them against their prompts and trains LoRA weights of
the UNet by policy gradient. The model is the bundled tiny one, or `--model`. Two ideas
against the sparse reward: BPT trains only the last tau steps, and tau grows to T over the
rounds (Sec. 3.2); BS branches K times at x_tau and trains on the best and the worst
branch, each if it passes a threshold (Sec. 3.3). DDPO, the baseline, is
--no-bpt --no-bs --update-size 128 (SD: 256): by Table 6 its updates are four times larger.

The loop in `algorithm_1` reads like Algorithm 1. The mathematics is in `b2rl.py` (Eq. 2
to 8) and `ddim_logprob.py` (Eq. 1); what is not the paper's is in `support/`.

    P roots, K branches; Q of the roots are this process's own (all, in a single process)
    x          (Q, K, tau + 1, C, h, w)     states x_tau..x_0, on the CPU
    log_p_old  (Q, K, tau)                  log p of the policy that sampled them
    scores     (P, K), of all processes     r_hat likewise

[Table 6], [official], [ddpo], [D3PO], [ours] name a number's source: see `b2rl.py`.

Deliberate departures, besides those that `b2rl.py` and `ddim_logprob.py` name, all [ours]:
an update is of about `update_size` trajectories, in UNet calls of `micro_batch`;
reward queries a round are a setting (roots: queries / branches), so that methods compare;
a round in which nothing is kept makes no update and says so.
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
from rewards import check_reward_name, load_reward, reward_code
from support import report, run_folder
from support.command import Parser, die, positive, progress
from support.pipeline import DTYPES, ETA, GUIDANCE, T, add_model_flags, check_model_flags
from support.pipeline import load_pipeline, tiny_folder
from support.processes import all_sum, init_processes, sum_gradients
from support.prompts import load_prompts

ALGOS = ("ddpo", "pg", "dpok", "dpo")
# Every number of the method: flag, default for SD and for tiny, what it is, its source.
# A new row is a flag, stands in config.json and in the checkpoint, and needs no other line:
# only one that may be 0 is named in `check`, too.
SETTINGS = (
    # The diffusion: how a picture is sampled, in training and in evaluation alike
    ("T", T, T, "denoising steps [Table 6]"),
    ("eta", ETA, ETA, "DDIM's noise [Table 6]"),
    ("guidance", GUIDANCE, GUIDANCE, "guidance scale [Table 6]"),
    # The two ideas, and how a score becomes r_hat
    ("tau0", 14, 14, "first tau, BPT [official]"),
    ("branches", 3, 3, "branches K, BS [Table 6]"),
    ("threshold", 0.5, 0.5, "threshold, Eq. 5 [Table 6]"),
    ("window", 8, 8, "past rounds in r_hat [official]"),
    ("min_count", 16, 16, "fewest scores of a prompt [ddpo]"),
    # How much is sampled. Methods compare at equal queries: rounds x queries, 25.6k in D.4
    ("rounds", 100, 16, "rounds [official; tiny: ours]"),
    ("queries", 255, 192, "rewards a round [ours, D.4]"),
    ("epochs", 2, 2, "passes over a round [official]"),
    ("update_size", 64, 32, "trajectories an update [Table 6; tiny: ours]"),
    # The update. The clip range belongs to a log p that is a mean over D: see b2rl.py
    ("lr", 1e-4, 1e-3, "learning rate [Table 6; tiny: ours]"),
    ("weight_decay", 1e-4, 1e-4, "weight decay [Table 6]"),
    ("beta1", 0.9, 0.9, "AdamW beta_1 [Table 6]"),
    ("beta2", 0.999, 0.999, "AdamW beta_2 [Table 6]"),
    ("adam_eps", 1e-8, 1e-8, "AdamW epsilon [Table 6]"),
    ("clip_range", 1e-4, 1e-3, "clip of p/p_old [ddpo; tiny: ours]"),
    ("adv_clip", 5.0, 5.0, "clip of r_hat [official, ddpo]"),
    ("max_grad_norm", 1.0, 1.0, "gradient norm clip [official, ddpo]"),
    # LoRA, and what only DPOK and DPO read
    ("rank", 4, 4, "LoRA rank [official]"),
    ("kl_beta", 0.01, 0.01, "DPOK's KL, Eq. 7 [ours]"),
    ("dpo_beta", 0.1, 0.1, "beta of DPO, Eq. 8 [D3PO]"),
    # How much at once (tiny: [ours]), and what is drawn: these change no gradient
    ("sample_batch", 8, 128, "states a sampling call [Table 6]"),
    ("micro_batch", 2, 128, "trajectories a training call [Table 6]"),
    ("decode_batch", 8, 64, "pictures decoded at once"),
    ("eval_images", 1, 2, "pictures a prompt"),
    ("grid_every", 10, 5, "rounds between grids"),
    ("save_every", 0, 0, "rounds between kept LoRAs"),
)


# ---------------------------------------------------------------- settings


def make_parser():
    parser = Parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--reward", default="clip", help="clip, bert, jpeg or your file.py:function")
    add("--template", type=int, choices=(1, 2, 3), default=1, help="App. H")
    add("--prompts", help="your prompts: a text file, one a line")
    add("--algo", choices=ALGOS, default="ddpo", help="Eq. 6 clipped, Eq. 6, Eq. 7, Eq. 8")
    add("--no-bpt", action="store_true", help="tau = T always (Sec. 3.2)")
    add("--no-bs", action="store_true", help="no branches, train on all")
    add("--step-weight", choices=("uniform", "rms"), help="[paper]: uniform; tiny: rms")
    add("--seed", type=int, default=0, help="keys training's noise")
    add_model_flags(add)
    add("--offload", action="store_true", help="the UNet alone on the GPU")
    add("--checkpointing", action="store_true", help="less memory, more time")
    add("--compile", action="store_true", help="faster after a slow start")
    add("--eval-prompts", type=int, help="prompts to draw of each list (100)")
    add("--validation-prompt", action="append", help="draw this, not the lists")
    add("--tau-rounds", type=positive, help="rounds of tau's growth")
    add("--report-to", nargs="+", choices=report.TRACKERS, default=[])
    add("--out", help="run folder (default: in runs/)")
    add("--resume", metavar="RUN", help="go on with a run")
    # Their defaults stay open here: they depend on the model, see `fill_in`
    for name, sd, tiny, text in SETTINGS:
        flag = f"--{name.replace('_', '-')}"
        add(flag, type=type(sd), help=f"{text} (SD {sd}, tiny {tiny})")
    return parser


def parse_args(argv):
    """Flags -> namespace with every setting; ends with one line on bad input."""
    parser = make_parser()
    defaults = vars(parser.parse_args([]))
    # The first parse gave the defaults, this one gives what was typed: a name that the
    # namespace has already keeps its value, None, unless a flag sets it
    flags = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults))))
    given = {name: value for name, value in flags.items() if value is not None}
    settings = defaults | given | {"reward_was_given": "reward" in given}
    if "resume" not in given:
        return check(fill_in(argparse.Namespace(**settings), given))
    with run_folder.reading(Path(given["resume"]) / "config.json"):
        config = run_folder.read_config(given["resume"])
        settings |= {k: v for k, v in config.items() if k in defaults} | given
        args = fill_in(argparse.Namespace(**settings), given)
        run_folder.refuse_changes(config, args, given)
        return check(args)


def fill_in(args, given):
    """The settings that the user left open; `given`: the flags."""
    for name, sd, tiny, _ in SETTINGS:
        if getattr(args, name) is None:
            setattr(args, name, tiny if tiny_folder(args.model) else sd)
    if args.step_weight is None:
        args.step_weight = "rms" if tiny_folder(args.model) else "uniform"
    if args.no_bs:  # a root that does not branch is a single trajectory
        args.branches = 1
    # Whole roots: the queries that are left over are not drawn. `check` refuses 0 branches
    if args.queries > args.branches > 0:
        args.queries -= args.queries % args.branches
    if args.tau_rounds is None:
        args.tau_rounds = args.rounds
    if args.eval_prompts is None:
        args.eval_prompts = 0 if args.validation_prompt else 100
    numbers = {name: given[name] for name, *_ in SETTINGS if name in given}
    folder = run_folder.default_folder(vars(args), numbers)
    args.out = os.path.expanduser(args.resume or args.out or folder)
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
            die(f"{flag} {value}: it must be 0 or more")
        if value == 0 and name not in zero_is_fine:
            die(f"{flag} must be above 0")
    if not all(prompt.strip() for prompt in args.validation_prompt or []):
        die("--validation-prompt is empty")
    if args.tau0 > args.T:
        die("--tau0 must be at most --T")
    if args.branches < 2 and not args.no_bs:
        die("--branches must be 2 or more, or --no-bs")
    if args.queries < args.branches:
        die("--queries must be at least --branches")
    if max(args.beta1, args.beta2) >= 1:
        die("--beta1 and --beta2 must be below 1")
    if args.algo == "dpo" and args.micro_batch < 2:
        die("dpo needs --micro-batch 2 or more: a pair must be in one UNet call")
    if not args.resume:
        run_folder.check_new(args.out)
    return args


# ---------------------------------------------------------------- parts of a round


def score(pipeline, reward, judge, x_0, roots, K):
    """The reward of Eq. 2: scores of all processes' pictures (P, K), and metrics by name.

    x_0: (Q, K, C, h, w) of the own roots. judge: of the tiny model, or None; it is
    asked, never trained on. The spread: of 8 x 8 thumbnails of a prompt's own pictures.
    """
    # Row 0: the scores. Row 1: what the judge says
    found = torch.zeros(2, len(roots.prompts), K)
    prompts = [prompt for prompt in roots.own_prompts for _ in range(K)]
    x_0 = x_0.flatten(0, 1)
    answers = []
    thumbs = []
    size = pipeline.decode_batch
    for start in progress(range(0, len(x_0), size), "scoring"):
        images = pipeline.decode(x_0[start : start + size])
        names = prompts[start : start + size]
        right = judge(images, names) if judge else torch.zeros(len(names))
        answers.append(torch.stack([reward(images, names), right.float()]))
        thumbs.append(torch.nn.functional.adaptive_avg_pool2d(images, 8))
    spread = 0.0
    if answers:
        found[:, roots.own] = torch.cat(answers, 1).view(2, -1, K)
        spread = report.spread(torch.cat(thumbs), prompts)
    # Each process fills in its own roots, so that the sum over processes is the whole table
    scores, right = all_sum(found, pipeline.device)
    metrics = {"reward_mean": scores.mean().item(), "reward_std": scores.std().item()}
    metrics |= {"of": scores.numel(), "spread_within_prompt": spread}
    if judge:
        metrics["recognised"] = right.mean().item()
    return scores, metrics


def make_scaler(cfg, device):
    """Scales the loss up in fp16, where gradients as small as ours would round to 0.

    They are small since the loss is a mean over D and over an update. DPO's is larger by
    beta * D.
    """
    scale = 2.0**6 if cfg.algo == "dpo" else 2.0**16
    half = cfg.precision == "fp16"
    scaler = torch.amp.GradScaler(device.type, scale, enabled=half)
    # Its first `scale` sets it up. A process that owns nothing of an update never calls it,
    # and `unscale_` would fail
    scaler.scale(torch.zeros((), device=device))
    return scaler


def choose_probe(kept, cfg, i):
    """At most eight kept trajectories of round i, for `step_energy` and `kl_to_base`."""
    order = torch.randperm(len(kept), generator=keyed_generator(cfg.seed, i, "some"))
    return kept[order[:8]]


def clip_gradient(lora, optimizer, scaler, max_norm, device):
    """Sum all processes' gradients, unscale, clip; returns their norm before the clip."""
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

    Of the files the checkpoint is last: a kill before it means that the round is done again.
    """
    done = metrics["round"]
    metrics["queries"] = done * cfg.queries
    if lists and done % cfg.grid_every == 0 and done < cfg.rounds:
        name = next(iter(lists))
        picture = f"round{done:04d}-{name}"
        draw(run, pipeline, reward, None, lists[name][:18], each=1, name=picture)
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
        of_both = before[name], after[name]
        report.before_after(run.folder, name, lists[name], *of_both, run.workers)
    run.say(report.last_lines(run.folder, rows, train_prompts[0]))


# ---------------------------------------------------------------- Algorithm 1


def algorithm_1(cfg):
    """Algorithm 1: the loop over rounds. Returns the run folder."""
    # What can be refused without the model is refused before it is loaded
    worker, workers, device = init_processes(torch.device(cfg.device))
    say = tqdm.write if worker == 0 else lambda text: None
    prompts, lists = prompt_lists(cfg, say)
    fingerprint = run_folder.fingerprint(vars(cfg), reward_code(cfg.reward))
    saved = run_folder.read_checkpoint(cfg, fingerprint)
    folder = run_folder.open_folder(cfg, fingerprint, saved, worker)
    track = report.open_trackers(cfg, folder, saved, worker)
    say(report.first_lines(cfg, folder, workers))

    # The pipeline is frozen; LoRA in the UNet's attention is all that is trained
    pipeline = load_pipeline(cfg, device)
    policy = pipeline.policy
    reward = load_reward(cfg.reward, pipeline.tiny, device, DTYPES[cfg.precision])
    judge = find_judge(pipeline, prompts + sum(lists.values(), []))
    lora = inject_lora(policy.unet, cfg.rank, seed=cfg.seed)
    betas = (cfg.beta1, cfg.beta2)
    optimizer = torch.optim.AdamW(lora.values(), cfg.lr, betas, cfg.adam_eps, cfg.weight_decay)
    scaler = make_scaler(cfg, device)

    # What a run remembers from round to round, beside the weights: a resume brings it back.
    # There is no random state in it: training's noise is keyed by seed, round, root and branch
    normalise = RewardNormaliser(cfg.window, cfg.min_count)
    step_weights = StepWeights(cfg.step_weight)
    rounds_done = run_folder.restore(saved, lora, optimizer, scaler, normalise, step_weights)
    run = Run(folder, worker, workers, say, track)
    before = scores_before(run, cfg, pipeline, reward, judge, lists)
    # log p is a mean over D numbers, while DPO's beta belongs to their sum
    D = math.prod(policy.latent_shape)
    log = report.TrainingLog(cfg.clip_range)
    clock = report.Clock()

    for i in progress(range(rounds_done, cfg.rounds), "rounds"):
        # BPT: only the last tau steps are trained, and tau grows (Eq. 3, App. D.1). Late
        # steps start from states with less of the picture still open: an easy task comes first
        tau = cfg.T if cfg.no_bpt else tau_schedule(i, cfg.tau_rounds, cfg.T, cfg.tau0)

        # BS: a root is a prompt and an x_T. Its branches share the path down to x_tau, so
        # only their last tau steps can be why their rewards differ (Sec. 3.3). The noise of
        # each root and branch has its own key: a run does not depend on how it is batched
        clock.start("sampling")
        roots = draw_roots(prompts, cfg, i, worker, workers)
        x_T = policy.noise(roots.keys("x_T"))
        x_tau = policy.denoise(x_T, cfg.T, tau, roots.own_prompts, roots.keys("shared"))
        branch_keys = roots.branch_keys(cfg.branches)
        x, log_p_old = policy.branch(x_tau, tau, 0, roots.own_prompts, branch_keys)
        rollout = Rollout(x, log_p_old, roots.own_prompts, roots.own, device)

        # The reward sees finished pictures alone: it is sparse. r_hat compares one with others
        # of its prompt; while that has fewer than `min_count` scores, with the whole round
        clock.start("reward")
        scores, metrics = score(pipeline, reward, judge, x[:, :, -1], roots, cfg.branches)
        r_hat = normalise(i, roots.prompts, scores)  # App. D.1
        kept = select_all(r_hat) if cfg.no_bs else select_pairs(r_hat, cfg.threshold)  # Eq. 5
        if cfg.algo == "dpo":
            # A root may have kept one of the two alone: that is no pair
            kept = dpo_pairs(kept, r_hat, roots.prompts, cfg.threshold)

        clock.start("training")
        pipeline.move_others(reward, "cpu")  # --offload
        probe = choose_probe(kept, cfg, i)
        if cfg.step_weight == "rms" and len(kept):
            signs = keyed_generator(cfg.seed, i, "signs")
            energy = step_energy(policy, rollout, probe, cfg.micro_batch, lora, signs)
            step_weights.measure(energy)
        weights = step_weights(tau).to(device)  # (tau + 1,), by t
        # theta_old is the policy that sampled the round; theta moves away from it from update
        # to update, so that p/p_old leaves 1 and the clip begins to matter
        for epoch in range(cfg.epochs):
            shuffle = keyed_generator(cfg.seed, i, "shuffle", epoch)
            for update in split_updates(kept, cfg.update_size, shuffle):
                optimizer.zero_grad()
                # One UNet call is one step t of several trajectories. Gradients add up over
                # the calls, so the size of a call changes nothing but memory and speed
                for batch in rollout.batches(update, cfg.micro_batch):
                    mu, sigma = policy(batch.x_t, batch.t, batch.prompts)
                    log_p = log_prob(batch.x_prev, mu, sigma)  # Eq. 1
                    advantage = r_hat[batch.root, batch.branch].to(device)
                    advantage = advantage.clamp(-cfg.adv_clip, cfg.adv_clip)  # [official]
                    h = None
                    if cfg.algo in ("dpok", "dpo"):
                        with torch.no_grad(), lora_off(policy.unet):  # p_pre
                            mu_ref, _ = policy(batch.x_t, batch.t, batch.prompts)
                    if cfg.algo == "ddpo":  # Eq. 6, clipped
                        loss = ddpo_loss(log_p, batch.log_p_old, advantage, cfg.clip_range)
                    elif cfg.algo == "pg":  # Eq. 6
                        loss = pg_loss(log_p, batch.log_p_old, advantage)
                    elif cfg.algo == "dpok":  # Eq. 7
                        loss = ddpo_loss(log_p, batch.log_p_old, advantage, cfg.clip_range)
                        loss = dpok_loss(loss, gaussian_kl(mu, mu_ref, sigma), cfg.kl_beta)
                    elif cfg.algo == "dpo":  # Eq. 8
                        log_ref = log_prob(batch.x_prev, mu_ref, sigma)
                        loss, h = dpo_loss(log_p, log_ref, cfg.dpo_beta * D)
                    # Its share of the mean over the update's trajectories and tau steps
                    loss = weights[batch.t] * loss.sum() / (len(update) * tau)
                    scaler.scale(loss).backward()
                    log.add(log_p, batch.log_p_old, loss, h)
                norm = clip_gradient(lora, optimizer, scaler, cfg.max_grad_norm, device)
                if norm.isfinite():  # else the update is skipped, and counted
                    scaler.step(optimizer)  # AdamW
                scaler.update()
                log.end_update(norm, len(update))

        metrics |= {"round": i + 1, "tau": tau, "kept": len(kept)}
        metrics |= {"alone_on_prompt": normalise.alone, "seconds": clock.stop()}
        metrics |= log.end_round(device)
        if len(kept):
            metrics["kl_to_base"] = kl_to_base(policy, rollout, probe, cfg.micro_batch)
        pipeline.move_others(reward, device)
        state = {"fingerprint": fingerprint, "scaler": scaler.state_dict()}
        state |= {"history": normalise.history, "step_square": step_weights.square}
        end_round(run, cfg, pipeline, reward, lists, metrics, lora, optimizer, state)

    # The same prompts and the same noise as before, so each picture is compared with itself
    after = draw_lists(run, pipeline, reward, judge, lists, cfg.eval_images, "after")
    if worker == 0:
        finish(run, cfg, lora_state(policy.unet), lists, before, after, prompts)
    return folder


def main(argv=None):
    """Check the flags, then run; Ctrl-C, a full disk or a bad reward ends with a line."""
    cfg = parse_args(argv)
    with run_folder.resumable(cfg.out):
        return algorithm_1(cfg)


if __name__ == "__main__":
    main(sys.argv[1:])
