"""The mathematics of B2-DiffuRL: tau schedule, branches, pairs, normalised rewards, losses.

    symbol       paper                              here
    tau          training interval [tau, 1], Eq. 3  `tau`
    r, r_hat     score and normalised score, D.1    `scores`, `r_hat`: (P, K)
    P, K         branch roots, branches of a root   leading axes, never flattened in this file
    G+, G-       Eq. 5                              `select_pairs`
    p/p_old      ratio in Eq. 4 and 6               exp(log_p - log_p_old)
    theta_old    weights that sampled the round     `log_p_old`, stored while sampling

Pure torch: no files, no devices, no models. A loss here has a minus sign where Eq. 2 is maximised:
Eq. 4 and 6 are gradients of the LOSS. Each returns one value per (trajectory, t); the mean over t
and over the update's trajectories is taken in `train.py`. Eq. 6 has a sum over t: the mean is the
sum / tau [official], and AdamW does not see the factor (the gradient-norm clip does).

The clip range belongs to a log-probability averaged over D dimensions (trap 1 in the README): DDPO's
1e-4 [ddpo] is for D = 16,384; [official] 0.1 is almost never reached, so PPO turns into plain PG.
"""

import math
from collections import defaultdict

import torch
from torch.nn.functional import logsigmoid


# ---------------------------------------------------------------- backward progressive training


def tau_schedule(i, rounds, T=20, tau0=14):
    """tau of round i = 0..rounds-1: linear from tau0 to T (App. D.1; tau0 = 14 [official]).

    [official] tau0 + floor(i * (T - tau0 + 1) / rounds): each tau lasts equally long. A run of
    fewer than T - tau0 + 1 rounds would never reach T by it: such a run is spread from tau0 in
    its first round to T in its last [ours]; a run of one round stays at tau0.
    """
    assert 1 <= tau0 <= T and 0 <= i < rounds, f"need 1 <= tau0 <= T, 0 <= i < rounds; got {i}"
    if rounds >= T - tau0 + 1:
        return tau0 + i * (T - tau0 + 1) // rounds
    return tau0 + (i * (T - tau0) // (rounds - 1) if rounds > 1 else 0)


def training_interval(tau, T=20, direction="backward", skip_last=0):
    """The steps t = start..stop+1 that are trained, as (start, stop).

    backward: the last tau steps, (tau, 0) [paper, Eq. 3]. forward: the first tau steps from the
    noise, (T, T - tau), an ablation [ours, after TempFlow-GRPO's claim that early steps count].
    skip_last: the steps t <= skip_last are sampled but not trained [ours; the paper's is 0]. What
    is drawn in the last of them can't be seen (App. F.1), so it tells the reward nothing, and yet
    they have most of the gradient's variance: by Eq. 1 grad log p grows as 1 / sigma_t. How many
    more carry nothing depends on the model: `results/gradient_signal.py` measures it.
    """
    start, stop = {"backward": (tau, 0), "forward": (T, T - tau)}[direction]
    return start, max(stop, skip_last)


# ---------------------------------------------------------------- rewards and branches


class RewardNormaliser:
    """r_hat = (r - mean) / (std + 1e-8) per prompt, App. D.1.

    Mean and unbiased std are over all scores of the prompt in this round and the past `window`
    rounds (8 [official]). A prompt with one score in all has no std: its r_hat is 0, so it is not
    trained on [ours]; so has a prompt whose scores are all equal.
    """

    def __init__(self, window=8):
        self.window = window
        self.history = {}  # prompt -> [[round, [scores]], ...], oldest first

    def __call__(self, i, prompts, scores):
        """Scores (P, K) of round i, row p drawn with prompts[p] -> r_hat (P, K), float32."""
        assert scores.shape[0] == len(prompts), f"{len(prompts)} prompts for {scores.shape} scores"
        rows = defaultdict(list)
        for p, prompt in enumerate(prompts):
            rows[prompt].append(p)
        scores = scores.double()
        r_hat = torch.zeros_like(scores)
        for prompt, ps in rows.items():
            now = scores[ps]
            past = [e for e in self.history.get(prompt, []) if i - self.window <= e[0] < i]
            self.history[prompt] = past + [[i, now.flatten().tolist()]]
            seen = torch.tensor([r for _, rs in self.history[prompt] for r in rs]).double()
            if len(seen) > 1 and seen.max() > seen.min():
                r_hat[ps] = (now - seen.mean()) / (seen.std() + 1e-8)
        return r_hat.float()


def select_pairs(r_hat, threshold=0.5):
    """Eq. 5 with Table 6's threshold: the best and the worst branch of each root.

    r_hat: (P, K). The best is kept if r_hat > 0 and r_hat >= threshold, the worst if r_hat < 0
    and r_hat < -threshold, each on its own [official]: a root gives 0, 1 or 2 trajectories.
    Returns (M, 3) long, rows of (group, root, branch), a group's best before its worst; the group
    is the root here.
    """
    assert r_hat.dim() == 2 and r_hat.shape[1] >= 2, f"need (P, K >= 2), got {tuple(r_hat.shape)}"
    best, worst = r_hat.max(1), r_hat.min(1)
    keep_best = (best.values > 0) & (best.values >= threshold)
    keep_worst = (worst.values < 0) & (worst.values < -threshold)
    keep = torch.stack([keep_best, keep_worst], 1)  # (P, 2)
    branch = torch.stack([best.indices, worst.indices], 1)  # (P, 2)
    root = keep.nonzero()[:, 0]
    return torch.stack([root, root, branch[keep]], 1)


def select_all(r_hat):
    """Without BS: every trajectory, DDPO's way. r_hat (P, K) -> (P * K, 3) (group, root, branch).

    A trajectory is its own group.
    """
    every = torch.ones_like(r_hat, dtype=torch.bool).nonzero()  # (P * K, 2)
    return torch.cat([torch.arange(len(every))[:, None], every], 1)


def select_prompt_pairs(r_hat, prompts, threshold=0.5):
    """Without BS, for DPO: the best and worst trajectory of each prompt in the round [ours].

    r_hat: (P, 1); prompts: P strings. A group is a prompt. Returns (M, 3) as `select_pairs`.
    """
    kept = []
    for g, prompt in enumerate(dict.fromkeys(prompts)):
        roots = torch.tensor([p for p, other in enumerate(prompts) if other == prompt])
        if len(roots) > 1:
            for _, _, b in select_pairs(r_hat[roots].view(1, -1), threshold).tolist():
                kept.append([g, roots[b].item(), 0])
    return torch.tensor(kept, dtype=torch.long).view(-1, 3)


def complete_pairs(kept):
    """Only the groups that keep both their best and their worst: DPO needs pairs (Eq. 8)."""
    _, inverse, count = kept[:, 0].unique(return_inverse=True, return_counts=True)
    return kept[count[inverse] == 2]


def split_updates(kept, size, generator):
    """Cut the kept trajectories (M, 3) of one epoch into updates of about `size`, groups shuffled.

    A group's best and worst stay in one update: they share x_tau (trap 9). No update is a small
    rest, nothing is dropped (trap 6): M / size is rounded to whole updates and the groups are
    dealt evenly among them [ours]. Returns a list of (m, 3) tensors, empty if nothing was kept.
    """
    if len(kept) == 0:
        return []
    groups = kept[:, 0].unique()
    groups = groups[torch.randperm(len(groups), generator=generator)]
    count = min(max(1, round(len(kept) / size)), len(groups))
    return [kept[torch.isin(kept[:, 0], part)] for part in groups.tensor_split(count)]


def unet_rows(kept, tau):
    """The UNet calls that an update needs, without doubles (trap 9): 2 * tau - 1 for a pair.

    kept: (m, 3) of (group, root, branch). An item is a trajectory at one of its tau steps; a row
    is a UNet input. The best and worst of a root share x_tau, so at step 0 they share a row.
    Returns rows (R, 4) of (group, step, root, branch), sorted, so that a pair's rows at one step
    are neighbours; items (m * tau, 4), likewise; and the row of each item (m * tau,).
    """
    step = torch.arange(tau).repeat(len(kept), 1)  # (m, tau)
    group, root, branch = (column[:, None].expand_as(step) for column in kept.T)
    items = torch.stack([group, step, root, branch], -1).flatten(0, 1)
    items = items[_lexsort(items)]
    inputs = items.clone()
    inputs[items[:, 1] == 0, 3] = 0  # every branch of a root starts from the same x_tau
    rows, row = inputs.unique(dim=0, return_inverse=True)
    return rows, items, row


def _lexsort(table):
    """The order that sorts the rows of an integer table (n, c) by its first column, then so on."""
    order = torch.arange(len(table))
    for column in reversed(range(table.shape[1])):
        order = order[table[order, column].argsort(stable=True)]
    return order


def micro_batches(rows, size):
    """Cut rows (R, 4) into few slices (lo, hi) of at most `size`, no (group, step) cell in two.

    They are about equally long: a short UNet call costs more a row. The gradient does not depend
    on the cut (trap 10), but DPO needs a pair's two log p at once.
    """
    cell = [tuple(r) for r in rows[:, :2].tolist()]
    lo = 0
    while lo < len(cell):
        left = len(cell) - lo
        hi = lo + math.ceil(left / math.ceil(left / size))
        if hi < len(cell) and cell[hi] == cell[hi - 1] and hi - lo > 1:
            hi -= 1
        yield lo, hi
        lo = hi


# ---------------------------------------------------------------- losses, one per (trajectory, t)


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


def dpok_loss(log_p, log_p_old, r_hat, kl, clip_range, alpha=1.0, beta=0.01):
    """Eq. 7 [ours, from DPOK's definition]: alpha * clipped reward term + beta * KL(p || p_pre).

    kl: exact, `ddim_logprob.gaussian_kl`, averaged over D as log p is.
    """
    return alpha * ddpo_loss(log_p, log_p_old, r_hat, clip_range) + beta * kl


def dpo_loss(log_p_best, log_p_worst, log_ref_best, log_ref_worst, beta):
    """Eq. 8 [ours, D3PO's form]: -log sigma(h), h = beta (log p+/p_ref+ - log p-/p_ref-).

    The reference is the pre-trained model. With log p averaged over D, pass beta * D (D3PO: beta
    0.1 on sums), or sigma(-h) stays at 1/2 and DPO is a linear policy gradient. Returns loss, h.
    """
    h = beta * ((log_p_best - log_ref_best) - (log_p_worst - log_ref_worst))
    return -logsigmoid(h), h
