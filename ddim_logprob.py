"""One DDIM step as a Gaussian policy: its mean, its sample, its log-probability (Eq. 1).

    symbol       paper                          here
    T            denoising steps, 20            `schedule.T`
    t            time: T (noise) .. 1           `t`: (B,) long, not the scheduler's index
    x_t          state, Eq. 3                   `x_t`: (B, C, h, w) float32 latents
    x_{t-1}      action a_t, next state         `x_prev`: (B, C, h, w)
    c            prompt                         `cond` (B, L, d), `uncond` (1, L, d)
    mu_theta     mean, Eq. 1                    `mu`
    sigma_t      standard deviation, Eq. 1      `sigma`; the covariance is sigma_t^2 I

Departures from the paper's text
    [ddpo] log p is AVERAGED over the D = C*h*w dimensions of a latent, not summed: a summed
        ratio overflows (1.01 ** 16384 at SD's size). It ties the clip range to D: see
        `b2rl.py`.
    [ours] every draw of noise comes from a generator keyed by (seed, round, root, branch),
        never from a global stream: a run does not depend on batch size or on the number of
        processes, and resuming needs no random state.
    [ours] latents and log-probabilities are float32 in every precision. If x_{t-1} were
        stored in half precision after log p was taken, its rounding (3e-3 in bf16) would
        exceed the clip range, as the last steps have sigma of 0.02..0.04, and the first
        ratio would not be 1.
"""

import hashlib
import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Schedule:
    """Noise levels by paper time t = 0..T; all tensors are (T + 1,), float64 or long.

    `alpha_bar[t]` belongs to x_t (0 = clean), `sigma[t]` and `timestep[t]` to the step
    x_t -> x_{t-1}, so their entry 0 is unused.
    """

    T: int
    alpha_bar: torch.Tensor
    sigma: torch.Tensor
    timestep: torch.Tensor
    prediction_type: str


def make_schedule(scheduler, T=20, eta=1.0):
    """DDIM's noise levels for T steps of a diffusers `DDIMScheduler` (T 20, eta 1: Table 6).

    This is the one place where paper time meets the scheduler's timesteps: timesteps[j]
    is paper time T - j. Raises ValueError where the step would not be a Gaussian with
    positive sigma.
    """
    config = scheduler.config
    if config.clip_sample or config.thresholding:
        raise ValueError("clip_sample, thresholding must be off: a clipped step is not Gaussian")
    if config.prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(f"prediction_type {config.prediction_type!r} is not supported")
    spacing = config.timestep_spacing
    if spacing not in ("leading", "trailing"):  # linspace steps are not a chain
        raise ValueError(f"timestep_spacing {spacing!r}: use leading or trailing")
    scheduler.set_timesteps(T)
    timestep = torch.cat([torch.tensor([0]), scheduler.timesteps.flip(0).cpu()])
    alpha_bar = scheduler.alphas_cumprod.double().cpu()[timestep]
    alpha_bar[0] = scheduler.final_alpha_cumprod.double()
    sigma = torch.zeros(T + 1, dtype=torch.float64)
    abar_t, abar_prev = alpha_bar[1:], alpha_bar[:-1]
    variance = (1 - abar_prev) / (1 - abar_t) * (1 - abar_t / abar_prev)
    sigma[1:] = eta * variance.sqrt()  # DDIM, Eq. 16
    if not bool((sigma[1:] > 0).all()):
        raise ValueError(
            "sigma is 0 at some step, so its log p is NaN: eta must be above 0 and the "
            "scheduler needs steps_offset 1 (SD 1.4's setting)"
        )
    return Schedule(T, alpha_bar, sigma, timestep, config.prediction_type)


def at_time(values, t, like):
    """values[t] (paper time) as a float32 (B, 1, 1, 1) tensor on `like`'s device."""
    at_t = values[t.cpu()].to(like.device, torch.float32)
    return at_t.view(-1, *[1] * (like.dim() - 1))


def ddim_mean(schedule, prediction, x_t, t):
    """mu_theta(x_t, t, c) of Eq. 1 from the UNet's guided prediction.

    prediction, x_t: (B, C, h, w) float32; t: (B,) long paper time, mixed times allowed.
    Returns mu (B, C, h, w) and sigma_t (B, 1, 1, 1). [DDIM, Song et al., Eq. 12]
    """
    abar_t = at_time(schedule.alpha_bar, t, x_t)
    abar_prev = at_time(schedule.alpha_bar, t - 1, x_t)
    sigma = at_time(schedule.sigma, t, x_t)
    if schedule.prediction_type == "epsilon":
        eps = prediction
        x_0 = (x_t - (1 - abar_t).sqrt() * eps) / abar_t.sqrt()
    else:  # v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0
        x_0 = abar_t.sqrt() * x_t - (1 - abar_t).sqrt() * prediction
        eps = abar_t.sqrt() * prediction + (1 - abar_t).sqrt() * x_t
    # eta is at most 1, so that only rounding can make the difference negative
    mu = abar_prev.sqrt() * x_0 + (1 - abar_prev - sigma**2).clamp(min=0).sqrt() * eps
    return mu, sigma


def step_factor(schedule):
    """|d mu_t / d prediction| / sigma_t: the schedule's part of grad log p_t.

    (T + 1,) float64, entry 0 unused. For eta 1 and epsilon it is sqrt((1 - a) / (a (1 -
    abar[t-1]))) with a = abar[t] / abar[t-1]: about 1, but 5.4 at t = 2 of Stable
    Diffusion's 20 steps.
    """
    abar_t, abar_prev = schedule.alpha_bar[1:], schedule.alpha_bar[:-1]
    sigma = schedule.sigma[1:]
    slope = (1 - abar_prev - sigma**2).clamp(min=0).sqrt()
    slope = slope - (abar_prev * (1 - abar_t) / abar_t).sqrt()
    if schedule.prediction_type == "v_prediction":
        slope = slope * abar_t.sqrt()
    return torch.cat([torch.ones(1, dtype=torch.float64), slope.abs() / sigma])


def log_prob(x_prev, mu, sigma):
    """log p_theta(x_{t-1} | x_t, c) of Eq. 1, averaged over D dimensions [ddpo]: (B,)."""
    log_p = -((x_prev - mu) ** 2) / (2 * sigma**2) - sigma.log()
    return (log_p - 0.5 * math.log(2 * math.pi)).flatten(1).mean(1)


def ddim_step(schedule, prediction, x_t, t, noise):
    """A sampling step x_t -> x_{t-1} with `noise` (B, C, h, w), and its log-probability.

    Training calls the same `ddim_mean` and `log_prob` on the stored x_{t-1}. Returns
    x_prev (B, C, h, w) float32, log_p (B,).
    """
    mu, sigma = ddim_mean(schedule, prediction.float(), x_t, t)
    x_prev = mu + sigma * noise
    assert x_prev.dtype == x_t.dtype == torch.float32, "latents must be float32"
    return x_prev, log_prob(x_prev, mu, sigma)


def gaussian_kl(mu, mu_ref, sigma):
    """KL(N(mu, sigma^2 I) || N(mu_ref, sigma^2 I)), exact, averaged over D: (B,)."""
    return ((mu - mu_ref) ** 2 / (2 * sigma**2)).flatten(1).mean(1)


def guided_prediction(unet, schedule, x_t, t, cond, uncond, guidance):
    """Classifier-free guidance, uncond + g * (cond - uncond), in one UNet call.

    x_t: (B, C, h, w); t: (B,) paper time; cond: (B, L, d); uncond: (1, L, d). Sampling
    and training both come here, so both use the same guided noise (Table 6: g = 5).
    Guidance 1 needs no unconditional half. Returns (B, C, h, w) float32.
    """
    timestep = schedule.timestep[t.cpu()].to(x_t.device)
    x_in = x_t.to(unet.dtype)
    if guidance == 1:
        return unet(x_in, timestep, cond, return_dict=False)[0].float()
    text = torch.cat([uncond.expand_as(cond), cond])
    x_in, timestep = torch.cat([x_in] * 2), torch.cat([timestep] * 2)
    both = unet(x_in, timestep, text, return_dict=False)[0]
    without, with_prompt = both.float().chunk(2)
    return without + guidance * (with_prompt - without)


def keyed_generator(*key):
    """A CPU generator for a key of ints and strings, e.g. (seed, round, root, branch)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def keyed_noise(generators, shape, device):
    """A standard normal (C, h, w) of each generator, drawn on the CPU: (B, C, h, w)."""
    return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)


@torch.no_grad()
def denoise(unet, schedule, x, start, stop, cond, uncond, guidance, generators, keep=False):
    """Steps t = start..stop+1 of the guided denoising loop, from x_start to x_stop.

    x: (P, C, h, w). cond: (P, L, d). generators: P*K of them, K branches for each row
    of x in turn. All branches of a root share x_start, so the first step needs one UNet
    call a root and not K. Returns x_stop (P*K, C, h, w); with `keep`, the
    trajectory as well: states x_start..x_stop (P*K, start-stop+1, C, h, w) and log p of
    its steps (P*K, start-stop).
    """
    branches, left = divmod(len(generators), len(x))
    assert left == 0, f"{len(generators)} generators for {len(x)} states: not a multiple"
    states, log_ps = [], []
    for t in range(start, stop, -1):
        now = torch.full((len(x),), t)
        prediction = guided_prediction(unet, schedule, x, now, cond, uncond, guidance)
        if t == start and branches > 1:
            prediction, x, cond, now = (
                v.repeat_interleave(branches, 0) for v in (prediction, x, cond, now)
            )
        if t == start and keep:
            states.append(x)
        noise = keyed_noise(generators, x.shape[1:], x.device)
        x, log_p = ddim_step(schedule, prediction, x, now, noise=noise)
        if keep:
            states.append(x)
            log_ps.append(log_p)
    if start == stop:  # nothing to denoise, but the branches still want their copies
        x = x.repeat_interleave(branches, 0)
    return (x, torch.stack(states, 1), torch.stack(log_ps, 1)) if keep else x
