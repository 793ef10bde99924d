"""Muon: AdamW's step for vectors; for matrices and convolutions the orthogonalised momentum."""
import torch


def orthogonal(g, steps=5):
    """The nearest semi-orthogonal matrix to g, about (Newton-Schulz, coefficients of Muon)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.flatten(1)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        s = x @ x.T
        x = a * x + (b * s + c * s @ s) @ x
    return (x.T if tall else x).reshape(g.shape)


class Muon(torch.optim.Optimizer):
    def __init__(self, params, lr, momentum=0.95, decay=0.0):
        params = list(params)
        super().__init__(params, dict(lr=lr, momentum=momentum, decay=decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "exp_avg" not in state:
                    state["exp_avg"] = torch.zeros_like(p)
                m = state["exp_avg"].lerp_(p.grad, 1 - group["momentum"])
                g = p.grad.lerp(m, group["momentum"])
                flat = g.flatten(1)
                scale = 0.2 * max(flat.shape) ** 0.5  # the step's RMS is that of AdamW: 0.2
                p.mul_(1 - group["lr"] * group["decay"])
                p.add_(orthogonal(g), alpha=-group["lr"] * scale)
