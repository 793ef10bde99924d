"""One DDIM step against torch.distributions and diffusers; the denoising loop against itself."""

import pytest
import torch
from conftest import count_unet_samples, make_small
from diffusers import DDIMScheduler
from torch.distributions import Normal, kl_divergence

from ddim_logprob import ddim_mean, ddim_step, denoise, gaussian_kl, guided_prediction
from ddim_logprob import keyed_generator, keyed_noise, log_prob, make_schedule, step_factor


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


def generators(*keys):
    return [keyed_generator(*key) for key in keys]


# ---------------------------------------------------------------- the Gaussian of Eq. 1


def test_log_prob_is_the_mean_of_normal_log_probs():
    x, mu, sigma = torch.randn(5, 4, 3, 2), torch.randn(5, 4, 3, 2), torch.rand(5, 1, 1, 1) + 0.02
    want = Normal(mu, sigma).log_prob(x).flatten(1).mean(1)
    assert log_prob(x, mu, sigma).shape == (5,)
    torch.testing.assert_close(log_prob(x, mu, sigma), want)


def test_log_prob_gradient():
    """d log p / d mu = (x - mu) / sigma^2, averaged over D."""
    x, sigma = torch.randn(3, 4, 2, 2), torch.rand(3, 1, 1, 1) + 0.1
    mu = torch.randn(3, 4, 2, 2, requires_grad=True)
    log_prob(x, mu, sigma).sum().backward()
    torch.testing.assert_close(mu.grad, (x - mu.detach()) / sigma**2 / 16)


def test_gaussian_kl():
    mu, ref, sigma = torch.randn(5, 4, 3, 2), torch.randn(5, 4, 3, 2), torch.rand(5, 1, 1, 1) + 0.1
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
    """x_{t-1} and its log-probability at every t of 20, all in one batch, in shuffled order."""
    theirs = scheduler(prediction_type=prediction_type)
    schedule = make_schedule(theirs, 20, eta)
    g = torch.Generator().manual_seed(0)
    x, prediction, noise = torch.randn(3, 20, 4, 8, 8, generator=g)
    t = torch.randperm(20, generator=g) + 1
    x_prev, log_p = ddim_step(schedule, prediction, x, t, noise=noise)
    for j in range(20):
        timestep = theirs.timesteps[20 - t[j]]

        def step(z, j=j, timestep=timestep):
            out = theirs.step(prediction[j], timestep, x[j], eta=eta, variance_noise=z)
            return out.prev_sample

        torch.testing.assert_close(x_prev[j], step(noise[j]), atol=1e-5, rtol=1e-5)
        std = eta * theirs._get_variance(timestep, timestep - 50) ** 0.5
        want = (
            Normal(step(torch.zeros_like(x[j])).double(), std.double())
            .log_prob(x_prev[j].double())
            .mean()
        )
        assert log_p[j].item() == pytest.approx(want.item(), abs=1e-3)
    assert torch.equal(log_prob(x_prev, *ddim_mean(schedule, prediction, x, t)), log_p)


def test_noise_level_that_rounds_below_zero():
    """From pure noise, alpha_bar_T = 0, 1 - alpha_bar - sigma^2 is 0 but for float32's rounding.

    There a_t is drawn around sqrt(alpha_bar_{t-1}) x_0 alone, x_0 = -v.
    """
    zero_snr = dict(rescale_betas_zero_snr=True, timestep_spacing="trailing", steps_offset=0)
    schedule = make_schedule(scheduler(**zero_snr, prediction_type="v_prediction"), 20)
    a_prev, sigma = schedule.alpha_bar[19].float(), schedule.sigma[20].float()
    assert schedule.alpha_bar[20] == 0 and 1 - a_prev - sigma**2 < 0
    x, v = torch.randn(2, 3, 4, 8, 8)
    mu, _ = ddim_mean(schedule, v, x, torch.full((3,), 20))
    torch.testing.assert_close(mu, -a_prev.sqrt() * v)


@pytest.mark.parametrize("eta", [1.0, 0.4])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_step_factor_is_the_slope_of_the_mean(prediction_type, eta):
    """|d mu / d prediction| / sigma: mu is linear in the prediction, so a difference tells it."""
    schedule = make_schedule(scheduler(prediction_type=prediction_type), 20, eta)
    t, zeros = torch.arange(1, 21), torch.zeros(20, 1, 1, 1)
    (high, sigma), (low, _) = (ddim_mean(schedule, zeros + v, zeros, t) for v in (1, 0))
    want = ((high - low).abs() / sigma).flatten()
    factor = step_factor(schedule)
    assert factor.shape == (21,)
    torch.testing.assert_close(factor[1:].float(), want, rtol=1e-4, atol=1e-5)


def test_step_factor_of_stable_diffusion():
    """The closed form at eta 1, and the large factor of the jump from timestep 51 to 1."""
    schedule = make_schedule(scheduler(), 20)
    a_bar, factor = schedule.alpha_bar, step_factor(schedule)
    a = a_bar[1:] / a_bar[:-1]
    torch.testing.assert_close(factor[1:], ((1 - a) / (a * (1 - a_bar[:-1]))).sqrt())
    assert factor[1:4].tolist() == pytest.approx([1.00, 5.43, 1.14], abs=0.005)


def test_latents_are_float32():
    schedule, x, t = make_schedule(scheduler(), 20), torch.randn(1, 4, 8, 8), torch.tensor([3])
    with pytest.raises(AssertionError, match="float32"):
        ddim_step(schedule, x, x.bfloat16(), t, noise=x)


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
    keys = [
        (0, 1, 2, 0),
        (0, 1, 2, 1),
        (0, 1, 0, 1),
        (0, 0, 2, 1),
        (1, 1, 2, 1),
        (0, 1, 2, "x_T"),
        (0, 1, 21),
        (0, 12, 1),
        (12, 0, 1),
    ]
    noise = keyed_noise(generators(*keys), (4, 8, 8), "cpu")
    again = keyed_noise(generators(*keys[::-1]), (4, 8, 8), "cpu").flip(0)
    assert torch.equal(noise, again)
    correlation = torch.corrcoef(noise.flatten(1)) - torch.eye(len(keys))
    assert correlation.abs().max() < 0.3  # 0.0625 is one standard deviation
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.05
    one = keyed_generator(*keys[0])
    first, second = (keyed_noise([one], (4, 8, 8), "cpu") for _ in range(2))
    assert torch.equal(first[0], noise[0]) and not torch.equal(first, second)


# ---------------------------------------------------------------- guidance and the loop


@pytest.fixture(scope="module")
def small():
    return make_small()


def setting(model, P, seed=0):
    """Latents (P, C, h, w), prompt embeddings (P, L, d) and the empty one (1, L, d)."""
    x = torch.randn(P, *model.latent_shape, generator=torch.Generator().manual_seed(seed))
    return x, model.embed(["a cat", "a dog", "the sea", "x"][:P]), model.embed([""])


@torch.no_grad()
def test_guidance(small):
    """uncond + g (cond - uncond) at mixed times, by separate calls of one sample each."""
    x, cond, uncond = setting(small, 3)
    t = torch.tensor([6, 1, 3])
    timesteps = small.pipe.scheduler.timesteps[6 - t]
    with count_unet_samples(small.unet) as seen:
        got = guided_prediction(small.unet, small.schedule, x, t, cond, uncond, 5.0)
        assert sum(seen) == 6
        only_cond = guided_prediction(small.unet, small.schedule, x, t, cond, uncond, 1)
        assert sum(seen) == 9, "guidance 1 needs no unconditional half"
        none, half = (
            guided_prediction(small.unet, small.schedule, x, t, cond, uncond, g) for g in (0, 0.5)
        )
    for j in range(3):
        c, u = (small.unet(x[j : j + 1], timesteps[j], e).sample for e in (cond[j : j + 1], uncond))
        torch.testing.assert_close(got[j], (5 * c - 4 * u)[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(only_cond[j], c[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(none[j], u[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(half[j], (c + u)[0] / 2, atol=1e-5, rtol=1e-4)
        assert (c - u).abs().max() > 1e-3
    assert not torch.allclose(got, only_cond, atol=1e-3)


def test_denoise_in_one_go_or_in_two_stretches(small):
    x, cond, uncond = setting(small, 2)
    whole, split = (generators((0,), (1,)) for _ in range(2))
    common = dict(cond=cond, uncond=uncond, guidance=5.0)
    one = denoise(small.unet, small.schedule, x, 6, 0, **common, generators=whole)
    two = denoise(small.unet, small.schedule, x, 6, 4, **common, generators=split)
    two = denoise(small.unet, small.schedule, two, 4, 0, **common, generators=split)
    assert torch.equal(one, two) and not torch.allclose(one, x)


def test_denoise_is_a_plain_loop_of_diffusers_steps(small):
    """A trajectory against a loop over the scheduler's own timesteps and `step`."""
    x, cond, uncond = setting(small, 1)
    scheduler, g = small.pipe.scheduler, keyed_generator("k")
    got, states, _ = denoise(
        small.unet, small.schedule, x, 6, 0, cond, uncond, 5.0, generators(("k",)), keep=True
    )
    with torch.no_grad():
        for i, timestep in enumerate(scheduler.timesteps):
            torch.testing.assert_close(states[:, i], x, atol=1e-3, rtol=1e-3)
            u, c = (small.unet(x, timestep, e).sample for e in (uncond, cond))
            noise = torch.randn(4, 8, 8, generator=g)[None]
            x = scheduler.step(u + 5 * (c - u), timestep, x, eta=1.0, variance_noise=noise)[0]
    torch.testing.assert_close(got, x, atol=1e-3, rtol=1e-3)


def test_branches_share_their_prefix_and_are_independent_after_it(small):
    """P roots x K branches, root by root: equal at x_start bit for bit; each as if it ran alone."""
    P, K, start = 3, 4, 4
    x, cond, uncond = setting(small, P)
    keys = [(p, k) for p in range(P) for k in range(K)]
    final, states, log_p = denoise(
        small.unet, small.schedule, x, start, 0, cond, uncond, 5.0, generators(*keys), keep=True
    )
    assert states.shape == (P * K, start + 1, 4, 8, 8) and log_p.shape == (P * K, start)
    assert torch.equal(final, states[:, -1])
    for p in range(P):
        branches = states[p * K : (p + 1) * K]
        assert all(torch.equal(b[0], x[p]) for b in branches)
        distance = (branches[:, None, 1] - branches[None, :, 1]).abs().amax((2, 3, 4))
        assert distance[~torch.eye(K, dtype=torch.bool)].gt(0.01).all(), "branches differ at once"
        for k in range(K):
            one = slice(p, p + 1)
            alone = denoise(
                small.unet,
                small.schedule,
                x[one],
                start,
                0,
                cond[one],
                uncond,
                5.0,
                generators((p, k)),
                keep=True,
            )
            torch.testing.assert_close(alone[1][0], branches[k], atol=1e-3, rtol=1e-3)
            torch.testing.assert_close(alone[2][0], log_p[p * K + k], atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_stored_log_prob_belongs_to_the_stored_states(small):
    """log p of step j is Normal(mu(x_t), sigma).log_prob(x_{t-1}) with t = start - j."""
    x, cond, uncond = setting(small, 2)
    _, states, log_p = denoise(
        small.unet, small.schedule, x, 5, 1, cond, uncond, 5.0, generators((0,), (1,)), keep=True
    )
    for j in range(4):
        t = torch.full((2,), 5 - j)
        prediction = guided_prediction(small.unet, small.schedule, states[:, j], t, cond, uncond, 5)
        mu, sigma = ddim_mean(small.schedule, prediction, states[:, j], t)
        want = Normal(mu, sigma).log_prob(states[:, j + 1]).mean((1, 2, 3))
        torch.testing.assert_close(log_p[:, j], want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("guidance, halves", [(5.0, 2), (1, 1)])
def test_unet_calls_of_branches(small, guidance, halves):
    """One call a root at the first branched step: 1 + K (tau - 1) a root."""
    x, cond, uncond = setting(small, 2)
    with count_unet_samples(small.unet) as seen:
        denoise(
            small.unet,
            small.schedule,
            x,
            4,
            0,
            cond,
            uncond,
            guidance,
            generators(*[(j,) for j in range(6)]),
        )
    assert sum(seen) == halves * 2 * (1 + 3 * (4 - 1))


def test_denoising_nothing_copies_the_branches(small):
    x, cond, uncond = setting(small, 2)
    out = denoise(
        small.unet,
        small.schedule,
        x,
        3,
        3,
        cond,
        uncond,
        5.0,
        generators(*[(j,) for j in range(6)]),
    )
    assert torch.equal(out, x[[0, 0, 0, 1, 1, 1]])
    with pytest.raises(AssertionError, match="not a multiple"):
        denoise(
            small.unet, small.schedule, x, 3, 0, cond, uncond, 5.0, generators((0,), (1,), (2,))
        )
