"""The parts of the tiny model before training: architectures, tokenizer, scheduler."""

import json

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers import ResNetConfig, ResNetForImageClassification

from tiny.recognise import HEADS
from tiny.sprites import STYLES
from tiny.world import captions, style_prompts


def new_autoencoder():
    """64x64x3 <-> 16x16x4, 12 times smaller; 1.6 M parameters."""
    size = dict(block_out_channels=(32, 64, 96), layers_per_block=1)
    size |= dict(sample_size=64, latent_channels=4, norm_num_groups=8)
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 3)
    blocks |= dict(up_block_types=("UpDecoderBlock2D",) * 3)
    return AutoencoderKL(**size, **blocks, mid_block_add_attention=False)


def new_unet():
    """3.1 M parameters, attention at 8x8 and in the middle."""
    size = dict(sample_size=16, in_channels=4, out_channels=4, cross_attention_dim=96)
    size |= dict(block_out_channels=(32, 64, 128), layers_per_block=1, norm_num_groups=16)
    down = ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
    up = ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
    blocks = dict(down_block_types=down, up_block_types=up)
    return UNet2DConditionModel(**size, **blocks, attention_head_dim=4)  # the NUMBER of heads


def new_text_encoder(vocabulary):
    size = dict(hidden_size=96, intermediate_size=384, projection_dim=96)
    size |= dict(num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=16)
    begin, end = vocabulary - 2, vocabulary - 1
    ids = dict(bos_token_id=begin, eos_token_id=end, pad_token_id=end)
    return CLIPTextModel(CLIPTextConfig(vocab_size=vocabulary, **size, **ids))


def new_scheduler():
    """SD 1.4's settings; steps_offset 1 keeps sigma above 0 at the last step."""
    betas = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return DDIMScheduler(**betas, steps_offset=1, set_alpha_to_one=False, clip_sample=False)


def clip_config(vocabulary):
    """What open_clip reads beside the weights."""
    vision = dict(image_size=64, layers=[1, 1, 1, 1], width=24, head_width=48)
    text = dict(context_length=16, vocab_size=vocabulary, width=128, heads=4, layers=2)
    text["hf_tokenizer_name"] = "in this folder"
    model = dict(embed_dim=128, vision_cfg=vision, text_cfg=text)
    pixels = dict(mean=[0.5] * 3, std=[0.5] * 3)  # x * 2 - 1
    return dict(model_cfg=model, preprocess_cfg=pixels)


def new_judge():
    """A plain ResNet whose logits are the HEADS, side by side."""
    labels = [f"{head}: {name}" for head, names in HEADS.items() for name in names]
    size = dict(embedding_size=24, hidden_sizes=[32, 64, 128, 256], depths=[1, 2, 2, 1])
    config = ResNetConfig(layer_type="basic", id2label=dict(enumerate(labels)), **size)
    config.calibration = 1.0  # the temperature of its logits
    return ResNetForImageClassification(config)


def new_tokenizer(folder):
    """CLIP's byte-pair tokenizer, its merges trained on the world's words: a token each.

    Other words fall apart into letters, and every byte has a token. One in `folder` is
    kept: merges of equal count come in any order, and ids must not change midway.
    """
    path = folder / "tokenizer" / "tokenizer.json"
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))["model"]
        merges = [tuple(pair) for pair in kept["merges"]]
        return CLIPTokenizer(vocab=kept["vocab"], merges=merges, model_max_length=16)
    words, end = {"style", *STYLES, *(w for c in captions() for w in c.split())}, "</w>"
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(end_of_word_suffix=end))
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    rules = dict(vocab_size=9999, min_frequency=0, initial_alphabet=letters)
    trainer = trainers.BpeTrainer(end_of_word_suffix=end, show_progress=False, **rules)
    bpe.train_from_iterator(sorted(words), trainer)
    merges = [tuple(m) for m in json.loads(bpe.to_str())["model"]["merges"]]
    order = letters + [c + end for c in letters] + ["".join(m) for m in merges]
    # open_clip pools the text where the token id is largest, so the end must come last
    order += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {w: k for k, w in enumerate(dict.fromkeys(order))}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=16)
    tokenizer.save_pretrained(path.parent)
    return tokenizer


def token_ids(tokenizer, texts):
    """(len(texts), 16) token ids."""
    length = dict(padding="max_length", max_length=16, truncation=True)
    return tokenizer(texts, return_tensors="pt", **length).input_ids


def caption_ids(tokenizer):
    """(captions, 4, 16) token ids: the bare caption, then with each style's name."""
    texts = [text for c in captions() for text in (c, *style_prompts(c))]
    return token_ids(tokenizer, texts).view(len(captions()), 1 + len(STYLES), 16)
