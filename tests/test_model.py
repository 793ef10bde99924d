"""Stable Diffusion in, pictures out: loading, the policy, batches, branches, pictures.

    pytest tests/test_model.py --full-size -s     # about 16 GB of memory, minutes

The last test is of Stable Diffusion 1.4 and ViT-H-14 at full size, with random weights, on the
CPU. No download: the architecture, the sizes and the dtypes are the true ones, the pictures noise.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, count_unet_samples, load_args, make_pipeline, make_small, randomise_lora
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch.distributions import Normal

import model as model_file
import train
from ddim_logprob import keyed_generator, log_prob
from lora import inject_lora
from model import default_precision, load_model, parts, tiny_folder
from test_command import refused

PROMPTS = ["a cat", "a dog", "the sea"]
CPU = torch.device("cpu")


@pytest.fixture
def small():
    """The random pipeline, T 6, with LoRA weights that are not zero."""
    small = make_small(sample_batch=6, decode_batch=2)
    inject_lora(small.unet)
    randomise_lora(small.unet, 0.05)
    return small


def keys(count, *words):
    return [(*words, n) for n in range(count)]


def noise(shape, *key):
    return torch.randn(shape, generator=keyed_generator(*key))


def same(a, b):
    torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


# ---------------------------------------------------------------- parts of the model


@pytest.mark.parametrize("n, size", [(0, 3), (1, 3), (3, 3), (4, 3), (7, 3), (100, 64), (128, 64)])
def test_parts_are_few_and_about_equal(n, size):
    pieces = parts(list(range(n)), size)
    assert sum(pieces, []) == list(range(n)) and len(pieces) == -(-n // size)
    lengths = [len(piece) for piece in pieces]
    assert not lengths or max(lengths) <= size and max(lengths) - min(lengths) <= 1
    assert [len(piece) for piece in parts(torch.arange(n), size)] == lengths


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("guidance", [1.0, 0.5, 5.0])
@torch.no_grad()
def test_the_policy_is_diffusers_step(guidance, prediction_type):
    """Mean and standard deviation of Eq. 1, at each t; guidance below 1 is guidance, too."""
    small = make_small(guidance=guidance, prediction_type=prediction_type)
    scheduler, x = small.pipe.scheduler, noise((3, 4, 8, 8), "x")
    for t in (6, 4, 1):
        timestep = scheduler.timesteps[6 - t]
        text = [small.pipe.encode_prompt(p, CPU, 1, False)[0] for p in ("", *PROMPTS)]
        uncond, cond = text[0].expand(3, -1, -1), torch.cat(text[1:])
        u, c = (small.unet(x, timestep, e).sample for e in (uncond, cond))
        settings = dict(eta=1.0, variance_noise=torch.zeros_like(x))
        want = scheduler.step(u + guidance * (c - u), timestep, x, **settings)[0]
        mu, sigma = small.policy(x, t, PROMPTS)
        same(mu, want)
        variance = scheduler._get_variance(timestep, timestep - 1000 // 6).item()
        assert sigma.flatten().tolist() == pytest.approx([variance**0.5] * 3, rel=1e-4)


def test_a_prompt_is_encoded_once_a_run(small, monkeypatch):
    encoded, real = [], small.pipe.encode_prompt

    def record(prompt, *rest):
        encoded.append(prompt)
        return real(prompt, *rest)

    monkeypatch.setattr(small.pipe, "encode_prompt", record)
    first = small.embed(["a cat", "", "a cat", "a dog"])
    again = small.embed(["a dog", "a cat"])
    assert encoded == ["a cat", "", "a dog"] and first.shape == (4, 12, 32)
    assert torch.equal(first[0], first[2]) and not torch.equal(first[0], first[1])
    assert torch.equal(again, first[[3, 0]]) and not again.requires_grad
    small.unet.to(torch.bfloat16)
    assert small.embed(["a bird"]).dtype == torch.bfloat16


def test_a_prompt_that_is_too_long_is_told_once_with_what_is_cut_off(small, capfd, random_folder):
    """Ten letters fit between the two marks; what follows changes nothing and is told."""
    text = small.embed(["abcdefghijklm", "abcdefghijxy", "abcdefghijk", "abcdefghij"])
    assert torch.equal(text[0], text[1]) and not torch.equal(text[2], text[3])
    small.embed(["abcdefghijklm"])
    line, *others = capfd.readouterr().out.splitlines()
    assert line == "The text encoder takes 12 tokens, so 'klm' is cut off 'abcdefghijklm'."
    assert [other.split("'")[1] for other in others] == ["xy", "k"]
    loaded = load_model(load_args(random_folder), CPU)  # as train.py does: no warning of others
    capfd.readouterr()
    loaded.embed(["abcdefghijklm"])
    captured = capfd.readouterr()
    assert captured.out.splitlines() == [line] and captured.err == ""


def test_noise_is_keyed(small):
    x = small.noise([(1, 2), (1, 3), (1, 2)])
    assert x.shape == (3, 4, 8, 8) and torch.equal(x[0], noise((4, 8, 8), 1, 2))
    assert torch.equal(x[0], x[2]) and (x[0] - x[1]).abs().max() > 0.1
    assert small.noise([]).shape == (0, 4, 8, 8)


@torch.no_grad()
def plain_path(small, x, start, stop, prompt, generator):
    """One latent (1, C, h, w) by `policy` alone: its states x_start..x_stop and log p."""
    states, log_ps = [x[0]], []
    for t in range(start, stop, -1):
        mu, sigma = small.policy(x, t, [prompt])
        x = mu + sigma * torch.randn(small.latent_shape, generator=generator)
        states.append(x[0])
        log_ps.append(Normal(mu, sigma).log_prob(x).mean())
    return torch.stack(states), torch.stack(log_ps)


@pytest.mark.parametrize("batch", [1, 2, 6])
def test_denoising_is_the_policy_step_by_step(small, batch):
    """With the keys' noise, whatever the batches; without an x, x_T comes first out of each key."""
    small.sample_batch = batch
    x = small.noise(keys(3, "x_T"))
    with count_unet_samples(small.unet) as seen:
        got = small.denoise(x, 6, 3, PROMPTS, keys(3, "path"))
    assert max(seen) <= 2 * batch and sum(seen) == 2 * 3 * 3
    drawn = small.denoise(None, 6, 3, PROMPTS, keys(3, "path"))
    for p in range(3):
        generator = keyed_generator("path", p)
        same(got[p], plain_path(small, x[p : p + 1], 6, 3, PROMPTS[p], generator)[0][-1])
        generator = keyed_generator("path", p)
        x_T = torch.randn(1, 4, 8, 8, generator=generator)
        same(drawn[p], plain_path(small, x_T, 6, 3, PROMPTS[p], generator)[0][-1])
    assert small.denoise(None, 6, 0, [], []).shape == (0, 4, 8, 8)
    assert torch.equal(small.denoise(x, 3, 3, PROMPTS, keys(3, "path")), x)


@pytest.mark.parametrize("batch", [1, 4, 9])
def test_branches_start_at_one_state_and_go_their_own_ways(small, batch):
    """States and log p of each, whatever the batches; the first step is one UNet call a root."""
    small.sample_batch = batch
    x_tau = small.noise(keys(3, "x_tau"))
    branch_keys = [keys(2, "branch", p) for p in range(3)]
    with count_unet_samples(small.unet) as seen:
        x, log_p = small.branch(x_tau, 4, 1, PROMPTS, branch_keys)
    assert sum(seen) == 2 * 3 * (1 + 2 * 2) and max(seen) <= 2 * max(batch, 2)
    assert x.shape == (3, 2, 4, 4, 8, 8) and log_p.shape == (3, 2, 3)
    assert x.dtype == log_p.dtype == torch.float32
    for p in range(3):
        for k in range(2):
            generator = keyed_generator("branch", p, k)
            path = plain_path(small, x_tau[p : p + 1], 4, 1, PROMPTS[p], generator)
            same(x[p, k], path[0])
            same(log_p[p, k], path[1])
    x, log_p = small.branch(x_tau[:0], 4, 1, [], [])
    assert x.shape == (0, 1, 4, 4, 8, 8) and len(log_p) == 0


def test_the_rest_of_a_branch_has_noise_of_its_own(small):
    x = noise((2, 3, 4, 8, 8), "x")
    branch_keys = [keys(3, "branch", p) for p in range(2)]
    x_0 = small.finish(x, 2, PROMPTS[:2], branch_keys)
    assert x_0.shape == x.shape
    for p in range(2):
        for k in range(3):
            generator = keyed_generator("branch", p, k, "rest")
            path, _ = plain_path(small, x[p, k][None], 2, 0, PROMPTS[p], generator)
            same(x_0[p, k], path[-1])
    assert small.finish(x, 0, PROMPTS[:2], branch_keys) is x
    assert small.finish(x[:0], 2, [], []).shape == (0, 3, 4, 8, 8)


def test_the_stored_log_prob_is_the_policys_at_the_same_shapes(small):
    """Bit for bit, with a state a call: so a ratio is exactly 1 before the first update."""
    small.sample_batch = 1
    x, old = small.branch(small.noise([("x",)]), 3, 0, ["a cat"], [[("branch",)]])
    with torch.no_grad():
        for s, t in enumerate((3, 2, 1)):
            now = log_prob(x[:, 0, s + 1], *small.policy(x[:, 0, s], t, ["a cat"]))
            assert torch.equal(now, old[:, 0, s])


def test_pictures_are_the_pipelines(small):
    """Latents are divided by the VAE's scale, pictures moved from [-1, 1] to [0, 1] and cut off."""
    latents, vae = 3 * noise((5, 4, 8, 8), "x"), small.pipe.vae
    vae.register_to_config(scaling_factor=0.5)
    with torch.no_grad():
        decoded = vae.decode(latents / 0.5).sample
    expected = small.pipe.image_processor.postprocess(decoded, output_type="pt")
    sizes = []
    vae.decoder.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    torch.testing.assert_close(small.decode(latents), expected, atol=1e-5, rtol=0)
    assert expected.std() > 0.01 and expected.min() == 0 and sizes == [2, 2, 1]


def test_the_others_move_and_the_unet_stays(small):
    moved = []

    class Part:
        def __init__(self, name):
            self.name = name

        def to(self, device):
            moved.append((self.name, device))

    names = ("vae", "text_encoder", "unet")
    small.pipe = SimpleNamespace(**{name: Part(name) for name in names})
    small.move_others(Part("reward"), "cpu")
    assert moved == [("vae", "cpu"), ("text_encoder", "cpu"), ("reward", "cpu")]


# ---------------------------------------------------------------- loading


@pytest.mark.filterwarnings("ignore:The configuration file of this scheduler")
def test_the_scheduler_is_ddim_whatever_the_old_one_was(tmp_path):
    """No clipping, sigma above 0 at each step, SD's spacing; networks are frozen, no checker."""
    from diffusers import PNDMScheduler

    pipe = make_pipeline()
    old = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    old |= dict(set_alpha_to_one=True, steps_offset=0, timestep_spacing="linspace")
    pipe.scheduler = PNDMScheduler(**old)
    pipe.scheduler.register_to_config(clip_sample=True, thresholding=True)
    pipe.save_pretrained(tmp_path / "old")
    loaded = load_model(load_args(tmp_path / "old", T=10), CPU)
    config, want = loaded.pipe.scheduler.config, make_small(10).schedule
    assert not config.clip_sample and not config.thresholding
    assert torch.equal(loaded.schedule.timestep, want.timestep) and want.timestep[1] == 1
    torch.testing.assert_close(loaded.schedule.alpha_bar, want.alpha_bar)
    torch.testing.assert_close(loaded.schedule.sigma, want.sigma)
    assert loaded.schedule.sigma[1:].min() > 0 and loaded.pipe.safety_checker is None
    for network in (loaded.pipe.unet, loaded.pipe.vae, loaded.pipe.text_encoder):
        assert not network.training and not any(p.requires_grad for p in network.parameters())


def test_the_flags_of_a_model_reach_it(random_folder):
    more = dict(guidance=3.0, sample_batch=5, decode_batch=7, eta=0.5)
    loaded = load_model(load_args(random_folder, T=6, **more), CPU)
    assert (loaded.guidance, loaded.sample_batch, loaded.decode_batch) == (3.0, 5, 7)
    torch.testing.assert_close(loaded.schedule.sigma, 0.5 * make_small(6).schedule.sigma)
    assert loaded.tiny is None and loaded.schedule.prediction_type == "epsilon"
    loaded = load_model(load_args(random_folder, prediction_type="v_prediction"), CPU)
    assert loaded.schedule.prediction_type == "v_prediction"


def test_attention_on_a_cpu(random_folder):
    """torch's fused attention in float32, plain attention in half precision."""
    for precision, kind in (("fp32", AttnProcessor2_0), ("bf16", AttnProcessor)):
        loaded = load_model(load_args(random_folder, precision), CPU)
        assert {type(v) for v in loaded.unet.attn_processors.values()} == {kind}
        assert loaded.unet.dtype == loaded.pipe.vae.dtype == model_file.DTYPES[precision]


def test_image_size(random_folder, capsys):
    """Latents of the asked size, pictures as well; a size that the UNet can not halve: a line."""
    loaded = load_model(load_args(random_folder, T=6, image_size=64), CPU)
    assert loaded.latent_shape == (4, 16, 16)
    x, _ = loaded.branch(loaded.noise(keys(2, "x")), 2, 0, PROMPTS[:2], [keys(1, p) for p in "ab"])
    assert x.shape == (2, 1, 3, 4, 16, 16) and loaded.decode(x[:, 0, -1]).shape == (2, 3, 64, 64)
    with pytest.raises(SystemExit):
        load_model(load_args(random_folder, image_size=40), CPU)
    assert "--image-size 40 must be a multiple of 32" in capsys.readouterr().err


def test_compiling_without_a_compiler_ends_with_one_line(random_folder, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        load_model(load_args(random_folder, compile=True), CPU)
    assert stop.value.code == 2 and "--compile needs a C++ compiler" in capsys.readouterr().err


def test_the_tiny_models_folder(tmp_path):
    """By name or as a copy of it; a folder without the judge is another model's."""
    assert tiny_folder("tiny") == ROOT / "tiny" and tiny_folder("no/such/model") is None
    (tmp_path / "copy" / "judge").mkdir(parents=True)
    assert tiny_folder(str(tmp_path / "copy")) == tmp_path / "copy"
    assert tiny_folder(str(tmp_path)) is None
    precision = lambda device, model: default_precision(SimpleNamespace(device=device, model=model))
    assert precision("cuda:1", "tiny") == precision("cpu", "some/model") == "fp32"
    assert precision("cuda", "some/model") == "fp16"


def test_each_process_takes_its_own_gpu(monkeypatch, capsys):
    """One more process than there are GPUs ends with a line, before anything touches a GPU."""
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch, "empty", lambda *shape, device: None)
    args = SimpleNamespace(device=None)
    model_file.choose_device(args)
    assert args.device == "cuda" and not taken
    monkeypatch.setenv("LOCAL_RANK", "1")
    model_file.choose_device(args)
    assert taken == [1]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(SystemExit) as stop:
        model_file.choose_device(args)
    assert stop.value.code == 2 and "2 GPUs: torchrun --nproc_per_node 2" in capsys.readouterr().err
    assert taken == [1]


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
        model_file.load_pipeline(str(random_folder))
    assert silenced == ([] if terminal else ["diffusers", "transformers"])


# ---------------------------------------------------------------- models that are refused


def not_loaded(capsys, model, tmp_path, *parts):
    """train.py on this model ends with one line that has the parts."""
    argv = ["--model", model, "--device", "cpu", "--out", tmp_path / "run"]
    return refused(capsys, argv, *parts)


@pytest.mark.parametrize(
    "family", ["StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline"]
)
def test_other_families_are_refused_by_name(capsys, tmp_path, family):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": family}))
    not_loaded(capsys, tmp_path, tmp_path, family, "only Stable Diffusion 1.x and 2.x")


@pytest.mark.parametrize(
    "model, parts",
    [
        ("no/such-model", ["cannot load no/such-model", "--model tiny"]),
        ("no/such/folder", ["cannot load no/such/folder", "--model tiny"]),
        ("missing.safetensors", ["no checkpoint at missing.safetensors"]),
        ("model.ckpt", ["model.ckpt is a pickle", ".safetensors"]),
    ],
)
@pytest.mark.filterwarnings("ignore:.*local_dir_use_symlinks")  # diffusers to huggingface_hub
def test_models_that_are_not_there(capsys, tmp_path, model, parts):
    """The hub can not be reached in this test; the line says how to run without it."""
    not_loaded(capsys, model, tmp_path, *parts)


def index(**parts):
    return json.dumps({"_class_name": "StableDiffusionPipeline"} | parts)


@pytest.mark.parametrize(
    "text", ["{cut", "[]", "{}", index(unet=["diffusers", "NoSuchClass"]), index(unet="x"), index()]
)
def test_damaged_folders(capsys, tmp_path, text):
    (tmp_path / "model_index.json").write_text(text)
    not_loaded(capsys, tmp_path, tmp_path, f"cannot load {tmp_path}")


def test_a_checkpoint_that_is_no_model(capsys, tmp_path):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(b"no safetensors")
    not_loaded(capsys, path, tmp_path, f"cannot load {path}")


def test_inpainting_and_pickles_are_refused(capsys, tmp_path):
    """An inpainting model under Stable Diffusion's class name; weights that are pickles."""
    from diffusers import UNet2DConditionModel

    pipe = make_pipeline()
    pipe.unet = UNet2DConditionModel.from_config(pipe.unet.config, in_channels=9)
    pipe.save_pretrained(tmp_path / "inpaint")
    wanted = "inpaint is an SDXL, inpainting or other model"
    not_loaded(capsys, tmp_path / "inpaint", tmp_path, wanted)
    make_pipeline().save_pretrained(tmp_path / "pickled")
    weights = tmp_path / "pickled/unet/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    not_loaded(capsys, tmp_path / "pickled", tmp_path, "cannot load", "pickled")


def test_a_step_without_noise_is_refused(random_folder, capsys):
    with pytest.raises(SystemExit) as stop:
        load_model(load_args(random_folder, eta=0.0), CPU)
    assert stop.value.code == 2 and "eta must be above 0" in capsys.readouterr().err


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
    from studies.bench import random_sd14

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


def test_the_default_device_is_there():
    args = train.parse_args(["--model", "none"])
    assert args.device == ("cuda" if torch.cuda.is_available() else "cpu")


def test_freed_memory_is_kept_where_the_library_can(monkeypatch, random_folder):
    """Both thresholds are raised, the second one to what an older library takes; else nothing."""
    calls = []

    def mallopt(name, value):
        calls.append((name, value))
        return value < 2**30  # an older library refuses more

    library = SimpleNamespace(mallopt=mallopt)
    monkeypatch.setattr(model_file.ctypes, "CDLL", lambda name: library)
    load_model(load_args(random_folder), CPU)
    assert calls == [(-1, 2**31 - 1), (-3, 2**30), (-3, 2**25)]
    monkeypatch.setattr(model_file.ctypes, "CDLL", lambda name: object())  # no such function
    model_file.keep_freed_memory()
