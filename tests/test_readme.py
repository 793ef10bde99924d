"""The README's map from equations to functions, and every command of the texts, can not rot."""

import argparse
import importlib
import inspect
import re
import runpy
import shlex
import sys

import pytest
from conftest import ROOT

import train

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
PAGES += [ROOT / "results/README.md", ROOT / "tiny/README.md"]
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
README = TEXTS["README.md"]
# Flags of others: of torchrun, pip and this suite
OTHERS = {"--nproc", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--index-url"}
OTHERS |= {"--help", "--kills", "--full-size"}


# ---------------------------------------------------------------- the map


def test_every_function_of_the_map_lives_in_its_file():
    rows = [x for x in README.splitlines() if re.match(r"\| (Eq|App|Table|Fig|Alg|Sec|LoRA)", x)]
    assert len(rows) >= 15
    for row in rows:
        _, names, files = (cell.strip() for cell in row.strip("| ").split(" | "))
        files = re.findall(r"`([\w/]+)\.py`", files)
        modules = [importlib.import_module(file.replace("/", ".")) for file in files]
        names = re.findall(r"`([\w.]+)`", names)
        assert names and modules, row
        for name in names:
            owner, _, method = name.partition(".")
            found = [getattr(module, owner) for module in modules if hasattr(module, owner)]
            assert found and (not method or hasattr(found[0], method)), f"{name} is not in {files}"
            if inspect.isfunction(found[0]) or inspect.isclass(found[0]):
                assert found[0].__module__ in [m.__name__ for m in modules], f"{name}: {files}"


def test_equations_1_to_9_are_in_the_map():
    rows = " ".join(re.findall(r"^\| (Eq\.[^|,]*)", README, re.M))
    assert {int(n) for n in re.findall(r"\b([1-9])\b", rows)} == set(range(1, 10))


def test_a_comment_tells_its_reason_itself():
    """And not the number of a list that stands elsewhere."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("*/*.py"), *PAGES]
    assert len(files) > 30
    cited = re.compile(r"\b(trap|item|departure|point) \d")
    for file in files:
        assert not cited.search(file.read_text(encoding="utf-8").lower()), file


# ---------------------------------------------------------------- the commands


def commands():
    """(page, file, words) of every `python FILE.py ...`, `torchrun ... FILE.py ...`."""
    found = []
    for page, text in TEXTS.items():
        for code in re.findall(r"`([^`]+)`|^    (.+)$", text, re.M):
            code = " ".join("".join(code).split())
            for part in re.split(r"&&|, then ", code):
                words = re.match(r"(?:python|torchrun\b.*?) ([\w/]+\.py)(.*)", part.strip())
                if words and "..." not in part:
                    found.append((page, words[1], shlex.split(words[2].split("  #")[0])))
    return found


class Parsed(Exception):
    """A script's parser has understood its flags."""


@pytest.fixture
def understood(monkeypatch, tmp_path):
    """understood(file, words): the script's parsers read the words, and it goes no further.

    What bench.py does not know itself it hands to train.py. Returns the flags that they know; for
    words None these alone count.
    """
    monkeypatch.chdir(tmp_path)
    real_parse = argparse.ArgumentParser.parse_args
    real_known = argparse.ArgumentParser.parse_known_args
    inside, flags = [], set()

    def parse_args(self, args=None, namespace=None):
        inside.append(self)
        flags.update(self._option_string_actions)
        raise Parsed(real_parse(self, args, namespace))

    def parse_known_args(self, args=None, namespace=None):
        parsed, rest = real_known(self, args, namespace)
        flags.update(self._option_string_actions)
        if not inside:
            train.parse_args(rest)
        return parsed, rest

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_known_args)

    def go(file, words):
        inside.clear()
        monkeypatch.setattr(sys, "argv", [file, *(words or [])])
        with pytest.raises((Parsed, SystemExit)) as stop:
            runpy.run_path(str(ROOT / file), run_name="__main__")
        by_help = words == ["--help"] and stop.value.code == 0
        assert stop.type is Parsed or words is None or by_help, stop.value
        return flags

    return go


@pytest.mark.parametrize("page, file, words", commands(), ids=str)
def test_every_command_is_understood(page, file, words, understood):
    if re.search("[pP]arse", (ROOT / file).read_text(encoding="utf-8")):
        understood(file, words)
    else:
        assert not words, f"{file} reads no flags"


def of_train_and_ready():
    """The commands of train.py that begin a run."""
    return [
        words for _, file, words in commands() if file == "train.py" and "--resume" not in words
    ]


@pytest.mark.parametrize("words", of_train_and_ready(), ids=str)
def test_every_training_command_passes_the_check_of_its_settings(words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "check_trackers", lambda names: None)  # they may not be installed
    for reward in re.findall(r"[\w/]+\.py", " ".join(words)):
        (tmp_path / reward).write_text("def score(images, prompts):\n    return []\n")
    if words != ["--help"]:
        assert train.parse_args(words).rounds > 0


def test_the_commands_are_found():
    files = [file for _, file, _ in commands()]
    scripts = {"train.py", "eval.py", "studies/bench.py", "studies/matrix.py"}
    assert len(files) > 35 and scripts <= set(files)
    assert len(of_train_and_ready()) > 10
    pages = {page for page, _, _ in commands()}
    assert {"README.md", "docs/stable-diffusion.md", "docs/cost.md"} <= pages


def test_the_tests_commands_name_files_and_flags_that_exist():
    conftest = (ROOT / "tests/conftest.py").read_text(encoding="utf-8")
    calls = [c for text in TEXTS.values() for c in re.findall(r"pytest (tests/[^`\n]+)", text)]
    assert len(calls) >= 2
    for call in calls:
        file, *words = call.split()
        assert (ROOT / file).is_file(), call
        for flag in (w for w in words if w.startswith("--")):
            assert f'"{flag}"' in conftest, call


def test_every_flag_that_is_named_exists(understood):
    scripts = {"train.py", "eval.py", "tiny/build.py", *(file for _, file, _ in commands())}
    flags = set().union(*(understood(file, None) for file in sorted(scripts)))
    for page, text in TEXTS.items():
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text))
        assert named <= flags | OTHERS, (page, named - flags - OTHERS)


def test_the_worked_example_changes_ten_lines_at_most_and_trains(tmp_path, random_folder):
    """README's group-relative advantage, applied to train.py: every branch is trained on."""
    import importlib.util
    import json

    diff = TEXTS["README.md"].split("```diff\n")[1].split("```")[0].splitlines()
    assert 0 < len(diff) <= 10
    code, old, new = (ROOT / "train.py").read_text(encoding="utf-8"), "", ""
    for line in [*diff, "-"]:
        if line[0] == "-" and new:
            assert code.count(old) == 1, old
            code, old, new = code.replace(old, new), "", ""
        old += f"{line[1:]}\n" if line[0] == "-" else ""
        new += f"{line[1:]}\n" if line[0] == "+" else ""
    (tmp_path / "grpo.py").write_text(code, encoding="utf-8")
    (tmp_path / "bright.py").write_text("def score(x, prompts):\n    return x.mean((1, 2, 3))\n")
    (tmp_path / "p.txt").write_text("a cat\n")
    spec = importlib.util.spec_from_file_location("grpo", tmp_path / "grpo.py")
    grpo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(grpo)
    flags = (
        f"--model {random_folder} --device cpu --threads 1 --T 3 --tau0 2 --queries 6 --rounds 1"
    )
    flags += f" --reward {tmp_path}/bright.py:score --prompts {tmp_path}/p.txt --out {tmp_path}/run"
    grpo.main([*flags.split(), "--eval-prompts", "0"])
    (line,) = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["kept"] == json.loads(line)["of"] == 6
