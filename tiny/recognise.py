"""The judge, a classifier of what pictures show: nouns and cues. It is never a reward.

`build.py` trains it; its weights are in tiny/judge/. One row of logits answers nine
questions, the HEADS: the two nouns; the kind that the big, the small and the tiny cue
tell; style, ground, side and size. "none" is an answer too: of a noun that is missing,
faded or smeared, of a cue that is not there. A picture is recognised when the five
heads of CONTENT answer as its prompt says.
"""

import torch

from tiny.sprites import HOME, STYLES, nouns
from tiny.world import GROUNDS, KINDS, SIDES, SIZES, parse

HEADS = {
    "first noun": ["none", *nouns()],
    "second noun": ["none", *nouns()],
    "big cue": ["none", *KINDS],
    "small cue": ["none", *KINDS],
    "tiny cue": ["none", *KINDS],
    "style": [*STYLES],
    "ground": [*GROUNDS],
    "side": [*SIDES],
    "size": [*SIZES],
}
CONTENT = 5


def answers(fact, small, tiny):
    """The right answers of CONTENT's heads, as indices; small and tiny: kinds, or None."""
    kind, first, *rest = fact
    big = "none" if kind == "alone" else kind
    right = first, rest[0] if rest else "none", big, small or "none", tiny or "none"
    return [names.index(name) for names, name in zip(HEADS.values(), right)]


def prompt_answers(prompts):
    """(B, CONTENT) long: what a picture of each prompt would be answered."""
    facts = [parse(prompt) for prompt in prompts]
    kinds = [None if fact[0] == "alone" else fact[0] for fact in facts]
    return torch.tensor([answers(f, k, k) for f, k in zip(facts, kinds)])


def split_heads(logits):
    """(B, sum of classes) -> one (B, classes) a head."""
    return logits.split([len(names) for names in HEADS.values()], 1)


def load_judge(folder=HOME / "judge"):
    """The classifier in float32, on the CPU: (B, 3, 64, 64) in [-1, 1] -> logits (B, classes)."""
    from transformers import ResNetForImageClassification

    return ResNetForImageClassification.from_pretrained(folder).float().eval()


def probabilities(judge, images):
    """(B, 3, 64, 64) in [0, 1] -> for each head (B, classes), calibrated, on the CPU.

    The temperature, `calibration` in the judge's config, was fitted on held-out
    drawings, before any sample was judged. Runs on the judge's device.
    """
    with torch.no_grad():
        parts = [part.to(judge.device).float() * 2 - 1 for part in images.split(64)]
        logits = torch.cat([judge(part).logits for part in parts]).cpu()
    return [head.softmax(1) for head in split_heads(logits / judge.config.calibration)]


def recognise(judge, images, prompts):
    """(B, 3, 64, 64) in [0, 1] -> (B,) bool: are the nouns and all three cues the prompt's?

    Each head of CONTENT must give its right answer a probability of at least one half.
    Prompts that mirror one another ("person on sofa", "sofa under person") are one
    fact.
    """
    wanted, heads = prompt_answers(prompts), probabilities(judge, images)
    sure = [h.gather(1, w[:, None])[:, 0] >= 0.5 for h, w in zip(heads, wanted.T)]
    return torch.stack(sure).all(0)
