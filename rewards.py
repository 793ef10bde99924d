"""Rewards r(x_0, c): how well a picture matches its prompt (Sec. 4.1, "Rewards").

    name             what it is                                             source
    clip             cosine of CLIP's picture and text embeddings           Sec. 4.1 (2)
    bert             BERTScore recall of the prompt by LLaVA's description  Sec. 4.1 (1)
    jpeg             minus the size in kB as a JPEG; no model, no prompt    DDPO
    file.py:function your own; the file's code is run                       yours

A reward is a function of pictures (B, 3, H, W), float32 in [0, 1] on the CPU, and of B
prompts. It returns B numbers, higher is better. `load_reward` makes one from its name.
Your own, in full (`from rewards import to_pil` makes PIL pictures):

    # brightness.py, used as --reward brightness.py:score
    def score(images, prompts):
        return images.mean((1, 2, 3))

Rewards written for the common DDPO trainers run as they are: a third argument (metadata),
an answer (scores, info), a function without arguments that builds the reward.

Departures: [ours] DDPO sends LLaVA JPEGs of quality 80, a detail of its server; here it
sees the pictures as they are. LLaVA 1.5 [paper]; DDPO's server has an earlier one.
"""

import contextlib
import hashlib
import importlib.util
import inspect
import io
import os
import sys
import traceback
from modulefinder import ModuleFinder
from pathlib import Path

import torch

from support.command import Stop, die, first_line

CLIP_SD = ("ViT-H-14", "laion2b_s32b_b79k")  # Sec. 4.1; the weights [official]
LLAVA = "llava-hf/llava-1.5-7b-hf"  # Sec. 4.1: LLaVA v1.5, 7B, half precision
# Sec. 4.1: DeBERTa xlarge. DDPO's checkpoint, the layer that bert-score lists for it.
DEBERTA = ("microsoft/deberta-xlarge-mnli", 40)
QUESTION = "Answer concisely: what is going on in this image?"  # [ddpo]
REFERENCE = "The image contains {}"  # [ddpo]
REWARDS = ("clip", "bert", "jpeg")


def to_pil(images):
    """Pictures (B, 3, H, W) in [0, 1] -> B PIL pictures of 8 bits a channel, rounded."""
    from torchvision.transforms.functional import to_pil_image

    # Rounded first: of floats, to_pil_image cuts the rest off.
    eight_bit = (images.detach().float().cpu() * 255).round().clamp(0, 255).byte()
    return [to_pil_image(picture) for picture in eight_bit]


class ClipScore(torch.nn.Module):
    """Cosine of CLIP's picture and text embeddings, in [-1, 1] (Sec. 4.1 (2)).

    `name`, `pretrained` go to `open_clip.create_model_and_transforms`. Each prompt is
    embedded once. `.to(device)` moves the model while the UNet needs the memory.
    """

    def __init__(self, name, pretrained, device="cpu", dtype=torch.float32):
        import open_clip

        super().__init__()
        self.model, _, self.transform = open_clip.create_model_and_transforms(
            name, pretrained=pretrained, device=device
        )
        self.model.eval().requires_grad_(False).to(dtype)
        self.tokenizer, self.text = open_clip.get_tokenizer(name), {}

    @torch.no_grad()
    def embed_text(self, prompts):
        """B prompts -> unit embeddings (B, d) float32 on the CPU."""
        # One by one: the same bits in any company, as a resumed run needs.
        for prompt in set(prompts) - self.text.keys():
            tokens = self.tokenizer([prompt]).to(self.model.logit_scale.device)
            embedded = self.model.encode_text(tokens, normalize=True)[0]
            self.text[prompt] = embedded.float().cpu()
        return torch.stack([self.text[p] for p in prompts])

    @torch.no_grad()
    def embed_images(self, images, normalize=True, batch=64):
        """(B, 3, H, W) in [0, 1] -> (B, d) float32 on the CPU, with CLIP's transform."""
        out = []
        for part in images.split(batch):
            x = torch.stack([self.transform(picture) for picture in to_pil(part)])
            x = x.to(self.model.logit_scale)  # its device and dtype
            out.append(self.model.encode_image(x, normalize=normalize).float().cpu())
        return torch.cat(out)

    def forward(self, images, prompts):
        return (self.embed_images(images) * self.embed_text(prompts)).sum(1)


class BertRecall(torch.nn.Module):
    """BERTScore's recall of answers against references (Zhang et al. 2020; [ddpo]).

    For each word piece of the reference, the largest cosine to a word piece of the
    answer; the mean of these. As bert-score does by default, and so DDPO: embeddings
    after `layers` layers, no idf, no rescaling by a baseline; the reference's [CLS] and
    [SEP] do not count, the answer's may be matched; an empty answer scores 0.
    """

    def __init__(self, name=DEBERTA[0], layers=DEBERTA[1]):
        from transformers import AutoModel, AutoTokenizer

        super().__init__()
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        self.model = AutoModel.from_pretrained(name, dtype=torch.float32)
        self.model.eval().requires_grad_(False)
        blocks = self.model.encoder.layer
        self.model.encoder.layer = blocks[:layers]  # the rest is not needed

    @torch.no_grad()
    def embed(self, sentences):
        """B sentences -> unit embeddings (B, L, d); real and counted pieces (B, L)."""
        text = [s.strip() for s in sentences]
        tokens = self.tokenizer(text, padding=True, truncation=True, return_tensors="pt")
        tokens = tokens.to(self.model.device)
        ids, real = tokens.input_ids, tokens.attention_mask.bool()
        x = self.model(ids, attention_mask=tokens.attention_mask).last_hidden_state
        cls, sep = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        counted = real & (ids != cls) & (ids != sep)
        return torch.nn.functional.normalize(x, dim=-1), real, counted

    def forward(self, answers, references):
        """B answers, B references -> recall (B,) float32 on the CPU."""
        answer, real, said = self.embed(answers)
        reference, _, counted = self.embed(references)
        cosine = reference @ answer.transpose(1, 2)  # (B, L_reference, L_answer)
        best = cosine.masked_fill(~real[:, None, :], -torch.inf).max(2).values
        recall = (best * counted).sum(1) / counted.sum(1)
        return recall.where(said.any(1), 0.0).cpu()


class BertScore(torch.nn.Module):
    """LLaVA describes the picture; BERTScore's recall against the prompt (Sec. 4.1 (1)).

    The reference is "The image contains {prompt}" [ddpo]; the answer is greedy, of at
    most 64 tokens [ddpo]. LLaVA runs in `dtype` (half precision [paper]), DeBERTa in
    float32 [ddpo]. `.to(device)` moves both.
    """

    batch, max_new_tokens = 16, 64  # pictures described at once; [ddpo]

    def __init__(self, llava=LLAVA, deberta=DEBERTA, device="cpu", dtype=torch.float16):
        from transformers import AutoProcessor, LlavaForConditionalGeneration

        super().__init__()
        self.processor = AutoProcessor.from_pretrained(llava)
        self.llava = LlavaForConditionalGeneration.from_pretrained(llava, dtype=dtype)
        self.llava.eval().requires_grad_(False)
        self.recall = BertRecall(*deberta)
        self.to(device)

    @torch.no_grad()
    def describe(self, images):
        """(B, 3, H, W) in [0, 1] -> B answers to `QUESTION`, in LLaVA 1.5's chat format."""
        answers, limit = [], self.max_new_tokens
        for part in images.split(self.batch):
            text = [f"USER: <image>\n{QUESTION} ASSISTANT:"] * len(part)  # needs no padding
            inputs = self.processor(to_pil(part), text, return_tensors="pt")
            inputs = inputs.to(self.llava.device, self.llava.dtype)
            out = self.llava.generate(**inputs, max_new_tokens=limit, do_sample=False)
            said = out[:, inputs["input_ids"].shape[1] :]  # what follows the question
            answers += self.processor.batch_decode(said, skip_special_tokens=True)
        return [answer.strip() for answer in answers]

    def forward(self, images, prompts):
        return self.recall(self.describe(images), [REFERENCE.format(p) for p in prompts])


def jpeg_reward(images, prompts):
    """Compressibility: minus the kB (1000 bytes) as a JPEG of quality 95 [ddpo]. (B,)"""
    sizes = []
    for picture in to_pil(images):
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=95)
        sizes.append(-file.tell() / 1000)
    return torch.tensor(sizes)


# -------------------------------------------------- a reward by its name, and your own


def split_name(name):
    """The path and function of "path/file.py:function"; None for a built-in reward."""
    path, colon, function = name.rpartition(":")
    if not colon or not path.endswith(".py"):
        return None
    return Path(path).expanduser().resolve(), function


def check_reward_name(name):
    """What is wrong with --reward `name`, one line, or None. Loads and runs nothing."""
    own = split_name(name)
    if own is None:
        known = f"one of {', '.join(REWARDS)}, or your own as file.py:function"
        return None if name in REWARDS else f"unknown --reward {name}: {known}"
    if not os.path.isfile(own[0]):  # Path.is_file raises for a name that is too long
        return f"--reward {name}: there is no file {own[0]}"
    return None


def reward_code(name):
    """A hash of the file of --reward file.py:function and of what it imports from its folder.

    "" for a built-in reward. Nothing is run.
    """
    own = split_name(name)
    if own is None:
        return ""
    finder = ModuleFinder([str(own[0].parent)])
    with contextlib.suppress(Exception):  # it says more when it is imported
        finder.run_script(str(own[0]))
    files = {module.__file__ for module in finder.modules.values() if module.__file__}
    digest = hashlib.sha256()
    for file in sorted(files | {str(own[0])}):
        digest.update(Path(file).read_bytes())
    return digest.hexdigest()


def import_file(path):
    """Import the user's file under its own name, so that processes it starts find it, too.

    Its folder goes to the end of `sys.path`: modules beside it can be imported, and ours
    and Python's keep their names. A file that is called like one of these is imported as
    folder.file.
    """
    sys.path += [str(path.parent), str(path.parent.parent)]
    name = path.stem
    if importlib.util.find_spec(name).origin != str(path):
        name = f"{path.parent.name}.{name}"
        print(f"{path.name} is called like another module, so it is imported as {name}.")
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def own_reward(name):
    """The function of --reward file.py:function, or what it builds. This runs the file's code.

    Raises `Stop` for whatever that raises, after the user's own traceback.
    """
    path, function = split_name(name)
    reward = getattr(guarded(name, import_file, path), function, None)
    if inspect.isclass(reward) or callable(reward) and not inspect.signature(reward).parameters:
        reward = guarded(name, reward)
    if not callable(reward):
        die(f"reward {name}: {function} of {path} is no function, and builds none")
    return reward


def required_arguments(function):
    """How many arguments a function, or a module's forward, must be given by position."""
    needed = lambda p: p.default is p.empty and p.kind <= p.POSITIONAL_OR_KEYWORD
    calls = (function, getattr(function, "forward", function))
    return max(sum(map(needed, inspect.signature(call).parameters.values())) for call in calls)


@torch.no_grad()
def guarded(name, function, *inputs):
    """function(*inputs) of the user's code, without gradients; what it raises becomes a `Stop`."""
    try:
        return function(*inputs)
    except (KeyboardInterrupt, Stop, torch.OutOfMemoryError):  # they say more themselves
        raise
    except BaseException as problem:  # sys.exit, too
        if split_name(name):
            traceback.print_exc()
        raise Stop(f"reward {name} raised {first_line(problem)}") from problem


def checked(reward, name):
    """`reward`, with its answer checked: a (B,) float32 CPU tensor of finite numbers.

    It gets copies, without gradients, and its answer is copied. Raises `Stop` naming the
    reward if it raises or returns anything else, and naming the prompt for NaN or
    infinity. `.model` is the reward itself, `.to(device)` moves it if it can be moved.
    """

    wants_metadata = split_name(name) and required_arguments(reward) == 3

    def call(images, prompts):
        B = len(prompts)
        metadata = [[{} for _ in prompts]] if wants_metadata else []
        answer = guarded(name, reward, images.clone(), list(prompts), *metadata)
        if isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], dict):
            answer = answer[0]  # (scores, info)
        found = f"a {type(answer).__name__}"
        try:
            scores = torch.as_tensor(answer).detach()
            found += f" of {scores.dtype}, shape {tuple(scores.shape)}"
            if scores.is_complex() or scores.numel() != B:
                raise ValueError
            scores = scores.to("cpu", torch.float32, copy=True).reshape(B)
        except Exception:  # torch has many kinds for what is no list of numbers
            wanted = f"{B} numbers (tensor, array or list), one a picture"
            raise Stop(f"reward {name} returned {found}: it must return {wanted}") from None
        usable = scores.abs().lt(1e30).tolist()  # NaN is not, and sums must be finite, too
        if False in usable:
            bad = usable.index(False)
            raise Stop(f"reward {name} returned {scores[bad]} for the prompt {prompts[bad]!r}")
        return scores

    call.model = reward
    call.to = getattr(reward, "to", lambda device: reward)
    return call


def load_reward(name, tiny=None, device="cpu", dtype=torch.float32):
    """The reward called `name`, checked. `tiny`: the folder of the bundled model, if used.

    Ends with one line for an unknown name or a model that can not be loaded.
    """
    if problem := check_reward_name(name):
        die(problem)
    if split_name(name):
        return checked(own_reward(name), name)
    if name == "jpeg":
        return checked(jpeg_reward, name)
    clip = CLIP_SD if tiny is None else (f"local-dir:{tiny}/clip", None)
    try:
        if name == "clip":
            return checked(ClipScore(*clip, device, dtype), name)
        # half precision [paper] where there is a GPU
        half = torch.float16 if torch.device(device).type == "cuda" else dtype
        return checked(BertScore(device=device, dtype=half), name)
    except torch.OutOfMemoryError:
        raise
    except Exception as problem:  # the hub's errors, a missing or damaged file
        reason = first_line(problem)
        die(f"cannot load the model of reward {name} ({reason}): is the hub reachable?")
