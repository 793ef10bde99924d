"""How much of the policy gradient is signal: at which steps, by which selection.

    python studies/gradient_signal.py                         # tiny model, 640 queries
    python studies/gradient_signal.py --tau0 14 --branches 8  # any flag of train.py

Before the first update a root's gradient g_p is the sum, over its branches and steps,
of w grad log p(x_{t-1} | x_t), w = r_hat where the trajectory is kept, else 0. Roots
are independent (but for r_hat's mean and std), so the mean of g_p . g_q over p != q
estimates |E g|^2 without bias; the mean of |g_p|^2 is signal and noise. The table's
figure is

    25 * mean(g_p . g_q) / mean(|g_p|^2)

the squared signal-to-noise ratio of 25 roots: at 1 their gradient is half signal, at
0.01 that takes 2,500 roots. +- is a standard error if there is no signal. Steps are
weighted as --step-weight says; the RMS is measured on the first half of the roots, the
shares of g^2 on the other. The gradient is that of LoRA's `up` weights; that of `down`
is 0 at the start. Two bytes a query, step and weight are kept: 10 GB for Stable
Diffusion at 640 queries. [ours]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import train
from b2rl import RewardNormaliser, StepWeights, select_all, select_pairs, training_interval
from ddim_logprob import log_prob, step_factor
from eval import guarded
from lora import inject_lora, lora_layers
from model import DTYPES, load_model
from prompts import load_prompts
from rewards import load_reward
from studies.common import markdown

OWN = "--model=tiny --out=runs/gradient-signal --queries=640 --tau0=20"
RANGES = ((1, 2), (3, 6), (7, 9), (10, 12), (13, 15), (16, 17), (18, 20))  # steps t
RANGES += ((3, 20), (10, 20), (16, 20), (1, 7), (8, 14), (15, 20), (1, 20))


def score_vectors(model, x, start, names, size):
    """grad log p of all trajectories and steps in LoRA's up weights: (P, K, n, W).

    x: (P, K, n + 1, C, h, w) of P prompts. One backward pass serves `size` states: at a
    linear layer a sample's gradient is what comes back times what went in.
    """
    (P, K, states), layers, seen = x.shape[:3], lora_layers(model.unet).values(), {}

    def watch(layer, inputs, output):
        def keep(back):
            seen[layer] = torch.einsum("blo,blr->bor", back.float(), low).flatten(1).cpu()

        low = torch.nn.functional.linear(inputs[0].float(), layer.down).detach()
        output.register_hook(keep)

    hooks = [layer.register_forward_hook(watch) for layer in layers]
    scale = 2.0**16 if model.unet.dtype == torch.float16 else 1.0  # or it were 0
    width = sum(layer.up.numel() for layer in layers)
    out = torch.zeros(P * K, states - 1, width, dtype=torch.bfloat16)
    for rows in torch.arange(P * K).split(size):
        p, k = rows // K, rows % K
        for s in range(states - 1):
            x_t, a_t = x[p, k, s].to(model.device), x[p, k, s + 1].to(model.device)
            mu, sigma = model.policy(x_t, start - s, [names[j] for j in p.tolist()])
            (scale * log_prob(a_t, mu, sigma).sum()).backward()
            both = torch.cat([seen[layer] for layer in layers], 1)  # guidance's halves
            out[rows, s] = (both.view(-1, len(p), width).sum(0) / scale).bfloat16()
    for hook in hooks:
        hook.remove()
    return out.unflatten(0, (P, K))


def ratio(g, roots=25):
    """The figure above and its standard error; g: (P, W), a gradient a root."""
    gram, P = (g @ g.T).double(), len(g)
    others, energy = gram[~torch.eye(P, dtype=torch.bool)], gram.diag().mean()
    error = others.std() / (P * (P - 1) / 2) ** 0.5
    return roots * (others.mean() / energy).item(), roots * (error / energy).item()


def sample(cfg, model):
    """Round 0 as `train.algorithm_1` samples it: states x, prompts, scores (P, K)."""
    prompts, _ = load_prompts(cfg.template, cfg.prompts)
    reward = load_reward(cfg.reward, model.tiny, model.device, DTYPES[cfg.precision])
    start, stop = training_interval(cfg.tau0, cfg.T, cfg.interval)
    names, own = train.draw_roots(prompts, cfg, 0, 0, 1)
    roots = [(cfg.seed, 0, p) for p in own.tolist()]
    x_T = model.noise([(*root, "x_T") for root in roots])
    keys = [(*root, "shared") for root in roots]
    x_tau = model.denoise(x_T, cfg.T, start, names, keys)
    keys = [[(*root, k) for k in range(cfg.branches)] for root in roots]
    x, _ = model.branch(x_tau, start, stop, names, keys)
    x_0 = model.finish(x[:, :, -1], stop, names, keys)
    scores, _ = train.score(model, reward, None, x_0, names, own, len(own), cfg.branches)
    return x, names, scores


def signal(cfg):
    """Print the table: a row a range of steps, a column a selection."""
    torch.set_num_threads(cfg.threads or torch.get_num_threads())
    model = load_model(cfg, torch.device(cfg.device))
    inject_lora(model.unet, cfg.rank, seed=cfg.seed)
    start, stop = training_interval(cfg.tau0, cfg.T, cfg.interval)
    x, names, scores = sample(cfg, model)
    vectors = score_vectors(model, x, start, names, cfg.micro_batch)
    half, weights = len(x) // 2, StepWeights(cfg.step_weight, step_factor(model.schedule))
    squares = vectors[:half].float().square().sum(3)
    weights.measure(start, squares.mean((0, 1)))
    vectors *= weights(start, stop)[:, None]
    r_hat = RewardNormaliser(cfg.window, cfg.min_count)(0, names, scores)
    print(f"score {scores.mean():.4f}, std {scores.std():.4f}")
    kept, chosen = {"all (DDPO)": select_all(r_hat)}, {}
    if cfg.branches > 1:
        kept[f"pairs, threshold {cfg.threshold}"] = select_pairs(r_hat, cfg.threshold)
        print(f"std of r_hat within a root {r_hat.std(1).mean():.2f}")
    for name, rows in kept.items():
        w, (_, p, k) = torch.zeros_like(r_hat), rows.T
        w[p, k] = r_hat[p, k].clamp(-cfg.adv_clip, cfg.adv_clip)
        chosen[name] = w
    if cfg.branches > 1:
        chosen["all, less the root's mean"] = r_hat - r_hat.mean(1, keepdim=True)

    def of_roots(w, steps):  # (P, W)
        return torch.einsum("pk,pksn->pn", w, vectors[:, :, steps].float())

    energy = [of_roots(r_hat, [s])[half:].square().sum().item() for s in range(start - stop)]
    most = max(energy) / sum(energy)
    print(f"step weights {cfg.step_weight}: the largest share of a step {most:.1%}")
    table = []
    for low, high in RANGES:
        steps = [start - t for t in range(low, high + 1) if stop < t <= start]
        if steps:
            cells = [ratio(of_roots(w, steps)) for w in chosen.values()]
            share = sum(energy[s] for s in steps) / sum(energy)
            row = [f"{low} to {high}", f"{share:.1%}"]
            table.append(row + [f"{value:+.3f} +- {error:.3f}" for value, error in cells])
    print("\n" + "\n".join(markdown(["steps t", "share of g^2", *chosen], table)))


def main(argv=None):
    given = sys.argv[1:] if argv is None else argv
    guarded(signal, train.parse_args([*OWN.split(), *given]))


if __name__ == "__main__":
    main()
