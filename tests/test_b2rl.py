"""BPT and BS: tau schedule, normalised rewards, pairs, updates, against numpy and brute force."""

import json
from collections import Counter

import numpy as np
import pytest
import torch

from b2rl import (
    RewardNormaliser, complete_pairs, micro_batches, select_all, select_pairs, select_prompt_pairs,
    split_updates, tau_schedule, training_interval, unet_rows,
)  # fmt: skip


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
    assert all(0 <= b - a for a, b in zip(taus, taus[1:]))
    assert all(isinstance(tau, int) for tau in taus)
    if rounds >= T - tau0 + 1:  # each tau lasts equally long, up to one round
        lasts = Counter(taus)
        assert sorted(lasts) == list(range(tau0, T + 1))
        assert max(lasts.values()) - min(lasts.values()) <= 1
    else:  # evenly spread
        steps = [b - a for a, b in zip(taus, taus[1:])] or [0]
        assert max(steps) - min(steps) <= 1


@pytest.mark.parametrize("i, rounds, tau0", [(5, 5, 14), (-1, 5, 14), (0, 5, 0), (0, 5, 21)])
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


def test_training_interval_without_the_last_steps():
    """skip_last steps at the clean end are not trained; an interval that ends earlier is as is."""
    assert training_interval(14, 20, "backward", 2) == (14, 2)
    assert training_interval(14, 20, "forward", 2) == (20, 6)
    assert training_interval(19, 20, "forward", 2) == (20, 2)


# ---------------------------------------------------------------- rewards


@pytest.mark.parametrize("window", [0, 3, 8])
def test_normaliser_against_numpy(window):
    """25 rounds of scores of few prompts, some absent for long, through JSON in between."""
    rng = np.random.default_rng(0)
    names = ["a", "b", "c", "d", "rare"]
    chances = [0.4, 0.3, 0.2, 0.08, 0.02]
    normalise, rounds, checked = RewardNormaliser(window), [], 0
    for i in range(25):
        prompts = rng.choice(names, size=4, p=chances).tolist()
        scores = rng.normal(0.3, 0.05, size=(4, 3)).astype(np.float32)
        rounds.append((prompts, scores))
        r_hat = normalise(i, prompts, torch.tensor(scores))
        assert r_hat.shape == (4, 3) and r_hat.dtype == torch.float32
        for p, prompt in enumerate(prompts):
            seen = np.concatenate([s[q] for past, s in rounds[max(0, i - window):]
                                   for q, other in enumerate(past) if other == prompt])
            seen = seen.astype(np.float64)
            want = (scores[p] - seen.mean()) / (seen.std(ddof=1) + 1e-8)
            np.testing.assert_allclose(r_hat[p].numpy(), want, rtol=1e-5, atol=1e-5)
            checked += 1
        if i % 4 == 0:  # as the checkpoint keeps it
            history = json.loads(json.dumps(normalise.history))
            normalise = RewardNormaliser(window)
            normalise.history = history
    assert checked == 100


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
    r_hat = normalise(0, ["once", "equal", "fine", "equal"],
                      torch.tensor([[0.3], [0.5], [1.0], [0.5]]))  # fmt: skip
    assert r_hat.eq(0).all()
    r_hat = normalise(1, ["fine", "equal"], torch.tensor([[2.0], [0.5]]))
    assert r_hat[0].item() == pytest.approx(0.5**0.5) and r_hat[1] == 0
    for n in range(2, 40):  # exactly 0, whatever the rounding of a mean
        assert RewardNormaliser()(0, ["a"], torch.full((1, n), 0.1 + n / 7)).eq(0).all()
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
    assert select_all(torch.zeros(2, 3)).tolist() == [
        [0, 0, 0], [1, 0, 1], [2, 0, 2], [3, 1, 0], [4, 1, 1], [5, 1, 2]]  # fmt: skip


@pytest.mark.parametrize("threshold", [0, 0.5])
def test_prompt_pairs_against_brute_force(threshold):
    for seed in range(30):
        g = torch.Generator().manual_seed(seed)
        r_hat = torch.randn(9, 1, generator=g)
        prompts = ["abcd"[j] for j in torch.randint(4, (9,), generator=g)]
        want = []
        for number, prompt in enumerate(dict.fromkeys(prompts)):
            mine = [(r_hat[p, 0].item(), p) for p in range(9) if prompts[p] == prompt]
            if len(mine) > 1:
                (low, worst), (high, best) = min(mine), max(mine)
                want += [[number, best, 0]] if high > 0 and high >= threshold else []
                want += [[number, worst, 0]] if low < 0 and low < -threshold else []
        got = select_prompt_pairs(r_hat, prompts, threshold)
        assert got.dtype == torch.long and got.shape[1] == 3
        assert got.tolist() == want
    assert select_prompt_pairs(torch.ones(2, 1), ["a", "b"]).shape == (0, 3)


def test_complete_pairs():
    kept = torch.tensor([[0, 0, 2], [1, 1, 0], [1, 1, 1], [4, 4, 1], [7, 7, 2], [7, 7, 0]])
    assert complete_pairs(kept).tolist() == [[1, 1, 0], [1, 1, 1], [7, 7, 2], [7, 7, 0]]
    assert complete_pairs(kept[:1]).shape == (0, 3)
    assert complete_pairs(kept[:0]).shape == (0, 3)


# ---------------------------------------------------------------- updates and rows


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


def check_rows(kept, tau):
    """Rows and items by their meaning: an item's row is the UNet input of its state."""
    rows, items, row = unet_rows(kept, tau)
    items_wanted = sorted((g, s, p, k) for g, p, k in kept.tolist() for s in range(tau))
    assert [tuple(i) for i in items.tolist()] == items_wanted
    inputs = {(g, s, p, k if s > 0 else 0) for g, s, p, k in items_wanted}
    assert [tuple(r) for r in rows.tolist()] == sorted(inputs)
    assert row.shape == (len(items),)
    for item, r in zip(items.tolist(), rows[row].tolist()):
        assert item[:3] == r[:3] and (item[3] == r[3] or item[1] == 0)
    return rows


@pytest.mark.parametrize("tau", [1, 2, 14])
def test_unet_rows(tau):
    """2 tau - 1 rows for a pair, tau for a single (trap 9)."""
    assert len(check_rows(torch.tensor([[3, 3, 2], [3, 3, 1]]), tau)) == 2 * tau - 1
    assert len(check_rows(torch.tensor([[3, 3, 2]]), tau)) == tau
    kept = torch.tensor([[5, 5, 2], [5, 5, 0], [1, 1, 1], [2, 2, 0], [2, 2, 3]])
    assert len(check_rows(kept, tau)) == 2 * (2 * tau - 1) + tau
    two_roots = torch.tensor([[0, 7, 0], [0, 4, 0]])  # DPO without branches: nothing is shared
    assert len(check_rows(two_roots, tau)) == 2 * tau
    check_rows(random_kept(0), tau)
    rows, items, row = unet_rows(kept[:0], tau)
    assert rows.shape == items.shape == (0, 4) and len(row) == 0


@pytest.mark.parametrize("size", [2, 3, 4, 7, 64, 1000])
def test_micro_batches_cover_all_rows_and_cut_no_cell(size):
    two_roots = torch.tensor([[0, 7, 0], [0, 4, 0]])
    for kept in (random_kept(0), two_roots, select_all(torch.ones(5, 2))):
        rows, _, _ = unet_rows(kept, 5)
        cuts = list(micro_batches(rows, size))
        assert [j for lo, hi in cuts for j in range(lo, hi)] == list(range(len(rows)))
        assert all(0 < hi - lo <= size for lo, hi in cuts)
        assert len(cuts) <= -(-len(rows) // max(1, size - 1)), "as few as memory allows"
        if size > 2:  # each may end one row early, so as not to cut a pair
            lengths = [hi - lo for lo, hi in cuts]
            assert max(lengths) - min(lengths) <= 2, "about equally long"
        for lo, _ in cuts[1:]:
            assert rows[lo - 1, :2].tolist() != rows[lo, :2].tolist(), "a pair at one step is cut"


def test_micro_batches_of_one_row_and_of_none():
    rows, _, _ = unet_rows(random_kept(0), 3)
    assert list(micro_batches(rows, 1)) == [(j, j + 1) for j in range(len(rows))]
    assert list(micro_batches(rows[:0], 4)) == []
