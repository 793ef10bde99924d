"""B2-DiffuRL, Algorithm 1: reinforcement learning of a text-to-image diffusion model.

    python train.py --reward clip --template 1

samples pictures with DDIM, scores them against their prompts and trains LoRA weights of
the UNet by policy gradient. Two ideas against the sparse reward: BPT trains only the
last tau steps, and tau grows to T over the rounds (Sec. 3.2); BS branches K times at
x_tau and trains on the best and the worst branch (Sec. 3.3). DDPO, the baseline, is a
setting: --no-bpt --no-bs.

The loop in `algorithm_1` reads like Algorithm 1. The mathematics is in `b2rl.py` (Eq. 2
to 8) and `ddim_logprob.py` (Eq. 1), the pipeline in `model.py`, the run folder in
`run_folder.py`.

    P roots, K branches, n trained steps        own: indices of this process's Q roots
    x          (Q, K, n + 1, C, h, w)           states x_start..x_stop, on the CPU
    log_p_old  (Q, K, n)                        log p of the policy that sampled them
    scores     (P, K), of all processes         r_hat likewise

Deliberate departures, besides those that `b2rl.py` and `ddim_logprob.py` name, all [ours]:
an update is of about `update_size` trajectories, in UNet calls as large as memory allows;
reward queries a round are a setting (roots: queries / branches), so that methods compare;
a round in which no branch passes the threshold makes no update and says so.
"""

import math
import sys
import time

import torch
from tqdm import tqdm

import run_folder
from b2rl import RewardNormaliser, RoundLog, ddpo_loss, dpo_loss, dpo_pairs, dpok_loss
from b2rl import StepWeights, micro_batches, pg_loss, select_all, select_pairs
from b2rl import split_updates, tau_schedule, training_interval
from ddim_logprob import gaussian_kl, keyed_generator, log_prob, step_factor
from eval import compare, evaluate, load_judge
from lora import inject_lora, lora_off, lora_state
from model import DTYPES, ETA, GUIDANCE, SD, T, add_model_flags, choose_device, default_precision
from model import load_model, parts, progress, tiny_folder
from processes import Parser, Stop, all_sum, die, gather, init_processes, share, sum_gradients
from report import TRACKERS, before_after, check_trackers, open_trackers, plot_curves
from report import HOPELESS, first_lines, kl_to_base, round_line, save_grid, spread
from report import step_energy, write_card, write_lora
from rewards import REWARDS, check_reward_name, load_reward, reward_source

PHASES = ("sampling", "reward", "training")
ALGOS = ("ddpo", "pg", "dpok", "dpo")
# For Stable Diffusion at 512x512 by a GPU's memory (`studies/bench.py --part memory`)
PRESETS = {
    "16gb": dict(sample_batch=8, micro_batch=4, decode_batch=2, offload=True),
    "24gb": dict(sample_batch=16, micro_batch=8, decode_batch=4, offload=True),
}
# Every number of the method: flag, type, default for SD and tiny, what it is, its source
SETTINGS = (
    ("T", int, T, T, "denoising steps [paper, Table 6]"),
    ("eta", float, ETA, ETA, "weight of DDIM's noise [paper, Table 6]"),
    ("guidance", float, GUIDANCE, GUIDANCE, "guidance scale, always [paper, Table 6]"),
    ("tau0", int, 14, 14, "first training interval, BPT [official]"),
    ("branches", int, 3, 3, "branches K of a root, BS [paper, Table 6]"),
    ("threshold", float, 0.5, 0.5, "score threshold on r_hat, Eq. 5 [paper, Table 6]"),
    ("window", int, 8, 8, "past rounds in the mean and std of r_hat, App. D.1 [official]"),
    ("min_count", int, 0, 16, "below as many scores a prompt takes the round's mean [ddpo 16]"),
    ("rounds", int, 100, 24, "rounds N [official; tiny: ours]"),
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


def parse_args(argv):
    """Flags -> namespace with every setting; ends with one line on bad input."""
    parser = Parser(__doc__.split("\n")[0])
    add = parser.add_argument
    rewards = f"{', '.join(REWARDS)} (Sec. 4.1), or your own file.py:function"
    add("--reward", default="clip", help=rewards)
    template = {"choices": (1, 2, 3), "default": 1, "help": "prompt template (App. H)"}
    add("--template", type=int, **template)
    add("--prompts", help="your own, not a template's: .txt, .jsonl or .csv")
    algos = f"{', '.join(ALGOS)}: Eq. 6 clipped, Eq. 6, Eq. 7, Eq. 8"
    add("--algo", default="ddpo", help=algos)
    add("--no-bpt", action="store_true", help="tau = T in every round (Sec. 3.2)")
    add("--no-bs", action="store_true", help="no branches, train on all (Sec. 3.3)")
    grows = "where tau grows from: x_0 (the paper) or the noise (an ablation)"
    weigh = "of steps in the loss: alike [paper], or by inverse factor or RMS [ours]"
    weigh += " (SD uniform, tiny rms)"
    add("--step-weight", choices=("uniform", "schedule", "rms"), help=weigh)
    add("--interval", choices=("backward", "forward"), default="backward", help=grows)
    add("--seed", type=int, default=0, help="keys noise, prompts, LoRA's start")
    add_model_flags(add)
    memory = "batch sizes and --offload for Stable Diffusion in this much GPU memory"
    add("--preset", choices=tuple(PRESETS), help=f"{memory}; flags that you give win")
    slower = "compute the UNet's activations twice: far less memory, more time"
    add("--checkpointing", action="store_true", help=slower)
    add("--compile", action="store_true", help="torch.compile the UNet: slow start")
    add("--channels-last", action="store_true", help="the other memory format")
    few = "prompts of each list to draw (default 100, or 0 with --validation-prompt)"
    add("--eval-prompts", type=int, help=few)
    add("--validation-prompt", action="append", help="draw this one; may be repeated")
    add("--tau-rounds", type=int, help="rounds of tau's growth (default all)")
    add("--report-to", help=f"{', '.join(TRACKERS)}, or both with a comma between")
    add("--out", help="run folder (default: in runs/, named by model, reward, method ...)")
    add("--resume", metavar="RUN", help="go on with this run, by its settings")
    for name, kind, sd, tiny, text in SETTINGS:
        flag, text = f"--{name.replace('_', '-')}", f"{text} (SD {sd}, tiny {tiny})"
        add(flag, dest=name, type=kind, metavar=kind.__name__, help=text)
    args = parser.parse_args(argv)
    if args.resume is not None:
        args = run_folder.resumed_settings(args, parser)
    return check(fill_in(args))


def fill_in(args):
    """Choose device and model where the user did not, and the settings that go with them."""
    choose_device(args)
    for name, value in PRESETS.get(args.preset, {}).items():
        if not getattr(args, name):
            setattr(args, name, value)
    given = {name: getattr(args, name) for name, *_ in SETTINGS}
    args.model = args.model or (SD if args.device.startswith("cuda") else "tiny")
    for name, _, sd, tiny, _ in SETTINGS:
        if getattr(args, name) is None:
            setattr(args, name, tiny if tiny_folder(args.model) else sd)
    if args.step_weight is None:
        args.step_weight = "rms" if tiny_folder(args.model) else "uniform"
    args.precision = args.precision or default_precision(args)
    args.branches = 1 if args.no_bs else args.branches
    if args.queries > args.branches > 0:
        args.queries -= args.queries % args.branches
    if args.tau_rounds is None:
        args.tau_rounds = args.rounds
    if args.eval_prompts is None:
        args.eval_prompts = 0 if args.validation_prompt else 100
    args.out = args.resume or args.out or run_folder.default_folder(vars(args), given)
    return args


def check(args):
    """Refuse settings that cannot work, before anything heavy is loaded."""
    if problem := check_reward_name(args.reward):
        die(problem)
    if args.algo not in ALGOS:
        die(f"unknown --algo {args.algo}: one of {', '.join(ALGOS)}")
    for name, kind, *_ in SETTINGS:
        value, flag = getattr(args, name), f"--{name.replace('_', '-')}"
        if abs(value) >= 2**53 or not math.isfinite(value):
            die(f"{flag} {value} is no usable number")
        zero_is_fine = ("threshold", "window", "min_count", "save_every")
        zero_is_fine += ("beta1", "beta2", "kl_beta", "dpo_beta", "guidance", "weight_decay")
        if name in zero_is_fine and value < 0:
            die(f"{flag} must be 0 or more")
        if name not in zero_is_fine and value <= 0:
            die(f"{flag} must be {'1 or more' if kind is int else 'above 0'}")
    check_trackers(args.report_to)
    if not all(prompt.strip() for prompt in args.validation_prompt or []):
        die("--validation-prompt is empty")
    if args.eval_prompts < 0:
        die("--eval-prompts must be 0 or more")
    for name in ("threads", "image_size", "tau_rounds"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            die(f"--{name.replace('_', '-')} must be 1 or more")
    if abs(args.seed) >= 2**53:
        die(f"--seed {args.seed} is no usable number")
    if args.T > 999:
        die("--T must be at most 999: the model knows 1000 timesteps, the first is 1")
    if args.tau0 > args.T:
        die(f"--tau0 {args.tau0} is outside 1..T = {args.T}")
    if args.eta > 1:
        die("--eta must be at most 1: above it the step is not the DDIM of Eq. 1")
    if args.branches < 2 and not args.no_bs:
        die("--branches must be 2 or more, or pass --no-bs")
    if args.queries < args.branches:
        die(f"--queries {args.queries} is fewer than --branches {args.branches}")
    if args.threshold >= args.adv_clip:
        die("--threshold must be below --adv-clip")
    if max(args.beta1, args.beta2) >= 1:
        die("--beta1 and --beta2 must be below 1")
    if args.algo == "dpo" and args.micro_batch < 2:
        die("dpo needs --micro-batch 2 or more: a pair must be in one UNet call")
    if not args.resume and run_folder.holds_run(args.out):
        die(f"{args.out} holds a run: --resume {args.out}, or --out NEW")
    return args


def draw_roots(prompts, cfg, i, worker, workers):
    """Round i's P prompts, drawn with replacement, and this process's roots (Q,)."""
    P, generator = cfg.queries // cfg.branches, keyed_generator(cfg.seed, i, "prompts")
    drawn = torch.randint(len(prompts), (P,), generator=generator).tolist()
    drawn = [prompts[j] for j in drawn]
    owners = list(range(P))
    if cfg.algo == "dpo" and cfg.no_bs:  # a pair: two roots of a prompt, in one process
        owners = [prompts.index(c) for c in drawn]
    return drawn, share(owners, worker, workers)


def score(model, reward, judge, x_0, names, own, P, K):
    """Rewards of all processes' pictures, (P, K), and metrics: {name: number}.

    x_0: (Q, K, C, h, w) of the roots `own`, whose prompts are `names` (Q). judge: or None.
    """
    table, found, thumbs = torch.zeros(2, P, K), [], []
    x_0, names = x_0.flatten(0, 1), [name for name in names for _ in range(K)]
    for rows in progress(parts(torch.arange(len(x_0)), model.decode_batch), "scoring"):
        images, prompts = model.decode(x_0[rows]), [names[j] for j in rows.tolist()]
        thumbs.append(torch.nn.functional.adaptive_avg_pool2d(images, 8))
        right = judge(images, prompts).float() if judge else torch.zeros(len(rows))
        found.append(torch.stack([reward(images, prompts), right]))
    if found:
        table[:, own] = torch.cat(found, 1).view(2, -1, K)
    metrics = {"spread_within_prompt": spread(torch.cat(thumbs), names) if found else 0.0}
    scores, right = all_sum(table, model.device)
    return scores, metrics | ({"recognised": right.mean().item()} if judge else {})


def main(argv=None):
    """Check the flags, then run; Ctrl-C, a full disk or a bad reward ends with a line."""
    cfg = parse_args(argv)
    with run_folder.resumable(cfg.out):
        return algorithm_1(cfg)


def algorithm_1(cfg):
    """Algorithm 1: the loop over rounds. Returns the run folder."""
    train_prompts, unseen_prompts = run_folder.load_prompts(cfg.template, cfg.prompts)
    worker, workers, device = init_processes(torch.device(cfg.device))
    folder = run_folder.open_folder(cfg, worker)
    say = tqdm.write if worker == 0 else lambda _: None
    say(first_lines(cfg, folder, workers))
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    model = load_model(cfg, device)
    reward = load_reward(cfg.reward, model.tiny, device, DTYPES[cfg.precision])
    validation, few = cfg.validation_prompt or [], cfg.eval_prompts
    judge = load_judge(model, [*train_prompts, *unseen_prompts, *validation])
    lists = {"validation": validation, "train": train_prompts[:few]}
    lists["unseen"] = unseen_prompts[:few]
    lists = {name: prompts for name, prompts in lists.items() if prompts}
    lora = inject_lora(model.unet, cfg.rank, seed=cfg.seed)
    betas, eps = (cfg.beta1, cfg.beta2), cfg.adam_eps
    optimizer = torch.optim.AdamW(lora.values(), cfg.lr, betas, eps, cfg.weight_decay)
    # In fp16 the gradients of a mean over D and an update would round to 0, so the loss is
    # scaled up; DPO's is larger by beta * D. The scale must be there even without a share.
    scale = 2.0**6 if cfg.algo == "dpo" else 2.0**16
    scaler = torch.amp.GradScaler(device.type, scale, enabled=cfg.precision == "fp16")
    scaler.scale(torch.zeros((), device=device))
    normalise = RewardNormaliser(cfg.window, cfg.min_count)
    first, in_a_row = 0, 0  # rounds done; updates in a row that were skipped
    weights = StepWeights(cfg.step_weight, step_factor(model.schedule))
    mark = run_folder.fingerprint(vars(cfg), reward_source(cfg.reward))
    saved = cfg.resume and run_folder.load_checkpoint(folder, lora, optimizer, cfg, mark)
    if saved:
        first, normalise.history = saved["rounds_done"], saved["history"]
        in_a_row, weights.square = saved["skipped_in_a_row"], saved["step_square"]
        scaler.load_state_dict(saved["scaler"])
    if worker == 0:
        run_folder.keep_metrics(folder, first)
        track = open_trackers(cfg, folder)

    def draw(when, name, prompts, each, queries, judge):
        scores, images = evaluate(model, reward, prompts, each, judge, worker, workers)
        if worker == 0:
            path = folder / f"grids/{when}-{name}.png"
            save_grid(path, images, 9)
            track({f"pictures, {name}": path}, queries)
        return scores

    def score_all(when, queries):
        each, results = cfg.eval_images, {}
        for name, prompts in lists.items():
            results[name] = draw(when, name, prompts, each, queries, judge)
        if worker == 0:
            run_folder.write_json(folder / f"{when}.json", results)
        return results

    def end_round(line, scores, clock, in_a_row):
        line |= {"reward_mean": scores.mean().item(), "reward_std": scores.std().item()}
        line |= {"of": scores.numel(), "alone_on_prompt": normalise.lone}
        line["seconds"] = {name: b - a for name, a, b in zip(PHASES, clock, clock[1:])}
        done, queries = line["round"], line["queries"]
        # The checkpoint is written last: a kill before it means that the round is done again
        if done % cfg.grid_every == 0 and done < cfg.rounds and lists:
            name, prompts = next(iter(lists.items()))
            draw(f"round{done:04d}", name, prompts[:18], 1, queries, None)
        if worker == 0:
            if cfg.save_every and done % cfg.save_every == 0:
                path = folder / f"lora-round{done:04d}.safetensors"
                run_folder.write_safetensors(path, lora_state(model.unet))
            run_folder.append_metrics(folder, line)
            header = {"rounds_done": done, "fingerprint": mark, "skipped_in_a_row": in_a_row}
            header |= {"history": normalise.history, "scaler": scaler.state_dict()}
            header["step_square"] = weights.square
            run_folder.save_checkpoint(folder, lora, optimizer, header)
            track(line | line["seconds"], queries)
            say(round_line(line, cfg, run_folder.read_metrics(folder)[0]["reward_mean"]))

    before = run_folder.read_json(folder / "before.json") if cfg.resume else None
    if before is None:
        with lora_off(model.unet):
            before = score_all("before", 0)

    def generator(*key):
        return keyed_generator(cfg.seed, *key)

    T, K, P = cfg.T, cfg.branches, cfg.queries // cfg.branches
    D, clip, size = math.prod(model.latent_shape), cfg.clip_range, cfg.micro_batch
    for i in range(first, cfg.rounds):
        clock = [time.perf_counter()]
        # BPT: the steps t = start..stop+1, in the paper tau..1, are trained (Eq. 3, D.1)
        tau = T if cfg.no_bpt else tau_schedule(i, cfg.tau_rounds, T, cfg.tau0)
        start, stop = training_interval(tau, T, cfg.interval)
        # Each root: a prompt, x_T, and the path to x_tau, which its branches share
        prompts, own = draw_roots(train_prompts, cfg, i, worker, workers)  # P, (Q,)
        own_prompts, roots = [prompts[p] for p in own], [(cfg.seed, i, int(p)) for p in own]
        x_T = model.noise([(*root, "x_T") for root in roots])
        shared = [(*root, "shared") for root in roots]
        x_tau = model.denoise(x_T, T, start, own_prompts, shared)  # (Q, C, h, w)
        # BS: K branches of each root, from x_tau on (Sec. 3.3)
        keys = [[(*root, k) for k in range(K)] for root in roots]
        x, log_p_old = model.branch(x_tau, start, stop, own_prompts, keys)
        x_0 = model.finish(x[:, :, -1], stop, own_prompts, keys)  # (Q, K, C, h, w)
        clock.append(time.perf_counter())
        scores, seen = score(model, reward, judge, x_0, own_prompts, own, P, K)
        clock.append(time.perf_counter())
        r_hat = normalise(i, prompts, scores)  # App. D.1
        # Eq. 5: the best and the worst branch of each root, if they pass the threshold
        kept = select_all(r_hat) if cfg.no_bs else select_pairs(r_hat, cfg.threshold)
        if cfg.algo == "dpo":
            kept = dpo_pairs(kept, r_hat, prompts, cfg.threshold)
        some = kept[torch.randperm(len(kept), generator=generator(i, "some"))[:8]]
        probe = (model, x, start, own_prompts, own, some, size)
        if cfg.step_weight == "rms" and len(kept):
            weights.measure(start, step_energy(*probe, lora, generator(i, "signs")))
        log, n, weight = RoundLog(), start - stop, weights(start, stop).to(device)
        if cfg.offload:
            model.move_others(reward, "cpu")
        for epoch in range(cfg.epochs):  # nothing kept: no updates
            shuffle = generator(i, "shuffle", epoch)
            for update in split_updates(kept, cfg.update_size, shuffle):
                optimizer.zero_grad()
                calls = list(micro_batches(update, own, n, size))
                for p, k, s in progress(calls, "training"):
                    x_t, a_t, t = x[p, k, s].to(device), x[p, k, s + 1].to(device), start - s
                    old, c = log_p_old[p, k, s].to(device), [own_prompts[q] for q in p]
                    A = r_hat[own[p], k].clamp(-cfg.adv_clip, cfg.adv_clip).to(device)
                    mu, sigma = model.policy(x_t, t, c)
                    log_p, h = log_prob(a_t, mu, sigma), None  # Eq. 1; h is DPO's
                    if cfg.algo in ("dpok", "dpo"):
                        with torch.no_grad(), lora_off(model.unet):
                            mu_ref, _ = model.policy(x_t, t, c)  # p_pre
                    if cfg.algo == "ddpo":  # Eq. 6, clipped
                        loss = ddpo_loss(log_p, old, A, clip)
                    elif cfg.algo == "pg":  # Eq. 6
                        loss = pg_loss(log_p, old, A)
                    elif cfg.algo == "dpok":  # Eq. 7
                        kl = gaussian_kl(mu, mu_ref, sigma)
                        loss = dpok_loss(log_p, old, A, kl, clip, cfg.kl_beta)
                    elif cfg.algo == "dpo":  # Eq. 8
                        log_ref = log_prob(a_t, mu_ref, sigma)
                        loss, h = dpo_loss(log_p, log_ref, cfg.dpo_beta * D)
                    loss = weight[s] * loss.sum() / (len(update) * n)  # mean over m and t
                    scaler.scale(loss).backward()
                    log.add(log_p, old, loss, h)
                sum_gradients(lora.values(), device)
                scaler.unscale_(optimizer)
                norm = torch.nn.utils.clip_grad_norm_(lora.values(), cfg.max_grad_norm)
                if norm.isfinite():
                    scaler.step(optimizer)  # AdamW
                scaler.update()
                in_a_row = log.end_update(norm, len(update), in_a_row)
                if in_a_row == 5:
                    raise Stop(HOPELESS)
        clock.append(time.perf_counter())
        line = {"round": i + 1, "tau": tau, "queries": (i + 1) * P * K, "kept": len(kept)} | seen
        line |= log.metrics(clip, lambda values: gather(values, device))
        if len(kept):
            line["kl_to_base"] = kl_to_base(*probe)
        if cfg.offload:
            model.move_others(reward, device)
        end_round(line, scores, clock, in_a_row)

    if worker == 0:
        write_lora(folder, lora_state(model.unet))
    after = score_all("after", cfg.rounds * P * K)
    summary, rows = compare(before, after, cfg.reward)
    if worker == 0:
        write_card(folder, cfg, summary, train_prompts)
        run_folder.write_json(folder / "summary.json", summary)
        plot_curves(folder)
        if lists:
            before_after(folder, next(iter(lists)))
    say("\n".join(["\nScores before and after, same noise:", *rows]) if rows else "")
    say(f"Pictures: {folder}/before-after.png, grids/. Curves: {folder}/curves.png.")
    say(f'Your prompt: python eval.py --lora {folder} --prompt "{train_prompts[0]}"')
    return folder


if __name__ == "__main__":
    main(sys.argv[1:])
