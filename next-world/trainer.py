"""Training in general: AdamW, a cosine decay over a budget of steps, a running mean, resumable."""

import json
import math
import os
import time
from pathlib import Path

import torch

from muon import Muon


def save_state(path, tensors, **facts_json):
    """Tensors as safetensors with a JSON header, written whole or not at all."""
    from safetensors.torch import save_file

    part = Path(str(path) + ".part")
    tensors = {k: v.detach().contiguous().cpu().clone() for k, v in tensors.items()}
    save_file(tensors, part, {k: json.dumps(v) for k, v in facts_json.items()})
    os.replace(part, path)


def load_state(path):
    """The tensors and the header of save_state; None, {} where there is no file."""
    from safetensors import safe_open

    if not Path(path).exists():
        return None, {}
    with safe_open(path, "pt") as f:
        header = {k: json.loads(v) for k, v in (f.metadata() or {}).items()}
        return {k: f.get_tensor(k) for k in f.keys()}, header


class Trainer:
    """AdamW with a cosine decay over `budget` steps; saves every two minutes, goes on from there.

    The running mean of the weights has a window of a tenth of the steps made, at most 1 / 2000.
    """

    def __init__(self, name, modules, build, budget, rate, outer, decay=0.0, keep=0.999):
        self.name, self.modules = name, torch.nn.ModuleDict(modules)
        self.path, self.logfile = Path(build) / f"{name}.safetensors", Path(build) / f"{name}.log"
        self.budget, self.rate, self.keep = budget, rate, keep
        self.steps, self.seconds = 0, 0.0
        named = [(k, p) for k, p in self.modules.named_parameters() if p.requires_grad]
        self.names, self.params = [k for k, _ in named], [p for _, p in named]
        # Matrices and kernels get Muon; vectors and what touches pixels or words get AdamW
        inner = [k for k, p in named if p.ndim > 1 and not any(w in k for w in outer)]
        fast = [p for k, p in named if k in inner]
        slow = [p for k, p in named if k not in inner]
        self.opts = [
            Muon(fast, rate, decay=decay),
            torch.optim.AdamW(slow, rate / 2, betas=(0.9, 0.99), weight_decay=0.0),
        ]
        state = self.modules.state_dict()
        self.average = {k: v.detach().clone() for k, v in state.items()}
        self.resume()
        self.last = self.saved = time.time()

    def resume(self):
        tensors, header = load_state(self.path)
        if tensors is None:
            return
        live = {k[5:]: v for k, v in tensors.items() if k.startswith("live.")}
        self.modules.load_state_dict(live)
        self.average = {
            k: tensors["mean." + k].to(v.device) for k, v in self.modules.state_dict().items()
        }
        for name, param in zip(self.names, self.params):
            for opt in self.opts:
                if any(param is p for group in opt.param_groups for p in group["params"]):
                    for key in ("exp_avg", "exp_avg_sq", "step"):
                        if f"{key}.{name}" in tensors:
                            value = tensors[f"{key}.{name}"]
                            value = value if key == "step" else value.to(param.device)
                            opt.state[param][key] = value
        self.steps, self.seconds = header["steps"], header["seconds"]
        self.say(f"goes on from step {self.steps}")

    def say(self, text):
        line = f"{self.name} step {self.steps} at {self.seconds / 60:.1f} min: {text}"
        print(line, flush=True)
        with open(self.logfile, "a") as f:
            f.write(line + "\n")

    def save(self):
        tensors = {f"live.{k}": v for k, v in self.modules.state_dict().items()}
        tensors |= {f"mean.{k}": v for k, v in self.average.items()}
        for name, param in zip(self.names, self.params):
            for opt in self.opts:
                for key, value in opt.state.get(param, {}).items():
                    tensors[f"{key}.{name}"] = value
        save_state(self.path, tensors, steps=self.steps, seconds=self.seconds)
        self.saved = time.time()

    def running(self):
        """True while the budget lasts; saves every two minutes and at the end."""
        now = time.time()
        self.seconds, self.last = self.seconds + now - self.last, now
        if self.steps >= self.budget or now - self.saved > 120:
            self.save()
        return self.steps < self.budget

    def step(self, loss):
        """One AdamW step and one step of the running mean of the weights."""
        part = self.steps / self.budget
        warm = min(1.0, (self.steps + 1) / 200)
        rate = self.rate * warm * (0.505 + 0.495 * math.cos(math.pi * part))
        for opt, share in zip(self.opts, (1.0, 0.5)):
            for group in opt.param_groups:
                group["lr"] = rate * share
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        for opt in self.opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        self.steps += 1
        keep = min(self.keep, (1 + self.steps) / (20 + self.steps))
        with torch.no_grad():
            for key, value in self.modules.state_dict().items():
                mean = self.average[key]
                if mean.is_floating_point():
                    mean.lerp_(value, 1 - keep)
                else:
                    mean.copy_(value)

    def use_average(self):
        """Put the running mean into the modules; the live weights stay in the file."""
        self.modules.load_state_dict(self.average)
