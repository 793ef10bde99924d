"""How every network of the tiny model is trained: Muon and AdamW, a cosine, a running mean.

Muon (Jordan et al., 2024; its choice is [ours]) takes the momentum of a matrix or a
kernel to the nearest orthogonal matrix. torch.optim.Muon takes no kernels. With it the
autoencoder had 23.2 dB after 300 steps; with AdamW it had 21.5 dB after 600.
"""

import copy
import math
from collections import defaultdict

import numpy as np
import torch

from support.run_folder import read_safetensors, write_safetensors

# Each part's budget; --steps gives another
STEPS = {"ae": 7000, "clip": 2000, "judge": 2500, "unet": 13500}
MOMENTUM = 0.95  # Muon's
# Matrices that touch pixels, words or classes get AdamW, as all vectors do
OUTER = ("conv_in", "conv_out", "quant_conv", "embedding", "logit", "classifier", "pos", "attnpool")


def orthogonal(g, steps=5):
    """About the nearest semi-orthogonal matrices to g (..., n, m)."""
    a, b, c = 3.4445, -4.7750, 2.0315  # Newton-Schulz: singular values go to 0.7 .. 1.2
    tall = g.shape[-2] > g.shape[-1]
    x = g.mT if tall else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum; a step's RMS is 0.2 of the rate, about as AdamW's is."""

    def ahead(self, p):
        """Update the running mean of p's gradient; Nesterov's look ahead, as a matrix."""
        mean = self.state[p].setdefault("mean", torch.zeros_like(p))
        mean.lerp_(p.grad, 1 - MOMENTUM)
        return p.grad.lerp(mean, MOMENTUM).flatten(1)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            # Matrices of one shape are turned together: a GPU waits for the launches of kernels
            alike = defaultdict(list)
            for p in group["params"]:
                alike[p.flatten(1).shape].append(p)
            for shape, params in alike.items():
                turned = orthogonal(torch.stack([self.ahead(p) for p in params]))
                rate = group["lr"] * 0.2 * max(shape) ** 0.5
                for p, step in zip(params, turned):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(step.reshape(p.shape), alpha=-rate)


class Trainer:
    """So many steps, the rate on a cosine; `mean` has the running mean of the weights.

    Both weights are saved in args.build every 100 steps. Where that file exists, training
    goes on from it, also with more steps than before or on another device; the optimizers
    begin anew. `extra` is JSON data that a network's training wants saved too.
    """

    def __init__(self, name, modules, args, rate, decay=0.0, keep=0.999):
        self.steps = args.steps or STEPS[name]
        self.rate = rate
        self.keep = keep
        self.modules = torch.nn.ModuleDict(modules)
        self.modules.to(args.device, memory_format=torch.channels_last)
        self.mean = copy.deepcopy(self.modules).requires_grad_(False).eval()
        inner, outer = [], []
        for key, p in self.modules.named_parameters():
            is_outer = p.ndim < 2 or any(word in key for word in OUTER)
            (outer if is_outer else inner).append(p)
        self.muon = Muon(inner, dict(lr=rate, weight_decay=decay))
        self.adam = torch.optim.AdamW(outer, rate, (0.9, 0.99), weight_decay=0.0)
        self.done = 0
        self.extra = {}
        self.loss = 0.0  # a mean over 100 steps, in the making
        self.path = args.build / f"{name}.safetensors"
        if self.path.exists():
            weights, header = read_safetensors(self.path)
            self.done = header["done"]
            self.extra = header["extra"]
            self.both().load_state_dict(weights)
        self.rng = np.random.default_rng([*name.encode(), self.done])
        torch.manual_seed(int(self.rng.integers(2**31)))

    def save(self):
        header = {"done": self.done, "extra": self.extra}
        write_safetensors(self.path, self.both().state_dict(), header)

    def both(self):
        """The weights and their running mean, as one module."""
        return torch.nn.ModuleDict({"live": self.modules, "average": self.mean})

    def loop(self):
        """Yield once a step that is left; then `mean` is on the CPU."""
        while self.done < self.steps:
            yield
        self.save()
        self.mean.cpu()

    def step(self, loss):
        """A step of the optimizers and the mean; every 100 steps a line on the screen."""
        warm = min(1.0, (self.done + 1) / 200)
        cosine = 0.505 + 0.495 * math.cos(math.pi * self.done / self.steps)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
        for optimizer, factor in ((self.muon, 1.0), (self.adam, 0.5)):
            optimizer.param_groups[0]["lr"] = self.rate * warm * cosine * factor
            optimizer.step()
            optimizer.zero_grad()
        self.done += 1
        keep = min(self.keep, (1 + self.done) / (20 + self.done))
        live = self.modules.state_dict()
        for key, mean in self.mean.state_dict().items():
            if mean.is_floating_point():
                mean.lerp_(live[key], 1 - keep)
        self.loss = self.loss + loss.detach() / 100
        if self.done % 100 == 0:
            print(f"{self.path.stem} {self.done} of {self.steps}: loss {self.loss:.4f}", flush=True)
            self.loss = 0.0
            self.save()
