"""Bad input ends with exit code 2 and one clear line, before anything heavy is loaded."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, load_args, make_pipeline

import rewards
import runs
import train


def refused(capsys, argv, *parts):
    """`train.main(argv)` exits with 2; its one line on stderr holds all `parts`."""
    with pytest.raises(SystemExit) as stop:
        train.main([str(a) for a in argv])
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line and "%|" not in line]  # no progress bars
    assert stop.value.code == 2, err
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    assert all(str(part) in lines[0] for part in parts), lines[0]


@pytest.fixture
def light(monkeypatch):
    """Nothing heavy may be reached."""

    def heavy(*_, **__):
        raise AssertionError("something heavy was loaded before the arguments were checked")

    for name in ("load_model", "load_pipeline", "load_judge"):
        monkeypatch.setattr(runs, name, heavy)
    monkeypatch.setattr(train, "load_reward", heavy)


@pytest.mark.parametrize("flags, parts", [
    (["--reward", "beauty"], ["unknown --reward beauty", "clip"]),
    (["--algo", "ppo"], ["unknown --algo ppo", "ddpo"]),
    (["--template", 4], ["--template", "4"]),
    (["--template", "one"], ["--template", "one"]),
    (["--interval", "middle"], ["--interval", "middle"]),
    (["--precision", "fp8"], ["--precision", "fp8"]),
    (["--device", "nowhere"], ["--device nowhere"]),
    (["--learning-rate", 1], ["--learning-rate"]),
    (["--query", 8], ["--query"]),
    (["--tau0", 0], ["--tau0 0", "1..T = 20"]),
    (["--tau0", 21], ["--tau0 21", "1..T = 20"]),
    (["--tau0", 14, "--T", 10], ["--tau0 14", "1..T = 10"]),
    (["--tau0", -3], ["--tau0 -3"]),
    (["--branches", 1], ["--branches", "--no-bs"]),
    (["--branches", 0], ["--branches"]),
    (["--queries", 2, "--branches", 3], ["--queries 2", "--branches 3"]),
    (["--eta", 0], ["--eta"]),
    (["--eta", -1], ["--eta"]),
    (["--eta", "nan"], ["--eta"]),
    (["--lr", 0], ["--lr"]),
    (["--lr", "fast"], ["--lr", "fast"]),
    (["--lr", "nan"], ["--lr"]),
    (["--clip-range", -1e-4], ["--clip-range"]),
    (["--rounds", "2.5"], ["--rounds", "2.5"]),
    (["--threshold", -1], ["--threshold"]),
    (["--threshold", 6], ["--threshold", "--adv-clip"]),
    (["--window", -1], ["--window"]),
    (["--T", 1001], ["--T"]),
    (["--algo", "dpo", "--micro-batch", 1], ["--micro-batch 2"]),
    (["--skip-last", 14], ["--skip-last 14", "--tau0 14"]),
    (["--skip-last", 20, "--no-bpt"], ["--skip-last 20"]),
    (["--skip-last", 6, "--interval", "forward"], ["--interval forward", "T - tau0"]),
    (["--image-size", 0], ["--image-size"]),
    (["--image-size", -64], ["--image-size"]),
    (["--preset", "12gb"], ["--preset", "16gb"]),
    *([(["--" + n, v], ["--" + n]) for n in (
        "rounds", "queries", "epochs", "update-size", "rank", "sample-batch", "micro-batch",
        "decode-batch", "eval-images", "grid-every") for v in (0, -2)]),
])  # fmt: skip
def test_arguments(light, capsys, flags, parts):
    refused(capsys, ["--model", "none", "--device", "cpu", *flags], *parts)


@pytest.mark.parametrize("flags, part", [
    (["--beta1", 1.5], "--beta1"), (["--beta2", -0.1], "--beta2"), (["--adam-eps", -1], "--adam"),
    (["--weight-decay", -1], "--weight-decay"), (["--threads", 0], "--threads"),
    (["--max-grad-norm", -1], "--max-grad-norm"), (["--T", 1000], "--T"),
])  # fmt: skip
def test_numbers_that_would_crash_or_ruin_a_run_later(light, capsys, flags, part):
    refused(capsys, ["--model", "none", "--device", "cpu", *flags], part)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is there")
def test_a_device_that_is_not_there(light, capsys):
    refused(capsys, ["--model", "none", "--device", "cuda"], "--device cuda", "cpu")


@pytest.mark.parametrize("content, parts", [
    (None, ["cannot read", "No such file"]),
    ("", ["holds no prompt"]),
    ("# a comment\n\n[train]\n", ["holds no prompt"]),
    ("[animals]\na cat\n", ["[train]"]),
    (b"\xff\xfe\x00c", ["cannot read"]),
])  # fmt: skip
def test_prompt_files(light, capsys, tmp_path, content, parts):
    path = tmp_path / "my.txt"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(capsys, ["--model", "none", "--device", "cpu", "--prompts", path, "--out",
                     tmp_path / "run"], path, *parts)  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_prompts_of_the_paper_and_of_the_user(tmp_path):
    """Sizes of App. H's lists; sections; comments and blank lines do not count."""
    sizes = [tuple(map(len, runs.load_prompts(n))) for n in (1, 2, 3)]
    assert sizes == [(45, 90), (40, 40), (40, 30)]
    path = tmp_path / "my.txt"
    path.write_text("# mine\n a cat \n\na dog\n", encoding="utf-8")
    assert runs.load_prompts(1, path) == (["a cat", "a dog"], [])
    path.write_text("[train]\na cat\n[unseen]\na dog\n", encoding="utf-8")
    assert runs.load_prompts(1, path) == (["a cat"], ["a dog"])


@pytest.mark.parametrize("family", [
    "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline"])  # fmt: skip
def test_other_families_are_refused_by_name(capsys, tmp_path, family):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": family}))
    refused(capsys, ["--model", tmp_path, "--device", "cpu", "--out", tmp_path / "run"], family)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("model, parts", [
    ("no/such-model", ["cannot load no/such-model", "--model tiny"]),
    ("no/such/folder", ["cannot load no/such/folder", "--model tiny"]),
    ("missing.safetensors", ["no checkpoint at missing.safetensors"]),
    ("model.ckpt", ["model.ckpt is a pickle", ".safetensors"]),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*local_dir_use_symlinks")  # diffusers to huggingface_hub
def test_models_that_are_not_there(capsys, tmp_path, model, parts):
    """The hub can not be reached in this test; the line says how to run without it."""
    refused(capsys, ["--model", model, "--device", "cpu", "--out", tmp_path / "run"], *parts)


def test_a_checkpoint_that_is_no_model(capsys, tmp_path):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(b"no safetensors")
    refused(capsys, ["--model", path, "--device", "cpu", "--out", tmp_path / "run"], path)


def test_a_folder_that_holds_a_run_is_not_overwritten(light, capsys, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    refused(capsys, ["--model", "none", "--device", "cpu", "--out", tmp_path],
            "holds a run", f"--resume {tmp_path}", "--out")  # fmt: skip
    assert (tmp_path / "config.json").read_text() == "{}"


# ---------------------------------------------------------------- resuming


def test_resuming_what_is_no_run(light, capsys, tmp_path):
    refused(capsys, ["--resume", tmp_path], "holds no run", tmp_path)
    (tmp_path / "config.json").write_text("{damaged")
    refused(capsys, ["--resume", tmp_path], "holds no run", tmp_path)


@pytest.fixture
def tiny_run(random_folder, tmp_path, monkeypatch):
    """argv of the smallest run on the random folder; its reward is the mean of the picture."""

    def score(images, prompts):
        return images.mean((1, 2, 3))

    def set_reward(function):
        checked = rewards.checked(function, "mine")
        monkeypatch.setattr(train, "load_reward", lambda *a, **k: checked)

    set_reward(score)
    (tmp_path / "my.txt").write_text("a cat\na dog\n")
    argv = ["--model", random_folder, "--device", "cpu", "--prompts", tmp_path / "my.txt",
            "--out", tmp_path / "run", "--T", 2, "--tau0", 1, "--rounds", 1, "--queries", 4,
            "--branches", 2, "--micro-batch", 8]  # fmt: skip
    return argv, set_reward


def test_resume_takes_its_settings_from_the_run(tiny_run, capsys, tmp_path):
    argv, _ = tiny_run
    train.main([str(a) for a in argv])
    capsys.readouterr()
    run = tmp_path / "run"
    refused(capsys, ["--resume", run, "--lr", 1e-5], "leave out --lr")
    refused(capsys, ["--resume", run, "--no-bs", "--rounds", 5], "--no-bs", "--rounds")
    refused(capsys, ["--resume", run, "--micro-batch", 0], "--micro-batch must be 1 or more")
    config = json.loads((run / "config.json").read_text())
    for broken in ({**config, "T": "many"}, {k: v for k, v in config.items() if k != "lr"}):
        (run / "config.json").write_text(json.dumps(broken))
        refused(capsys, ["--resume", run], run, "damaged")
    (run / "config.json").write_text(json.dumps({**config, "tau0": 9}))
    refused(capsys, ["--resume", run], "--tau0 9 is outside 1..T = 2")


@pytest.mark.parametrize("damage, told", [
    ("cut", "damaged or of another model"), ("emptied", "damaged or of another model"),
    ("of other settings", "other settings or prompts"), ("of other prompts", "other settings"),
    ("of rank 1", "damaged or of another model"), ("without its round", "damaged or of another"),
])  # fmt: skip
def test_damaged_checkpoints(tiny_run, capsys, tmp_path, damage, told):
    from safetensors import safe_open
    from safetensors.torch import load_file

    argv, _ = tiny_run
    train.main([str(a) for a in argv])
    path = tmp_path / "run/checkpoint.safetensors"
    if damage in ("cut", "emptied"):
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2 if damage == "cut" else 0])
    elif damage == "of other settings":
        config = json.loads((tmp_path / "run/config.json").read_text())
        (tmp_path / "run/config.json").write_text(json.dumps({**config, "lr": 2e-4}))
    elif damage == "of other prompts":
        (tmp_path / "my.txt").write_text("a cat\na bird\n")
    elif damage == "of rank 1":  # which torch would gladly stretch to rank 4
        with safe_open(path, "pt") as file:
            header = file.metadata()
        small = {k: v[:1] if k.startswith("unet") and "lora_A" in k else v
                 for k, v in load_file(path).items()}  # fmt: skip
        runs.write_safetensors(path, small, header)
    else:
        runs.write_safetensors(path, load_file(path), {"history": "{}"})
    metrics = (tmp_path / "run/metrics.jsonl").read_text()
    capsys.readouterr()
    refused(capsys, ["--resume", tmp_path / "run"], path, told)
    assert (tmp_path / "run/metrics.jsonl").read_text() == metrics


# ---------------------------------------------------------------- rewards


def test_models_that_are_not_loaded(capsys, random_folder, tmp_path):
    """An inpainting model under Stable Diffusion's class name; weights that are pickles."""
    from diffusers import UNet2DConditionModel

    pipe = make_pipeline()
    pipe.unet = UNet2DConditionModel.from_config(pipe.unet.config, in_channels=9)
    pipe.save_pretrained(tmp_path / "inpaint")
    refused(capsys, ["--model", tmp_path / "inpaint", "--device", "cpu", "--out", tmp_path / "run"],
            "inpaint is an SDXL, inpainting or other model")  # fmt: skip
    make_pipeline().save_pretrained(tmp_path / "pickled")
    weights = tmp_path / "pickled/unet/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    refused(capsys, ["--model", tmp_path / "pickled", "--device", "cpu", "--out", tmp_path / "run"],
            "cannot load", "pickled")  # fmt: skip
    args = load_args(random_folder, prediction_type="v_prediction")
    loaded = [runs.load_model(a, torch.device("cpu")).schedule.prediction_type
              for a in (args, load_args(random_folder))]  # fmt: skip
    assert loaded == ["v_prediction", "epsilon"]


def nan_for_dogs(images, prompts):
    return torch.tensor([float("nan") if p == "a dog" else 0.1 for p in prompts])


@pytest.mark.parametrize("reward, parts", [
    (nan_for_dogs, ["reward mine", "nan", "'a dog'"]),
    (lambda x, p: -nan_for_dogs(x, p).nan_to_num(float("inf")), ["reward mine", "-inf", "'a dog'"]),
    (lambda x, p: torch.zeros(len(p), 1), ["reward mine", "shape", "one number a picture"]),
    (lambda x, p: 0.5, ["reward mine", "shape ()"]),
])  # fmt: skip
def test_rewards(tiny_run, capsys, reward, parts):
    argv, set_reward = tiny_run
    set_reward(reward)
    refused(capsys, argv, *parts)


def test_a_good_reward_may_be_of_any_number_type():
    for score in ([1, 2], torch.tensor([1.0, 2.0], dtype=torch.bfloat16, requires_grad=True)):
        out = rewards.checked(lambda images, prompts, score=score: score, "mine")(None, ["a", "b"])
        assert out.tolist() == [1, 2] and out.dtype == torch.float32 and not out.requires_grad


def test_arguments_are_checked_without_diffusers():
    """The modules import, and refuse, without the heavy libraries."""
    code = ("import sys, train\ntry:\n    train.main(['--tau0', '0', '--device', 'cpu'])\n"
            "except SystemExit as stop:\n    heavy = {'diffusers', 'transformers', 'open_clip'}\n"
            "    print(stop.code, heavy & sys.modules.keys())")  # fmt: skip
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert out.stdout.strip() == "2 set()", out.stderr
