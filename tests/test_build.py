"""How the tiny model is built: a trainer that goes on, its data, and the files that it writes."""

import math
import runpy
import sys
from argparse import Namespace
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from diffusers import AutoencoderKL, StableDiffusionPipeline

from files import write_safetensors
from tiny import build, world
from tiny.recognise import load_judge, recognise

HOME = ROOT / "tiny"
LISTS = world.read_lists()


def rng(seed=0):
    return np.random.default_rng(seed)


# ---------------------------------------------------------------- the trainer


@pytest.fixture
def trainer(tmp_path):
    """A trainer of a small network with a BatchNorm, whose state is in tmp_path."""

    def make(steps, name="toy"):
        torch.manual_seed(1)
        net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
        args = Namespace(build=tmp_path, steps=steps, device="cpu")
        return build.Trainer(name, {"net": net}, args, 1e-2)

    return make


def turn(train, turns=None):
    """Train to the end, or for some turns: as if it was cut off then."""
    for k, _ in enumerate(train.loop()):
        if k == turns:
            return
        x = torch.arange(12.0).view(4, 3).sin() + train.done
        train.step(train.modules["net"](x).square().sum(1).mul(torch.arange(4)).mean())


def test_a_training_that_was_cut_off_goes_on_where_it_was(trainer):
    whole = trainer(6, "whole")
    turn(whole)
    cut = trainer(6)
    turn(cut, 3)
    assert cut.done == 3
    cut.save()
    cut = trainer(6)
    assert cut.done == 3
    turn(cut)
    assert cut.done == 6
    assert cut.mean.keys() == whole.mean.keys()
    assert all(torch.equal(cut.mean[k], whole.mean[k]) for k in whole.mean)
    live, other = cut.modules.state_dict(), whole.modules.state_dict()
    assert all(torch.equal(live[k], other[k]) for k in other)


def test_the_end_leaves_the_running_mean_and_more_steps_go_on(trainer):
    train = trainer(5)
    weight = train.modules["net"][0].weight
    seen = [weight.detach().clone()]
    mean = seen[0].clone()
    for k, _ in enumerate(train.loop()):
        train.step(train.modules["net"](torch.eye(3) * k).sub(9).square().mean())
        seen.append(weight.detach().clone())
        mean += (seen[-1] - mean) * (1 - (2 + k) / (21 + k))
    assert torch.allclose(weight, mean, atol=1e-7) and not torch.equal(weight, seen[-1])
    assert not train.modules.training
    more = trainer(7)  # goes on from the last weights, not from their mean
    assert more.done == 5 and torch.equal(more.modules["net"][0].weight, seen[-1])
    turn(more)
    assert more.done == 7


def test_the_rate_warms_up_and_falls_to_a_fiftieth(trainer):
    train, rates = trainer(1000), []
    for train.done in (0, 49, 99, 500, 999):
        train.step(train.modules["net"](torch.eye(3)).square().mean())
        rates.append(train.opt.param_groups[0]["lr"] / train.rate)
    cosine = [0.51 + 0.49 * math.cos(math.pi * k / 1000) for k in (0, 49, 99, 500, 999)]
    assert np.allclose(rates, [0.01 * cosine[0], 0.5 * cosine[1], *cosine[2:]])
    assert abs(rates[3] - 0.51) < 1e-9 and 0.02 < rates[4] < 0.0201


# ---------------------------------------------------------------- what is learnt from


def test_training_captions_are_right_as_often_as_told():
    every, _ = world.facts()
    pairs = [(f, s) for f in range(len(every)) for s in range(len(world.STYLES))]
    sampler = build.CaptionSampler(torch.tensor(pairs), rng())
    rows, captions, forms = sampler.batch(12_000, 0.2)
    seen, named = {}, np.mean(forms > 0)
    for row, caption, form in zip(rows, captions, forms):
        fact, style = pairs[row]
        prompt = world.captions()[caption]
        template = next((name[0] for name in LISTS if prompt in LISTS[name]), "noun")
        seen.setdefault((template, style), []).append(every[fact] == world.parse(prompt))
        assert form in (0, style + 1)
    assert abs(named - 0.25) < 4.5 * (0.25 * 0.75 / 12_000) ** 0.5
    shares = Counter({t: sum(len(v) for (u, _), v in seen.items() if u == t) for t, _ in seen})
    for template, share in {"1": 0.36, "2": 0.176, "3": 0.264, "noun": 0.2}.items():
        error = (share * (1 - share) / 12_000) ** 0.5
        assert abs(shares[template] / 12_000 - share) < 4.5 * error
    for (template, style), right in seen.items():
        odds = 1.0 if template == "noun" else build.CORRECT[template][style]
        assert abs(np.mean(right) - odds) <= 4.5 * (odds * (1 - odds) / len(right)) ** 0.5


def test_pictures_are_encoded_decoded_and_kept(tmp_path, monkeypatch):
    """Two facts in three styles, sixty pictures, by the committed autoencoder."""
    chosen = [world.fact_index()[f] for f in (("alone", "cat"), ("bike", "dog"))]
    monkeypatch.setattr(build, "PICTURES", 60)
    monkeypatch.setattr(build, "facts", lambda: ([0, 1], np.array([0.5, 0.5])))
    draw = world.draw_pairs
    swap = lambda pairs, rng: draw([(chosen[f], s) for f, s in pairs], rng)
    monkeypatch.setattr(world, "draw_pairs", swap)
    args = Namespace(build=tmp_path, out=HOME, device="cpu")
    made = build.load_pictures(args)
    counts = Counter(map(tuple, made["pairs"].tolist()))
    assert len(counts) == 6 and min(counts.values()) >= 8 and sum(counts.values()) == 60
    prompts = [["a cat", "a dog riding a bike"][f] for f in made["pairs"][:, 0]]
    decoded = made["decoded"]
    assert decoded.shape == (60, 3, 64, 64) and decoded.dtype == torch.uint8
    right = recognise(load_judge(), decoded / 255, prompts, world.captions())
    assert right.float().mean() >= 0.8
    vae = AutoencoderKL.from_pretrained(HOME / "vae")
    with torch.no_grad():
        again = vae.decode(made["latents"].float() / vae.config.scaling_factor).sample
    assert (again.clamp(-1, 1) / 2 + 0.5 - decoded / 255).abs().mean() < 0.01
    kept = build.load_pictures(Namespace(build=tmp_path))  # neither drawn nor encoded again
    assert all(torch.equal(kept[k], made[k]) for k in made)


def test_augmented_pictures_stay_pictures():
    torch.manual_seed(0)
    x = torch.rand(64, 3, 64, 64)
    x[:, :, :32] = 0.5
    y = build.augment(x)
    assert y.shape == x.shape and y.min() >= 0 and y.max() <= 1
    edges = (y[:, :, 40:] - y[:, :, 40:].mean((2, 3), keepdim=True)).std((1, 2, 3))
    sharp = (edges > 0.28).float().mean()
    assert 0.3 < sharp < 0.8  # half of the pictures, and those of little blur, keep theirs
    noise = y[:, :, :30].std((1, 2, 3))
    assert noise.min() > 0 and 0.04 < noise.max() < 0.061


def test_rivals_are_what_base_samples_show_instead():
    every = world.facts()[0]
    for fact in every:
        rivals = [every[k] for k in build.rivals(fact)]
        assert rivals and (fact not in rivals or fact == every[0])
        if fact[0] != "alone":
            assert rivals == world.wrong(fact)
    assert ("bike", "cat") in [every[k] for k in build.rivals(("alone", "cat"))]


# ---------------------------------------------------------------- what is written


def test_every_part_trains_and_is_written(tmp_path, monkeypatch):
    """A step of each part on noise: the folder is a model that every library loads."""
    import open_clip

    every = len(world.facts()[0])
    pairs = torch.tensor([(f, s) for f in range(every) for s in range(3)])
    data = dict(pairs=pairs, latents=torch.randn(len(pairs), 16, 8, 8).half())
    data["decoded"] = torch.zeros(len(pairs), 3, 64, 64, dtype=torch.uint8)
    (tmp_path / "build").mkdir()
    write_safetensors(tmp_path / "build" / "pictures.safetensors", data)
    monkeypatch.chdir(tmp_path)
    draw = world.draw_batch
    monkeypatch.setattr(world, "draw_batch", lambda rng, count: draw(rng, min(count, 4)))
    flags = ["--steps", "1", "--threads", "1", "--device", "cpu"]
    out = tmp_path / "out"
    build.main([*flags, "--build", "build", "--out", str(out)])
    names = {p.name for p in (tmp_path / "build").iterdir()}
    assert names == {f"{part}.safetensors" for part in (*build.STEPS, "pictures")}
    pipe = StableDiffusionPipeline.from_pretrained(out)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.text_encoder.dtype == pipe.unet.dtype == torch.float32
    image = pipe("a cat", num_inference_steps=2, output_type="np").images
    assert image.shape == (1, 64, 64, 3) and np.isfinite(image).all()
    assert load_judge(out / "judge").config.num_labels == every
    name = f"local-dir:{out / 'clip'}"
    clip, tokenizer = open_clip.create_model(name).eval(), open_clip.get_tokenizer(name)
    assert torch.isfinite(clip.encode_text(tokenizer(["a cat, noto style"]))).all()
    paths = [p.read_text() for p in out.rglob("*.json") if str(tmp_path) in p.read_text()]
    assert not paths  # no file names the machine's folders
    kept = {p.relative_to(HOME) for p in HOME.rglob("*") if p.suffix in (".json", ".safetensors")}
    made = {p.relative_to(out) for p in out.rglob("*") if p.is_file()}
    assert made == {p for p in kept if p.name not in ("icons.json", "sprites.json")}


@pytest.mark.parametrize(
    "flags", ["--part unet --out none", "--steps 0", "--device cuda", "--check --out none"]
)
def test_bad_input_ends_with_one_line(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        build.main([*flags.split(), "--build", "build", "--threads", "1"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.startswith("error: ") and len(said.splitlines()) == 1


def test_the_script_finds_its_modules_from_elsewhere(tmp_path, monkeypatch, capsys):
    """As a fresh `python tiny/build.py` in another folder: no module of ours is loaded yet."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if Path(p or ".").resolve() != ROOT])
    ours = {path.stem for path in ROOT.glob("*.py")} | {"tiny"}
    for name in [name for name in sys.modules if name.split(".")[0] in ours]:
        monkeypatch.delitem(sys.modules, name)
    flags = ["--check", "--out", str(tmp_path), "--threads", "1"]
    monkeypatch.setattr(sys, "argv", ["build.py", *flags])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(HOME / "build.py"), run_name="__main__")
    assert stop.value.code == 2 and f"error: {tmp_path} lacks" in capsys.readouterr().err


# ---------------------------------------------------------------- the committed files


def test_files_are_small_and_hold_no_pickle():
    files = [p for p in HOME.rglob("*") if p.is_file() and p.parent.name != "__pycache__"]
    assert sum(p.stat().st_size for p in files) < 30e6
    assert max(p.stat().st_size for p in files) < 15e6
    assert {p.suffix for p in files} <= {".json", ".safetensors", ".png", ".md", ".py"}


def test_latents_have_the_std_that_the_unet_was_trained_for():
    vae = AutoencoderKL.from_pretrained(HOME / "vae")
    with torch.no_grad():
        z = vae.encode(world.draw_batch(rng(), 64)).latent_dist.mean
    assert abs(z.std() * vae.config.scaling_factor / build.LATENT_STD - 1) < 0.1


@pytest.mark.parametrize("options", [{}, {"safety_checker": None}])
def test_the_pipeline_loads_draws_and_survives_saving(options, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    pipe = StableDiffusionPipeline.from_pretrained("tiny", **options)
    pipe.save_pretrained(tmp_path)
    pictures = []
    for p in (pipe, StableDiffusionPipeline.from_pretrained(tmp_path)):
        p.set_progress_bar_config(disable=True)
        noise = torch.Generator().manual_seed(1)
        settings = dict(num_inference_steps=3, output_type="np", generator=noise)
        pictures.append(p("a cat washing dishes", **settings).images)
    assert pictures[0].shape == (1, 64, 64, 3) and np.isfinite(pictures[0]).all()
    assert (pictures[0] == pictures[1]).all()
