"""How much of the policy gradient is signal: at which steps, by which selection of trajectories.

    python results/gradient_signal.py                         # tiny model, 640 queries, tau 20, K 4
    python results/gradient_signal.py --tau0 14 --branches 8  # any flag of train.py

Before the first update the gradient of a root p is g_p = sum over its branches k of
w(p, k) sum over t of grad log p(x_{t-1} | x_t), w = r_hat where the selection keeps the trajectory
and 0 elsewhere. Roots are independent (but for r_hat's mean and std, which those of one prompt
share), so the mean of g_p . g_q over p != q estimates |E g|^2 without bias, and the mean of |g_p|^2
is signal and noise together. Printed is

    25 * mean(g_p . g_q) / mean(|g_p|^2)

the squared signal-to-noise ratio of a batch of 25 roots: at 1 the gradient of 25 roots is half
signal, at 0.01 it takes 2,500 roots. +- is a standard error if there is no signal. The gradient is that of LoRA's `up`
weights; that of `down` is 0 at the start. It keeps 2 bytes a query, step and weight: 10 GB for
Stable Diffusion (399,360 weights) at 640 queries and 20 steps. [ours]
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import runs  # noqa: E402
import train  # noqa: E402
from b2rl import RewardNormaliser, select_all, select_pairs, training_interval  # noqa: E402
from ddim_logprob import ddim_mean, log_prob  # noqa: E402
from lora import inject_lora, lora_layers  # noqa: E402
from rewards import load_reward  # noqa: E402

RANGES = ((1, 2), (3, 6), (7, 9), (10, 12), (13, 15), (16, 17), (18, 20), (3, 20), (10, 20),
          (16, 20), (1, 20))  # steps t, from..to  # fmt: skip


def score_vectors(model, data, interval, args):
    """grad log p of every trajectory and step in LoRA's up weights: (P, K, steps, n) bfloat16.

    Per sample, in one backward pass a batch: at a linear layer a sample's gradient is the product
    of what comes back and what went in.
    """
    seen, layers, (P, K) = {}, lora_layers(model.unet), data.scores.shape

    def watch(name):
        def forward(layer, inputs, output):
            low = torch.nn.functional.linear(inputs[0].float(), layer.down.float()).detach()
            output.register_hook(
                lambda back: seen.__setitem__(name, torch.einsum("blo,blr->bor", back.float(), low).cpu()))

        return forward

    hooks = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    steps = interval[0] - interval[1]
    scale = runs.loss_scale(model, args)  # fp16 gradients of a mean over D would be 0
    out = torch.zeros(P * K, steps, sum(l.up.numel() for l in layers.values()),
                      dtype=torch.bfloat16)  # fmt: skip
    for part in torch.arange(P * K).split(args.micro_batch):
        root, branch = part // K, part % K
        for step in range(steps):
            rows = torch.stack([root, torch.full_like(root, step), root, branch], 1)
            prediction, x_t, t = train.predict(model, data, rows, interval, args)
            mu, sigma = ddim_mean(model.schedule, prediction, x_t, t)
            x_prev = data.states[root, branch, step + 1].to(model.device)
            (scale * log_prob(x_prev, mu, sigma).sum()).backward()
            both = torch.cat([seen[name].flatten(1) for name in layers], 1)
            halves = 1 if args.guidance == 1 else 2  # guidance: the two halves of one sample
            out[part, step] = (both.view(halves, len(part), -1).sum(0) / scale).bfloat16()
    for hook in hooks:
        hook.remove()
    return out.view(P, K, steps, -1)


def ratio(g, roots=25):
    """The figure above and its standard error; g: (P, n), a gradient a root."""
    gram = (g @ g.T).double()
    n, diagonal = len(g), gram.diag()
    others = gram[~torch.eye(n, dtype=torch.bool)]
    error = others.std() / (n * (n - 1) / 2) ** 0.5
    return roots * (others.mean() / diagonal.mean()).item(), roots * (error / diagonal.mean()).item()


def main(argv):
    args = train.parse_args(["--model", "tiny", "--out", "runs/gradient-signal", "--queries", "640",
                             "--tau0", "20", "--skip-last", "0", *argv])  # fmt: skip
    device = torch.device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    model = runs.load_model(args, device)
    reward = load_reward(args.reward, model.tiny, device)
    prompts, _ = runs.load_prompts(args.template, args.prompts)
    inject_lora(model.unet, args.rank, seed=args.seed)
    interval = training_interval(args.tau0, args.T, args.interval, args.skip_last)
    data = train.sample_round(model, reward, prompts, 0, interval, args, 0, 1)
    r_hat = RewardNormaliser(args.window)(0, data.prompts, data.scores)
    vectors = score_vectors(model, data, interval, args)

    def weights(kept):
        w = torch.zeros_like(r_hat)
        w[kept[:, 1], kept[:, 2]] = r_hat[kept[:, 1], kept[:, 2]].clamp(-args.adv_clip, args.adv_clip)
        return w

    chosen = {"all (DDPO)": select_all(r_hat)}
    if args.branches > 1:
        chosen |= {f"pairs, threshold {h}": select_pairs(r_hat, h) for h in (0.0, args.threshold)}
    chosen = {name: weights(kept) for name, kept in chosen.items()}
    if args.branches > 1:
        chosen["all, less the root's mean"] = r_hat - r_hat.mean(1, keepdim=True)
    within = r_hat.std(1).mean().item() if args.branches > 1 else 0.0
    print(f"score {data.scores.mean():.4f}, std {data.scores.std():.4f}; std of r_hat within a root "
          f"{within:.2f}\n\n| steps t | share of g^2 | " + " | ".join(chosen) + " |")  # fmt: skip
    print("|---|---|" + "---|" * len(chosen))

    def of_roots(w, step):  # (P, n)
        return torch.einsum("pk,pkn->pn", w, vectors[:, :, step].float())

    energy = [of_roots(r_hat, step).square().sum().item() for step in range(vectors.shape[2])]
    for lo, hi in RANGES:
        steps = [interval[0] - t for t in range(lo, hi + 1) if interval[1] < t <= interval[0]]
        if steps:
            cells = []
            for w in chosen.values():
                g = sum(of_roots(w, step) for step in steps)
                cells.append("{:+.3f} +- {:.3f}".format(*ratio(g)))
            print(f"| {lo} to {hi} | {sum(energy[s] for s in steps) / sum(energy):.1%} | "
                  + " | ".join(cells) + " |")  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
