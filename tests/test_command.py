"""The commands: flags that are refused, and the order in which the files import one another."""

import json
import os
import shlex
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from PIL import Image

import eval as evaluation
import train
from support import report
from support.command import Parser, first_line, positive

# ---------------------------------------------------------------- train.py's flags


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


@pytest.fixture
def light(monkeypatch, tmp_path):
    """Nothing heavy may be reached, and nothing is written into the repository."""

    def heavy(*_, **__):
        raise AssertionError("something heavy was loaded before the input was checked")

    monkeypatch.chdir(tmp_path)
    for name in ("load_pipeline", "load_reward", "find_judge"):
        monkeypatch.setattr(train, name, heavy)
        monkeypatch.setattr(evaluation, name, heavy)


LONG = "x" * 300
POSITIVE = "tau0 rounds queries epochs update-size rank sample-batch micro-batch decode-batch "
POSITIVE += "eval-images grid-every lr clip-range adv-clip max-grad-norm adam-eps branches"
NOT_NEGATIVE = "threshold window min-count save-every eval-prompts beta1 beta2 kl-beta dpo-beta "
NOT_NEGATIVE += "guidance weight-decay"
NUMBERS = "eta guidance lr threshold weight-decay clip-range dpo-beta kl-beta beta1 adam-eps"
REFUSED = [
    (["--reward", "beauty"], ["unknown --reward beauty", "clip"]),
    (["--algo", "ppo"], ["--algo", "'ppo'", "ddpo"]),
    (["--template", 4], ["--template", "4"]),
    (["--template", "one"], ["--template", "one"]),
    (["--precision", "fp8"], ["--precision", "fp8"]),
    (["--prediction-type", "sample"], ["--prediction-type", "sample"]),
    (["--device", "nowhere"], ["--device nowhere"]),
    (["--model", ""], ["--model is empty"]),
    (["--tau0", 21], ["--tau0 must be at most --T"]),
    (["--tau0", 14, "--T", 10], ["--tau0 must be at most --T"]),
    (["--tau-rounds", 0], ["--tau-rounds"]),
    (["--branches", 1], ["--branches", "--no-bs"]),
    (["--queries", 2, "--branches", 3], ["--queries must be at least --branches"]),
    (["--eta", 0], ["--eta"]),
    (["--eta", -1], ["--eta"]),
    (["--eta", 1.001], ["--eta", "to 1"]),
    (["--lr", "fast"], ["--lr", "fast"]),
    (["--rounds", "2.5"], ["--rounds", "2.5"]),
    (["--T", 1000], ["--T goes from 1 to 999"]),
    (["--T", 0], ["--T goes from 1 to 999"]),
    (["--algo", "dpo", "--micro-batch", 1], ["--micro-batch 2"]),
    (["--image-size", 0], ["--image-size"]),
    (["--image-size", 10**30], ["--image-size"]),
    (["--beta1", 1], ["--beta1"]),
    (["--beta2", 1], ["--beta2"]),
    (["--threads", 0], ["--threads"]),
    (["--threads", 10**30], ["--threads"]),
    (["--seed", 1.5], ["--seed"]),
    (["--queries", 2**63], ["--queries"]),
    (["--queries", 10**400], ["--queries"]),
    (["--report-to", "paper"], ["paper", "tensorboard"]),
    (
        ["--validation-prompt", "a cat", "--validation-prompt", " "],
        ["--validation-prompt is empty"],
    ),
    (["--prompts", LONG], ["cannot read the prompt file", LONG]),
    (["--reward", f"{LONG}.py:score"], ["--reward", LONG]),
    (["--reward", LONG], ["unknown --reward"]),
    (["--resume", LONG], [LONG, "holds no run"]),
    (["--out", LONG], ["cannot write to", LONG]),
    *([["--" + name, 0], ["--" + name]] for name in POSITIVE.split()),
    *([["--" + name, -1], ["--" + name]] for name in (POSITIVE + " " + NOT_NEGATIVE).split()),
    *(
        [["--" + name, value], ["--" + name]]
        for name in NUMBERS.split()
        for value in ("nan", "inf")
    ),
    # flags that other trainers have, and those of an earlier version
    (["--learning-rate", 1], ["--learning-rate"]),
    (["--interval", "middle"], ["--interval"]),
    (["--query", 8], ["--query"]),
]


@pytest.mark.parametrize("flags, parts", REFUSED, ids=lambda v: str(v)[:40])
def test_flags_that_are_refused(light, capsys, flags, parts):
    model = [] if "--resume" in flags else ["--model", "none", "--device", "cpu"]
    refused(capsys, [*model, *flags], *parts)


def test_zero_is_fine_where_it_says_something(light):
    """And every default passes its own check."""
    flags = [word for name in NOT_NEGATIVE.split() for word in (f"--{name}", "0")]
    args = train.parse_args(["--model", "none", "--device", "cpu", *flags])
    assert {getattr(args, name.replace("-", "_")) for name in NOT_NEGATIVE.split()} == {0}


@pytest.mark.parametrize(
    "wrong, near",
    [
        ("--epoch", "--epochs"),
        ("--promts", "--prompts"),
        ("--clip_rnage", "--clip-range"),
        ("--no-bpts=1", "--no-bpt"),
        ("--updatesize", "--update-size"),
        ("--xyz", None),
        ("--num_epochs", None),  # elsewhere it means our --rounds
        ("--wandb", None),
    ],
)
def test_a_wrong_flag_names_the_nearest(light, capsys, wrong, near):
    line = refused(capsys, [wrong, 3])
    assert line.endswith(f"; did you mean {near}? (see --help)" if near else " (see --help)")
    assert wrong.replace("_", "-") in line and ("did you mean" in line) == bool(near)


def test_flags_may_have_underscores(light):
    """Before the = alone: a value keeps its own. A beginning of a flag is no flag."""
    argv = [
        "--model",
        "none_of_it",
        "--device",
        "cpu",
        "--clip_range=0.25",
        "--update_size",
        "8",
        "--no_bpt",
    ]
    args = train.parse_args([*argv, "--out=a_b-c", "--reward=jpeg"])
    assert (args.clip_range, args.update_size, args.no_bpt) == (0.25, 8, True)
    assert (args.out, args.model) == ("a_b-c", "none_of_it")
    with pytest.raises(SystemExit):
        train.parse_args([*argv, "--update", "8"])


def test_the_parser_reads_the_command_line_where_it_is_given_none(monkeypatch):
    parser = Parser("words")
    parser.add_argument("--a-b")
    monkeypatch.setattr(sys, "argv", ["x.py", "--a_b", "c_d"])
    assert parser.parse_args().a_b == "c_d" and parser.parse_args([]).a_b is None


def test_positive_is_a_whole_number_that_a_machine_can_count_to():
    assert [positive(text) for text in ("1", "32767", " 7 ")] == [1, 32767, 7]
    for text in ("0", "-1", "32768", "1.5", "x", ""):
        with pytest.raises(ValueError):
            positive(text)
    assert positive.__name__ == "positive"  # argparse says: invalid positive value


def test_the_first_line_of_a_problem():
    assert first_line(ValueError("no\nluck")) == "ValueError: no"
    assert first_line(KeyError("x")) == "KeyError: 'x'"
    assert first_line(SystemExit()) == "SystemExit()"
    assert first_line(OSError("\n\nlate\n")) == "OSError: late"
    assert first_line(ValueError("b" * 999)) == "ValueError: " + "b" * 188


def test_a_home_is_the_users(light, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    argv = ["--model", "none", "--device", "cpu"]
    for flags in (["--out=~/x"], ["--out", "~/x"]):
        assert train.parse_args([*argv, *flags]).out == f"{tmp_path}/x"
        assert evaluation.parse_args([*argv, *flags]).out == f"{tmp_path}/x"


def test_a_default_folder_can_be_made(monkeypatch, tmp_path):
    """At most 255 bytes for the system, and a letter of two is not cut in the middle."""
    monkeypatch.chdir(tmp_path)
    name = "é" * 120
    (tmp_path / f"{name}.txt").write_text("a cat\n")
    argv = ["--model", "none", "--device", "cpu", "--prompts", f"{name}.txt"]
    out = train.parse_args(argv).out
    (tmp_path / out).mkdir(parents=True)
    assert out.startswith("runs/none-clip-éé")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is there")
def test_a_device_that_is_not_there(light, capsys):
    refused(capsys, ["--model", "none", "--device", "cuda"], "--device cuda", "cpu")


def test_queries_are_those_that_are_drawn(tmp_path, monkeypatch):
    """Whole roots: 10 queries with 4 branches are 8, and the first lines say so."""
    monkeypatch.chdir(tmp_path)
    argv = ["--model", "none", "--device", "cpu", "--branches", "4", "--queries"]
    for queries, drawn in ((10, 8), (8, 8), (4, 4), (4095, 4092)):
        cfg = train.parse_args([*argv, str(queries)])
        assert cfg.queries == drawn
        assert f"{drawn} queries (roots of 4 branches)" in report.first_lines(cfg, "x", 1)
    assert train.parse_args([*argv, "10", "--no-bs"]).queries == 10


def test_a_folder_that_holds_anything_but_a_failed_run_is_refused(light, capsys, tmp_path):
    """One whose run failed while it loaded has a config.json alone, and may be begun again."""
    argv = ["--model", "none", "--device", "cpu", "--out", tmp_path / "it's"]
    train.parse_args([str(a) for a in argv])  # nothing there
    (tmp_path / "it's").mkdir()
    train.parse_args([str(a) for a in argv])  # empty
    (tmp_path / "it's/README.md").write_text("mine")
    refused(capsys, argv, "it's holds files that are no run's: take another --out")
    (tmp_path / "it's/README.md").unlink()
    (tmp_path / "it's/config.json").write_text("{}")
    train.parse_args([str(a) for a in argv])
    for name in ("before.json", "checkpoint.safetensors"):
        (tmp_path / "it's" / name).write_text("")
        line = refused(capsys, argv, "holds a run", "--out NEW")
        words = shlex.split(line.partition("holds a run: ")[2].partition(", or")[0])
        assert words == ["--resume", f"{tmp_path}/it's"]
        (tmp_path / "it's" / name).unlink()
    assert (tmp_path / "it's/config.json").read_text() == "{}"


def test_input_is_checked_without_the_heavy_libraries(tmp_path):
    """Flags, and a run folder that is damaged."""
    (tmp_path / "config.json").write_text('{"model": "none", "rounds": 2, "T": "many"}')
    code = """
import sys, train
for argv in (["--tau0", "0", "--device", "cpu"], ["--resume", sys.argv[1]]):
    try:
        train.main(argv)
    except SystemExit as stop:
        print(stop.code, {"diffusers", "transformers", "open_clip"} & sys.modules.keys())
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "2 set()\n" * 2, done.stderr
    assert len(done.stderr.splitlines()) == 2


# ---------------------------------------------------------------- the bundled model, whole

needs_tiny = pytest.mark.skipif(
    not (ROOT / "tiny" / "model_index.json").exists(), reason="the tiny model is not built"
)


@needs_tiny
def test_the_readme_command_trains_scores_and_draws(tmp_path, capsys):
    run = tmp_path / "run"
    argv = ["--reward", "clip", "--template", "1", "--model", "tiny", "--device", "cpu"]
    argv += ["--out", str(run), "--rounds", "2", "--queries", "16", "--T", "4", "--tau0", "2"]
    argv += ["--eval-images", "1", "--update-size", "4"]
    train.main([*argv, "--eval-prompts", "4"])
    said = capsys.readouterr().out
    assert said.startswith(f"Training the bundled tiny model on cpu (fp32, processes: 1).\n{run}:")
    assert "train   clip" in said and "unseen  judge" in said and f"--lora {run}" in said
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["tau"] for line in lines] == [2, 4]
    assert lines[0]["first_max_log_ratio"] <= 0.01 * 1e-3
    for name in ("before-train", "before-unseen", "after-train", "after-unseen"):
        assert (run / "grids" / f"{name}.png").stat().st_size > 1000
    assert Image.open(run / "before-after.png").width > 1000
    last = [line for line in said.splitlines() if line.startswith("Draw: ")]
    argv = shlex.split(last[0])[3:]  # what it says is what is run
    assert argv[:2] == ["--lora", str(run)] and last[0].startswith("Draw: python eval.py ")
    evaluation.main([*argv, "--images", "2", "--out", str(tmp_path / "eval")])
    said = capsys.readouterr().out
    assert "| model | CLIPScore | recognised |" in said and "| base |" in said
    assert (tmp_path / "eval" / "grid.png").exists()


@needs_tiny
def test_the_tiny_pipeline_draws_in_diffusers_alone():
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(ROOT / "tiny")
    pipe.set_progress_bar_config(disable=True)
    settings = dict(num_inference_steps=4, eta=1.0, guidance_scale=5.0, output_type="pt")
    noise = torch.Generator().manual_seed(0)
    image = pipe("a cat washing dishes", generator=noise, **settings).images
    assert image.shape == (1, 3, 64, 64) and image.std() > 0.02


@pytest.mark.parametrize(
    "theirs, found",
    [
        ({}, ["PASSIVE", "2000"]),
        ({"GOMP_SPINCOUNT": "7"}, ["PASSIVE", "7"]),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, ["ACTIVE", None]),
        ({"OMP_WAIT_POLICY": "passive"}, ["passive", None]),
    ],
)
def test_threads_that_wait_sleep_soon_unless_the_user_says_otherwise(theirs, found):
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    env = {name: value for name, value in os.environ.items() if name not in names} | theirs
    code = f"import support, os, json; print(json.dumps([os.environ.get(n) for n in {names}]))"
    shown = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=env)
    assert json.loads(shown) == found


@pytest.mark.parametrize("command", ["train", "eval", "studies.bench", "tiny.build.__main__"])
def test_every_command_sets_them_before_torch_is_imported(command):
    code = "import sys; sys.modules['torch'] = None\ntry: import {}\nexcept ImportError: pass\n"
    code = code.format(command) + "import os; print(os.environ['GOMP_SPINCOUNT'])"
    env = {name: value for name, value in os.environ.items() if "OMP_" not in name}
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=env) == b"2000\n"
