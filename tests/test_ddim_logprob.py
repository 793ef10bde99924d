"""One DDIM step against torch.distributions and diffusers; the policy's walks, step by step."""

import pytest
import torch
from conftest import count_unet_samples, make_small, randomise_lora
from diffusers import DDIMScheduler
from torch.distributions import Normal, kl_divergence

from ddim_logprob import ddim_mean, gaussian_kl, guided_prediction, keyed_generator, keyed_noise
from ddim_logprob import log_prob, make_schedule, predict_x_0
from lora import inject_lora

PROMPTS = ["a cat", "a dog", "the sea"]


def scheduler(**changes):
    """SD 1.4's scheduler, with changes."""
    config = dict(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return DDIMScheduler(**{**config, **changes})


def noise(shape, *key):
    return torch.randn(shape, generator=keyed_generator(*key))


def keys(count, *words):
    return [(*words, n) for n in range(count)]


def same(a, b):
    torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


# ---------------------------------------------------------------- the Gaussian of Eq. 1


SIGMAS = (0.02, 0.3, 1.0, 2.5)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_log_prob_is_the_mean_of_normal_log_probs(sigma):
    x, mu, sigma = noise((5, 4, 3, 2), "x"), noise((5, 4, 3, 2), "mu"), torch.tensor(sigma)
    want = Normal(mu, sigma).log_prob(x).flatten(1).mean(1)
    assert log_prob(x, mu, sigma).shape == (5,)
    torch.testing.assert_close(log_prob(x, mu, sigma), want)


def test_log_prob_is_a_mean_and_not_a_sum():
    """Twice as many dimensions of the same kind: the same log p, so the same ratio."""
    x, mu, sigma = noise((3, 4, 2, 2), "x"), noise((3, 4, 2, 2), "mu"), torch.tensor(0.5)
    twice = log_prob(x.repeat(1, 2, 1, 1), mu.repeat(1, 2, 1, 1), sigma)
    torch.testing.assert_close(twice, log_prob(x, mu, sigma))


@pytest.mark.parametrize("sigma", SIGMAS)
def test_log_prob_gradient(sigma):
    """d log p / d mu = (x - mu) / sigma^2, averaged over D."""
    x, mu = noise((3, 4, 2, 2), "x"), noise((3, 4, 2, 2), "mu").requires_grad_()
    log_prob(x, mu, torch.tensor(sigma)).sum().backward()
    torch.testing.assert_close(mu.grad, (x - mu.detach()) / sigma**2 / 16)


@pytest.mark.parametrize("sigma", SIGMAS)
def test_gaussian_kl(sigma):
    mu, ref, sigma = noise((5, 4, 3, 2), "mu"), noise((5, 4, 3, 2), "ref"), torch.tensor(sigma)
    want = kl_divergence(Normal(mu, sigma), Normal(ref, sigma)).flatten(1).mean(1)
    torch.testing.assert_close(gaussian_kl(mu, ref, sigma), want)
    assert gaussian_kl(mu, mu, sigma).eq(0).all()


# ---------------------------------------------------------------- the step and its noise levels


@pytest.mark.parametrize("spacing, T", [("leading", 6), ("leading", 20), ("trailing", 20)])
def test_schedule_is_the_schedulers(spacing, T):
    theirs = scheduler(timestep_spacing=spacing)
    schedule = make_schedule(theirs, T)
    assert schedule.alpha_bar.shape == schedule.sigma.shape == schedule.timestep.shape == (T + 1,)
    for t in range(1, T + 1):
        timestep = int(theirs.timesteps[T - t])
        variance = theirs._get_variance(timestep, timestep - 1000 // T)
        assert schedule.timestep[t] == timestep
        assert schedule.sigma[t].item() == pytest.approx(variance.item() ** 0.5, rel=1e-4)
        assert schedule.alpha_bar[t].item() == pytest.approx(theirs.alphas_cumprod[timestep].item())
    assert schedule.alpha_bar[0].item() == pytest.approx(theirs.alphas_cumprod[0].item())
    assert schedule.alpha_bar.diff().lt(0).all(), "more noise at a larger t"
    half = make_schedule(theirs, T, eta=0.5)
    torch.testing.assert_close(half.sigma, schedule.sigma / 2)


@pytest.mark.parametrize("eta", [1.0, 0.4])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_step_is_diffusers_step(prediction_type, eta):
    """x_0, mu, sigma and log p at every t of 20; x and prediction of a batch each their own."""
    theirs = scheduler(prediction_type=prediction_type)
    schedule = make_schedule(theirs, 20, eta)
    for t in range(1, 21):
        x, prediction, z = noise((3, 3, 4, 8, 8), t)
        timestep = theirs.timesteps[20 - t]
        step = dict(timestep=timestep, sample=x, eta=eta)
        mean = theirs.step(prediction, variance_noise=torch.zeros_like(x), **step)
        x_prev = theirs.step(prediction, variance_noise=z, **step).prev_sample
        x_0, eps = predict_x_0(schedule, prediction, x, t)
        torch.testing.assert_close(x_0, mean.pred_original_sample, atol=1e-4, rtol=1e-4)
        noisy = theirs.add_noise(x_0, eps, timestep[None])
        torch.testing.assert_close(noisy, x, atol=1e-4, rtol=1e-4)
        mu, sigma = ddim_mean(schedule, prediction, x, t)
        torch.testing.assert_close(mu, mean.prev_sample, atol=1e-4, rtol=1e-4)
        std = eta * theirs._get_variance(timestep, timestep - 50) ** 0.5
        assert sigma.shape == () and sigma.dtype == mu.dtype == torch.float32
        assert sigma.item() == pytest.approx(std.item(), rel=1e-4)
        torch.testing.assert_close(mu + sigma * z, x_prev, atol=1e-4, rtol=1e-4)
        want = Normal(mean.prev_sample.double(), std.double()).log_prob(x_prev.double())
        got = log_prob(x_prev, mu, sigma)
        torch.testing.assert_close(got, want.mean((1, 2, 3)).float(), atol=2e-3, rtol=1e-3)


def test_noise_level_that_rounds_below_zero():
    """From pure noise, alpha_bar_T = 0, 1 - alpha_bar - sigma^2 is 0 but for float32's rounding.

    There a_t is drawn around sqrt(alpha_bar_{t-1}) x_0 alone, x_0 = -v.
    """
    zero_snr = dict(rescale_betas_zero_snr=True, timestep_spacing="trailing", steps_offset=0)
    schedule = make_schedule(scheduler(**zero_snr, prediction_type="v_prediction"), 20)
    a_prev, sigma = schedule.alpha_bar[19].float(), schedule.sigma[20].float()
    assert schedule.alpha_bar[20] == 0 and 1 - a_prev - sigma**2 < 0
    x, v = noise((2, 3, 4, 8, 8), "x and v")
    mu, _ = ddim_mean(schedule, v, x, 20)
    torch.testing.assert_close(mu, -a_prev.sqrt() * v)


@pytest.mark.parametrize(
    "changes, eta, message",
    [
        ({"steps_offset": 0}, 1.0, "steps_offset"),
        ({"steps_offset": 0, "set_alpha_to_one": True}, 1.0, "steps_offset"),
        ({}, 0.0, "eta"),
        ({"clip_sample": True}, 1.0, "clip_sample"),
        ({"thresholding": True}, 1.0, "thresholding"),
        ({"timestep_spacing": "linspace"}, 1.0, "linspace"),
        ({"prediction_type": "sample"}, 1.0, "sample"),
    ],
)
def test_schedules_that_are_no_gaussian_chain_are_refused(changes, eta, message):
    with pytest.raises(ValueError, match=message):
        make_schedule(scheduler(**changes), 20, eta)


# ---------------------------------------------------------------- noise


def test_keyed_generators():
    """Equal keys draw equal noise, other keys other noise, whatever else is in the batch."""
    names = [(0, 1, 2, 0), (0, 1, 2, 1), (0, 1, 0, 1), (0, 0, 2, 1), (1, 1, 2, 1)]
    names += [(0, 1, 2, "x_T"), (0, 1, 21), (0, 12, 1), (12, 0, 1)]
    generators = lambda names: [keyed_generator(*name) for name in names]
    drawn = keyed_noise(generators(names), (4, 8, 8), "cpu")
    again = keyed_noise(generators(names[::-1]), (4, 8, 8), "cpu").flip(0)
    assert drawn.shape == (9, 4, 8, 8) and torch.equal(drawn, again)
    correlation = torch.corrcoef(drawn.flatten(1)) - torch.eye(len(names))
    assert correlation.abs().max() < 0.35  # 0.0625 is one standard deviation
    assert abs(drawn.mean()) < 0.1 and abs(drawn.std() - 1) < 0.07
    one = keyed_generator(*names[0])
    first, second = (keyed_noise([one], (4, 8, 8), "cpu") for _ in range(2))
    assert torch.equal(first[0], drawn[0]) and not torch.equal(first, second)


# ---------------------------------------------------------------- guidance


@pytest.fixture(scope="module")
def loaded():
    """The random pipeline, T 6, with LoRA weights that are not zero."""
    small = make_small()
    inject_lora(small.policy.unet)
    randomise_lora(small.policy.unet, 0.05)
    return small


@pytest.fixture
def policy(loaded):
    """Its policy; what a test changes of its settings is set back."""
    loaded.policy.guidance, loaded.policy.sample_batch = 5.0, 6
    return loaded.policy


@torch.no_grad()
def test_guidance(policy):
    """uncond + g (cond - uncond), by separate calls of one sample each."""
    unet, schedule = policy.unet, policy.schedule
    x, cond, uncond = noise((3, 4, 8, 8), "x"), policy.embed(PROMPTS), policy.embed([""])
    guided = lambda t, g: guided_prediction(unet, schedule, x, t, cond, uncond, g)
    for t in (6, 1, 3):
        with count_unet_samples(unet) as samples:
            got = guided(t, 5.0)
            assert samples == [6], "one call for both halves"
            only_cond = guided(t, 1)
            assert samples == [6, 3], "guidance 1 needs no unconditional half"
        none, half = guided(t, 0), guided(t, 0.5)
        timestep = schedule.timestep[t]
        for j in range(3):
            texts = (cond[j : j + 1], uncond)
            c, u = (unet(x[j : j + 1], timestep, text).sample for text in texts)
            torch.testing.assert_close(got[j], (5 * c - 4 * u)[0], atol=1e-4, rtol=1e-3)
            torch.testing.assert_close(only_cond[j], c[0], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(none[j], u[0], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(half[j], (c + u)[0] / 2, atol=1e-5, rtol=1e-4)
            assert (c - u).abs().max() > 1e-3
        assert not torch.allclose(got, only_cond, atol=1e-3)


class Echo(torch.nn.Module):
    """A UNet whose prediction is its text: so the gradient tells what each half weighs."""

    dtype = torch.float32

    def forward(self, x, timestep, text, return_dict):
        return (text.mean((1, 2))[:, None, None, None].expand_as(x),)


@pytest.mark.parametrize("guidance", [0.0, 0.5, 5.0, 7.5])
def test_the_gradient_weighs_the_halves_of_the_guidance_by_g_and_one_minus_g(guidance):
    x, schedule = torch.zeros(3, 4, 2, 2), make_schedule(scheduler(), 6)
    cond, uncond = (torch.ones(n, 1, 1, requires_grad=True) for n in (3, 1))
    out = guided_prediction(Echo(), schedule, x, 2, cond, uncond, guidance)
    out.sum().backward()
    assert cond.grad.flatten().tolist() == pytest.approx([16 * guidance] * 3)
    assert uncond.grad.flatten().tolist() == pytest.approx([3 * 16 * (1 - guidance)])


def test_guidance_of_a_half_precision_unet_is_float32():
    """The difference of the halves is small, and guidance makes its rounding larger."""
    x, schedule = torch.zeros(1, 4, 2, 2), make_schedule(scheduler(), 6)
    cond, uncond = torch.full((2, 1, 1, 1), 1.0).bfloat16()
    cond += 2**-7
    out = guided_prediction(Echo(), schedule, x, 2, cond, uncond, 7.3)
    assert out.dtype == torch.float32
    assert out.flatten().tolist() == pytest.approx([1 + 7.3 / 128] * 16, rel=1e-6)
    assert guided_prediction(Echo(), schedule, x, 2, cond, uncond, 1).dtype == torch.float32


def test_the_gradient_of_the_policy_flows_through_both_halves(policy):
    """d mu / d LoRA by the chain rule over two calls of the UNet, each of one half."""
    x, direction, t = noise((2, 4, 8, 8), "x"), noise((2, 4, 8, 8), "direction"), 3
    lora = [p for p in policy.unet.parameters() if p.requires_grad]
    mu, _ = policy(x, t, PROMPTS[:2])
    got = torch.autograd.grad((mu * direction).sum(), lora)
    prediction = torch.zeros_like(x).requires_grad_()  # mu is linear in it
    (slope,) = torch.autograd.grad(
        (ddim_mean(policy.schedule, prediction, x, t)[0] * direction).sum(), prediction
    )
    want = [torch.zeros_like(v) for v in lora]
    for factor, prompts in ((5.0, PROMPTS[:2]), (-4.0, ["", ""])):
        out = policy.unet(x, policy.schedule.timestep[t], policy.embed(prompts)).sample
        for v, part in zip(want, torch.autograd.grad((out * slope).sum(), lora)):
            v += factor * part
    flat = [torch.cat([v.flatten() for v in vs]) for vs in (got, want)]
    assert (flat[0] - flat[1]).norm() < 1e-3 * flat[1].norm() and flat[1].norm() > 0


# ---------------------------------------------------------------- the policy and its walks


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@torch.no_grad()
def test_the_policy_is_diffusers_step(prediction_type):
    """Mean and standard deviation of Eq. 1, at three times; guidance below 1 is guidance, too."""
    small = make_small(prediction_type=prediction_type)
    scheduler, x, cpu = small.pipe.scheduler, noise((3, 4, 8, 8), "x"), torch.device("cpu")
    text = [small.pipe.encode_prompt(p, cpu, 1, False)[0] for p in ("", *PROMPTS)]
    uncond, cond = text[0].expand(3, -1, -1), torch.cat(text[1:])
    for guidance in (1.0, 0.5, 5.0):
        small.policy.guidance = guidance
        for t in (6, 4, 1):
            timestep = scheduler.timesteps[6 - t]
            u, c = (small.policy.unet(x, timestep, e).sample for e in (uncond, cond))
            settings = dict(eta=1.0, variance_noise=torch.zeros_like(x))
            want = scheduler.step(u + guidance * (c - u), timestep, x, **settings)[0]
            mu, sigma = small.policy(x, t, PROMPTS)
            same(mu, want)
            variance = scheduler._get_variance(timestep, timestep - 1000 // 6).item()
            assert sigma.item() == pytest.approx(variance**0.5, rel=1e-4)


def test_x_T_has_a_key_each(policy):
    x = policy.noise([(1, 2), (1, 3), (1, 2)])
    assert x.shape == (3, 4, 8, 8) and torch.equal(x[0], noise((4, 8, 8), 1, 2))
    assert torch.equal(x[0], x[2]) and (x[0] - x[1]).abs().max() > 0.1
    assert policy.noise([]).shape == (0, 4, 8, 8)


@torch.no_grad()
def plain_path(policy, x, start, stop, prompt, generator):
    """One latent (1, C, h, w) by the policy alone: its states x_start..x_stop and log p."""
    states, log_ps = [x[0]], []
    for t in range(start, stop, -1):
        mu, sigma = policy(x, t, [prompt])
        x = mu + sigma * torch.randn(policy.latent_shape, generator=generator)
        states.append(x[0])
        log_ps.append(Normal(mu, sigma).log_prob(x).mean())
    return torch.stack(states), torch.stack(log_ps)


@torch.no_grad()
def test_denoising_is_a_plain_loop_of_diffusers_steps(loaded, policy):
    """T..0 of one latent against a loop over the scheduler's own timesteps and `step`."""
    scheduler, x, g = loaded.pipe.scheduler, noise((1, 4, 8, 8), "x"), keyed_generator("k")
    got = policy.denoise(x, 6, 0, ["a cat"], [("k",)])
    uncond, cond = policy.embed([""]), policy.embed(["a cat"])
    for timestep in scheduler.timesteps:
        u, c = (policy.unet(x, timestep, text).sample for text in (uncond, cond))
        z = torch.randn(4, 8, 8, generator=g)[None]
        x = scheduler.step(u + 5 * (c - u), timestep, x, eta=1.0, variance_noise=z)[0]
    same(got, x)


@pytest.mark.parametrize("batch", [1, 2, 6])
def test_denoising_is_the_policy_step_by_step(policy, batch):
    """With the keys' noise, whatever the batches; without an x, x_T comes first out of each key."""
    policy.sample_batch = batch
    x = policy.noise(keys(3, "x_T"))
    with count_unet_samples(policy.unet) as samples:
        got = policy.denoise(x, 6, 3, PROMPTS, keys(3, "path"))
    assert max(samples) <= 2 * batch and sum(samples) == 2 * 3 * 3
    drawn = policy.denoise(None, 6, 3, PROMPTS, keys(3, "path"))
    assert got.shape == drawn.shape == (3, 4, 8, 8) and got.dtype == torch.float32
    for p in range(3):
        generator = keyed_generator("path", p)
        same(got[p], plain_path(policy, x[p : p + 1], 6, 3, PROMPTS[p], generator)[0][-1])
        generator = keyed_generator("path", p)
        x_T = torch.randn(1, 4, 8, 8, generator=generator)
        same(drawn[p], plain_path(policy, x_T, 6, 3, PROMPTS[p], generator)[0][-1])


def test_denoising_nothing(policy):
    """No root: no states; no step (tau = T): the states themselves."""
    x = policy.noise(keys(3, "x_T"))
    assert policy.denoise(None, 6, 0, [], []).shape == (0, 4, 8, 8)
    assert policy.denoise(x[:0], 6, 0, [], []).shape == (0, 4, 8, 8)
    with count_unet_samples(policy.unet) as samples:
        assert torch.equal(policy.denoise(x, 3, 3, PROMPTS, keys(3, "path")), x)
    assert not samples


@pytest.mark.parametrize("batch", [1, 4, 9])
def test_branches_start_at_one_state_and_go_their_own_ways(policy, batch):
    """States and log p of each, whatever the batches; the first step is one UNet call a root."""
    policy.sample_batch = batch
    x_tau = policy.noise(keys(3, "x_tau"))
    branch_keys = [keys(2, "branch", p) for p in range(3)]
    with count_unet_samples(policy.unet) as samples:
        x, log_p = policy.branch(x_tau, 4, 1, PROMPTS, branch_keys)
    assert sum(samples) == 2 * 3 * (1 + 2 * 2) and max(samples) <= 2 * max(batch, 2)
    assert x.shape == (3, 2, 4, 4, 8, 8) and log_p.shape == (3, 2, 3)
    assert x.dtype == log_p.dtype == torch.float32 and not x.requires_grad
    for p in range(3):
        assert torch.equal(x[p, 0, 0], x_tau[p]) and torch.equal(x[p, 1, 0], x_tau[p])
        assert (x[p, 0, 1] - x[p, 1, 1]).abs().max() > 0.01, "branches differ at once"
        for k in range(2):
            generator = keyed_generator("branch", p, k)
            path = plain_path(policy, x_tau[p : p + 1], 4, 1, PROMPTS[p], generator)
            same(x[p, k], path[0])
            same(log_p[p, k], path[1])
    x, log_p = policy.branch(x_tau[:0], 4, 1, [], [])
    assert x.shape == (0, 1, 4, 4, 8, 8) and len(log_p) == 0


@pytest.mark.parametrize("guidance, halves", [(5.0, 2), (1, 1)])
@pytest.mark.parametrize("K", [1, 3])
def test_unet_calls_of_a_root(policy, K, guidance, halves):
    """(T - tau) + 1 + K (tau - 1) with prefix sharing, T 6, tau 4."""
    policy.guidance = guidance
    with count_unet_samples(policy.unet) as samples:
        x_tau = policy.denoise(None, 6, 4, PROMPTS[:2], keys(2, "x_T"))
        policy.branch(x_tau, 4, 0, PROMPTS[:2], [keys(K, p) for p in range(2)])
    assert sum(samples) == halves * 2 * (2 + 1 + K * 3)


def test_the_stored_log_prob_is_the_policys_at_the_same_shapes(policy):
    """Bit for bit, with a state a call: so a ratio is exactly 1 before the first update."""
    policy.sample_batch = 1
    x, old = policy.branch(policy.noise([("x",)]), 3, 0, ["a cat"], [[("branch",)]])
    for s, t in enumerate((3, 2, 1)):
        now = log_prob(x[:, 0, s + 1], *policy(x[:, 0, s], t, ["a cat"]))
        assert now.requires_grad and torch.equal(now, old[:, 0, s])


def test_latents_stay_float32_over_a_half_precision_unet():
    """Rounding x_{t-1} after log p was taken would make the first ratio another number than 1."""
    small = make_small(sample_batch=1)
    inject_lora(small.policy.unet.to(torch.bfloat16))
    randomise_lora(small.policy.unet, 0.05)
    policy = small.policy
    x, old = policy.branch(policy.noise([("x",)]), 3, 0, ["a cat"], [[("branch",)]])
    assert x.dtype == old.dtype == torch.float32
    assert not torch.equal(x[0, 0, 1], x[0, 0, 1].bfloat16().float())
    for s, t in enumerate((3, 2, 1)):
        mu, sigma = policy(x[:, 0, s], t, ["a cat"])
        assert mu.dtype == torch.float32
        assert torch.equal(log_prob(x[:, 0, s + 1], mu, sigma), old[:, 0, s])


def test_states_of_another_precision_are_refused(policy):
    with pytest.raises(AssertionError, match="float32"):
        policy.branch(noise((1, 4, 8, 8), "x").double(), 3, 0, ["a cat"], [[("k",)]])
