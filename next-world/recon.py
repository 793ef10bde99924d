"""PSNR on the new world's held-out drawings, clean and with noise on the latents; a grid: python recon.py CKPT OUT.png"""
import sys; sys.path.insert(0, "./repo"); sys.path.insert(0, ".")
import numpy as np, torch, math
from PIL import Image
torch.set_num_threads(1)
from tiny import world as w
from ae_train import new_autoencoder, to_tensor
from trainer import load_state
vae = new_autoencoder(); st = load_state(sys.argv[1])[0]
vae.load_state_dict({k[9:]: v for k, v in st.items() if k.startswith("mean.vae.")}); vae = vae.to(memory_format=torch.channels_last)
rng = np.random.default_rng(99); lists = w.read_lists(); groups = {}
for t in "123":
    P = lists[f"{t} train"] + lists[f"{t} unseen"]
    groups[t] = [w.draw_scene(w.right_scene(w.parse(p), w.STYLES[k % 3], rng), rng) for k, p in enumerate(P[::2])]
tiles = []
for noise in (0, .1):
    tot = []
    for t, d in groups.items():
        x = to_tensor(np.stack(d)); ys = []
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            for part in x.split(32):
                z = vae.encode(part).latent_dist.mean; ys.append(vae.decode(z + noise * torch.randn_like(z)).sample.float().clamp(-1, 1))
        y = torch.cat(ys); e = (y - x).square().mean((1, 2, 3)) / 4; tot.append(e)
        print(f"noise {noise} template {t}: {-10*math.log10(e.mean()):.2f} dB, n {len(e)}", flush=True)
        if noise == 0:
            for k in range(0, 8): tiles.append(torch.cat([x[k * 3], y[k * 3]], 1))
    print(f"noise {noise} all: {-10*math.log10(torch.cat(tot).mean()):.2f} dB")
im = torch.cat([torch.cat(tiles[k:k + 8], 2) for k in (0, 8, 16)], 1).permute(1, 2, 0).add(1).mul(127.5).byte().numpy()
Image.fromarray(im).resize((im.shape[1] * 2, im.shape[0] * 2), 0).save(sys.argv[2])
