"""The run folder: what a run writes, resumes and refuses; damaged files end with one line."""

import copy
import errno
import importlib.machinery
import json
import math
import os
import random
import shutil
import stat
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import assert_same_run, brightness, metrics, write_prompts
from safetensors.torch import load_file, save_file
from torch import nn

import eval as evaluation
import rewards
import train
from b2rl import RewardNormaliser, StepWeights
from support import report, run_folder
from support.command import Stop
from support.run_folder import CHECKPOINT, aside, fingerprint, read_json, read_safetensors
from support.run_folder import restore, save_checkpoint, write_json, write_safetensors, write_text

SHORT = ["--T", 3, "--tau0", 2, "--queries", 6, "--branches", 3, "--threshold", 0.1]
SHORT += ["--sample-batch", 12, "--micro-batch", 12, "--decode-batch", 12, "--lr", 1e-3]
FLAGS = ["--model", "model", "--device", "cpu", "--prompts", "prompts.txt", *SHORT]
FLAGS += ["--reward", "mean.py:score", "--rounds", 2, "--eval-images", 2]
REWARD = "import factor\n\ndef score(images, prompts):\n    return images.mean((1, 2, 3))\n"
NESTED = "[" * 200_000


def refused(capsys, argv, *parts, main=train.main):
    """`main(argv)` exits with 2; its one line on stderr, which holds all `parts`, is returned."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in argv])
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line and "%|" not in line]  # no progress bars
    assert stop.value.code == 2, err
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    assert all(str(part) in lines[0] for part in parts), lines[0]
    return lines[0]


def run_main(*argv):
    return train.main([str(a) for a in argv])


def parsed(*argv):
    return train.parse_args([str(a) for a in argv])


def simple(patch):
    """`patch`: the reward is brightness and its file is not run; before-after.png is left out."""
    checked = rewards.checked(brightness, "brightness")
    patch.setattr(train, "load_reward", lambda *rest: checked)
    patch.setattr(report, "before_after", lambda *rest: None)


@pytest.fixture(scope="module")
def project(random_folder, tmp_path_factory):
    """A folder with a model, prompts, a reward and a run of two rounds, all named relatively."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(random_folder, folder / "model")
    write_prompts(folder)
    (folder / "mean.py").write_text(REWARD)
    (folder / "factor.py").write_text("")
    with pytest.MonkeyPatch.context() as patch:
        simple(patch)
        patch.chdir(folder)
        run_main(*FLAGS, "--out", "runs/a")
    return folder


@pytest.fixture
def moved(project, tmp_path, monkeypatch):
    """A copy of the project in another place; the current folder is in it."""
    simple(monkeypatch)
    ignore = shutil.ignore_patterns("model")
    shutil.copytree(project, tmp_path / "project", ignore=ignore)
    (tmp_path / "project/model").symlink_to(project / "model")
    monkeypatch.chdir(tmp_path / "project")
    return Path("runs/a")


class Accepted(Exception):
    """A resume has read all its files and would train now."""


@pytest.fixture
def light(moved, monkeypatch):
    """`light.main`: `train.main` up to its first round, without a model. Returns the run's folder.

    loaded: the calls of what would have loaded something heavy.
    """
    tensors = load_file(moved / CHECKPOINT)
    light = SimpleNamespace(run=moved, loaded=[])

    def load(cfg, device):
        light.loaded.append(cfg)
        policy = SimpleNamespace(unet=nn.Module(), latent_shape=(4, 8, 8))
        return SimpleNamespace(policy=policy, tiny=None)

    def inject(unet, rank, seed):
        return {k: nn.Parameter(torch.zeros_like(v)) for k, v in tensors.items() if ":" not in k}

    def begin(*rest):
        raise Accepted

    def go(*argv):
        """Ends with SystemExit, or with Accepted."""
        light.loaded.clear()
        train.main([str(a) for a in argv])

    monkeypatch.setattr(train, "load_pipeline", load)
    monkeypatch.setattr(train, "inject_lora", inject)
    monkeypatch.setattr(report, "TrainingLog", begin)
    monkeypatch.setattr(evaluation, "draw_lists", begin)
    light.main = go
    return light


def edit(path, change):
    """Read JSON, change it, write it."""
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


# ---------------------------------------------------------------- files that a stop can not harm


def test_a_stop_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with pytest.raises(KeyboardInterrupt), aside(path) as part:
        part.write_text("half of the n")
        assert path.read_text() == "old"
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    write_text(path, "é")
    assert path.read_bytes() == "é".encode() and list(tmp_path.iterdir()) == [path]


def test_every_file_follows_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        write_json(tmp_path / "a.json", {})
        write_safetensors(tmp_path / "a.safetensors", {"w": torch.zeros(2)})
        run_folder.append_metrics(tmp_path, {})
        report.save_grid(tmp_path / "a.png", torch.zeros(1, 3, 8, 8), 1)
    finally:
        os.umask(old)
    assert {stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()} == {0o640}


def test_json_comes_back(tmp_path):
    data = {"a": [1, 2.5, None, "é"], "b": {"c": True}}
    write_json(tmp_path / "a.json", data)
    assert read_json(tmp_path / "a.json") == data
    assert read_json(tmp_path / "none.json") is None
    assert (tmp_path / "a.json").read_text().endswith("}\n")


@pytest.mark.parametrize("text", [b"", b"{cut", b"\xff\xfe{}", NESTED.encode(), b"9" * 5000])
def test_damaged_json_ends_with_one_line(tmp_path, capsys, text):
    (tmp_path / "a.json").write_bytes(text)
    refused(capsys, [tmp_path / "a.json"], f"{tmp_path}/a.json is damaged", main=read_first)


def read_first(argv):
    read_json(Path(argv[0]))


def test_tensors_and_header_come_back_and_equal_data_are_equal_bytes(tmp_path):
    """In whatever order they came; the library keeps none of the header's keys."""
    tensors = {"b": torch.randn(2, 3), "a": torch.randn(4).to(torch.bfloat16)}
    header = {"rounds": 3, "history": {"a cat": [[0, [0.5]]], "a 'dog'": []}}
    write_safetensors(tmp_path / "one", tensors, header)
    for n in range(5):
        again = {k: tensors[k] for k in ("a", "b")}
        write_safetensors(tmp_path / "two", again, dict(reversed(header.items())))
        assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes(), n
    back, read = read_safetensors(tmp_path / "one")
    assert read == header and back.keys() == tensors.keys()
    assert all(torch.equal(back[k], tensors[k]) for k in tensors)
    write_safetensors(tmp_path / "plain", {"t": torch.randn(3, 2).T})  # not contiguous
    assert read_safetensors(tmp_path / "plain")[1] == {}
    assert load_file(tmp_path / "plain")["t"].shape == (2, 3)


def test_damaged_tensors_are_a_value_error(tmp_path):
    write_safetensors(tmp_path / "a", {"w": torch.zeros(200)})
    whole = (tmp_path / "a").read_bytes()
    for damaged in (whole[:-9], whole[:4], b"", b"no tensors at all"):
        (tmp_path / "a").write_bytes(damaged)
        with pytest.raises(ValueError):
            read_safetensors(tmp_path / "a")
    for header in ("{cut", NESTED):
        save_file({"w": torch.zeros(2)}, tmp_path / "a", {"run": header})
        with pytest.raises(ValueError):
            read_safetensors(tmp_path / "a")
    with pytest.raises(OSError):
        read_safetensors(tmp_path / "none")


# ---------------------------------------------------------------- names of folders


@pytest.fixture
def empty(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def out_of(*flags):
    return parsed("--model", "org/none", "--device", "cpu", *flags).out


def test_the_default_folder_names_what_was_chosen(empty):
    assert out_of() == "runs/none-clip-template1-ddpo-bpt-bs-seed0"
    flags = ["--no-bpt", "--no-bs", "--algo", "dpok", "--template", 3, "--seed", 7]
    assert out_of(*flags) == "runs/none-clip-template3-dpok-seed7"
    assert out_of("--no-bs") == "runs/none-clip-template1-ddpo-bpt-seed0"
    flags = ["--no-bpt", "--lr", "0.01", "--tau0", 1]  # in the order of SETTINGS
    assert out_of(*flags) == "runs/none-clip-template1-ddpo-bs-seed0-tau01-lr0.01"


def test_the_default_folder_tells_models_and_files_apart(empty):
    for name in ("sd-v1.4", "sd-v1.5", "a/sd.safetensors", "b/sd.safetensors"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("")
    for name in ("a/my.txt", "b/my.txt"):
        Path(name).write_text("a cat\n")
    for name in ("a/fur.py", "b/fur.py"):
        Path(name).write_text(REWARD)
    choices = [["--model", name] for name in ("sd-v1.4", "sd-v1.5")]
    choices += [["--model", f"{folder}/sd.safetensors"] for folder in "ab"]
    choices += [["--prompts", f"{folder}/my.txt"] for folder in "ab"]
    choices += [["--reward", f"{folder}/fur.py:{f}"] for folder in "ab" for f in ("f", "g")]
    found = [out_of(*choice) for choice in choices]
    assert len(set(found)) == len(found)
    words = ["sd-v1.4-clip", "sd-v1.5-clip", "sd-", "sd-", "clip-my-", "clip-my-"]
    words += ["none-fur-", "none-fur-", "none-fur-", "none-fur-"]
    assert all(word in name for word, name in zip(words, found, strict=True)), found
    assert found[6].endswith("-f-template1-ddpo-bpt-bs-seed0")
    assert all(name.count("/") == 1 for name in found)
    same = out_of("--prompts", "a/my.txt")
    assert out_of("--prompts", str(empty / "a/my.txt")) == same == found[4]
    Path(LONG := "é" * 120 + ".txt").write_text("a cat\n")
    Path(out_of("--prompts", LONG)).mkdir(parents=True)  # at most 255 bytes for the system


def test_out_may_be_in_the_home(empty, monkeypatch):
    monkeypatch.setenv("HOME", str(empty / "home"))
    assert out_of("--out=~/x") == f"{empty}/home/x"


# ---------------------------------------------------------------- what may not be overwritten


def test_a_folder_with_files_that_are_no_runs_is_refused(light, capsys):
    Path("mine").mkdir()
    Path("mine/README.md").write_text("mine")
    for out in ("mine", ".", "runs"):
        refused(
            capsys,
            [*FLAGS, "--out", out],
            f"{out} holds files that are no run's",
            main=lambda a: light.main(*a),
        )
    assert not light.loaded and os.listdir("mine") == ["README.md"]


def test_a_folder_that_holds_a_run_is_not_overwritten(light, capsys):
    """One whose run failed while it loaded has a config.json alone, and may be begun again."""
    was = (light.run / "config.json").read_bytes()
    main = lambda argv: light.main(*argv)
    line = refused(capsys, [*FLAGS, "--out", light.run], f"{light.run} holds a run", main=main)
    assert f"--resume {light.run}" in line and not light.loaded
    (light.run / "before.json").unlink()
    refused(capsys, [*FLAGS, "--out", light.run], "holds a run", main=main)
    (light.run / CHECKPOINT).unlink()
    assert (light.run / "config.json").read_bytes() == was
    parsed(*FLAGS, "--out", light.run)


def test_a_start_that_was_killed_in_its_first_write_may_begin_again(light):
    Path("runs/b").mkdir()
    Path("runs/b/config.json.part").write_text("{")
    parsed(*FLAGS, "--out", "runs/b")


def test_config_is_there_before_anything_heavy_is_loaded(moved, monkeypatch):
    def stopped(cfg, device):
        config = json.loads(Path("runs/b/config.json").read_text())
        assert config["lr"] == 1e-3 and config["rounds"] == 2
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "load_pipeline", stopped)
    with pytest.raises(SystemExit) as stop:
        run_main(*FLAGS, "--out", "runs/b")
    assert stop.value.code == 130
    parsed(*FLAGS, "--out", "runs/b"), "it may be begun again"


# ---------------------------------------------------------------- config.json


def test_paths_are_stored_as_given(project):
    """And no other path of the machine stands in config.json or the card."""
    config = json.loads((project / "runs/a/config.json").read_text())
    assert config["model"] == "model" and config["prompts"] == "prompts.txt"
    assert config["reward"] == "mean.py:score"
    assert not {"out", "resume", "reward_was_given"} & config.keys()
    assert set(config["made_with"]) >= {"commit", "torch", "diffusers", "transformers"}
    assert config["lr"] == 1e-3 and config["rounds"] == 2 and config["seed"] == 0
    assert config["reward_changed"] == []
    for name in ("config.json", "README.md", "summary.json"):
        assert str(project) not in (project / "runs/a" / name).read_text()


def test_every_setting_is_stored_and_comes_back(light):
    """Zeros as they were given, and not as the model's defaults; lists and None as well."""
    zero = ["threshold", "window", "min_count", "kl_beta", "weight_decay", "guidance", "beta1"]
    flags = [*FLAGS, "--out", "runs/b", "--no-bs", "--validation-prompt", "a fox"]
    for name in zero:
        flags += [f"--{name.replace('_', '-')}", 0]
    flags += ["--validation-prompt=-x=1", "--seed=-3"]
    args = parsed(*flags)
    with pytest.raises(Accepted):
        light.main(*flags)
    config = json.loads(Path("runs/b/config.json").read_text())
    again = parsed("--resume", "runs/b")
    assert all(getattr(again, name) == 0 for name in zero)
    settings = {k: v for k, v in vars(args).items() if k not in run_folder.NOT_IN_CONFIG}
    assert {k: config[k] for k in settings} == settings
    assert vars(again) | {"resume": None, "reward_was_given": True} == vars(args)
    assert fingerprint(vars(again), "") == fingerprint(vars(args), "")


def test_a_run_keeps_its_id_of_weights_and_biases(light):
    """Another run has another one, of the same flags and name, too."""
    key = lambda run: json.loads((run / "config.json").read_text())["wandb_id"]
    was = key(light.run)
    assert len(was) >= 8
    with pytest.raises(Accepted):
        light.main("--resume", light.run)
    assert key(light.run) == was
    shutil.rmtree(light.run)
    with pytest.raises(Accepted):
        light.main(*FLAGS, "--out", light.run)
    assert key(light.run) != was


def module(monkeypatch, name, **more):
    """A module that is not installed."""
    made = ModuleType(name)
    made.__spec__ = importlib.machinery.ModuleSpec(name, None)
    made.__dict__.update(more)
    monkeypatch.setitem(sys.modules, name, made)


def test_trackers_write_beside_the_run(light, monkeypatch):
    """With the run's own id, at the round that is done; the folder holds the run alone."""
    told = []

    def init(**more):
        told.append(more)
        return SimpleNamespace(define_metric=lambda *a, **k: None, log=told.append)

    def writer(folder, purge_step):
        told.append((folder, purge_step))
        numbers = lambda name, value, step: told.append((name, value, step))
        return SimpleNamespace(add_scalar=numbers, flush=lambda: None)

    module(monkeypatch, "wandb", init=init, errors=SimpleNamespace(Error=ZeroDivisionError))
    module(monkeypatch, "tensorboard")
    module(monkeypatch, "torch.utils.tensorboard", SummaryWriter=writer)
    files = sorted(light.run.rglob("*"))
    trackers = report.open_trackers
    kept = []
    monkeypatch.setattr(report, "open_trackers", lambda *rest: kept.append(trackers(*rest)))
    with pytest.raises(Accepted):
        light.main("--resume", light.run, "--report-to", "tensorboard", "wandb")
    beside = light.run.resolve().parent / "a-trackers"
    wandb_id = json.loads((light.run / "config.json").read_text())["wandb_id"]
    by_name = {type(entry): entry for entry in told}
    assert by_name[tuple] == (beside / "tensorboard", 2 * 6 + 1)
    named = by_name[dict]
    assert (named["dir"], named["id"], named["name"]) == (str(beside), wandb_id, "a")
    assert sorted(light.run.rglob("*")) == files
    told.clear()
    kept[0]({"reward": 0.5, "list": [1]}, 18)
    assert told == [("reward", 0.5, 18), {"reward": 0.5, "queries": 18}]


# ---------------------------------------------------------------- resume by its settings


def test_the_very_command_goes_on_with_resume_beside_it(light):
    for flags in (FLAGS, [*FLAGS, "--out", "runs/a"], ["--lr", "0.001"], []):
        with pytest.raises(Accepted):
            light.main("--resume", light.run, *flags)
    free = ["--rounds", 9, "--threads", 1, "--micro-batch", 2, "--checkpointing", "--offload"]
    free += ["--sample-batch", 3, "--decode-batch", 5, "--save-every", 2, "--grid-every", 3]
    with pytest.raises(Accepted):
        light.main("--resume", light.run, *free)
    (args,) = light.loaded
    assert args.checkpointing and args.offload and not args.compile
    assert (args.micro_batch, args.rounds, args.threads, args.save_every) == (2, 9, 1, 2)
    assert (args.sample_batch, args.decode_batch, args.grid_every) == (3, 5, 3)
    assert (args.lr, args.T, args.tau_rounds) == (1e-3, 3, 2), "tau keeps its schedule"
    assert args.resume == args.out == str(light.run)
    config = json.loads((light.run / "config.json").read_text())
    assert config["rounds"] == 9 and config["micro_batch"] == 2


@pytest.mark.parametrize("flags", [["--queries", 10, "--branches", 4], ["--no-bs"]], ids=str)
def test_the_very_command_goes_on_whatever_was_rounded(light, flags):
    with pytest.raises(Accepted):
        light.main(*FLAGS, *flags, "--out", "runs/b")
    with pytest.raises(Accepted):
        light.main(*FLAGS, *flags, "--out", "runs/b", "--resume", "runs/b")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--lr", 1e-5], "runs/a has lr 0.001, not 1e-05"),
        (["--seed", 1], "has seed 0, not 1"),
        (["--no-bs"], "has no_bs False, not True"),
        (["--algo", "dpo"], "has algo ddpo, not dpo"),
        (["--window", 0], "has window 8, not 0"),
        (["--tau-rounds", 5], "has tau_rounds 2, not 5"),
        (["--model", "tiny"], "has model model, not tiny"),
        (["--reward", "jpeg"], "has reward mean.py:score, not jpeg"),
        (["--validation-prompt", "a fox"], "has validation_prompt None, not ['a fox']"),
        (["--eval-images", 5], "has eval_images 2, not 5"),
        (["--rounds", 1], "has 2 rounds, more than --rounds 1"),
        (["--micro-batch", 0], "--micro-batch must be above 0"),
        (["--device", "nowhere"], "--device nowhere is not there"),
    ],
    ids=str,
)
def test_flags_that_differ_from_the_run_are_named(light, capsys, flags, words):
    argv = ["--resume", light.run, *flags]
    refused(capsys, argv, words, main=lambda argv: light.main(*argv))
    assert not light.loaded


def test_resuming_what_is_no_run(light, capsys):
    Path("file").write_text("")
    Path("empty").mkdir()
    for run in ("empty", "none", "file", "x" * 300):
        refused(capsys, ["--resume", run], f"{run} holds no run")


def test_a_run_that_moved_alone_says_what_it_misses(light, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    argv = ["--resume", "project/runs/a"]
    refused(capsys, argv, "there is no file", "mean.py", main=lambda argv: light.main(*argv))
    shutil.copy("project/mean.py", ".")
    shutil.copy("project/factor.py", ".")
    refused(capsys, argv, "prompt file prompts.txt", main=lambda argv: light.main(*argv))
    shutil.copy("project/prompts.txt", ".")
    with pytest.raises(Accepted):
        light.main(*argv)


@pytest.fixture
def new_row(monkeypatch):
    """A later version's SETTINGS, with one row more."""
    row = ("sharpness", 0.5, 0.25, "a later idea")
    if len(train.SETTINGS[0]) == 5:
        row = ("sharpness", float, 0.5, 0.25, "a later idea")
    monkeypatch.setattr(train, "SETTINGS", (*train.SETTINGS, row))


def test_a_run_of_an_earlier_version_takes_the_default(light, new_row, capsys):
    """Of a row that is new in SETTINGS, and of any flag that changes no result."""
    later = ("checkpointing", "offload", "compile", "save_every", "threads", "base_lora")
    edit(light.run / "config.json", lambda c: {k: v for k, v in c.items() if k not in later})
    with pytest.raises(Accepted):
        light.main("--resume", light.run, "--sharpness", 0.5)  # it may be said
    (args,) = light.loaded
    assert args.sharpness == 0.5 and args.checkpointing is False and args.save_every == 0
    assert args.threads is None and args.base_lora is None
    assert json.loads((light.run / "config.json").read_text())["sharpness"] == 0.5
    argv = ["--resume", light.run, "--sharpness", 0.7]
    refused(capsys, argv, "has sharpness 0.5, not 0.7", main=lambda argv: light.main(*argv))


def test_a_new_row_takes_part_in_everything(light, new_row, capsys, tmp_path, monkeypatch):
    """Folder name, config.json, checkpoint and card, without another line of code."""
    assert out_of("--sharpness", 0.7).endswith("-seed0-sharpness0.7")
    assert parsed("--device", "cpu").sharpness == 0.25, "the tiny model's"
    refused(capsys, [*FLAGS, "--sharpness", -1], "--sharpness")
    flags = [*FLAGS, "--sharpness", 0.7, "--out", "runs/b"]
    cfg = parsed(*flags)
    with pytest.raises(Accepted):
        light.main(*flags)
    mark = fingerprint(vars(cfg), rewards.reward_code(cfg.reward))
    tensors, header = read_safetensors(light.run / CHECKPOINT)
    write_safetensors(Path("runs/b") / CHECKPOINT, tensors, header | {"fingerprint": mark})
    with pytest.raises(Accepted):
        light.main("--resume", "runs/b", "--sharpness", 0.7)
    edit(Path("runs/b/config.json"), lambda config: config | {"sharpness": 0.8})
    argv = ["--resume", "runs/b"]
    line = refused(capsys, argv, "sharpness 0.7", "0.8", main=lambda argv: light.main(*argv))
    assert CHECKPOINT in line and not light.loaded
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/model_card.md").write_text("sharp by {sharpness}")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    report.write_card(tmp_path, cfg, {}, ["a cat"], "x")
    assert (tmp_path / "README.md").read_text() == "sharp by 0.7"


def test_a_fingerprint_is_of_settings_prompts_and_reward(empty):
    """Not of where files lie, nor of what may be given beside --resume."""
    path = empty / "p.txt"
    path.write_text("a cat\n[unseen]\na dog\n")
    flags = ["--model", "none", "--device", "cpu", "--prompts", path, "--reward", "jpeg"]
    config = vars(parsed(*flags, "--tau0", 1, "--guidance", 2))
    mark = fingerprint(config, "source")
    others = dict(threads=2, rounds=7, micro_batch=3, offload=True, device="cuda", out="x")
    others |= dict(sample_batch=3, decode_batch=3, checkpointing=True, compile=True, resume="x")
    others |= dict(report_to=["wandb"], save_every=3, grid_every=4, reward="other.py:f")
    assert fingerprint(config | others, "source") == mark
    named = set(config) - set(others) - {"prompts", "reward_was_given"}
    assert set(mark["settings"]) == named and {name for name, *_ in train.SETTINGS} <= set(config)
    for name in named:
        changed = fingerprint(config | {name: "other"}, "source")
        assert changed["settings"] == mark["settings"] | {name: "other"}
    for changed in (fingerprint(config, "another source"), fingerprint(config, "")):
        assert [k for k in mark if changed[k] != mark[k]] == ["reward"]
    assert fingerprint(config, "")["reward"] == "jpeg"
    path.write_bytes(b"\xef\xbb\xbfa cat\r\n[unseen]\r\na  dog\r\n")
    assert fingerprint(config, "source") == mark
    for text in ("a cat\n[unseen]\na bird\n", "a cat\na dog\n", "a dog\n[unseen]\na cat\n"):
        path.write_text(text)
        changed = fingerprint(config, "source")
        assert [k for k in mark if changed[k] != mark[k]] == ["prompts"]


# ---------------------------------------------------------------- another reward, other prompts


def test_other_prompts_are_noticed(light, capsys):
    """An edited file is; one that was saved again with other line ends is not."""
    prompts, argv = Path("prompts.txt"), ["--resume", light.run]
    text = prompts.read_text()
    for changed in (text.replace("dog", "fox"), text.replace("bird", "fish")):
        prompts.write_text(changed)
        refused(
            capsys, argv, "other prompts", "put the old ones back", main=lambda a: light.main(*a)
        )
        assert not light.loaded
    prompts.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    with pytest.raises(Accepted):
        light.main(*argv)


@pytest.mark.parametrize("file", ["mean.py", "factor.py"])
def test_other_code_of_the_reward_is_noticed_and_may_be_meant(light, capsys, file):
    """The reward's file, or a module beside it; config.json notes the round."""
    argv = ["--resume", light.run]
    was = Path(file).read_text()
    Path(file).write_text(was + "x = 1\n")
    line = refused(capsys, argv, "other code of mean.py:score", main=lambda a: light.main(*a))
    assert line.endswith("--resume runs/a --reward mean.py:score") and not light.loaded
    Path(file).write_text(was)
    with pytest.raises(Accepted):
        light.main(*argv, "--reward", "mean.py:score")
    changes = lambda: json.loads((light.run / "config.json").read_text())["reward_changed"]
    assert changes() == []
    Path(file).write_text(was + "x = 1\n")
    with pytest.raises(Accepted):
        light.main(*argv, "--reward", "mean.py:score")
    assert changes() == ["after round 2"]
    Path("beside.py").write_text("a module that mean.py does not import")


def test_a_reward_whose_file_has_moved_is_the_same_one(light):
    Path("rewards").mkdir()
    for name in ("mean.py", "factor.py"):
        Path(name).rename(f"rewards/{name}")
    with pytest.raises(Accepted):
        light.main("--resume", light.run, "--reward", "rewards/mean.py:score")
    config = json.loads((light.run / "config.json").read_text())
    assert config["reward"] == "rewards/mean.py:score" and config["reward_changed"] == []


def test_a_repaired_reward_resumes_and_is_the_runs_from_then_on(moved, capsys):
    Path("factor.py").write_text("x = 1\n")
    run_main("--resume", moved, "--reward", "mean.py:score", "--rounds", 3)
    run_main("--resume", moved, "--rounds", 3)  # it is no news any more
    config = json.loads((moved / "config.json").read_text())
    assert config["reward_changed"] == ["after round 2"] and len(metrics(moved)) == 3


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


HEADER = {"rounds_done": 2, "history": {"a cat": [[0, [0.5, 1.0]]]}, "scaler": {}}
HEADER |= {"step_square": {"1": 0.5}, "fingerprint": {}}


def restored(folder, lora, optimizer):
    """`restore` of the checkpoint in `folder`: rounds done, normaliser, step weights, scaler."""
    normalise, weights = RewardNormaliser(), StepWeights("rms")
    scaler = torch.amp.GradScaler("cpu", 2.0**16, enabled=False)
    saved = read_safetensors(folder / CHECKPOINT)
    return restore(saved, lora, optimizer, scaler, normalise, weights), normalise, weights


def test_a_checkpoint_goes_on_as_if_nothing_had_happened(tmp_path):
    """Weights, both moments and the step count: the next step of AdamW is the same bit for bit."""
    lora, optimizer = two_layers(0)
    one_step(lora, optimizer)
    one_step(lora, optimizer)
    save_checkpoint(tmp_path, lora, optimizer, HEADER)
    again, other = two_layers(1)
    rounds_done, normalise, weights = restored(tmp_path, again, other)
    assert rounds_done == 2 and normalise.history == HEADER["history"]
    assert weights.square == HEADER["step_square"]
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
    restored(tmp_path, again, other)
    assert len(load_file(tmp_path / CHECKPOINT)) == 3
    assert not other.state and all(torch.equal(again[k], lora[k]) for k in lora)


def test_the_moments_come_back_beside_their_weights(tmp_path):
    """The count of steps stays on the CPU, as AdamW makes it."""
    lora, optimizer = two_layers(0)
    one_step(lora, optimizer)
    save_checkpoint(tmp_path, lora, optimizer, HEADER)
    there = {name: nn.Parameter(p.to("meta")) for name, p in two_layers(1)[0].items()}
    other = torch.optim.AdamW(there.values(), 0.1)
    restored(tmp_path, there, other)
    for state in other.state.values():
        devices = [state[name].device.type for name in ("step", "exp_avg", "exp_avg_sq")]
        assert devices == ["cpu", "meta", "meta"]
    assert len(other.state) == 3


def test_without_a_checkpoint_a_resume_begins_anew(light):
    lora, optimizer = two_layers(0)
    before = copy.deepcopy(lora)
    assert restore((None, None), lora, optimizer, None, None, None) == 0
    assert all(torch.equal(before[k], lora[k]) for k in lora)
    (light.run / CHECKPOINT).unlink()
    with pytest.raises(Accepted):
        light.main("--resume", light.run)
    assert metrics(light.run) == []


# ---------------------------------------------------------------- damaged files of a run


def text(file, words):
    """The whole file is these words."""
    return file, lambda path: path.write_text(words)


def cut(file, part):
    """Cut after `part` bytes, or after that share of them."""

    def change(path):
        whole = path.read_bytes()
        path.write_bytes(whole[: part if isinstance(part, int) else int(part * len(whole))])

    return file, change


def config(**changes):
    return "config.json", lambda path: edit(path, lambda whole: whole | changes)


def before(change):
    """`change`: of the list train in before.json."""
    return "before.json", lambda path: edit(path, lambda b: b | {"train": change(b["train"])})


def line(**changes):
    """The first line of metrics.jsonl is changed."""

    def change(path):
        first, *rest = path.read_text().splitlines()
        path.write_text("\n".join([json.dumps(json.loads(first) | changes), *rest]))

    return "metrics.jsonl", change


def checkpoint(change):
    def go(path):
        tensors, header = read_safetensors(path)
        change(tensors, header)
        write_safetensors(path, tensors, header)

    return CHECKPOINT, go


def header(**changes):
    return checkpoint(lambda tensors, header: header.update(changes))


def without(name):
    return checkpoint(lambda tensors, header: header.pop(name))


def weight(change):
    """`change`: of the first weight."""

    def go(tensors, header):
        name = min(k for k in tensors if ":" not in k)
        tensors[name] = change(tensors[name])

    return checkpoint(go)


def others(metadata):
    return CHECKPOINT, lambda path: save_file(load_file(path), path, metadata)


def drop(kind):
    def change(tensors, header):
        del tensors[min(k for k in tensors if k.startswith(kind))]

    return checkpoint(change)


def put_nan(values):
    values = values.clone()
    values.view(-1)[0] = math.nan
    return values


DAMAGES = {
    "config is empty": text("config.json", ""),
    "config is cut": cut("config.json", 0.5),
    "config is cut at its end": cut("config.json", 0.99),
    "config is nested": text("config.json", NESTED),
    "config is null": text("config.json", "null"),
    "config is a list": text("config.json", "[]"),
    "config is a text": text("config.json", '"text"'),
    "config is {}": text("config.json", "{}"),
    "config is of bytes": ("config.json", lambda path: path.write_bytes(b"\xff\xfe{}")),
    "model None": config(model=None),
    "model 3": config(model=3),
    "model list": config(model=["a"]),
    "rounds 0": config(rounds=0),
    "rounds text": config(rounds="many"),
    "T text": config(T="many"),
    "T list": config(T=[3]),
    "T None": config(T=None),
    "lr text": config(lr="fast"),
    "lr list": config(lr=[1e-3]),
    "lr nan": config(lr=math.nan),
    "lr inf": config(lr=math.inf),
    "lr negative": config(lr=-1),
    "lr other": config(lr=2e-4),
    "seed None": config(seed=None),
    "algo other": config(algo="ppo"),
    "no_bpt other": config(no_bpt=True),
    "no_bs text": config(no_bs="yes"),
    "precision other": config(precision="fp8"),
    "tau0 9": config(tau0=9),
    "queries -5": config(queries=-5),
    "image_size 2.5": config(image_size=2.5),
    "validation_prompt text": config(validation_prompt="a fox"),
    "validation_prompt list of numbers": config(validation_prompt=[3]),
    "device other": config(device="nowhere"),
    "device number": config(device=[]),
    "prompts number": config(prompts=3),
    "prompts lost": config(prompts="none.txt"),
    "reward lost": config(reward="none.py:score"),
    "reward unknown": config(reward="beauty"),
    "reward other": config(reward="jpeg"),
    "reward number": config(reward=3),
    "checkpoint is empty": cut(CHECKPOINT, 0),
    "checkpoint is cut in its header": cut(CHECKPOINT, 100),
    "checkpoint is cut": cut(CHECKPOINT, 0.5),
    "checkpoint is cut at its end": cut(CHECKPOINT, -9),
    "checkpoint of others": others(None),
    "checkpoint's header is cut": others({"run": "{cut"}),
    "checkpoint's header is a list": others({"run": "[]"}),
    "checkpoint's header is nested": others({"run": NESTED}),
    "checkpoint's header is empty": others({"other": "{}"}),
    "weight is NaN": weight(put_nan),
    "weight of another shape": weight(lambda values: values[:1]),
    "weight lost": drop("unet"),
    "rounds done as text": header(rounds_done="2"),
    "more rounds done": header(rounds_done=9),
    "fingerprint is a text": header(fingerprint="x"),
    "fingerprint is empty": header(fingerprint={}),
    **{f"header without {k}": without(k) for k in HEADER},
    "metrics hold a number": text("metrics.jsonl", "3\n"),
    "metrics hold a list": text("metrics.jsonl", "[]\n"),
    "metrics are of others": text("metrics.jsonl", "{}\n"),
    "metrics are nested": text("metrics.jsonl", NESTED),
    "round as text": line(round="1"),
    "round is null": line(round=None),
    "before is empty": text("before.json", ""),
    "before is cut": cut("before.json", 0.5),
    "before is null": text("before.json", "null"),
    "before is a list": text("before.json", "[]"),
    "before is {}": text("before.json", "{}"),
    "before without scores": before(lambda train: {"recognised": None}),
    "before has scores None": before(lambda train: train | {"score": None}),
    "before has fewer scores": before(lambda train: train | {"score": [0.5]}),
    "before has more scores": before(lambda train: train | {"score": [0.5] * 5}),
    "before is of lists": before(lambda train: [0.5, 0.5]),
}
DAMAGED = [pytest.param(*damage, id=name) for name, damage in DAMAGES.items()]


@pytest.mark.parametrize("file, change", DAMAGED)
def test_damaged_files_of_a_run_end_with_one_line(light, capsys, file, change):
    """It names the file, what is edited against the checkpoint before anything heavy is loaded."""
    change(light.run / file)
    refused(capsys, ["--resume", light.run], main=lambda argv: light.main(*argv))
    assert not light.loaded or file in ("before.json", CHECKPOINT)


@pytest.mark.parametrize(
    "name, was, now",
    [("lr", 1e-3, 2e-4), ("no_bpt", False, True), ("eta", 1.0, 0.5), ("seed", 0, 1)],
)
def test_settings_that_were_edited_are_named(light, capsys, name, was, now):
    edit(light.run / "config.json", lambda config: config | {name: now})
    words = (CHECKPOINT, f"{name} {was}", f"config.json says {now}")
    refused(capsys, ["--resume", light.run], *words, main=lambda argv: light.main(*argv))
    assert not light.loaded


def test_flipped_bytes_in_the_header_of_a_checkpoint(light, capsys):
    """Told in one line that names it, or in a place where it says the same."""
    path, numbers, ends = light.run / CHECKPOINT, random.Random(0), []
    whole = path.read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    cfg = parsed("--resume", light.run)
    mark = fingerprint(vars(cfg), rewards.reward_code(cfg.reward))
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[numbers.choice([numbers.randrange(length), numbers.randrange(8)])] ^= 1 << 4
        path.write_bytes(damaged)
        lora = train.inject_lora(None, 4, seed=0)
        optimizer, scaler = torch.optim.AdamW(lora.values()), torch.amp.GradScaler(enabled=False)
        try:
            saved = run_folder.read_checkpoint(cfg, mark)
            restore(saved, lora, optimizer, scaler, RewardNormaliser(), StepWeights("rms"))
            ends.append(0)
        except SystemExit as stop:
            err = capsys.readouterr().err
            assert CHECKPOINT in err or "was trained" in err or "rounds" in err
            assert err.count("\n") == 1
            ends.append(stop.code)
    assert ends.count(2) > 40 and set(ends) <= {0, 2}


# ---------------------------------------------------------------- what is lost comes back


def test_a_run_whose_grids_are_lost_ends_well(moved, project):
    """Before and after are drawn again, the same; nothing else changes."""
    shutil.rmtree(moved / "grids")
    (moved / "metrics.jsonl").write_bytes(b"")
    assert run_main("--resume", moved) == moved
    for name in ("before-train", "after-train", "after-unseen"):
        was = (project / moved / f"grids/{name}.png").read_bytes()
        assert (moved / f"grids/{name}.png").read_bytes() == was
    assert (moved / "after.json").read_bytes() == (project / moved / "after.json").read_bytes()


def test_a_finished_run_without_metrics_resumes(moved, monkeypatch):
    (moved / "metrics.jsonl").unlink()
    monkeypatch.setattr(train, "draw_lists", lambda *rest: read_json(moved / "after.json"))
    assert run_main("--resume", moved) == moved
    assert run_folder.read_metrics(moved) == []


def test_a_resumed_run_mends_its_metrics(moved):
    path = moved / "metrics.jsonl"
    path.write_text(path.read_text()[:-30])
    run_main("--resume", moved, "--rounds", 3)
    assert [m["round"] for m in metrics(moved)] == [1, 3]


def a_line(round, **more):
    return {"round": round, "queries": 6 * round, "reward_mean": 0.5} | more


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    text = "".join(json.dumps(a_line(i)) + "\n" for i in (1, 2, 3, 4))
    path.write_text(text)
    run_folder.keep_metrics(tmp_path, 4)
    assert path.read_text() == text
    run_folder.keep_metrics(tmp_path, 3)  # a stop between metrics and checkpoint
    assert path.read_text() == "".join(text.splitlines(True)[:3])
    path.write_text(text[:-20])
    run_folder.keep_metrics(tmp_path, 4)
    assert [m["round"] for m in metrics(tmp_path)] == [1, 2, 3]
    path.unlink()
    run_folder.keep_metrics(tmp_path, 3)
    assert path.read_text() == ""


def test_metrics_keep_whole_lines_and_each_round_once(tmp_path):
    whole = [a_line(2), a_line(1), a_line(2, kept=3)]
    lines = [json.dumps(each) for each in whole] + ["{cut", ""]
    (tmp_path / "metrics.jsonl").write_bytes("\n".join(lines).encode() + b"\n\xff\xfe\n")
    run_folder.keep_metrics(tmp_path, 3)
    assert metrics(tmp_path) == [a_line(1), a_line(2, kept=3)]
    assert run_folder.read_metrics(tmp_path / "none") == []


def test_metrics_are_strict_json(tmp_path):
    values = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.5, "e": [1], "f": 3}
    run_folder.append_metrics(tmp_path, values)
    run_folder.append_metrics(tmp_path, a_line(1))
    wanted = {"a": None, "b": None, "c": None, "d": 0.5, "e": [1], "f": 3}
    assert metrics(tmp_path) == [wanted, a_line(1)]


# ---------------------------------------------------------------- how a run stops


@pytest.mark.parametrize(
    "problem, code, words",
    [
        (Stop("the reward"), 2, "error: the reward."),
        (KeyboardInterrupt(), 130, "Stopped. Finished rounds are saved."),
        (torch.OutOfMemoryError("x"), 2, "out of GPU memory: lower --micro-batch"),
        (OSError(errno.ENOSPC, "No space left"), 2, "cannot write to {}: No space left."),
        (OSError("strange"), 2, "cannot write to {}: strange."),
    ],
)
def test_a_stop_ends_with_the_reason_and_the_command_that_goes_on(
    tmp_path, capsys, monkeypatch, problem, code, words
):
    """A shell reads the command as it is meant."""
    folder = tmp_path / "a cat's; run"

    def stop():
        with pytest.raises(SystemExit) as end, run_folder.resumable(str(folder)):
            raise problem
        assert end.value.code == code
        return capsys.readouterr().err

    quoted = f"""'{tmp_path}/a cat'"'"'s; run'"""
    said = stop()
    assert words.format(folder) in said and said.strip().count("\n") == 0
    assert said.endswith(f"To go on: python train.py --resume {quoted}\n")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert stop().endswith(f"To go on: torchrun --nproc_per_node 2 train.py --resume {quoted}\n")
    monkeypatch.setenv("RANK", "1")
    assert (stop() == "") == (code == 130), "one process speaks of a stop"


def test_scores_beyond_all_bounds_end_with_one_line(command, tmp_path, capsys):
    """3e38 is a number, but a sum of a few is none."""
    flags = ["--T", 2, "--tau0", 1, "--queries", 3, "--eval-prompts", 0, "--rounds", 1]
    huge = lambda images, prompts: torch.full((len(images),), 3e38)
    main = lambda argv: command(tmp_path / "run", *flags, reward=huge)
    line = refused(capsys, [], "reward brightness returned 3", "for the prompt 'a", main=main)
    assert line.endswith(f"To go on: python train.py --resume {tmp_path}/run")


def test_a_full_disk_ends_with_a_line_and_keeps_the_last_checkpoint(moved, capsys, monkeypatch):
    """In the middle of round 2's checkpoint; resumed, the run ends with the same bytes."""
    real, calls = Path.write_bytes, []

    def full(path, data):
        calls.append(path)
        if len(calls) == 2:
            real(path, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    line = refused(capsys, [*FLAGS, "--out", "b/a"], "cannot write to b/a: No space left on device")
    assert line.endswith("To go on: python train.py --resume b/a")
    assert str(calls[1]) == f"b/a/{CHECKPOINT}.part"
    monkeypatch.setattr(Path, "write_bytes", real)
    run_main("--resume", "b/a")
    assert_same_run("b/a", moved)


def test_the_code_of_a_card_draws(project):
    """As it stands, with the two paths put in: the picture is that of the run's own steps."""
    card = (project / "runs/a/README.md").read_text(encoding="utf-8")
    code = card.split("```python\n")[1].split("```")[0]
    code = code.replace("PATH OF model", str(project / "model"))
    code = code.replace("THIS REPOSITORY OR FOLDER", str(project / "runs/a"))
    names = {}
    exec(code.replace("\npipe(", "\npicture = pipe(").replace(".images[0]", ".images"), names)
    assert names["picture"][0].size == (32, 32) and names["pipe"].scheduler.config.steps_offset == 1
    assert "before-after.png" in card
