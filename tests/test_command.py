"""The commands: flags that are refused, and the order in which the files import one another."""

import ast
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import eval as evaluation
import run_folder
import train

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
    for name in ("load_model", "load_reward", "load_judge"):
        monkeypatch.setattr(train, name, heavy)
    for name in ("load_model", "load_reward", "load_judge"):
        monkeypatch.setattr(evaluation, name, heavy)


LONG = "x" * 300
WHOLE = "rounds queries epochs update-size rank sample-batch micro-batch decode-batch eval-images"
REFUSED = [
    (["--reward", "beauty"], ["unknown --reward beauty", "clip"]),
    (["--algo", "ppo"], ["unknown --algo ppo", "ddpo"]),
    (["--template", 4], ["--template", "4"]),
    (["--template", "one"], ["--template", "one"]),
    (["--interval", "middle"], ["--interval", "middle"]),
    (["--precision", "fp8"], ["--precision", "fp8"]),
    (["--prediction-type", "sample"], ["--prediction-type", "sample"]),
    (["--device", "nowhere"], ["--device nowhere"]),
    (["--learning-rate", 1], ["--learning-rate", "--lr"]),
    (["--query", 8], ["--query"]),
    (["--tau0", 0], ["--tau0"]),
    (["--tau0", 21], ["--tau0 21", "1..T = 20"]),
    (["--tau0", 14, "--T", 10], ["--tau0 14", "1..T = 10"]),
    (["--tau0", -3], ["--tau0"]),
    (["--tau-rounds", 0], ["--tau-rounds"]),
    (["--branches", 1], ["--branches", "--no-bs"]),
    (["--branches", 0], ["--branches"]),
    (["--branches", -3], ["--branches"]),
    (["--queries", 2, "--branches", 3], ["--queries 2", "--branches 3"]),
    (["--eta", 0], ["--eta"]),
    (["--eta", -1], ["--eta"]),
    (["--eta", 1.001], ["--eta", "at most 1"]),
    (["--lr", 0], ["--lr"]),
    (["--lr", "fast"], ["--lr", "fast"]),
    (["--clip-range", -1e-4], ["--clip-range"]),
    (["--rounds", "2.5"], ["--rounds", "2.5"]),
    (["--threshold", -1], ["--threshold"]),
    (["--threshold", 6], ["--threshold", "--adv-clip"]),
    (["--threshold", 5], ["--threshold", "--adv-clip"]),
    (["--window", -1], ["--window"]),
    (["--min-count", -1], ["--min-count"]),
    (["--save-every", -1], ["--save-every"]),
    (["--eval-prompts", -1], ["--eval-prompts"]),
    (["--T", 1000], ["--T must be at most 999"]),
    (["--T", 0], ["--T"]),
    (["--algo", "dpo", "--micro-batch", 1], ["--micro-batch 2"]),
    (["--image-size", 0], ["--image-size"]),
    (["--image-size", -64], ["--image-size"]),
    (["--image-size", 10**30], ["--image-size"]),
    (["--preset", "12gb"], ["--preset", "16gb"]),
    (["--beta1", 1.5], ["--beta1"]),
    (["--beta1", 1], ["--beta1"]),
    (["--beta2", -0.1], ["--beta2"]),
    (["--beta2", 1], ["--beta2"]),
    (["--adam-eps", -1], ["--adam-eps"]),
    (["--weight-decay", -1], ["--weight-decay"]),
    (["--guidance", -1], ["--guidance"]),
    (["--threads", 0], ["--threads"]),
    (["--threads", 10**30], ["--threads"]),
    (["--max-grad-norm", -1], ["--max-grad-norm"]),
    (["--seed", 2**63], ["--seed"]),
    (["--seed", -(2**63)], ["--seed"]),
    (["--seed", "9" * 5000], ["--seed"]),
    (["--seed", 1.5], ["--seed"]),
    (["--queries", 2**63], ["--queries"]),
    (["--queries", 10**400], ["--queries"]),
    (["--report-to", "paper"], ["paper"]),
    (["--validation-prompt", " "], ["--validation-prompt is empty"]),
    (["--prompts", LONG], ["cannot read the prompt file", LONG]),
    (["--reward", f"{LONG}.py:score"], ["--reward", LONG]),
    (["--reward", LONG], ["unknown --reward"]),
    (["--resume", LONG], [LONG, "holds no run"]),
    (["--out", LONG], ["cannot write to", LONG]),
    *([["--" + name, value], ["--" + name]] for name in WHOLE.split() for value in (0, -2)),
    *([["--lr", value], ["--lr"]] for value in ("nan", "inf", "-inf", "1e999")),
    *([["--eta", value], ["--eta"]] for value in ("nan", "inf")),
    *([["--guidance", value], ["--guidance"]] for value in ("nan", "inf")),
    *([["--dpo-beta", value], ["--dpo-beta"]] for value in ("nan", "inf", -1)),
]


@pytest.mark.parametrize("flags, parts", REFUSED, ids=lambda v: str(v)[:40])
def test_flags_that_are_refused(light, capsys, flags, parts):
    model = [] if "--resume" in flags else ["--model", "none", "--device", "cpu"]
    refused(capsys, [*model, *flags], *parts)


def test_a_model_of_a_long_name_ends_with_one_line(monkeypatch, capsys, tmp_path):
    """In both commands; a folder under runs/ can still be named after it."""
    monkeypatch.chdir(tmp_path)
    for main in (train.main, evaluation.main):
        refused(capsys, ["--model", LONG, "--device", "cpu"], "cannot load", LONG, main=main)
    name = "é" * 120
    (tmp_path / f"{name}.txt").write_text("a cat\n")
    argv = ["--model", "none", "--device", "cpu", "--prompts", f"{name}.txt"]
    out = train.parse_args(argv).out
    (tmp_path / out).mkdir(parents=True)  # at most 255 bytes for the system
    assert out.startswith("runs/none-clip-éé") and not run_folder.holds_run(out)


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
        assert f"{drawn} queries ({drawn // 4} roots x 4 branches)" in train.first_lines(cfg, "", 1)
    assert train.parse_args([*argv, "10", "--no-bs"]).queries == 10


def test_a_folder_that_holds_a_run_is_not_overwritten(light, capsys, tmp_path):
    """One whose run failed while it loaded has a config.json alone, and may be begun again."""
    argv = ["--model", "none", "--device", "cpu", "--out", tmp_path]
    (tmp_path / "config.json").write_text("{}")
    train.parse_args([str(a) for a in argv])
    for name in ("metrics.jsonl", "before.json", "checkpoint.safetensors"):
        (tmp_path / name).write_text("")
        train.parse_args([str(a) for a in argv])
        (tmp_path / name).write_text("{}")
        refused(capsys, argv, "holds a run", f"--resume {tmp_path}", "--out")
        (tmp_path / name).unlink()
    assert (tmp_path / "config.json").read_text() == "{}"


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


# ---------------------------------------------------------------- who imports whom

# Each file imports from lower rows alone, or from its own row. Top first.
ORDER = (
    ("studies",),
    ("tiny/build.py",),
    ("tiny/bars.py",),
    ("tiny/networks.py",),
    ("tiny/samplers.py",),
    ("tiny/pictures.py", "tiny/training.py"),
    ("train.py",),
    ("eval.py",),
    ("rewards.py",),
    ("own_reward.py",),
    ("report.py",),
    ("run_folder.py",),
    ("prompts.py",),
    ("files.py",),
    ("model.py",),
    ("processes.py",),
    ("tiny/recognise.py",),
    ("tiny/world.py",),
    ("tiny/sprites.py",),
    ("b2rl.py", "ddim_logprob.py", "lora.py"),
)


def row_of(file):
    for row, names in enumerate(ORDER):
        if file in names or file.split("/")[0] in names:
            return row
    return None


def source_files():
    """Our files of Python outside the tests, by path: those that git knows, where it is."""
    git = ["git", "-C", str(ROOT), "ls-files", "*.py"]
    try:
        found = subprocess.run(git, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        found = [str(f.relative_to(ROOT)) for f in (*ROOT.glob("*.py"), *ROOT.glob("*/*.py"))]
    return sorted(f for f in found if not f.startswith(("tests/", ".")) and (ROOT / f).exists())


def imports(file, files):
    """The files of ours that `file` imports anywhere, inside functions too."""
    modules = {f.removesuffix(".py").replace("/", "."): f for f in files}
    folder = file.rpartition("/")[0]
    modules |= {f[len(folder) + 1 : -3]: f for f in files if folder and f.startswith(folder + "/")}
    names = []
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return {modules[name] for name in names if name in modules} - {file}


def circle(graph):
    """The files of a circle of imports, or None."""
    done = set()

    def visit(file, way):
        if file in way:
            return way[way.index(file) :]
        if file not in done:
            done.add(file)
            for other in sorted(graph[file]):
                if found := visit(other, [*way, file]):
                    return found
        return None

    return next(filter(None, (visit(file, []) for file in graph)), None)


def test_imports_go_downwards():
    files = source_files()
    assert len(files) > 15 and {"train.py", "model.py", "tiny/world.py"} <= set(files)
    without = [file for file in files if row_of(file) is None]
    assert not without, f"which row of ORDER is theirs? {without}"
    graph = {file: imports(file, files) for file in files}
    assert {"b2rl.py", "model.py", "run_folder.py"} <= graph["train.py"], "arrows are found"
    upwards = [(a, b) for a in files for b in graph[a] if row_of(b) < row_of(a)]
    assert not upwards, f"imports upwards: {upwards}"
    assert circle(graph) is None


def test_a_circle_is_found():
    """Of three files as of two, and none where two ways lead to one file."""
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    assert circle({"a": {"b"}, "b": {"a"}}) == ["a", "b"]
    assert circle({"a": {"b", "c"}, "b": {"d"}, "c": {"d"}, "d": set()}) is None


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
    assert said.startswith("Training the bundled tiny model on cpu") and "--model" in said
    assert "train   clip" in said and "unseen  judge" in said and f"--lora {run}" in said
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["tau"] for line in lines] == [2, 4]
    assert lines[0]["first_max_log_ratio"] <= 0.01 * 1e-3
    for name in ("before-train", "before-unseen", "after-train", "after-unseen"):
        assert (run / "grids" / f"{name}.png").stat().st_size > 1000
    argv = ["--lora", str(run), "--prompt", "a cat washing dishes", "--images", "2"]
    evaluation.main([*argv, "--out", str(tmp_path / "eval")])
    assert "| base |" in capsys.readouterr().out
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
