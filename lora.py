"""LoRA by hand: y = (W + B A) x, only A and B train (Hu et al., [26] in the paper).

    rank 4 on to_q, to_k, to_v, to_out of every attention of the UNet [official]; SD 1.x
    then has 797,184 trainable numbers. A ("down") is drawn from N(0, 1/rank), B ("up")
    is zero, so the model starts as the base. Scale alpha/rank is 1. A and B stay
    float32 over a half-precision UNet, and their product out of W, whose rounding would
    swallow it. No dropout: it would break ratio 1 before the first update.

Files are safetensors with the names that diffusers' `load_lora_weights` reads:
`unet.<module>.lora_A.weight` (rank, in) and `unet.<module>.lora_B.weight` (out, rank).
`webui_state` renames them for web UIs.
"""

import contextlib

import torch
from torch import nn

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


class LoRALinear(nn.Module):
    """A frozen `nn.Linear` with a trainable low-rank part; (..., in) -> (..., out)."""

    def __init__(self, base, rank, generator=None):
        super().__init__()
        self.base, self.enabled = base, True
        down = torch.randn(rank, base.in_features, generator=generator) / rank**0.5
        self.down = nn.Parameter(down.to(base.weight.device))
        up = torch.zeros(base.out_features, rank, device=base.weight.device)
        self.up = nn.Parameter(up)

    def forward(self, x):
        base = self.base
        if not self.enabled:
            return base(x)
        if base.weight.dtype == torch.float32:  # (W + B A) x: one pass over x, not three
            return nn.functional.linear(x, base.weight + self.up @ self.down, base.bias)
        low = nn.functional.linear(x.float(), self.down)  # A x: (..., rank), float32
        return base(x) + nn.functional.linear(low, self.up).to(x.dtype)


def inject_lora(unet, rank=4, targets=TARGETS, seed=0):
    """Freeze `unet`, wrap its attention projections, return the parameters by name.

    targets: ends of the names of linear layers, e.g. "ff.net.2" for the feed-forward
    part. The names are those of the file. Raises ValueError if a target
    matches no linear layer.
    """
    unet.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    linear = {n: m for n, m in unet.named_modules() if isinstance(m, nn.Linear)}
    for target in targets:
        if not any(name.endswith(f".{target}") for name in linear):
            raise ValueError(f"no linear layer of this UNet is named {target}")
    for name, module in linear.items():
        if name.endswith(tuple(f".{target}" for target in targets)):
            parent, _, child = name.rpartition(".")
            setattr(unet.get_submodule(parent), child, LoRALinear(module, rank, generator))
    return lora_parameters(unet)


def lora_layers(unet):
    """The LoRA layers by module name."""
    return {n: m for n, m in unet.named_modules() if isinstance(m, LoRALinear)}


def lora_parameters(unet):
    """The trainable parameters under the names of the file, in a fixed order."""
    out = {}
    for name, layer in lora_layers(unet).items():
        out[f"unet.{name}.lora_A.weight"] = layer.down
        out[f"unet.{name}.lora_B.weight"] = layer.up
    return out


@contextlib.contextmanager
def lora_off(unet):
    """Inside, the UNet is the pre-trained p_pre, bit for bit (reference of Eq. 7, 8)."""
    layers = lora_layers(unet).values()
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.enabled = True


def lora_state(unet):
    """A detached float32 CPU copy of the LoRA weights, as saved."""
    parameters = lora_parameters(unet).items()
    return {name: p.detach().float().cpu().clone() for name, p in parameters}


def webui_state(state):
    """`lora_state` under the names that AUTOMATIC1111, ComfyUI and others read."""
    from diffusers.utils import convert_state_dict_to_kohya

    return {k: v.float() for k, v in convert_state_dict_to_kohya(dict(state)).items()}
