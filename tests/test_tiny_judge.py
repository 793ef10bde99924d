"""The judge: its heads answer a prompt, its weights know the world and what is spoiled."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from tiny.build.bars import drawn, spoiled
from tiny.build.samplers import judge_targets
from tiny.build.scenes import LISTS, encode, right_scene
from tiny.judge import CONTENT, HEADS, load_judge, prompt_answers, recognise
from tiny.world import HOME, STYLES, parse


class Fake:
    """A judge that is `sure` (a logit) of the answers to the prompts that it is made for."""

    device, config = torch.device("cpu"), SimpleNamespace(calibration=1.0)

    def __init__(self, prompts, sure=9.0, doubts=()):
        self.rows = []
        for k, wanted in enumerate(prompt_answers(prompts)):
            heads = [torch.zeros(len(names)) for names in HEADS.values()]
            for n, (head, answer) in enumerate(zip(heads, wanted)):
                head[answer] = 0.0 if (k, n) in doubts else sure
            self.rows.append(torch.cat(heads))

    def __call__(self, x):
        assert len(x) <= 64 and x.min() >= -1 and x.max() <= 1
        now, self.rows = self.rows[: len(x)], self.rows[len(x) :]
        return SimpleNamespace(logits=torch.stack(now))


def judged(prompts, seen=None, **settings):
    return recognise(
        Fake(seen or prompts, **settings), torch.rand(len(prompts), 3, 64, 64), prompts
    )


def test_every_head_of_the_content_must_be_right():
    prompts = ["a cat riding a bike"] * 6
    doubts = {(k, k) for k in range(CONTENT)}
    assert judged(prompts, doubts=doubts).tolist() == [False] * 5 + [True]


def test_another_noun_or_cue_is_not_recognised():
    seen = ["a cat riding a bike", "a dog riding a bike", "a cat playing chess", "a cat"]
    assert judged(["a cat riding a bike"] * 4, seen).tolist() == [True, False, False, False]


def test_the_answer_needs_half_of_the_probability_after_the_temperature(monkeypatch):
    others = len(HEADS["first noun"]) - 1  # the head with the most answers
    just = torch.tensor(float(others)).log().item()
    prompts = ["a cat washing dishes"]
    assert judged(prompts, sure=just + 0.01).all() and not judged(prompts, sure=just - 0.01).any()
    monkeypatch.setattr(Fake, "config", SimpleNamespace(calibration=2.0))
    assert judged(prompts, sure=2 * just + 0.02).all()
    assert not judged(prompts, sure=2 * just - 0.02).any()


def test_mirrored_prompts_are_one_and_the_order_is_kept():
    seen = ["person on sofa", "a cat"] * 65
    assert judged(["sofa under person"] * 130, seen).tolist() == [True, False] * 65


def test_a_prompts_answers_are_those_of_its_right_scene():
    for prompt in [p for prompts in LISTS.values() for p in prompts[::5]]:
        row = encode([right_scene(parse(prompt), "fluent", np.random.default_rng(0))])
        target = judge_targets(row, torch.zeros(1, 2, dtype=torch.bool))
        assert prompt_answers([prompt]).tolist() == target[:, :CONTENT].tolist()
    words = [names[k] for names, k in zip(HEADS.values(), prompt_answers(["vase on table"])[0])]
    assert words == ["vase", "table", "on", "on", "on"]
    assert prompt_answers(["a cat"])[0, 1:].tolist() == [0] * 4  # no other noun, no cue


@pytest.mark.parametrize("template", "123")
def test_the_judge_knows_pictures(template, tmp_path, monkeypatch):
    vae = AutoencoderKL.from_pretrained(HOME / "vae")
    known = LISTS[f"{template} train"] + LISTS[f"{template} unseen"]
    images, owner, _ = drawn(known[:: len(known) // 5], vae)
    monkeypatch.chdir(tmp_path)  # it may not depend on the working directory
    judge = load_judge()
    assert recognise(judge, images, owner).float().mean() >= 0.8
    others = owner[len(STYLES) :] + owner[: len(STYLES)]
    assert recognise(judge, images, others).float().mean() <= 0.2
    assert Path.cwd() == tmp_path


def test_the_judge_refuses_what_is_spoiled():
    vae = AutoencoderKL.from_pretrained(HOME / "vae")
    images, owner = spoiled(vae, 24)
    assert recognise(load_judge(), images, owner).float().mean() <= 0.1
