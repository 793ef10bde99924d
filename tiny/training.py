"""How every part of the tiny model is trained: Muon and AdamW, a cosine, a running mean.

Muon (Jordan et al., 2024; its choice is [ours]) takes the momentum of a matrix or a
kernel to the nearest orthogonal matrix. torch.optim.Muon takes no kernels. With it the
autoencoder had 23.2 dB after 300 steps; with AdamW it had 21.5 dB after 600.
"""

import math
import time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from files import read_safetensors, write_safetensors


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
    """Orthogonalised momentum; a step's RMS is 0.2 of the rate, about as AdamW's is.

    Matrices of one shape are turned together: a GPU waits for the launches of its kernels.
    """

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0):
        defaults = dict(lr=lr, momentum=momentum, weight_decay=weight_decay)
        super().__init__(params, defaults)

    def ahead(self, p, momentum):
        """Update the running mean of p's gradient; Nesterov's look ahead, as a matrix."""
        state = self.state[p]
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(p)
        mean = state["exp_avg"].lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(mean, momentum).flatten(1)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            alike = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    alike[p.flatten(1).shape].append(p)
            for shape, params in alike.items():
                ahead = torch.stack([self.ahead(p, group["momentum"]) for p in params])
                rate = group["lr"] * 0.2 * max(shape) ** 0.5
                for p, turned in zip(params, orthogonal(ahead)):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(turned.reshape(p.shape), alpha=-rate)


# Matrices that touch pixels, words or classes get AdamW, as all vectors do
OUTER = ("conv_in", "conv_out", "quant_conv", "embedding", "logit", "classifier", "pos", "attnpool")


class Trainer:
    """args.steps steps, the rate on a cosine, and a running mean of the weights.

    All of it is in a file of args.build, saved every two minutes. Where that file
    exists, training goes on from it, also with more steps than before or on another
    device. Every 100 steps a line goes to the screen and to args.build/<name>.log.
    `extra` is JSON data that a part wants saved too.
    """

    def __init__(self, name, modules, args, rate, decay=0.0, keep=0.999):
        self.name, self.args, self.rate, self.keep = name, args, rate, keep
        self.modules, self.done, self.seconds = torch.nn.ModuleDict(modules), 0, 0.0
        self.extra = {}
        self.modules.to(args.device, memory_format=torch.channels_last)
        self.params = {k: p for k, p in self.modules.named_parameters() if p.requires_grad}
        matrices = {k for k, p in self.params.items() if p.ndim > 1}
        inner = {k for k in matrices if not any(word in k for word in OUTER)}
        self.owner = {k: "muon" if k in inner else "adam" for k in self.params}
        fast = [p for k, p in self.params.items() if k in inner]
        slow = [p for k, p in self.params.items() if k not in inner]
        adam = torch.optim.AdamW(slow, rate, (0.9, 0.99), weight_decay=0.0)
        self.opts = {"muon": Muon(fast, rate, weight_decay=decay), "adam": adam}
        live = self.modules.state_dict()
        self.mean = {k: v.clone() for k, v in live.items() if v.is_floating_point()}
        self.path, self.sums = Path(args.build) / f"{name}.safetensors", defaultdict(list)
        if self.path.exists():
            self.resume()
        self.rng = np.random.default_rng([*name.encode(), self.done])
        torch.manual_seed(int(self.rng.integers(2**31)))

    def resume(self):
        tensors, header = read_safetensors(self.path)
        groups = defaultdict(dict)
        for key, value in tensors.items():
            kind, _, name = key.partition(".")  # AdamW wants its step on the CPU
            groups[kind][name] = value.to("cpu" if kind == "step" else self.args.device)
        self.modules.load_state_dict(groups.pop("live"))
        mean = groups.pop("mean")
        self.mean = {k: mean[k] for k in self.mean}
        self.done, self.seconds = header["steps"], header["seconds"]
        self.extra = header.get("extra", {})
        for name, p in self.params.items():
            state = {kind: group[name] for kind, group in groups.items() if name in group}
            self.opts[self.owner[name]].state[p] = state
        self.say("goes on")

    def save(self):
        tensors = {f"live.{k}": v for k, v in self.modules.state_dict().items()}
        tensors |= {f"mean.{k}": v for k, v in self.mean.items()}
        for name, p in self.params.items():
            state = self.opts[self.owner[name]].state[p]
            tensors |= {f"{kind}.{name}": v for kind, v in state.items()}
        header = {"steps": self.done, "seconds": self.seconds, "extra": self.extra}
        write_safetensors(self.path, tensors, header)

    def say(self, text):
        minutes = f"{self.seconds / 60:.1f} min"
        line = f"{self.name} {self.done} of {self.args.steps}, {minutes}: {text}"
        print(line, flush=True)
        with open(self.path.with_suffix(".log"), "a", encoding="utf-8") as log:
            log.write(line + "\n")

    @contextmanager
    def averaged(self):
        """In this block the modules have the running mean of their weights."""
        live = {k: v.clone() for k, v in self.modules.state_dict().items()}
        self.modules.load_state_dict(self.mean, strict=False)  # no counts of batches
        try:
            yield
        finally:
            self.modules.load_state_dict(live)

    def loop(self):
        """Yield once a step that is left; then the modules have the mean, on the CPU."""
        saved = time.time()
        while self.done < self.args.steps:
            began = time.time()
            yield
            self.seconds += time.time() - began
            if time.time() - saved > 120:
                self.save()
                saved = time.time()
        self.save()
        self.modules.load_state_dict(self.mean, strict=False)
        self.modules.cpu().eval()

    def step(self, loss, /, **values):
        """A step of the optimizers and the mean; every 100 steps a line of mean values."""
        warm = min(1.0, (self.done + 1) / 200)
        cosine = 0.505 + 0.495 * math.cos(math.pi * self.done / self.args.steps)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.params.values(), 1.0)
        for name, opt in self.opts.items():
            for group in opt.param_groups:
                group["lr"] = self.rate * warm * cosine * (1.0 if name == "muon" else 0.5)
            opt.step()
            opt.zero_grad(set_to_none=True)
        self.done += 1
        keep = min(self.keep, (1 + self.done) / (20 + self.done))
        live = self.modules.state_dict()
        torch._foreach_lerp_([*self.mean.values()], [live[k] for k in self.mean], 1 - keep)
        for key, value in values.items():
            self.sums[key].append(value.detach())
        if self.done % 100 == 0:
            means = {k: torch.stack(v).mean().item() for k, v in self.sums.items()}
            self.say(" ".join(f"{k} {value:.4f}" for k, value in means.items()))
            self.sums.clear()
