"""The training loop on a random pipeline: ratio 1, Eq. 6 by a plain loop, resume, a short run."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import count_unet_samples, load_args, make_small, randomise_lora
from safetensors import safe_open
from torch.distributions import Normal, kl_divergence

import rewards
import runs
import train
from b2rl import complete_pairs, select_all, select_pairs, select_prompt_pairs
from ddim_logprob import keyed_generator
from eval import evaluate
from lora import inject_lora, lora_off, lora_parameters

PROMPTS = ["a cat", "a dog", "the sea"]


def brightness(images, prompts):
    return images.mean((1, 2, 3))


def settings(*flags):
    """args of train.py for the random pipeline: T 6, SD's defaults elsewhere."""
    base = ["--model", "none", "--device", "cpu", "--T", "6", "--tau0", "4", "--queries", "12",
            "--sample-batch", "6", "--micro-batch", "6", "--decode-batch", "6"]  # fmt: skip
    return train.parse_args([*base, *map(str, flags)])


@pytest.fixture
def model():
    small = make_small()
    inject_lora(small.unet)
    randomise_lora(small.unet, 0.05)
    return small


def sample(model, args, interval=(4, 0), i=0, rank=0, world=1):
    return train.sample_round(model, rewards.checked(brightness, "brightness"), PROMPTS, i,
                              interval, args, rank, world)  # fmt: skip


def normalised(data, seed=0):
    """r_hat that keeps whole pairs; random, since this picture's brightness comes from its root."""
    return torch.randn(data.scores.shape, generator=torch.Generator().manual_seed(seed))


def gradient(model):
    return torch.cat([p.grad.flatten() for p in lora_parameters(model.unet).values()])


def update_gradient(model, *rest):
    """The gradient and the sums of `train.update_gradient`, from a clean start."""
    model.unet.zero_grad(set_to_none=True)
    sums = train.update_gradient(model, *rest)
    return gradient(model), sums


def close(a, b, tolerance=1e-4):
    return (a - b).norm() <= tolerance * b.norm() and b.norm() > 0


# ---------------------------------------------------------------- sampling


@pytest.mark.parametrize("guidance, halves", [(5.0, 2), (1.0, 1)])
def test_unet_calls_of_a_round_at_the_papers_sizes(guidance, halves):
    """(T - tau) + 1 + K (tau - 1) = 46 a root at tau 14, K 3 (trap 9), twice that with guidance."""
    model = make_small(T=20)
    args = settings("--T", 20, "--branches", 3, "--queries", 6, "--sample-batch", 12,
                    "--guidance", guidance)  # fmt: skip
    with count_unet_samples(model.unet) as seen:
        sample(model, args, (14, 0))
    assert sum(seen) == halves * 2 * 46
    with count_unet_samples(model.unet) as seen:  # the forward ablation ends at x_{T - tau}
        sample(model, args, (20, 6))
    assert sum(seen) == halves * 2 * (1 + 3 * 13 + 3 * 6)


def test_round_is_what_a_plain_loop_samples(model):
    """Every trajectory of a round by diffusers' own steps, with the noise of its keys."""
    args = settings("--branches", 3, "--seed", 5)
    data = sample(model, args, (4, 0), i=2)
    assert data.states.shape == (4, 3, 5, 4, 8, 8) and data.log_p_old.shape == (4, 3, 4)
    assert data.states.dtype == data.log_p_old.dtype == torch.float32
    scheduler, images = model.pipe.scheduler, []
    for p, prompt in enumerate(data.prompts):
        x_T = torch.randn(4, 8, 8, generator=keyed_generator(5, 2, p, "x_T"))[None]
        shared = keyed_generator(5, 2, p, "shared")
        for t in (6, 5):
            x_T = plain_step(model, x_T, t, prompt, torch.randn(4, 8, 8, generator=shared))
        for k in range(3):
            x, g = x_T, keyed_generator(5, 2, p, k)
            for j, t in enumerate((4, 3, 2, 1)):
                torch.testing.assert_close(data.states[p, k, j], x[0], atol=1e-3, rtol=1e-3)
                x_t, x = x, plain_step(model, x, t, prompt, torch.randn(4, 8, 8, generator=g))
                mean = plain_step(model, x_t, t, prompt, torch.zeros(4, 8, 8))
                std = scheduler._get_variance(scheduler.timesteps[6 - t],
                                              scheduler.timesteps[6 - t] - 166) ** 0.5  # fmt: skip
                want = Normal(mean, std).log_prob(x).mean()
                assert data.log_p_old[p, k, j].item() == pytest.approx(want.item(), abs=2e-3)
            images.append(model.decode(x, 1))
    want = brightness(torch.cat(images), None).view(4, 3)
    torch.testing.assert_close(data.scores, want, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def plain_step(model, x, t, prompt, noise):
    """One guided step by diffusers, two UNet calls."""
    timestep = model.pipe.scheduler.timesteps[6 - t]
    u, c = (model.unet(x, timestep, model.embed([e])).sample for e in ("", prompt))
    return model.pipe.scheduler.step(u + 5 * (c - u), timestep, x, eta=1.0,
                                     variance_noise=noise[None])[0]  # fmt: skip


def test_noise_does_not_depend_on_the_batches(model):
    """Trap 12; prompts and scores too."""
    want = sample(model, settings("--branches", 3, "--sample-batch", 64, "--decode-batch", 64))
    for batch in (1, 3, 7):
        data = sample(model, settings("--branches", 3, "--sample-batch", batch,
                                      "--decode-batch", batch))  # fmt: skip
        assert data.prompts == want.prompts
        torch.testing.assert_close(data.states, want.states, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(data.log_p_old, want.log_p_old, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(data.scores, want.scores, atol=1e-4, rtol=1e-4)


def test_rounds_and_seeds_draw_other_noise_and_prompts(model):
    args, other = settings("--queries", 30), settings("--queries", 30, "--seed", 1)
    first, second, third = sample(model, args), sample(model, args, i=1), sample(model, other)
    assert torch.equal(first.states, sample(model, args).states)
    for data in (second, third):
        assert data.prompts != first.prompts
        assert (data.states - first.states).abs().amax((2, 3, 4, 5)).gt(0.1).all()


@pytest.mark.parametrize("world", [2, 3, 6])
def test_processes_share_the_roots(model, world):
    """Each process samples its own roots as a single one would; more processes than roots work."""
    args = settings("--branches", 3)
    whole = sample(model, args)
    seen = []
    for rank in range(world):
        data = sample(model, args, rank=rank, world=world)
        seen += data.mine.tolist()
        assert data.prompts == whole.prompts
        if len(data.mine):
            torch.testing.assert_close(data.states, whole.states[data.mine], atol=1e-3, rtol=1e-3)
            torch.testing.assert_close(data.scores[data.mine], whole.scores[data.mine],
                                       atol=1e-4, rtol=1e-3)  # fmt: skip
        rest = [p for p in range(4) if p not in data.mine.tolist()]
        assert data.scores[rest].eq(0).all()  # summed over the processes
    assert sorted(seen) == [0, 1, 2, 3]


@pytest.mark.parametrize("world", [2, 7])
def test_evaluation_is_keyed_by_prompt_and_number(model, world):
    """Scores do not depend on batches, on the other prompts or on the number of processes."""
    reward, args = rewards.checked(brightness, "brightness"), settings()
    want = evaluate(model, reward, PROMPTS, 2, args)[0]["score"]
    assert len(want) == 6 and len(set(want)) == 6
    args.sample_batch, args.decode_batch = 2, 1
    shares = [evaluate(model, reward, PROMPTS, 2, args, None, rank, world)[0]["score"]
              for rank in range(world)]  # fmt: skip
    assert [sum(parts) for parts in zip(*shares)] == pytest.approx(want, abs=1e-4)
    assert all(sum(part != 0 for part in parts) == 1 for parts in zip(*shares))
    alone = evaluate(model, reward, PROMPTS[1:2], 2, args)[0]["score"]
    assert alone == pytest.approx([want[1], want[4]], abs=1e-4)


# ---------------------------------------------------------------- ratio 1 (trap 2)


def test_ratio_is_bit_equal_to_one_at_equal_batch_shapes(model):
    """No branches, one root a UNet call in sampling and in training: log p is log p_old exactly."""
    args = settings("--no-bs", "--queries", 3, "--sample-batch", 1, "--micro-batch", 1)
    data = sample(model, args)
    _, sums = update_gradient(model, data, torch.ones(3, 1), select_all(data.scores), (4, 0), args)
    assert sums["max_log_ratio"] == 0.0 and sums["ratio"] == sums["items"] == 12


@pytest.mark.parametrize("interval, precision", [
    ((4, 0), "fp32"), ((6, 0), "fp32"), ((6, 2), "fp32"), ((3, 0), "bf16")])  # fmt: skip
def test_ratio_before_the_first_update(random_folder, interval, precision):
    """Other batch shapes: max |log ratio| is at most 1% of the clip range, 1e-4.

    In bfloat16 another shape rounds otherwise (so it does in any code); at equal shapes the ratio
    is exactly 1, as latents are float32.
    """
    model = runs.load_model(load_args(random_folder, precision, 6), torch.device("cpu"))
    inject_lora(model.unet)
    randomise_lora(model.unet, 0.05)
    batch = ["--no-bs", "--sample-batch", 1, "--micro-batch", 1] if precision == "bf16" else []
    args = settings("--branches", 3, "--micro-batch", 5, *batch)
    data = sample(model, args, interval)
    assert data.states.dtype == data.log_p_old.dtype == torch.float32
    kept = select_all(data.scores) if batch else select_pairs(data.scores - data.scores.mean(), 0)
    _, sums = update_gradient(model, data, torch.ones_like(data.scores), kept, interval, args)
    assert sums["max_log_ratio"] <= 1e-6
    assert sums["items"] == len(kept) * (interval[0] - interval[1]) > 0
    assert sums["ratio"] == pytest.approx(sums["items"], rel=1e-6) and sums["clipped"] == 0


@pytest.mark.parametrize("by", [0.5, -0.25])
def test_the_largest_log_ratio_has_no_sign(model, by):
    args = settings("--no-bs", "--queries", 3)
    data = sample(model, args)
    data.log_p_old[1, 0, 2] += by
    _, sums = update_gradient(model, data, torch.ones(3, 1), select_all(data.scores), (4, 0), args)
    assert sums["max_log_ratio"] == pytest.approx(abs(by), rel=1e-3)


def test_pictures_are_the_pipelines(model):
    """Latents are divided by the VAE's scale, pictures moved from [-1, 1] to [0, 1] and cut off."""
    latents = 3 * torch.randn(5, *model.latent_shape, generator=torch.Generator().manual_seed(4))
    vae = model.pipe.vae
    vae.register_to_config(scaling_factor=0.5)
    with torch.no_grad():
        expected = model.pipe.image_processor.postprocess(
            vae.decode(latents / 0.5).sample, output_type="pt")  # fmt: skip
    torch.testing.assert_close(model.decode(latents, 2), expected, atol=1e-5, rtol=0)
    assert expected.std() > 0.01


# ---------------------------------------------------------------- Eq. 6 by a plain loop


def plain_gradient(model, data, r_hat, update, interval, args):
    """The update's loss, one trajectory and one timestep at a time, with diffusers' own step.

    Nothing is batched or shared. Returns the gradient, how many ratios leave the clip, the loss.
    """
    start, stop = interval
    scheduler = model.pipe.scheduler
    model.unet.zero_grad(set_to_none=True)

    def distribution(p, k, j):
        x, timestep = data.states[p, k, j][None], scheduler.timesteps[args.T - (start - j)]
        u, c = (model.unet(x, timestep, model.embed([e])).sample for e in ("", data.prompts[p]))
        mean = scheduler.step(u + args.guidance * (c - u), timestep, x, eta=1.0,
                              variance_noise=torch.zeros_like(x))[0]  # fmt: skip
        return Normal(mean, scheduler._get_variance(timestep, timestep - 1000 // args.T) ** 0.5)

    def log_ps(p, k, j):
        x_prev = data.states[p, k, j + 1][None]
        now = distribution(p, k, j)
        with torch.no_grad(), lora_off(model.unet):
            base = distribution(p, k, j)
        kl = kl_divergence(now, base).mean()
        return now.log_prob(x_prev).mean(), base.log_prob(x_prev).mean(), kl

    tau, total, outside = start - stop, 0.0, 0
    weight = 1 / (len(update) * tau)
    for j in range(tau):
        pairs = {}
        for g, p, k in update.tolist():
            log_p, log_base, kl = log_ps(p, k, j)
            r = max(-args.adv_clip, min(args.adv_clip, r_hat[p, k].item()))
            pairs.setdefault(g, []).append((r, log_p, log_base))
            rho = (log_p - data.log_p_old[p, k, j]).exp()
            outside += int(abs(rho.item() - 1) > args.clip_range)
            bounds = 1 - args.clip_range, 1 + args.clip_range
            term = torch.minimum(rho * r, rho.clamp(*bounds) * r)
            loss = {"ddpo": -term, "pg": -rho * r, "dpok": -term + args.kl_beta * kl,
                    "dpo": torch.zeros(())}[args.algo]  # fmt: skip
            if args.algo != "dpo":
                (loss * weight).backward()
                total += loss.item() * weight
        if args.algo == "dpo":  # once a pair, weighing as its two trajectories; sums over D = 256
            for (_, lose, lose_ref), (_, win, win_ref) in map(sorted_by_reward, pairs.values()):
                h = args.dpo_beta * 256 * ((win - win_ref) - (lose - lose_ref))
                loss = -torch.sigmoid(h).log() * 2 * weight
                loss.backward(retain_graph=True)
                total += loss.item()
    return gradient(model), outside, total


def sorted_by_reward(pair):
    assert len(pair) == 2
    return sorted(pair, key=lambda item: item[0])


@pytest.mark.parametrize("strategy, interval", [
    ("bs", (4, 0)), ("bs", (6, 1)), ("no-bs", (6, 0)),
])  # fmt: skip
@pytest.mark.parametrize("algo", ["ddpo", "pg", "dpok", "dpo"])
def test_update_gradient_is_eq_6(model, algo, strategy, interval):
    """After the weights moved, so that ratios differ from 1 and some leave the clip."""
    bs = strategy == "bs"
    flags = ["--branches", 3, "--queries", 9] if bs else ["--no-bs", "--queries", 5]
    args = settings(*flags, "--algo", algo, "--clip-range", 3e-3, "--kl-beta", 5, "--adv-clip", 1.2,
                    "--threshold", 0.1, "--dpo-beta", 0.05)  # fmt: skip
    data = sample(model, args, interval)
    r_hat = normalised(data)
    kept = select_pairs(r_hat, 0.1) if bs else select_all(r_hat)
    if algo == "dpo":
        kept = kept if bs else select_prompt_pairs(r_hat, data.prompts, 0.1)
        kept = complete_pairs(kept)
    randomise_lora(model.unet, 0.05, seed=7)
    want, outside, loss = plain_gradient(model, data, r_hat, kept, interval, args)
    got, sums = update_gradient(model, data, r_hat, kept, interval, args)
    assert close(got, want, 1e-3), ((got - want).norm() / want.norm()).item()
    assert sums["loss"] == pytest.approx(loss, rel=1e-3, abs=1e-5)
    assert sums["items"] == len(kept) * (interval[0] - interval[1])
    assert 0 < outside < sums["items"], "both sides of the clip must be seen"
    assert sums["clipped"] == outside
    if algo == "dpo":
        assert sums["h"] > 0


@pytest.mark.parametrize("algo", ["ddpo", "dpok", "dpo"])
def test_gradient_does_not_depend_on_the_micro_batch(model, algo):
    """Trap 10."""
    args = settings("--branches", 3, "--algo", algo, "--clip-range", 3e-3, "--micro-batch", 1000)
    data = sample(model, args)
    r_hat = normalised(data)
    kept = complete_pairs(select_pairs(r_hat, 0.0))
    randomise_lora(model.unet, 0.05, seed=7)
    want, _ = update_gradient(model, data, r_hat, kept, (4, 0), args)
    for args.micro_batch in (2, 3, 5) if algo == "dpo" else (1, 2, 5):
        assert close(update_gradient(model, data, r_hat, kept, (4, 0), args)[0], want)


def test_two_processes_keep_dpo_pairs_whole(model):
    """Without branches a pair is two roots of one prompt: both belong to the same process."""
    args = settings("--no-bs", "--queries", 14, "--algo", "dpo", "--micro-batch", 2)
    data = sample(model, args, (6, 0))
    r_hat = normalised(data)
    kept = complete_pairs(select_prompt_pairs(r_hat, data.prompts, 0.0))
    assert len(kept) >= 4 and (kept[::2, 1] % 2 != kept[1::2, 1] % 2).any(), "one would be split"
    shares = [sample(model, args, (6, 0), rank=rank, world=2) for rank in range(2)]
    randomise_lora(model.unet, 0.05, seed=7)
    want, _ = update_gradient(model, data, r_hat, kept, (6, 0), args)
    model.unet.zero_grad(set_to_none=True)
    assert sorted(p for s in shares for p in s.mine.tolist()) == list(range(14))
    for mine in shares:
        train.update_gradient(model, mine, r_hat, kept, (6, 0), args)
    assert close(gradient(model), want, 1e-3)


def test_gradients_of_two_processes_add_up(model):
    """Each over its own roots; one that owns none of the update adds nothing."""
    args = settings("--branches", 3)
    data = sample(model, args)
    r_hat = normalised(data)
    kept = select_pairs(r_hat, 0.0)
    want, sums = update_gradient(model, data, r_hat, kept, (4, 0), args)
    model.unet.zero_grad(set_to_none=True)
    items = 0
    for rank in range(2):
        mine = sample(model, args, rank=rank, world=2)
        items += train.update_gradient(model, mine, r_hat, kept, (4, 0), args)["items"]
    assert close(gradient(model), want, 1e-3) and items == sums["items"]
    alone = kept[kept[:, 1] == 0]  # owned by rank 0
    model.unet.zero_grad(set_to_none=True)
    assert train.update_gradient(model, mine, r_hat, alone, (4, 0), args)["items"] == 0
    assert all(p.grad is None for p in lora_parameters(model.unet).values())
    assert train.kl_to_base(model, mine, alone, (4, 0), 0, args) == 0


@torch.no_grad()
def test_kl_to_base(model):
    """In nats: the KL of whole states (sum over D), mean over the states; 0 without LoRA."""
    args = settings("--branches", 3)
    data = sample(model, args)
    kept = torch.tensor([[1, 1, 2]])  # a single trajectory, so each state is its own row
    got = train.kl_to_base(model, data, kept, (4, 0), 0, args)
    steps, now, base = [4, 3, 2, 1], [], []
    for j, t in enumerate(steps):
        x, zeros = data.states[1, 2, j][None], torch.zeros(4, 8, 8)
        std = model.pipe.scheduler._get_variance(*(model.pipe.scheduler.timesteps[6 - t] - s
                                                   for s in (0, 166))) ** 0.5  # fmt: skip
        now.append(Normal(plain_step(model, x, t, data.prompts[1], zeros), std))
        with lora_off(model.unet):
            base.append(Normal(plain_step(model, x, t, data.prompts[1], zeros), std))
    want = sum(kl_divergence(a, b).sum().item() for a, b in zip(now, base)) / 4
    assert got == pytest.approx(want, rel=1e-3) and got > 0
    with lora_off(model.unet):
        for p in lora_parameters(model.unet).values():
            p.zero_()
    assert train.kl_to_base(model, data, kept, (4, 0), 0, args) == 0


def test_train_round_steps_once_an_update_and_skips_what_is_not_finite(model, monkeypatch):
    args = settings("--branches", 3, "--epochs", 3, "--update-size", 2, "--lr", 1e-3)
    data = sample(model, args)
    r_hat = normalised(data)
    kept = select_pairs(r_hat, 0.0)
    parameters = list(lora_parameters(model.unet).values())
    optimizer = torch.optim.AdamW(parameters, lr=args.lr)
    log = train.train_round(model, data, r_hat, kept, (4, 0), optimizer, 0, args)
    assert sum(log["trajectories_per_update"]) == 3 * len(kept), "each epoch trains on all"
    assert log["updates"] == len(log["trajectories_per_update"]) >= 6
    assert optimizer.state[parameters[0]]["step"] == log["updates"]
    assert log["first_max_log_ratio"] <= 1e-6
    assert log["first_ratio"] == pytest.approx(1, abs=1e-6)
    assert log["grad_norm"] > 0 and log["clip_fraction"] > 0

    real = train.update_gradient

    def broken(*rest):
        sums = real(*rest)
        parameters[0].grad[0, 0] = float("nan")
        return sums

    monkeypatch.setattr(train, "update_gradient", broken)
    before = [p.detach().clone() for p in parameters]
    args.epochs, args.update_size = 1, 100
    log = train.train_round(model, data, r_hat, kept, (4, 0), optimizer, 0, args)
    assert (log["updates"], log["skipped_updates"]) == (0, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, parameters))


def test_hopeless_runs_stop(model):
    """Five skipped updates in a row, over rounds; what is NaN is logged as such."""
    args = settings("--branches", 3, "--epochs", 2, "--update-size", 100)
    data = sample(model, args)
    r_hat, kept = normalised(data), select_pairs(normalised(data), 0.0)
    parameters = list(lora_parameters(model.unet).values())
    optimizer, in_a_row = torch.optim.SGD(parameters, lr=1.0), 0
    data.log_p_old[:] = math.nan
    for _ in range(2):
        log = train.train_round(model, data, r_hat, kept, (4, 0), optimizer, 0, args, in_a_row)
        in_a_row = log["skipped_in_a_row"]
    assert in_a_row == 4 and log["updates"] == 0 and math.isnan(log["first_max_log_ratio"])
    with pytest.raises(runs.Stop, match="5 updates in a row"):
        train.train_round(model, data, r_hat, kept, (4, 0), optimizer, 0, args, in_a_row)
    good = sample(model, args)
    log = train.train_round(model, good, r_hat, kept, (4, 0), optimizer, 0, args, in_a_row)
    assert log["skipped_in_a_row"] == 0 and log["updates"] == 2


@pytest.mark.parametrize("algo", ["ddpo", "dpok", "dpo"])
def test_fp16_gradients_do_not_vanish(random_folder, algo):
    """At Stable Diffusion's D and update size an element's gradient is below fp16's smallest number.

    A small advantage (a small beta) stands for D and for the rest of an update.
    """
    got = {}
    for precision in ("fp32", "fp16"):
        model = runs.load_model(load_args(random_folder, precision, 6), torch.device("cpu"))
        inject_lora(model.unet)
        randomise_lora(model.unet, 0.05)
        args = settings("--branches", 3, "--algo", algo, "--kl-beta", 1e-5)
        data = sample(model, args)
        r_hat = 1e-4 * normalised(data)
        kept = complete_pairs(select_pairs(r_hat, 0.0))
        args.dpo_beta = 2e-4
        scale = runs.loss_scale(model, args)
        parameters = list(lora_parameters(model.unet).values())
        train.update_gradient(model, data, r_hat, kept, (4, 0), args)
        runs.sum_gradients(parameters, model.device, scale)
        got[precision] = gradient(model)
    assert close(got["fp16"], got["fp32"], 0.1)


def test_gradient_norm_is_clipped(model):
    """With SGD of step 1 the weights move by exactly the clipped gradient."""
    args = settings("--branches", 3, "--epochs", 1, "--update-size", 100, "--max-grad-norm", 1e-3)
    data = sample(model, args)
    r_hat = normalised(data)
    parameters = list(lora_parameters(model.unet).values())
    before = torch.cat([p.detach().flatten().clone() for p in parameters])
    log = train.train_round(model, data, r_hat, select_pairs(r_hat, 0.0), (4, 0),
                            torch.optim.SGD(parameters, lr=1.0), 0, args)  # fmt: skip
    moved = torch.cat([p.detach().flatten() for p in parameters]) - before
    assert log["grad_norm"] > 1e-3 and moved.norm().item() == pytest.approx(1e-3, rel=1e-2)


def test_each_stream_of_a_round_has_its_own_key(model, monkeypatch):
    """x_T, the shared path, each branch, its rest, each epoch's order: no key is used twice."""
    keys, args = [], settings("--branches", 3, "--epochs", 3, "--lr", 1e-3)

    def record(*key):
        keys.append(key)
        return keyed_generator(*key)

    monkeypatch.setattr(train, "keyed_generator", record)
    data = sample(model, args, (5, 2))
    assert len(keys) == 1 + 4 * (2 + 3 + 3)
    optimizer = torch.optim.SGD(lora_parameters(model.unet).values(), lr=0.0)
    r_hat = normalised(data)
    train.train_round(model, data, r_hat, select_pairs(r_hat, 0.9), (5, 2), optimizer, 0, args)
    assert len(keys) == 1 + 4 * (2 + 3 + 3) + 3
    assert len(set(keys)) == len(keys) and {key[:2] for key in keys} == {(0, 0)}


def test_updates_start_from_a_clean_gradient(model):
    """Weights that stand still: the mean norm of two epochs is that of one."""
    args = settings("--branches", 3, "--update-size", 100, "--max-grad-norm", 1e9)
    data = sample(model, args)
    r_hat, norms = normalised(data), []
    for args.epochs in (1, 2):
        optimizer = torch.optim.SGD(lora_parameters(model.unet).values(), lr=0.0)
        log = train.train_round(model, data, r_hat, select_pairs(r_hat, 0.5), (4, 0), optimizer, 0,
                                args)  # fmt: skip
        norms.append(log["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-4) and norms[0] > 0


# ---------------------------------------------------------------- the command


@pytest.fixture
def command(random_folder, tmp_path, monkeypatch):
    """`train.main` on the random folder with brightness as reward; returns folder, metrics."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("[train]\na cat\na dog\n[unseen]\na bird\n", encoding="utf-8")
    base = ["--model", random_folder, "--device", "cpu", "--prompts", prompts, "--T", 6, "--tau0",
            4, "--queries", 12, "--branches", 3, "--sample-batch", 12, "--micro-batch", 12,
            "--decode-batch", 12, "--lr", 1e-3, "--clip-range", 1e-2, "--update-size", 4]

    def go(out, *flags, reward=brightness, resume=False):
        checked = rewards.checked(reward, "brightness")
        monkeypatch.setattr(train, "load_reward", lambda *a, **k: checked)
        argv = ["--resume", out] if resume else [*base, "--out", out, *flags]
        folder = train.main([str(a) for a in argv])
        return folder, metrics(folder)

    return go


def metrics(folder):
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_a_run_raises_its_reward(command, tmp_path, capsys):
    """Ten rounds of the real command: files, metrics, tau, and a reward that rises by far."""
    folder, lines = command(tmp_path / "run", "--rounds", 10, "--queries", 32, "--branches", 4,
                            "--lr", 2e-2, "--grid-every", 4, "--eval-images", 6, "--update-size",
                            8, "--micro-batch", 48, "--sample-batch", 48)  # fmt: skip
    assert {p.name for p in folder.rglob("*") if p.is_file()} == {
        "config.json", "metrics.jsonl", "checkpoint.safetensors", "before.json", "after.json",
        "pytorch_lora_weights.safetensors", "webui_lora.safetensors", "README.md",
        "summary.json", "before-train.png", "after-train.png",
        "before-unseen.png", "after-unseen.png", "round0004-train.png", "round0008-train.png"}
    assert [line["round"] for line in lines] == list(range(1, 11))
    assert [line["tau"] for line in lines] == [4, 4, 4, 4, 5, 5, 5, 6, 6, 6]
    assert [line["queries"] for line in lines] == [32 * i for i in range(1, 11)]
    for line in lines:
        assert line["first_max_log_ratio"] <= 1e-4 and abs(line["first_ratio"] - 1) < 1e-5
        assert line["skipped_updates"] == 0 < line["updates"] and line["of"] == 32
        assert 0 < line["kept"] <= 16 and line["reward_std"] > 0 and line["kl_to_base"] >= 0
        assert sum(line["trajectories_per_update"]) == 2 * line["kept"]
        assert set(line["seconds"]) == {"sampling", "reward", "training"}
        assert {"reward_mean", "clip_fraction", "grad_norm", "spread_within_prompt"} <= set(line)
    assert lines[-1]["kl_to_base"] > lines[0]["kl_to_base"]
    summary = json.loads((folder / "summary.json").read_text())
    for name in ("train_score", "unseen_score"):
        assert summary[name]["gain"] > 3 * summary[name]["error"] > 0, summary
    before, after = (json.loads((folder / f"{w}.json").read_text()) for w in ("before", "after"))
    assert len(before["train"]["score"]) == 12 and len(before["unseen"]["score"]) == 6
    gain = sum(after["train"]["score"]) / 12 - sum(before["train"]["score"]) / 12
    assert summary["train_score"]["gain"] == pytest.approx(gain)
    out = capsys.readouterr().out
    assert "Scores before and after" in out and out.startswith("Training ")


@pytest.mark.parametrize("flags", [
    ("--algo", "dpo"), ("--algo", "dpok"), ("--algo", "pg", "--no-bs", "--no-bpt"),
    ("--algo", "dpo", "--no-bs"), ("--interval", "forward"),
])  # fmt: skip
def test_other_methods_run(command, tmp_path, flags):
    folder, lines = command(tmp_path / "run", "--rounds", 2, "--threshold", 0.1, *flags)
    assert len(lines) == 2 and any(line["updates"] > 0 for line in lines)
    assert all(line.get("first_max_log_ratio", 0) <= 1e-4 for line in lines)
    assert [line["tau"] for line in lines] == ([6, 6] if "--no-bpt" in flags else [4, 6])
    if "dpo" in flags:
        assert all(line["kept"] % 2 == 0 for line in lines)


def test_the_intervals_of_a_run(command, tmp_path, monkeypatch):
    """tau grows from tau0 to T, --skip-last is left out, --interval turns it round (Eq. 3)."""
    seen, real = [], train.sample_round

    def record(model, reward, prompts, i, interval, *rest):
        seen.append(interval)
        return real(model, reward, prompts, i, interval, *rest)

    monkeypatch.setattr(train, "sample_round", record)
    command(tmp_path / "a", "--rounds", 3, "--skip-last", 1)
    command(tmp_path / "b", "--rounds", 3, "--skip-last", 1, "--interval", "forward")
    assert seen == [(4, 1), (5, 1), (6, 1), (6, 2), (6, 1), (6, 1)]


def test_empty_selection_skips_the_update_and_says_so(command, tmp_path, capsys):
    """Trap 5: the run goes on, the weights stay as they are."""
    folder, lines = command(tmp_path / "run", "--rounds", 2, "--threshold", 4.9)
    captured = capsys.readouterr()
    text = captured.out + captured.err
    assert "round 1: no branch passed --threshold 4.9" in text and "round 2: no branch" in text
    assert [(line["kept"], line["updates"]) for line in lines] == [(0, 0), (0, 0)]
    before, after = (json.loads((folder / f"{w}.json").read_text()) for w in ("before", "after"))
    assert before == after


def test_killed_and_resumed_equals_uninterrupted(command, tmp_path, monkeypatch):
    """The same LoRA bytes, and the same metrics but for the seconds (trap 8)."""
    straight, want = command(tmp_path / "straight", "--rounds", 4)
    files = ("pytorch_lora_weights.safetensors", "before.json", "after.json", "summary.json")
    save = runs.save_checkpoint
    moments = {"before the first round": 0, "in the reward": 2, "before the checkpoint": 3}
    for moment, rounds_told in moments.items():
        killed = tmp_path / moment.replace(" ", "_")

        def done(killed=killed):
            return len(metrics(killed)) if (killed / "metrics.jsonl").exists() else 0

        def reward(images, prompts, moment=moment, done=done):
            if moment != "before the checkpoint" and done() == moments[moment]:
                raise KeyboardInterrupt
            return brightness(images, prompts)

        def no_save(folder, rounds, *rest, moment=moment):
            if rounds == 3 and moment == "before the checkpoint":
                raise KeyboardInterrupt  # metrics hold three rounds, the checkpoint two
            save(folder, rounds, *rest)

        monkeypatch.setattr(runs, "save_checkpoint", no_save)
        with pytest.raises(SystemExit) as stop:
            command(killed, "--rounds", 4, reward=reward)
        assert stop.value.code == 130 and done() == rounds_told
        monkeypatch.setattr(runs, "save_checkpoint", save)
        folder, lines = command(killed, resume=True)
        told = [{k: v for k, v in line.items() if k != "seconds"} for line in lines]
        assert told == [{k: v for k, v in line.items() if k != "seconds"} for line in want]
        assert str(folder) == str(killed)
        for name in files:
            assert (killed / name).read_bytes() == (straight / name).read_bytes(), name
        (meta, tensors), (other, others) = map(checkpoint, (killed, straight))
        assert meta == other and tensors.keys() == others.keys()
        assert all(torch.equal(tensors[k], others[k]) for k in tensors)


def checkpoint(folder):
    with safe_open(folder / "checkpoint.safetensors", "pt") as file:
        return file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
