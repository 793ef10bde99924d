"""BPT, BS and the losses: against numpy, brute force, autograd and finite differences."""

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch

from b2rl import RewardNormaliser, RoundLog, StepWeights, ddpo_loss, dpo_loss, dpo_pairs
from b2rl import dpok_loss, micro_batches, pg_loss, select_all, select_pairs, split_updates
from b2rl import tau_schedule, training_interval

# ---------------------------------------------------------------- tau


def test_tau_official_values():
    """tau0 14, T 20, N 100: tau rises by 1 where i * 7 / 100 passes a whole number."""
    taus = [tau_schedule(i, 100) for i in range(100)]
    rises = [i for i in range(1, 100) if taus[i] != taus[i - 1]]
    assert rises == [15, 29, 43, 58, 72, 86]
    assert [taus[0], *(taus[i] for i in rises)] == [14, 15, 16, 17, 18, 19, 20]


@pytest.mark.parametrize("rounds", [1, 2, 3, 6, 7, 8, 18, 50, 100])
@pytest.mark.parametrize("T, tau0", [(20, 14), (20, 1), (20, 20), (6, 4), (1, 1)])
def test_tau_ends_and_monotone(T, tau0, rounds):
    taus = [tau_schedule(i, rounds, T, tau0) for i in range(rounds)]
    assert taus[0] == tau0
    assert taus[-1] == (T if rounds > 1 else tau0), "a short run reaches T too"
    assert all(a <= b for a, b in zip(taus, taus[1:]))
    assert all(isinstance(tau, int) for tau in taus)
    if rounds >= T - tau0 + 1:  # each tau lasts equally long, up to one round
        lasts = Counter(taus)
        assert sorted(lasts) == list(range(tau0, T + 1))
        assert max(lasts.values()) - min(lasts.values()) <= 1
    else:  # evenly spread
        steps = [b - a for a, b in zip(taus, taus[1:])] or [0]
        assert max(steps) - min(steps) <= 1
    assert [tau_schedule(i, rounds, T, tau0) for i in (rounds, rounds + 1, 3 * rounds)] == [T] * 3


@pytest.mark.parametrize("i, rounds, tau0", [(-1, 5, 14), (0, 5, 0), (0, 5, 21)])
def test_tau_refuses(i, rounds, tau0):
    with pytest.raises(AssertionError):
        tau_schedule(i, rounds, 20, tau0)


def test_training_interval():
    """Backward: the last tau steps, x_tau -> x_0. Forward: the first tau, x_T -> x_{T - tau}."""
    assert training_interval(14) == (14, 0)
    assert training_interval(14, 20, "forward") == (20, 6)
    for tau in (1, 5, 20):
        for direction in ("backward", "forward"):
            start, stop = training_interval(tau, 20, direction)
            assert start - stop == tau and 0 <= stop < start <= 20


# ---------------------------------------------------------------- weights of the steps


def test_step_weights_of_the_schedule():
    """The inverse of each step's factor, from x_start on; their mean is 1."""
    factor = torch.tensor([9.0, 1.0, 4.0, 2.0, 0.5])
    assert StepWeights("uniform", factor)(4, 1).tolist() == [1, 1, 1]
    weights = StepWeights("schedule", factor)
    assert weights(4, 1).tolist() == pytest.approx([2 * 12 / 11, 0.5 * 12 / 11, 0.25 * 12 / 11])
    assert weights(2, 0).tolist() == pytest.approx([0.4, 1.6])
    assert weights(4, 1).dtype == torch.float32


def test_step_weights_by_the_root_mean_square():
    """A running mean of the squares, a fifth the newest; through JSON, as the checkpoint does."""
    weights = StepWeights("rms", torch.ones(5))
    assert weights(3, 1).tolist() == [1, 1], "nothing is measured yet"
    weights.measure(3, torch.tensor([4.0, 16.0]))
    assert weights.square == {"3": 4.0, "2": 16.0}
    assert weights(3, 1).tolist() == pytest.approx([4 / 3, 2 / 3])
    resumed = StepWeights("rms", torch.ones(5))
    resumed.square = json.loads(json.dumps(weights.square))
    resumed.measure(4, torch.tensor([25.0, 9.0, 16.0]))
    assert resumed.square == pytest.approx({"4": 25.0, "3": 5.0, "2": 16.0})
    want = torch.tensor([25.0, 5.0, 16.0]).rsqrt()
    torch.testing.assert_close(resumed(4, 1), want / want.mean())


# ---------------------------------------------------------------- rewards


def past_scores(rounds, i, window, prompt):
    """All scores of a prompt in round i and the `window` rounds before it."""
    seen = [
        scores[p]
        for prompts, scores in rounds[max(0, i - window) : i + 1]
        for p, other in enumerate(prompts)
        if other == prompt
    ]
    return np.concatenate(seen).astype(np.float64)


@pytest.mark.parametrize("window, min_count", [(0, 0), (3, 0), (8, 0), (3, 16)])
def test_normaliser_against_numpy(window, min_count):
    """25 rounds of scores of few prompts, some absent for long, through JSON in between."""
    rng = np.random.default_rng(0)
    names, chances = ["a", "b", "c", "d", "rare"], [0.4, 0.3, 0.2, 0.08, 0.02]
    normalise, rounds, few = RewardNormaliser(window, min_count), [], 0
    for i in range(25):
        prompts = rng.choice(names, size=4, p=chances).tolist()
        scores = rng.normal(0.3, 0.05, size=(4, 3)).astype(np.float32)
        rounds.append((prompts, scores))
        r_hat = normalise(i, prompts, torch.tensor(scores))
        assert r_hat.shape == (4, 3) and r_hat.dtype == torch.float32
        for p, prompt in enumerate(prompts):
            seen = past_scores(rounds, i, window, prompt)
            if len(seen) < min_count:  # the whole round's mean and std, and no past
                seen, few = scores.astype(np.float64), few + 1
            want = (scores[p] - seen.mean()) / (seen.std(ddof=1) + 1e-8)
            np.testing.assert_allclose(r_hat[p].numpy(), want, rtol=1e-5, atol=1e-5)
        if i % 4 == 0:  # as the checkpoint keeps it
            history = json.loads(json.dumps(normalise.history))
            normalise = RewardNormaliser(window, min_count)
            normalise.history = history
    assert 0 < few < 100 if min_count else few == 0


def test_normaliser_at_the_minimum_count():
    """A prompt with exactly min_count scores counts itself; one score less, the round."""
    scores = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]])
    own = RewardNormaliser(min_count=3)(0, ["a", "b"], scores)
    assert own[0].tolist() == pytest.approx([-2 / 7**0.5, -1 / 7**0.5, 3 / 7**0.5])
    common = RewardNormaliser(min_count=4)(0, ["a", "b"], scores)
    assert common[0].tolist() == pytest.approx([-1 / 5.2**0.5, 0, 4 / 5.2**0.5])


def test_normaliser_tells_which_scores_are_alone():
    """A prompt's only score is lone, also if the minimum count lends it the round's statistics."""
    for min_count in (0, 16):
        normalise = RewardNormaliser(window=1, min_count=min_count)
        r_hat = normalise(0, ["a", "b", "b", "c"], torch.tensor([[1.0], [2.0], [3.0], [7.0]]))
        assert normalise.lone == 2
        assert r_hat[[0, 3]].eq(0).all() == (min_count == 0)
        normalise(1, ["a", "d"], torch.tensor([[1.0], [2.0]]))
        assert normalise.lone == 1, "a was seen the round before"
        normalise(3, ["a", "a"], torch.tensor([[1.0], [2.0]]))
        assert normalise.lone == 0
        normalise(9, ["a"], torch.tensor([[1.0]]))
        assert normalise.lone == 1, "what left the window does not count"


def test_normaliser_keeps_no_more_than_its_window():
    normalise = RewardNormaliser(2)
    for i in range(10):
        normalise(i, ["a"], torch.rand(1, 2))
    assert [e[0] for e in normalise.history["a"]] == [7, 8, 9]


def test_normaliser_counts_a_round_once():
    """A round that is done again, after a stop, does not see its own first try."""
    once, twice = RewardNormaliser(), RewardNormaliser()
    for i, normalise in ((0, once), (0, twice), (1, twice)):
        normalise(i, ["a"], torch.tensor([[0.1 + i, 0.7]]))
    scores = torch.tensor([[0.4, 0.2]])
    assert torch.equal(once(1, ["a"], scores), twice(1, ["a"], scores))


def test_normaliser_without_spread():
    """One score in all, or equal scores: 0, not NaN; and only for the prompt that it concerns."""
    normalise = RewardNormaliser()
    scores = torch.tensor([[0.3], [0.5], [1.0], [0.5]])
    assert normalise(0, ["once", "equal", "fine", "equal"], scores).eq(0).all()
    r_hat = normalise(1, ["fine", "equal"], torch.tensor([[2.0], [0.5]]))
    assert r_hat[0].item() == pytest.approx(0.5**0.5) and r_hat[1] == 0
    for n in range(2, 40):  # exactly 0, whatever the rounding of a mean
        assert RewardNormaliser()(0, ["a"], torch.full((1, n), 0.1 + n / 7)).eq(0).all()
    assert RewardNormaliser(min_count=9)(0, ["a", "b"], torch.full((2, 2), 0.7)).eq(0).all()
    with pytest.raises(AssertionError, match="prompts for"):
        normalise(2, ["a", "b"], torch.zeros(3, 2))


# ---------------------------------------------------------------- selection


def rounded_scores(P, K, seed):
    """Scores on a grid of 0.25, so that thresholds and other branches are hit exactly."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(P, K, generator=g) * 4).round() / 4


@pytest.mark.parametrize("threshold", [0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("K", [2, 3, 5])
def test_pairs_against_brute_force(K, threshold):
    """Eq. 5, root by root; the best at >= threshold, the worst at < -threshold."""
    for seed in range(20):
        r_hat = rounded_scores(6, K, seed)
        want = []
        for p, row in enumerate(r_hat.tolist()):
            if max(row) > 0 and max(row) >= threshold:
                want.append([p, p, max(row)])
            if min(row) < 0 and min(row) < -threshold:
                want.append([p, p, min(row)])
        kept = select_pairs(r_hat, threshold)
        assert kept.dtype == torch.long and kept.shape == (len(want), 3)
        assert [[g, p, r_hat[p, k].item()] for g, p, k in kept.tolist()] == want


def test_pairs_by_hand():
    r_hat = torch.tensor([[0.5, -0.5, 0.1], [0.1, -0.6, 0.3], [0.9, 0.7, 1.2], [0.2, 2.0, -2.0]])
    assert select_pairs(r_hat).tolist() == [[0, 0, 0], [1, 1, 1], [2, 2, 2], [3, 3, 1], [3, 3, 2]]
    assert select_pairs(torch.zeros(4, 2), 0).shape == (0, 3), "r_hat 0 teaches nothing"
    assert select_pairs(torch.full((1, 3), 0.7)).shape == (1, 3), "equal branches: never twice"
    with pytest.raises(AssertionError, match="K >= 2"):
        select_pairs(torch.zeros(4, 1))


def test_select_all():
    want = [[0, 0, 0], [1, 0, 1], [2, 0, 2], [3, 1, 0], [4, 1, 1], [5, 1, 2]]
    assert select_all(torch.zeros(2, 3)).tolist() == want


def test_dpo_pairs_are_the_whole_pairs_of_branches():
    """A group of one is left out; the best stays before the worst."""
    r_hat, names = torch.zeros(8, 3), ["a"] * 8
    kept = torch.tensor([[0, 0, 2], [1, 1, 0], [1, 1, 1], [4, 4, 1], [7, 7, 2], [7, 7, 0]])
    want = [[1, 1, 0], [1, 1, 1], [7, 7, 2], [7, 7, 0]]
    assert dpo_pairs(kept, r_hat, names).tolist() == want
    for none in (kept[:1], kept[:0]):
        assert dpo_pairs(none, r_hat, names).shape == (0, 3)


@pytest.mark.parametrize("threshold", [0, 0.5])
def test_dpo_pairs_without_branches_against_brute_force(threshold):
    """The best and the worst root of a prompt, if both pass; the group is the prompt."""
    pairs = 0
    for seed in range(30):
        g = torch.Generator().manual_seed(seed)
        r_hat = torch.randn(9, 1, generator=g)
        prompts = ["abcd"[j] for j in torch.randint(4, (9,), generator=g)]
        want = []
        for number, prompt in enumerate(dict.fromkeys(prompts)):
            of_prompt = [(r_hat[p, 0].item(), p) for p in range(9) if prompts[p] == prompt]
            (low, worst), (high, best) = min(of_prompt), max(of_prompt)
            if high > 0 and high >= threshold and low < -threshold:
                want += [[number, best, 0], [number, worst, 0]]
        got = dpo_pairs(select_all(r_hat), r_hat, prompts, threshold)
        assert got.dtype == torch.long and got.shape[1] == 3
        assert got.tolist() == want
        pairs += len(want)
    assert pairs > 30
    alone = torch.ones(2, 1)
    assert dpo_pairs(select_all(alone), alone, ["a", "b"]).shape == (0, 3)


# ---------------------------------------------------------------- updates and micro-batches


def random_kept(seed, P=40, K=4):
    g = torch.Generator().manual_seed(seed)
    return select_pairs(torch.randn(P, K, generator=g), 0.9)


@pytest.mark.parametrize("size", [1, 2, 5, 8, 16, 32, 500])
def test_updates_partition_the_kept_trajectories(size):
    """Nothing dropped, nothing twice, no group in two updates, no small rest, order shuffled."""
    for seed in range(5):
        kept = random_kept(seed)
        updates = split_updates(kept, size, torch.Generator().manual_seed(seed))
        rows = [tuple(r) for u in updates for r in u.tolist()]
        assert sorted(rows) == sorted(tuple(r) for r in kept.tolist())
        groups = [set(u[:, 0].tolist()) for u in updates]
        assert sum(map(len, groups)) == len(set.union(*groups)), "a group's two stay together"
        counts = [len(g) for g in groups]
        assert max(counts) - min(counts) <= 1
        ideal = len(kept) / size
        assert len(updates) == min(max(1, round(ideal)), len(set.union(*groups)))
        if 4 <= size <= len(kept) / 2:
            assert all(size / 2 <= len(u) <= 2 * size for u in updates), [len(u) for u in updates]


def test_updates_are_shuffled_by_their_generator():
    kept = random_kept(0)
    one, same, other = (split_updates(kept, 8, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one, same))
    assert any(a.tolist() != b.tolist() for a, b in zip(one, other))
    assert split_updates(kept[:0], 8, torch.Generator()) == []


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 64, 1000])
def test_micro_batches_cover_each_trajectory_and_step_once(size):
    """Calls of one step, as few as memory allows, about equal; two rows a pair, never apart."""
    pairs = torch.tensor([[0, 7, 2], [0, 7, 0], [3, 2, 1], [3, 2, 0], [5, 5, 1], [5, 5, 2]])
    two_roots = torch.tensor([[0, 7, 0], [0, 4, 0], [1, 2, 0], [1, 9, 0]])  # DPO without branches
    for update in (random_kept(0), pairs, two_roots, select_all(torch.ones(5, 2))):
        own = update[:, 1].unique()
        calls, rows = list(micro_batches(update, own, 5, size)), []
        for p, k, s in calls:
            assert len(p) == len(k) <= size and 0 <= s < 5
            rows += [(root, branch, s) for root, branch in zip(own[p].tolist(), k.tolist())]
        want = [(p, k, s) for s in range(5) for _, p, k in update.tolist()]
        assert rows == want, "step by step from x_start on, in the order of the update"
        even = max(1, size - size % 2)
        assert len(calls) == 5 * -(-len(update) // even), "as few as memory allows"
        lengths = [len(p) for p, _, s in calls if s == 0]
        assert len(set(lengths[:-1])) <= 1 and lengths[-1] <= lengths[0], "about equally long"
        if size > 1 and len(update) % 2 == 0:
            assert all(length % 2 == 0 for length in lengths), "no pair is cut"


def test_micro_batches_are_about_equally_long():
    """24 rows in calls of at most 20: 12 and 12, since a short UNet call costs more a row."""
    update, own = select_all(torch.ones(24, 1)), torch.arange(24)
    assert [len(p) for p, _, _ in micro_batches(update, own, 1, 20)] == [12, 12]
    assert [len(p) for p, _, _ in micro_batches(update, own, 1, 24)] == [24]


def test_micro_batches_of_a_process_that_owns_some_roots():
    """Positions are those among its own roots; the rest belongs to other processes."""
    update = torch.tensor([[6, 6, 2], [6, 6, 0], [1, 1, 1], [3, 3, 0], [3, 3, 2]])
    own = torch.tensor([0, 3, 6, 9])
    ((p, k, s),) = micro_batches(update, own, 1, 8)
    assert p.tolist() == [2, 2, 1, 1] and k.tolist() == [2, 0, 0, 2] and s == 0
    for none in (torch.tensor([0, 2]), torch.zeros(0, dtype=torch.long)):
        assert list(micro_batches(update, none, 3, 8)) == []
    assert list(micro_batches(update[:0], own, 3, 8)) == []


# ---------------------------------------------------------------- losses


E = 0.1  # clip range, large so that finite differences stay on one side of the clip
LOG_P_OLD = -1.3
RATIOS = (0.5, 0.89, 0.91, 1.0, 1.09, 1.11, 2.0)
CASES = [(rho, r) for rho in RATIOS for r in (-3.0, -0.4, 0.7, 5.0)]


def tensors(rho):
    log_p = torch.tensor([LOG_P_OLD + math.log(rho)], dtype=torch.float64, requires_grad=True)
    return log_p, torch.full_like(log_p, LOG_P_OLD).detach()


def check_gradient(function, log_p, want):
    """autograd = the formula = central differences."""
    (got,) = torch.autograd.grad(function(log_p).sum(), log_p)
    h = 1e-6
    with torch.no_grad():
        slope = (function(log_p + h) - function(log_p - h)) / (2 * h)
    assert got.item() == pytest.approx(want, abs=1e-9)
    assert slope.item() == pytest.approx(want, abs=1e-6)


def clipped(rho, r):
    """PPO in words: a good sample's ratio earns nothing above 1 + e, a bad one's none below 1 - e.

    Returns loss and its derivative with respect to log p.
    """
    saturated = rho > 1 + E if r > 0 else rho < 1 - E
    bound = 1 + E if r > 0 else 1 - E
    return (-bound * r, 0.0) if saturated else (-rho * r, -rho * r)


@pytest.mark.parametrize("rho, r", CASES)
def test_ddpo(rho, r):
    """Both signs of r_hat, both sides of the clip and inside it."""
    log_p, log_p_old = tensors(rho)
    r_hat = torch.tensor([r], dtype=torch.float64)
    value, slope = clipped(rho, r)
    assert ddpo_loss(log_p, log_p_old, r_hat, E).item() == pytest.approx(value)
    check_gradient(lambda p: ddpo_loss(p, log_p_old, r_hat, E), log_p, slope)


@pytest.mark.parametrize("rho, r", CASES)
def test_pg_is_not_clipped(rho, r):
    log_p, log_p_old = tensors(rho)
    r_hat = torch.tensor([r], dtype=torch.float64)
    assert pg_loss(log_p, log_p_old, r_hat).item() == pytest.approx(-rho * r)
    check_gradient(lambda p: pg_loss(p, log_p_old, r_hat), log_p, -rho * r)


@pytest.mark.parametrize("loss", [pg_loss, lambda p, old, r: ddpo_loss(p, old, r, 1e-4)])
def test_gradient_at_ratio_one_is_the_policy_gradient(loss):
    """Eq. 6 at theta = theta_old: -r_hat grad log p; descent raises a good sample's log p."""
    log_p = torch.randn(6, requires_grad=True)
    r_hat = torch.randn(6)
    loss(log_p, log_p.detach(), r_hat).sum().backward()
    torch.testing.assert_close(log_p.grad, -r_hat)


@pytest.mark.parametrize("rho, r", CASES[::3])
def test_dpok(rho, r):
    """Eq. 7: alpha x clipped reward term + beta x KL, KL = (log p)^2 here as a stand-in."""
    log_p, log_p_old = tensors(rho)
    r_hat = torch.tensor([r], dtype=torch.float64)
    value, slope = clipped(rho, r)

    def loss(p, alpha=2.0, beta=0.3):
        return dpok_loss(p, log_p_old, r_hat, p**2, E, alpha=alpha, beta=beta)

    p = log_p.item()
    assert loss(log_p).item() == pytest.approx(2 * value + 0.3 * p**2)
    check_gradient(loss, log_p, 2 * slope + 0.3 * 2 * p)
    assert loss(log_p, 1.0, 0.0).item() == ddpo_loss(log_p, log_p_old, r_hat, E).item()
    plain = dpok_loss(log_p, log_p_old, r_hat, log_p**2, E)  # its defaults: alpha 1, beta 0.01
    assert plain.item() == pytest.approx(value + 0.01 * p**2)


@pytest.mark.parametrize("beta", [0.1, 25.6])
def test_dpo_value_and_gradient_weight(beta):
    """Eq. 8: log(1 + e^-h), twice a pair; its slope is 2 beta sigma(-h), negative for the best."""
    g = torch.Generator().manual_seed(0)
    log_p, log_ref = torch.randn(2, 16, generator=g, dtype=torch.float64) / 10
    log_p.requires_grad_()
    loss, h = dpo_loss(log_p, log_ref, beta)
    now, ref = log_p.tolist(), log_ref.tolist()
    pairs = range(0, 16, 2)  # the best, then the worst
    ratios = [beta * ((now[j] - ref[j]) - (now[j + 1] - ref[j + 1])) for j in pairs]
    assert h.tolist() == pytest.approx(ratios)
    want = [math.log1p(math.exp(-x)) for x in ratios for _ in range(2)]
    assert loss.shape == (16,) and loss.tolist() == pytest.approx(want)
    loss.sum().backward()
    weight = [2 * beta / (1 + math.exp(x)) for x in ratios]
    assert log_p.grad[0::2].tolist() == pytest.approx([-w for w in weight])
    assert log_p.grad[1::2].tolist() == pytest.approx(weight)


def test_dpo_limits():
    """An identical pair gives log 2; a policy that is the reference too; a sure pair gives 0."""
    p, ref = torch.randn(5).repeat_interleave(2), torch.randn(5).repeat_interleave(2)
    torch.testing.assert_close(dpo_loss(p, ref, 3.0)[0], torch.full((10,), math.log(2)))
    q = torch.randn(10)
    torch.testing.assert_close(dpo_loss(q, q, 3.0)[0], torch.full((10,), math.log(2)))
    assert torch.equal(dpo_loss(q, p, 0.0)[1].abs(), torch.zeros(5))
    sure = dpo_loss(torch.tensor([9.0, -9.0]), torch.zeros(2), 9.0)
    assert sure[0].tolist() == pytest.approx([0, 0], abs=1e-6)
    lost = dpo_loss(torch.tensor([-50.0, 50.0]), torch.zeros(2), 9)
    assert lost[0].tolist() == pytest.approx([900.0, 900.0])  # no overflow


# ---------------------------------------------------------------- the log of a round


def log_of(updates, h=None):
    """A RoundLog of updates, each a list of micro-batches of log ratios, and their norms."""
    log, in_a_row = RoundLog(), 0
    for batches, norm in updates:
        for ratios in batches:
            old = torch.full((len(ratios),), -1.5)
            loss = torch.tensor(0.25, requires_grad=True)
            log.add((old + torch.tensor(ratios)).requires_grad_(), old, loss, h)
        in_a_row = log.end_update(torch.tensor(norm), len(batches) * 2, in_a_row)
    return log, in_a_row


def identity(values):
    return values


def test_round_log_by_hand():
    """Of the first update mean ratio and largest log ratio; of all clip fraction, loss, norm, h."""
    first, second = [[0.0, 0.0], [0.0, 0.5]], [[0.1, -0.3], [0.05, -0.75]]
    log, in_a_row = log_of([(first, 3.0), (second, 5.0)], torch.tensor([4.0, -2.0]))
    got = log.metrics(0.2, identity)
    assert in_a_row == 0
    assert (got["updates"], got["skipped_updates"]) == (2, 0)
    assert got["trajectories_per_update"] == [4, 4]
    assert got["first_ratio"] == pytest.approx((3 + math.exp(0.5)) / 4)
    assert got["first_max_log_ratio"] == pytest.approx(0.5)
    outside = [abs(math.exp(v) - 1) > 0.2 for v in (0, 0, 0, 0.5, 0.1, -0.3, 0.05, -0.75)]
    assert got["clip_fraction"] == sum(outside) / 8 == 3 / 8
    assert got["mean_abs_h"] == 3.0
    assert got["loss"] == pytest.approx(4 * 0.25 / 2), "the mean over updates of their sums"
    assert got["grad_norm"] == 4.0
    assert json.loads(json.dumps(got)) == got


@pytest.mark.parametrize("by", [0.5, -0.25])
def test_the_largest_log_ratio_has_no_sign(by):
    log, _ = log_of([([[0.0, by, 0.1]], 1.0), ([[9.0]], 1.0)])
    assert log.metrics(0.1, identity)["first_max_log_ratio"] == pytest.approx(abs(by))


def test_round_log_counts_what_is_skipped_in_a_row():
    batches = [[0.0]]
    log, in_a_row = log_of([(batches, v) for v in (1.0, math.nan, math.inf)])
    assert in_a_row == 2
    assert log.end_update(torch.tensor(math.nan), 1, in_a_row) == 3, "also those of earlier rounds"
    assert log.end_update(torch.tensor(2.0), 1, 3) == 0
    got = log.metrics(0.1, identity)
    assert (got["updates"], got["skipped_updates"]) == (2, 3)
    assert math.isnan(got["grad_norm"])


def test_round_log_without_updates():
    want = {"updates": 0, "skipped_updates": 0, "trajectories_per_update": []}
    assert RoundLog().metrics(0.1, identity) == want


def test_round_log_of_a_process_without_a_share():
    """One that owned nothing of the first update does not take the second one's ratios for it."""
    log, _ = log_of([([], 1.0), ([[0.7]], 1.0)])
    asked = []

    def gather(values):  # the other process had these
        asked.append(len(values))
        return torch.cat([values, torch.zeros(2)])

    got = log.metrics(0.1, gather)
    assert asked == [0, 1, 0, 1] and got["first_max_log_ratio"] == 0.0
    assert got["clip_fraction"] == pytest.approx(1 / 3) and got["mean_abs_h"] == 0.0
    alone, _ = log_of([([[0.0]], 1.0)])
    assert alone.metrics(0.1, identity)["mean_abs_h"] == 0.0, "no h but in DPO"
