"""LoRA by hand: starts as the base, switches off, has the right size, is read by diffusers."""

import pytest
import torch
from conftest import make_pipeline, make_small, randomise_lora
from diffusers import UNet2DConditionModel

from lora import TARGETS, LoRALinear, inject_lora, lora_layers, lora_off, lora_parameters
from lora import lora_state, webui_state
from support.run_folder import write_safetensors


@torch.no_grad()
def predict(unet, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, text = torch.randn(2, 4, 8, 8, generator=g), torch.randn(2, 12, 32, generator=g)
    return unet(x, torch.tensor([500, 3]), text).sample


@pytest.fixture
def unet():
    return make_small().policy.unet


def test_zero_start_is_the_base_and_so_is_lora_off(unet):
    """Bit for bit; with random LoRA only while it is switched off, also after an exception."""
    base = predict(unet)
    inject_lora(unet)
    assert torch.equal(predict(unet), base)
    randomise_lora(unet)
    with_lora = predict(unet)
    assert not torch.allclose(with_lora, base, atol=1e-3)
    with lora_off(unet):
        assert torch.equal(predict(unet), base)
    assert torch.equal(predict(unet), with_lora)
    with pytest.raises(RuntimeError), lora_off(unet):
        raise RuntimeError
    assert torch.equal(predict(unet), with_lora)


@pytest.mark.parametrize("dtype, rounding", [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("bias", [True, False])
def test_layer_is_w_x_plus_b_a_x(dtype, rounding, bias):
    """Output and gradients of x, A and B against the two products apart, in float64."""
    torch.manual_seed(0)
    base = torch.nn.Linear(40, 24, bias=bias, dtype=dtype).requires_grad_(False)
    layer = LoRALinear(base, rank=3)
    layer.up.data.normal_()
    assert layer.down.shape == (3, 40) and layer.up.shape == (24, 3)
    x, g = torch.randn(2, 6, 40).to(dtype), torch.randn(2, 6, 24).to(dtype)
    ours, A, B = (v.detach().clone().requires_grad_() for v in (x, layer.down, layer.up))
    layer.down, layer.up = torch.nn.Parameter(A), torch.nn.Parameter(B)
    y = layer(ours)
    got = (y, *torch.autograd.grad(y, (ours, layer.down, layer.up), g))
    x, A, B = (v.detach().double().requires_grad_() for v in (x, A, B))
    y = x @ base.weight.double().T + x @ A.T @ B.T + (base.bias.double() if bias else 0)
    want = (y, *torch.autograd.grad(y, (x, A, B), g.double()))
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b).norm() <= rounding * b.norm()


def test_the_low_rank_product_stays_float32_over_a_half_precision_base():
    """Over W = 0 the output is the exact B A x, rounded once: A x in bfloat16 would err more."""
    base = torch.nn.Linear(64, 32, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    base.weight.zero_()
    layer, g = LoRALinear(base, rank=8), torch.Generator().manual_seed(0)
    layer.up.data = torch.randn(32, 8, generator=g)
    x = torch.randn(16, 64, generator=g).bfloat16()
    want = x.double() @ layer.down.double().T @ layer.up.double().T
    error = (layer(x).double() - want).abs()
    assert (error <= 2**-8 * want.abs() + 1e-5).all(), "half of the last of 8 bits"


def test_start_is_normal_with_variance_one_over_rank():
    """A ~ N(0, 1/rank), B = 0; keyed by the seed."""
    for rank in (4, 16):
        layer = LoRALinear(torch.nn.Linear(2000, 8), rank, torch.Generator().manual_seed(0))
        assert layer.down.std().item() == pytest.approx(rank**-0.5, rel=0.03)
        assert abs(layer.down.mean()) < 0.02 and layer.up.eq(0).all()
    first, same, other = (lora_state(_injected(seed)) for seed in (0, 0, 1))
    assert all(torch.equal(first[k], same[k]) for k in first)
    assert not any(torch.equal(first[k], other[k]) for k in first if "lora_A" in k)
    downs = [v for k, v in first.items() if "lora_A" in k and v.shape == (4, 16)]
    assert len({v.sum().item() for v in downs}) == len(downs), "each layer has its own start"


def _injected(seed=0, rank=4):
    unet = make_pipeline().unet
    inject_lora(unet, rank, seed=seed)
    return unet


def test_half_precision_base_keeps_float32_lora(unet):
    unet.to(torch.bfloat16)
    inject_lora(unet)
    assert {p.dtype for p in lora_parameters(unet).values()} == {torch.float32}
    layer = next(iter(lora_layers(unet).values()))
    out = layer(torch.randn(2, layer.base.in_features, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16


def test_stable_diffusion_has_797184_trainable_numbers():
    """FACTS.md's figure, on SD 1.x's own UNet (without storage)."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964
    lora = inject_lora(unet)
    assert sum(p.numel() for p in lora.values()) == 797_184
    assert len(lora) == 2 * 128  # 16 blocks x 2 attentions x 4 projections, A and B


def test_only_lora_trains_and_gradients_reach_all_of_it():
    unet = make_pipeline().unet
    assert all(p.requires_grad for p in unet.parameters())
    lora = inject_lora(unet)
    assert {id(p) for p in unet.parameters() if p.requires_grad} == {id(p) for p in lora.values()}
    assert lora == lora_parameters(unet)
    randomise_lora(unet)
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 12, 32)
    unet(x, torch.tensor([500]), text).sample.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in lora.values())
    assert all(p.grad is None for p in unet.parameters() if not p.requires_grad)


def test_wrapped_modules_are_the_attention_projections(unet):
    inject_lora(unet)
    names = set(lora_layers(unet))
    attentions = [n for n, _ in unet.named_modules() if n.endswith((".attn1", ".attn2"))]
    want = {f"{n}.{p}" for n in attentions for p in ("to_q", "to_k", "to_v", "to_out.0")}
    assert names == want and len(attentions) > 4


@torch.no_grad()
def test_feed_forward_targets(unet):
    """Only the layers of that name, with the file's names; the base at first, then not."""
    base = predict(unet)
    lora = inject_lora(unet, targets=("ff.net.2",))
    names = set(lora_layers(unet))
    blocks = [n for n, _ in unet.named_modules() if n.endswith(".ff")]
    assert names == {f"{n}.net.2" for n in blocks} and len(names) > 2
    assert set(lora) == {f"unet.{n}.lora_{half}.weight" for n in names for half in "AB"}
    assert torch.equal(predict(unet), base)
    randomise_lora(unet)
    assert not torch.allclose(predict(unet), base, atol=1e-3)
    with lora_off(unet):
        assert torch.equal(predict(unet), base)


def test_feed_forward_beside_the_attention(unet):
    both = inject_lora(unet, targets=(*TARGETS, "ff.net.2"))
    attention, feed_forward = (
        inject_lora(make_small().policy.unet, targets=targets)
        for targets in (TARGETS, ["ff.net.2"])
    )
    assert both.keys() == attention.keys() | feed_forward.keys()
    assert not attention.keys() & feed_forward.keys()


@pytest.mark.parametrize("wrong", ["to_qkv", "attn1", "conv_in", "q", "ff.net.1", ""])
def test_a_target_that_matches_no_linear_layer_is_refused(unet, wrong):
    """By its name, also beside others that match; nothing is wrapped then."""
    for targets in ((wrong,), (*TARGETS, wrong)):
        with pytest.raises(ValueError, match=f"named {wrong}$"):
            inject_lora(unet, targets=targets)
        assert not lora_layers(unet)


def test_the_state_is_a_copy(unet):
    """Detached, float32: later training does not change what was saved."""
    inject_lora(unet)
    randomise_lora(unet)
    state = lora_state(unet)
    before = {name: value.clone() for name, value in state.items()}
    randomise_lora(unet, seed=2)
    assert state.keys() == lora_parameters(unet).keys()
    assert all(torch.equal(state[name], value) for name, value in before.items())
    assert all(v.dtype == torch.float32 and not v.requires_grad for v in state.values())


@pytest.mark.parametrize("targets", [TARGETS, ("ff.net.2", "to_q")])
def test_diffusers_loads_the_saved_file(tmp_path, targets):
    """`pipe.load_lora_weights(folder)` makes the same UNet as ours, not the base."""
    ours, theirs = make_pipeline(), make_pipeline()
    base = predict(theirs.unet)
    inject_lora(ours.unet, targets=targets)
    randomise_lora(ours.unet)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    write_safetensors(path, lora_state(ours.unet))
    theirs.load_lora_weights(tmp_path)
    torch.testing.assert_close(predict(theirs.unet), predict(ours.unet), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(predict(theirs.unet), base, atol=1e-3)
    assert not list(tmp_path.glob("*.part"))


def test_the_layout_of_web_uis():
    """kohya's names: a down, an up and an alpha a layer; alpha = rank, so that the scale is 1."""
    unet = _injected(rank=3)
    randomise_lora(unet)
    state = lora_state(unet)
    webui = webui_state(state)
    assert len(webui) == len(state) // 2 * 3
    for name, value in state.items():
        layer, _, kind = name.removesuffix(".weight").rpartition(".")
        layer = "lora_unet_" + layer.removeprefix("unet.").replace(".", "_")
        half = {"lora_A": "lora_down", "lora_B": "lora_up"}[kind]
        assert torch.equal(webui[f"{layer}.{half}.weight"], value)
        assert webui[f"{layer}.alpha"].item() == 3
    theirs = make_pipeline()
    theirs.load_lora_weights(dict(webui))
    torch.testing.assert_close(predict(theirs.unet), predict(unet), atol=1e-5, rtol=1e-5)
