"""The judge: its weights know the world, and its pick is among the candidates alone."""

from pathlib import Path

import pytest
import torch
from conftest import ROOT
from diffusers import AutoencoderKL

from tiny.bars import drawn
from tiny.recognise import load_judge, recognise
from tiny.world import STYLES, fact_index, facts, read_lists

LISTS = read_lists()


class Fake(torch.nn.Module):
    """A judge that reads its logits off the pictures: fact k where the picture says k."""

    device = torch.device("cpu")

    def forward(self, x):
        assert len(x) <= 64 and x.min() >= -1 and x.max() <= 1
        best = ((x[:, 0, 0, 0] + 1) * 500).round().long()
        second = ((x[:, 1, 0, 0] + 1) * 500).round().long()
        self.logits = torch.zeros(len(x), len(facts()[0]))
        self.logits[torch.arange(len(x)), second] = 1.0
        self.logits[torch.arange(len(x)), best] = 2.0
        return self


def pictures(*pairs):
    """Pictures that say (best fact, second best)."""
    x = torch.zeros(len(pairs), 3, 64, 64)
    x[:, :2, 0, 0] = torch.tensor([[fact_index()[f] for f in pair] for pair in pairs]) / 1000
    return x


def test_the_pick_is_among_the_candidates():
    cat, dog, bike = ("alone", "cat"), ("alone", "dog"), ("bike", "cat")
    images = pictures((bike, cat), (bike, cat), (dog, bike), (dog, bike))
    prompts = ["a cat", "a dog", "a dog", "a cat"]
    right = recognise(Fake(), images, prompts, ["a cat", "a dog", "a bird"])
    assert right.tolist() == [True, False, True, False]
    # with the bike among the candidates, or as a prompt, the first two are bikes
    right = recognise(Fake(), images, prompts, ["a cat", "a dog", "a cat riding a bike"])
    assert right.tolist() == [False, False, True, False]
    prompts[0] = "a cat riding a bike"
    right = recognise(Fake(), images, prompts, ["a cat", "a dog"])
    assert right.tolist() == [True, False, True, False]


def test_mirrored_prompts_are_one_and_the_order_is_kept():
    fact, other = ("on", "person", "sofa"), ("alone", "cat")
    images = pictures(*[(fact, other), (other, fact)] * 65)
    right = recognise(Fake(), images, ["sofa under person"] * 130, ["person on sofa", "a cat"])
    assert right.tolist() == [True, False] * 65


@pytest.mark.parametrize("template", "123")
def test_the_judge_knows_pictures(template, tmp_path, monkeypatch):
    vae = AutoencoderKL.from_pretrained(ROOT / "tiny" / "vae")
    known = LISTS[f"{template} train"] + LISTS[f"{template} unseen"]
    images, owner, _ = drawn(known[:: len(known) // 8], vae)
    monkeypatch.chdir(tmp_path)  # it may not depend on the working directory
    judge = load_judge()
    assert recognise(judge, images, owner, known).float().mean() >= 0.8
    others = owner[len(STYLES) :] + owner[: len(STYLES)]
    assert recognise(judge, images, others, known).float().mean() <= 0.2
    assert Path.cwd() == tmp_path
