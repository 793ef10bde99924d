"""Stable Diffusion in, pictures out: loading, embedding, pictures, and models that are refused.

    pytest tests/test_pipeline.py --full-size -s     # about 16 GB of memory, minutes

The last test is of Stable Diffusion 1.4 and ViT-H-14 at full size, with random weights, on the
CPU. No download: the architecture, the sizes and the dtypes are the true ones, the pictures noise.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, load_args, make_pipeline, make_small, randomise_lora, random_sd14
from safetensors.torch import load_file, save_file

from ddim_logprob import keyed_generator
from lora import inject_lora, lora_off, lora_state, webui_state
from support import pipeline as pipeline_file
from support.command import Stop
from support.pipeline import check_model_flags, load_diffusers, load_pipeline, tiny_folder

CPU = torch.device("cpu")
UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
SCHEDULER = "scheduler/scheduler_config.json"


@pytest.fixture(scope="module")
def small():
    """The random pipeline, T 6; no test changes its weights."""
    return make_small(decode_batch=2)


def noise(shape, *key):
    return torch.randn(shape, generator=keyed_generator(*key))


def load(folder, **more):
    return load_pipeline(load_args(folder, T=6, **more), CPU)


@torch.no_grad()
def predict(unet):
    x, text = noise((2, 4, 8, 8), "x"), noise((2, 12, 32), "text")
    return unet(x, torch.tensor([500, 3]), text).sample


def refused(capfd, call, *parts):
    """`call` exits with 2; its one line on stderr, which holds all `parts`, is returned."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        call()
    lines = [line for line in capfd.readouterr().err.splitlines() if line and "%|" not in line]
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    assert all(str(part) in lines[0] for part in parts), lines[0]
    return lines[0]


# ---------------------------------------------------------------- embedding


def test_a_prompt_is_encoded_once_a_run(small, monkeypatch):
    encoded, real = [], small.pipe.encode_prompt

    def record(prompt, *rest):
        encoded.append(prompt)
        return real(prompt, *rest)

    monkeypatch.setattr(small.pipe, "encode_prompt", record)
    monkeypatch.setattr(small, "cache", {})
    first = small.embed(["a cat", "", "a cat", "a dog"])
    again = small.embed(["a dog", "a cat"])
    assert encoded == ["a cat", "", "a dog"] and first.shape == (4, 12, 32)
    assert torch.equal(first[0], first[2]) and not torch.equal(first[0], first[1])
    assert torch.equal(again, first[[3, 0]]) and not again.requires_grad
    assert torch.equal(first[3], real("a dog", CPU, 1, False)[0][0]), (
        "the prompt, not the empty one"
    )


def test_a_prompt_that_is_too_long_is_told_once(small, capfd):
    """Ten letters fit between the two marks; what follows changes nothing."""
    text = small.embed(["abcdefghijklm", "abcdefghijxy", "abcdefghijk", "abcdefghij"])
    assert torch.equal(text[0], text[1]) and not torch.equal(text[2], text[3])
    small.embed(["abcdefghijklm"])
    captured = capfd.readouterr()
    told = [line.split("'")[1] for line in captured.out.splitlines()]
    assert told == ["abcdefghijklm", "abcdefghijxy", "abcdefghijk"]
    assert all(line.startswith("The text encoder cuts off") for line in captured.out.splitlines())


# ---------------------------------------------------------------- pictures


def test_pictures_are_the_pipelines():
    """Latents are divided by the VAE's scale, pictures moved from [-1, 1] to [0, 1] and cut off."""
    small, latents = make_small(), 3 * noise((5, 4, 8, 8), "x")
    vae = small.pipe.vae
    vae.register_to_config(scaling_factor=0.5)
    with torch.no_grad():
        decoded = vae.decode(2 * latents).sample
    expected = small.pipe.image_processor.postprocess(decoded, output_type="pt")
    got = small.decode(latents)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    assert expected.std() > 0.01 and got.min() >= 0 and got.max() <= 1
    assert got.dtype == torch.float32 and not got.requires_grad
    far = small.decode(300 * latents)
    assert far.min() == 0 or far.max() == 1, "what lies outside is cut off"


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("bad", [[0], [1, 3], [0, 1, 2, 3]])
def test_latents_that_are_no_numbers_stop_the_run(small, wrong, bad):
    """One number of a latent is enough; they are counted, and never decoded."""
    latents = noise((4, 4, 8, 8), "x")
    latents[bad, 1, 2, 3] = wrong
    with pytest.raises(Stop, match=rf"^{len(bad)} of 4 latents are not finite.*--precision"):
        small.decode(latents)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("bad", [[2], [0, 1, 2]])
def test_pictures_that_are_no_numbers_stop_the_run(small, wrong, bad):
    """A VAE that overflows: a black picture would be scored, and jpeg ranks it best."""

    def overflow(module, inputs, out):
        out = out.clone()
        out[bad, 0, 5, 5] = wrong
        return out

    hook = small.pipe.vae.decoder.register_forward_hook(overflow)
    try:
        with pytest.raises(Stop, match=rf"^{len(bad)} of 3 pictures are not finite.*--precision"):
            small.decode(noise((3, 4, 8, 8), "x"))
    finally:
        hook.remove()


def test_a_vae_that_overflows_in_half_precision(random_folder, tmp_path):
    """Its last layers grow beyond 65,504: fine in float32, refused in float16, bfloat16 holds."""

    def louder(weights):
        for name in ("decoder.conv_norm_out.weight", "decoder.conv_norm_out.bias"):
            weights[name] = weights[name] + 3e4

    folder = edited(random_folder, tmp_path, {VAE: louder})
    latents = noise((2, 4, 8, 8), "x")
    for precision in ("fp32", "bf16"):
        assert load(folder, precision=precision).decode(latents).isfinite().all()
    with pytest.raises(Stop, match="2 of 2 pictures are not finite: the VAE overflows.*bf16"):
        load(folder, precision="fp16").decode(latents)


def test_nothing_to_decode(small):
    with pytest.raises(Stop, match="1 of 1"):
        pipeline_file.require_finite(torch.tensor([[1.0, float("nan")]]), "values", "why")
    pipeline_file.require_finite(torch.zeros(0, 4), "values", "why")
    pipeline_file.require_finite(torch.full((2, 4), 3e38), "values", "why")


def test_the_others_move_and_the_unet_stays():
    moved = []

    class Part:
        def __init__(self, name):
            self.name = name

        def to(self, device):
            moved.append((self.name, device))

    names = ("vae", "text_encoder", "unet")
    parts = SimpleNamespace(**{name: Part(name) for name in names})
    kept = pipeline_file.Pipeline(parts, CPU, (4, 8, 8))
    kept.move_others(Part("reward"), "cpu")
    assert not moved, "without --offload nothing moves"
    kept.offload = True
    kept.move_others(Part("reward"), "cpu")
    assert moved == [("vae", "cpu"), ("text_encoder", "cpu"), ("reward", "cpu")]


# ---------------------------------------------------------------- loading


def edited(random_folder, tmp_path, edits, name="model"):
    """A copy of the random folder; edits: file -> what changes its weights or its JSON in place."""
    folder = tmp_path / name
    shutil.copytree(random_folder, folder)
    for file, edit in edits.items():
        path = folder / file
        if path.suffix == ".json":
            data = json.loads(path.read_text())
            path.write_text(json.dumps(edit(data) or data))
        else:
            weights = load_file(path)
            path.unlink()  # the tensors are mapped from it
            weights = {k: v.clone() for k, v in weights.items()}
            edit(weights)
            save_file(weights, path)
    return folder


def config_of(**changes):
    """An edit of a JSON file: these values; None takes a key away."""

    def edit(data):
        data |= changes
        return {k: v for k, v in data.items() if v is not None}

    return edit


def scheduler_of(name, **config):
    """Edits that put another scheduler in, with its own file."""
    index = lambda data: data.update(scheduler=["diffusers", name])
    return {SCHEDULER: lambda data: {"_class_name": name, **config}, "model_index.json": index}


BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


@pytest.mark.filterwarnings("ignore:The configuration file of this scheduler")
@pytest.mark.parametrize(
    "name, more",
    [
        ("PNDMScheduler", dict(set_alpha_to_one=True, steps_offset=0, timestep_spacing="linspace")),
        ("PNDMScheduler", dict(clip_sample=True, thresholding=True, skip_prk_steps=True)),
        ("EulerDiscreteScheduler", dict(timestep_spacing="trailing")),
        ("DPMSolverMultistepScheduler", dict(thresholding=True, solver_order=2)),
        ("DDPMScheduler", dict(clip_sample=True, variance_type="fixed_small")),
    ],
)
def test_the_scheduler_is_ddim_whatever_the_old_one_was(random_folder, tmp_path, name, more):
    """No clipping, sigma above 0 at each step, SD's spacing, the old one's betas."""
    loaded = load(edited(random_folder, tmp_path, scheduler_of(name, **BETAS, **more)))
    config, want = loaded.pipe.scheduler.config, make_small(6).policy.schedule
    assert type(loaded.pipe.scheduler).__name__ == "DDIMScheduler"
    assert not config.clip_sample and not config.thresholding
    schedule = loaded.policy.schedule
    assert torch.equal(schedule.timestep, want.timestep) and want.timestep[1] == 1
    torch.testing.assert_close(schedule.alpha_bar, want.alpha_bar)
    torch.testing.assert_close(schedule.sigma, want.sigma)
    assert schedule.sigma[1:].min() > 0 and loaded.pipe.safety_checker is None


def test_the_betas_are_the_models_own(random_folder, tmp_path):
    """Another range; and a list of betas instead of a range."""
    other = BETAS | {"beta_end": 0.02}
    loaded = load(edited(random_folder, tmp_path, {SCHEDULER: config_of(**other)}, "other"))
    betas = torch.linspace(0.00085**0.5, 0.02**0.5, 1000).square()
    alpha_bar = (1 - betas.double()).cumprod(0)[loaded.policy.schedule.timestep[1:]]
    torch.testing.assert_close(loaded.policy.schedule.alpha_bar[1:], alpha_bar, rtol=1e-4, atol=0)
    trained = config_of(trained_betas=betas.tolist(), beta_start=None, beta_end=None)
    listed = load(edited(random_folder, tmp_path, {SCHEDULER: trained}, "listed"))
    got = listed.policy.schedule.alpha_bar[1:]
    torch.testing.assert_close(got, alpha_bar, rtol=1e-4, atol=0)


FLOW = "FlowMatchEulerDiscreteScheduler"


@pytest.mark.filterwarnings("ignore:The configuration file of this scheduler")
@pytest.mark.parametrize(
    "edits, parts",
    [
        (scheduler_of(FLOW, num_train_timesteps=1000, shift=3.0), [FLOW, "betas"]),
        (scheduler_of("FlowMatchHeunDiscreteScheduler"), ["FlowMatchHeun", "betas"]),
        (scheduler_of("EDMEulerScheduler", sigma_min=0.002), ["EDMEulerScheduler", "betas"]),
        (scheduler_of("DDIMScheduler", num_train_timesteps=1000), ["DDIMScheduler", "betas"]),
        (
            scheduler_of("UniPCMultistepScheduler", **BETAS, prediction_type="flow_prediction"),
            ["flow_prediction"],
        ),
        (scheduler_of("DDIMScheduler", **BETAS, prediction_type="sample"), ["sample"]),
        (scheduler_of("NoSuchScheduler", **BETAS), ["NoSuchScheduler"]),
        ({SCHEDULER: lambda data: ["a list"]}, ["cannot load"]),
    ],
)
def test_schedulers_that_ddim_can_not_stand_in_for(capfd, random_folder, tmp_path, edits, parts):
    """By name: without betas of its own a schedule would be made up that no checkpoint had."""
    folder = edited(random_folder, tmp_path, edits)
    refused(capfd, lambda: load(folder), folder, *parts)


@pytest.mark.parametrize(
    "name, library", [("DPMSolverSDEScheduler", "torchsde"), ("LMSDiscreteScheduler", "scipy")]
)
def test_a_scheduler_that_needs_a_library_names_it(capfd, random_folder, tmp_path, name, library):
    if importlib.util.find_spec(library):
        pytest.skip(f"{library} is there, so the model loads")
    folder = edited(random_folder, tmp_path, scheduler_of(name, **BETAS))
    refused(capfd, lambda: load(folder), f"cannot load {folder}", name, library)


def lacking(*words):
    """An edit that takes away each weight whose name has one of the words."""
    return lambda w: [w.pop(k) for k in list(w) if any(word in k for word in words)]


@pytest.mark.parametrize(
    "part, file, name",
    [
        ("unet", UNET, "conv_out.weight"),
        ("unet", UNET, "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"),
        ("vae", VAE, "post_quant_conv.bias"),
        ("vae", VAE, "decoder.mid_block.resnets.0.conv1.weight"),
        ("text_encoder", TEXT, "final_layer_norm.weight"),
        ("text_encoder", TEXT, "layers.0.mlp.fc1.bias"),
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_missing_weights_are_named(capfd, random_folder, tmp_path, part, file, name, precision):
    """One is enough; not filled at random, differently each time."""
    folder = edited(random_folder, tmp_path, {file: lacking(name)})
    line = refused(capfd, lambda: load(folder, precision=precision), folder, f"the {part} lacks 1")
    assert name in line


def test_many_missing_weights_are_counted(capfd, random_folder, tmp_path):
    folder = edited(random_folder, tmp_path, {UNET: lacking("conv_out.", "conv_in.")})
    refused(capfd, lambda: load(folder), "the unet lacks 4 weights, conv_in.bias is the first")
    folder = edited(random_folder, tmp_path, {TEXT: lambda w: w.clear()}, "empty")
    refused(capfd, lambda: load(folder), "text_encoder")


def test_weights_too_many_do_no_harm(random_folder, tmp_path, capfd):
    """As old text encoders have position_ids."""
    more = lambda w: w.update({"text_model.embeddings.position_ids": torch.arange(12)[None]})
    loaded = load(edited(random_folder, tmp_path, {TEXT: more}))
    want = load(random_folder)
    assert torch.equal(loaded.embed(["a cat"]), want.embed(["a cat"]))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("file", [UNET, VAE, TEXT])
def test_weights_of_another_shape(capfd, random_folder, tmp_path, file):
    def widen(weights):
        name = max(weights)
        weights[name] = torch.cat([weights[name], weights[name]])

    folder = edited(random_folder, tmp_path, {file: widen})
    refused(capfd, lambda: load(folder), f"cannot load {folder}")


def halve(folder, *files):
    """Leave only the fp16 variant of these files."""
    for file in files:
        weights = {
            k: v.half() if v.is_floating_point() else v.clone()
            for k, v in load_file(folder / file).items()
        }
        (folder / file).unlink()
        save_file(weights, folder / file.replace(".safetensors", ".fp16.safetensors"))


@pytest.mark.parametrize("files", [(UNET, VAE, TEXT), (UNET,), (VAE, TEXT)])
def test_the_fp16_variant_alone_loads(random_folder, tmp_path, files):
    folder = edited(random_folder, tmp_path, {})
    halve(folder, *files)
    loaded, want = load(folder), load(random_folder)
    for part in ("unet", "vae", "text_encoder"):
        ours, theirs = getattr(loaded.pipe, part), getattr(want.pipe, part)
        assert ours.dtype == torch.float32, "as --precision says"
        for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters()):
            torch.testing.assert_close(a, b, atol=2e-3, rtol=2e-3, msg=name)


def test_the_flags_of_a_model_reach_it(random_folder):
    more = dict(guidance=3.0, sample_batch=5, decode_batch=7, eta=0.5)
    loaded = load(random_folder, **more)
    policy = loaded.policy
    assert (policy.guidance, policy.sample_batch, loaded.decode_batch) == (3.0, 5, 7)
    torch.testing.assert_close(policy.schedule.sigma, 0.5 * make_small(6).policy.schedule.sigma)
    assert loaded.tiny is None and policy.schedule.prediction_type == "epsilon"
    assert not loaded.offload and load(random_folder, offload=True).offload
    for network in (policy.unet, loaded.pipe.vae, loaded.pipe.text_encoder):
        assert not network.training and not any(p.requires_grad for p in network.parameters())
    loaded = load(random_folder, prediction_type="v_prediction", checkpointing=True)
    assert loaded.policy.schedule.prediction_type == "v_prediction"
    assert (
        loaded.policy.unet.is_gradient_checkpointing and not policy.unet.is_gradient_checkpointing
    )


@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_precision_is_that_of_the_frozen_weights(random_folder, precision, dtype):
    """Latents and log p are float32 in each."""
    loaded = load(random_folder, precision=precision)
    policy = loaded.policy
    assert policy.unet.dtype == loaded.pipe.vae.dtype == loaded.embed(["a"]).dtype == dtype
    x, log_p = policy.branch(policy.noise([("x",)]), 2, 0, ["a cat"], [[("k",)]])
    assert x.dtype == log_p.dtype == loaded.decode(x[:, 0, -1]).dtype == torch.float32


def walk_and_decode(loaded):
    """Shapes of the states x_2..x_0 of two roots, and of their pictures."""
    policy = loaded.policy
    x, _ = policy.branch(policy.noise([(0,), (1,)]), 2, 0, ["a", "b"], [[("k", p)] for p in (0, 1)])
    return tuple(x.shape), tuple(loaded.decode(x[:, 0, -1]).shape)


def test_image_size(random_folder, capfd):
    """Latents of the asked size, pictures as well; a size that the UNet can not halve: a line."""
    loaded = load(random_folder, image_size=64)
    assert loaded.latent_shape == loaded.policy.latent_shape == (4, 16, 16)
    assert walk_and_decode(loaded) == ((2, 1, 3, 4, 16, 16), (2, 3, 64, 64))
    wanted = "--image-size 40 must be a multiple of 32"
    refused(capfd, lambda: load(random_folder, image_size=40), wanted)


@pytest.mark.parametrize("size", [[8, 16], [16, 8]])
def test_a_model_that_is_not_square(random_folder, tmp_path, size):
    """sample_size is [height, width]; --image-size makes it square."""
    folder = edited(random_folder, tmp_path, {"unet/config.json": config_of(sample_size=size)})
    loaded = load(folder)
    assert loaded.latent_shape == (4, *size)
    pictures = (2, 3, 4 * size[0], 4 * size[1])
    assert walk_and_decode(loaded) == ((2, 1, 3, 4, *size), pictures)
    assert load(folder, image_size=64).latent_shape == (4, 16, 16)


def test_the_tiny_models_folder(tmp_path):
    """By name or as a copy of it; a folder without the judge is another model's."""
    assert tiny_folder("tiny") == ROOT / "tiny" and tiny_folder("no/such/model") is None
    (tmp_path / "copy" / "judge").mkdir(parents=True)
    assert tiny_folder(str(tmp_path / "copy")) == tmp_path / "copy"
    assert tiny_folder(str(tmp_path)) is None and tiny_folder("x" * 5000) is None


@pytest.mark.parametrize("terminal", [True, False])
def test_the_bars_of_a_download_stay_on_a_terminal(random_folder, monkeypatch, terminal):
    """Gigabytes may arrive; in a log file the bars would be noise."""
    import diffusers
    import transformers

    silenced = []
    for library in (diffusers, transformers):
        silence = lambda name=library.__name__: silenced.append(name)
        monkeypatch.setattr(library.utils.logging, "disable_progress_bar", silence)
    screen = SimpleNamespace(isatty=lambda: terminal, write=lambda text: None, flush=lambda: None)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", screen)
        load_diffusers(str(random_folder))
    assert silenced == ([] if terminal else ["diffusers", "transformers"])


def test_freed_memory_is_kept_where_the_library_can(monkeypatch):
    """Both thresholds are raised, the second one to what an older library takes; else nothing."""
    calls = []

    def mallopt(name, value):
        calls.append((name, value))
        return value < 2**30  # an older library refuses more

    library = SimpleNamespace(mallopt=mallopt)
    monkeypatch.setattr(pipeline_file.ctypes, "CDLL", lambda name: library)
    pipeline_file.keep_freed_memory()
    assert calls == [(-1, 2**31 - 1), (-3, 2**30), (-3, 2**25)]
    monkeypatch.setattr(pipeline_file.ctypes, "CDLL", lambda name: object())  # no such function
    pipeline_file.keep_freed_memory()


# ---------------------------------------------------------------- one file


def renamed(name, *rules):
    for old, new in rules:
        name = name.replace(old, new)
    return name


def original_unet(name):
    """A weight of the random UNet under the name that Stable Diffusion's own code gave it."""
    name = renamed(
        name,
        ("conv_in.", "input_blocks.0.0."),
        ("down_blocks.0.resnets.0.", "input_blocks.1.0."),
        ("down_blocks.0.attentions.0.", "input_blocks.1.1."),
        ("down_blocks.0.downsamplers.0.conv.", "input_blocks.2.0.op."),
        ("down_blocks.1.resnets.0.", "input_blocks.3.0."),
        ("mid_block.resnets.0.", "middle_block.0."),
        ("mid_block.attentions.0.", "middle_block.1."),
        ("mid_block.resnets.1.", "middle_block.2."),
        ("up_blocks.0.resnets.", "output_blocks.R."),
        ("up_blocks.0.upsamplers.0.conv.", "output_blocks.1.1.conv."),
        ("up_blocks.1.resnets.0.", "output_blocks.2.0."),
        ("up_blocks.1.resnets.1.", "output_blocks.3.0."),
        ("up_blocks.1.attentions.0.", "output_blocks.2.1."),
        ("up_blocks.1.attentions.1.", "output_blocks.3.1."),
        ("output_blocks.R.0.", "output_blocks.0.0."),
        ("output_blocks.R.1.", "output_blocks.1.0."),
        ("conv_norm_out.", "out.0."),
        ("conv_out.", "out.2."),
        ("time_embedding.linear_1.", "time_embed.0."),
        ("time_embedding.linear_2.", "time_embed.2."),
        ("time_emb_proj.", "emb_layers.1."),
        ("conv_shortcut.", "skip_connection."),
    )
    if "transformer_blocks" not in name and ".norm." not in name:
        resnet = (("norm1.", "in_layers.0."), ("conv1.", "in_layers.2."))
        resnet += (("norm2.", "out_layers.0."), ("conv2.", "out_layers.3."))
        name = renamed(name, *resnet)
    return f"model.diffusion_model.{name}"


def original_vae(name):
    rules = [(f"up_blocks.{i}.resnets.", f"up.{2 - i}.block.") for i in range(3)]
    rules += [(f"up_blocks.{i}.upsamplers.0.", f"up.{2 - i}.upsample.") for i in range(3)]
    rules += [(f"down_blocks.{i}.resnets.", f"down.{i}.block.") for i in range(3)]
    rules += [(f"down_blocks.{i}.downsamplers.0.", f"down.{i}.downsample.") for i in range(3)]
    rules += [("mid_block.resnets.0.", "mid.block_1."), ("mid_block.resnets.1.", "mid.block_2.")]
    rules += [("mid_block.attentions.0.", "mid.attn_1."), ("group_norm.", "norm.")]
    rules += [("to_q.", "q."), ("to_k.", "k."), ("to_v.", "v."), ("to_out.0.", "proj_out.")]
    rules += [("conv_norm_out.", "norm_out."), ("conv_shortcut.", "nin_shortcut.")]
    return f"first_stage_model.{renamed(name, *rules)}"


def original_file(folder, path, edit=lambda weights: None):
    """The model of a diffusers folder as one file, as Stable Diffusion was published."""
    weights = {original_unet(k): v for k, v in load_file(folder / UNET).items()}
    for name, value in load_file(folder / VAE).items():
        name = original_vae(name)
        square = "mid.attn_1" in name and value.ndim == 2  # a 1x1 convolution there
        weights[name] = value[:, :, None, None] if square else value
    for name, value in load_file(folder / TEXT).items():
        name = "text_model." + name.removeprefix("text_model.")  # transformers 5 leaves it out
        weights[f"cond_stage_model.transformer.{name}"] = value
    edit(weights)
    save_file({k: v.contiguous() for k, v in weights.items()}, path)
    return path


def test_one_file_with_a_folder_of_configs_loads_offline(random_folder, tmp_path):
    """The same UNet, text and pictures as the folder that it was made of."""
    path = original_file(random_folder, tmp_path / "model.safetensors")
    loaded = load(path, model_config=str(random_folder))
    want = load(random_folder)
    assert torch.equal(predict(loaded.policy.unet), predict(want.policy.unet))
    assert torch.equal(loaded.embed(["a cat"]), want.embed(["a cat"]))
    x = noise((2, 4, 8, 8), "x")
    torch.testing.assert_close(loaded.decode(x), want.decode(x))
    assert torch.equal(loaded.policy.schedule.alpha_bar, want.policy.schedule.alpha_bar)


def test_one_file_without_configs_says_how_to_name_them(capfd, random_folder, tmp_path):
    path = original_file(random_folder, tmp_path / "model.safetensors")
    refused(capfd, lambda: load(path), f"cannot load {path}", "--model-config FOLDER")


PREFIXES = ["model.diffusion_model.", "first_stage_model.", "cond_stage_model."]
PREFIXES += ["model.diffusion_model.out.2.", "first_stage_model.decoder.conv_in."]
PREFIXES.append("cond_stage_model.transformer.text_model.final_layer")


@pytest.mark.parametrize("prefix", PREFIXES)
def test_one_file_that_lacks_weights_is_refused(capfd, random_folder, tmp_path, prefix):
    """A network that is not there, or one of its layers."""
    path = tmp_path / "model.safetensors"
    original_file(random_folder, path, lacking(prefix))
    refused(capfd, lambda: load(path, model_config=str(random_folder)), f"{path}")


# ---------------------------------------------------------------- a LoRA in the base


def lora_file(path, layout=dict, **more):
    """A LoRA of the random UNet as a file; returns what the UNet with it predicts."""
    unet = make_pipeline().unet
    inject_lora(unet, **more)
    randomise_lora(unet, 0.05)
    save_file({k: v.contiguous() for k, v in layout(lora_state(unet)).items()}, path)
    return predict(unet)


@pytest.mark.parametrize("layout", [dict, webui_state])
def test_a_base_lora_is_part_of_the_frozen_weights(random_folder, tmp_path, layout):
    """Of diffusers or of web UIs. p_pre, our LoRA switched off, is base + that LoRA; ours adds."""
    path = tmp_path / "base.safetensors"
    want = lora_file(path, layout, rank=3, targets=("to_q", "to_v", "ff.net.2"))
    loaded, base = load(random_folder, base_lora=str(path)), load(random_folder)
    unet = loaded.policy.unet
    torch.testing.assert_close(predict(unet), want, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(predict(base.policy.unet), want, atol=1e-3)
    names = [name for name, _ in base.policy.unet.named_parameters()]
    assert [name for name, _ in unet.named_parameters()] == names, "nothing of it stays apart"
    fused = predict(unet)
    inject_lora(unet)
    assert torch.equal(predict(unet), fused)
    randomise_lora(unet, 0.05)
    assert not torch.allclose(predict(unet), fused, atol=1e-3)
    with lora_off(unet):
        assert torch.equal(predict(unet), fused)


def test_a_base_lora_by_the_folder_of_a_run(random_folder, tmp_path):
    want = lora_file(tmp_path / "pytorch_lora_weights.safetensors")
    loaded = load(random_folder, base_lora=str(tmp_path))
    torch.testing.assert_close(predict(loaded.policy.unet), want, atol=1e-4, rtol=1e-4)


def text_file(path):
    path.write_text("no LoRA")


def of_another_model(path):
    save_file({f"unet.conv_in.lora_{h}.weight": torch.zeros(3, 3) for h in "AB"}, path)


def of_another_size(path):
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_{}.weight"
    save_file({name.format("A"): torch.zeros(4, 320), name.format("B"): torch.zeros(320, 4)}, path)


def no_lora_at_all(path):
    save_file({"conv_in.weight": torch.zeros(3, 3)}, path)


@pytest.mark.parametrize(
    "make", [text_file, of_another_model, of_another_size, no_lora_at_all, lambda path: None]
)
def test_a_base_lora_that_can_not_be_read_is_named(capfd, random_folder, tmp_path, make):
    path = tmp_path / "base.safetensors"
    make(path)
    call = lambda: load(random_folder, base_lora=str(path))
    refused(capfd, call, f"cannot read --base-lora {path}")


# ---------------------------------------------------------------- models that are refused


@pytest.mark.parametrize(
    "family", ["StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline"]
)
def test_other_families_are_refused_by_name(capfd, tmp_path, family):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": family}))
    refused(capfd, lambda: load(tmp_path), family, "only Stable Diffusion 1.x and 2.x")


@pytest.mark.parametrize(
    "model, parts",
    [
        ("no/such-model", ["cannot load no/such-model", "hub", "--model tiny"]),
        ("no/such/folder", ["cannot load no/such/folder", "--model tiny"]),
        ("missing.safetensors", ["no checkpoint at missing.safetensors"]),
        ("model.ckpt", ["model.ckpt is a pickle", ".safetensors"]),
        ("folder/model.bin", ["model.bin is a pickle", ".safetensors"]),
        ("model.pt", ["model.pt is a pickle", ".safetensors"]),
        ("model.pth", ["model.pth is a pickle", ".safetensors"]),
    ],
)
@pytest.mark.filterwarnings("ignore:.*local_dir_use_symlinks")  # diffusers to huggingface_hub
def test_models_that_are_not_there(capfd, model, parts):
    """The hub can not be reached in this test; the line says how to run without it."""
    refused(capfd, lambda: load(model), *parts)


def index(**parts):
    return json.dumps({"_class_name": "StableDiffusionPipeline"} | parts)


@pytest.mark.parametrize(
    "text",
    ["{cut", "[]", "{}", "", index(unet=["diffusers", "NoSuchClass"]), index(unet="x"), index()],
)
def test_damaged_indices(capfd, tmp_path, text):
    (tmp_path / "model_index.json").write_text(text)
    refused(capfd, lambda: load(tmp_path), f"cannot load {tmp_path}")


TOKENIZER = ["tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"]
FILES = [UNET, VAE, TEXT, SCHEDULER, "unet/config.json", "vae/config.json", *TOKENIZER]
LOST = [(f, "lost") for f in FILES if f != TOKENIZER[1]]


@pytest.mark.parametrize("file, damage", [*LOST, *((file, "cut") for file in FILES)])
def test_damaged_folders(capfd, random_folder, tmp_path, file, damage):
    """A file that is lost, or the half of it: one line, which names the folder.

    Without its tokenizer's words transformers makes one of two words, and all prompts are alike.
    """
    folder = edited(random_folder, tmp_path, {})
    path = folder / file
    content = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    line = refused(capfd, lambda: load(folder).embed(["a cat"]), folder)
    assert "cannot load" in line or file == TOKENIZER[0] and "tokenizer lacks words" in line


def test_a_lost_tokenizer_is_refused(capfd, random_folder, tmp_path):
    folder = edited(random_folder, tmp_path, {})
    shutil.rmtree(folder / "tokenizer")
    refused(capfd, lambda: load(folder), folder, "the tokenizer lacks words")


@pytest.mark.parametrize("words", [b"no safetensors", b"", b"\0" * 100])
def test_a_checkpoint_that_is_no_model(capfd, tmp_path, words):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(words)
    refused(capfd, lambda: load(path), f"cannot load {path}")
    refused(capfd, lambda: load(path, model_config=str(tmp_path)), f"cannot load {path}")


def peft_names(state):
    return {k.replace("unet.", "base_model.model.", 1): v for k, v in state.items()}


@pytest.mark.parametrize("layout", [dict, webui_state, peft_names])
def test_a_lora_given_as_the_model_says_what_to_do(capfd, tmp_path, layout):
    path = tmp_path / "style.safetensors"
    lora_file(path, layout)
    refused(capfd, lambda: load(path), f"{path} is a LoRA", f"--base-lora {path}", "--model")


def test_inpainting_is_refused(capfd, tmp_path):
    """An inpainting model under Stable Diffusion's class name."""
    from diffusers import UNet2DConditionModel

    pipe = make_pipeline()
    pipe.unet = UNet2DConditionModel.from_config(pipe.unet.config, in_channels=9)
    pipe.save_pretrained(tmp_path / "inpaint")
    refused(capfd, lambda: load(tmp_path / "inpaint"), "inpaint is an SDXL, inpainting or other")


@pytest.mark.parametrize("files", [(UNET,), (VAE,), (TEXT,), (UNET, VAE, TEXT)])
def test_weights_that_are_pickles_are_refused(capfd, random_folder, tmp_path, files):
    """Not loaded, whatever torch.load would make of them."""
    folder = edited(random_folder, tmp_path, {})
    for file in files:
        weights = load_file(folder / file)
        name = file.replace("model.safetensors", "pytorch_model.bin") if file == TEXT else file
        torch.save(weights, (folder / name).with_suffix(".bin"))
        (folder / file).unlink()
    refused(capfd, lambda: load(folder), f"cannot load {folder}", "convert to .safetensors")


def test_a_step_without_noise_is_refused(capfd, random_folder):
    refused(capfd, lambda: load(random_folder, eta=0.0), "eta must be above 0")


# ---------------------------------------------------------------- flags


def flags(**more):
    given = dict(model="some/model", T=20, eta=1.0, guidance=5.0, device="cpu", precision=None)
    return SimpleNamespace(**given | more)


NAN = float("nan")


@pytest.mark.parametrize(
    "wrong, part",
    [
        ({"model": ""}, "--model is empty"),
        *(({"T": T}, "--T goes from 1 to 999") for T in (0, -1, 1000)),
        *(({"eta": eta}, "--eta from above 0 to 1") for eta in (0.0, -0.1, 1.01, NAN)),
        *(({"guidance": g}, "--guidance from 0 on") for g in (-0.1, 1e6, NAN, float("inf"))),
        *(({"device": d}, f"--device {d} is not there") for d in ("gpu", "cuda:99", "meat", "")),
    ],
)
def test_flags_that_can_not_work(capfd, wrong, part):
    refused(capfd, lambda: check_model_flags(flags(**wrong)), part)


@pytest.mark.parametrize("fine", [{"T": 1}, {"T": 999}, {"eta": 0.01}, {"guidance": 0.0}])
def test_flags_at_the_border_pass(fine):
    check_model_flags(flags(**fine))


def test_the_default_device_and_precision(monkeypatch):
    """cuda where there is one; half precision there, but not for the bundled model."""
    monkeypatch.setattr(torch, "empty", lambda *shape, device: None)

    def checked(**more):
        args = flags(**more)
        check_model_flags(args)
        return args.device, args.precision

    for there, device, half in ((True, "cuda", "fp16"), (False, "cpu", "fp32")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert checked(device=None) == (device, half)
        assert checked(device=None, model="tiny") == (device, "fp32")
    assert checked(device="cuda:1") == ("cuda:1", "fp16")
    assert checked(device="cuda", precision="bf16") == ("cuda", "bf16")


def test_each_process_takes_its_own_gpu(monkeypatch, capfd):
    """Before anything touches a GPU; one more process than there are GPUs ends with a line."""
    calls = []

    def set_device(n):
        calls.append(n)
        if n > 1:
            raise RuntimeError("invalid device ordinal\nand more")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    monkeypatch.setattr(torch, "empty", lambda *shape, device: calls.append(device))
    check_model_flags(flags(device=None))
    assert calls == ["cuda"]
    monkeypatch.setenv("LOCAL_RANK", "1")
    check_model_flags(flags(device=None))
    assert calls == ["cuda", 1, "cuda"]
    monkeypatch.setenv("LOCAL_RANK", "2")
    wanted = "--device cuda is not there (RuntimeError: invalid device ordinal)"
    refused(capfd, lambda: check_model_flags(flags(device=None)), wanted)
    assert calls[-1] == 2


# ---------------------------------------------------------------- full size

# ViT-H-14 without its weights: the one line that differs from `train.py`'s own command
WORKER = """
import sys
import rewards, train
def load(name, tiny, device, dtype):
    return rewards.checked(rewards.ClipScore("ViT-H-14", None, device, dtype), name)
train.load_reward = load
train.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def full_size(request, tmp_path_factory):
    """The pipeline of SD 1.4, random weights in bfloat16, as a diffusers folder."""
    if not request.config.getoption("--full-size"):
        pytest.skip("a full-size model: pass --full-size")
    return random_sd14(tmp_path_factory.mktemp("full") / "sd14")


@pytest.mark.parametrize(
    "precision, shapes",
    [("fp32", "other"), ("bf16", "other"), ("bf16", "equal"), ("fp16", "other")],
)
def test_a_round_at_full_size(full_size, tmp_path, precision, shapes):
    """The real command, 64x64 pixels: a round and an update; with branches, or one state a call."""
    script, prompts, run = tmp_path / "worker.py", tmp_path / "prompts.txt", tmp_path / "run"
    script.write_text(WORKER)
    prompts.write_text("cat\n")
    flags = ["--model", full_size, "--device", "cpu", "--precision", precision, "--out", run]
    flags += ["--prompts", prompts, "--image-size", 64, "--T", 4, "--tau0", 2, "--rounds", 1]
    flags += ["--queries", 4, "--epochs", 1, "--threshold", 0, "--decode-batch", 2]
    flags += ["--checkpointing", "--offload"]
    branches = ["--branches", 2, "--sample-batch", 4, "--micro-batch", 2]
    one = ["--no-bs", "--sample-batch", 1, "--micro-batch", 1]
    flags += branches if shapes == "other" else one
    command = [sys.executable, script, *map(str, flags)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    begun = time.monotonic()
    with open(tmp_path / "log.txt", "w+", encoding="utf-8") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=env)
        _, status, used = os.wait4(process.pid, 0)  # this child's own peak memory
        log.seek(0)
        assert status == 0, log.read()[-3000:]
    line = json.loads((run / "metrics.jsonl").read_text())
    print(f"\n{precision}, {shapes} batch shapes: {time.monotonic() - begun:.0f} s in all, seconds")
    print(f"of the round {line['seconds']}, peak {used.ru_maxrss / 2**20:.1f} GiB,", end=" ")
    print(f"max |log ratio| before the update {line['first_max_log_ratio']:.1e}")
    assert line["updates"] == 1 and line["kept"] >= 2 and line["reward_std"] > 0
    assert json.loads((run / "summary.json").read_text())["train_score"]["n"] == 1
    if precision == "fp32" or shapes == "equal":
        assert line["first_max_log_ratio"] <= 1e-6  # 1% of the clip range


def test_threads_are_those_of_the_flag(random_folder):
    before = torch.get_num_threads()
    try:
        load(str(random_folder), threads=2)
        assert torch.get_num_threads() == 2
        load(str(random_folder), threads=None)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_unet_is_compiled_in_place_where_that_is_asked_for(random_folder, monkeypatch):
    compiled = []
    compile_ = lambda module: compiled.append(type(module).__name__)
    monkeypatch.setattr(torch.nn.Module, "compile", compile_)
    load(str(random_folder))
    assert compiled == []
    load(str(random_folder), compile=True)
    assert compiled == ["UNet2DConditionModel"]
