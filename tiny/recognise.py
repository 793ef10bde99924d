"""The judge: a classifier that tells what a picture shows, and is never a reward.

build.py trains it; its weights are in tiny/judge/. Label k is fact k of `world.facts`.
"""

import torch
from transformers import ResNetForImageClassification

from tiny.world import HOME, fact_index, parse


def load_judge(folder=HOME / "judge"):
    """Classifier, float32, on the CPU: (B, 3, 64, 64) in [-1, 1] -> (B, facts) logits."""
    return ResNetForImageClassification.from_pretrained(folder).float().eval()


def recognise(judge, images, prompts, candidates):
    """(B, 3, 64, 64) in [0, 1] -> (B,) bool: is the prompt the judge's pick of candidates?

    prompts: B of them; one that is no candidate is added. Prompts that mirror each other
    ("person on sofa", "sofa under person") are one fact. Runs on the judge's device.
    """
    index = fact_index()
    allowed = torch.tensor(sorted({index[parse(p)] for p in [*candidates, *prompts]}))
    with torch.no_grad():
        parts = [part.to(judge.device).float() * 2 - 1 for part in images.split(64)]
        logits = torch.cat([judge(part).logits for part in parts]).cpu()
    picked = allowed[logits[:, allowed].argmax(1)]
    return picked == torch.tensor([index[parse(p)] for p in prompts])
