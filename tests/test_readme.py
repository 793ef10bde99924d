"""The README's map from equations to functions, and its commands, can not rot."""

import importlib
import inspect
import re
import shlex

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "results/README.md").read_text(encoding="utf-8")
# Flags outside of commands of ours: of torchrun, TensorBoard, pip and this suite
OTHERS = {"--help", "--nproc", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--logdir", "--kills",
          "--full-size"}  # fmt: skip


def test_every_function_of_the_map_lives_in_its_file():
    rows = [x for x in README.splitlines() if re.match(r"\| (Eq|App|Table|Fig|Alg|Sec|LoRA)", x)]
    assert len(rows) >= 20
    for row in rows:
        _, names, files, _ = (cell for cell in re.split(r" ?\| ?", row)[1:])
        modules = [importlib.import_module(f[:-3]) for f in re.findall(r"`(\w+\.py)`", files)]
        for name in re.findall(r"`(\w+)`", names):
            found = [getattr(module, name) for module in modules if hasattr(module, name)]
            assert found, f"{name} is not in {files}"
            if inspect.isfunction(found[0]) or inspect.isclass(found[0]):
                assert found[0].__module__ in [m.__name__ for m in modules], f"{name}: {files}"


def test_equations_1_to_9_are_in_the_map():
    rows = " ".join(re.findall(r"^\| (Eq\.[^|]*)", README, re.M))
    assert {int(n) for n in re.findall(r"\b([1-9])\b(?!²)", rows)} >= set(range(1, 10))


def test_every_trap_that_is_cited_is_listed():
    listed = {int(n) for n in re.findall(r"^(\d+)\. \*\*", README, re.M)}
    files = [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py"), ROOT / "README.md"]
    cited = {int(n) for f in files for n in re.findall(r"trap (\d+)", f.read_text(encoding="utf-8"))}
    assert listed == set(range(1, 13)) and cited <= listed and len(cited) > 5


def commands():
    """(file, words) of every `python FILE.py ...` or `torchrun ... FILE.py ...` in the texts."""
    found = []
    for text in (README, RESULTS):
        for code in re.findall(r"`([^`]+)`|^    (.+)$", text, re.M):
            code = " ".join("".join(code).split())
            for part in re.split(r"&&|, then ", code):
                words = re.match(r"(?:python|torchrun\b.*?) ([\w/]+\.py)(.*)", part.strip())
                if words and "..." not in part:
                    found.append((words[1], shlex.split(words[2].split("  #")[0])))
    return found


@pytest.mark.parametrize("file, words", commands())
def test_every_command_is_understood(file, words, tmp_path, monkeypatch):
    """By the parser of its own script; what it would run or load is not touched."""
    module = importlib.import_module({"results/run_all.py": "results.run_all"}.get(
        file, file.removesuffix(".py").replace("/", ".")))  # fmt: skip
    monkeypatch.chdir(tmp_path)
    if file in ("train.py", "eval.py") and not {"--resume", "--help"} & set(words):
        (tmp_path / "my_reward.py").write_text("def score(images, prompts):\n    return []\n")
        (tmp_path / "brightness.py").write_text("def score(images, prompts):\n    return []\n")
        words = [w for w in words if w != "--tensorboard"]
        module.parse_args(words)
        return
    source = inspect.getsource(module)
    if file in ("bench.py", "results/gradient_signal.py"):  # hand what they do not know to train.py
        source += inspect.getsource(importlib.import_module("train"))
        source += inspect.getsource(importlib.import_module("runs"))
    for flag in (w for w in words if w.startswith("--")):
        assert f'"{flag}"' in source or f'("{flag[2:].replace("-", "_")}"' in source or (
            flag in ("--help", "--resume")), (file, flag)  # fmt: skip


def test_the_commands_are_found():
    files = [file for file, _ in commands()]
    assert len(files) > 40 and {"train.py", "eval.py", "bench.py", "tiny.py", "results/run_all.py",
                                "results/gradient_signal.py"} <= set(files)  # fmt: skip


def test_every_flag_named_in_the_readme_exists():
    files = ("train.py", "runs.py", "eval.py", "tiny.py", "bench.py", "results/run_all.py")
    sources = "".join((ROOT / f).read_text(encoding="utf-8") for f in files)
    import train

    settings = {f"--{name.replace('_', '-')}" for name, *_ in train.SETTINGS}
    for flag in set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", README)) - OTHERS:
        assert flag in settings or f'"{flag}"' in sources, flag
