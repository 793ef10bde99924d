"""The mathematics of B2-DiffuRL: schedule of tau, branches, pairs, rewards, losses.

    symbol       paper                              here
    tau          training interval [tau, 1], Eq. 3  `tau`
    r, r_hat     score and normalised score, D.1    `scores`, `r_hat`: (P, K)
    P, K         branch roots, branches of a root   leading axes
    G+, G-       Eq. 5                              `select_pairs`
    p/p_old      ratio rho in Eq. 4 and 6           exp(log_p - log_p_old)
    theta_old    weights that sampled the round     `log_p_old`, stored while sampling

Pure torch: no files, no devices, no models. A loss here has a minus sign where Eq. 2 is
maximised: Eq. 4 and 6 are gradients of the LOSS. Each returns one value per
(trajectory, t); the mean over t and over the update's trajectories is taken in
`train.py`. Eq. 6 has a sum over t: the mean is the sum / n [official], n the number of
trained steps, and AdamW does not see the factor (the gradient-norm clip does).

Sources: [official] hu-zijing/B2-DiffuRL: run_process.sh 20-35 (tau, window, threshold),
run_select.py 62-90 (r_hat), 150-162 (best and worst), run_train.py 78 (mean over t),
327-342 (loss). [ddpo] kvablack/ddpo-pytorch: ddim_with_logprob.py 184-190 (mean over D),
stat_tracking.py 20-25 (minimum count). Commits and the rest: docs/notes.md.

The clip range belongs to a log-probability averaged over D dimensions: DDPO's 1e-4
[ddpo] is for D = 16,384; [official] 0.1 is almost never reached, so that PPO turns into
plain policy gradient.
"""

import math
from collections import defaultdict

import torch
from torch.nn.functional import logsigmoid

# -------------------------------------------------- backward progressive training


def tau_schedule(i, rounds, T=20, tau0=14):
    """tau of round i = 0, 1, ...: linear from tau0 (14 [official]) to T (App. D.1).

    [official] tau0 + floor(i * (T - tau0 + 1) / rounds): each tau lasts equally long. A
    run of fewer than T - tau0 + 1 rounds would not reach T with it: such a run is
    spread from tau0 in its first round to T in its last [ours]; a run of one round
    stays at tau0. Rounds that are added later train all T steps.
    """
    assert 1 <= tau0 <= T and i >= 0, f"no tau for tau0 {tau0}, T {T}, round {i}"
    if i >= rounds:
        return T
    if rounds >= T - tau0 + 1:
        return tau0 + i * (T - tau0 + 1) // rounds
    return tau0 + (i * (T - tau0) // (rounds - 1) if rounds > 1 else 0)


def training_interval(tau, T=20, direction="backward"):
    """The steps t = start..stop+1 that are trained, as (start, stop).

    backward: the last tau steps, (tau, 0) [paper, Eq. 3]. forward: the first tau steps
    from the noise, (T, T - tau), an ablation [ours, after TempFlow-GRPO's claim that
    early steps count].
    """
    return {"backward": (tau, 0), "forward": (T, T - tau)}[direction]


class StepWeights:
    """The weight of each step in the loss; the mean over the trained steps is 1.

    uniform: 1 [paper]. schedule: the inverse of `ddim_logprob.step_factor` [ours]. rms:
    the inverse root mean square of grad log p_t of single trajectories, running over
    the rounds [ours]. With uniform weights the last two of 20 steps have nearly all of
    the gradient's energy (its squared norm), though nothing of the score is decided
    there.
    """

    def __init__(self, kind, factor, keep=0.8):
        self.kind, self.factor, self.keep = kind, factor, keep
        self.square = {}  # t -> running mean of |grad log p_t|^2

    def measure(self, start, energy):
        """Take in |grad log p_t|^2 of the steps t = start, start - 1, ...: (n,)."""
        for t, now in zip(range(start, start - len(energy), -1), energy.tolist()):
            past = self.square.get(str(t), now)  # JSON's keys are strings
            self.square[str(t)] = self.keep * past + (1 - self.keep) * now

    def __call__(self, start, stop):
        """Weights (n,) of the steps t = start..stop+1, in that order."""
        steps = range(start, stop, -1)
        if self.kind == "uniform":
            return torch.ones(len(steps))
        if self.kind == "schedule":
            weights = torch.stack([1 / self.factor[t] for t in steps])
        else:
            weights = torch.tensor([self.square.get(str(t), 0.0) for t in steps]).rsqrt()
        weights = weights.where(weights.isfinite(), torch.ones(()))
        return (weights / weights.mean()).float()


# -------------------------------------------------- rewards and branches


class RewardNormaliser:
    """r_hat = (r - mean) / (std + 1e-8) per prompt, App. D.1.

    Mean and unbiased std are over all scores of the prompt in this round and the past
    `window` rounds (8 [official]). A prompt with fewer than `min_count` scores (0
    [official], 16 [ddpo]) is normalised by the mean and std of the whole round. Where
    the scores that count are one or all equal, there is no std: r_hat is 0, so the
    prompt is not trained on [ours].
    """

    def __init__(self, window=8, min_count=0):
        self.window, self.min_count = window, min_count
        self.history = {}  # prompt -> [[round, [scores]], ...], oldest first
        self.lone = 0  # scores of the last round that were their prompt's only one

    def __call__(self, i, prompts, scores):
        """Scores (P, K) of round i, row p of prompts[p] -> r_hat (P, K), float32."""
        P = len(prompts)
        assert scores.shape[0] == P, f"{P} prompts for {scores.shape} scores"
        rows = defaultdict(list)
        for p, prompt in enumerate(prompts):
            rows[prompt].append(p)
        scores, self.lone = scores.double(), 0
        r_hat = torch.zeros_like(scores)
        for prompt, ps in rows.items():
            now = scores[ps]
            past = self.history.get(prompt, [])
            past = [entry for entry in past if i - self.window <= entry[0] < i]
            self.history[prompt] = past + [[i, now.flatten().tolist()]]
            seen = [r for _, rs in self.history[prompt] for r in rs]
            seen = torch.tensor(seen).double()
            self.lone += len(seen) == 1
            if len(seen) < self.min_count:
                seen = scores.flatten()
            if len(seen) > 1 and seen.max() > seen.min():
                r_hat[ps] = (now - seen.mean()) / (seen.std() + 1e-8)
        return r_hat.float()


def select_pairs(r_hat, threshold=0.5):
    """Eq. 5 with Table 6's threshold: the best and the worst branch of each root.

    r_hat: (P, K). The best is kept if r_hat > 0 and r_hat >= threshold, the worst if
    r_hat < 0 and r_hat < -threshold, independently of the other [official]: a root gives
    0, 1 or 2 trajectories. Returns (M, 3) long, rows of (group, root, branch), a group's
    best before its worst; the group is the root here.
    """
    shape = tuple(r_hat.shape)
    assert len(shape) == 2 and shape[1] >= 2, f"need (P, K >= 2), got {shape}"
    best, worst = r_hat.max(1), r_hat.min(1)
    keep_best = (best.values > 0) & (best.values >= threshold)
    keep_worst = (worst.values < 0) & (worst.values < -threshold)
    keep = torch.stack([keep_best, keep_worst], 1)  # (P, 2)
    branch = torch.stack([best.indices, worst.indices], 1)  # (P, 2)
    root = keep.nonzero()[:, 0]
    return torch.stack([root, root, branch[keep]], 1)


def select_all(r_hat):
    """Without BS: every trajectory, DDPO's way; rows (P * K, 3) as in `select_pairs`.

    A trajectory is its own group.
    """
    every = torch.ones_like(r_hat, dtype=torch.bool).nonzero()  # (P * K, 2)
    return torch.cat([torch.arange(len(every))[:, None], every], 1)


def dpo_pairs(kept, r_hat, prompts, threshold=0.5):
    """What DPO trains on (Eq. 8): the groups in which both best and worst are kept.

    Without BS, r_hat (P, 1), a pair is the best and the worst trajectory of a prompt in
    the round [ours], and the group is the prompt. prompts: P strings. Returns (M', 3)
    as `select_pairs`.
    """
    if r_hat.shape[1] == 1:
        kept = []
        for g, prompt in enumerate(dict.fromkeys(prompts)):
            roots = [p for p, other in enumerate(prompts) if other == prompt]
            roots = torch.tensor(roots)
            if len(roots) > 1:
                pair = select_pairs(r_hat[roots].view(1, -1), threshold)[:, 2]
                kept += [[g, root, 0] for root in roots[pair].tolist()]
        kept = torch.tensor(kept, dtype=torch.long).view(-1, 3)
    _, group, count = kept[:, 0].unique(return_inverse=True, return_counts=True)
    return kept[count[group] == 2]


def split_updates(kept, size, generator):
    """Cut an epoch's trajectories (M, 3) into updates of about `size`, groups shuffled.

    A group's best and worst stay in one update: DPO needs both. No update is a small
    rest, nothing is dropped: M / size is rounded to whole updates and the groups are
    dealt evenly among them [ours]. Returns a list of (m, 3) tensors, empty if nothing
    was kept.
    """
    if len(kept) == 0:
        return []
    groups = kept[:, 0].unique()
    groups = groups[torch.randperm(len(groups), generator=generator)]
    count = min(max(1, round(len(kept) / size)), len(groups))
    return [kept[torch.isin(kept[:, 0], part)] for part in groups.tensor_split(count)]


def micro_batches(update, own, steps, size):
    """Cut what this process owns of `update` into UNet calls of one step each.

    update: (m, 3) of (group, root, branch). own: (Q,) the process's roots, ascending.
    Yields p (b,) positions in `own`, k (b,) branches and the step s, from x_start on:
    0..steps - 1. The cut does not change the gradient, so `size` is as large as memory
    allows; the b <= size are about equal, since a short UNet call costs more a row, and
    even, since DPO needs whole pairs.
    """
    update = update[torch.isin(update[:, 1], own)]
    p, k = torch.searchsorted(own, update[:, 1].contiguous()), update[:, 2]
    size = max(1, size - size % 2)
    count = max(1, math.ceil(len(update) / size))
    length = min(size, 2 * math.ceil(len(update) / count / 2))
    for s in range(steps if len(update) else 0):
        for rows in torch.arange(len(update)).split(length):
            yield p[rows], k[rows], s


# -------------------------------------------------- losses, one per (trajectory, t)


def ddpo_loss(log_p, log_p_old, r_hat, clip_range):
    """Eq. 4 and 6 with D.1's clipping: -min(rho r_hat, clip(rho, 1 - e, 1 + e) r_hat).

    log_p, log_p_old, r_hat: same shape. Where the clip is not active the gradient is
    -rho r_hat grad log p, the summand of Eq. 6; where it is, 0.
    """
    rho = torch.exp(log_p - log_p_old)
    return -torch.min(rho * r_hat, rho.clamp(1 - clip_range, 1 + clip_range) * r_hat)


def pg_loss(log_p, log_p_old, r_hat):
    """Eq. 6 without clipping (App. D.1, "Compatibility with Policy Gradient")."""
    return -torch.exp(log_p - log_p_old) * r_hat


def dpok_loss(log_p, log_p_old, r_hat, kl, clip_range, beta=0.01, alpha=1.0):
    """Eq. 7 [ours, by DPOK's definition]: alpha * clipped loss + beta * KL(p || p_pre).

    kl: exact, `ddim_logprob.gaussian_kl`, averaged over D as log p is.
    """
    return alpha * ddpo_loss(log_p, log_p_old, r_hat, clip_range) + beta * kl


def dpo_loss(log_p, log_ref, beta):
    """Eq. 8 [ours, D3PO's form]: -log sigma(h), h = beta (log(p+/ref+) - log(p-/ref-)).

    log_p, log_ref: (2b,), best and worst of b pairs in turn; the reference is the
    pre-trained model. With log p averaged over D, pass beta * D (D3PO: beta 0.1 on
    sums), or sigma(-h) stays at 1/2 and DPO is a linear policy gradient. A pair counts
    as its two trajectories: the loss is (2b,), each value twice. Returns loss, h (b,).
    """
    best, worst = (log_p - log_ref).view(-1, 2).T
    h = beta * (best - worst)
    return -logsigmoid(h).repeat_interleave(2), h


# -------------------------------------------------- statistics of a round's updates


class RoundLog:
    """Ratios, losses, gradient norms and skipped updates of a round, for its metrics."""

    def __init__(self):
        self.log_ratio, self.h, self.loss = [], [], []  # a tensor a micro-batch
        self.norms, self.sizes, self.skipped, self.first = [], [], 0, 0

    def add(self, log_p, log_p_old, loss, h):
        """A micro-batch: log p now and then (b,), its share of the loss, DPO's h or None."""
        self.log_ratio.append((log_p.detach() - log_p_old).cpu())
        self.loss.append(loss.detach().view(1).cpu())
        self.h += [] if h is None else [h.detach().abs().cpu()]

    def end_update(self, norm, size, in_a_row):
        """An update of `size` trajectories whose gradient had this norm before clipping.

        One whose norm is not finite was skipped. Returns how many were, in a row up to
        here.
        """
        if not self.norms:  # a process may own nothing of the first update
            self.first = len(self.log_ratio)
        self.norms.append(norm.item())
        self.sizes.append(size)
        if norm.isfinite():
            return 0
        self.skipped += 1
        return in_a_row + 1

    def metrics(self, clip_range, gather):
        """The numbers of metrics.jsonl. `gather`: values (n,) -> those of all processes (N,)."""
        if not self.norms:
            return {"updates": 0, "skipped_updates": 0, "trajectories_per_update": []}
        whole = {}
        lists = {"first": self.log_ratio[: self.first], "all": self.log_ratio}
        for name, values in (lists | {"h": self.h, "loss": self.loss}).items():
            whole[name] = gather(torch.cat(values) if values else torch.zeros(0)).double()
        ratio = whole["all"].exp()
        return {
            "updates": len(self.norms) - self.skipped,
            "skipped_updates": self.skipped,
            "trajectories_per_update": self.sizes,
            "first_ratio": whole["first"].exp().mean().item(),  # must be 1 and about 0
            "first_max_log_ratio": whole["first"].abs().max().item(),
            "clip_fraction": (ratio - 1).abs().gt(clip_range).double().mean().item(),
            "mean_abs_h": whole["h"].mean().item() if len(whole["h"]) else 0.0,
            "loss": whole["loss"].sum().item() / len(self.norms),
            "grad_norm": sum(self.norms) / len(self.norms),
        }
