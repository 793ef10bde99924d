"""The mathematics of B2-DiffuRL: schedule of tau, branches, pairs, rewards, losses.

    symbol       paper                              here
    tau          training interval [tau, 1], Eq. 3  `tau`
    r, r_hat     score and normalised score, D.1    `scores`, `r_hat`: (P, K)
    P, K         roots, of which each is "a branch"  leading axes
                 in Sec. 3.3, and its trajectories,
                 which are Table 6's 3 branches
    G+, G-       Eq. 5                              `select_pairs`
    p/p_old      ratio rho in Eq. 4 and 6           exp(log_p - log_p_old)
    theta_old    weights that sampled the round     `log_p_old`, stored while sampling

No files, no pipeline: torch, and sums over processes.

    Eq. 2 is maximised. Eq. 4 and 6 print its gradient with a minus: that of a loss, as here.
    Each loss returns one value per (trajectory, t). `train.py` takes the mean.
    Eq. 6 has a sum over t and over the pair. Here it is a mean over both (over t [official]).
    The factor changes what the clip of the gradient's norm does, and little else: AdamW
    divides it out.

Sources: [official] hu-zijing/B2-DiffuRL: run_process.sh 20-35 (tau, window, threshold),
run_select.py 62-90 (r_hat), 150-162 (best and worst), run_train.py 78 (mean over t),
327-342 (loss). [ddpo] kvablack/ddpo-pytorch: ddim_with_logprob.py 184-190 (mean over D),
stat_tracking.py 20-25 (minimum count). [D3PO], commits and the rest: docs/notes.md.

The clip range belongs to a log-probability averaged over D dimensions. For the same limit on
the sum it goes as 1 / D: 1e-4 [ddpo] at D = 16,384 is 1.6e-3 at 1,024, the tiny model's D,
which has 1e-3 [ours]. The authors' script has 0.1 [official]. That is almost never reached,
so that PPO turns into plain policy gradient.
"""

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn.functional import logsigmoid

from ddim_logprob import gaussian_kl, keyed_generator, log_prob
from lora import lora_off
from support.command import progress
from support.processes import all_sum, share


# -------------------------------------------------- backward progressive training


def tau_schedule(i, rounds, T=20, tau0=14):
    """tau of round i = 0, 1, ...: linear in i from tau0 (14 [official]) to T (App. D.1).

    [official] tau0 + floor(i * (T - tau0 + 1) / rounds): each tau lasts about equally
    long. A run of fewer than T - tau0 + 1 rounds would not reach T with it: such a run is
    spread from tau0 in its first round to T in its last [ours]; a run of one round
    stays at tau0. Rounds that are added later train all T steps.
    """
    assert 1 <= tau0 <= T and i >= 0, f"no tau for tau0 {tau0}, T {T}, round {i}"
    if i >= rounds:
        return T
    if rounds >= T - tau0 + 1:
        return tau0 + i * (T - tau0 + 1) // rounds
    return tau0 + (i * (T - tau0) // (rounds - 1) if rounds > 1 else 0)


class StepWeights:
    """The weight of each step in the loss; the mean over the trained steps is 1.

    uniform: 1 [paper]. rms: the inverse root mean square of grad log p_t of single
    trajectories, running over the rounds [ours]. With uniform weights the last two of 20
    steps have nearly all of the gradient's energy (its squared norm), though they decide
    little of the score: Table 5 has 8.2 % when branching at t = 2, 66.4 % at 20.
    """

    def __init__(self, kind, keep=0.8):
        self.kind = kind
        self.keep = keep
        self.square = {}  # t, as JSON's keys a string -> running mean of |grad log p_t|^2

    def measure(self, energy):
        """Take in |grad log p_t|^2 of the steps t = tau..1: (tau,), see `step_energy`."""
        for t, now in zip(range(len(energy), 0, -1), energy.tolist()):
            past = self.square.get(str(t), now)
            self.square[str(t)] = self.keep * past + (1 - self.keep) * now

    def __call__(self, tau):
        """Weights by t = 0..tau, (tau + 1,) float32; entry 0 is unused."""
        weights = torch.ones(tau)  # of the steps tau..1
        if self.kind == "rms":
            squares = [self.square.get(str(t), 0.0) for t in range(tau, 0, -1)]
            weights = torch.tensor(squares).rsqrt()
            # A step that was never measured. No update uses this weight: an update needs kept
            # trajectories, and a round with some measures its steps first
            weights = weights.where(weights.isfinite(), torch.ones(()))
        weights = weights / weights.mean()
        return torch.cat([weights, torch.zeros(1)]).flip(0)


# -------------------------------------------------- rewards and branches


class RewardNormaliser:
    """r_hat = (r - mean) / (std + 1e-8) per prompt, App. D.1.

    Mean and unbiased std are over all scores of the prompt in this round and the past
    `window` rounds (8 [official]). A prompt that has fewer than `min_count` scores (16 [ddpo],
    0 [official]) takes the mean and std of all of this round's scores, of all prompts. If
    the scores that it is compared with are one or all equal, there is no std: r_hat is 0, so
    the prompt gives no pair [ours].
    """

    def __init__(self, window=8, min_count=0):
        self.window = window
        self.min_count = min_count
        self.history = {}  # prompt -> [[round, [scores]], ...], oldest first
        # Scores of the last round that were compared within their own root only; there are none
        # if `min_count` is above K, as the 16 of train.py is, unless there is one root
        self.alone = 0

    def __call__(self, i, prompts, scores):
        """Scores (P, K) of round i, row p of prompts[p] -> r_hat (P, K), float32."""
        P, K = scores.shape
        assert len(prompts) == P, f"{len(prompts)} prompts for {P} roots"
        rows_of = defaultdict(list)
        for p, prompt in enumerate(prompts):
            rows_of[prompt].append(p)
        scores = scores.double()
        r_hat = torch.zeros_like(scores)
        self.alone = 0
        for prompt, rows in rows_of.items():
            past = self.history.get(prompt, [])
            past = [[j, old] for j, old in past if i - self.window <= j < i]
            self.history[prompt] = past + [[i, scores[rows].flatten().tolist()]]
            compared = torch.tensor([r for _, old in self.history[prompt] for r in old]).double()
            if len(compared) < self.min_count:
                compared = scores.flatten()
            if len(compared) == K:
                self.alone += K
            if len(compared) > 1 and compared.max() > compared.min():
                r_hat[rows] = (scores[rows] - compared.mean()) / (compared.std() + 1e-8)
        return r_hat.float()


def select_pairs(r_hat, threshold=0.5):
    """Eq. 5 with Table 6's threshold: the best and the worst branch of each root.

    r_hat: (P, K). The best is kept if r_hat > 0 and r_hat >= threshold, the worst if
    r_hat < 0 and r_hat < -threshold, independently of the other [official]: a root gives
    0, 1 or 2 trajectories, so not always a pair. A root whose branches score alike has no
    best: it gives none [ours]. Returns (M, 3) long, rows of (group, root, branch), a
    group's best before its worst; the group is the root here.
    """
    shape = tuple(r_hat.shape)
    assert len(shape) == 2 and shape[1] >= 2, f"need (P, K >= 2), got {shape}"
    best, worst = r_hat.max(1), r_hat.min(1)
    differ = best.values > worst.values
    keep_best = differ & (best.values > 0) & (best.values >= threshold)
    keep_worst = differ & (worst.values < 0) & (worst.values < -threshold)
    keep = torch.stack([keep_best, keep_worst], 1)  # (P, 2)
    branch = torch.stack([best.indices, worst.indices], 1)  # (P, 2)
    root = keep.nonzero()[:, 0]  # row by row, as branch[keep] is
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
    the round [ours], and the group is the prompt; `kept` is not read. prompts: P strings.
    Returns (M', 3) as `select_pairs`. A group of more than two is refused: it is no pair.
    """
    if r_hat.shape[1] == 1:  # without BS: a prompt's roots play the part of branches
        pairs = []
        for group, prompt in enumerate(dict.fromkeys(prompts)):
            roots = torch.tensor([p for p, other in enumerate(prompts) if other == prompt])
            if len(roots) > 1:
                chosen = select_pairs(r_hat[roots].view(1, -1), threshold)[:, 2]
                pairs += [[group, root, 0] for root in roots[chosen].tolist()]
        kept = torch.tensor(pairs, dtype=torch.long).view(-1, 3)
    _, group, count = kept[:, 0].unique(return_inverse=True, return_counts=True)
    assert not (count > 2).any(), "DPO takes pairs: a group has more than two trajectories"
    return kept[count[group] == 2]


def split_updates(kept, size, generator):
    """Cut an epoch's trajectories (M, 3) into updates of about `size` trajectories each.

    There are round(M / size) updates, but at least one and at most one per group, of about
    equally many groups: none is a small rest, and nothing is dropped [ours]. Groups are
    shuffled and stay whole, since DPO needs a best and its worst in one update. Returns a
    list of (m, 3) tensors, empty if nothing was kept.
    """
    if len(kept) == 0:
        return []
    groups = kept[:, 0].unique()
    groups = groups[torch.randperm(len(groups), generator=generator)]
    count = min(max(1, round(len(kept) / size)), len(groups))
    return [kept[torch.isin(kept[:, 0], part)] for part in groups.tensor_split(count)]


# -------------------------------------------------- a round's roots, and what they leave


@dataclass
class Roots:
    """A round's roots (Sec. 3.3). Every process knows all prompts and walks its own roots."""

    prompts: list  # of all P roots
    own: torch.Tensor  # (Q,) long, which of them are this process's
    own_prompts: list  # Q
    round_key: tuple  # (seed, round)

    def keys(self, *more):
        """A key of noise for each own root: (seed, round, root, *more)."""
        return [(*self.round_key, int(p), *more) for p in self.own]

    def branch_keys(self, K):
        """A list of K keys for each own root."""
        return [[(*key, k) for k in range(K)] for key in self.keys()]


def draw_roots(train_prompts, cfg, i, worker, workers):
    """Round i's P prompts, drawn with replacement [official], as `Roots`."""
    P = cfg.queries // cfg.branches
    generator = keyed_generator(cfg.seed, i, "prompts")
    drawn = torch.randint(len(train_prompts), (P,), generator=generator).tolist()
    prompts = [train_prompts[j] for j in drawn]
    groups = list(range(P))
    if cfg.algo == "dpo" and cfg.no_bs:  # a pair: two roots of a prompt, in one process
        groups = [train_prompts.index(prompt) for prompt in prompts]
    own = share(groups, worker, workers)
    return Roots(prompts, own, [prompts[p] for p in own], (cfg.seed, i))


class Batch(NamedTuple):
    """One step t of b trajectories: what a UNet call in training needs."""

    t: int
    x_t: torch.Tensor  # (b, C, h, w), on the policy's device, as the next two
    x_prev: torch.Tensor  # (b, C, h, w)
    log_p_old: torch.Tensor  # (b,)
    prompts: list
    root: torch.Tensor  # (b,), which trajectories of (P, K) these are
    branch: torch.Tensor  # (b,)


@dataclass
class Rollout:
    """The walks of this process's Q roots in a round; they lie on the CPU.

    A round of Stable Diffusion takes 0.4 GB by default, with the authors' 1,280 queries 1.8 GB:
    the GPU keeps it for the UNet's activations.
    """

    x: torch.Tensor  # (Q, K, tau + 1, C, h, w), states x_tau..x_0
    log_p_old: torch.Tensor  # (Q, K, tau), of the policy that sampled them
    prompts: list  # Q
    own: torch.Tensor  # (Q,) long, which of the round's P roots these are, ascending
    device: torch.device

    @property
    def tau(self):
        return self.x.shape[2] - 1

    def batches(self, update, size):
        """Cut what this process owns of `update` (m, 3) into calls of one step t each.

        The cut does not change the gradient, so `size` may be as large as memory allows.
        Batches are about equal, since a short UNet call costs more a row, and even, since
        DPO needs whole pairs: 10 trajectories in calls of 8 are 6 + 4, not 8 + 2. Steps go
        from tau to 1.
        """
        update = update[torch.isin(update[:, 1], self.own)]
        if len(update) == 0:
            return
        row = torch.searchsorted(self.own, update[:, 1].contiguous())  # in x: 0..Q - 1
        size = max(1, size - size % 2)
        count = math.ceil(len(update) / size)
        length = min(size, 2 * math.ceil(len(update) / count / 2))
        for t in progress(range(self.tau, 0, -1), "training"):
            step = self.tau - t  # x[:, :, step] is x_t, and x_{t-1} follows it
            for part in torch.arange(len(update)).split(length):
                q, k = row[part], update[part, 2]
                yield Batch(
                    t,
                    self.x[q, k, step].to(self.device),
                    self.x[q, k, step + 1].to(self.device),
                    self.log_p_old[q, k, step].to(self.device),
                    [self.prompts[j] for j in q],
                    update[part, 1],
                    k,
                )


def step_energy(policy, rollout, probe, size, lora, generator):
    """|grad log p_t|^2 of a single trajectory, by t = tau..1: (tau,), a mean over `probe` (m, 3).

    One backward pass a batch would give the square of a sum over trajectories. With
    random signs, drawn from the generator, the cross terms cancel on average, and what is
    left is the sum of the squares, up to a constant factor [ours]. A sign belongs to its
    (root, branch, step), so batches and processes do not change it.
    """
    lora = list(lora.values())
    tau, K = rollout.tau, rollout.x.shape[1]
    shape = (int(probe[:, 1].max()) + 1, K, tau)
    signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    total = [[torch.zeros_like(v) for v in lora] for _ in range(tau)]
    for batch in rollout.batches(probe, size):
        step = tau - batch.t
        mu, sigma = policy(batch.x_t, batch.t, batch.prompts)
        log_p = log_prob(batch.x_prev, mu, sigma)
        sign = signs[batch.root, batch.branch, step].to(log_p.device)
        # Times 2**10, since in fp16 the gradients of a mean over D would round to 0. It is
        # never divided out: only the steps' ratios count
        gradient = torch.autograd.grad(2.0**10 * (log_p * sign).sum(), lora)
        for sum_, v in zip(total[step], gradient):
            sum_ += v
    squares = []
    for gradient in total:
        whole = [all_sum(v, policy.device) for v in gradient]
        squares.append(torch.stack([v.square().sum() for v in whole]).sum())
    return torch.stack(squares).cpu() / len(probe)


@torch.no_grad()
def kl_to_base(policy, rollout, probe, size):
    """KL(p_theta || p_pre) of a step in nats, summed over D: mean over steps and `probe` (m, 3)."""
    D = math.prod(policy.latent_shape)
    sum_and_count = torch.zeros(2, dtype=torch.float64)
    for batch in rollout.batches(probe, size):
        mu, sigma = policy(batch.x_t, batch.t, batch.prompts)
        with lora_off(policy.unet):
            mu_ref, _ = policy(batch.x_t, batch.t, batch.prompts)
        kl = gaussian_kl(mu, mu_ref, sigma) * D  # it is a mean over D
        sum_and_count += torch.tensor([kl.sum().item(), len(kl)])
    kl, count = all_sum(sum_and_count, policy.device)
    return (kl / count).item()


# -------------------------------------------------- losses, one per (trajectory, t)


def ddpo_loss(log_p, log_p_old, r_hat, clip_range):
    """Eq. 4 and 6 with D.1's clipping: -min(rho r_hat, clip(rho, 1 - e, 1 + e) r_hat).

    log_p, log_p_old, r_hat: same shape. Where the clip is not active the gradient is
    -rho r_hat grad log p, as in Eq. 6 with its minus; where it is, 0.
    """
    rho = torch.exp(log_p - log_p_old)
    return -torch.min(rho * r_hat, rho.clamp(1 - clip_range, 1 + clip_range) * r_hat)


def pg_loss(log_p, log_p_old, r_hat):
    """Eq. 6 without clipping (App. D.1, "Compatibility with Policy Gradient")."""
    return -torch.exp(log_p - log_p_old) * r_hat


def dpok_loss(policy_loss, kl, beta=0.01, alpha=1.0):
    """Eq. 7 in DPOK's form: alpha * clipped loss + beta * KL(p || p_pre).

    policy_loss: `ddpo_loss`; kl: exact, `ddim_logprob.gaussian_kl`, averaged over D as
    log p is.
    """
    return alpha * policy_loss + beta * kl


def dpo_loss(log_p, log_ref, beta):
    """Eq. 8 in D3PO's form: -log sigma(h), h = beta (log(p+/ref+) - log(p-/ref-)).

    log_p, log_ref: (2b,), best and worst of b pairs in turn; the reference is the
    pre-trained model. With log p averaged over D, pass beta * D (D3PO: beta 0.1 on
    sums): otherwise sigma(-h) stays at 1/2 and DPO is a linear policy gradient. A pair counts
    as its two trajectories: the loss is (2b,), each value twice. Returns loss, h (b,).
    """
    best, worst = (log_p - log_ref).view(-1, 2).T
    h = beta * (best - worst)
    return -logsigmoid(h).repeat_interleave(2), h
