"""Each loss's value and gradient against another derivation; Eq. 4, 6, 7, 8."""

import math

import pytest
import torch

from b2rl import ddpo_loss, dpo_loss, dpok_loss, pg_loss

E = 0.1  # clip range, large so that finite differences stay on one side of the clip
LOG_P_OLD = -1.3
RATIOS = (0.5, 0.89, 0.91, 1.0, 1.09, 1.11, 2.0)
CASES = [(rho, r) for rho in RATIOS for r in (-3.0, -0.4, 0.7, 5.0)]


def tensors(rho):
    log_p = torch.tensor([LOG_P_OLD + math.log(rho)], dtype=torch.float64, requires_grad=True)
    return log_p, torch.full_like(log_p, LOG_P_OLD).detach()


def check_gradient(function, log_p, want):
    """autograd = the formula = central differences."""
    (got,) = torch.autograd.grad(function(log_p).sum(), log_p)
    h = 1e-6
    with torch.no_grad():
        slope = (function(log_p + h) - function(log_p - h)) / (2 * h)
    assert got.item() == pytest.approx(want, abs=1e-9)
    assert slope.item() == pytest.approx(want, abs=1e-6)


def clipped(rho, r):
    """PPO in words: a good sample's ratio earns nothing above 1 + e, a bad one's none below 1 - e.

    Returns loss and its derivative with respect to log p.
    """
    saturated = rho > 1 + E if r > 0 else rho < 1 - E
    bound = 1 + E if r > 0 else 1 - E
    return (-bound * r, 0.0) if saturated else (-rho * r, -rho * r)


@pytest.mark.parametrize("rho, r", CASES)
def test_ddpo(rho, r):
    """Both signs of r_hat, both sides of the clip and inside it."""
    log_p, log_p_old = tensors(rho)
    r_hat = torch.tensor([r], dtype=torch.float64)
    value, slope = clipped(rho, r)
    assert ddpo_loss(log_p, log_p_old, r_hat, E).item() == pytest.approx(value)
    check_gradient(lambda p: ddpo_loss(p, log_p_old, r_hat, E), log_p, slope)


@pytest.mark.parametrize("rho, r", CASES)
def test_pg_is_not_clipped(rho, r):
    log_p, log_p_old = tensors(rho)
    r_hat = torch.tensor([r], dtype=torch.float64)
    assert pg_loss(log_p, log_p_old, r_hat).item() == pytest.approx(-rho * r)
    check_gradient(lambda p: pg_loss(p, log_p_old, r_hat), log_p, -rho * r)


@pytest.mark.parametrize("loss", [pg_loss, lambda p, old, r: ddpo_loss(p, old, r, 1e-4)])
def test_gradient_at_ratio_one_is_the_policy_gradient(loss):
    """Eq. 6 at theta = theta_old: -r_hat grad log p; descent raises a good sample's log p."""
    log_p = torch.randn(6, requires_grad=True)
    r_hat = torch.randn(6)
    loss(log_p, log_p.detach(), r_hat).sum().backward()
    torch.testing.assert_close(log_p.grad, -r_hat)


@pytest.mark.parametrize("rho, r", CASES[::3])
def test_dpok(rho, r):
    """Eq. 7: alpha x clipped reward term + beta x KL, KL = (log p)^2 here as a stand-in."""
    log_p, log_p_old = tensors(rho)
    r_hat = torch.tensor([r], dtype=torch.float64)
    value, slope = clipped(rho, r)

    def loss(p, alpha=2.0, beta=0.3):
        return dpok_loss(p, log_p_old, r_hat, p**2, E, alpha, beta)

    p = log_p.item()
    assert loss(log_p).item() == pytest.approx(2 * value + 0.3 * p**2)
    check_gradient(loss, log_p, 2 * slope + 0.3 * 2 * p)
    assert loss(log_p, 1.0, 0.0).item() == ddpo_loss(log_p, log_p_old, r_hat, E).item()
    plain = dpok_loss(log_p, log_p_old, r_hat, log_p**2, E)  # its defaults: alpha 1, beta 0.01
    assert plain.item() == pytest.approx(value + 0.01 * p**2)


@pytest.mark.parametrize("beta", [0.1, 25.6])
def test_dpo_value_and_gradient_weight(beta):
    """Eq. 8: log(1 + e^-h); the gradient weight is beta sigma(-h), opposite for best and worst."""
    g = torch.Generator().manual_seed(0)
    best, worst, ref_best, ref_worst = torch.randn(4, 8, generator=g, dtype=torch.float64) / 10
    best.requires_grad_(), worst.requires_grad_()
    loss, h = dpo_loss(best, worst, ref_best, ref_worst, beta)
    ratios = [beta * ((a - b) - (c - d)) for a, b, c, d in zip(
        *(v.tolist() for v in (best, ref_best, worst, ref_worst)))]  # fmt: skip
    assert h.tolist() == pytest.approx(ratios)
    assert loss.tolist() == pytest.approx([math.log1p(math.exp(-x)) for x in ratios])
    loss.sum().backward()
    weight = [beta / (1 + math.exp(x)) for x in ratios]
    assert best.grad.tolist() == pytest.approx([-w for w in weight])
    assert worst.grad.tolist() == pytest.approx(weight)


def test_dpo_limits():
    """An identical pair gives log 2; a policy that is the reference too; a sure pair gives 0."""
    p, ref = torch.randn(5), torch.randn(5)
    torch.testing.assert_close(dpo_loss(p, p, ref, ref, 3.0)[0], torch.full((5,), math.log(2)))
    q, other = torch.randn(5), torch.randn(5)
    torch.testing.assert_close(dpo_loss(p, q, p, q, 3.0)[0], torch.full((5,), math.log(2)))
    assert torch.equal(dpo_loss(p, q, p, other, 0.0)[1].abs(), torch.zeros(5))
    sure = dpo_loss(torch.tensor([9.0]), torch.tensor([-9.0]), torch.zeros(1), torch.zeros(1), 9.0)
    assert sure[0].item() == pytest.approx(0, abs=1e-6)
    lost = dpo_loss(torch.tensor([-50.0]), torch.tensor([50.0]), torch.zeros(1), torch.zeros(1), 9)
    assert lost[0].item() == pytest.approx(900.0)  # no overflow
