"""The loop of Algorithm 1 on a random pipeline: Eq. 6 by a plain loop, ratio 1, resume, a run.

`loop` runs `train.main` and writes down what it samples, selects and hands to AdamW.
"""

import contextlib
import io
import itertools
import json
import math
import statistics
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_same_run, brightness, make_small, metrics, randomise_lora, run_flags
from conftest import write_prompts
from torch.distributions import Normal, kl_divergence

import b2rl
import ddim_logprob
import eval as evaluation
import rewards
import train
from b2rl import Rollout, Roots
from ddim_logprob import Policy, keyed_generator
from lora import lora_off
from support import report, run_folder

PROMPTS = ["a cat", "a dog", "the sea"]
D = 4 * 8 * 8


def flat(tensors):
    return torch.cat([v.detach().flatten() for v in tensors])


def close(a, b, tolerance=1e-4):
    return (a - b).norm() <= tolerance * b.norm() and b.norm() > 0


def some_numbers(i, values):
    """In place of scores or r_hat: a random picture's brightness comes from its root alone."""
    numbers = torch.arange(values.numel()).add(i * values.numel()).mul(2.4).sin()
    return 2 * numbers.view(values.shape)


def nothing(i, values):
    """In place of r_hat: no branch is kept; a round is sampled, and not trained on."""
    return torch.zeros_like(values)


@pytest.fixture
def loop(tmp_path, monkeypatch):
    """Runs `train.main` for a round, from LoRA weights that are not zero, and returns what it did.

    rounds: tau, x, log_p_old, drawn, own, scores, calls (batch sizes of the UNet before the
    update), r_hat. steps, one a call of AdamW: i, update, weights, grad. calls: of the UNet in all.

    r_hat(i, own): in place of train.py's, and all branches, or the best and the worst, are kept;
    None leaves train.py's rule, with `scores` in place of the pictures'. moved: the weights
    change between sampling and training, so that ratios differ from 1. worker: (rank, world
    size). prepare(pipeline): what is done to it.
    """
    prompts, numbers = tmp_path / "three.txt", itertools.count()
    prompts.write_text("\n".join(PROMPTS))

    def go(*flags, model="none", r_hat=some_numbers, moved=False, worker=(0, 1), **more):
        seen = SimpleNamespace(rounds=[], steps=[], calls=[])

        def load(cfg, device):
            seen.cfg = cfg
            if model == "none":
                sizes = dict(sample_batch=cfg.sample_batch, decode_batch=cfg.decode_batch)
                seen.pipeline = make_small(cfg.T, guidance=cfg.guidance, **sizes)
            else:
                seen.pipeline = load_pipeline(cfg, device)
            seen.policy, seen.unet = seen.pipeline.policy, seen.pipeline.policy.unet
            seen.unet.register_forward_pre_hook(lambda _, inputs: seen.calls.append(len(inputs[0])))
            more.get("prepare", lambda pipeline: None)(seen.pipeline)
            return seen.pipeline

        def inject(unet, rank, seed):
            seen.lora = inject_lora(unet, rank, seed=seed)
            randomise_lora(unet, 0.05)
            return seen.lora

        def branch(self, x, start, stop, prompts, keys):
            x, log_p = real_branch(self, x, start, stop, prompts, keys)
            assert stop == 0
            sampled = dict(tau=start, x=x, log_p_old=log_p, own=[key[0][2] for key in keys])
            seen.rounds.append(SimpleNamespace(**sampled))
            return x, log_p

        def score(pipeline, reward, judge, x_0, roots, K):
            found, numbers = real_score(pipeline, reward, judge, x_0, roots, K)
            calls = seen.calls[sum(len(r.calls) for r in seen.rounds[:-1]) :]
            seen.rounds[-1].__dict__.update(drawn=roots.prompts, scores=found, calls=calls)
            if moved:
                draw = torch.Generator().manual_seed(7)
                for p in seen.lora.values():
                    p.data += 0.01 * torch.randn(p.shape, generator=draw)
            assert found.shape == (len(roots.prompts), seen.cfg.branches)
            if "scores" in more:
                found = more["scores"](len(seen.rounds) - 1, found)
            return found, numbers

        def selected(rule):
            def select(found, *rest):
                seen.rounds[-1].r_hat = found
                if not r_hat:
                    return rule(found, *rest)
                found.copy_(r_hat(len(seen.rounds) - 1, found))
                return b2rl.select_all(found) if found.shape[1] == 1 else best_and_worst(found, 0.1)

            return select

        def split(*rest):
            for seen.update in real_split(*rest):
                yield seen.update

        class AdamW(torch.optim.AdamW):
            def __init__(self, *rest):
                super().__init__(*rest)
                seen.optimizer = self

            def step(self, *rest):
                weights = self.param_groups[0]["params"]
                grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in weights]
                step = dict(i=len(seen.rounds) - 1, update=seen.update, weights=flat(weights))
                seen.steps.append(SimpleNamespace(**step, grad=flat(grads)))
                return super().step(*rest)

        load_pipeline, inject_lora, real_score = train.load_pipeline, train.inject_lora, train.score
        real_branch, real_split = Policy.branch, train.split_updates
        best_and_worst = b2rl.select_pairs
        checked = rewards.checked(more.get("reward", brightness), "brightness")
        changes = dict(
            load_pipeline=load,
            load_reward=lambda *rest: checked,
            inject_lora=inject,
            score=score,
            select_pairs=selected(train.select_pairs),
            select_all=selected(train.select_all),
            split_updates=split,
            init_processes=lambda device: (*worker, device),
            kl_to_base=train.kl_to_base if "kl" in more else lambda *rest: 0.0,
        )
        end_round = report.TrainingLog.end_round if worker[1] == 1 else lambda *rest: {}
        base = ["--T", 3, "--tau0", 2, "--queries", 9, "--eval-prompts", 0, "--rounds", 1]
        base += ["--threshold", 0.1, "--epochs", 1, "--max-grad-norm", 1e9, "--update-size", 100]
        out = tmp_path / f"loop{next(numbers)}"
        with monkeypatch.context() as patch:
            patch.setattr(Policy, "branch", branch)
            patch.setattr(report.TrainingLog, "end_round", end_round)  # it sums over processes
            patch.setattr(torch.optim, "AdamW", AdamW)
            for name, value in changes.items():
                patch.setattr(train, name, value)
            train.main(run_flags(model, prompts, "--out", out, *base, *flags))
        if worker[0] == 0:
            seen.folder, seen.metrics = out, metrics(out)
            seen.header = run_folder.read_safetensors(out / run_folder.CHECKPOINT)[1]
        return seen

    return go


def plain_distribution(seen, x, t, prompt):
    """Eq. 1 at a state x (C, h, w) by diffusers' own step and two UNet calls."""
    scheduler, T = seen.pipeline.pipe.scheduler, seen.cfg.T
    x, timestep = x[None], scheduler.timesteps[T - t]
    u, c = (seen.unet(x, timestep, seen.pipeline.embed([e])).sample for e in ("", prompt))
    guided, zeros = u + seen.cfg.guidance * (c - u), torch.zeros_like(x)
    mean = scheduler.step(guided, timestep, x, eta=1.0, variance_noise=zeros)[0]
    return Normal(mean[0], scheduler._get_variance(timestep, timestep - 1000 // T) ** 0.5)


def noise(*key):
    """The noise of a key, draw after draw."""
    generator = keyed_generator(*key)
    while True:
        yield torch.randn(4, 8, 8, generator=generator)


# ---------------------------------------------------------------- sampling


@pytest.mark.parametrize("guidance, halves", [(5.0, 2), (1.0, 1)])
def test_unet_calls_of_a_round_at_the_papers_sizes(loop, guidance, halves):
    """(T - tau) + 1 + K (tau - 1) = 46 a root at tau 14, K 3; twice that with guidance."""
    flags = ["--T", 20, "--tau0", 14, "--queries", 3, "--guidance", guidance]
    (sampled,) = loop(*flags, r_hat=nothing).rounds
    assert sampled.tau == 14 and sum(sampled.calls) == halves * 46


@torch.no_grad()
def test_round_is_what_a_plain_loop_samples(loop):
    """Every trajectory of a round by diffusers' own steps, with the noise of its keys."""
    flags = ["--seed", 5, "--rounds", 3, "--T", 4, "--tau0", 3, "--tau-rounds", 9]
    seen = loop(*flags, "--decode-batch", 2, r_hat=nothing)
    sampled, images = seen.rounds[1], []
    assert sampled.tau == 3 and sampled.own == [0, 1, 2]
    assert sampled.x.shape == (3, 3, 4, 4, 8, 8) and sampled.log_p_old.shape == (3, 3, 3)
    assert sampled.x.dtype == sampled.log_p_old.dtype == torch.float32
    for p, prompt in enumerate(sampled.drawn):
        x_tau, shared = next(noise(5, 1, p, "x_T")), noise(5, 1, p, "shared")
        policy = plain_distribution(seen, x_tau, 4, prompt)
        x_tau = policy.mean + policy.stddev * next(shared)
        for k in range(3):
            x, draws = x_tau, noise(5, 1, p, k)
            for step, t in enumerate((3, 2, 1)):
                torch.testing.assert_close(sampled.x[p, k, step], x, atol=1e-3, rtol=1e-3)
                policy = plain_distribution(seen, x, t, prompt)
                x = policy.mean + policy.stddev * next(draws)
                want = policy.log_prob(x).mean().item()
                assert sampled.log_p_old[p, k, step].item() == pytest.approx(want, abs=2e-3)
            torch.testing.assert_close(sampled.x[p, k, 3], x, atol=1e-3, rtol=1e-3)
            images.append(seen.pipeline.decode(x[None])[0])
    images = torch.stack(images)
    scores = brightness(images, None).view(3, 3)
    torch.testing.assert_close(sampled.scores, scores, atol=2e-5, rtol=0)
    assert scores.std() > 1e-4, "one picture's score is not another's"
    line, names = seen.metrics[1], [name for name in sampled.drawn for _ in range(3)]
    numbers = sampled.scores.flatten().tolist()
    assert line["reward_mean"] == pytest.approx(statistics.mean(numbers), rel=1e-5)
    assert line["reward_std"] == pytest.approx(statistics.stdev(numbers), rel=1e-3)
    thumbs = torch.nn.functional.adaptive_avg_pool2d(images, 8)
    assert line["spread_within_prompt"] == pytest.approx(report.spread(thumbs, names), rel=1e-2)


def test_scores_and_what_the_judge_recognises_are_those_of_each_root():
    """Of four roots, this process has two; the judge's share is of all pictures."""
    pipeline = make_small(decode_batch=4)
    prompts = ["a bird", "a dog", "a fish", "a cat"]
    roots = Roots(prompts, torch.tensor([1, 3]), ["a dog", "a cat"], (0, 0))
    x_0 = torch.randn(2, 3, *pipeline.latent_shape, generator=torch.Generator().manual_seed(0))
    told = []

    def reward(images, names):
        told.append(names)
        return brightness(images, names) + torch.tensor([float(name == "a cat") for name in names])

    judge = lambda images, names: torch.tensor([name == "a dog" for name in names])
    scores, found = train.score(pipeline, reward, judge, x_0, roots, 3)
    want = brightness(pipeline.decode(x_0.flatten(0, 1)), None).view(2, 3)
    want[1] += 1
    torch.testing.assert_close(scores[[1, 3]], want, atol=1e-5, rtol=0)
    assert scores[[0, 2]].eq(0).all() and found["recognised"] == pytest.approx(3 / 12)
    assert found["spread_within_prompt"] > 0 and found["of"] == 12
    assert sum(told, []) == ["a dog"] * 3 + ["a cat"] * 3 and max(map(len, told)) <= 4
    _, found = train.score(pipeline, reward, None, x_0, roots, 3)
    assert "recognised" not in found
    none = Roots(prompts, torch.tensor([], dtype=torch.long), [], (0, 0))
    scores, found = train.score(pipeline, reward, judge, x_0[:0], none, 3)
    assert scores.eq(0).all() and found["spread_within_prompt"] == 0


def test_noise_does_not_depend_on_the_batches(loop):
    want = loop("--sample-batch", 64, "--decode-batch", 64, r_hat=nothing).rounds[0]
    for batch in (1, 7):
        batches = ["--sample-batch", batch, "--decode-batch", batch]
        got = loop(*batches, r_hat=nothing).rounds[0]
        assert got.drawn == want.drawn
        torch.testing.assert_close(got.x, want.x, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(got.log_p_old, want.log_p_old, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(got.scores, want.scores, atol=2e-5, rtol=0)


def test_rounds_and_seeds_draw_other_noise_and_prompts(loop):
    flags = ["--queries", 24, "--rounds", 2, "--no-bpt", "--T", 2]
    (first, second), (other, _) = (
        loop(*flags, "--seed", seed, r_hat=nothing).rounds for seed in (0, 1)
    )
    for sampled in (second, other):
        assert sampled.drawn != first.drawn
        assert (sampled.x - first.x).abs().amax((2, 3, 4, 5)).gt(0.1).all()


def test_each_stream_of_a_round_has_its_own_key(loop, monkeypatch):
    """Prompts, x_T, shared path, branches, probe, signs, each epoch's order: none is used twice."""
    keys = []

    def record(*key):
        keys.append(key)
        return keyed_generator(*key)

    for module in (train, b2rl, ddim_logprob):
        monkeypatch.setattr(module, "keyed_generator", record)
    loop("--epochs", 3, "--step-weight", "rms", "--rounds", 2, "--tau-rounds", 4)
    assert len(keys) == 2 * (1 + 3 * (1 + 1 + 3) + 1 + 1 + 3)
    assert len(set(keys)) == len(keys) and {key[:2] for key in keys} == {(0, 0), (0, 1)}


# ---------------------------------------------------------------- ratio 1


def test_ratio_is_bit_equal_to_one_at_equal_batch_shapes(loop):
    """No branches, one root a UNet call in sampling and in training: log p is log p_old exactly."""
    line = loop("--no-bs", "--queries", 3, "--sample-batch", 1, "--micro-batch", 1).metrics[0]
    assert line["kept"] == 3 and line["updates"] == 1
    assert line["first_max_log_ratio"] == 0.0 and line["first_ratio"] == 1.0


@pytest.mark.parametrize(
    "precision, flags",
    [
        ("fp32", ()),
        ("fp32", ("--no-bpt",)),
        ("bf16", ("--no-bs", "--sample-batch", 1, "--micro-batch", 1, "--queries", 2)),
    ],
)
def test_ratio_before_the_first_update(loop, random_folder, precision, flags):
    """Other batch shapes: max |log ratio| is at most 5% of the clip range, 1e-4.

    In bfloat16 another shape rounds otherwise (so it does in any code); at equal shapes the ratio
    is exactly 1, as latents are float32.
    """
    sizes = ["--T", 5, "--tau0", 4, "--micro-batch", 5]
    seen = loop("--precision", precision, *sizes, *flags, model=random_folder)
    (line,), (sampled,) = seen.metrics, seen.rounds
    assert sampled.x.dtype == sampled.log_p_old.dtype == torch.float32
    assert line["kept"] > 3 or precision == "bf16"
    assert line["first_max_log_ratio"] <= (0.0 if precision == "bf16" else 5e-6)
    assert line["first_ratio"] == pytest.approx(1, abs=1e-6) and line["clip_fraction"] == 0


# ---------------------------------------------------------------- Eq. 6 by a plain loop


def plain_step_weights(seen, tau):
    """The weight of each step t = tau..1, with a mean of 1."""
    squares = [seen.header["step_square"].get(str(t), 1) for t in range(tau, 0, -1)]
    inverse = [square**-0.5 if seen.cfg.step_weight == "rms" else 1 for square in squares]
    return [w * tau / sum(inverse) for w in inverse]


def plain_update(seen, step):
    """An update's loss, one trajectory and one timestep at a time, with diffusers' own step.

    Nothing is batched or shared. Returns the gradient, the loss, log ratios and DPO's h.
    """
    cfg, sampled, total = seen.cfg, seen.rounds[step.i], 0.0
    tau, by_step, log_ratios, hs = sampled.tau, plain_step_weights(seen, sampled.tau), [], []
    bounds = 1 - cfg.clip_range, 1 + cfg.clip_range
    weights = list(seen.lora.values())
    for p, value in zip(weights, step.weights.split([p.numel() for p in weights])):
        p.data.copy_(value.view(p.shape))
        p.grad = None
    for s in range(tau):
        weight, pairs = by_step[s] / (len(step.update) * tau), {}
        for g, p, k in step.update.tolist():
            x_t, a_t, prompt = sampled.x[p, k, s], sampled.x[p, k, s + 1], sampled.drawn[p]
            now = plain_distribution(seen, x_t, tau - s, prompt)
            log_p, r = now.log_prob(a_t).mean(), sampled.r_hat[p, k].item()
            log_ratio = log_p - sampled.log_p_old[p, k, s]
            log_ratios.append(log_ratio.item())
            rho, r = log_ratio.exp(), max(-cfg.adv_clip, min(cfg.adv_clip, r))
            clipped = torch.minimum(rho * r, rho.clamp(*bounds) * r)
            if cfg.algo in ("dpok", "dpo"):
                with torch.no_grad(), lora_off(seen.unet):
                    base = plain_distribution(seen, x_t, tau - s, prompt)
            if cfg.algo == "ddpo":
                loss = -clipped
            elif cfg.algo == "pg":
                loss = -rho * r
            elif cfg.algo == "dpok":
                loss = -clipped + cfg.kl_beta * kl_divergence(now, base).mean()
            else:  # once a pair, weighing as its two trajectories; sums over D
                pairs.setdefault(g, []).append((r, log_p.sub(base.log_prob(a_t).mean())))
                if len(pairs[g]) < 2:
                    continue
                (low, worst), (high, best) = sorted(pairs[g], key=lambda pair: pair[0])
                h = cfg.dpo_beta * D * (best - worst)
                hs.append(abs(h.item()))
                loss = -2 * torch.sigmoid(h).log()
            (loss * weight).backward()
            total += loss.item() * weight
    return flat([p.grad for p in weights]), total, torch.tensor(log_ratios), hs


@pytest.mark.parametrize(
    "algo, flags",
    [
        ("ddpo", ()),
        ("pg", ()),
        ("dpok", ()),
        ("dpo", ()),
        ("ddpo", ("--no-bs", "--no-bpt", "--queries", 5)),
        ("dpo", ("--no-bs", "--no-bpt", "--queries", 6)),
        ("dpo", ("--step-weight", "rms", "--no-bpt")),
        ("pg", ("--T", 4, "--tau0", 3, "--guidance", 2, "--step-weight", "rms")),
    ],
)
def test_update_is_eq_6(loop, algo, flags):
    """Gradient and metrics after the weights moved: some ratios leave the clip, some do not."""
    settings = ["--algo", algo, "--clip-range", 3e-3, "--kl-beta", 5, "--dpo-beta", 0.05]
    seen = loop(*settings, "--adv-clip", 1.1, *flags, moved=True)
    (line,), (step,), (sampled,) = seen.metrics, seen.steps, seen.rounds
    gradient, loss, log_ratios, hs = plain_update(seen, step)
    assert close(step.grad, gradient, 1e-3), (step.grad - gradient).norm() / gradient.norm()
    assert line["grad_norm"] == pytest.approx(gradient.norm().item(), rel=1e-3)
    assert line["loss"] == pytest.approx(loss, rel=1e-3, abs=1e-5)
    outside = (log_ratios.exp() - 1).abs() > seen.cfg.clip_range
    assert 0 < outside.float().mean() < 1, "both sides of the clip must be seen"
    assert line["clip_fraction"] == pytest.approx(outside.float().mean().item())
    assert line["first_ratio"] == pytest.approx(log_ratios.exp().mean().item(), rel=1e-4)
    largest = log_ratios.abs().max().item()
    assert line["first_max_log_ratio"] == pytest.approx(largest, rel=1e-2)
    assert line["mean_abs_h"] == pytest.approx(sum(hs) / len(hs) if hs else 0, rel=1e-2)
    assert (line["mean_abs_h"] > 0) == (algo == "dpo")
    assert line["kept"] == len(step.update) == line["trajectories_per_update"][0]
    r_hat = sampled.r_hat[step.update[:, 1], step.update[:, 2]]
    if algo == "dpo":
        assert line["kept"] >= 2 and (r_hat.view(-1, 2).diff() < 0).all(), "best, then worst"
    else:
        assert r_hat.abs().max() > 1.1, "the clip of r_hat must be seen"
    if "--no-bs" in flags and algo != "dpo":
        assert line["kept"] == line["of"]


def test_dpo_without_branches_honours_the_threshold(loop):
    """A pair needs its best and its worst beyond --threshold, as with branches."""
    flags = ["--algo", "dpo", "--no-bs", "--queries", 12, "--threshold"]
    kept = [loop(*flags, threshold).metrics[0]["kept"] for threshold in (0.1, 4)]
    assert kept[0] > 0 and kept[1] == 0


@pytest.mark.parametrize("algo, size", [("ddpo", 1), ("dpok", 4), ("dpo", 2), ("dpo", 5)])
def test_gradient_does_not_depend_on_the_micro_batch(loop, algo, size):
    flags = ["--algo", algo, "--clip-range", 3e-3, "--kl-beta", 5, "--dpo-beta", 0.05]
    want = loop(*flags, "--micro-batch", 1000, moved=True)
    got = loop(*flags, "--micro-batch", size, moved=True)
    assert close(got.steps[0].grad, want.steps[0].grad)
    assert got.metrics[0]["loss"] == pytest.approx(want.metrics[0]["loss"], rel=1e-4)
    assert max(got.calls[len(got.rounds[0].calls) :]) <= 2 * size


def test_step_energy_is_the_square_of_single_trajectories(loop):
    """|grad log p_t|^2 of one trajectory; of two, random signs leave the sum of both on average."""
    seen = loop("--step-weight", "rms", "--queries", 6)
    (sampled,), weights = seen.rounds, list(seen.lora.values())
    names, own = sampled.drawn, torch.tensor(sampled.own)
    rollout = Rollout(sampled.x, sampled.log_p_old, names, own, torch.device("cpu"))

    def energy(probe, seed, size=8):
        signs = torch.Generator().manual_seed(seed)
        rest = (torch.tensor(probe), size, seen.lora, signs)
        return b2rl.step_energy(seen.policy, rollout, *rest) / 2.0**20

    def plain(p, k, s):
        now = plain_distribution(seen, sampled.x[p, k, s], 2 - s, sampled.drawn[p])
        log_p = now.log_prob(sampled.x[p, k, s + 1]).mean()
        return flat(torch.autograd.grad(log_p, weights))

    one, two = ([plain(p, k, s) for s in range(2)] for p, k in ((0, 1), (1, 2)))
    want = torch.stack([g.square().sum() for g in one])
    torch.testing.assert_close(energy([[0, 0, 1]], 0), want, rtol=1e-3, atol=0)
    pair = [[0, 0, 1], [1, 1, 2]]
    found = torch.stack([energy(pair, seed) for seed in range(6)])
    for s in range(2):
        choices = torch.stack([(one[s] + sign * two[s]).square().sum() / 2 for sign in (1, -1)])
        near = (found[:, s, None] / choices - 1).abs() < 1e-3
        assert near.any(1).all() and near.any(0).all(), "each sign is drawn now and then"
    torch.testing.assert_close(energy(pair, 0, size=1), found[0], rtol=1e-3, atol=0)
    measured = torch.tensor([seen.header["step_square"][t] for t in "21"])
    assert measured.gt(0).all() and set(seen.header["step_square"]) == {"1", "2"}


def test_rewards_are_normalised_by_the_settings(loop):
    """App. D.1 over the rounds of a run, with --window and --min-count."""
    flags = ["--rounds", 3, "--window", 1, "--min-count", 8, "--queries", 15, "--threshold", 0.3]
    options = dict(r_hat=None, scores=some_numbers)
    seen = loop(*flags, **options)
    normalise, other = train.RewardNormaliser(1, 8), train.RewardNormaliser(1)
    for i, (sampled, line) in enumerate(zip(seen.rounds, seen.metrics)):
        drawn, scores = sampled.drawn, some_numbers(i, sampled.scores)
        assert torch.equal(sampled.r_hat, normalise(i, drawn, scores))
        assert line["alone_on_prompt"] == normalise.alone
        assert line["kept"] == len(train.select_pairs(sampled.r_hat, 0.3)) > 0
        assert not torch.equal(sampled.r_hat, other(i, drawn, scores)) or i > 0
    assert seen.header["history"] == normalise.history
    flags = ["--no-bs", "--queries", 3, "--min-count", 0]
    (line,), (sampled,) = (found := loop(*flags, **options)).metrics, found.rounds
    alone = [p for p, name in enumerate(sampled.drawn) if sampled.drawn.count(name) == 1]
    assert line["alone_on_prompt"] == len(alone) and sampled.r_hat[alone].eq(0).all()


def test_two_rows_of_the_unet_for_a_pair(loop):
    """Training calls the UNet for each kept trajectory and step, twice with guidance."""
    seen = loop("--micro-batch", 4, kl=True)
    (sampled,), kept = seen.rounds, seen.metrics[0]["kept"]
    assert sum(sampled.calls) == 2 * 3 * (1 + 1 + 3)
    training = 2 * kept * sampled.tau
    kl = 2 * training
    assert kept > 2 and sum(seen.calls) == sum(sampled.calls) + training + kl


def test_kl_to_base_of_a_round(loop):
    """In nats: the KL of whole states, a sum over D; its mean over the kept states."""
    seen = loop("--lr", 1e-12, "--queries", 6, kl=True)
    (sampled,), (step,), kls = seen.rounds, seen.steps, []
    for _, p, k in step.update.tolist():
        for s, t in enumerate((2, 1)):
            x_t, prompt = sampled.x[p, k, s], sampled.drawn[p]
            with torch.no_grad():
                now = plain_distribution(seen, x_t, t, prompt)
                with lora_off(seen.unet):
                    base = plain_distribution(seen, x_t, t, prompt)
            kls.append(kl_divergence(now, base).sum().item())
    assert seen.metrics[0]["kl_to_base"] == pytest.approx(sum(kls) / len(kls), rel=1e-3)
    assert len(kls) >= 4 and min(kls) > 0


def test_eight_trajectories_are_measured():
    """Drawn from all that is kept, the same for a seed and round; all, where there are fewer."""
    cfg, kept = SimpleNamespace(seed=3), torch.arange(300).view(100, 3)
    few = train.choose_probe(kept, cfg, 0)
    assert few.shape == (8, 3) and len({tuple(row) for row in few.tolist()}) == 8
    assert {row[0] // 3 for row in few.tolist()} <= set(range(100)) and few.max() > 30
    assert torch.equal(few, train.choose_probe(kept, cfg, 0))
    assert not torch.equal(few, train.choose_probe(kept, cfg, 1))
    assert sorted(train.choose_probe(kept[:5], cfg, 0)[:, 0].tolist()) == [0, 3, 6, 9, 12]


# ---------------------------------------------------------------- several processes


@pytest.mark.parametrize("world, flags", [(2, ()), (5, ()), (2, ("--no-bs", "--algo", "dpo"))])
def test_processes_share_the_roots_and_their_gradients_add_up(loop, world, flags):
    """Each samples its own roots as a single one would; more processes than roots work."""
    whole = loop(*flags, moved=True)
    (want,), owned, gradient, kept = whole.rounds, [], 0, whole.metrics[0]["kept"]
    for rank in range(world):
        seen = loop(*flags, moved=True, worker=(rank, world))
        (sampled,), own = seen.rounds, seen.rounds[0].own
        owned += own
        assert sampled.drawn == want.drawn
        if own:
            torch.testing.assert_close(sampled.x, want.x[own], atol=1e-3, rtol=1e-3)
            torch.testing.assert_close(sampled.scores[own], want.scores[own], atol=2e-5, rtol=0)
        rest = [p for p in range(len(want.drawn)) if p not in own]
        assert sampled.scores[rest].eq(0).all()  # summed over the processes
        gradient = gradient + seen.steps[0].grad
        if not set(seen.steps[0].update[:, 1].tolist()) & set(own):
            assert seen.steps[0].grad.eq(0).all()
    assert sorted(owned) == list(range(len(want.drawn))) and kept > 1
    assert close(gradient, whole.steps[0].grad, 1e-3)


# ---------------------------------------------------------------- updates


def test_adamw_gets_the_numbers_of_the_flags(loop):
    flags = ["--lr", 0.02, "--beta1", 0.7, "--beta2", 0.8, "--adam-eps", 1e-5]
    seen = loop(*flags, "--weight-decay", 0.3)
    (group,) = seen.optimizer.param_groups
    assert (group["lr"], *group["betas"]) == (0.02, 0.7, 0.8)
    assert (group["eps"], group["weight_decay"]) == (1e-5, 0.3)
    assert len(group["params"]) == len(seen.lora)


def test_an_epoch_trains_on_all_in_steps_of_adamw(loop):
    seen = loop("--queries", 12, "--epochs", 3, "--update-size", 2, "--lr", 1e-3)
    (line,), sizes = seen.metrics, [len(step.update) for step in seen.steps]
    assert sum(sizes) == 3 * line["kept"] and sizes == line["trajectories_per_update"]
    assert line["updates"] == len(seen.steps) >= 6 and line["skipped_updates"] == 0
    assert line["first_max_log_ratio"] <= 1e-6 and line["clip_fraction"] > 0
    orders = [step.update[:, 0].tolist() for step in seen.steps]
    thirds = [orders[n * len(orders) // 3 : (n + 1) * len(orders) // 3] for n in range(3)]
    assert thirds[0] != thirds[1] or thirds[0] != thirds[2], "each epoch has its order"
    moves = [(a.weights - b.weights).abs().max() for a, b in zip(seen.steps, seen.steps[1:])]
    assert all(1e-4 < move < 1e-2 for move in moves), "AdamW moves a weight by about lr"
    tensors, _ = run_folder.read_safetensors(seen.folder / run_folder.CHECKPOINT)
    steps = [v.item() for name, v in tensors.items() if name.startswith("step:")]
    assert steps == [line["updates"]] * len(seen.lora)


def test_updates_start_from_a_clean_gradient(loop):
    """Weights that stand still: the gradient of the second epoch is that of the first."""
    one, two = loop("--epochs", 2, "--lr", 1e-12).steps
    assert sorted(one.update.tolist()) == sorted(two.update.tolist())
    assert close(two.grad, one.grad, 1e-3)


def test_gradient_norm_is_clipped(loop):
    seen = loop("--max-grad-norm", 1e-3)
    assert seen.metrics[0]["grad_norm"] > 2e-3
    assert seen.steps[0].grad.norm().item() == pytest.approx(1e-3, rel=1e-2)


@pytest.fixture
def nan_gradients(monkeypatch):
    """nan_gradients(bad): from here on the updates numbered in `bad` have NaN gradients."""
    real = train.sum_gradients

    def choose(bad):
        numbers = itertools.count()

        def broken(parameters, device):
            real(parameters, device)
            if next(numbers) in bad:
                next(iter(parameters)).grad[0, 0] = math.nan

        monkeypatch.setattr(train, "sum_gradients", broken)

    return choose


def test_a_gradient_that_is_not_finite_changes_nothing(loop, nan_gradients):
    """The second of three updates: no step of AdamW, counted, and the next one goes on."""
    nan_gradients([1])
    seen = loop("--epochs", 3)
    (line,), (first, second) = seen.metrics, seen.steps
    assert (line["updates"], line["skipped_updates"]) == (2, 1) and line["grad_norm"] is None
    assert len(line["trajectories_per_update"]) == 3
    assert second.weights.isfinite().all() and second.grad.isfinite().all()
    assert close(first.weights, second.weights, 0.1)
    assert not torch.equal(first.weights, second.weights)


@pytest.mark.parametrize("algo", ["ddpo", "dpok", "dpo"])
def test_fp16_gradients_do_not_vanish(loop, random_folder, algo):
    """At Stable Diffusion's D and update size a gradient is below fp16's smallest number.

    A small clip of r_hat (a small beta) stands for D and for the rest of an update.
    """
    flags = ["--algo", algo, "--kl-beta", 1e-5, "--dpo-beta", 2e-4, "--queries", 6]
    flags += ["--adv-clip", 1e-4, "--threshold", 1e-5]
    fp32, fp16 = (
        loop("--precision", precision, *flags, model=random_folder).steps[0].grad
        for precision in ("fp32", "fp16")
    )
    assert close(fp16, fp32, 0.1)


def test_a_process_without_a_share_in_fp16(loop, random_folder, monkeypatch):
    """The gradient scaler works before its first loss, too."""

    def zeros(parameters, device):  # as the sum over processes leaves them
        for p in parameters:
            p.grad = torch.zeros_like(p)

    monkeypatch.setattr(train, "sum_gradients", zeros)
    seen = loop("--precision", "fp16", model=random_folder, worker=(3, 4))
    assert seen.rounds[0].own == [] and seen.steps[0].grad.eq(0).all()


@pytest.mark.parametrize("flag", ["--checkpointing", "--compile"])
def test_faster_or_smaller_calls_change_no_gradient(loop, random_folder, flag, request):
    """States and gradient to rounding, bit for bit with --checkpointing, and the ratio is 1."""
    if flag == "--compile" and not request.config.getoption("--full-size"):
        pytest.skip("minutes of compiling: pass --full-size")
    kept_bytes, found = [], []
    for flags in ((), (flag,)):
        kept_bytes.append(0)

        def pack(tensor):
            kept_bytes[-1] += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            found.append(loop(*flags, model=random_folder))
    plain, other = found
    assert other.metrics[0]["first_max_log_ratio"] <= 5e-6
    torch.testing.assert_close(other.rounds[0].x, plain.rounds[0].x, atol=1e-3, rtol=0)
    assert close(other.steps[0].grad, plain.steps[0].grad, 1e-3)
    if flag == "--checkpointing":
        assert torch.equal(other.steps[0].grad, plain.steps[0].grad)
        assert kept_bytes[1] < kept_bytes[0] / 3


class Movable:
    """A reward that is an object with `.to`, and a log of where things are moved."""

    def __init__(self):
        self.moves = []

    def __call__(self, images, prompts):
        return brightness(images, prompts)

    def to(self, device):
        self.moves.append(str(device))


def test_offload_keeps_the_others_away_while_the_unet_trains(loop, random_folder, monkeypatch):
    """Away before the first update, back after the last one; every prompt is encoded by then."""
    reward = Movable()

    def prepare(pipeline):
        pipeline.pipe.vae.to = pipeline.pipe.text_encoder.to = reward.to

    real = Rollout.batches

    def training(self, *rest):
        reward.moves.append("training")
        return real(self, *rest)

    monkeypatch.setattr(Rollout, "batches", training)
    options = dict(model=random_folder, reward=reward, prepare=prepare)
    loop("--epochs", 2, **options)
    assert reward.moves == ["training"] * 2
    reward.moves.clear()
    loop("--epochs", 2, "--rounds", 2, "--offload", **options)
    assert reward.moves == [*["cpu"] * 3, "training", "training", *["cpu"] * 3] * 2


# ---------------------------------------------------------------- settings


def parsed(*flags):
    return train.parse_args([str(flag) for flag in ["--device", "cpu", *flags]])


def test_defaults_of_the_method():
    """Table 6, the authors' code, and what the tiny model takes instead."""
    sd, tiny = parsed("--model", "org/none"), parsed()
    both = dict(T=20, eta=1.0, guidance=5.0, tau0=14, branches=3, threshold=0.5, window=8)
    both |= dict(min_count=16, epochs=2, weight_decay=1e-4, beta1=0.9, beta2=0.999, adam_eps=1e-8)
    both |= dict(adv_clip=5.0, max_grad_norm=1.0, rank=4, kl_beta=0.01, dpo_beta=0.1, seed=0)
    both |= dict(save_every=0, eval_prompts=100, algo="ddpo", no_bpt=False, no_bs=False)
    both |= dict(reward="clip", template=1, precision="fp32", prompts=None)
    own = dict(rounds=(100, 16), queries=(255, 192), update_size=(64, 32), lr=(1e-4, 1e-3))
    own |= dict(clip_range=(1e-4, 1e-3), sample_batch=(8, 128), micro_batch=(2, 128))
    own |= dict(decode_batch=(8, 64), eval_images=(1, 2), grid_every=(10, 5))
    own |= dict(step_weight=("uniform", "rms"), tau_rounds=(100, 16))
    for column, args in enumerate((sd, tiny)):
        found = {name: getattr(args, name) for name in (*both, *own)}
        assert found == both | {name: values[column] for name, values in own.items()}
    named = {name for name, *_ in train.SETTINGS}
    assert named <= both.keys() | own.keys(), "a new row: put its defaults here"


def test_settings_that_follow_from_others():
    assert parsed("--validation-prompt", "a fox").eval_prompts == 0
    assert parsed("--validation-prompt", "a fox", "--eval-prompts", 3).eval_prompts == 3
    args = parsed("--rounds", 7, "--queries", 11)
    assert (args.tau_rounds, args.queries) == (7, 9), "whole roots alone"
    args = parsed("--no-bs", "--queries", 11)
    assert (args.branches, args.queries) == (1, 11)
    assert parsed("--tau-rounds", 5, "--rounds", 7).tau_rounds == 5


def test_the_tiny_model_is_the_default_on_every_device(monkeypatch):
    """In float32, with its own settings, on a GPU as on a CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda *rest, **more: None)
    for flags in ([], ["--device", "cuda"], ["--device", "mps"], ["--device", "cpu"]):
        args = train.parse_args(flags)
        device = flags[1] if flags else "cuda"
        assert (args.model, args.precision, args.device) == ("tiny", "fp32", device)
        assert args.lr == 1e-3 and args.out.startswith("runs/tiny-clip-template1-")
    assert train.parse_args(["--model", "org/none"]).precision == "fp16"


def test_the_prompts_to_train_on_and_the_lists_to_draw(tmp_path):
    (tmp_path / "p.txt").write_text("[train]\na\nb\nc\n[unseen]\nd\ne\n")
    found = lambda *flags: train.prompt_lists(
        parsed("--prompts", tmp_path / "p.txt", *flags), print
    )
    train_on, lists = found()
    assert train_on == ["a", "b", "c"] and lists == {"train": train_on, "unseen": ["d", "e"]}
    assert found("--eval-prompts", 1) == (train_on, {"train": ["a"], "unseen": ["d"]})
    assert found("--eval-prompts", 0) == (train_on, {})
    _, lists = found("--eval-prompts", 1, "--validation-prompt", "x", "--validation-prompt", "y")
    assert list(lists.items()) == [("validation", ["x", "y"]), ("train", ["a"]), ("unseen", ["d"])]


# ---------------------------------------------------------------- a run


def test_tau_of_a_run(loop):
    """It grows from tau0 to T (Eq. 3)."""
    flags = ["--T", 4, "--tau0", 2, "--rounds", 3, "--queries", 3]
    taus = lambda *more: [r.tau for r in loop(*flags, *more, r_hat=nothing).rounds]
    assert taus() == [2, 3, 4]
    assert taus("--no-bpt") == [4, 4, 4]
    assert taus("--tau-rounds", 2) == [2, 4, 4]


@pytest.fixture(scope="module")
def run(random_folder, tmp_path_factory):
    """A run of the real command that raises its reward: folder, metrics, what it printed."""
    out, said = tmp_path_factory.mktemp("run"), io.StringIO()
    flags = ["--rounds", 6, "--queries", 32, "--branches", 4, "--T", 3, "--tau0", 2]
    flags += ["--lr", 3e-2, "--clip-range", 0.2, "--threshold", 0.1, "--update-size", 8]
    flags += ["--eval-images", 4]
    flags += ["--grid-every", 3, "--micro-batch", 48, "--sample-batch", 48, "--save-every", 2]
    checked = rewards.checked(brightness, "brightness")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(train, "load_reward", lambda *rest: checked)
        flags = run_flags(random_folder, write_prompts(out), "--out", out / "run", *flags)
        folder = train.main(flags)
    return folder, metrics(folder), said.getvalue()


def test_files_of_a_run(run):
    """The grid of the last round would be that of "after": it is not drawn twice."""
    folder, _, _ = run
    of_lists = {f"{when}-{name}" for when in ("before", "after") for name in ("train", "unseen")}
    assert {p.name for p in folder.rglob("*") if p.is_file()} == {
        "config.json",
        "metrics.jsonl",
        "checkpoint.safetensors",
        "pytorch_lora_weights.safetensors",
        "run_webui.safetensors",
        "before.json",
        "after.json",
        "summary.json",
        "README.md",
        "before-after.png",
        "round0003-train.png",
        *(f"{name}.png" for name in of_lists),
        *(f"lora-round000{i}.safetensors" for i in (2, 4, 6)),
    }


def test_metrics_of_a_run(run):
    _, lines, said = run
    assert [line["round"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["tau"] for line in lines] == [2, 2, 2, 3, 3, 3]
    assert [line["queries"] for line in lines] == [32 * i for i in range(1, 7)]
    told = [line for line in said.splitlines() if line.startswith("round ")]
    for line, text in zip(lines, told, strict=True):
        assert line["first_max_log_ratio"] <= 1e-4 and abs(line["first_ratio"] - 1) < 1e-5
        assert line["skipped_updates"] == 0 < line["updates"] and line["of"] == 32
        assert 0 < line["kept"] <= 16 and line["reward_std"] > 0 and line["kl_to_base"] > 0
        assert sum(line["trajectories_per_update"]) == 2 * line["kept"]
        assert set(line["seconds"]) == {"sampling", "reward", "training"}
        assert line["alone_on_prompt"] == 0 < line["spread_within_prompt"]
        assert {"reward_mean", "clip_fraction", "grad_norm"} <= set(line)
        assert text.startswith(f"round {line['round']}/6  tau {line['tau']}")
        assert f"kept {line['kept']} of 32" in text and f"KL {line['kl_to_base']:.3f}" in text
        gain = line["reward_mean"] - lines[0]["reward_mean"]
        assert f"reward {line['reward_mean']:.4f} ({gain:+.4f})" in text


def test_a_run_raises_its_reward(run):
    """By far, on the prompts that it trained on and on the unseen one."""
    folder, _, said = run
    summary = json.loads((folder / "summary.json").read_text())
    for name in ("train_score", "unseen_score"):
        assert summary[name]["gain"] > 2 * summary[name]["error"] > 0, summary
    before, after = (json.loads((folder / f"{w}.json").read_text()) for w in ("before", "after"))
    assert len(before["train"]["score"]) == 8 and len(before["unseen"]["score"]) == 4
    gain = sum(after["train"]["score"]) / 8 - sum(before["train"]["score"]) / 8
    assert summary["train_score"]["gain"] == pytest.approx(gain)
    assert said.startswith("Training ") and "Scores before and after" in said


def test_the_loras_that_are_kept_are_those_of_their_rounds(run, random_folder, tmp_path):
    """A run that stops there has the same ones; the last is that of the whole run."""
    folder, _, _ = run
    loras = [load(folder / f"lora-round000{i}.safetensors") for i in (2, 4, 6)]
    same = lambda one, two: all(torch.equal(one[name], two[name]) for name in one)
    assert same(loras[2], load(folder / run_folder.LORA))
    weights, _ = run_folder.read_safetensors(folder / run_folder.CHECKPOINT)
    assert same(loras[2], weights) and not same(loras[0], loras[1])
    config = json.loads((folder / "config.json").read_text())
    assert config["save_every"] == 2 and config["rounds"] == 6


def load(path):
    return run_folder.read_safetensors(path)[0]


def test_empty_selection_skips_the_update_and_says_so(command, tmp_path, capsys):
    """The run goes on, the weights stay as they are, and no KL is logged."""
    flags = ["--rounds", 2, "--threshold", 4.9, "--T", 3, "--tau0", 2]
    folder, lines = command(tmp_path / "run", *flags)
    said = capsys.readouterr().out
    assert said.count("no branch passed --threshold 4.9: no update") == 2
    assert [(line["kept"], line["updates"]) for line in lines] == [(0, 0), (0, 0)]
    assert all("kl_to_base" not in line and line["reward_std"] > 0 for line in lines)
    before, after = (json.loads((folder / f"{w}.json").read_text()) for w in ("before", "after"))
    assert before == after


SHORT = ["--T", 3, "--tau0", 2, "--threshold", 0.1, "--eval-prompts", 0]


def test_five_bad_updates_in_a_row_end_a_run(command, tmp_path, capsys, nan_gradients):
    """Counted across rounds, of two updates each; a good one starts anew."""
    flags = [*SHORT, "--rounds", 4, "--update-size", 100]
    nan_gradients(range(5))
    with pytest.raises(SystemExit) as stop:
        command(tmp_path / "bad", *flags)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "5 updates in a row" in said
    assert f"To go on: python train.py --resume {tmp_path}/bad" in said
    assert [line["skipped_updates"] for line in metrics(tmp_path / "bad")] == [2, 2]
    nan_gradients([0, 1, 2, 3, 5, 6, 7])
    _, lines = command(tmp_path / "good", *flags)
    assert [line["skipped_updates"] for line in lines] == [2, 2, 1, 2]


def test_the_loss_scale_of_fp16_is_resumed(command, tmp_path, nan_gradients):
    """An overflow halves it; the checkpoint keeps it."""
    flags = [*SHORT, "--precision", "fp16", "--algo", "pg", "--epochs", 1, "--update-size", 100]
    scale = lambda name: run_folder.read_safetensors(tmp_path / name / run_folder.CHECKPOINT)[1]
    nan_gradients([0])
    _, lines = command(tmp_path / "run", *flags, "--rounds", 1)
    assert lines[0]["skipped_updates"] == 1 and scale("run")["scaler"]["scale"] == 2.0**15
    nan_gradients([])
    _, lines = command(tmp_path / "run", "--rounds", 2, resume=True)
    assert lines[1]["updates"] == 1 and scale("run")["scaler"]["scale"] == 2.0**15
    dpo = flags[: flags.index("--algo")] + ["--algo", "dpo"]
    command(tmp_path / "dpo", *dpo, "--rounds", 1)
    assert scale("dpo")["scaler"]["scale"] == 2.0**6


def test_stopped_and_resumed_equals_uninterrupted(command, tmp_path, monkeypatch, capsys):
    """Whenever it was stopped: the same bytes of every file but for the seconds."""
    flags = ["--T", 2, "--tau0", 1, "--threshold", 0.1, "--rounds", 3, "--grid-every", 2]
    flags += ["--step-weight", "rms", "--queries", 6, "--eval-images", 1]
    straight, want = command(tmp_path / "straight/run", *flags)
    assert all(line["updates"] > 0 for line in want)
    moments = [
        (evaluation, "write_json", 1, 0),  # config.json is there, before.json is not
        (train, "sum_gradients", 2, 0),
        (run_folder, "save_checkpoint", 2, 2),  # metrics hold a round more
        (evaluation, "save_grid", 3, 1),  # the grid of round 2
    ]
    for number, (place, name, call, rounds) in enumerate(moments):
        stopped = tmp_path / f"it's {number}/run"
        real, calls = getattr(place, name), itertools.count(1)

        def stop(*rest, real=real, calls=calls, call=call, **more):
            if next(calls) == call:
                raise KeyboardInterrupt
            return real(*rest, **more)

        monkeypatch.setattr(place, name, stop)
        with pytest.raises(SystemExit) as end:
            command(stopped, *flags)
        monkeypatch.setattr(place, name, real)
        done = metrics(stopped) if (stopped / "metrics.jsonl").exists() else []
        assert end.value.code == 130 and len(done) == rounds, name
        quoted = f"""'{tmp_path}/it'"'"'s {number}/run'"""
        said = capsys.readouterr().err
        assert f"Finished rounds are saved. To go on: python train.py --resume {quoted}\n" in said
        command(stopped, resume=True)
        assert_same_run(stopped, straight)


def test_a_resume_that_draws_before_anew_draws_the_base_model(command, tmp_path):
    """Without the LoRA that is trained by then: lost scores or a lost grid come back the same."""
    run, lines = command(tmp_path / "run", *SHORT[:-2], "--rounds", 2, "--lr", 0.02)
    lost = [run / "before.json", run / "grids/before-train.png"]
    was = [path.read_bytes() for path in lost]
    after = (run / "after.json").read_bytes()
    assert was[0] != after and lines[1]["updates"] > 0
    for path in lost:
        path.unlink()
        command(run, resume=True)
        assert [path.read_bytes() for path in lost] == was
    assert (run / "after.json").read_bytes() == after


def test_a_run_is_extended(command, tmp_path):
    """--resume with more --rounds: tau keeps its schedule and stays at T; the past is untouched."""
    _, want = command(tmp_path / "run", *SHORT, "--rounds", 2)
    _, lines = command(tmp_path / "run", "--rounds", 4, resume=True)
    assert lines[:2] == want and [line["tau"] for line in lines] == [2, 3, 3, 3]
    assert [line["queries"] for line in lines] == [12, 24, 36, 48] and lines[3]["updates"] > 0


def test_run_with_offload_and_checkpointing_is_the_same_run(command, tmp_path):
    flags = [*SHORT, "--rounds", 2]
    want, lines = command(tmp_path / "a/run", *flags)
    got, _ = command(tmp_path / "b/run", *flags, "--offload", "--checkpointing")
    assert_same_run(got, want, but=("config.json",))
    assert lines[0]["updates"] > 0


def test_a_grid_is_read_row_by_row(tmp_path, monkeypatch):
    """Nine columns; pictures in the order of the scores; the first process alone draws one."""
    from PIL import Image

    grey = torch.linspace(0, 1, 12).view(12, 1, 1, 1).expand(12, 3, 128, 128)
    scores = {"score": [0.5] * 12, "recognised": None}
    monkeypatch.setattr(evaluation, "evaluate", lambda *rest: (scores, grey))
    told = []
    for worker in (1, 0):
        folder = tmp_path / str(worker)
        (folder / "grids").mkdir(parents=True)
        run = evaluation.Run(folder, worker, 2, told.append, None)
        assert evaluation.draw(run, None, brightness, None, PROMPTS, 4, "before-train") == scores
    assert not list((tmp_path / "1/grids").iterdir())
    path = tmp_path / "0/grids/before-train.png"
    assert told == [f"Pictures: {path}"]
    grid = Image.open(path)
    assert grid.size == (9 * 132 + 4, 2 * 132 + 4)
    for n in range(12):
        at = (4 + 64 + n % 9 * 132, 4 + 64 + n // 9 * 132)
        assert abs(grid.getpixel(at)[0] - 255 * n / 11) <= 1, n
