"""Train every part of the tiny model, or hold it to its bars.

    python -m tiny.build                            # all parts; what was cut off goes on
    python -m tiny.build --part unet --steps 99000  # more steps than it had: it goes on
    python -m tiny.build --check                    # the table of bars, and base.png

ae      AutoencoderKL.
clip    the reward, an open_clip model: it rises with every cue that is right.
judge   a ResNet of another seed, architecture and loss, trained alike; never a reward.
unet    UNet2DConditionModel with CLIPTextModel. Imperfect on purpose: in the pictures of a
        composed caption each of three cues is often wrong (`samplers.ODDS`). So the base
        misaligns as Stable Diffusion does. It needs the judge.

A part's architecture is the config.json of the committed one. The tokenizer is the
committed one: a token for each word of the world, letters for others; the end of a text
has the largest id, where open_clip looks for it.

Shapes: pictures (B, 3, 64, 64); latents (B, 4, 16, 16), which the UNet sees with
LATENT_STD.
"""

import math
import sys
from pathlib import Path

# Ours first: `support` sets what torch reads when it is imported
from support.command import Parser, die, first_line

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from diffusers import AutoencoderKL, UNet2DConditionModel
from open_clip.model import CLIP

from support.run_folder import read_json, write_json, write_safetensors
from tiny.build import bars, pictures, samplers, scenes
from tiny.build.pictures import half
from tiny.build.training import STEPS, Trainer
from tiny.judge import CONTENT, load_judge, split_heads
from tiny.world import HOME, STYLES

# Std of the latents that the UNet sees (the autoencoder's scaling_factor). What differs
# by an energy E in the latents is decided where E * SNR(t) is about 0.8, and E goes
# with the square of this. So it says over which steps the three cues are spread.
LATENT_STD = 0.3


def new_tokenizer():
    return transformers.CLIPTokenizer.from_pretrained(HOME / "tokenizer")


def token_ids(texts):
    """(len(texts), 16) token ids."""
    length = dict(padding="max_length", max_length=16, truncation=True)
    return new_tokenizer()(texts, return_tensors="pt", **length).input_ids


def caption_ids():
    """(captions, 4, 16) token ids: the bare caption, then with each style's name."""
    forms = ["", *(f", {style} style" for style in STYLES)]
    texts = [caption + form for caption in scenes.CAPTIONS for form in forms]
    return token_ids(texts).view(len(scenes.CAPTIONS), len(forms), 16)


def load_vae(args):
    """The autoencoder of args.out in float32."""
    vae = AutoencoderKL.from_pretrained(args.out / "vae").requires_grad_(False)
    vae.register_to_config(_name_or_path="tiny/vae")  # what is saved names no machine's path
    return vae.float().to(args.device, memory_format=torch.channels_last)


def augment(pictures, device):
    """Pictures (B, 3, H, W) uint8 -> in [0, 1], a little blurred and noisy: samples are, too."""
    x = pictures.to(device, memory_format=torch.channels_last) / 255
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    blur, often, loud = torch.rand(3, len(x), 1, 1, 1, device=device)
    x = x + 0.6 * blur * (often < 0.5) * (soft - x)
    return (x + 0.05 * loud * torch.randn_like(x)).clamp(0, 1)


def min_snr(snr):
    """Weights of epsilon's errors, min-SNR-5: 1 up to a signal-to-noise ratio of 5, then less."""
    return snr.clamp(max=5) / snr


def looks(steps):
    """After which of the steps the odds follow: 50, 55, ... 85 %."""
    return range(math.ceil(0.5 * steps), math.ceil(0.9 * steps), max(1, steps // 20))


def train_ae(args):
    """L2 and a little L1; latents of std 1, which scaling_factor brings to LATENT_STD.

    The first 4,000 steps see as many random compositions as drawings of the world,
    later ones few. Noise on the latents makes the decoder forgive a UNet its errors: at
    LATENT_STD the noise of the last step is a tenth of a latent's std.
    """
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(HOME / "vae"))
    train = Trainer("ae", {"vae": vae}, args, 4e-3)
    for _ in train.loop():
        share = 0.5 if train.done < 4000 else 0.05
        x = pictures.to_tensor(pictures.mixed_pictures(train.rng, 8, share))
        x = x.to(args.device, memory_format=torch.channels_last)
        level = (0.02 + 0.12 * torch.rand(())) * torch.rand(8, 1, 1, 1).to(args.device)
        with half(args.device):
            z = vae.encode(x).latent_dist.mean
            y = vae.decode(z + level * torch.randn_like(z)).sample
        z = z.float()
        error = y.float() - x
        spread = (z.std((0, 2, 3)) - 1).square().mean() + z.mean((0, 2, 3)).square().mean()
        train.step(error.square().mean() + 0.05 * error.abs().mean() + 0.01 * spread)
    vae = train.mean["vae"]
    rng = np.random.default_rng(9)
    drawings = scenes.draw_scenes(scenes.random_scenes(rng, 500), rng)
    with half("cpu"):
        std = pictures.encode_pictures(vae, drawings).half().float().std()
    vae.register_to_config(scaling_factor=round(LATENT_STD / float(std), 4))
    vae.half().save_pretrained(args.out / "vae")


def train_clip(args):
    """Contrastive, with soft targets: a wrong cue makes a pair e^2 times less likely."""
    data = pictures.load_pictures(args.build, load_vae(args))
    ids = caption_ids()
    config = read_json(HOME / "clip/open_clip_config.json")
    model = CLIP(**config["model_cfg"])
    train = Trainer("clip", {"clip": model}, args, 2e-3, decay=0.02)
    sampler = samplers.ClipSampler(data["rows"].numpy(), data["flags"].numpy(), train.rng)
    for _ in train.loop():
        row, caption, form, weight = sampler.batch(32)
        weight = weight.to(args.device)
        x = augment(data["decoded"][row], args.device)
        with half(args.device):
            image = model.encode_image(x * 2 - 1)
            text = model.encode_text(ids[caption, form].to(args.device))
        logits = model.logit_scale.exp() * F.normalize(image.float()) @ F.normalize(text.float()).T
        by_image = F.cross_entropy(logits, weight / weight.sum(1, keepdim=True))
        by_text = F.cross_entropy(logits.T, (weight / weight.sum(0)).T)
        train.step((by_image + by_text) / 2)
        model.logit_scale.data.clamp_(max=math.log(30))
    folder = args.out / "clip"
    new_tokenizer().save_pretrained(folder)
    write_json(folder / "open_clip_config.json", config)
    weights = train.mean["clip"].half().state_dict()
    write_safetensors(folder / "open_clip_model.safetensors", weights)


def train_judge(args):
    """Cross-entropy of every head; then the temperature on held-out drawings."""
    data = pictures.load_pictures(args.build, load_vae(args))
    targets = samplers.judge_targets(data["rows"], data["flags"])
    config = transformers.ResNetConfig.from_pretrained(HOME / "judge")
    model = transformers.ResNetForImageClassification(config)
    train = Trainer("judge", {"judge": model}, args, 2e-3, decay=0.05)
    for _ in train.loop():
        row = train.rng.integers(0, len(targets), 64)
        x = augment(data["decoded"][row], args.device)
        with half(args.device):
            heads = split_heads(model(x * 2 - 1).logits.float())
        pairs = zip(heads, targets[row].to(args.device).T)
        losses = [F.cross_entropy(head, wanted, label_smoothing=0.02) for head, wanted in pairs]
        train.step(torch.stack(losses).sum())
    judge = train.mean["judge"]
    judge.config.calibration = fit_temperature(args, judge)
    judge.half().save_pretrained(args.out / "judge")


def fit_temperature(args, judge):
    """The temperature at which held-out drawings (seed 98) are most likely, .2 to 3."""
    rng = np.random.default_rng(98)
    held_out = scenes.random_scenes(rng, 600)
    drawings = scenes.draw_scenes(held_out, rng)
    vae = load_vae(args)
    with half(args.device):
        latents = pictures.encode_pictures(vae, drawings).half()
        x = pictures.decode_latents(vae, latents).float() / 255
    clean = torch.zeros(len(held_out), 2, dtype=torch.bool)
    wanted = samplers.judge_targets(scenes.encode(held_out), clean)[:, :CONTENT].T
    with torch.no_grad():
        logits = torch.cat([judge(part * 2 - 1).logits for part in x.split(64)])

    def misfit(t):
        heads = split_heads(logits / t)
        return sum(F.cross_entropy(head, right) for head, right in zip(heads, wanted)).item()

    return min((round(0.05 * k, 2) for k in range(4, 61)), key=misfit)


def train_unet(args):
    """Predicts epsilon, with min-SNR-5 weights and 10 % empty captions.

    For 40 % of the steps the captions' odds are STRONG, or the UNet takes long to learn
    which cue goes with which word. Then they are ODDS, which set how often the base is
    right. At `looks` they follow what the judge recognises in pictures of the running mean.
    The committed weights came about otherwise: see README.md.
    """
    vae = load_vae(args)
    judge = load_judge(args.out / "judge").to(args.device)
    data = pictures.load_pictures(args.build, vae)
    rows = data["latent_rows"].numpy()
    ids = caption_ids()
    empty = token_ids([""])
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(HOME / "unet"))
    config = transformers.CLIPTextConfig.from_pretrained(HOME / "text_encoder")
    text = transformers.CLIPTextModel(config)
    # torch's fused CPU backward is slow here
    unet.set_attn_processor(diffusers.models.attention_processor.AttnProcessor())
    train = Trainer("unet", {"unet": unet, "text": text}, args, 3e-3, keep=0.998)
    scheduler = diffusers.DDIMScheduler.from_pretrained(HOME / "scheduler")
    parts = (vae, train.mean["text"], new_tokenizer(), train.mean["unet"], scheduler, None, None)
    pipe = diffusers.StableDiffusionPipeline(*parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    strong = samplers.CaptionSampler(rows, train.rng, samplers.STRONG)
    odds = train.extra.get("odds", samplers.ODDS)
    weak = samplers.CaptionSampler(rows, train.rng, odds)
    alpha = scheduler.alphas_cumprod.to(args.device)
    snr = LATENT_STD**2 * alpha / (1 - alpha)
    for _ in train.loop():
        if train.done in looks(train.steps):
            rates = bars.base_rates(pipe, judge, 90, 10**6 + train.done)
            odds = train.extra["odds"] = samplers.follow(odds, rates)
            weak = samplers.CaptionSampler(rows, train.rng, odds)
            print(f"base {rates} odds {odds}", flush=True)
        singles = 0.25 + 0.35 * max(0, 1 - 3 * train.done / train.steps)
        sampler = strong if train.done < 0.4 * train.steps else weak
        row, caption, form = sampler.batch(64, singles)
        z = data["latents"][row].float() * vae.config.scaling_factor
        z = z.to(args.device, memory_format=torch.channels_last)
        tokens = torch.where(torch.rand(64, 1) < 0.1, empty, ids[caption, form])
        t = torch.randint(0, 1000, (64,), device=args.device)
        noise = torch.randn_like(z)
        with half(args.device):
            states = text(input_ids=tokens.to(args.device))[0]
            guess = unet(scheduler.add_noise(z, noise, t), t, states).sample
        error = (guess.float() - noise).square().mean((1, 2, 3))
        train.step((error * min_snr(snr[t])).mean())
    pipe.register_modules(tokenizer=new_tokenizer())  # the other would be saved as one that pads
    vae.cpu().half()
    train.mean.half()
    pipe.save_pretrained(args.out)
    # transformers would load what it says here, half precision, beside a UNet in float32
    config = args.out / "text_encoder" / "config.json"
    write_json(config, read_json(config) | {"dtype": "float32"})


PARTS = {"ae": train_ae, "clip": train_clip, "judge": train_judge, "unet": train_unet}


def main(argv=None):
    parser = Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--part", choices=PARTS, help="train this part only; default: all of them")
    add("--steps", type=int, help=f"budget of each part; default: {STEPS}")
    add("--out", type=Path, default=HOME, help="the model's folder; default: tiny/")
    add("--build", type=Path, default=HOME.parent / "runs/tiny", help="states to go on from")
    add("--check", action="store_true", help="print the bars; exit code 1 if one is missed")
    args = parser.parse_args(argv)
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.build.mkdir(parents=True, exist_ok=True)
    try:
        if args.check:
            sys.exit(not bars.check(args.out, args.device, args.build / "base.png"))
        for k, (part, train) in enumerate(PARTS.items()):
            if args.part in (None, part):
                torch.manual_seed(k)
                train(args)
    except OSError as problem:
        die(f"{args.out} lacks a part that is needed: build it first ({first_line(problem)})")


if __name__ == "__main__":
    main()
