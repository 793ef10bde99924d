"""Train every part of the tiny model, or hold it to its bars.

    python tiny/build.py                            # all parts; what was cut off goes on
    python tiny/build.py --part unet --steps 99000  # more steps than it had: it goes on
    python tiny/build.py --check --grid base.png    # the table of bars, base samples

ae      AutoencoderKL.
clip    the reward, an open_clip model: it rises with every cue that is right. It learns from
        pictures as the autoencoder decodes them: or it would reward sharpness.
judge   a ResNet of another seed, architecture and loss, trained alike; never a reward.
unet    UNet2DConditionModel with CLIPTextModel. Imperfect on purpose: in the pictures of a
        composed caption each of three cues is often wrong (`samplers.ODDS`). So the base
        misaligns as Stable Diffusion does. It needs the judge.

Shapes: pictures (B, 3, 64, 64); latents (B, 4, 16, 16), which the UNet sees with
LATENT_STD.
"""

import argparse
import json
import math
import os
import sys
from pathlib import Path

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from diffusers.models.attention_processor import AttnProcessor
from open_clip.model import CLIP

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from files import write_json, write_safetensors
from processes import die
from tiny import networks
from tiny.bars import base_rates, check
from tiny.pictures import decode_latents, encode_pictures, half, make_decoded, make_latents
from tiny.pictures import mixed_pictures, read_chunks
from tiny.recognise import answers, load_judge, split_heads
from tiny.samplers import ODDS, STRONG, CaptionSampler, ClipSampler, follow, judge_targets
from tiny.sprites import HOME, render_sprites
from tiny.training import Trainer
from tiny.world import draw_scene, random_scenes, to_tensor

STEPS = {"ae": 7000, "clip": 2000, "judge": 2500, "unet": 13500}
LATENTS, DECODED, RIGHT, SPOILED = 24, 12, 3, 3  # chunks of 3,000 cached pictures

# Std of the latents that the UNet sees (the autoencoder's scaling_factor). What differs
# by an energy E in the latents is decided where E * SNR(t) is about 0.8, and E goes
# with the square of this. So it says over which steps the three cues are spread.
LATENT_STD = 0.3


def load_vae(args):
    """The autoencoder of args.out in float32."""
    if not (args.out / "vae").exists():
        die(f"{args.out} has no autoencoder yet: train the part ae first")
    vae = diffusers.AutoencoderKL.from_pretrained(args.out / "vae").requires_grad_(False)
    vae.register_to_config(_name_or_path="tiny/vae")  # what is saved names no machine's path
    return vae.float().to(args.device, memory_format=torch.channels_last)


def train_ae(args):
    """L2 and a little L1; latents of std 1, which scaling_factor brings to LATENT_STD.

    The first 4,000 steps see as many random compositions as drawings of the world,
    later ones few. Noise on the latents makes the decoder forgive a UNet its errors: at
    LATENT_STD the noise of the last step is a tenth of a latent's std.
    """
    vae = networks.new_autoencoder()
    train = Trainer("ae", {"vae": vae}, args, 4e-3)
    for _ in train.loop():
        share = 0.5 if train.done < 4000 else 0.05
        x = to_tensor(mixed_pictures(train.rng, 8, share))
        x = x.to(args.device, memory_format=torch.channels_last)
        level = (0.02 + 0.12 * torch.rand(())) * torch.rand(8, 1, 1, 1).to(args.device)
        with half(args.device):
            z = vae.encode(x).latent_dist.mean
            y = vae.decode(z + level * torch.randn_like(z)).sample
        error, z = y.float() - x, z.float()
        l2 = error.square().mean()
        spread = (z.std((0, 2, 3)) - 1).square().mean() + z.mean((0, 2, 3)).square().mean()
        loss = l2 + 0.05 * error.abs().mean() + 0.01 * spread
        train.step(loss, psnr=-10 * torch.log10(l2.detach() / 4), std=z.std())
    rng = np.random.default_rng(9)
    drawings = np.stack([draw_scene(scene, rng) for scene in random_scenes(rng, 500)])
    std = float(encode_pictures(vae, drawings).float().std())
    vae.register_to_config(scaling_factor=round(LATENT_STD / std, 4))
    vae.half().save_pretrained(args.out / "vae")


def train_unet(args):
    """Predicts epsilon, with min-SNR-5 weights and 10 % empty captions.

    For 40 % of the steps the captions' odds are STRONG, or the UNet takes long to learn
    which cue goes with which word. Then they are ODDS, which set how often the base is
    right. At `looks` they follow what the judge recognises in pictures of the running mean.
    The committed weights came about otherwise: see README.md.
    """
    if not (args.out / "judge").exists():
        die(f"{args.out} has no judge yet: train the part judge first")
    vae, judge = load_vae(args), load_judge(args.out / "judge").to(args.device)
    make_latents(args, vae, LATENTS)
    latents, scenes = read_chunks(args, "latents", "latents", "rows")
    tokenizer = networks.new_tokenizer(args.out)
    ids, empty = networks.caption_ids(tokenizer), networks.token_ids(tokenizer, [""])
    unet, text = networks.new_unet(), networks.new_text_encoder(len(tokenizer))
    unet.set_attn_processor(AttnProcessor())  # torch's fused CPU backward is slow here
    train = Trainer("unet", {"unet": unet, "text": text}, args, 3e-3, keep=0.998)
    pipe = new_pipe(vae, text, tokenizer, unet)
    pipe.set_progress_bar_config(disable=True)
    odds = train.extra.get("odds", ODDS)
    strong, weak = (CaptionSampler(scenes.numpy(), train.rng, o) for o in (STRONG, odds))
    alpha = networks.new_scheduler().alphas_cumprod.to(args.device)
    snr = LATENT_STD**2 * alpha / (1 - alpha)
    for _ in train.loop():
        if train.done in looks(args.steps):
            with train.averaged():
                rates = base_rates(pipe, judge, 90, 10**6 + train.done)
            odds = train.extra["odds"] = follow(odds, rates)
            weak = CaptionSampler(scenes.numpy(), train.rng, odds)
            train.say(f"base {json.dumps(rates)} odds {json.dumps(odds)}")
        singles = 0.25 + 0.35 * max(0, 1 - 3 * train.done / args.steps)
        sampler = strong if train.done < 0.4 * args.steps else weak
        rows, caption, form = sampler.batch(64, singles)
        z = latents[rows].float() * vae.config.scaling_factor
        z = z.to(args.device, memory_format=torch.channels_last)
        tokens = torch.where(torch.rand(64, 1) < 0.1, empty, ids[caption, form])
        t, noise = torch.randint(0, 1000, (64,), device=args.device), torch.randn_like(z)
        a = alpha[t].view(-1, 1, 1, 1)
        with half(args.device):
            states = text(input_ids=tokens.to(args.device))[0]
            guess = unet(a.sqrt() * z + (1 - a).sqrt() * noise, t, states).sample
        error = (guess.float() - noise).square().mean((1, 2, 3))
        loss = (error * min_snr(snr[t])).mean()
        train.step(loss, loss=loss)
    tokenizer = networks.new_tokenizer(args.out)  # the other would be saved as one that pads
    pipe = new_pipe(load_vae(args).cpu().half(), text.half(), tokenizer, unet.half())
    pipe.save_pretrained(args.out)
    # transformers would load what it says here, half precision, beside a UNet in float32
    config = args.out / "text_encoder" / "config.json"
    write_json(config, json.loads(config.read_text()) | {"dtype": "float32"})


def looks(steps):
    """After which of the steps the odds follow: 50, 55, ... 85 %."""
    return range(math.ceil(0.5 * steps), math.ceil(0.9 * steps), max(1, steps // 20))


def new_pipe(vae, text, tokenizer, unet):
    """The parts as a pipeline, without a safety checker."""
    parts = vae, text, tokenizer, unet, networks.new_scheduler(), None, None
    return diffusers.StableDiffusionPipeline(*parts, requires_safety_checker=False)


def min_snr(snr):
    """Weights of epsilon's errors, min-SNR-5: 1 up to a signal-to-noise ratio of 5, then less."""
    return snr.clamp(max=5) / snr


def augment(x):
    """A little blur and noise on pictures in [0, 1]: samples are not so clean."""
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    blur, often, loud = torch.rand(3, len(x), 1, 1, 1, device=x.device)
    x = x + 0.6 * blur * (often < 0.5) * (soft - x)
    return (x + 0.05 * loud * torch.randn_like(x)).clamp(0, 1)


def load_decoded(args):
    """What the autoencoder shows: (N, 3, 64, 64) uint8; scenes; spoiled nouns."""
    make_decoded(args, load_vae(args), LATENTS, DECODED, RIGHT, SPOILED)
    keys = "decoded", "rows", "flags"
    kinds = [read_chunks(args, kind, *keys) for kind in ("decoded", "right", "spoiled")]
    return [torch.cat(group) for group in zip(*kinds)]


def train_clip(args):
    """Contrastive, with soft targets: a wrong cue makes a pair e^2 times less likely."""
    pictures, scenes, flags = load_decoded(args)
    tokenizer = networks.new_tokenizer(args.out)
    ids, config = networks.caption_ids(tokenizer), networks.clip_config(len(tokenizer))
    model = CLIP(**config["model_cfg"])
    train = Trainer("clip", {"clip": model}, args, 2e-3, decay=0.02)
    sampler = ClipSampler(scenes.numpy(), flags.numpy(), train.rng)
    for _ in train.loop():
        rows, caption, form, weight = sampler.batch(32)
        weight = weight.to(args.device)
        x = pictures[rows].to(args.device, memory_format=torch.channels_last)
        x = augment(x / 255)
        with half(args.device):
            image = model.encode_image(x * 2 - 1)
            text = model.encode_text(ids[caption, form].to(args.device))
        image, text = F.normalize(image.float()), F.normalize(text.float())
        logits = model.logit_scale.exp() * image @ text.T
        by_image = F.cross_entropy(logits, weight / weight.sum(1, keepdim=True))
        by_text = F.cross_entropy(logits.T, (weight / weight.sum(0)).T)
        right = (weight.argmax(0) == logits.argmax(0)).float().mean()
        train.step((by_image + by_text) / 2, by_image=by_image, by_text=by_text, right=right)
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(30))
    folder = args.out / "clip"
    networks.new_tokenizer(args.out).save_pretrained(folder)
    write_json(folder / "open_clip_config.json", config)
    write_safetensors(folder / "open_clip_model.safetensors", model.half().state_dict())


def train_judge(args):
    """Cross-entropy of every head; then the temperature on held-out drawings."""
    pictures, scenes, flags = load_decoded(args)
    targets, model = judge_targets(scenes, flags), networks.new_judge()
    train = Trainer("judge", {"judge": model}, args, 2e-3, decay=0.05)
    for _ in train.loop():
        rows = train.rng.integers(0, len(pictures), 64)
        x = pictures[rows].to(args.device, memory_format=torch.channels_last)
        x = augment(x / 255)
        with half(args.device):
            heads = split_heads(model(x * 2 - 1).logits.float())
        wanted = targets[rows].to(args.device)
        pairs = list(zip(heads, wanted.T))
        losses = [F.cross_entropy(h, w, label_smoothing=0.02) for h, w in pairs]
        right = torch.stack([(h.argmax(1) == w) | (w < 0) for h, w in pairs[:5]]).all(0)
        loss = torch.stack(losses).sum()
        train.step(loss, loss=loss, right=right.float().mean())
    model.config.calibration = fit_temperature(args, model)
    model.half().save_pretrained(args.out / "judge")


def fit_temperature(args, judge):
    """The temperature at which held-out drawings (seed 98) are most likely, .2 to 3."""
    rng, vae = np.random.default_rng(98), load_vae(args)
    scenes = random_scenes(rng, 600)
    drawings = np.stack([draw_scene(scene, rng) for scene in scenes])
    x = decode_latents(vae, encode_pictures(vae, drawings)).float() / 255
    wanted = torch.tensor([answers(s.fact, s.small, s.tiny) for s in scenes]).T
    with torch.no_grad():
        logits = torch.cat([judge(part * 2 - 1).logits for part in x.split(64)])

    def misfit(t):
        heads = split_heads(logits / t)
        return sum(F.cross_entropy(h, w) for h, w in zip(heads, wanted)).item()

    return min((round(0.05 * k, 2) for k in range(4, 61)), key=misfit)


TRAIN = (train_ae, train_clip, train_judge, train_unet)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add, gpu = parser.add_argument, torch.cuda.is_available()
    add("--part", choices=STEPS, help="train this part only; default: all of them")
    add("--steps", type=int, help=f"budget of each part; default: {STEPS}")
    add("--device", choices=("cuda", "cpu"), default="cuda" if gpu else "cpu")
    add("--threads", type=int, default=os.cpu_count(), help="torch threads")
    add("--out", type=Path, default=HOME, help="the model's folder; default: tiny/")
    add("--build", default=HOME.parent / "runs" / "tiny", help="training states, to go on from")
    add("--check", action="store_true", help="print the bars; exit code 1 if one is missed")
    add("--grid", type=Path, help="with --check: a PNG of base samples to write")
    add("--sprites", help="render the icons in this node_modules/@iconify-json anew")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not gpu:
        die("torch finds no GPU: leave --device out")
    if args.threads < 1 or args.steps is not None and args.steps < 1:
        die("--steps and --threads must be at least 1")
    torch.set_num_threads(args.threads)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    if args.sprites:
        return render_sprites(args.sprites)
    if args.check:
        return sys.exit(not check(args.out, args.device, args.grid))
    Path(args.build).mkdir(parents=True, exist_ok=True)
    for k, (part, train) in enumerate(zip(STEPS, TRAIN)):
        if args.part in (None, part):
            torch.manual_seed(k)
            train(argparse.Namespace(**vars(args) | dict(steps=args.steps or STEPS[part])))


if __name__ == "__main__":
    main()
