"""The loop of Algorithm 1 on a random pipeline: Eq. 6 by a plain loop, ratio 1, resume, a run.

`loop` runs `train.main` and writes down what it samples, selects and hands to AdamW.
"""

import contextlib
import io
import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_same_run, brightness, make_small, metrics, randomise_lora, run_flags
from conftest import write_prompts
from torch.distributions import Normal, kl_divergence

import model as model_file
import rewards
import run_folder
import train
from ddim_logprob import keyed_generator
from report import spread
from lora import lora_off
from model import Model

PROMPTS = ["a cat", "a dog", "the sea"]
D = 4 * 8 * 8


def flat(tensors):
    return torch.cat([v.detach().flatten() for v in tensors])


def close(a, b, tolerance=1e-4):
    return (a - b).norm() <= tolerance * b.norm() and b.norm() > 0


def random_r_hat(i, scores):
    """Normalised rewards at random: this picture's brightness comes from its root alone."""
    return torch.randn(scores.shape, generator=torch.Generator().manual_seed(i))


def no_r_hat(i, scores):
    """Nothing passes the threshold: a round is sampled, and not trained on."""
    return torch.zeros_like(scores)


@pytest.fixture
def loop(tmp_path, monkeypatch):
    """Runs `train.main` for a round, from LoRA weights that are not zero, and returns what it did.

    rounds: interval, x, log_p_old, scores, r_hat, drawn, own. steps, one a call of AdamW: i,
    update, weights, grad. samples: batch sizes of the UNet calls. moved: the weights change between
    sampling and training, so that ratios differ from 1. worker: (rank, world size). kl: log it.
    """
    prompts, numbers = tmp_path / "three.txt", itertools.count()
    prompts.write_text("\n".join(PROMPTS))

    def go(*flags, model="none", r_hat=random_r_hat, moved=False, worker=(0, 1), kl=False):
        seen = SimpleNamespace(rounds=[], steps=[], samples=[])

        def load(cfg, device):
            seen.cfg = cfg
            if model == "none":
                batches = dict(sample_batch=cfg.sample_batch, decode_batch=cfg.decode_batch)
                seen.model = make_small(cfg.T, guidance=cfg.guidance, **batches)
            else:
                seen.model = model_file.load_model(cfg, device)
            seen.model.unet.register_forward_pre_hook(
                lambda _, inputs: seen.samples.append(len(inputs[0]))
            )
            return seen.model

        def inject(unet, rank, seed):
            seen.lora = inject_lora(unet, rank, seed=seed)
            randomise_lora(unet, 0.05)
            return seen.lora

        def branch(self, x, start, stop, names, keys):
            x, log_p = real_branch(self, x, start, stop, names, keys)
            sampled = dict(interval=(start, stop), x=x, log_p_old=log_p)
            seen.rounds.append(SimpleNamespace(**sampled, own=[key[0][2] for key in keys]))
            return x, log_p

        class Normaliser(train.RewardNormaliser):
            def __call__(self, i, drawn, scores):
                own = super().__call__(i, drawn, scores)
                found = dict(drawn=drawn, scores=scores, r_hat=r_hat(i, scores) if r_hat else own)
                seen.rounds[-1].__dict__.update(found)
                if moved:
                    draw = torch.Generator().manual_seed(7)
                    for p in seen.lora.values():
                        p.data += 0.01 * torch.randn(p.shape, generator=draw)
                return found["r_hat"]

        def split(*rest):
            for seen.update in real_split(*rest):
                yield seen.update

        class AdamW(torch.optim.AdamW):
            def step(self, *rest):
                weights = self.param_groups[0]["params"]
                grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in weights]
                step = dict(i=len(seen.rounds) - 1, update=seen.update, weights=flat(weights))
                seen.steps.append(SimpleNamespace(**step, grad=flat(grads)))
                return super().step(*rest)

        inject_lora, real_branch, real_split = train.inject_lora, Model.branch, train.split_updates
        checked = rewards.checked(brightness, "brightness")
        changes = dict(
            load_model=load,
            load_reward=lambda *rest: checked,
            inject_lora=inject,
            RewardNormaliser=Normaliser,
            split_updates=split,
            init_processes=lambda device: (*worker, device),
            gather=lambda values, device: values if len(values) else torch.zeros(1),
            plot_curves=lambda folder: None,
            kl_to_base=train.kl_to_base if kl else lambda *rest: 0.0,
        )
        base = ["--T", 3, "--tau0", 2, "--queries", 9, "--eval-prompts", 0, "--rounds", 1]
        base += ["--threshold", 0.1, "--epochs", 1, "--max-grad-norm", 1e9, "--update-size", 100]
        out = tmp_path / f"loop{next(numbers)}"
        with monkeypatch.context() as patch:
            patch.setattr(Model, "branch", branch)
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
    scheduler, model, T = seen.model.pipe.scheduler, seen.model, seen.cfg.T
    x, timestep = x[None], scheduler.timesteps[T - t]
    u, c = (model.unet(x, timestep, model.embed([e])).sample for e in ("", prompt))
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
    backward = loop(*flags, r_hat=no_r_hat)
    assert backward.rounds[0].interval == (14, 0)
    assert sum(backward.samples) == halves * 46
    forward = loop(*flags, "--interval", "forward", r_hat=no_r_hat)  # it ends at x_{T - tau}
    assert forward.rounds[0].interval == (20, 6)
    assert sum(forward.samples) == halves * (1 + 3 * 13 + 3 * 6)


@torch.no_grad()
@pytest.mark.parametrize("direction, start, stop", [("backward", 3, 0), ("forward", 4, 1)])
def test_round_is_what_a_plain_loop_samples(loop, direction, start, stop):
    """Every trajectory of a round by diffusers' own steps, with the noise of its keys."""
    flags = ["--seed", 5, "--rounds", 3, "--T", 4, "--tau0", 3, "--interval", direction]
    seen = loop(*flags, "--decode-batch", 2, r_hat=no_r_hat)
    sampled, images = seen.rounds[1], []
    assert sampled.interval == (start, stop) and sampled.own == [0, 1, 2]
    assert sampled.x.shape == (3, 3, 4, 4, 8, 8) and sampled.log_p_old.shape == (3, 3, 3)
    assert sampled.x.dtype == sampled.log_p_old.dtype == torch.float32
    for p, prompt in enumerate(sampled.drawn):
        x_tau, shared = next(noise(5, 1, p, "x_T")), noise(5, 1, p, "shared")
        for t in range(4, start, -1):
            policy = plain_distribution(seen, x_tau, t, prompt)
            x_tau = policy.mean + policy.stddev * next(shared)
        for k in range(3):
            x, draws = x_tau, noise(5, 1, p, k)
            for s, t in enumerate(range(start, stop, -1)):
                torch.testing.assert_close(sampled.x[p, k, s], x, atol=1e-3, rtol=1e-3)
                policy = plain_distribution(seen, x, t, prompt)
                x = policy.mean + policy.stddev * next(draws)
                want = policy.log_prob(x).mean().item()
                assert sampled.log_p_old[p, k, s].item() == pytest.approx(want, abs=2e-3)
            torch.testing.assert_close(sampled.x[p, k, 3], x, atol=1e-3, rtol=1e-3)
            rest = noise(5, 1, p, k, "rest")
            for t in range(stop, 0, -1):
                policy = plain_distribution(seen, x, t, prompt)
                x = policy.mean + policy.stddev * next(rest)
            images.append(seen.model.decode(x[None])[0])
    images = torch.stack(images)
    scores = brightness(images, None).view(3, 3)
    torch.testing.assert_close(sampled.scores, scores, atol=2e-5, rtol=0)
    assert scores.std() > 1e-3, "one picture's score is not another's"
    line, names = seen.metrics[1], [name for name in sampled.drawn for _ in range(3)]
    assert line["reward_mean"] == pytest.approx(scores.mean().item(), abs=1e-4)
    assert line["reward_std"] == pytest.approx(scores.std().item(), abs=1e-4)
    thumbs = torch.nn.functional.adaptive_avg_pool2d(images, 8)
    assert line["spread_within_prompt"] == pytest.approx(spread(thumbs, names), rel=1e-2)


def test_scores_and_what_the_judge_recognises_are_those_of_each_root():
    """Of four roots, this process has two; the judge's share is of all pictures."""
    model, own, names = make_small(decode_batch=4), [3, 1], ["a cat", "a dog"]
    x_0 = torch.randn(2, 3, *model.latent_shape)
    judge = lambda images, prompts: torch.tensor([p == "a dog" for p in prompts])
    scores, metrics = train.score(model, brightness, judge, x_0, names, own, 4, 3)
    want = brightness(model.decode(x_0.flatten(0, 1)), None).view(2, 3)
    torch.testing.assert_close(scores[own], want, atol=1e-5, rtol=0)
    assert scores[[0, 2]].eq(0).all() and metrics["recognised"] == pytest.approx(3 / 12)
    assert metrics["spread_within_prompt"] > 0
    _, metrics = train.score(model, brightness, None, x_0, names, own, 4, 3)
    assert "recognised" not in metrics


def test_noise_does_not_depend_on_the_batches(loop):
    want = loop("--sample-batch", 64, "--decode-batch", 64, r_hat=no_r_hat).rounds[0]
    for batch in (1, 7):
        batches = ["--sample-batch", batch, "--decode-batch", batch]
        got = loop(*batches, r_hat=no_r_hat).rounds[0]
        assert got.drawn == want.drawn
        torch.testing.assert_close(got.x, want.x, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(got.log_p_old, want.log_p_old, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(got.scores, want.scores, atol=2e-5, rtol=0)


def test_rounds_and_seeds_draw_other_noise_and_prompts(loop):
    flags = ["--queries", 24, "--rounds", 2, "--no-bpt"]
    (first, second), (other, _) = (
        loop(*flags, "--seed", seed, r_hat=no_r_hat).rounds for seed in (0, 1)
    )
    assert torch.equal(first.x, loop(*flags, r_hat=no_r_hat).rounds[0].x)
    for sampled in (second, other):
        assert sampled.drawn != first.drawn
        assert (sampled.x - first.x).abs().amax((2, 3, 4, 5)).gt(0.1).all()


def test_each_stream_of_a_round_has_its_own_key(loop, monkeypatch):
    """x_T, the shared path, each branch and its rest, each epoch's order: no key is used twice."""
    keys = []

    def record(*key):
        keys.append(key)
        return keyed_generator(*key)

    monkeypatch.setattr(train, "keyed_generator", record)
    monkeypatch.setattr(model_file, "keyed_generator", record)
    loop("--epochs", 3, "--interval", "forward", "--rounds", 2, "--tau-rounds", 4)
    assert len(keys) == 2 * (1 + 3 * (2 + 3 + 3) + 3 + 1)
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
        ("fp32", ("--interval", "forward")),
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


def plain_step_weights(seen, start, stop):
    """The weight of each step from x_start on, with a mean of 1."""
    inverse, a_bar = [], seen.model.schedule.alpha_bar.tolist()
    for t in range(start, stop, -1):
        a = a_bar[t] / a_bar[t - 1]
        of_schedule = ((1 - a) / (a * (1 - a_bar[t - 1]))) ** -0.5
        of_gradient = seen.header["step_square"].get(str(t), 1) ** -0.5
        kinds = {"uniform": 1, "schedule": of_schedule, "rms": of_gradient}
        inverse.append(kinds[seen.cfg.step_weight])
    return [w * len(inverse) / sum(inverse) for w in inverse]


def plain_update(seen, step):
    """An update's loss, one trajectory and one timestep at a time, with diffusers' own step.

    Nothing is batched or shared. Returns the gradient, the loss, log ratios and DPO's h.
    """
    cfg, sampled, total = seen.cfg, seen.rounds[step.i], 0.0
    start, stop = sampled.interval
    by_step, log_ratios, hs = plain_step_weights(seen, start, stop), [], []
    bounds = 1 - cfg.clip_range, 1 + cfg.clip_range
    weights = list(seen.lora.values())
    for p, value in zip(weights, step.weights.split([p.numel() for p in weights])):
        p.data.copy_(value.view(p.shape))
        p.grad = None
    for s in range(start - stop):
        weight, pairs = by_step[s] / (len(step.update) * (start - stop)), {}
        for g, p, k in step.update.tolist():
            x_t, a_t, prompt = sampled.x[p, k, s], sampled.x[p, k, s + 1], sampled.drawn[p]
            now = plain_distribution(seen, x_t, start - s, prompt)
            log_p, r = now.log_prob(a_t).mean(), sampled.r_hat[p, k].item()
            log_ratio = log_p - sampled.log_p_old[p, k, s]
            log_ratios.append(log_ratio.item())
            rho, r = log_ratio.exp(), max(-cfg.adv_clip, min(cfg.adv_clip, r))
            clipped = torch.minimum(rho * r, rho.clamp(*bounds) * r)
            if cfg.algo in ("dpok", "dpo"):
                with torch.no_grad(), lora_off(seen.model.unet):
                    base = plain_distribution(seen, x_t, start - s, prompt)
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
        ("dpok", ("--interval", "forward")),
        ("ddpo", ("--step-weight", "schedule")),
        ("dpo", ("--step-weight", "rms", "--no-bpt")),
        ("pg", ("--T", 4, "--tau0", 3, "--guidance", 2)),
    ],
)
def test_update_is_eq_6(loop, algo, flags):
    """Gradient and metrics after the weights moved: some ratios leave the clip, some do not."""
    settings = ["--algo", algo, "--clip-range", 3e-3, "--kl-beta", 5, "--dpo-beta", 0.05]
    seen = loop(*settings, "--adv-clip", 1.2, *flags, moved=True)
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
        assert line["kept"] >= 4 and (r_hat.view(-1, 2).diff() < 0).all(), "best, then worst"
    if "--no-bs" in flags and algo != "dpo":
        assert line["kept"] == line["of"] and r_hat.abs().max() > 1.2
    interval = train.training_interval(line["tau"], seen.cfg.T, seen.cfg.interval)
    assert sampled.interval == interval


@pytest.mark.parametrize("algo", ["ddpo", "dpok", "dpo"])
def test_gradient_does_not_depend_on_the_micro_batch(loop, algo):
    flags = ["--algo", algo, "--clip-range", 3e-3, "--kl-beta", 5, "--dpo-beta", 0.05]
    want = loop(*flags, "--micro-batch", 1000, moved=True)
    for size in (2, 5) if algo == "dpo" else (1, 4):
        got = loop(*flags, "--micro-batch", size, moved=True)
        assert close(got.steps[0].grad, want.steps[0].grad)
        assert got.metrics[0]["loss"] == pytest.approx(want.metrics[0]["loss"], rel=1e-4)


def test_step_energy_is_the_square_of_single_trajectories(loop):
    """|grad log p_t|^2 of one trajectory; of two, random signs leave the sum of both on average."""
    seen = loop("--step-weight", "rms", "--queries", 6)
    (sampled,), weights = seen.rounds, list(seen.lora.values())

    def energy(update, seed, size=8):
        names, own = sampled.drawn, torch.tensor(sampled.own)
        signs = torch.Generator().manual_seed(seed)
        probe = (seen.model, sampled.x, 2, names, own, torch.tensor(update), size)
        return train.step_energy(*probe, seen.lora, signs) / 2.0**20

    def plain(p, k, s):
        now = plain_distribution(seen, sampled.x[p, k, s], 2 - s, sampled.drawn[p])
        log_p = now.log_prob(sampled.x[p, k, s + 1]).mean()
        return flat(torch.autograd.grad(log_p, weights))

    one, two = ([plain(p, k, s) for s in range(2)] for p, k in ((0, 1), (1, 2)))
    want = torch.stack([g.square().sum() for g in one])
    torch.testing.assert_close(energy([[0, 0, 1]], 0), want, rtol=1e-3, atol=0)
    found = torch.stack([energy([[0, 0, 1], [1, 1, 2]], seed) for seed in range(6)])
    for s in range(2):
        choices = torch.stack([(one[s] + sign * two[s]).square().sum() / 2 for sign in (1, -1)])
        near = (found[:, s, None] / choices - 1).abs() < 1e-3
        assert near.any(1).all() and near.any(0).all(), "each sign is drawn now and then"
    pair = [[0, 0, 1], [1, 1, 2]]
    torch.testing.assert_close(energy(pair, 0, size=1), found[0], rtol=1e-3, atol=0)
    measured = torch.tensor([seen.header["step_square"][t] for t in "21"])
    assert measured.gt(0).all() and set(seen.header["step_square"]) == {"1", "2"}


def test_rewards_are_normalised_by_the_settings(loop):
    """App. D.1 over the rounds of a run, with --window and --min-count."""
    flags = ["--rounds", 3, "--window", 1, "--min-count", 5, "--queries", 15]
    seen, normalise = loop(*flags, r_hat=None), train.RewardNormaliser(1, 5)
    for i, (sampled, line) in enumerate(zip(seen.rounds, seen.metrics)):
        assert torch.equal(sampled.r_hat, normalise(i, sampled.drawn, sampled.scores))
        assert line["alone_on_prompt"] == normalise.lone == 0
        assert line["kept"] == len(train.select_pairs(sampled.r_hat, 0.1)) > 0
    assert seen.header["history"] == normalise.history
    seen = loop("--no-bs", "--queries", 3, r_hat=None)
    (line,), drawn = seen.metrics, seen.rounds[0].drawn
    assert line["alone_on_prompt"] == sum(drawn.count(name) == 1 for name in drawn) > 0


def test_two_rows_of_the_unet_for_a_pair(loop):
    """Training calls the UNet for each kept trajectory and step, twice with guidance."""
    seen = loop("--micro-batch", 4, kl=True)
    kept, (start, stop) = seen.metrics[0]["kept"], seen.rounds[0].interval
    sampling = 2 * 3 * (1 + 1 + 3)
    training = 2 * kept * (start - stop)
    kl = 2 * training
    assert kept > 2 and sum(seen.samples) == sampling + training + kl


def test_kl_to_base_of_a_round(loop):
    """In nats: the KL of whole states, a sum over D; its mean over the kept states."""
    seen = loop("--lr", 1e-12, "--queries", 6, kl=True)
    (sampled,), (step,), kls = seen.rounds, seen.steps, []
    for _, p, k in step.update.tolist():
        for s, t in enumerate((2, 1)):
            x_t, prompt = sampled.x[p, k, s], sampled.drawn[p]
            with torch.no_grad():
                now = plain_distribution(seen, x_t, t, prompt)
                with lora_off(seen.model.unet):
                    base = plain_distribution(seen, x_t, t, prompt)
            kls.append(kl_divergence(now, base).sum().item())
    assert seen.metrics[0]["kl_to_base"] == pytest.approx(sum(kls) / len(kls), rel=1e-3)
    assert len(kls) > 4 and min(kls) > 0


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
    assert sorted(owned) == list(range(len(want.drawn))) and kept > 2
    assert close(gradient, whole.steps[0].grad, 1e-3)


def test_dpo_pairs_without_branches_stay_in_one_process():
    """A pair is two roots of one prompt, so a process owns all roots of its prompts."""
    cfg = SimpleNamespace(queries=30, branches=1, seed=0, algo="dpo", no_bs=True)
    drawn, own = train.draw_roots(PROMPTS, cfg, 0, 1, 2)
    assert {drawn[p] for p in own} == {"a dog"} and len(own) == drawn.count("a dog") > 3
    cfg.algo = "ddpo"
    drawn, own = train.draw_roots(PROMPTS, cfg, 0, 1, 2)
    assert own.tolist() == list(range(1, 30, 2))


# ---------------------------------------------------------------- updates


def test_an_epoch_trains_on_all_in_steps_of_adamw(loop):
    seen = loop("--queries", 12, "--epochs", 3, "--update-size", 2, "--lr", 1e-3)
    (line,), sizes = seen.metrics, [len(step.update) for step in seen.steps]
    assert sum(sizes) == 3 * line["kept"] and sizes == line["trajectories_per_update"]
    assert line["updates"] == len(seen.steps) >= 6 and line["skipped_updates"] == 0
    assert line["first_max_log_ratio"] <= 1e-6 and line["clip_fraction"] > 0
    orders = [step.update[:, 0].tolist() for step in seen.steps]
    assert orders[: len(orders) // 3] != orders[-len(orders) // 3 :], "each epoch has its order"
    moves = [(a.weights - b.weights).abs().max() for a, b in zip(seen.steps, seen.steps[1:])]
    assert all(1e-4 < move < 1e-2 for move in moves), "AdamW moves a weight by about lr"
    parameters = len(seen.lora)
    tensors, _ = run_folder.read_safetensors(next(seen.folder.glob("checkpoint*")))
    steps = [v.item() for name, v in tensors.items() if name.startswith("step:")]
    assert steps == [line["updates"]] * parameters


def test_updates_start_from_a_clean_gradient(loop):
    """Weights that stand still: the gradient of the second epoch is that of the first."""
    one, two = loop("--epochs", 2, "--lr", 1e-12).steps
    assert sorted(one.update.tolist()) == sorted(two.update.tolist())
    assert close(two.grad, one.grad, 1e-3)


def test_gradient_norm_is_clipped(loop):
    seen = loop("--max-grad-norm", 1e-3)
    assert seen.metrics[0]["grad_norm"] > 2e-3
    assert seen.steps[0].grad.norm().item() == pytest.approx(1e-3, rel=1e-2)


def test_a_gradient_that_is_not_finite_changes_nothing(loop, monkeypatch):
    """The second of three updates: no step of AdamW, counted, and the next one goes on."""
    real, calls = train.sum_gradients, itertools.count()

    def broken(parameters, device):
        real(parameters, device)
        if next(calls) == 1:
            next(iter(parameters)).grad[0, 0] = math.nan

    monkeypatch.setattr(train, "sum_gradients", broken)
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

    A small advantage (a small beta) stands for D and for the rest of an update.
    """
    flags = ["--algo", algo, "--kl-beta", 1e-5, "--dpo-beta", 2e-4, "--threshold", 0]
    flags += ["--queries", 6]
    small = lambda i, scores: 1e-4 * random_r_hat(i, scores)
    fp32, fp16 = (
        loop("--precision", precision, *flags, r_hat=small, model=random_folder).steps[0].grad
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


@pytest.mark.parametrize("flag", ["--checkpointing", "--channels-last", "--compile"])
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
    assert other.metrics[0]["first_max_log_ratio"] <= 2e-6
    torch.testing.assert_close(other.rounds[0].x, plain.rounds[0].x, atol=1e-3, rtol=0)
    assert close(other.steps[0].grad, plain.steps[0].grad, 1e-3)
    if flag == "--checkpointing":
        assert torch.equal(other.steps[0].grad, plain.steps[0].grad)
        assert kept_bytes[1] < kept_bytes[0] / 3


def test_offload_keeps_the_others_away_while_the_unet_trains(loop, monkeypatch):
    """Away before the first update, back after the last one; every prompt is encoded by then."""
    moves = []
    monkeypatch.setattr(
        Model, "move_others", lambda self, reward, device: moves.append(str(device))
    )
    real = train.micro_batches

    def training(*rest):
        moves.append("training")
        return real(*rest)

    monkeypatch.setattr(train, "micro_batches", training)
    loop("--epochs", 2)
    assert moves == ["training"] * 2
    moves.clear()
    loop("--epochs", 2, "--rounds", 2, "--offload")
    assert moves == ["cpu", "training", "training", "cpu"] * 2


# ---------------------------------------------------------------- the command


def test_the_intervals_of_a_run(loop):
    """tau grows from tau0 to T, --interval turns it round (Eq. 3)."""
    flags = ["--T", 4, "--tau0", 2, "--rounds", 3, "--queries", 3]
    intervals = lambda *more: [r.interval for r in loop(*flags, *more, r_hat=no_r_hat).rounds]
    assert intervals() == [(2, 0), (3, 0), (4, 0)]
    assert intervals("--interval", "forward") == [(4, 2), (4, 1), (4, 0)]
    assert intervals("--no-bpt") == [(4, 0)] * 3
    assert intervals("--tau-rounds", 2) == [(2, 0), (4, 0), (4, 0)]


@pytest.fixture(scope="module")
def run(random_folder, tmp_path_factory):
    """A run of the real command that raises its reward: folder, metrics, what it printed."""
    out, said = tmp_path_factory.mktemp("run"), io.StringIO()
    flags = ["--rounds", 6, "--queries", 32, "--branches", 4, "--T", 3, "--tau0", 2]
    flags += ["--lr", 2e-2, "--threshold", 0.1, "--update-size", 8, "--eval-images", 4]
    flags += ["--grid-every", 4, "--micro-batch", 48, "--sample-batch", 48]
    checked = rewards.checked(brightness, "brightness")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(train, "load_reward", lambda *rest: checked)
        flags = run_flags(random_folder, write_prompts(out), "--out", out / "run", *flags)
        folder = train.main(flags)
    return folder, metrics(folder), said.getvalue()


def test_files_of_a_run(run):
    folder, _, _ = run
    of_lists = {f"{when}-{name}" for when in ("before", "after") for name in ("train", "unseen")}
    assert {p.name for p in folder.rglob("*") if p.is_file()} == {
        "config.json",
        "metrics.jsonl",
        "checkpoint.safetensors",
        "pytorch_lora_weights.safetensors",
        "webui_lora.safetensors",
        "before.json",
        "after.json",
        "summary.json",
        "README.md",
        "curves.png",
        "before-after.png",
        "round0004-train.png",
        *(f"{name}.png" for name in of_lists),
    }


def test_metrics_of_a_run(run):
    _, lines, _ = run
    assert [line["round"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["tau"] for line in lines] == [2, 2, 2, 3, 3, 3]
    assert [line["queries"] for line in lines] == [32 * i for i in range(1, 7)]
    for line in lines:
        assert line["first_max_log_ratio"] <= 1e-4 and abs(line["first_ratio"] - 1) < 1e-5
        assert line["skipped_updates"] == 0 < line["updates"] and line["of"] == 32
        assert 0 < line["kept"] <= 16 and line["reward_std"] > 0 and line["kl_to_base"] > 0
        assert sum(line["trajectories_per_update"]) == 2 * line["kept"]
        assert set(line["seconds"]) == {"sampling", "reward", "training"}
        assert line["alone_on_prompt"] == 0 < line["spread_within_prompt"]
        assert {"reward_mean", "clip_fraction", "grad_norm"} <= set(line)


def test_a_run_raises_its_reward(run):
    """By far, on the prompts that it trained on and on the unseen one."""
    folder, _, said = run
    summary = json.loads((folder / "summary.json").read_text())
    for name in ("train_score", "unseen_score"):
        assert summary[name]["gain"] > 3 * summary[name]["error"] > 0, summary
    before, after = (json.loads((folder / f"{w}.json").read_text()) for w in ("before", "after"))
    assert len(before["train"]["score"]) == 8 and len(before["unseen"]["score"]) == 4
    gain = sum(after["train"]["score"]) / 8 - sum(before["train"]["score"]) / 8
    assert summary["train_score"]["gain"] == pytest.approx(gain)
    assert said.startswith("Training ") and "Scores before and after" in said
    assert "round 6/6  tau 3" in said


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


def test_five_bad_updates_in_a_row_end_a_run(command, tmp_path, capsys, nan_gradients):
    """Counted across rounds, of two updates each, and across a resume; a good one starts anew."""
    flags = [*SHORT, "--rounds", 4, "--update-size", 100]
    nan_gradients(range(100))
    with pytest.raises(SystemExit) as stop:
        command(tmp_path / "bad", *flags)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "5 updates in a row" in said and "--resume" in said
    assert [line["skipped_updates"] for line in metrics(tmp_path / "bad")] == [2, 2]
    nan_gradients([0])
    with pytest.raises(SystemExit):
        command(tmp_path / "bad", resume=True)
    assert "5 updates in a row" in capsys.readouterr().err
    nan_gradients([1, 2, 3])
    _, lines = command(tmp_path / "bad", resume=True)
    assert [line["skipped_updates"] for line in lines] == [2, 2, 1, 2]
    nan_gradients([0, 1, 2, 3, 5, 6, 7])
    _, lines = command(tmp_path / "good", *flags)
    assert [line["skipped_updates"] for line in lines] == [2, 2, 1, 2]


def test_the_loss_scale_of_fp16_is_resumed(command, tmp_path, nan_gradients):
    """An overflow halves it; the checkpoint keeps it."""
    flags = [*SHORT, "--precision", "fp16", "--algo", "pg", "--epochs", 1, "--update-size", 100]
    scale = lambda: run_folder.read_safetensors(tmp_path / "run/checkpoint.safetensors")[1][
        "scaler"
    ]
    nan_gradients([0])
    _, lines = command(tmp_path / "run", *flags, "--rounds", 1)
    assert lines[0]["skipped_updates"] == 1 and scale()["scale"] == 2.0**15
    nan_gradients([])
    _, lines = command(tmp_path / "run", "--rounds", 2, resume=True)
    assert lines[1]["updates"] == 1 and scale()["scale"] == 2.0**15
    dpo = flags[: flags.index("--algo")] + ["--algo", "dpo"]
    command(tmp_path / "run2", *dpo, "--rounds", 1)
    header = run_folder.read_safetensors(tmp_path / "run2/checkpoint.safetensors")[1]
    assert header["scaler"]["scale"] == 2.0**6


def test_killed_and_resumed_equals_uninterrupted(command, tmp_path, monkeypatch):
    """Whenever it was stopped: the same bytes of every file but for the seconds."""
    flags = ["--T", 2, "--tau0", 1, "--threshold", 0.1, "--rounds", 3, "--grid-every", 2]
    flags += ["--step-weight", "rms", "--queries", 6, "--eval-images", 1]
    straight, want = command(tmp_path / "straight", *flags)
    assert all(line["updates"] > 0 for line in want)
    moments = [
        (train.run_folder, "write_json", 2, 0),  # config.json is there, before.json is not
        (train, "sum_gradients", 2, 0),
        (train.run_folder, "save_checkpoint", 2, 2),  # metrics hold a round more
        (train, "save_grid", 3, 1),  # the grid of round 2
        (train, "write_card", 1, 3),
    ]
    for number, (place, name, call, rounds) in enumerate(moments):
        killed, real, calls = tmp_path / f"killed{number}", getattr(place, name), itertools.count(1)

        def stop(*rest, real=real, calls=calls, call=call, **more):
            if next(calls) == call:
                raise KeyboardInterrupt
            return real(*rest, **more)

        monkeypatch.setattr(place, name, stop)
        with pytest.raises(SystemExit) as end:
            command(killed, *flags)
        monkeypatch.setattr(place, name, real)
        done = metrics(killed) if (killed / "metrics.jsonl").exists() else []
        assert end.value.code == 130 and len(done) == rounds, name
        command(killed, resume=True)
        assert_same_run(killed, straight)


def test_a_run_is_extended(command, tmp_path):
    """--resume with more --rounds: tau keeps its schedule and stays at T; the past is untouched."""
    _, want = command(tmp_path / "run", *SHORT, "--rounds", 2)
    _, lines = command(tmp_path / "run", "--rounds", 4, resume=True)
    assert lines[:2] == want and [line["tau"] for line in lines] == [2, 3, 3, 3]
    assert [line["queries"] for line in lines] == [12, 24, 36, 48] and lines[3]["updates"] > 0


def test_run_with_offload_and_checkpointing_is_the_same_run(command, tmp_path):
    flags = [*SHORT, "--rounds", 2]
    want, lines = command(tmp_path / "plain", *flags)
    got, _ = command(tmp_path / "small", *flags, "--offload", "--checkpointing")
    assert_same_run(got, want, but=("config.json",))
    assert lines[0]["updates"] > 0


@pytest.mark.parametrize("preset", train.PRESETS)
def test_presets_fill_in_what_is_not_given(preset):
    flags = ["--model", "none", "--device", "cpu", "--preset", preset]
    args = train.parse_args(flags)
    assert {k: getattr(args, k) for k in train.PRESETS[preset]} == train.PRESETS[preset]
    args = train.parse_args([*flags, "--micro-batch", "3"])
    assert args.micro_batch == 3 and args.offload
