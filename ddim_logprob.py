"""One DDIM step as a Gaussian policy: its mean, its sample, its log-probability (Eq. 1).

    symbol       paper                          here
    T            denoising steps, 20            `schedule.T`
    t            time: T (noise) .. 1           `t`: an int, not the scheduler's index
    x_t          state, Eq. 3                   `x_t`: (B, C, h, w) float32 latents
    x_{t-1}      action a_t, next state         `x_prev`: (B, C, h, w)
    c            prompt                         `cond` (B, L, d), `uncond` (1, L, d)
    mu_theta     mean, Eq. 1                    `mu`
    sigma_t      standard deviation; Eq. 1      `sigma`; the covariance is sigma_t^2 I
                 prints "sigma_t I^2"
    P, K         branch roots, branches of one  leading axes (P, K, ...); here P may be a
                                                process's own part of the roots

Departures from the paper's text
    [official, ddpo] log p is AVERAGED over the D = C*h*w dimensions of a latent, not summed: a
        summed ratio overflows (1.01 a dimension is 1.01 ** 16384 in SD). It ties the clip range
        to D: see `b2rl.py`.
    [ours] every draw of noise comes from a generator keyed by (seed, round, root, branch),
        never from a global stream: a run does not depend on batch size or on the number of
        processes, and resuming needs no random state.
    [ours] latents and log-probabilities are float32 in every precision. If x_{t-1} were
        stored in half precision after log p was taken, its rounding (3e-3 in bf16) would be
        a tenth of the last steps' sigma (0.02..0.04). The first ratio would then not be 1,
        but outside of the clip range.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tqdm import tqdm


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
    if spacing not in ("leading", "trailing"):  # linspace ends at sigma 0
        raise ValueError(f"timestep_spacing {spacing!r}: use leading or trailing")
    scheduler.set_timesteps(T)
    # Entry 0 stands for no step: it only makes t the index
    timestep = torch.cat([torch.tensor([0]), scheduler.timesteps.flip(0).cpu()])
    alpha_bar = scheduler.alphas_cumprod.double().cpu()[timestep]
    alpha_bar[0] = scheduler.final_alpha_cumprod.double()
    sigma = torch.zeros(T + 1, dtype=torch.float64)
    abar_t, abar_prev = alpha_bar[1:], alpha_bar[:-1]
    variance = (1 - abar_prev) / (1 - abar_t) * (1 - abar_t / abar_prev)
    sigma[1:] = eta * variance.sqrt()  # DDIM, Eq. 16
    if not bool((sigma[1:] > 0).all()):
        raise ValueError(
            "sigma is 0 at some step, so its log p is NaN: eta must be above 0, and the "
            "scheduler needs set_alpha_to_one False and steps_offset 1, as SD 1.4 has"
        )
    return Schedule(T, alpha_bar, sigma, timestep, config.prediction_type)


def predict_x_0(schedule, prediction, x_t, t):
    """What the UNet's prediction at time t says of the clean latent and of the noise.

    prediction, x_t: (B, C, h, w) float32. Returns x_0 and eps, each (B, C, h, w).
    """
    abar_t = schedule.alpha_bar[t].float()
    if schedule.prediction_type == "epsilon":
        eps = prediction
        x_0 = (x_t - (1 - abar_t).sqrt() * eps) / abar_t.sqrt()
    else:  # v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0
        x_0 = abar_t.sqrt() * x_t - (1 - abar_t).sqrt() * prediction
        eps = abar_t.sqrt() * prediction + (1 - abar_t).sqrt() * x_t
    return x_0, eps


def ddim_mean(schedule, prediction, x_t, t):
    """mu_theta(x_t, t, c) of Eq. 1 from the UNet's guided prediction.

    prediction, x_t: (B, C, h, w) float32. Returns mu (B, C, h, w) and sigma_t, a
    tensor without axes. [DDIM, Song et al., Eq. 12]
    """
    x_0, eps = predict_x_0(schedule, prediction, x_t, t)
    abar_prev = schedule.alpha_bar[t - 1].float()
    sigma = schedule.sigma[t].float()
    # At eta <= 1 only rounding can make the difference negative
    mu = abar_prev.sqrt() * x_0 + (1 - abar_prev - sigma**2).clamp(min=0).sqrt() * eps
    return mu, sigma


def log_prob(x_prev, mu, sigma):
    """log p_theta(x_{t-1} | x_t, c) of Eq. 1, averaged over D dimensions [official, ddpo]: (B,)."""
    log_p = -((x_prev - mu) ** 2) / (2 * sigma**2) - sigma.log()
    return (log_p - 0.5 * math.log(2 * math.pi)).flatten(1).mean(1)


def gaussian_kl(mu, mu_ref, sigma):
    """KL(N(mu, sigma^2 I) || N(mu_ref, sigma^2 I)), exact, averaged over D: (B,)."""
    return ((mu - mu_ref) ** 2 / (2 * sigma**2)).flatten(1).mean(1)


def guided_prediction(unet, schedule, x_t, t, cond, uncond, guidance):
    """Classifier-free guidance, uncond + g * (cond - uncond), in one UNet call.

    x_t: (B, C, h, w); cond: (B, L, d); uncond: (1, L, d). Sampling and training both come
    here, so both use the same guided noise (Table 6: g = 5). The gradient flows through
    both halves, through the unconditional one with the factor 1 - g. Guidance 1 needs no
    unconditional half. Returns (B, C, h, w) float32.
    """
    timestep = schedule.timestep[t].to(x_t.device)
    x_in = x_t.to(unet.dtype)
    if guidance == 1:
        return unet(x_in, timestep, cond, return_dict=False)[0].float()
    text = torch.cat([uncond.expand_as(cond), cond])
    both = unet(torch.cat([x_in, x_in]), timestep, text, return_dict=False)[0]
    without, with_prompt = both.float().chunk(2)
    return without + guidance * (with_prompt - without)


def keyed_generator(*key):
    """A CPU generator for a key of ints and strings, e.g. (seed, round, root, branch)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    # `manual_seed` takes 63 bits
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def keyed_noise(generators, shape, device):
    """A standard normal (C, h, w) of each generator, drawn on the CPU: (B, C, h, w)."""
    return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)


@dataclass
class Policy:
    """The UNet as the policy pi(a_t | s_t) of Eq. 1, and the two ways that it walks.

    `denoise` follows one path from each state, `branch` follows K. Both work through P
    states in batches; noise is keyed, so the batches do not change what comes out.
    """

    unet: torch.nn.Module
    schedule: Schedule
    embed: Callable  # B prompts -> text embeddings (B, L, d) on the device, in the UNet's dtype
    latent_shape: tuple  # (C, h, w)
    device: torch.device
    guidance: float = 5.0
    sample_batch: int = 8  # states a UNet call (K at least); guidance doubles it

    def __call__(self, x_t, t, prompts):
        """Eq. 1: mu_theta (B, C, h, w) and sigma_t of p_theta(x_{t-1} | x_t, c). Gradients flow.

        x_t: (B, C, h, w) float32 on the device; B prompts.
        """
        cond, uncond = self.embed(prompts), self.embed([""])
        prediction = guided_prediction(
            self.unet, self.schedule, x_t, t, cond, uncond, self.guidance
        )
        return ddim_mean(self.schedule, prediction, x_t, t)

    def noise(self, keys):
        """x_T: one standard normal a key, (len(keys), C, h, w) on the CPU."""
        if not keys:
            return torch.zeros(0, *self.latent_shape)
        return keyed_noise([keyed_generator(*key) for key in keys], self.latent_shape, "cpu")

    def denoise(self, x, start, stop, prompts, keys):
        """Steps t = start..stop+1 of P states, one path from each: x_stop (P, C, h, w), CPU.

        x: (P, C, h, w), or None to draw x_T from the keys as well; keys: of noise, P.
        """
        batches = self._walk_all(x, start, stop, prompts, [[key] for key in keys])
        ends = [states[:, 0, -1] for states, _ in batches]
        return torch.cat(ends) if ends else torch.zeros(0, *self.latent_shape)

    def branch(self, x, start, stop, prompts, keys):
        """BS, Sec. 3.3: K branches of each x_start, with all that training needs of them.

        x: (P, C, h, w); keys: P lists of K. Returns, on the CPU, the states
        x_start..x_stop (P, K, start - stop + 1, C, h, w) and log p_old of the steps
        between them (P, K, start - stop).
        """
        batches = list(self._walk_all(x, start, stop, prompts, keys))
        if not batches:  # a process without a root; K is not known then, and 1 will do
            return torch.zeros(0, 1, start - stop + 1, *self.latent_shape), torch.zeros(0)
        states, log_p = zip(*batches)
        return torch.cat(states), torch.cat(log_p)

    def _walk_all(self, x, start, stop, prompts, keys):
        """`_walk` of P states in batches of about equal size; yields its results on the CPU."""
        if not keys:
            return
        K = len(keys[0])
        count = math.ceil(len(keys) / max(1, self.sample_batch // K))
        with tqdm(total=count * (start - stop), desc="sampling", leave=False, disable=None) as bar:
            for rows in torch.arange(len(keys)).tensor_split(count):
                few = None if x is None else x[rows].to(self.device)
                few_prompts = [prompts[p] for p in rows]
                few_keys = [keys[p] for p in rows]
                states, log_p = self._walk(few, start, stop, few_prompts, few_keys, bar)
                yield states.cpu(), log_p.cpu()

    @torch.no_grad()
    def _walk(self, x, start, stop, prompts, keys, bar):
        """K branches of each of b states, together: states (b, K, ...) and log p, as `branch`."""
        K = len(keys[0])
        generators = [keyed_generator(*key) for branches in keys for key in branches]
        if x is None:  # only with K = 1: x_T comes first out of each key
            x = keyed_noise(generators, self.latent_shape, self.device)
        states, log_ps = [x.repeat_interleave(K, 0)], []
        of_branches = [prompt for prompt in prompts for _ in range(K)]
        for t in range(start, stop, -1):
            if t == start:
                # Branches of a root share x_start: one row of the UNet call a root, not K
                mu, sigma = self(x, t, prompts)
                mu = mu.repeat_interleave(K, 0)
            else:
                mu, sigma = self(states[-1], t, of_branches)
            x_prev = mu + sigma * keyed_noise(generators, self.latent_shape, self.device)
            assert x_prev.dtype == torch.float32, "latents must be float32"
            states.append(x_prev)
            log_ps.append(log_prob(x_prev, mu, sigma))
            bar.update()
        states = torch.stack(states, 1).unflatten(0, (-1, K))
        log_p = torch.stack(log_ps, 1) if log_ps else torch.zeros(len(generators), 0)
        return states, log_p.unflatten(0, (-1, K))
