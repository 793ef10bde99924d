"""The run folder: settings, lock, checkpoint, metrics and card; damaged ones end with one line."""

import copy
import errno
import json
import math
import os
import shutil
import signal
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_same_run, metrics, write_prompts
from safetensors.torch import load_file, save_file
from torch import nn

import processes
import run_folder
import train
from run_folder import CHECKPOINT, fingerprint, load_checkpoint, lock, save_checkpoint
from test_command import light, refused  # noqa: F401 (a fixture)

SHORT = ["--T", 3, "--tau0", 2, "--queries", 6, "--branches", 3, "--threshold", 0.1]
SHORT += ["--sample-batch", 12, "--micro-batch", 12, "--decode-batch", 12, "--lr", 1e-3]
REWARD = "def score(images, prompts):\n    return images.mean((1, 2, 3))\n"


def run_main(*argv):
    return train.main([str(a) for a in argv])


@pytest.fixture(scope="module")
def project(random_folder, tmp_path_factory):
    """A folder with a model, prompts, a reward and a run of two rounds, all named relatively."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(random_folder, folder / "model")
    write_prompts(folder)
    (folder / "mean.py").write_text(REWARD)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(train, "plot_curves", lambda folder: None)
        flags = ["--model", "model", "--device", "cpu", "--prompts", "prompts.txt", *SHORT]
        run_main(*flags, "--reward", "mean.py:score", "--rounds", 2, "--out", "runs/a")
    return folder


@pytest.fixture
def moved(project, tmp_path, monkeypatch):
    """A copy of the project, in another place and seen from another folder."""
    monkeypatch.setattr(train, "plot_curves", lambda folder: None)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return Path(shutil.copytree(project, tmp_path / "project"))


def edit(path, change):
    """Read JSON, change it, write it. Returns what was written."""
    data = change(json.loads(path.read_text()))
    path.write_text(json.dumps(data))
    return data


# ---------------------------------------------------------------- settings


def test_the_default_folder_names_what_was_chosen():
    parse = lambda *flags: train.parse_args(["--model", "org/none", "--device", "cpu", *flags])
    assert parse().out == "runs/none-clip-template1-ddpo-bpt-bs-seed0"
    flags = ["--no-bpt", "--no-bs", "--algo", "dpok", "--template", "3", "--seed", "7"]
    assert parse(*flags).out == "runs/none-clip-template3-dpok-seed7"
    flags = ["--interval", "forward", "--tau0", "1", "--lr", "0.01"]
    assert parse(*flags).out == "runs/none-clip-template1-ddpo-forward-bs-seed0-tau01-lr0.01"


def test_the_default_folder_names_files(tmp_path):
    (tmp_path / "fur.py").write_text(REWARD)
    flags = ["--model", "m/sd.safetensors", "--device", "cpu", "--prompts", "x/my.txt"]
    args = train.parse_args([*flags, "--reward", f"{tmp_path}/fur.py:score"])
    assert args.out == "runs/sd-fur-score-my-ddpo-bpt-bs-seed0"


def test_paths_are_relative_to_the_run_folder(project):
    """None of them, nor any other path of the machine, stands in config.json or the card."""
    config = json.loads((project / "runs/a/config.json").read_text())
    assert config["model"] == "../../model" and config["prompts"] == "../../prompts.txt"
    assert config["reward"] == "../../mean.py:score" and "out" not in config
    assert set(config["made_with"]) >= {"commit", "python", "torch", "diffusers"}
    assert config["lr"] == 1e-3 and config["rounds"] == 2 and config["seed"] == 0
    for name in ("config.json", "README.md", "summary.json"):
        assert str(project) not in (project / "runs/a" / name).read_text()


@pytest.mark.parametrize("out", ["run", "a/b/c", ".", "../beside", "link/run"])
def test_paths_come_back(tmp_path, monkeypatch, out):
    """From the folder where the run was begun and from another one, through links as well."""
    here = tmp_path / "here"
    for folder in ("here/m", "here/tiny", "other/disk"):
        (tmp_path / folder).mkdir(parents=True)
    (here / "link").symlink_to(tmp_path / "other/disk")
    for name in ("p.txt", "r.py", "clip"):
        (here / name).write_text("")
    monkeypatch.chdir(here)
    folder = Path(out)
    for words in (("m", "p.txt", "r.py:f"), (str(here / "m"), str(here / "p.txt"), "./r.py:f")):
        config = dict(zip(("model", "prompts", "reward"), words)) | {"lr": 1}
        stored = run_folder.move_paths(config, folder, True)
        assert all(stored[k].startswith(("./", "../")) for k in ("model", "prompts", "reward"))
        assert stored["reward"].endswith("r.py:f") and str(tmp_path) not in json.dumps(stored)
        back = run_folder.move_paths(stored, folder, False)
        assert back == {"model": "m", "prompts": "p.txt", "reward": "r.py:f", "lr": 1}
        monkeypatch.chdir(tmp_path / "other")
        back = run_folder.move_paths(stored, (here / out).resolve(), False)
        assert Path(back["model"]).resolve() == here / "m"
        assert Path(back["reward"].removesuffix(":f")).resolve() == here / "r.py"
        monkeypatch.chdir(here)


def test_names_are_no_paths(tmp_path, monkeypatch):
    """The bundled model, a reward and a model of the hub, whatever files lie about."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    (tmp_path / "clip").mkdir()
    for model in ("tiny", "CompVis/stable-diffusion-v1-4"):
        config = {"model": model, "prompts": None, "reward": "clip"}
        stored = run_folder.move_paths(config, Path("runs/a"), True)
        assert stored == config == run_folder.move_paths(stored, Path("runs/a"), False)


def test_a_link_to_a_model_keeps_its_name(tmp_path, monkeypatch):
    """As the hub's cache has them: the file behind the link has no suffix."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "blob").write_text("")
    (tmp_path / "sd.safetensors").symlink_to(tmp_path / "blob")
    stored = run_folder.move_paths({"model": "sd.safetensors"}, Path("run"), True)
    assert stored["model"] == "../sd.safetensors"


def test_a_project_moves_and_is_seen_from_elsewhere(moved):
    run_main("--resume", "../project/runs/a", "--rounds", 3)
    assert len(metrics(moved / "runs/a")) == 3
    config = json.loads((moved / "runs/a/config.json").read_text())
    assert config["model"] == "../../model" and config["reward"] == "../../mean.py:score"


def test_a_run_that_moved_alone_says_what_it_misses(moved, light, tmp_path, capsys):  # noqa: F811
    shutil.move(moved / "runs/a", tmp_path / "alone")
    refused(capsys, ["--resume", tmp_path / "alone"], "there is no file", "mean.py")


def test_settings_of_zero_come_back(tmp_path):
    """As they were given, and not as the tiny model's defaults; lists and None as well."""
    argv = ["--model", "tiny", "--device", "cpu", "--out", str(tmp_path / "run")]
    zero = ["threshold", "window", "kl_beta", "weight_decay", "guidance", "beta1"]
    for name in zero:
        argv += [f"--{name.replace('_', '-')}", "0"]
    argv += ["--validation-prompt", "a fox", "--validation-prompt=-x=1", "--no-bs", "--seed=-3"]
    args = train.parse_args(argv)
    with run_folder.resumable(args.out):
        run_folder.open_folder(args, 0)
    assert all(getattr(args, name) == 0 for name in zero)
    again = train.parse_args(["--resume", str(tmp_path / "run")])
    assert vars(again) | {"resume": None} == vars(args)
    assert fingerprint(vars(again)) == fingerprint(vars(args))


def test_resume_takes_its_settings_from_the_run(moved, light, capsys):  # noqa: F811
    run = moved / "runs/a"
    refused(capsys, ["--resume", run, "--lr", 1e-5], "leave out --lr")
    line = refused(capsys, ["--resume", run, "--no-bs", "--rounds", 5, "--seed", 1], "--no-bs")
    assert "--seed" in line and "--rounds" not in line
    refused(capsys, ["--resume", run, "--micro-batch", 0], "--micro-batch must be 1 or more")
    refused(capsys, ["--resume", run, "--rounds", 1], "has 2 rounds, more than --rounds 1")
    given = ["--checkpointing", "--micro-batch", "2", "--rounds", "9", "--threads", "1"]
    args = train.parse_args(["--resume", str(run), *given])
    assert args.checkpointing and (args.micro_batch, args.rounds, args.threads) == (2, 9, 1)
    assert (args.lr, args.T, args.resume, args.out) == (1e-3, 3, str(run), str(run))


def test_a_run_of_an_earlier_version_resumes(moved):
    """Its config.json knows nothing of flags that change no result; these may be given now."""
    later = ("preset", "checkpointing", "offload", "compile", "channels_last", "report_to")
    later += ("save_every", "image_size", "threads", "validation_prompt")
    run = moved / "runs/a"
    edit(run / "config.json", lambda c: {k: v for k, v in c.items() if k not in later})
    args = train.parse_args(["--resume", str(run), "--checkpointing"])
    assert args.checkpointing and args.offload is False and args.image_size is None
    run_main("--resume", run)
    assert len(metrics(run)) == 2


# What stands in config.json -> a part of the line; or a text in place of the file
CONFIGS = [
    ("", "is damaged"),
    ('{"model": "mo', "is damaged"),
    ("[" * 200_000, "is damaged"),
    ("null", "holds no run"),
    ("[]", "holds no run"),
    ('"text"', "holds no run"),
    ("{}", "holds no run"),
    ({"model": None}, "holds no run"),
    ({"rounds": 0}, "holds no run"),
    ({"rounds": "many"}, "--rounds"),
    ({"rounds": True}, "--rounds"),
    ({"model": 3}, "model can not be 3"),
    ({"model": ["a", "b"]}, "model can not be ['a', 'b']"),
    ({"T": "many"}, "--T"),
    ({"T": "3"}, "T can not be '3'"),
    ({"T": 3.0}, "--T"),
    ({"T": 10**400}, "--T"),
    ({"lr": "fast"}, "--lr"),
    ({"lr": [1e-3]}, "lr can not be [0.001]"),
    ({"lr": {"a": 1}}, "--lr"),
    ({"lr": None}, "has no lr: it is damaged or of another version"),
    ({"lr": False}, "--lr"),
    ({"lr": True}, "--lr"),
    ({"lr": math.nan}, "lr can not be nan"),
    ({"lr": math.inf}, "--lr inf"),
    ({"lr": -1}, "--lr must be above 0"),
    ({"seed": None}, "has no seed"),
    ({"seed": False}, "--seed"),
    ({"seed": 2**63}, "--seed"),
    ({"algo": None}, "has no algo"),
    ({"algo": "ppo"}, "unknown --algo ppo"),
    ({"no_bpt": None}, "has no no_bpt"),
    ({"no_bs": 1}, "--no-bs"),
    ({"no_bs": "yes"}, "--no-bs"),
    ({"interval": "middle"}, "--interval"),
    ({"precision": "fp8"}, "--precision"),
    ({"template": 4}, "--template"),
    ({"tau0": 9}, "--tau0 9 is outside 1..T = 3"),
    ({"queries": -5}, "--queries"),
    ({"image_size": 2.5}, "--image-size"),
    ({"image_size": 0}, "--image-size"),
    ({"validation_prompt": "a fox"}, "validation_prompt can not be 'a fox'"),
    ({"validation_prompt": [None]}, "validation_prompt can not be [None]"),
    ({"validation_prompt": [3]}, "validation_prompt can not be [3]"),
    ({"device": "nowhere"}, "--device nowhere is not there"),
    ({"prompts": "../../none.txt"}, "cannot read the prompt file"),
    ({"reward": "../../none.py:score"}, "there is no file"),
    ({"reward": "beauty"}, "unknown --reward beauty"),
    ({"help": True}, "there is no setting 'help'"),
    ({"resume": "x"}, "there is no setting 'resume'"),
    ({"out": "x"}, "there is no setting 'out'"),
    ({"of a later version": 1}, "there is no setting 'of a later version'"),
    ({"": 1}, "there is no setting ''"),
    ({"lr": 2e-4}, f"has other settings than its {CHECKPOINT}"),
    ({"no_bpt": True}, f"has other settings than its {CHECKPOINT}"),
    ({"reward": "clip"}, f"has other settings than its {CHECKPOINT}"),
]


@pytest.mark.parametrize("config, words", CONFIGS, ids=lambda value: str(value)[:30])
def test_damaged_settings(moved, light, capsys, config, words):  # noqa: F811
    path = moved / "runs/a/config.json"
    if isinstance(config, str):
        path.write_text(config)
    else:
        edit(path, lambda whole: whole | config)
    before = path.read_bytes()
    refused(capsys, ["--resume", moved / "runs/a"], words)
    assert path.read_bytes() == before


def test_resuming_what_is_no_run(light, capsys, tmp_path):  # noqa: F811
    refused(capsys, ["--resume", tmp_path], "holds no run", tmp_path)
    refused(capsys, ["--resume", tmp_path / "none"], "holds no run", tmp_path)
    (tmp_path / "file").write_text("")
    refused(capsys, ["--resume", tmp_path / "file"], "holds no run")


def test_a_lost_setting_is_none_of_the_defaults(moved, light, capsys):  # noqa: F811
    """Every setting that changes a result must be there."""
    config = json.loads((moved / "runs/a/config.json").read_text())
    free = {*run_folder.WITH_RESUME, *run_folder.MAY_BE_NULL, "made_with", "model", "rounds"}
    assert len(config.keys() - free) > 25
    for name in sorted(config.keys() - free):
        rest = {k: v for k, v in config.items() if k != name}
        (moved / "runs/a/config.json").write_text(json.dumps(rest))
        refused(capsys, ["--resume", moved / "runs/a"], f"config.json has no {name}")


def test_a_fingerprint_is_of_settings_prompts_and_reward(tmp_path):
    """Not of where files lie, nor of what may be given beside --resume."""
    (tmp_path / "p.txt").write_text("a cat\n[unseen]\na dog\n")
    flags = ["--model", "none", "--device", "cpu", "--prompts", str(tmp_path / "p.txt")]
    config = vars(train.parse_args([*flags, "--tau0", "1", "--guidance", "2"]))
    mark = fingerprint(config, "source")
    others = dict(threads=2, rounds=7, micro_batch=3, offload=True, device="cuda", out="x")
    assert fingerprint(config | others | {"resume": "x"}, "source") == mark
    assert fingerprint(config | {"model": "some/where/none"}, "source") == mark
    later = {"a_flag_of_a_later_version": False, "another": None}
    assert fingerprint(config | later, "source") == mark
    for name, value in dict(lr=3e-4, tau0=2, no_bs=True, seed=1, model="other").items():
        changed = fingerprint(config | {name: value}, "source")
        assert changed["settings"] != mark["settings"] and changed["prompts"] == mark["prompts"]
    changed = fingerprint(config, "another source")
    assert [k for k in mark if changed[k] != mark[k]] == ["reward code"]
    (tmp_path / "moved.txt").write_bytes(b"\xef\xbb\xbfa cat\r\n[unseen]\r\na  dog\r\n")
    assert fingerprint(config | {"prompts": str(tmp_path / "moved.txt")}, "source") == mark
    for text in ("a cat\n[unseen]\na bird\n", "a cat\na dog\n", "a dog\n[unseen]\na cat\n"):
        (tmp_path / "p.txt").write_text(text)
        changed = fingerprint(config, "source")
        assert [k for k in mark if changed[k] != mark[k]] == ["prompts"]


# ---------------------------------------------------------------- the folder


def test_config_is_there_before_anything_heavy_is_loaded(command, tmp_path, monkeypatch):
    def stopped(cfg, device):
        assert json.loads((tmp_path / "run/config.json").read_text())["lr"] == 1e-3
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "load_model", stopped)
    with pytest.raises(SystemExit) as stop:
        command(tmp_path / "run")
    assert stop.value.code == 130
    assert not run_folder.holds_run(tmp_path / "run"), "it may be begun again"


def test_a_folder_is_held_by_one_process(tmp_path, capsys):
    first = lock(tmp_path)
    with pytest.raises(SystemExit) as stop:
        lock(tmp_path)
    assert stop.value.code == 2
    assert f"another process works in {tmp_path}" in capsys.readouterr().err
    os.close(first)
    os.close(lock(tmp_path))


def test_a_lock_dies_with_its_process(tmp_path):
    """With SIGKILL, which no code sees."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        lock(tmp_path)
        os.write(write, b"held")
        signal.pause()
        os._exit(0)
    os.read(read, 4)
    with pytest.raises(SystemExit):
        lock(tmp_path)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(lock(tmp_path))


def test_a_second_run_on_a_held_folder_changes_nothing(moved, light, capsys):  # noqa: F811
    run = moved / "runs/a"
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    handle = lock(run)
    refused(capsys, ["--resume", run], "another process works in")
    new = moved / "runs/new"
    new.mkdir()
    held = lock(new)
    argv = ["--model", "none", "--device", "cpu", "--out", new]
    refused(capsys, argv, "another process works in", new)
    os.close(handle)
    os.close(held)
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
    assert not (new / "config.json").exists()


@pytest.mark.parametrize(
    "problem, code, words",
    [
        (processes.Stop("the reward"), 2, "error: the reward."),
        (KeyboardInterrupt(), 130, "Stopped."),
        (torch.OutOfMemoryError("x"), 2, "out of GPU memory: lower --micro-batch"),
        (OSError(errno.ENOSPC, "No space left"), 2, "cannot write to {}: No space left."),
        (OSError("strange"), 2, "cannot write to {}: strange."),
    ],
)
def test_a_stop_ends_with_the_reason_and_the_command_that_goes_on(
    tmp_path, capsys, monkeypatch, problem, code, words
):
    def stop():
        with pytest.raises(SystemExit) as end, run_folder.resumable(str(tmp_path)):
            raise problem
        assert end.value.code == code
        return capsys.readouterr().err

    said = stop()
    assert words.format(tmp_path) in said and "--resume" not in said
    (tmp_path / CHECKPOINT).write_text("")
    assert f"Finished rounds are saved. To go on: python train.py --resume {tmp_path}" in stop()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert f"torchrun --nproc_per_node 2 train.py --resume {tmp_path}" in stop()
    os.close(lock(tmp_path))  # it is free again


def test_only_the_first_process_holds_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with run_folder.resumable(str(tmp_path / "run")):
        assert not (tmp_path / "run").exists()
    monkeypatch.setenv("RANK", "0")
    with run_folder.resumable(str(tmp_path / "run")):
        assert (tmp_path / "run/grids").is_dir()
        with pytest.raises(SystemExit):
            lock(tmp_path / "run")


def test_equal_runs_are_equal_bytes_and_follow_the_umask(project, moved):
    """Of every file but for the seconds in it; from another folder, too."""
    flags = ["--model", moved / "model", "--device", "cpu", "--prompts", moved / "prompts.txt"]
    out = ["--rounds", 2, "--out", moved / "runs/b"]
    old = os.umask(0o027)
    try:
        run_main(*flags, *SHORT, "--reward", f"{moved}/mean.py:score", *out)
    finally:
        os.umask(old)
    # curves.png holds no seconds, but neither run drew it
    assert_same_run(moved / "runs/b", project / "runs/a", but=())
    files = [p for p in (moved / "runs/b").rglob("*") if p.is_file()]
    assert {stat.S_IMODE(p.stat().st_mode) for p in files} == {0o640} and len(files) > 12


def test_a_full_disk_ends_with_a_line_and_keeps_the_last_checkpoint(
    project, moved, capsys, monkeypatch
):
    """In the middle of round 2's checkpoint; resumed, the run ends with the same bytes."""
    real, calls = Path.write_bytes, []

    def full(path, data):
        calls.append(path)
        if len(calls) == 2:
            real(path, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, data)

    monkeypatch.chdir(moved)
    monkeypatch.setattr(Path, "write_bytes", full)
    flags = ["--model", "model", "--device", "cpu", "--prompts", "prompts.txt", *SHORT]
    out = ["--reward", "mean.py:score", "--rounds", 2, "--out", "runs/b"]
    line = refused(capsys, [*flags, *out], "cannot write to runs/b: No space left on device")
    assert line.endswith("To go on: python train.py --resume runs/b")
    assert str(calls[1]) == f"runs/b/{CHECKPOINT}.part"
    monkeypatch.setattr(Path, "write_bytes", real)
    run_main("--resume", "runs/b")
    assert_same_run(moved / "runs/b", project / "runs/a", but=())


# ---------------------------------------------------------------- checkpoint


def two_layers(seed):
    """Parameters as those of a LoRA, and an optimizer."""
    generator = torch.Generator().manual_seed(seed)
    names = ("unet.a.lora_A.weight", "unet.a.lora_B.weight", "unet.b.lora_A.weight")
    lora = {n: nn.Parameter(torch.randn(2, 3, generator=generator)) for n in names}
    return lora, torch.optim.AdamW(lora.values(), 0.1)


def one_step(lora, optimizer):
    optimizer.zero_grad()
    sum((p**3).sum() for p in lora.values()).backward()
    optimizer.step()


CFG = SimpleNamespace(rounds=9, precision="fp32")
HEADER = {"rounds_done": 2, "history": {"a cat": [[0, [0.5, 1.0]]]}, "skipped_in_a_row": 3}
HEADER |= {"scaler": {}, "fingerprint": {"settings": "a", "prompts": "b", "reward code": "c"}}


def test_a_checkpoint_goes_on_as_if_nothing_had_happened(tmp_path):
    """Weights, both moments and the step count: the next step of AdamW is the same bit for bit."""
    lora, optimizer = two_layers(0)
    one_step(lora, optimizer)
    one_step(lora, optimizer)
    save_checkpoint(tmp_path, lora, optimizer, HEADER)
    again, other = two_layers(1)
    header = load_checkpoint(tmp_path, again, other, CFG, HEADER["fingerprint"])
    assert header == HEADER | {"tensors": 12}
    states = [other.state[p] for p in again.values()]
    assert all(set(s) == {"step", "exp_avg", "exp_avg_sq"} and s["step"] == 2 for s in states)
    for _ in range(2):
        one_step(lora, optimizer)
        one_step(again, other)
    assert all(torch.equal(lora[k], again[k]) for k in lora)


def test_a_checkpoint_before_any_update_has_no_moments(tmp_path):
    lora, optimizer = two_layers(0)
    save_checkpoint(tmp_path, lora, optimizer, HEADER)
    again, other = two_layers(1)
    assert load_checkpoint(tmp_path, again, other, CFG, HEADER["fingerprint"])["tensors"] == 3
    assert not other.state and torch.equal(again["unet.a.lora_A.weight"], [*lora.values()][0])


def test_no_checkpoint_is_told(tmp_path, capsys):
    lora, optimizer = two_layers(0)
    before = copy.deepcopy(lora)
    assert load_checkpoint(tmp_path, lora, optimizer, CFG, {}) is None
    assert "has no checkpoint yet" in capsys.readouterr().out
    assert all(torch.equal(before[k], lora[k]) for k in lora)


A = "unet.a.lora_A.weight"


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t, h: t.update({A: torch.zeros(1, 3)}), f"of another model: {A}"),
        (lambda t, h: t.update({f"exp_avg:{A}": torch.zeros(1, 3)}), f"of another model: {A}"),
        (lambda t, h: t.update({"unet.c": t.pop(A)}), "of another model: unet.c"),
        (lambda t, h: t.update({"exp_avg:unet.c": t.pop(f"exp_avg:{A}")}), "another model: unet.c"),
        (lambda t, h: h.update(scaler={"scale": 1.0}), "of another model: its scale"),
        (lambda t, h: h["fingerprint"].update(prompts="x"), "has other prompts than"),
        (lambda t, h: h["fingerprint"].pop("settings"), "has other settings than"),
        (lambda t, h: h["fingerprint"].update({"reward code": "x"}), "has other reward code than"),
    ],
)
def test_a_checkpoint_of_another_model_or_reward(tmp_path, capsys, change, words):
    """Refused with one line, and nothing is copied."""
    lora, optimizer = two_layers(0)
    one_step(lora, optimizer)
    save_checkpoint(tmp_path, lora, optimizer, HEADER)
    tensors, header = run_folder.read_safetensors(tmp_path / CHECKPOINT)
    header = copy.deepcopy(header)
    change(tensors, header)
    run_folder.write_safetensors(tmp_path / CHECKPOINT, tensors, header)
    again, other = two_layers(1)
    before = copy.deepcopy(again)
    with pytest.raises(SystemExit) as stop:
        load_checkpoint(tmp_path, again, other, CFG, HEADER["fingerprint"])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and words in err
    assert all(torch.equal(before[k], again[k]) for k in again) and not other.state


def test_the_scale_of_fp16_must_be_there(tmp_path, capsys):
    lora, optimizer = two_layers(0)
    save_checkpoint(tmp_path, lora, optimizer, HEADER)
    half = SimpleNamespace(rounds=9, precision="fp16")
    with pytest.raises(SystemExit):
        load_checkpoint(tmp_path, lora, optimizer, half, HEADER["fingerprint"])
    assert "its scale does not fit" in capsys.readouterr().err
    save_checkpoint(tmp_path, lora, optimizer, HEADER | {"scaler": {"scale": 2.0}})
    assert load_checkpoint(tmp_path, lora, optimizer, half, HEADER["fingerprint"])


def drop(kind):
    """Drop the first tensor of a kind, or all of them for "all"."""

    def change(tensors, header):
        moments = [k for k in tensors if ":" in k]
        named = moments if kind == "all" else [k for k in tensors if k.startswith(kind)][:1]
        for name in named:
            del tensors[name]

    return change


def nan(tensors, header):
    next(iter(tensors.values())).view(-1)[0] = math.nan


def header_with(**changes):
    return lambda tensors, header: header.update(changes)


def without(name):
    return lambda tensors, header: header.pop(name)


CHECKPOINTS = {
    "one moment lost": (drop("exp_avg"), "tensors are there"),
    "one step lost": (drop("step"), "tensors are there"),
    "a weight lost": (drop("unet"), "tensors are there"),
    "all moments lost": (drop("all"), "tensors are there"),
    "a weight is NaN": (nan, "not finite"),
    "rounds as text": (header_with(rounds_done="2"), "says that 2 rounds are done"),
    "half a round": (header_with(rounds_done=1.5), "says that 1.5 rounds"),
    "rounds as truth": (header_with(rounds_done=True), "says that True rounds"),
    "no round": (header_with(rounds_done=0), "says that 0 rounds"),
    "less than none": (header_with(rounds_done=-1), "says that -1 rounds"),
    "more rounds": (header_with(rounds_done=9), "has 9 rounds, more than --rounds 2"),
    "history as list": (header_with(history=[1]), "is damaged"),
    "history of text": (header_with(history={"a cat": ["x"]}), "is damaged"),
    "history of NaN": (header_with(history={"a cat": [[0, [math.nan]]]}), "history"),
    "history of no round": (header_with(history={"a cat": [["0", [0.5]]]}), "history"),
    "seven skipped": (header_with(skipped_in_a_row=7), "7 skipped updates in a row"),
    "five skipped": (header_with(skipped_in_a_row=5), "5 skipped updates in a row"),
    "skipped as text": (header_with(skipped_in_a_row="x"), "is damaged"),
    "scale as list": (header_with(scaler=[]), "is damaged"),
    "fingerprint as text": (header_with(fingerprint="x"), "is damaged"),
    "another fingerprint": (header_with(fingerprint={}), "has other settings than its"),
    **{f"without {k}": (without(k), "is damaged") for k in (*HEADER, "tensors")},
}


@pytest.mark.parametrize("change, words", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_damaged_checkpoints(moved, light, capsys, change, words):  # noqa: F811
    """Told before anything heavy is loaded, and the metrics are left as they are."""
    path = moved / "runs/a" / CHECKPOINT
    tensors, header = run_folder.read_safetensors(path)
    change(tensors, header)
    run_folder.write_safetensors(path, tensors, header)
    before = {p: p.read_bytes() for p in (moved / "runs/a").iterdir() if p.is_file()}
    refused(capsys, ["--resume", moved / "runs/a"], moved / "runs/a", words)
    assert {p: p.read_bytes() for p in (moved / "runs/a").iterdir() if p.is_file()} == before


@pytest.mark.parametrize("part", [0, 4, 0.5, -9])
def test_checkpoints_that_are_cut(moved, light, capsys, part):  # noqa: F811
    path = moved / "runs/a" / CHECKPOINT
    whole = path.read_bytes()
    path.write_bytes(whole[: part if isinstance(part, int) else len(whole) // 2])
    refused(capsys, ["--resume", moved / "runs/a"], f"{path} is damaged")


@pytest.mark.parametrize("metadata", [None, {"run": "{cut"}, {"run": "[]"}, {"other": "{}"}])
def test_checkpoints_with_the_header_of_others(moved, light, capsys, metadata):  # noqa: F811
    path = moved / "runs/a" / CHECKPOINT
    save_file(load_file(path), path, metadata)
    refused(capsys, ["--resume", moved / "runs/a"], f"{path} is damaged")


def test_other_prompts_and_another_reward_are_noticed(moved, capsys, monkeypatch):
    """An edited file is; one that was saved again with other line ends is not."""
    run, prompts, reward = moved / "runs/a", moved / "prompts.txt", moved / "mean.py"
    text = prompts.read_text()
    prompts.write_text(text.replace("dog", "bird"))
    refused(capsys, ["--resume", run], "has other prompts than its", "put the old ones back")
    prompts.write_text(text.replace("bird", "fish"))
    refused(capsys, ["--resume", run], "has other prompts than its")
    prompts.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    reward.write_text(REWARD.replace("mean", "-images.mean").replace("images.-images", "-images"))
    refused(capsys, ["--resume", run], "has other reward code than its")
    reward.write_text(REWARD)
    run_main("--resume", run)
    assert len(metrics(run)) == 2


# ---------------------------------------------------------------- scores before, metrics

SCORES = {"train": {"score": [0.5, 0.25], "recognised": None}}
SCORES["unseen"] = {"score": [0.5], "recognised": None}


@pytest.mark.parametrize(
    "data, words",
    [
        ("{cut", "is damaged"),
        ("", "is damaged"),
        ([], "delete it"),
        ("null", None),
        ({}, "delete it"),
        ({"train": SCORES["train"]}, "delete it"),
        ({**SCORES, "other": SCORES["train"]}, "delete it"),
        ({**SCORES, "train": {"score": [0.5], "recognised": None}}, "delete it"),
        ({**SCORES, "train": {"score": [0.5] * 3, "recognised": None}}, "delete it"),
        ({**SCORES, "train": {"score": [0.5, "1"], "recognised": None}}, "delete it"),
        ({**SCORES, "train": {"score": [0.5, math.nan], "recognised": None}}, "delete it"),
        ({**SCORES, "train": {"score": None, "recognised": None}}, "delete it"),
        ({**SCORES, "train": {"recognised": None}}, "delete it"),
        ({**SCORES, "train": {"score": [0.5, 0.5], "recognised": [1.0]}}, "delete it"),
        ({**SCORES, "train": {"score": [0.5, 0.5], "recognised": [1.0, "x"]}}, "delete it"),
        ({**SCORES, "train": [0.5, 0.5]}, "delete it"),
        ({**SCORES, "train": {"score": [0.5, 0.5], "recognised": [1.0, 0.0]}}, None),
        (SCORES, None),
    ],
    ids=lambda value: str(value)[:60],
)
def test_damaged_scores_before(moved, light, capsys, data, words):  # noqa: F811
    """What is whole is let through, and loading begins; null is a file that never was."""
    path = moved / "runs/a/before.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    if words:
        refused(capsys, ["--resume", moved / "runs/a"], f"{path}", words)
    else:
        with pytest.raises(AssertionError, match="something heavy"):
            run_main("--resume", moved / "runs/a")


def line(round, **more):
    return {"round": round, "queries": 6 * round, "reward_mean": 0.5} | more


def test_metrics_that_are_cut_lose_a_line_and_it_is_told(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    text = "".join(json.dumps(line(i)) + "\n" for i in (1, 2, 3, 4))
    path.write_text(text)
    run_folder.keep_metrics(tmp_path, 4)
    assert path.read_text() == text and capsys.readouterr().out == ""
    run_folder.keep_metrics(tmp_path, 3)  # a stop between metrics and checkpoint
    assert path.read_text() == "".join(text.splitlines(True)[:3])
    assert capsys.readouterr().out == ""
    path.write_text(text[:-20])
    run_folder.keep_metrics(tmp_path, 4)
    assert [m["round"] for m in metrics(tmp_path)] == [1, 2, 3]
    assert "metrics.jsonl has lost 1 rounds (4 to 4)" in capsys.readouterr().out
    path.unlink()
    run_folder.keep_metrics(tmp_path, 3)
    assert "has lost 3 rounds (1 to 3)" in capsys.readouterr().out and path.read_text() == ""
    path.write_text(text)
    run_folder.keep_metrics(tmp_path, 0)  # the checkpoint was lost
    assert "has 4 rounds more than the checkpoint" in capsys.readouterr().out
    assert path.read_text() == ""


def test_metrics_keep_whole_lines_of_rounds_alone(tmp_path):
    """A round counts once; lines of others, of another type or of bytes are none."""
    whole = [line(2), line(1), line(2, kept=3)]
    others = [[], 3, None, {}, line("1"), line(1.0), line(True), line(0), line(-1)]
    others += [line(3, reward_mean=None), line(3, queries="6"), {"round": 3}]
    lines = [json.dumps(each) for each in (*others, *whole)] + ["{cut", "", "[" * 200_000]
    (tmp_path / "metrics.jsonl").write_bytes("\n".join(lines).encode() + b"\n\xff\xfe\n")
    run_folder.keep_metrics(tmp_path, 3)
    assert metrics(tmp_path) == [line(1), line(2, kept=3)]
    assert run_folder.read_metrics(tmp_path / "none") == []


def test_a_resumed_run_mends_its_metrics(moved, capsys):
    path = moved / "runs/a/metrics.jsonl"
    path.write_text(path.read_text()[:-30])
    run_main("--resume", moved / "runs/a", "--rounds", 3)
    assert [m["round"] for m in metrics(moved / "runs/a")] == [1, 3]
    assert "metrics.jsonl has lost 1 rounds (2 to 2)" in capsys.readouterr().out


def test_metrics_are_strict_json(tmp_path):
    values = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.5, "e": [1], "f": 3}
    run_folder.append_metrics(tmp_path, values)
    run_folder.append_metrics(tmp_path, line(1))
    wanted = {"a": None, "b": None, "c": None, "d": 0.5, "e": [1], "f": 3}
    assert metrics(tmp_path) == [wanted, line(1)]


def test_the_code_of_a_card_draws(project):
    """As it stands, with the two paths put in: the picture is that of the run's own steps."""
    card = (project / "runs/a/README.md").read_text(encoding="utf-8")
    code = card.split("```python\n")[1].split("```")[0]
    code = code.replace("PATH OF model", str(project / "model"))
    code = code.replace("THIS REPOSITORY OR FOLDER", str(project / "runs/a"))
    names = {}
    exec(code.replace("\npipe(", "\npicture = pipe(").replace(".images[0]", ".images"), names)
    assert names["picture"][0].size == (32, 32) and names["pipe"].scheduler.config.steps_offset == 1
    assert (project / "runs/a/before-after.png").exists() and "before-after.png" in card
