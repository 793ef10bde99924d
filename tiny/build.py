"""Train every part of the tiny model, or hold it to its bars.

    python tiny/build.py                            # all parts; what was cut off goes on
    python tiny/build.py --part unet --steps 99000  # more steps than it had: it goes on
    python tiny/build.py --check --grid base.png    # the table of bars, base samples

ae      AutoencoderKL; `decoder` sharpens its decoder over frozen latents.
unet    UNet2DConditionModel with CLIPTextModel. Imperfect on purpose: pictures of a composed
        caption are often wrong (CORRECT), least often in style twemoji, the "cartoons". So
        the base misaligns as Stable Diffusion does, and chasing reward can cheat by style.
clip    the reward, an open_clip model. It learns from correct captions and from pictures
        as the autoencoder decodes them: or it would reward sharpness.
judge   a ResNet of another seed, architecture and loss, trained alike; never a reward.
"""

import argparse
import json
import math
import os
import sys
import time
from collections import defaultdict
from pathlib import Path

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from diffusers.models.attention_processor import AttnProcessor
from open_clip.model import CLIP

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from files import read_safetensors, write_json, write_safetensors
from processes import die
from tiny import networks, world
from tiny.bars import check
from tiny.world import STYLES, captions, fact_index, facts, wrong

# About what the committed weights had in 3.3 hours of two cores. Their UNet began on latents of
# std 1 and with other odds (CORRECT), so a rebuild gives a model of this kind, not these weights.
STEPS = {"ae": 2000, "decoder": 1500, "unet": 30_000, "clip": 2500, "judge": 6000}
PICTURES = 42_000  # that the UNet, CLIP and the judge learn from

# Std of the latents that the UNet sees (the autoencoder's scaling_factor). SD 1.4's noise
# schedule stops short of pure noise. At a std of 1, x_T decided most of so small a picture;
# but a policy gradient can credit the steps alone (results/README.md has figures).
LATENT_STD = 0.35

# P(the picture shows what its caption says) by template, for noto, twemoji, fluent. The rest
# shows wrong(fact).
CORRECT = {"1": (0.05, 0.95, 0.05), "2": (0.10, 0.95, 0.10), "3": (0.10, 0.90, 0.10)}


class Trainer:
    """AdamW over args.steps steps, a cosine decay, and a running mean of the weights.

    All of it is in a file of args.build, saved every two minutes. Where that file exists,
    training goes on from it, also with more steps than before or on another device.
    """

    def __init__(self, name, modules, args, rate, decay=0.0):
        self.name, self.args, self.rate, self.done = name, args, rate, 0
        self.modules = torch.nn.ModuleDict(modules)
        self.modules.to(args.device, memory_format=torch.channels_last)
        self.params = {k: p for k, p in self.modules.named_parameters() if p.requires_grad}
        self.opt = torch.optim.AdamW(self.params.values(), rate, (0.9, 0.99), weight_decay=decay)
        live = self.modules.state_dict()
        self.mean = {k: v.clone() for k, v in live.items() if v.is_floating_point()}
        self.path = Path(args.build) / f"{name}.safetensors"
        if self.path.exists():
            self.resume()
        self.rng = np.random.default_rng([*name.encode(), self.done])
        torch.manual_seed(self.rng.integers(2**31))

    def resume(self):
        tensors, header = read_safetensors(self.path)
        groups = defaultdict(dict)
        for key, value in tensors.items():
            kind, _, name = key.partition(".")  # AdamW wants its step on the CPU
            groups[kind][name] = value.to("cpu" if kind == "step" else self.args.device)
        self.modules.load_state_dict(groups.pop("live"))
        self.mean, self.done = groups.pop("mean"), header["steps"]
        for name, p in self.params.items():
            self.opt.state[p] = {kind: group[name] for kind, group in groups.items()}
        print(f"{self.name}: goes on from step {self.done}", flush=True)

    def save(self):
        tensors = {f"live.{k}": v for k, v in self.modules.state_dict().items()}
        tensors |= {f"mean.{k}": v for k, v in self.mean.items()}
        for name, p in self.params.items():
            tensors |= {f"{kind}.{name}": v for kind, v in self.opt.state[p].items()}
        write_safetensors(self.path, tensors, {"steps": self.done})

    def loop(self):
        """Yield once for each step that is left; then leave the mean in the modules, on the CPU."""
        saved = time.time()
        while self.done < self.args.steps:
            yield
            if time.time() - saved > 120:
                self.save()
                saved = time.time()
        self.save()
        self.modules.load_state_dict(self.mean, strict=False)  # no counts of batches
        self.modules.cpu().eval()

    def step(self, loss, /, **values):
        """One step of AdamW and of the mean; prints `values` every 100 steps."""
        warm = min(1.0, (self.done + 1) / 100)
        cosine = 0.51 + 0.49 * math.cos(math.pi * self.done / self.args.steps)
        for group in self.opt.param_groups:
            group["lr"] = self.rate * warm * cosine
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.params.values(), 1.0)
        self.opt.step()
        self.opt.zero_grad(set_to_none=True)
        self.done += 1
        keep = min(0.9995, (1 + self.done) / (20 + self.done))
        live = self.modules.state_dict()
        for key, mean in self.mean.items():
            mean.lerp_(live[key], 1 - keep)
        if self.done % 100 == 0:
            text = " ".join(f"{k} {v.item():.4f}" for k, v in values.items())
            print(f"{self.name} {self.done} of {self.args.steps}: {text}", flush=True)


def load_vae(args):
    """The autoencoder of args.out in float32."""
    if not (args.out / "vae").exists():
        die(f"{args.out} has no autoencoder yet: train the part ae first")
    vae = diffusers.AutoencoderKL.from_pretrained(args.out / "vae")
    vae.register_to_config(_name_or_path="tiny/vae")  # what is saved names no machine's path
    return vae.float().to(args.device)


def fit_vae(name, vae, module, args, rate):
    """Train a module of the autoencoder: L2 and a little L1 on drawn pictures.

    Latents get a std of about 1. Noise makes the decoder forgive a UNet its errors.
    """
    train = Trainer(name, {name: module}, args, rate)
    for _ in train.loop():
        x = world.draw_batch(train.rng, 16).to(args.device)
        with torch.autocast(args.device, torch.bfloat16):
            z = vae.encode(x).latent_dist.mean
            y = vae.decode(z + 0.05 * torch.randn_like(z)).sample
        error, z = y.float() - x, z.float()
        l2 = error.square().mean()
        spread = (z.std() - 1).square() + z.mean().square()
        loss = l2 + 0.1 * error.abs().mean() + 0.01 * spread
        train.step(loss, psnr=-10 * torch.log10(l2.detach() / 4), std=z.std())


def train_ae(args):
    """The autoencoder, whose scaling_factor brings the std of latents to LATENT_STD."""
    vae = networks.new_autoencoder()
    fit_vae("ae", vae, vae, args, 2e-3)
    with torch.no_grad():
        x = world.draw_batch(np.random.default_rng(9), 128)
        std = vae.encode(x).latent_dist.mean.std().item()
    vae.register_to_config(scaling_factor=round(LATENT_STD / std, 4))
    vae.half().save_pretrained(args.out / "vae")


def train_decoder(args):
    """Sharpen the decoder over a frozen encoder: latents, and so a UNet, stay valid."""
    vae = load_vae(args).requires_grad_(False)
    vae.decoder.requires_grad_(True)
    fit_vae("decoder", vae, vae.decoder, args, 1e-3)
    vae.cpu().half().save_pretrained(args.out / "vae")


def load_pictures(args):
    """Drawn, encoded, decoded once for all parts; each pair of fact and style 8 times or more.

    pairs (N, 2) ints; latents (N, 16, 8, 8) half; decoded (N, 3, 64, 64) uint8.
    """
    path = Path(args.build) / "pictures.safetensors"
    if path.exists():
        return read_safetensors(path)[0]
    vae, rng, (every, odds) = load_vae(args), np.random.default_rng(2), facts()
    pairs = [(f, s) for f in range(len(every)) for s in range(len(STYLES))]
    more = rng.choice(len(pairs), PICTURES - 8 * len(pairs), p=np.repeat(odds, 3) / 3)
    pairs = torch.from_numpy(rng.permutation(pairs * 8 + [pairs[k] for k in more]))
    latents, decoded = [], []
    for k in range(0, PICTURES, 100):
        x = world.draw_pairs(pairs[k : k + 100], rng).to(args.device)
        with torch.no_grad(), torch.autocast(args.device, torch.bfloat16):
            z = vae.encode(x).latent_dist.mean
            y = vae.decode(z).sample.float().clamp(-1, 1)
        latents.append((z.float() * vae.config.scaling_factor).half().cpu())
        decoded.append((y * 127.5 + 127.5).round().byte().cpu())
        if k % 3000 == 0:
            print(f"pictures: {k} of {PICTURES}", flush=True)
    out = dict(pairs=pairs, latents=torch.cat(latents), decoded=torch.cat(decoded))
    write_safetensors(path, out)
    return out


class CaptionSampler:
    """Draws captions, and pictures that show them, or do not, by the odds of CORRECT."""

    def __init__(self, pairs, rng):
        self.rng, self.rows, lists = rng, defaultdict(list), world.read_lists()
        for row, (fact, style) in enumerate(pairs.tolist()):
            self.rows[fact, style].append(row)
        known, index = [world.parse(c) for c in captions()], fact_index()
        self.right = [index[fact] for fact in known]
        self.wrong = [[index[w] for w in wrong(fact)] for fact in known]
        groups = [lists[f"{t} train"] + lists[f"{t} unseen"] for t in "123"]
        place = {c: k for k, c in enumerate(captions())}
        self.groups = [[place[c] for c in group] for group in (*groups, world.noun_prompts())]

    def batch(self, count, singles):
        """Rows, captions, forms (0: names no style), (3, count); singles: share of nouns."""
        share = np.array([0.45, 0.22, 0.33]) * (1 - singles)
        out = np.empty((3, count), np.int64)
        for k, group in enumerate(self.rng.choice(4, count, p=[*share, singles])):
            caption = self.groups[group][self.rng.integers(len(self.groups[group]))]
            style, fact = int(self.rng.integers(len(STYLES))), self.right[caption]
            if group < 3 and self.rng.random() > CORRECT["123"[group]][style]:
                fact = int(self.rng.choice(self.wrong[caption]))
            form = (style + 1) * (self.rng.random() < 0.25)
            out[:, k] = self.rng.choice(self.rows[fact, style]), caption, form
        return out


def train_unet(args):
    """Predicts epsilon, with min-SNR-5 weights and 10 % empty captions."""
    pictures, tokenizer = load_pictures(args), networks.new_tokenizer(args.out)
    texts = [text for c in captions() for text in (c, *world.style_prompts(c))]
    ids = networks.token_ids(tokenizer, texts).view(len(captions()), 1 + len(STYLES), 16)
    empty = networks.token_ids(tokenizer, [""])
    unet, text = networks.new_unet(), networks.new_text_encoder(len(tokenizer))
    unet.set_attn_processor(AttnProcessor())  # torch's fused CPU backward is slow here
    train = Trainer("unet", {"unet": unet, "text": text}, args, 1e-3)
    sampler = CaptionSampler(pictures["pairs"], train.rng)
    alpha = networks.new_scheduler().alphas_cumprod.to(args.device)
    snr = LATENT_STD**2 * alpha / (1 - alpha)
    for _ in train.loop():
        singles = 0.25 + 0.4 * max(0, 1 - 3 * train.done / args.steps)
        rows, caption, form = sampler.batch(64, singles)
        tokens = torch.where(torch.rand(64, 1) < 0.1, empty, ids[caption, form])
        z = pictures["latents"][rows].to(args.device).float()
        # half from the noise levels at which a picture takes shape
        t = torch.cat([torch.randint(0, 1000, (32,)), torch.randint(300, 900, (32,))])
        t, noise = t.to(args.device), torch.randn_like(z)
        a = alpha[t].view(-1, 1, 1, 1)
        with torch.autocast(args.device, torch.bfloat16):
            states = text(input_ids=tokens.to(args.device))[0]
            guess = unet(a.sqrt() * z + (1 - a).sqrt() * noise, t, states).sample
        error = (guess.float() - noise).square().mean((1, 2, 3))
        loss = (error * (snr[t].clamp(max=5) / snr[t])).mean()
        train.step(loss, loss=loss)
    tokenizer = networks.new_tokenizer(args.out)  # the other would be saved as one that pads
    parts = load_vae(args).cpu().half(), text.half(), tokenizer, unet.half()
    parts += networks.new_scheduler(), None, None
    pipe = diffusers.StableDiffusionPipeline(*parts, requires_safety_checker=False)
    pipe.save_pretrained(args.out)
    # transformers would load what it says here, half precision, beside a UNet in float32
    config = args.out / "text_encoder" / "config.json"
    write_json(config, json.loads(config.read_text()) | {"dtype": "float32"})


def augment(x):
    """A little blur and noise on pictures in [0, 1]: samples are not so clean."""
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    blur, often, loud = torch.rand(3, len(x), 1, 1, 1, device=x.device)
    x = x + 0.8 * blur * (often < 0.5) * (soft - x)
    return (x + 0.06 * loud * torch.randn_like(x)).clamp(0, 1)


def rivals(fact):
    """Facts that base samples confuse with it, as indices; a noun alone, with what holds it."""
    others = wrong(fact)
    if fact[0] == "alone":
        others = [f for f in facts()[0] if fact[1] in f[1:] and f != fact]
    return [fact_index()[f] for f in others] or [0]


def train_clip(args):
    """Contrastive training on correct captions, half of them with the style's name.

    Each picture is also held against a caption that is wrong as base samples are.
    """
    pictures, tokenizer = load_pictures(args), networks.new_tokenizer(args.out)
    pairs, known = pictures["pairs"].numpy(), world.tellings()
    confused = [rivals(fact) for fact in facts()[0]]
    config = networks.clip_config(len(tokenizer))
    model = CLIP(**config["model_cfg"])
    train = Trainer("clip", {"clip": model}, args, 1e-3, decay=0.02)
    for _ in train.loop():
        rows = train.rng.integers(0, len(pairs), 96)
        fact, style = pairs[rows].T
        fact2 = np.concatenate([fact, [train.rng.choice(confused[f]) for f in fact]])
        style2, named = np.tile(style, 2), train.rng.random(192) < 0.5
        texts = [str(train.rng.choice(known[f])) for f in fact2]
        for k in named.nonzero()[0]:
            texts[k] = world.style_prompts(texts[k])[style2[k]]
        tokens = networks.token_ids(tokenizer, texts).to(args.device)
        right = (fact[:, None] == fact2) & ((style[:, None] == style2) | ~named)
        right = torch.from_numpy(right).float().to(args.device)  # (96, 192)
        x = augment(pictures["decoded"][rows].to(args.device) / 255)
        with torch.autocast(args.device, torch.bfloat16):
            image, text = model.encode_image(x * 2 - 1), model.encode_text(tokens)
        image, text = F.normalize(image.float()), F.normalize(text.float())
        logits = model.logit_scale.exp().clamp(max=30) * image @ text.T
        own = right[:, :96].T
        by_image = F.cross_entropy(logits, right / right.sum(1, keepdim=True))
        by_text = F.cross_entropy(logits[:, :96].T, own / own.sum(1, keepdim=True))
        loss, best = (by_image + by_text) / 2, right.gather(1, logits.argmax(1, keepdim=True))
        train.step(loss, loss=loss, right=best.mean())
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(30))
    folder = args.out / "clip"
    networks.new_tokenizer(args.out).save_pretrained(folder)
    write_json(folder / "open_clip_config.json", config)
    write_safetensors(folder / "open_clip_model.safetensors", model.half().state_dict())


def train_judge(args):
    """Cross-entropy over all facts, on pictures as the autoencoder decodes them."""
    pictures, model = load_pictures(args), networks.new_judge()
    train = Trainer("judge", {"judge": model}, args, 2e-3, decay=0.05)
    for _ in train.loop():
        rows = train.rng.integers(0, len(pictures["pairs"]), 64)
        x = augment(pictures["decoded"][rows].to(args.device) / 255)
        fact = pictures["pairs"][rows, 0].to(args.device)
        with torch.autocast(args.device, torch.bfloat16):
            logits = model(x * 2 - 1).logits
        loss = F.cross_entropy(logits.float(), fact, label_smoothing=0.05)
        train.step(loss, loss=loss, right=(logits.argmax(1) == fact).float().mean())
    model.half().save_pretrained(args.out / "judge")


TRAIN = (train_ae, train_decoder, train_unet, train_clip, train_judge)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add, home, gpu = parser.add_argument, world.HOME, torch.cuda.is_available()
    add("--part", choices=STEPS, help="train this part only; default: all of them")
    add("--steps", type=int, help=f"budget of each part; default: {STEPS}")
    add("--device", choices=("cuda", "cpu"), default="cuda" if gpu else "cpu")
    add("--threads", type=int, default=os.cpu_count(), help="torch threads")
    add("--out", type=Path, default=home, help="the model's folder; default: tiny/")
    add("--build", default=home.parent / "runs" / "tiny", help="training states, to go on from")
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
        return world.render_sprites(args.sprites)
    if args.check:
        return sys.exit(not check(args.out, args.device, args.grid))
    Path(args.build).mkdir(parents=True, exist_ok=True)
    for k, (part, train) in enumerate(zip(STEPS, TRAIN)):
        if args.part in (None, part):
            torch.manual_seed(k)
            train(argparse.Namespace(**vars(args) | dict(steps=args.steps or STEPS[part])))


if __name__ == "__main__":
    main()
