"""Train every part of the tiny model, or hold it to its bars.

    python tiny/build.py                              # all parts, each goes on where it was cut off
    python tiny/build.py --part unet --steps 60000    # one part; more steps than it had: it goes on
    python tiny/build.py --check --grid base.png      # the table of bars, base samples to look at

ae      AutoencoderKL, 64x64x3 -> 16x16x4; `decoder` sharpens its decoder over frozen latents.
unet    UNet2DConditionModel with CLIPTextModel. Imperfect on purpose: each cue of a caption's
        pictures is often wrong (`samplers.ODDS`), so the base misaligns as Stable
        Diffusion does.
clip    an open_clip model, trained on pictures as the autoencoder decodes them, blur included: or
        it would reward sharpness. It is the reward; it goes up with every cue that is
        right.
judge   a ResNet classifier of another seed, architecture and loss; never a reward.

Shapes: pictures (B, 3, 64, 64); latents (B, 4, 16, 16) of std `LATENT_STD`; x in [-1,
1].
"""

import argparse
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from processes import die
from run_folder import write_json, write_safetensors
from tiny.bars import check
from tiny.pictures import decode_latents, encode_pictures, make_decoded, make_latents
from tiny.pictures import mixed_pictures, read_chunks
from tiny.recognise import HEADS, answers, split_heads
from tiny.samplers import CaptionSampler, ClipSampler, judge_targets
from tiny.sprites import HOME, STYLES, render_sprites
from tiny.training import Trainer
from tiny.world import captions, draw_scene, random_scenes, style_prompts, to_tensor

STEPS = {"ae": 10000, "decoder": 3000, "unet": 60000, "clip": 6000, "judge": 6000}
LATENTS, DECODED, SPOILED, RIGHT = 24, 12, 3, 3  # chunks of 3,000 cached pictures

# Std of the latents that the UNet sees (the autoencoder's scaling_factor). A difference
# of energy E in the latents is decided where E * SNR(t) is about 0.8, and E goes with
# the square of this.
LATENT_STD = 0.3


# ---------------------------------------------------------------- autoencoder


def new_autoencoder():
    """64x64x3 <-> 16x16x4, 12 times smaller."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )


def load_vae(args):
    from diffusers import AutoencoderKL

    if not (args.out / "vae").exists():
        die(f"{args.out} has no autoencoder yet: train the part ae first")
    vae = AutoencoderKL.from_pretrained(args.out / "vae").float().requires_grad_(False)
    return vae.to(args.device, memory_format=torch.channels_last)


def reconstruct(vae, z, x):
    """Decode z against x: the loss, L2 and a little L1, and the mean squared error.

    z gets noise of a std up to 0.14: samples keep sigma of the last step, 0.03 beside
    LATENT_STD.
    """
    level = (0.02 + 0.12 * torch.rand(1).item()) * torch.rand(len(z), 1, 1, 1, device=z.device)
    with torch.autocast(x.device.type, torch.bfloat16):
        y = vae.decode(z + level * torch.randn_like(z)).sample
    error = y.float() - x
    l2 = error.square().mean()
    return l2 + 0.05 * error.abs().mean(), l2 / 4


def train_ae(args):
    """Latents of std 1 in every channel, of random compositions and of the world's drawings.

    Half of the pictures are random compositions at first, a tenth after 4,000 steps.
    """
    vae = new_autoencoder()
    train = Trainer("ae", {"vae": vae}, args, 4e-3)
    while train.running():
        share = 0.5 if train.done < 4000 else 0.1
        x = train.put(to_tensor(mixed_pictures(train.rng, 8, share)))
        with train.autocast():
            z = vae.encode(x).latent_dist.mean
        loss, error = reconstruct(vae, z, x)
        z = z.float()
        spread = (z.std((0, 2, 3)) - 1).square().mean() + z.mean((0, 2, 3)).square().mean()
        train.step(loss + 0.01 * spread)
        train.log(mse=error, std=z.std())
    train.use_mean()
    rng = np.random.default_rng(9)
    pictures = np.stack([draw_scene(scene, rng) for scene in random_scenes(rng, 500)])
    std = float(encode_pictures(vae, pictures).float().std())
    vae.register_to_config(scaling_factor=round(LATENT_STD / std, 4))
    vae.half().save_pretrained(args.out / "vae")


def train_decoder(args):
    """Sharpen the decoder over the frozen encoder: the latents, and so a UNet, stay valid."""
    vae = load_vae(args)
    vae.decoder.requires_grad_(True)
    train = Trainer("decoder", {"decoder": vae.decoder}, args, 2e-3)
    while train.running():
        x = train.put(to_tensor(mixed_pictures(train.rng, 8, 0.0)))
        with torch.no_grad(), train.autocast():
            z = vae.encode(x).latent_dist.mean.float()
        loss, error = reconstruct(vae, z, x)
        train.step(loss)
        train.log(mse=error)
    train.use_mean()
    vae.cpu().half().save_pretrained(args.out / "vae")


# ---------------------------------------------------------------- text


def new_tokenizer(folder):
    """CLIP's byte-pair tokenizer, its merges trained on the world's words: one token each.

    Other words fall apart into letters, and every byte has a token. One that is in
    `folder` is kept: merges of equal count come in any order, and ids must not change
    midway.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    if (folder / "tokenizer" / "tokenizer.json").exists():
        return CLIPTokenizer.from_pretrained(folder / "tokenizer")
    words = {w for p in captions() for w in p.split()} | set(STYLES) | {"style", "a"}
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    end = "</w>"
    bpe = Tokenizer(models.BPE(end_of_word_suffix=end))
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=9999,
        min_frequency=0,
        end_of_word_suffix=end,
        initial_alphabet=letters,
        show_progress=False,
    )
    bpe.train_from_iterator(sorted(words), trainer)
    merges = [tuple(m) for m in json.loads(bpe.to_str())["model"]["merges"]]
    order = letters + [c + end for c in letters] + ["".join(m) for m in merges]
    # open_clip pools the text where the token id is largest, so the end must come last
    order += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {w: k for k, w in enumerate(dict.fromkeys(order))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=16)


def token_ids(tokenizer, texts):
    """(len(texts), 16) token ids."""
    length = dict(padding="max_length", max_length=16, truncation=True)
    return tokenizer(texts, return_tensors="pt", **length).input_ids


def caption_ids(tokenizer):
    """(captions, 4, 16) token ids: the bare caption, then with each style's name."""
    texts = [t for c in captions() for t in (c, *style_prompts(c))]
    return token_ids(tokenizer, texts).view(len(captions()), 1 + len(STYLES), 16)


# ---------------------------------------------------------------- the diffusion model


def new_unet():
    from diffusers import UNet2DConditionModel

    cross = "CrossAttn"
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", cross + "DownBlock2D", cross + "DownBlock2D"),
        up_block_types=(cross + "UpBlock2D", cross + "UpBlock2D", "UpBlock2D"),
        cross_attention_dim=96,
        attention_head_dim=4,  # the NUMBER of heads
        norm_num_groups=16,
    )


def new_text_encoder(vocabulary):
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = dict(hidden_size=96, intermediate_size=384, projection_dim=96)
    sizes |= dict(num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=16)
    begin, end = vocabulary - 2, vocabulary - 1
    ids = dict(bos_token_id=begin, eos_token_id=end, pad_token_id=end)
    return CLIPTextModel(CLIPTextConfig(vocab_size=vocabulary, **sizes, **ids))


def new_scheduler():
    """SD 1.4's settings; steps_offset 1 keeps sigma above 0 at the last step."""
    from diffusers import DDIMScheduler

    betas = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return DDIMScheduler(**betas, steps_offset=1, set_alpha_to_one=False, clip_sample=False)


def train_unet(args):
    """Epsilon prediction with min-SNR-5 weights, 10 % empty captions, text encoder jointly."""
    from diffusers.models.attention_processor import AttnProcessor

    vae = load_vae(args)
    make_latents(args, vae, LATENTS)
    latents, rows = read_chunks(args, "latents", "latents", "rows")
    tokenizer = new_tokenizer(args.out)
    ids, empty = caption_ids(tokenizer), token_ids(tokenizer, [""])
    unet, text = new_unet(), new_text_encoder(len(tokenizer))
    unet.set_attn_processor(AttnProcessor())  # torch's fused CPU backward is slow at this size
    train = Trainer("unet", {"unet": unet, "text": text}, args, 3e-3, keep=0.9995)
    sampler = CaptionSampler(rows.numpy(), train.rng)
    alpha = new_scheduler().alphas_cumprod.to(args.device)
    snr = LATENT_STD**2 * alpha / (1 - alpha)
    while train.running():
        singles = 0.25 + 0.35 * max(0, 1 - 3 * train.done / args.steps)
        row, caption, form = sampler.batch(64, singles)
        z = train.put(latents[row].float() * vae.config.scaling_factor)
        tokens = torch.where(torch.rand(64, 1) < 0.1, empty, ids[caption, form]).to(args.device)
        # half from the noise levels at which a picture takes shape
        t = torch.cat([torch.randint(0, 1000, (32,)), torch.randint(250, 900, (32,))])
        t, noise = t.to(args.device), torch.randn_like(z)
        a = alpha[t].view(-1, 1, 1, 1)
        with train.autocast():
            states = text(input_ids=tokens)[0]
            guess = unet(a.sqrt() * z + (1 - a).sqrt() * noise, t, states).sample
        error = (guess.float() - noise).square().mean((1, 2, 3))
        loss = (error * (snr[t].clamp(max=5) / snr[t])).mean()
        train.step(loss)
        train.log(loss=loss)
    train.use_mean()
    export_pipeline(args, unet, text, tokenizer)


def export_pipeline(args, unet, text, tokenizer):
    """Write the folder that diffusers loads, weights in half precision."""
    from diffusers import StableDiffusionPipeline

    vae, scheduler = load_vae(args).cpu(), new_scheduler()
    parts = vae.half(), text.half(), tokenizer, unet.half(), scheduler, None, None
    StableDiffusionPipeline(*parts, requires_safety_checker=False).save_pretrained(args.out)
    # transformers would load what it says here, half precision, beside a UNet in float32
    config = args.out / "text_encoder" / "config.json"
    write_json(config, json.loads(config.read_text()) | {"dtype": "float32"})


# ---------------------------------------------------------------- CLIP and the judge


def augment(x):
    """A little blur and noise on pictures in [0, 1]: samples are not as clean as drawings."""
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    mix, often, loud = torch.rand(3, len(x), 1, 1, 1, device=x.device)
    x = x + 0.6 * mix * (often < 0.5) * (soft - x)
    return (x + 0.05 * loud * torch.randn_like(x)).clamp(0, 1)


def read_decoded(args):
    """All decoded pictures, their rows and flags: random, right and spoiled scenes."""
    make_decoded(args, load_vae(args), LATENTS, DECODED, RIGHT, SPOILED)
    kinds = ("decoded", "right", "spoiled")
    parts = [read_chunks(args, kind, "decoded", "rows", "flags") for kind in kinds]
    return [torch.cat(group) for group in zip(*parts)]


def clip_config(vocabulary):
    """What open_clip reads beside the weights."""
    vision = dict(image_size=64, layers=[1, 1, 1, 1], width=24, head_width=48)
    text = dict(context_length=16, vocab_size=vocabulary, width=128, heads=4, layers=2)
    text["hf_tokenizer_name"] = "in this folder"
    pixels = dict(mean=[0.5] * 3, std=[0.5] * 3, interpolation="bicubic", resize_mode="shortest")
    model = dict(embed_dim=128, vision_cfg=vision, text_cfg=text)
    return dict(model_cfg=model, preprocess_cfg=pixels)


def train_clip(args):
    """Contrastive, with soft targets: a wrong cue makes a pair e^2 times less likely."""
    from open_clip.model import CLIP

    pictures, rows, flags = read_decoded(args)
    tokenizer = new_tokenizer(args.out)
    ids, config = caption_ids(tokenizer), clip_config(len(tokenizer))
    model = CLIP(**config["model_cfg"])
    train = Trainer("clip", {"clip": model}, args, 2e-3, decay=0.02)
    sampler = ClipSampler(rows.numpy(), flags.numpy(), train.rng)
    while train.running():
        row, caption, form, weight = sampler.batch(32)
        weight = weight.to(args.device)
        x = augment(train.put(pictures[row]).float() / 255)
        with train.autocast():
            image = model.encode_image(x * 2 - 1)
            text = model.encode_text(ids[caption, form].to(args.device))
        image, text = F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1)
        logits = model.logit_scale.exp() * image @ text.T
        by_image = F.cross_entropy(logits, weight / weight.sum(1, keepdim=True))
        by_text = F.cross_entropy(logits.T, (weight / weight.sum(0)).T)
        train.step((by_image + by_text) / 2)
        best = weight.T.argmax(1) == logits.T.argmax(1)
        train.log(by_image=by_image, by_text=by_text, right=best.float().mean())
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(30))
    train.use_mean()
    folder = args.out / "clip"
    tokenizer.save_pretrained(folder)
    write_json(folder / "open_clip_config.json", config)
    write_safetensors(folder / "open_clip_model.safetensors", model.half().state_dict())


def train_judge(args):
    """A plain ResNet with the HEADS side by side; then its temperature on held-out drawings."""
    from transformers import ResNetConfig, ResNetForImageClassification

    pictures, rows, flags = read_decoded(args)
    targets = judge_targets(rows, flags)
    labels = [f"{head}: {name}" for head, names in HEADS.items() for name in names]
    shape = dict(embedding_size=24, hidden_sizes=[32, 64, 128, 256], depths=[1, 2, 2, 1])
    config = ResNetConfig(layer_type="basic", id2label=dict(enumerate(labels)), **shape)
    config.calibration = 1.0
    model = ResNetForImageClassification(config)
    train = Trainer("judge", {"judge": model}, args, 2e-3, decay=0.05)
    while train.running():
        row = train.rng.integers(0, len(pictures), 64)
        x = augment(train.put(pictures[row]).float() / 255)
        with train.autocast():
            heads = split_heads(model(x * 2 - 1).logits.float())
        wanted = targets[row].to(args.device)
        losses = [F.cross_entropy(h, w, label_smoothing=0.02) for h, w in zip(heads, wanted.T)]
        train.step(torch.stack(losses).sum())
        right = [(h.argmax(1) == w) | (w < 0) for h, w in zip(heads[:5], wanted.T)]
        train.log(loss=sum(losses), right=torch.stack(right).all(0).float().mean())
    train.use_mean()
    model.config.calibration = fit_temperature(args, model)
    model.half().save_pretrained(args.out / "judge")


def fit_temperature(args, model):
    """The temperature at which held-out drawings (seed 98) are most likely."""
    rng, vae = np.random.default_rng(98), load_vae(args)
    scenes = random_scenes(rng, 600)
    drawings = np.stack([draw_scene(scene, rng) for scene in scenes])
    x = decode_latents(vae, encode_pictures(vae, drawings)).float() / 255
    wanted = torch.tensor([answers(s.fact, s.small, s.tiny) for s in scenes]).T
    with torch.no_grad():
        logits = torch.cat([model(part * 2 - 1).logits for part in x.split(64)])

    def misfit(t):
        heads = split_heads(logits / t)
        return sum(F.cross_entropy(h, w) for h, w in zip(heads, wanted)).item()

    return min((round(0.05 * k, 2) for k in range(4, 61)), key=misfit)


# ---------------------------------------------------------------- command line

TRAIN = {
    "ae": train_ae,
    "decoder": train_decoder,
    "unet": train_unet,
    "clip": train_clip,
    "judge": train_judge,
}


def main(argv=None):
    import diffusers
    import transformers

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--part", choices=STEPS, help="train this part only; default: all, in this order")
    add("--steps", type=int, help=f"budget of each part; default: {STEPS}")
    add("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    add("--threads", type=int, default=os.cpu_count(), help="torch threads")
    add("--out", type=Path, default=HOME, help="the model's folder; default: tiny/")
    add("--build", default=HOME.parent / "runs" / "tiny", help="checkpoints and caches")
    add("--check", action="store_true", help="print the table of bars; exit code 1 if one fails")
    add("--grid", help="with --check: a PNG of base samples to write")
    add("--sprites", help="render the icons anew; needs resvg-py and node_modules/@iconify-json")
    args = parser.parse_args(argv)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device == "cuda" and not torch.cuda.is_available():
        die("torch finds no GPU: leave --device out, or --device cpu")
    torch.set_num_threads(args.threads)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    if args.sprites:
        return render_sprites(args.sprites)
    if args.check:
        return sys.exit(not check(args.out, args.device, args.grid))
    Path(args.build).mkdir(parents=True, exist_ok=True)
    steps = args.steps
    for k, part in enumerate(STEPS):
        if args.part in (None, part):
            args.steps = steps or STEPS[part]
            torch.manual_seed(k)
            TRAIN[part](args)


if __name__ == "__main__":
    main()
