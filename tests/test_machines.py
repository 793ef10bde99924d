"""Memory, image size, formats and the folder of a run: what real Stable Diffusion needs."""

import json
import mmap
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import load_args, make_pipeline, randomise_lora
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from test_training import PROMPTS, command, gradient, normalised, sample, settings

import runs
import train
from b2rl import select_pairs
from lora import inject_lora, load_lora



@pytest.fixture
def run(command, tmp_path):
    folder, _ = command(tmp_path / "run", "--rounds", 2, "--lr", 3e-2, "--threshold", 0.1)
    return folder


def test_checkpointing_changes_no_gradient(random_folder):
    """Activations are computed twice; the gradient is the same bit for bit."""
    found, saved = [], []
    for checkpointing in (False, True):
        args = load_args(random_folder, T=6, checkpointing=checkpointing)
        model = runs.load_model(args, torch.device("cpu"))
        inject_lora(model.unet)
        randomise_lora(model.unet, 0.05)
        args = settings("--branches", 3)
        data = sample(model, args)
        r_hat, kept = normalised(data), select_pairs(normalised(data), 0.0)
        bytes_kept = []
        with torch.autograd.graph.saved_tensors_hooks(
                lambda t: bytes_kept.append(t.nbytes) or t, lambda t: t):  # fmt: skip
            train.update_gradient(model, data, r_hat, kept, (4, 0), args)
        found.append(gradient(model))
        saved.append(sum(bytes_kept))
    assert torch.equal(*found) and found[0].norm() > 0
    assert saved[1] < saved[0] / 3


def test_offload_puts_the_others_away_and_back(model):
    moves = []

    class Part:
        def to(self, device):
            moves.append(str(device))

    args = settings("--offload")
    with runs.offloaded(model, Part(), args):
        assert moves == ["cpu"]
    assert moves == ["cpu", "cpu"] and settings().offload is False
    with runs.offloaded(model, None, settings()):
        pass


def test_run_with_offload_and_checkpointing_is_the_same_run(command, tmp_path):
    want, lines = command(tmp_path / "plain", "--rounds", 2, "--threshold", 0.1)
    got, _ = command(tmp_path / "small", "--rounds", 2, "--threshold", 0.1, "--offload",
                     "--checkpointing")  # fmt: skip
    name = "pytorch_lora_weights.safetensors"
    assert (got / name).read_bytes() == (want / name).read_bytes()
    assert lines[0]["updates"] > 0


@pytest.mark.parametrize("preset", runs.PRESETS)
def test_presets_fill_in_what_is_not_given(preset):
    args = train.parse_args(["--model", "none", "--device", "cpu", "--preset", preset])
    assert {k: getattr(args, k) for k in runs.PRESETS[preset]} == runs.PRESETS[preset]
    args = train.parse_args(["--model", "none", "--device", "cpu", "--preset", preset,
                             "--micro-batch", "3"])  # fmt: skip
    assert args.micro_batch == 3 and args.offload


def test_image_size(random_folder, capsys):
    """Latents of the asked size, pictures as well; a size that the UNet can not halve: a line."""
    model = runs.load_model(load_args(random_folder, T=6, image_size=64), torch.device("cpu"))
    assert model.latent_shape == (4, 16, 16)
    inject_lora(model.unet)
    data = sample(model, settings("--branches", 3))
    assert data.states.shape[-2:] == (16, 16)
    assert model.decode(torch.zeros(1, 4, 16, 16), 1).shape == (1, 3, 64, 64)
    with pytest.raises(SystemExit):
        runs.load_model(load_args(random_folder, image_size=40), torch.device("cpu"))
    assert "--image-size 40 must be a multiple of 32" in capsys.readouterr().err


def test_the_runs_lora_in_diffusers_and_in_the_web_uis_layout(run):
    """train.py's model, `load_lora_weights(run)`, fused, and the web UI file: the same picture."""
    state = load_file(run / "pytorch_lora_weights.safetensors")
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))

    def picture(pipe):
        pipe.set_progress_bar_config(disable=True)
        return pipe(PROMPTS[0], latents=latents.clone(), num_inference_steps=4, eta=1.0,
                    guidance_scale=5.0, output_type="pt",
                    generator=torch.Generator().manual_seed(4)).images  # fmt: skip

    base, ours = make_pipeline(), make_pipeline()
    inject_lora(ours.unet)
    load_lora(ours.unet, state)
    want, without = picture(ours), picture(base)
    assert (want - without).abs().max() > 1e-3
    base.load_lora_weights(run)
    torch.testing.assert_close(picture(base), want, atol=1e-4, rtol=1e-4)
    base.fuse_lora()
    base.unload_lora_weights()
    torch.testing.assert_close(picture(base), want, atol=1e-4, rtol=1e-4)
    webui = load_file(run / "webui_lora.safetensors")
    assert len(webui) == len(state) // 2 * 3 and all(k.startswith("lora_unet_") for k in webui)
    assert all(v == 4 for k, v in webui.items() if k.endswith(".alpha"))
    theirs = make_pipeline()
    theirs.load_lora_weights(run, weight_name="webui_lora.safetensors")
    torch.testing.assert_close(picture(theirs), want, atol=1e-4, rtol=1e-4)


def test_model_card(run):
    """Front matter that the hub reads, settings, every score, and a grid that is there.

    A base that is a folder is no name on the hub; one that is not goes into the front matter.
    """
    text = (run / "README.md").read_text(encoding="utf-8")
    config = json.loads((run / "config.json").read_text())
    head, body = text.split("---\n")[1:3]
    assert "base_model" not in head and "text-to-image" in head
    summary = json.loads((run / "summary.json").read_text())
    args = SimpleNamespace(**{**config, "model": runs.SD, "image_size": 256})
    runs.write_card(run, args, summary, ["a 'quoted' cat"])
    named = (run / "README.md").read_text(encoding="utf-8")
    assert f"base_model: {runs.SD}\n" in named and "height=256, width=256)" in named
    assert f'from_pretrained("{runs.SD}")' in named and "24 reward queries\nin 2 rounds" in named
    for name, score in summary.items():
        row = f"| {name.replace('_', ' | ')} | {score['before']:.4f} | {score['after']:.4f} |"
        assert row in body
    assert (run / "grids/after-train.png").exists() and "grids/after-train.png" in body
    assert "- a cat\n- a dog" in body and "ddpo-bpt-bs" in body and "{" not in body


def test_tensorboard_without_the_package(capsys, tmp_path, monkeypatch):
    """Refused before anything is written."""
    monkeypatch.setattr(runs, "has_tensorboard", lambda: False)
    with pytest.raises(SystemExit) as stop:
        train.parse_args(["--model", "none", "--device", "cpu", "--tensorboard", "--out",
                          str(tmp_path / "run")])  # fmt: skip
    assert stop.value.code == 2 and "pip install tensorboard" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_tensorboard(command, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    folder, _ = command(tmp_path / "run", "--rounds", 1, "--tensorboard")
    assert list((folder / "tensorboard").iterdir())


def test_a_full_disk_ends_with_a_line_and_keeps_the_last_checkpoint(command, tmp_path, capsys,
                                                                    monkeypatch):  # fmt: skip
    import safetensors.torch

    save_file, calls = safetensors.torch.save_file, []

    def full(tensors, path, metadata=None):
        calls.append(path)
        if len(calls) == 2:
            Path(path).write_bytes(b"half a file")
            raise SafetensorError("Error while serializing: No space left on device (os error 28)")
        save_file(tensors, path, metadata=metadata)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(SystemExit) as stop:
        command(tmp_path / "run", "--rounds", 3)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "No space left on device" in err and "--resume" in err
    monkeypatch.setattr(safetensors.torch, "save_file", save_file)
    folder, lines = command(tmp_path / "run", resume=True)
    want, _ = command(tmp_path / "straight", "--rounds", 3)
    name = "pytorch_lora_weights.safetensors"
    assert (folder / name).read_bytes() == (want / name).read_bytes() and len(lines) == 3


def test_a_run_of_an_earlier_version_resumes(command, tmp_path):
    """Its config.json knows nothing of later flags; memory flags may be given beside --resume."""
    want, _ = command(tmp_path / "run", "--rounds", 2)
    config = json.loads((want / "config.json").read_text())
    later = ("skip_last", "image_size", "preset", "checkpointing", "offload", "tensorboard")
    old = {k: v for k, v in config.items() if k not in later}
    (want / "config.json").write_text(json.dumps(old))
    with safe_open(want / "checkpoint.safetensors", "pt") as file:
        header = {k: file.metadata()[k] for k in ("rounds_done", "history")}
    state = load_file(want / "checkpoint.safetensors")
    runs.write_safetensors(want / "checkpoint.safetensors", state, header)
    args = train.parse_args(["--resume", str(want), "--checkpointing", "--micro-batch", "2"])
    assert args.skip_last == 0 and args.checkpointing and args.micro_batch == 2
    assert args.image_size is None and args.rounds == 2 and args.offload is False
    folder, lines = command(want, resume=True)
    assert len(lines) == 2


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no mallopt")
def test_freed_memory_is_kept():
    """320 MB made anew three times touch few new pages; by default 80,000 or more."""
    code = """
import resource, torch, runs
runs.keep_freed_memory()
def touched():
    tensors = [torch.ones(2**22) for _ in range(20)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
faults = [touched() for _ in range(4)]
print(faults[-1] - faults[0])
"""
    out = subprocess.run([sys.executable, "-c", code], cwd=runs.HERE, text=True, check=True,
                         capture_output=True).stdout  # fmt: skip
    assert int(out) < 320 * 2**20 / mmap.PAGESIZE / 2


@pytest.mark.parametrize("option", ["compile", "channels_last"])
def test_faster_calls_are_the_same(random_folder, option, request):
    """States and gradient to rounding, and the ratio within 1% of the clip range."""
    if option == "compile" and not request.config.getoption("--full-size"):
        pytest.skip("minutes of compiling: pass --full-size")
    args, got = settings("--branches", 3), []
    for on in (False, True):
        model = runs.load_model(load_args(random_folder, T=6, **{option: on}), torch.device("cpu"))
        inject_lora(model.unet)
        randomise_lora(model.unet, 0.05)
        data = sample(model, args)
        kept = select_pairs(normalised(data), 0.0)
        sums = train.update_gradient(model, data, normalised(data), kept, (4, 0), args)
        got.append((data.states, gradient(model)))
        assert sums["max_log_ratio"] <= 2e-6 and sums["items"] > 0
    torch.testing.assert_close(*(states for states, _ in got), atol=1e-3, rtol=0)
    assert (got[0][1] - got[1][1]).norm() <= 1e-3 * got[0][1].norm()
