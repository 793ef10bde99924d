"""The judge, a classifier of what pictures show: nouns and cues. It is never a reward.

Its weights are in tiny/judge/. One row of logits answers nine questions, the HEADS: the
two nouns; the kind that the big, the small and the tiny cue tell; style, ground, side and
size. "none" is an answer too: of a noun that is missing, faded or smeared, of a cue that
is not there. A picture is recognised when the five heads of CONTENT answer as its prompt
says.
"""

import torch

from tiny.world import GROUNDS, HOME, KINDS, NOUNS, SIDES, SIZES, STYLES, parse

HEADS = dict.fromkeys(("first noun", "second noun"), ("none", *NOUNS))
HEADS |= dict.fromkeys(("big cue", "small cue", "tiny cue"), ("none", *KINDS))
HEADS |= {"style": STYLES, "ground": GROUNDS, "side": SIDES, "size": SIZES}
CONTENT = 5


def fact_answers(fact):
    """The right answers of CONTENT's heads, as indices, where all three cues tell the fact."""
    kind, first, *rest = fact
    cue = "none" if kind == "alone" else kind
    words = (first, rest[0] if rest else "none", cue, cue, cue)
    return [names.index(word) for names, word in zip(HEADS.values(), words)]


def prompt_answers(prompts):
    """(B, CONTENT) long: what a right picture of each prompt is answered."""
    return torch.tensor([fact_answers(parse(prompt)) for prompt in prompts])


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
    pairs = zip(probabilities(judge, images), prompt_answers(prompts).T)
    sure = [head.gather(1, wanted[:, None])[:, 0] >= 0.5 for head, wanted in pairs]
    return torch.stack(sure).all(0)
