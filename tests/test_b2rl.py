"""BPT, BS, calls and losses: against numpy, brute force, autograd and finite differences."""

import json
import math
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_small, randomise_lora
from torch.distributions import Normal, kl_divergence

from b2rl import RewardNormaliser, Rollout, StepWeights, ddpo_loss, dpo_loss, dpo_pairs
from b2rl import dpok_loss, draw_roots, kl_to_base, pg_loss, select_all, select_pairs
from b2rl import split_updates, step_energy, tau_schedule
from lora import inject_lora

CPU = torch.device("cpu")

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


# ---------------------------------------------------------------- weights of the steps


def test_uniform_weights_are_one_whatever_was_measured():
    """By t: entry 0 belongs to no step."""
    weights = StepWeights("uniform")
    weights.measure(torch.tensor([1.0, 4.0, 9.0]))
    assert weights(3).tolist() == [0, 1, 1, 1] and weights(1).tolist() == [0, 1]
    assert weights(3).dtype == torch.float32


def test_rms_weights_by_t():
    """measure takes t = tau..1, the weights stand at t: 1 / rms, with mean 1 over t = 1..tau."""
    weights = StepWeights("rms")
    assert weights(2).tolist() == [0, 1, 1], "nothing is measured yet"
    weights.measure(torch.tensor([4.0, 16.0]))  # t = 2, t = 1
    assert weights.square == {"2": 4.0, "1": 16.0}
    assert weights(2).tolist() == pytest.approx([0, 2 / 3, 4 / 3])
    assert weights(1).tolist() == pytest.approx([0, 1])
    assert weights(2).dtype == torch.float32


def test_rms_weights_run_over_the_rounds():
    """A running mean of the squares, a fifth the newest; through JSON, as the checkpoint does."""
    weights = StepWeights("rms")
    weights.measure(torch.tensor([4.0, 16.0]))
    resumed = StepWeights("rms")
    resumed.square = json.loads(json.dumps(weights.square))
    resumed.measure(torch.tensor([25.0, 9.0, 1.0]))  # tau has grown to 3
    assert resumed.square == pytest.approx({"3": 25.0, "2": 5.0, "1": 13.0})
    want = torch.tensor([13.0, 5.0, 25.0]).rsqrt()
    torch.testing.assert_close(resumed(3), torch.cat([torch.zeros(1), want / want.mean()]))
    for tau in (1, 2, 3, 7):
        assert resumed(tau).shape == (tau + 1,) and resumed(tau)[0] == 0
        assert resumed(tau)[1:].mean().item() == pytest.approx(1, rel=1e-6)


def test_a_step_without_gradient_does_not_make_the_weights_infinite():
    weights = StepWeights("rms")
    weights.measure(torch.tensor([0.0, 4.0]))
    assert weights(2).tolist() == pytest.approx([0, 2 / 3, 4 / 3]), "it counts as 1"


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


@pytest.mark.parametrize("K", [1, 3])
def test_normaliser_counts_the_scores_that_met_their_own_root_only(K):
    """Scores, not roots; what left the window does not count, a second root of the prompt does."""
    normalise = RewardNormaliser(window=1)
    rounds = [(0, "abbc", 2), (1, "ad", 1), (3, "aa", 0), (9, "a", 1), (10, "a", 0)]
    for i, prompts, roots in rounds:
        normalise(i, list(prompts), torch.rand(len(prompts), K))
        assert normalise.alone == roots * K


def test_below_the_minimum_count_no_score_is_alone():
    """The round's statistics stand in; a prompt with enough scores in one root is alone."""
    scores = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]])
    for min_count, alone in ((0, 6), (3, 6), (4, 0), (16, 0)):
        normalise = RewardNormaliser(min_count=min_count)
        r_hat = normalise(0, ["a", "b"], scores)
        assert normalise.alone == alone
        assert abs(r_hat[1].mean()) < 1e-6 or min_count > 3


def test_equal_scores_below_the_minimum_count_get_the_rounds_statistics():
    """A prompt that always fails is below the round's mean, and is trained on as such."""
    scores = torch.tensor([[0.0, 0.0], [1.0, 3.0]])
    assert RewardNormaliser()(0, ["a", "b"], scores)[0].eq(0).all()
    r_hat = RewardNormaliser(min_count=16)(0, ["a", "b"], scores)
    std = np.std([0, 0, 1, 3], ddof=1)
    assert r_hat.flatten().tolist() == pytest.approx([-1 / std, -1 / std, 0, 2 / std])


def test_normaliser_of_scores_far_from_zero():
    """Float32's rounding of a mean near 4,096 would be as large as these scores' spread."""
    steps = torch.tensor([[0.0, 1.0, 5.0], [2.0, 2.0, 3.0]])
    r_hat = RewardNormaliser()(0, ["a", "a"], 4096 + steps / 2048)
    want = (steps - steps.mean()) / steps.std()
    torch.testing.assert_close(r_hat, want, rtol=1e-4, atol=1e-4)


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
    """Eq. 5, root by root; the best at >= threshold, the worst at < -threshold; unless all tie."""
    for seed in range(20):
        r_hat = rounded_scores(6, K, seed)
        want = []
        for p, row in enumerate(r_hat.tolist()):
            if max(row) == min(row):
                continue
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
    with pytest.raises(AssertionError, match="K >= 2"):
        select_pairs(torch.zeros(4, 1))


@pytest.mark.parametrize("r", [0.7, -0.7, 5.0, 0.0])
def test_a_root_whose_branches_score_alike_keeps_nothing(r):
    """It has no best; nearly alike is enough, and other roots go on."""
    alike = torch.full((1, 3), r)
    assert select_pairs(alike, 0).shape == (0, 3)
    nearly = alike + torch.tensor([0.0, 0.0, 1e-3])
    other = torch.tensor([[0.0, 2.0, -2.0]])
    kept = select_pairs(torch.cat([alike, other, nearly]), 0.5).tolist()
    assert kept[:2] == [[1, 1, 1], [1, 1, 2]]
    assert kept[2:] == {0.7: [[2, 2, 2]], 5.0: [[2, 2, 2]], -0.7: [[2, 2, 0]], 0.0: []}[r]


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


@pytest.mark.parametrize("where", [0, 1])
def test_dpo_pairs_refuses_a_group_of_more_than_two(where):
    """Two best and two worst of a root are no pair: nothing is dropped silently."""
    pair, more = [[1, 1, 0], [1, 1, 2]], [[2, 2, k] for k in range(3 + where)]
    kept = torch.tensor(pair + more if where else more + pair)
    with pytest.raises(AssertionError, match="more than two"):
        dpo_pairs(kept, torch.zeros(3, 5), ["a"] * 3)


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


# ---------------------------------------------------------------- updates


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


# ---------------------------------------------------------------- roots


def roots_of(i=0, worker=0, workers=1, names="abcde", **more):
    cfg = dict(queries=120, branches=3, seed=0, algo="ddpo", no_bs=False) | more
    return draw_roots(list(names), SimpleNamespace(**cfg), i, worker, workers)


def test_roots_are_drawn_with_replacement_by_seed_and_round():
    roots = roots_of()
    assert len(roots.prompts) == 40 and set(roots.prompts) == set("abcde")
    assert roots.own.tolist() == list(range(40)) and roots.own_prompts == roots.prompts
    assert roots_of().prompts == roots.prompts, "the same again, as a resumed run needs"
    assert roots_of(worker=1, workers=3).prompts == roots.prompts, "every process knows all"
    for other in (roots_of(1), roots_of(seed=1)):
        assert other.prompts != roots.prompts
    drawn = Counter(roots_of(queries=3 * 5000).prompts)
    assert all(abs(count - 1000) < 150 for count in drawn.values()), "5 sigma: each as likely"


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("algo, no_bs", [("ddpo", False), ("dpo", False), ("dpo", True)])
def test_every_root_has_one_process(workers, algo, no_bs):
    """With its own key and prompt; of DPO without branches all roots of a prompt have the same."""
    shares = [roots_of(4, w, workers, algo=algo, no_bs=no_bs, seed=7) for w in range(workers)]
    assert sorted(torch.cat([s.own for s in shares]).tolist()) == list(range(40))
    for share in shares:
        assert share.own.dtype == torch.long and share.own.tolist() == sorted(share.own.tolist())
        assert share.own_prompts == [share.prompts[p] for p in share.own.tolist()]
        assert share.keys("x_T") == [(7, 4, p, "x_T") for p in share.own.tolist()]
        want = [[(7, 4, p, k) for k in range(2)] for p in share.own.tolist()]
        assert share.branch_keys(2) == want
    homes = [set(share.own_prompts) for share in shares]
    if (algo, no_bs) == ("dpo", True):
        assert sum(map(len, homes)) == 5, "no prompt in two processes"
    else:
        sizes = [len(share.own) for share in shares]
        assert max(sizes) - min(sizes) <= 1


# ---------------------------------------------------------------- what a UNet call in training gets


def rollout_of(own, K=3, tau=5, names=None):
    """Each state holds 1000 root + 100 branch + t, each log p the same and a half."""
    own = torch.tensor(own, dtype=torch.long)
    root, branch = own.view(-1, 1, 1), torch.arange(K).view(1, -1, 1)
    number = 1000.0 * root + 100 * branch + torch.arange(tau, -1, -1)
    x = number[..., None, None, None].expand(-1, -1, -1, 4, 2, 2).clone()
    names = names or [f"prompt {p}" for p in own.tolist()]
    return Rollout(x, number[:, :, :-1] + 0.5, names, own, CPU)


UPDATES = {
    "random": random_kept(0),
    "pairs": torch.tensor([[0, 7, 2], [0, 7, 0], [3, 2, 1], [3, 2, 0], [5, 5, 1], [5, 5, 2]]),
    "pairs of two roots": torch.tensor([[0, 7, 0], [0, 4, 0], [1, 2, 0], [1, 9, 0]]),
    "all": select_all(torch.ones(5, 2)),
    "one": torch.tensor([[3, 3, 1]]),
}


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 64, 1000])
@pytest.mark.parametrize("update", UPDATES.values(), ids=UPDATES.keys())
def test_batches_cover_each_trajectory_and_step_once(update, size):
    """Calls of one step, as few as memory allows, about equal; two rows a pair, never apart."""
    rollout = rollout_of(update[:, 1].unique().tolist(), K=4)
    calls, rows = list(rollout.batches(update, size)), []
    for batch in calls:
        code = 1000 * batch.root + 100 * batch.branch + batch.t
        assert batch.x_t.shape == (len(code), 4, 2, 2) and len(code) <= size
        assert batch.x_t[:, 3, 1, 1].tolist() == code.tolist()
        assert batch.x_prev[:, 3, 1, 1].tolist() == (code - 1).tolist(), "the state after x_t"
        assert batch.log_p_old.tolist() == (code + 0.5).tolist(), "of the step x_t -> x_{t-1}"
        assert batch.prompts == [f"prompt {p}" for p in batch.root.tolist()]
        pairs = zip(batch.root.tolist(), batch.branch.tolist())
        rows += [(batch.t, root, branch) for root, branch in pairs]
    want = [(t, p, k) for t in range(5, 0, -1) for _, p, k in update.tolist()]
    assert rows == want, "from tau to 1, in the order of the update"
    even = max(1, size - size % 2)
    assert len(calls) == 5 * -(-len(update) // even), "as few as memory allows"
    lengths = [len(batch.root) for batch in calls if batch.t == 1]
    assert len(set(lengths[:-1])) <= 1 and lengths[-1] <= lengths[0], "about equally long"
    if size > 1:
        assert all(length % 2 == 0 for length in lengths[:-1]), "no pair is cut"


def test_batches_are_about_equally_long():
    """24 rows in calls of at most 20: 12 and 12, since a short UNet call costs more a row."""
    update, rollout = select_all(torch.ones(24, 1)), rollout_of(list(range(24)), tau=1)
    assert [len(batch.root) for batch in rollout.batches(update, 20)] == [12, 12]
    assert [len(batch.root) for batch in rollout.batches(update, 24)] == [24]


def test_batches_of_a_process_that_owns_some_roots():
    """Root numbers are the round's; the rest of the update belongs to other processes."""
    update = torch.tensor([[6, 6, 2], [6, 6, 0], [1, 1, 1], [3, 3, 0], [3, 3, 2]])
    (batch,) = rollout_of([0, 3, 6, 9], tau=1).batches(update, 8)
    assert batch.root.tolist() == [6, 6, 3, 3] and batch.branch.tolist() == [2, 0, 0, 2]
    assert batch.x_t[:, 0, 0, 0].tolist() == [6201, 6001, 3001, 3201]
    assert batch.prompts == ["prompt 6", "prompt 6", "prompt 3", "prompt 3"]
    for none in ([0, 2], []):
        assert list(rollout_of(none).batches(update, 8)) == []
    assert list(rollout_of([0, 3]).batches(update[:0], 8)) == []
    assert rollout_of([0], tau=5).tau == 5


# ---------------------------------------------------------------- the gradient of a step, the KL


class LinearPolicy:
    """mu = w_prompt x_t, sigma = t / 10: one weight a prompt, so their gradients do not meet."""

    device, latent_shape = CPU, (4, 2, 2)

    def __init__(self, names):
        self.row = {name: j for j, name in enumerate(names)}
        self.w = torch.linspace(0.5, 1.5, len(names)).requires_grad_()

    def __call__(self, x_t, t, prompts):
        w = self.w[[self.row[name] for name in prompts]]
        return w[:, None, None, None] * x_t, torch.tensor(t / 10)

    def gradient(self, x_t, x_prev, t, prompt):
        """d log p / d w of one trajectory: the mean over D of (x - mu) x_t / sigma^2."""
        w = self.w[self.row[prompt]].item()
        return ((x_prev - w * x_t) * x_t).mean().item() / (t / 10) ** 2


def random_rollout(Q, K, tau, names):
    """Random states and numbers in place of log p; seeded, though no test knows the values."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(Q, K, tau + 1, 4, 2, 2, generator=g)
    return Rollout(x, torch.zeros(Q, K, tau), names, torch.arange(Q), CPU)


@pytest.mark.parametrize("size", [1, 2, 64])
def test_step_energy_of_trajectories_whose_gradients_do_not_meet(size):
    """The mean over trajectories of |grad log p_t|^2, by t = tau..1, whatever the signs."""
    names, tau = ["a", "b", "c", "d"], 3
    policy, rollout = LinearPolicy(names), random_rollout(4, 2, tau, names)
    probe = torch.tensor([[0, 0, 1], [2, 2, 0], [3, 3, 1]])
    g = torch.Generator().manual_seed(5)
    energy = step_energy(policy, rollout, probe, size, {"w": policy.w}, g)
    want = []
    for t in range(tau, 0, -1):
        states = [(rollout.x[p, k, tau - t], rollout.x[p, k, tau - t + 1]) for _, p, k in probe]
        slopes = [policy.gradient(*s, t, names[p]) for s, p in zip(states, (0, 2, 3))]
        want.append(sum(slope**2 for slope in slopes) / 3)
    assert energy.shape == (tau,)
    assert (energy / 2**20).tolist() == pytest.approx(want, rel=1e-4)
    assert policy.w.grad is None, "it trains nothing"


@pytest.mark.parametrize("size", [2, 64])
def test_step_energy_has_a_sign_for_each_trajectory_and_step(size):
    """Four branches with one and the same gradient g: (sum of signs)^2 g^2 / 4, so 0, 1 or 4 g^2.

    Over many draws its mean is g^2; without signs it would be 4 g^2 always, with a sign a
    batch alone 2 g^2 or 4 g^2.
    """
    policy, rollout = LinearPolicy(["a"]), random_rollout(1, 1, 2, ["a"])
    rollout.x = rollout.x.repeat(1, 4, 1, 1, 1, 1)
    rollout.log_p_old = rollout.log_p_old.repeat(1, 4, 1)
    probe = torch.tensor([[0, 0, k] for k in range(4)])
    slopes = [policy.gradient(*rollout.x[0, 0, 2 - t : 4 - t], t, "a") for t in (2, 1)]
    unit = torch.tensor([slope**2 for slope in slopes]) * 2**20
    lora, draws = {"w": policy.w}, 150
    found = [
        step_energy(policy, rollout, probe, size, lora, torch.Generator().manual_seed(seed)) / unit
        for seed in range(draws)
    ]
    found = torch.stack(found)
    torch.testing.assert_close(found, found.round(), atol=1e-3, rtol=1e-3)
    found = found.round()
    assert set(found.flatten().tolist()) == {0.0, 1.0, 4.0}
    # the variance of (s1 + s2 + s3 + s4)^2 / 4 is 1.5
    assert (found.mean(0) - 1).abs().max() < 5 * (1.5 / draws) ** 0.5
    assert not torch.equal(found[:, 0], found[:, 1]), "another sign at another step"


@pytest.fixture(scope="module")
def walked():
    """A small policy with LoRA weights that are not zero, the same without, and what it walked."""
    small, base = make_small(T=3), make_small(T=3)
    lora = inject_lora(small.policy.unet)
    randomise_lora(small.policy.unet, 0.05)
    names, keys = ["a cat", "a dog"], [[(p, k) for k in range(2)] for p in range(2)]
    x = small.policy.noise([("x", p) for p in range(2)])
    x, log_p = small.policy.branch(x, 3, 0, names, keys)
    return small.policy, base.policy, lora, Rollout(x, log_p, names, torch.arange(2), CPU)


def test_step_energy_of_a_unet(walked):
    """One trajectory: its own gradient squared, by torch.distributions, over all of LoRA."""
    policy, _, lora, rollout = walked
    probe = torch.tensor([[1, 1, 0]])
    energy = step_energy(policy, rollout, probe, 4, lora, torch.Generator().manual_seed(0))
    for s, t in enumerate((3, 2, 1)):
        mu, sigma = policy(rollout.x[1, 0, s][None], t, ["a dog"])
        log_p = Normal(mu, sigma).log_prob(rollout.x[1, 0, s + 1]).mean()
        gradient = torch.autograd.grad(log_p, list(lora.values()))
        want = sum(v.double().square().sum().item() for v in gradient)
        assert energy[s].item() / 2**20 == pytest.approx(want, rel=1e-3) and want > 0


@pytest.mark.parametrize("size", [1, 4])
def test_kl_to_base_is_torchs(walked, size):
    """Summed over D, in nats; the mean over steps and trajectories; against a UNet without LoRA."""
    policy, base, _, rollout = walked
    probe = torch.tensor([[0, 0, 1], [1, 1, 0], [1, 1, 1]])
    kls = []
    for _, p, k in probe.tolist():
        for s, t in enumerate((3, 2, 1)):
            x_t, names = rollout.x[p, k, s][None], rollout.prompts[p : p + 1]
            with torch.no_grad():
                ours, theirs = (Normal(*one(x_t, t, names)) for one in (policy, base))
            kls.append(kl_divergence(ours, theirs).double().sum().item())
    got = kl_to_base(policy, rollout, probe, size)
    assert isinstance(got, float) and got == pytest.approx(np.mean(kls), rel=1e-3) and got > 0


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

    def loss(p, *betas):
        return dpok_loss(ddpo_loss(p, log_p_old, r_hat, E), p**2, *betas)

    p = log_p.item()
    assert loss(log_p, 0.3, 2.0).item() == pytest.approx(2 * value + 0.3 * p**2)
    check_gradient(lambda p: loss(p, 0.3, 2.0), log_p, 2 * slope + 0.3 * 2 * p)
    assert loss(log_p, 0.0).item() == ddpo_loss(log_p, log_p_old, r_hat, E).item()
    assert loss(log_p).item() == pytest.approx(value + 0.01 * p**2), "beta 0.01, alpha 1"


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
