"""B2-DiffuRL, Algorithm 1: fine-tune a text-to-image diffusion model by reinforcement learning.

    python train.py --reward clip --template 1

samples pictures with DDIM, scores them against their prompts and trains LoRA weights of the UNet
by policy gradient. Two ideas against the sparse reward: BPT trains only the last tau steps, and
tau grows to T over the rounds (Sec. 3.2); BS branches K times at x_tau and trains on the best and
the worst branch (Sec. 3.3). DDPO is a setting: --no-bpt --no-bs.

The loop in `algorithm_1` reads like Algorithm 1 (reconstructed: both texts of the paper lost it).
The mathematics is in `b2rl.py` and `ddim_logprob.py`, what surrounds a run in `runs.py`.

Deliberate departures, besides those that `b2rl.py` and `ddim_logprob.py` name:
    [ours] an update is a fixed number of trajectories, all their steps batched together; the
        gradient does not depend on the micro-batch (trap 10), so that is as large as memory allows.
    [ours] reward queries a round are a setting (roots: queries / branches): methods compare.
    [ours] a round in which no branch passes the threshold is skipped and says so (trap 5).
"""

import argparse
import math
import sys
import time
from dataclasses import dataclass

import torch
from tqdm import tqdm

import runs
from b2rl import (
    RewardNormaliser, complete_pairs, ddpo_loss, dpo_loss, dpok_loss, micro_batches, pg_loss,
    select_all, select_pairs, select_prompt_pairs, split_updates, tau_schedule, training_interval,
    unet_rows,
)  # fmt: skip
from ddim_logprob import (
    ddim_mean, denoise, gaussian_kl, guided_prediction, keyed_generator, log_prob,
)  # fmt: skip
from eval import compare, evaluate, spread
from lora import inject_lora, lora_off, lora_state
from rewards import REWARDS, check_reward_name, load_reward

ALGOS = ("ddpo", "pg", "dpok", "dpo")

# Every number of the method, once: flag, type, default for SD and for tiny, what it is, its source.
SETTINGS = (
    ("T", int, 20, 20, "denoising steps [paper, Table 6]"),
    ("eta", float, 1.0, 1.0, "weight of DDIM's noise [paper, Table 6]"),
    ("guidance", float, 5.0, 5.0, "guidance scale, sampling and training [paper, Table 6]"),
    ("tau0", int, 14, 18, "first training interval, BPT [official, Table 6's is lost; tiny: ours]"),
    ("skip_last", int, 0, 13, "last steps that are sampled but not trained [paper: 0; tiny: ours]"),
    ("branches", int, 3, 4, "branches K of a root, BS [paper, Table 6; tiny: ours]"),
    ("threshold", float, 0.5, 0.5, "score threshold on r_hat, Eq. 5 [paper, Table 6]"),
    ("window", int, 8, 8, "past rounds in the reward's mean and std, App. D.1 [official]"),
    ("rounds", int, 100, 18, "rounds N [official; tiny: ours]"),
    ("queries", int, 256, 200, "reward queries a round; roots = queries / branches [paper 25.6k]"),
    ("epochs", int, 2, 1, "passes over a round's data [official; tiny: ours]"),
    ("update_size", int, 64, 32, "trajectories an update [Table 6: 2 x 32; DDPO's 2 x 128]"),
    ("lr", float, 1e-4, 1e-3, "AdamW learning rate [paper, Table 6; tiny: ours]"),
    ("weight_decay", float, 1e-4, 1e-4, "AdamW weight decay [paper, Table 6]"),
    ("beta1", float, 0.9, 0.9, "AdamW beta_1 [paper, Table 6]"),
    ("beta2", float, 0.999, 0.999, "AdamW beta_2 [paper, Table 6]"),
    ("adam_eps", float, 1e-8, 1e-8, "AdamW epsilon [paper, Table 6]"),
    ("clip_range", float, 1e-4, 3e-3, "clip of the ratio of mean log p: trap 1 [ddpo; tiny: ours]"),
    ("adv_clip", float, 5.0, 5.0, "r_hat is clipped to +- this [official, ddpo]"),
    ("max_grad_norm", float, 1.0, 1.0, "gradient norm clip [official, ddpo]"),
    ("rank", int, 4, 4, "LoRA rank [official]"),
    ("kl_beta", float, 0.01, 0.01, "weight of DPOK's KL, Eq. 7 [ours]"),
    ("dpo_beta", float, 0.1, 0.1, "beta of DPO on summed log p, Eq. 8 [D3PO's code]"),
    ("sample_batch", int, 8, 128, "states a UNet call in sampling, doubled by guidance [Table 6]"),
    ("micro_batch", int, 2, 128, "states a UNet call in training; same gradient [Table 6]"),
    ("decode_batch", int, 8, 64, "pictures decoded and scored at once"),
    ("eval_images", int, 1, 2, "pictures a prompt, before and after, on both prompt lists"),
    ("grid_every", int, 10, 5, "rounds between picture grids"),
)


def parse_args(argv):
    """Flags -> namespace with every setting filled in; ends with one line on bad input."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: runs.die(f"{message} (see --help)")
    add = parser.add_argument
    add("--reward", default="clip", help=f"{', '.join(REWARDS)} (Sec. 4.1), or your own as "
        "file.py:function, which runs the file's code")  # fmt: skip
    add("--template", type=int, choices=(1, 2, 3), default=1, help="prompt template (App. H)")
    add("--prompts", help="your own prompts, one a line, in place of a template")
    add("--algo", default="ddpo", help=f"{', '.join(ALGOS)}: Eq. 6 clipped, unclipped, Eq. 7, 8")
    add("--no-bpt", action="store_true", help="train all T steps from the first round (Sec. 3.2)")
    add("--no-bs", action="store_true", help="no branches, train on every sample (Sec. 3.3)")
    add("--interval", choices=("backward", "forward"), default="backward",
        help="where tau grows from: x_0 (the paper) or the noise (an ablation)")
    add("--seed", type=int, default=0, help="keys all noise, prompts and the LoRA's start")
    runs.add_flags(add)
    for name, kind, sd, tiny, text in SETTINGS:
        add(f"--{name.replace('_', '-')}", dest=name, type=kind, metavar=kind.__name__,
            help=f"{text} (default SD {sd}, tiny {tiny})")  # fmt: skip
    args = parser.parse_args(argv)
    if args.resume:
        return runs.resumed_settings(args, parser, check)
    return check(fill_in(args))


def fill_in(args):
    """Choose device and model where the user did not, and the settings that belong to them."""
    runs.choose_device(args)
    runs.fill_preset(args)
    if args.model is None:
        args.model = runs.SD if args.device.startswith("cuda") else "tiny"
    is_tiny = runs.tiny_folder(args.model) is not None
    for name, _, sd, tiny, _ in SETTINGS:
        if getattr(args, name) is None:
            setattr(args, name, tiny if is_tiny else sd)
    args.precision = args.precision or runs.default_precision(args.device, is_tiny)
    if args.no_bs:
        args.branches = 1
    args.out = args.out or runs.default_folder(args)
    return args


def check(args):
    """Refuse settings that cannot work, before anything heavy is loaded."""
    rules = (
        ((problem := check_reward_name(args.reward)) is None, problem),
        (args.algo in ALGOS, f"unknown --algo {args.algo}: one of {', '.join(ALGOS)}"),
        (1 <= args.tau0 <= args.T, f"--tau0 {args.tau0} is outside 1..T = {args.T}"),
        (args.no_bs or args.branches >= 2, "--branches must be 2 or more, or pass --no-bs"),
        (args.queries >= args.branches,
         f"--queries {args.queries} is fewer than --branches {args.branches}"),
        (args.eta > 0, "--eta must be above 0: without noise a step has no probability"),
        (0 <= args.threshold < args.adv_clip, "--threshold must be from 0 to --adv-clip"),
        (0 <= args.skip_last < (args.T if args.no_bpt else args.tau0), f"--skip-last "
         f"{args.skip_last} must be from 0 to below --tau0 {args.tau0}: try --skip-last 0"),
        (args.no_bpt or args.interval == "backward" or args.skip_last in range(args.T - args.tau0),
         "--interval forward never grows so: --skip-last must be below T - tau0, e.g. 0 and 3"),
        (not args.tensorboard or runs.has_tensorboard(), "--tensorboard: pip install tensorboard"),
        (args.T <= 999, "--T must be at most 999: the model knows 1000 timesteps, the first is 1"),
        (0 <= args.beta1 < 1 and 0 <= args.beta2 < 1, "--beta1 and --beta2 must be from 0 to 1"),
        *((getattr(args, n) is None or getattr(args, n) >= 1, f"--{n.replace('_', '-')} must be 1 "
           "or more") for n in ("threads", "image_size")),
        (not (out := runs.holds_run(args)), f"{out} holds a run: --resume {out}, or --out NEW"),
        (args.algo != "dpo" or args.micro_batch >= 2, "dpo needs --micro-batch 2 or more"),
        *((getattr(args, n) > 0, f"--{n.replace('_', '-')} must be above 0") for n in (
            "lr", "clip_range", "adam_eps", "max_grad_norm", "adv_clip")),
        *((getattr(args, n) >= 0, f"--{n.replace('_', '-')} must be 0 or more") for n in (
            "window", "weight_decay", "kl_beta", "dpo_beta", "guidance")),
        *((getattr(args, n) >= 1, f"--{n.replace('_', '-')} must be 1 or more") for n in (
            "T", "rounds", "queries", "epochs", "update_size", "rank", "sample_batch",
            "micro_batch", "decode_batch", "eval_images", "grid_every")),
    )  # fmt: skip
    for message in (message for fine, message in rules if not fine):
        runs.die(message)
    return args


@dataclass
class Round:
    """What one round sampled. P_here of its P roots belong to this process.

    prompts: P, all of them. mine: (P_here,) long, the roots of this process. states: (P_here, K,
    n + 1, C, h, w) from x_start to x_stop, n = start - stop; log_p_old: (P_here, K, n); scores:
    (P, K), global.
    """

    prompts: list
    mine: torch.Tensor
    states: torch.Tensor
    log_p_old: torch.Tensor
    scores: torch.Tensor
    diversity: float
    seconds: dict


def sample_round(model, reward, prompts, i, interval, args, rank, world):
    """Algorithm 1, sampling: shared path to x_start, K branches there, scores of all pictures."""
    clock, (start, stop), K = time.perf_counter(), interval, args.branches
    P = args.queries // K
    draw = keyed_generator(args.seed, i, "prompts")
    drawn = [prompts[j] for j in torch.randint(len(prompts), (P,), generator=draw).tolist()]
    together = args.algo == "dpo" and args.no_bs  # DPO's pairs are then roots of the same prompt
    share = torch.tensor([prompts.index(drawn[p]) if together else p for p in range(P)])
    mine = (share % world == rank).nonzero().flatten()

    def path(roots, x, start, stop, keys, keep=False):
        cond, uncond = model.embed([drawn[p] for p in roots]), model.embed([""])
        generators = [keyed_generator(args.seed, i, *key) for key in keys]
        return denoise(model.unet, model.schedule, x, start, stop, cond, uncond, args.guidance,
                       generators, keep)  # fmt: skip

    states, log_ps, finals = [], [], []
    # x_T, then the path to x_start that the branches share: once a root, nothing kept (trap 9)
    for roots in runs.parts(mine, args.sample_batch):
        roots = roots.tolist()
        x_T = torch.stack([torch.randn(model.latent_shape, generator=keyed_generator(
            args.seed, i, p, "x_T")) for p in roots])  # fmt: skip
        keys = [(p, "shared") for p in roots]
        finals.append(path(roots, x_T.to(model.device), args.T, start, keys).cpu())
    x_start = torch.cat(finals) if finals else torch.zeros(0, *model.latent_shape)
    # K branches of each root through the training interval, and on to x_0 if it stops earlier
    finals = []
    for at in runs.parts(torch.arange(len(mine)), max(1, args.sample_batch // K)):
        roots = mine[at].tolist()
        keys = [(p, k) for p in roots for k in range(K)]
        x, kept, log_p = path(roots, x_start[at].to(model.device), start, stop, keys, keep=True)
        states.append(kept.cpu().unflatten(0, (-1, K)))  # (roots here, K, steps + 1, C, h, w)
        log_ps.append(log_p.cpu().unflatten(0, (-1, K)))
        if stop > 0:
            keys = [(*key, "rest") for key in keys]
            x = path([p for p in roots for _ in range(K)], x, stop, 0, keys)
        finals.append(x.cpu())
    sampled = time.perf_counter()

    scores, thumbs = torch.zeros(P, K), []
    if len(mine):
        x_0, owners = torch.cat(finals), [drawn[p] for p in mine.tolist() for _ in range(K)]
        mine_scores = []
        for at in torch.arange(len(x_0)).split(args.decode_batch):
            images = model.decode(x_0[at], args.decode_batch)
            mine_scores.append(reward(images, [owners[j] for j in at.tolist()]))
            thumbs.append(torch.nn.functional.adaptive_avg_pool2d(images, 8))
        scores[mine] = torch.cat(mine_scores).view(-1, K)
    scores = runs.all_sum(scores, model.device)
    diversity = spread(torch.cat(thumbs), owners) if thumbs else 0.0
    seconds = {"sampling": sampled - clock, "reward": time.perf_counter() - sampled}
    states, log_ps = (torch.cat(v) if v else torch.zeros(0) for v in (states, log_ps))
    return Round(drawn, mine, states, log_ps, scores, diversity, seconds)


def predict(model, data, rows, interval, args):
    """Guided UNet predictions for rows (R, 4) of (group, step, root, branch).

    Returns prediction and x_t (R, C, h, w), paper times t (R,).
    """
    here = {p: j for j, p in enumerate(data.mine.tolist())}
    _, step, root, branch = rows.T
    x_t = data.states[[here[p] for p in root.tolist()], branch, step].to(model.device)
    t = interval[0] - step
    cond = model.embed([data.prompts[p] for p in root.tolist()])
    return guided_prediction(model.unet, model.schedule, x_t, t, cond, model.embed([""]),
                             args.guidance), x_t, t  # fmt: skip


def update_gradient(model, data, r_hat, update, interval, args):
    """Accumulate one update's gradient (Eq. 6) over the trajectories that this process owns.

    update: (m, 3) (group, root, branch), global. The loss is the mean over the update's m
    trajectories and their tau steps, whatever the micro-batch. Returns sums for the metrics.
    """
    tau, D = interval[0] - interval[1], math.prod(model.latent_shape)  # steps that are trained
    here = {p: j for j, p in enumerate(data.mine.tolist())}
    owned = update[torch.isin(update[:, 1], data.mine)]
    sums = {"items": 0, "clipped": 0, "ratio": 0.0, "max_log_ratio": 0.0, "h": 0.0, "loss": 0.0}
    rows, items, row_of = unet_rows(owned, tau)
    for lo, hi in micro_batches(rows, args.micro_batch):
        inside = (row_of >= lo) & (row_of < hi)
        _, step, root, branch = items[inside].T
        owner = [here[p] for p in root.tolist()]
        x_prev = data.states[owner, branch, step + 1].to(model.device)
        log_p_old = data.log_p_old[owner, branch, step].to(model.device)
        advantage = r_hat[root, branch].clamp(-args.adv_clip, args.adv_clip).to(model.device)

        prediction, x_t, t = predict(model, data, rows[lo:hi], interval, args)
        mu, sigma = (v[row_of[inside] - lo] for v in ddim_mean(model.schedule, prediction, x_t, t))
        log_p = log_prob(x_prev, mu, sigma)
        if args.algo in ("dpok", "dpo"):
            with torch.no_grad(), lora_off(model.unet):  # p_pre
                reference = predict(model, data, rows[lo:hi], interval, args)[0]
                mu_pre = ddim_mean(model.schedule, reference, x_t, t)[0][row_of[inside] - lo]
        h = torch.zeros(())
        if args.algo == "ddpo":
            loss = ddpo_loss(log_p, log_p_old, advantage, args.clip_range)
        elif args.algo == "pg":
            loss = pg_loss(log_p, log_p_old, advantage)
        elif args.algo == "dpok":
            kl = gaussian_kl(mu, mu_pre, sigma)
            loss = dpok_loss(log_p, log_p_old, advantage, kl, args.clip_range, beta=args.kl_beta)
        else:  # items are sorted: the two of a (group, step) are neighbours, in order of branch
            best = advantage.view(-1, 2).argmax(1, keepdim=True)
            log_ref = log_prob(x_prev, mu_pre, sigma)
            pick = lambda v, which: v.view(-1, 2).gather(1, which)[:, 0]  # noqa: E731
            loss, h = dpo_loss(pick(log_p, best), pick(log_p, 1 - best), pick(log_ref, best),
                               pick(log_ref, 1 - best), args.dpo_beta * D)  # fmt: skip
            loss = loss.repeat_interleave(2)  # a pair counts as its two trajectories
        (runs.loss_scale(model, args) * loss.sum() / (len(update) * tau)).backward()

        log_ratio = (log_p - log_p_old).detach()
        sums["items"] += len(log_ratio)
        sums["clipped"] += (log_ratio.exp() - 1).abs().gt(args.clip_range).sum().item()
        sums["ratio"] += log_ratio.exp().sum().item()
        sums["max_log_ratio"] = log_ratio.abs().max().clamp(min=sums["max_log_ratio"]).item()
        sums["h"] += 2 * h.detach().abs().sum().item()
        sums["loss"] += loss.detach().sum().item() / (len(update) * tau)
    return sums


def train_round(model, data, r_hat, kept, interval, optimizer, i, args, in_a_row=0):
    """Algorithm 1, training: epochs over the kept trajectories, an AdamW step for each update.

    in_a_row: how many updates, right before this round, were skipped. Returns the metrics.
    """
    clock, parameters = time.perf_counter(), optimizer.param_groups[0]["params"]
    log = {"updates": 0, "skipped_updates": 0, "trajectories_per_update": []}
    totals, norms = None, []
    for epoch in range(args.epochs):
        shuffle = keyed_generator(args.seed, i, "shuffle", epoch)
        for update in split_updates(kept, args.update_size, shuffle):
            optimizer.zero_grad(set_to_none=True)
            sums = update_gradient(model, data, r_hat, update, interval, args)
            sums = runs.all_totals(sums, model.device)
            runs.sum_gradients(parameters, model.device, runs.loss_scale(model, args))
            if totals is None:  # before the first update every ratio must be 1 (trap 2)
                log["first_max_log_ratio"] = sums["max_log_ratio"]
                log["first_ratio"] = sums["ratio"] / max(1, sums["items"])
                totals = dict.fromkeys(sums, 0)
            totals = {k: totals[k] + v for k, v in sums.items()}
            norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
            if norm.isfinite():
                optimizer.step()
                log["updates"], in_a_row = log["updates"] + 1, 0
            else:  # NaN or infinite: the weights stay as they are
                log["skipped_updates"], in_a_row = log["skipped_updates"] + 1, in_a_row + 1
                runs.stop_if_hopeless(in_a_row)
            norms.append(norm.item())
            log["trajectories_per_update"].append(len(update))
    log["skipped_in_a_row"] = in_a_row
    if totals:
        log["clip_fraction"] = totals["clipped"] / max(1, totals["items"])
        log["mean_abs_h"] = totals["h"] / max(1, totals["items"])
        log["loss"] = totals["loss"] / len(norms)
        log["grad_norm"] = sum(norms) / len(norms)
    data.seconds["training"] = time.perf_counter() - clock
    return log


@torch.no_grad()
def kl_to_base(model, data, kept, interval, i, args):
    """KL(p_theta || p_pre) of a step, in nats (summed over D), at up to 64 states a process."""
    rows, _, _ = unet_rows(kept[torch.isin(kept[:, 1], data.mine)], interval[0] - interval[1])
    pick = torch.randperm(len(rows), generator=keyed_generator(args.seed, i, "kl"))[:64]
    sums = torch.zeros(2, dtype=torch.float64)
    for part in runs.parts(rows[pick.sort().values], args.micro_batch):
        prediction, x_t, t = predict(model, data, part, interval, args)
        mu, sigma = ddim_mean(model.schedule, prediction, x_t, t)
        with lora_off(model.unet):
            mu_pre = ddim_mean(
                model.schedule, predict(model, data, part, interval, args)[0], x_t, t)[0]
        kl = gaussian_kl(mu, mu_pre, sigma) * math.prod(model.latent_shape)
        sums += torch.tensor([kl.sum().item(), len(kl)])
    total, count = runs.all_sum(sums, model.device).tolist()
    return total / max(1, count)


def main(argv=None):
    """Check the flags, then run; Ctrl-C, a full disk or a bad reward ends with a clear line."""
    args = parse_args(argv)
    with runs.resumable(args.resume or args.out):
        return algorithm_1(args)


def algorithm_1(args):
    """Algorithm 1: the loop over rounds. Returns the run folder."""
    train_prompts, unseen_prompts = runs.load_prompts(args.template, args.prompts)
    rank, world, device = runs.init_processes(torch.device(args.device))
    if args.threads:
        torch.set_num_threads(args.threads)
    say = print if rank == 0 else lambda *_, **__: None
    say(runs.first_line(args, world))
    model = runs.load_model(args, device)
    reward = load_reward(args.reward, model.tiny, device, runs.DTYPES[args.precision])
    judge = runs.load_judge(model, train_prompts + unseen_prompts)
    lora = inject_lora(model.unet, args.rank, seed=args.seed)
    optimizer = torch.optim.AdamW(
        lora.values(), lr=args.lr, betas=(args.beta1, args.beta2), eps=args.adam_eps,
        weight_decay=args.weight_decay)  # fmt: skip
    normalise, first, bad = RewardNormaliser(args.window), 0, 0
    if args.resume:
        first, normalise.history, bad = runs.load_checkpoint(args.resume, lora, optimizer)
    folder = runs.open_folder(args, first, rank)
    tensorboard = runs.open_tensorboard(args, folder, first, rank)
    lists = {"train": train_prompts, **({"unseen": unseen_prompts} if unseen_prompts else {})}

    def report(when):
        results = {}
        for name, prompts in lists.items():
            results[name], images = evaluate(model, reward, prompts, args.eval_images, args, judge,
                                             rank, world)  # fmt: skip
            runs.save_grid(folder / f"grids/{when}-{name}.png", images, 9, rank)
        return results

    before = runs.read_json(folder / "before.json") if args.resume else None
    if before is None:
        with lora_off(model.unet):
            before = report("before")
        if rank == 0:
            runs.write_json(folder / "before.json", before)

    bar = tqdm(range(first, args.rounds), initial=first, total=args.rounds, disable=rank > 0)
    for i in bar:
        # BPT: the interval of this round (Eq. 3, App. D.1)
        tau = args.T if args.no_bpt else tau_schedule(i, args.rounds, args.T, args.tau0)
        interval = training_interval(tau, args.T, args.interval, args.skip_last)
        # BS: shared path, branches at x_tau, log p_old, scores
        data = sample_round(model, reward, train_prompts, i, interval, args, rank, world)
        r_hat = normalise(i, data.prompts, data.scores)  # App. D.1
        # Eq. 5: the best and the worst of each branch
        if not args.no_bs:
            kept = select_pairs(r_hat, args.threshold)
        elif args.algo == "dpo":
            kept = select_prompt_pairs(r_hat, data.prompts, args.threshold)
        else:
            kept = select_all(r_hat)
        if args.algo == "dpo":
            kept = complete_pairs(kept)
        if len(kept) == 0:
            bar.write(f"round {i + 1}: no branch passed --threshold {args.threshold}: no update")
        # Eq. 6
        with runs.offloaded(model, reward, args):
            log = train_round(model, data, r_hat, kept, interval, optimizer, i, args, bad)
            bad = log["skipped_in_a_row"]
            kl = kl_to_base(model, data, kept, interval, i, args) if len(kept) else 0.0

        line = {
            "round": i + 1, "tau": tau, "queries": (i + 1) * data.scores.numel(),
            "reward_mean": data.scores.mean().item(), "reward_std": data.scores.std().item(),
            "kept": len(kept), "of": data.scores.numel(), **log, "kl_to_base": kl,
            "spread_within_prompt": data.diversity, "seconds": data.seconds,
        }  # fmt: skip
        bar.set_postfix(tau=tau, reward=f"{line['reward_mean']:.4f}", kept=len(kept))
        if rank == 0:
            runs.append_metrics(folder, line)
            tensorboard(line)
            runs.save_checkpoint(folder, i + 1, lora, optimizer, normalise.history, bad)
        if (i + 1) % args.grid_every == 0 and i + 1 < args.rounds:
            _, images = evaluate(model, reward, train_prompts[:18], 1, args, None, rank, world)
            runs.save_grid(folder / f"grids/round{i + 1:04d}-train.png", images, 9, rank)
    bar.close()
    if rank == 0:
        runs.write_lora(folder, lora_state(model.unet))
    after = report("after")
    summary, rows = compare(before, after, args.reward)
    if rank == 0:
        runs.write_json(folder / "after.json", after)
        runs.write_card(folder, args, summary, train_prompts)
        runs.write_json(folder / "summary.json", summary)
    say("\nScores before and after, same noise:", *rows, sep="\n")
    say(f"Pictures before and after: {folder}/grids. Metrics: {folder}/metrics.jsonl.\nYour own "
        f'prompt: python eval.py --lora {folder} --prompt "a cat washing dishes"')
    return folder


if __name__ == "__main__":
    main(sys.argv[1:])
