import argparse, math
import numpy as np, torch
import torch.nn.functional as F
import aedata
from trainer import Trainer
import diffusers
diffusers.utils.logging.disable_progress_bar()

def new_autoencoder(channels=(32, 64, 96), latent=4):
    from diffusers import AutoencoderKL
    n = len(channels)
    return AutoencoderKL(
        block_out_channels=channels, layers_per_block=1, latent_channels=latent,
        norm_num_groups=8, mid_block_add_attention=False, sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * n, up_block_types=("UpDecoderBlock2D",) * n)

def to_tensor(p):
    return torch.from_numpy(p).permute(0, 3, 1, 2).float() / 127.5 - 1

def heldout():
    """Every seventh held-out drawing of the new world's training prompts, all styles (seed 99)."""
    w = aedata.newworld
    rng, out = np.random.default_rng(99), []
    for p in [p for group in w.read_lists().values() for p in group]:
        for s in w.STYLES:
            out.append(w.draw_scene(w.right_scene(w.parse(p), s, rng), rng))
    return to_tensor(np.stack(out))

def psnr(vae, x):
    err = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for part in x.split(64):
            y = vae.decode(vae.encode(part).latent_dist.mean).sample.float().clamp(-1, 1)
            err.append((y - part).square().mean((1, 2, 3)) / 4)
    return -10 * math.log10(torch.cat(err).mean())

if __name__ == "__main__":
    a = argparse.ArgumentParser()
    a.add_argument("--build", default="build"); a.add_argument("--steps", type=int, default=7000)
    a.add_argument("--share", type=float, default=.5); a.add_argument("--latent", type=int, default=4); a.add_argument("--name", default="ae")
    args = a.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(1)
    vae = new_autoencoder(latent=args.latent).to(memory_format=torch.channels_last)
    train = Trainer(args.name, {"vae": vae}, args.build, args.steps, 4e-3, ("conv_in", "conv_out", "quant_conv"))
    rng = np.random.default_rng((1, train.steps)); torch.manual_seed(1 + train.steps)
    test = heldout()[::7].contiguous(memory_format=torch.channels_last)
    print("test", len(test), flush=True)
    run = []
    while train.running():
        x = to_tensor(aedata.batch(rng, 8, args.share)).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            z = vae.encode(x).latent_dist.mean
            level = (.02 + .12 * torch.rand(1)) * torch.rand(len(x), 1, 1, 1)
            y = vae.decode(z + level * torch.randn_like(z)).sample
        error = y.float() - x
        l2, z = error.square().mean(), z.float()
        tidy = (z.std((0, 2, 3)) - 1).square().mean() + z.mean((0, 2, 3)).square().mean()
        train.step(l2 + .05 * error.abs().mean() + .01 * tidy)
        run.append(float(l2.detach()))
        if train.steps % 100 == 0:
            text = "train %.2f dB" % (-10 * math.log10(np.mean(run) / 4)); run = []
            if train.steps % 300 == 0:
                live = {k: v.clone() for k, v in train.modules.state_dict().items()}
                train.use_average(); text += " heldout %.2f dB (mean weights)" % psnr(vae, test)
                train.modules.load_state_dict(live)
            train.say(text)
