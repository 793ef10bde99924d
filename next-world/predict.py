"""Which step decides which cue: E of each cue in the latents, and Table 5 as a Gaussian model predicts it.

A cue's two values differ by d in the latents that the UNet sees, E = |d|^2 / 4. Given x_t, an exact
denoiser knows the right one against a wrong one by a Gaussian observation of mean +-sqrt(E SNR(t)),
std 1. Each cue is right with prior q. Branching at t shows the posterior.
"""
import sys; sys.path.insert(0, "./repo"); sys.path.insert(0, ".")
import argparse
import numpy as np, torch
PAPER = [8.2, 16.8, 15.6, 28.1, 28.9, 34.0, 43.0, 44.5, 52.3, 66.4]

def snr(T=20):
    beta = np.linspace(.00085 ** .5, .012 ** .5, 1000) ** 2
    a = np.cumprod(1 - beta)
    t = np.arange(T) * (1000 // T) + 1
    return a[t] / (1 - a[t])  # index k: paper time k + 1

def table5(cues, K=3, n=200_000, seed=0):
    """cues: [(list of E, q)]; the share of K-way branches that differ at t = 2, 4, ..., 20."""
    rng, out, s = np.random.default_rng(seed), [], snr()
    truth, es, noise = [], [], []
    for E, q in cues:
        truth.append(rng.random(n) < q); es.append(rng.choice(E, n)); noise.append(rng.standard_normal(n))
    for t in range(2, 21, 2):
        p = np.ones(n)
        for (E, q), r, e, z in zip(cues, truth, es, noise):
            m = np.sqrt(e * s[t - 1])
            y = np.where(r, m, -m) + z
            odds = q / (1 - q) * np.exp(np.clip(2 * m * y, -50, 50))
            p = p * odds / (1 + odds)
        out.append(100 * np.mean(1 - p ** K - (1 - p) ** K))
    return np.array(out)

def rms(x):
    return float(np.sqrt(np.mean((np.array(x)[1:] - PAPER[1:]) ** 2)))

def main():
    a = argparse.ArgumentParser(); a.add_argument("--ae"); a.add_argument("--n", type=int, default=150); a.add_argument("--std", type=float, nargs="*", default=[.25,.3,.35])
    args = a.parse_args(); torch.set_num_threads(1)
    from tiny import world as w
    from ae_train import new_autoencoder, to_tensor
    from trainer import load_state
    vae = new_autoencoder()
    st = load_state(args.ae)[0]; vae.load_state_dict({k[9:]: v for k, v in st.items() if k.startswith("mean.vae.")})
    enc = lambda xs: torch.cat([vae.encode(to_tensor(np.stack(xs[k:k+64]))).latent_dist.mean for k in range(0, len(xs), 64)])
    rng = np.random.default_rng(5)
    with torch.no_grad():
        std = float(enc([w.draw_scene(s, rng) for s in w.random_scenes(rng, 300)]).std())
        print("std of latents %.3f" % std)
        res = {}
        for group, kinds in (("1", w.ACTIVITIES), ("2", w.COLOURS), ("3", w.RELATION_KINDS)):
            fs = [f for f in sorted(w.listed_facts()) if f[0] in kinds]
            for part in ("big", "small", "tiny", "style", "ground", "side", "size", "noun"):
                A, B = [], []
                for n in range(args.n):
                    sc = w.scene_of(fs[rng.integers(len(fs))], rng)
                    if part == "big":
                        r = w.rivals(sc.fact); other = sc._replace(fact=r[rng.integers(len(r))])
                    elif part == "noun":
                        k = fs[rng.integers(len(fs))]; other = sc._replace(fact=(sc.fact[0], *k[1:]))
                    else:
                        vals = {"small": w.cue_kinds(sc.fact), "tiny": w.cue_kinds(sc.fact), "style": w.STYLES, "ground": w.GROUNDS, "side": w.SIDES, "size": w.SIZES}[part]
                        vals = [v for v in vals if v != getattr(sc, part)]
                        other = sc._replace(**{part: vals[rng.integers(len(vals))]})
                    seed = rng.integers(1 << 30)
                    A.append(w.draw_scene(sc, np.random.default_rng(seed))); B.append(w.draw_scene(other, np.random.default_rng(seed)))
                e = ((enc(A) - enc(B)).square().sum((1, 2, 3)) / 4 / std**2).numpy()
                res[group, part] = e
                print(f"template {group} {part:7s} E at s = .35: mean {e.mean()*.1225:6.2f}  10/50/90 %:", np.round(np.quantile(e, (.1, .5, .9)) * .1225, 2), flush=True)
        print("paper", PAPER)
        for s in args.std:
            for group in "123":
                cues = [(res[group, p] * s * s, q) for p, q in (("big", .6), ("small", .75), ("tiny", .75))]
                t5 = table5(cues); print(f"s {s} template {group}: {np.round(t5,1)} rms {rms(t5):.1f}")

if __name__ == "__main__":
    print("[S] of FACTS:", np.round(table5([([17], .6), ([1.3, 2.5], .75), ([.4, .6], .75)]), 0), "wanted 0 6 14 22 30 36 45 53 59 65")
    main()
