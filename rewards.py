"""Rewards r(x_0, c): how well a picture matches its prompt (Sec. 4.1, "Rewards").

    name             what it is                                                    source
    clip             cosine of CLIP's picture and text embeddings                  Sec. 4.1 (2)
    bert             BERTScore recall of LLaVA's description against the prompt    Sec. 4.1 (1)
    jpeg             minus the size in kB as a JPEG; needs no model, no prompt     DDPO
    file.py:function your own; the file's code is run                              yours

A reward is a function of pictures (B, 3, H, W), float32 in [0, 1] on the CPU, and B prompts; it
returns B numbers, higher is better. `load_reward` makes one from its name. Your own, in full:

    # brightness.py, used as --reward brightness.py:score
    def score(images, prompts):
        return images.mean((1, 2, 3))

Departures: [ours] DDPO sends LLaVA pictures as JPEG of quality 80, a detail of its server; here it
sees the pictures as they are. [ours] LLaVA 1.5 [paper] where DDPO's server has an earlier one.
"""

import importlib.util
import io
import sys
import traceback
from pathlib import Path

import torch

from runs import Stop, die

# Sec. 4.1: ViT-H-14 CLIP; the weights are the authors' choice [official].
CLIP_SD = ("ViT-H-14", "laion2b_s32b_b79k")
LLAVA = "llava-hf/llava-1.5-7b-hf"  # Sec. 4.1: LLaVA v1.5, 7B, half precision
# Sec. 4.1: DeBERTa xlarge; DDPO's checkpoint, and the layer the bert-score package lists for it
DEBERTA = ("microsoft/deberta-xlarge-mnli", 40)
QUESTION = "Answer concisely: what is going on in this image?"  # [ddpo]
REFERENCE = "The image contains {}"  # [ddpo]
REWARDS = ("clip", "bert", "jpeg")


def to_pil(images):
    """Pictures (B, 3, H, W) in [0, 1] -> B PIL pictures of 8 bits a channel, as they are saved."""
    from PIL import Image

    eight_bit = (images.detach().float().cpu() * 255).round().clamp(0, 255).to(torch.uint8)
    return [Image.fromarray(picture.permute(1, 2, 0).numpy()) for picture in eight_bit]


class ClipScore:
    """Cosine similarity of CLIP's picture and text embeddings, in [-1, 1] (Sec. 4.1 (2)).

    `name`, `pretrained` go to `open_clip.create_model_and_transforms`. The text embedding of a
    prompt is computed once. `device` may be changed with `.to` while the UNet needs the memory.
    """

    def __init__(self, name=CLIP_SD[0], pretrained=CLIP_SD[1], device="cpu", dtype=torch.float32):
        import open_clip

        self.model, _, self.transform = open_clip.create_model_and_transforms(
            name, pretrained=pretrained, device=device
        )
        self.model.eval().requires_grad_(False).to(dtype)
        self.tokenizer = open_clip.get_tokenizer(name)
        self.device, self.dtype, self.text = torch.device(device), dtype, {}

    def to(self, device):
        self.model.to(device)
        self.device = torch.device(device)
        return self

    @torch.no_grad()
    def embed_text(self, prompts):
        """B prompts -> unit embeddings (B, d) float32 on the CPU."""
        for prompt in set(prompts) - self.text.keys():  # one by one: the same bits in any company
            tokens = self.tokenizer([prompt]).to(self.device)
            self.text[prompt] = self.model.encode_text(tokens, normalize=True)[0].float().cpu()
        return torch.stack([self.text[p] for p in prompts])

    @torch.no_grad()
    def embed_images(self, images, normalize=True, batch=64):
        """(B, 3, H, W) in [0, 1] -> embeddings (B, d) float32 on the CPU, CLIP's own transform."""
        out = []
        for part in images.split(batch):
            x = torch.stack([self.transform(picture) for picture in to_pil(part)])
            x = x.to(self.device, self.dtype)
            out.append(self.model.encode_image(x, normalize=normalize).float().cpu())
        return torch.cat(out)

    def __call__(self, images, prompts):
        return (self.embed_images(images) * self.embed_text(prompts)).sum(1)


class BertRecall:
    """BERTScore's recall of answers against references, by hand (Zhang et al. 2020; [ddpo]).

    For each word piece of the reference, the largest cosine to a word piece of the answer; the
    mean of these. As in the bert-score package's defaults, which DDPO uses: the embeddings are
    those after the first `layers` layers, no idf, no rescaling by a baseline; [CLS] and [SEP] of
    the reference do not count, those of the answer may be matched; an empty answer scores 0.
    """

    def __init__(self, name=DEBERTA[0], layers=DEBERTA[1], device="cpu"):
        from transformers import AutoModel, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(name)
        self.model = AutoModel.from_pretrained(name, dtype=torch.float32).eval()
        self.model.requires_grad_(False)
        have = len(self.model.encoder.layer)
        assert 1 <= layers <= have, f"{name} has {have} layers, not {layers}"
        self.model.encoder.layer = self.model.encoder.layer[:layers]  # the rest is not needed
        self.to(device)

    def to(self, device):
        self.model.to(device)
        self.device = torch.device(device)
        return self

    @torch.no_grad()
    def embed(self, sentences):
        """B sentences -> unit embeddings (B, L, d); masks (B, L): real pieces, counted pieces."""
        tokens = self.tokenizer([s.strip() for s in sentences], padding=True, truncation=True,
                                return_tensors="pt").to(self.device)  # fmt: skip
        ids, real = tokens.input_ids, tokens.attention_mask.bool()
        out = self.model(ids, attention_mask=tokens.attention_mask).last_hidden_state
        special = (ids == self.tokenizer.cls_token_id) | (ids == self.tokenizer.sep_token_id)
        return torch.nn.functional.normalize(out, dim=-1), real, real & ~special

    def __call__(self, answers, references):
        """B answers, B references -> recall (B,) float32 on the CPU."""
        answer, real, said = self.embed(answers)
        reference, _, counted = self.embed(references)
        cosine = reference @ answer.transpose(1, 2)  # (B, L_reference, L_answer)
        best = cosine.masked_fill(~real[:, None, :], -torch.inf).max(2).values
        recall = (best * counted).sum(1) / counted.sum(1)
        return recall.where(said.any(1), torch.zeros(())).cpu()


class BertScore:
    """LLaVA describes the picture, BERTScore's recall compares it with the prompt (Sec. 4.1 (1)).

    The reference is "The image contains {prompt}" [ddpo]; the answer is greedy, of at most 64
    tokens [ddpo]. LLaVA runs in `dtype` (half precision [paper]), DeBERTa in float32 [ddpo].
    `batch` pictures are described at once. `.to` moves both models.
    """

    def __init__(self, llava=LLAVA, deberta=DEBERTA[0], layers=DEBERTA[1], device="cpu",
                 dtype=torch.float16, batch=16, max_new_tokens=64):  # fmt: skip
        from transformers import AutoProcessor, LlavaForConditionalGeneration

        self.processor = AutoProcessor.from_pretrained(llava)
        self.processor.tokenizer.padding_side = "left"  # answers start where the question ends
        self.llava = LlavaForConditionalGeneration.from_pretrained(llava, dtype=dtype).eval()
        self.llava.requires_grad_(False)
        self.recall = BertRecall(deberta, layers, device)
        self.dtype, self.batch, self.max_new_tokens = dtype, batch, max_new_tokens
        self.to(device)

    def to(self, device):
        self.llava.to(device)
        self.recall.to(device)
        self.device = torch.device(device)
        return self

    @torch.no_grad()
    def describe(self, images):
        """(B, 3, H, W) in [0, 1] -> B answers to `QUESTION`, in LLaVA 1.5's chat format."""
        answers = []
        for part in images.split(self.batch):
            inputs = self.processor(
                images=to_pil(part), text=[f"USER: <image>\n{QUESTION} ASSISTANT:"] * len(part),
                return_tensors="pt", padding=True).to(self.device, self.dtype)  # fmt: skip
            out = self.llava.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
            said = out[:, inputs["input_ids"].shape[1] :]  # what follows the question
            answers += self.processor.tokenizer.batch_decode(said, skip_special_tokens=True)
        return [answer.strip() for answer in answers]

    def __call__(self, images, prompts):
        return self.recall(self.describe(images), [REFERENCE.format(p) for p in prompts])


def jpeg_reward(images, prompts):
    """Compressibility: minus the size in kB (1000 bytes) as a JPEG of quality 95 [ddpo]. (B,)"""
    sizes = []
    for picture in to_pil(images):
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=95)
        sizes.append(-file.tell() / 1000)
    return torch.tensor(sizes)


def split_name(name):
    """"path/file.py:function" -> (path, function), or None for the name of a built-in reward."""
    path, colon, function = name.rpartition(":")
    return (Path(path), function) if colon and path.endswith(".py") else None


def check_reward_name(name):
    """What is wrong with --reward `name`, one line, or None. Loads and runs nothing."""
    own = split_name(name)
    if own is None:
        return None if name in REWARDS else (
            f"unknown --reward {name}: one of {', '.join(REWARDS)}, or your own as file.py:function"
        )  # fmt: skip
    if not own[0].is_file():
        return f"--reward {name}: there is no file {own[0]}"
    return None if own[1].isidentifier() else f"--reward {name}: {own[1]!r} is no function's name"


def own_reward(name):
    """The function of --reward file.py:function. This runs the file's code.

    Ends with one line if the file does not run or has no such function.
    """
    path, function = split_name(name)
    spec = importlib.util.spec_from_file_location(f"own_reward_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickles look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as problem:
        die(f"reward {name}: {told(problem, path)}")
    if not callable(getattr(module, function, None)):
        die(f"reward {name}: {path} has no function {function}")
    return getattr(module, function)


def told(problem, path=None):
    """An exception in one line, with its line number in the file `path` if it went through it."""
    lines = [f.lineno for f in traceback.extract_tb(problem.__traceback__)
             if path is not None and Path(f.filename).name == path.name]  # fmt: skip
    first = (str(problem).strip().splitlines() or ["no message"])[0][:200]
    return f"{type(problem).__name__}: {first}" + (f" (line {lines[-1]})" if lines else "")


def checked(reward, name):
    """`reward`, with its answer checked: a (B,) float32 CPU tensor of finite numbers.

    Raises `runs.Stop` naming the reward if it raises, and for a wrong shape; for NaN or infinity
    naming the prompt too. `.model` is the reward itself, `.to(device)` moves its models if any.
    """
    own = split_name(name)

    def call(images, prompts):
        try:
            scores = reward(images, prompts)
        except (Stop, torch.OutOfMemoryError):  # the latter says more itself
            raise
        except Exception as problem:
            raise Stop(f"reward {name} raised {told(problem, own and own[0])}") from problem
        try:
            scores = torch.as_tensor(scores).detach().float().cpu()
        except (TypeError, ValueError, RuntimeError):
            raise Stop(
                f"reward {name} returned a {type(scores).__name__}: it must return one number a "
                f"picture, as a tensor, an array or a list"
            ) from None
        if scores.shape != (len(prompts),):
            raise Stop(
                f"reward {name} returned shape {tuple(scores.shape)} for {len(prompts)} pictures: "
                f"it must return one number a picture"
            )
        bad = (~scores.isfinite()).nonzero().flatten().tolist()
        if bad:
            raise Stop(
                f"reward {name} returned {scores[bad[0]]} for the prompt {prompts[bad[0]]!r}"
            )
        return scores

    call.model = reward
    call.to = getattr(reward, "to", lambda device: reward)
    return call


def load_reward(name, tiny=None, device="cpu", dtype=torch.float32):
    """The reward called `name`, checked. `tiny` is the bundled model's folder if that is trained.

    Ends with one line for an unknown name or a model that can not be loaded.
    """
    if problem := check_reward_name(name):
        die(problem)
    if split_name(name):
        return checked(own_reward(name), name)
    if name == "jpeg":
        return checked(jpeg_reward, name)
    try:
        if name == "bert":  # half precision [paper] where there is a GPU
            half = torch.float16 if torch.device(device).type == "cuda" else dtype
            return checked(BertScore(device=device, dtype=half), name)
        if tiny is not None:
            return checked(ClipScore(f"local-dir:{tiny}/clip", None, device), name)
        return checked(ClipScore(device=device, dtype=dtype), name)
    except (OSError, ValueError, RuntimeError) as problem:  # hub errors are OSErrors
        if isinstance(problem, torch.OutOfMemoryError):
            raise
        die(f"cannot load the model of reward {name} ({told(problem)}): is the hub reachable?")
