"""The README's map of the paper, every command of the texts, and who imports whom, can not rot."""

import argparse
import ast
import importlib
import inspect
import json
import re
import runpy
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

import train
from support import report

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
PAGES += [ROOT / "results/README.md", ROOT / "tiny/README.md"]
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
README = TEXTS["README.md"]
# Flags of others: of torchrun, pip, git and this suite
OTHERS = {
    "--nproc",
    "--logdir",
    "--nnodes",
    "--rdzv-backend",
    "--rdzv-endpoint",
    "--index-url",
    "--help",
}


# ---------------------------------------------------------------- the map


def rows_of_the_map():
    """(module, what it holds of the paper) of each of README's rows of a file at the root."""
    rows = re.findall(r"^\| `(\w+)\.py` \|(.+)$", README, re.M)
    return [(importlib.import_module(name), text) for name, text in rows]


def test_every_name_of_the_map_lives_in_its_file():
    rows = rows_of_the_map()
    files = [module.__name__ for module, _ in rows]
    assert sorted(files) == sorted(path.stem for path in ROOT.glob("*.py"))
    for module, text in rows:
        for name in re.findall(r"`(\w+(?:\.\w+)?)`", text):
            owner, _, method = name.partition(".")
            found = getattr(module, owner, None)
            assert found is not None, f"{name} is not in {module.__name__}.py"
            assert not method or hasattr(found, method), name
            if inspect.isfunction(found) or inspect.isclass(found):
                assert found.__module__ == module.__name__, f"{name}: {found.__module__}"
    assert sum(len(re.findall(r"`\w+", text)) for _, text in rows) > 12


def test_equations_1_to_9_are_in_the_map():
    cited = re.findall(r"Eq\. (\d)(?: and (\d))?", " ".join(text for _, text in rows_of_the_map()))
    named = {int(n) for pair in cited for n in pair if n}
    elsewhere = {2}  # the goal itself: a docstring of b2rl.py
    assert named | elsewhere == set(range(1, 10))


def test_every_file_that_is_named_is_there():
    for page, text in TEXTS.items():
        named = re.findall(r"(?<![\w/])(?:support|studies|tiny|tests|docs)/[\w/]+\.\w+", text)
        lost = {name for name in named if not (ROOT / name).exists()}
        assert not lost, (page, lost)


def test_a_comment_tells_its_reason_itself():
    """And not the number of a list that stands elsewhere."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("*/*.py"), *PAGES]
    cited = re.compile(r"\b(trap|item|departure|point) \d")
    for file in files:
        assert not cited.search(file.read_text(encoding="utf-8").lower()), file


# ---------------------------------------------------------------- the commands


def commands():
    """(page, file or module, words) of every `python FILE.py ...`, `torchrun ... FILE.py ...`."""
    found = []
    for page, text in TEXTS.items():
        text = re.sub("```.*?```", lambda block: block[0].replace("\n", "\n    "), text, flags=re.S)
        text = text.replace("```", "")
        for code in re.findall(r"`([^`]+)`|^    (.+)$", text, re.M):
            code = " ".join("".join(code).split())
            for part in re.split(r"&&|, then ", code):
                start = r"(?:python|torchrun\b.*?) (-m )?([\w/]+\.py|(?<=-m )[\w.]+)(.*)"
                words = re.match(start, part.strip())
                if words and words[2] != "venv" and "..." not in part:
                    found.append((page, words[2], shlex.split(words[3].split("  #")[0])))
    return found


class Parsed(Exception):
    """A script's parser has understood its flags."""


@pytest.fixture
def understood(monkeypatch, tmp_path):
    """understood(file, words): the script's parsers read the words, and it goes no further.

    What a study does not know itself it hands to train.py. Returns the flags that the parsers
    know; for words None these alone count.
    """
    monkeypatch.chdir(tmp_path)
    real_parse = argparse.ArgumentParser.parse_args
    real_known = argparse.ArgumentParser.parse_known_args
    inside, flags = [], set()

    def parse_args(self, args=None, namespace=None):
        flags.update(self._option_string_actions)
        inside.append(self)
        parsed = real_parse(self, args, namespace)
        inside.pop()
        if list(sys.argv[1:] if args is None else args) == sys.argv[1:]:
            raise Parsed  # not train.py's parser, asked for its defaults
        return parsed

    def parse_known_args(self, args=None, namespace=None):
        flags.update(self._option_string_actions)
        parsed, rest = real_known(self, args, namespace)
        if not inside:
            inside.append(self)
            train.parse_args(rest)
            raise Parsed
        return parsed, rest

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_known_args)

    def go(file, words):
        inside.clear()
        monkeypatch.setattr(sys, "argv", [file, *(words or [])])
        with pytest.raises((Parsed, SystemExit)) as stop:
            if file.endswith(".py"):
                runpy.run_path(str(ROOT / file), run_name="__main__")
            else:
                runpy.run_module(file, run_name="__main__")
        by_help = words == ["--help"] and stop.value.code == 0
        assert stop.type is Parsed or words is None or by_help, stop.value
        return flags

    return go


@pytest.mark.parametrize("page, file, words", commands(), ids=str)
def test_every_command_is_understood(page, file, words, understood):
    path = ROOT / file if file.endswith(".py") else ROOT / file.replace(".", "/") / "__main__.py"
    assert path.is_file(), f"{page} calls {file}"
    if re.search("[pP]arse", path.read_text(encoding="utf-8")):
        understood(file, words)
    else:
        assert not words, f"{file} reads no flags"


def of_train_and_ready():
    """The commands of train.py that begin a run."""
    found = [words for _, file, words in commands() if file == "train.py"]
    return [words for words in found if not {"--resume", "--help"} & set(words)]


@pytest.mark.parametrize("words", of_train_and_ready(), ids=str)
def test_every_training_command_passes_the_check_of_its_settings(words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for reward in re.findall(r"[\w/]+\.py", " ".join(words)):
        (tmp_path / reward).write_text("def score(images, prompts):\n    return []\n")
    args = train.parse_args(words)
    assert args.rounds > 0 and args.out.startswith("runs/")
    assert report.first_lines(args, args.out, 1)


def test_the_commands_are_found():
    files = [file for _, file, _ in commands()]
    assert {"train.py", "eval.py", "tiny.build"} <= set(files) and len(files) > 15
    assert len(of_train_and_ready()) > 5
    assert {"README.md", "docs/stable-diffusion.md"} <= {page for page, _, _ in commands()}
    code = re.findall(r"\b(?:python|torchrun) \S*.*?[\w/]+\.py", " ".join(TEXTS.values()))
    assert len(code) <= len(files) + 3, "commands that this file does not see"


def test_the_tests_commands_name_files_and_flags_that_exist():
    conftest = (ROOT / "tests/conftest.py").read_text(encoding="utf-8")
    calls = [c for text in TEXTS.values() for c in re.findall(r"pytest (tests/[^`\n]+)", text)]
    for call in calls:
        file, *words = call.split()
        assert (ROOT / file).is_file(), call
        for flag in (w for w in words if w.startswith("--")):
            assert f'"{flag}"' in conftest, call


def test_every_flag_that_is_named_exists(understood):
    scripts = {"train.py", "eval.py", "tiny.build", *(file for _, file, _ in commands())}
    scripts |= {str(path.relative_to(ROOT)) for path in ROOT.glob("studies/*.py")}
    flags = set().union(*(understood(file, None) for file in sorted(scripts) if has_main(file)))
    ours = set(re.findall(r'"(--[a-z-]+)"', (ROOT / "tests/conftest.py").read_text()))
    for page, text in TEXTS.items():
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text))
        lost = named - flags - OTHERS - ours
        assert not lost, (page, lost)


def has_main(file):
    """Is it a command, and has it flags?"""
    path = ROOT / file if file.endswith(".py") else ROOT / file.replace(".", "/") / "__main__.py"
    code = path.read_text(encoding="utf-8") if path.exists() else ""
    return "__main__" in code and re.search("[pP]arse", code)


def test_the_worked_example_changes_ten_lines_at_most_and_trains(tmp_path, random_folder):
    """README's group-relative advantage, applied to train.py: every branch is trained on."""
    diff = README.split("```diff\n")[1].split("```")[0].splitlines()
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
    flags = f"--model {random_folder} --device cpu --threads 1 --T 3 --tau0 2 --queries 6"
    flags += f" --reward {tmp_path}/bright.py:score --prompts {tmp_path}/p.txt --rounds 1"
    grpo.main([*flags.split(), "--eval-prompts", "0", "--out", str(tmp_path / "run")])
    (line,) = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["kept"] == json.loads(line)["of"] == 6


# ---------------------------------------------------------------- who imports whom


def source_files():
    """Our files of Python outside the tests, by path: those that git knows, where it is."""
    git = ["git", "-C", str(ROOT), "ls-files", "*.py"]
    try:
        found = subprocess.run(git, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        found = [str(f.relative_to(ROOT)) for f in ROOT.rglob("*.py")]
    return sorted(f for f in found if not f.startswith(("tests/", ".")) and (ROOT / f).exists())


def imports(file, files):
    """The files of ours that `file` imports anywhere, inside functions too."""
    modules = {}
    for f in files:
        modules[f.removesuffix(".py").removesuffix("/__init__").replace("/", ".")] = f
    folder = file.rpartition("/")[0]
    if folder == "studies":  # scripts: their own folder is on sys.path
        modules |= {f[len(folder) + 1 : -3]: f for f in files if f.startswith(folder + "/")}
    names = []
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return {modules[name] for name in names if name in modules} - {file}


def may_import(file, other):
    """The house rules: the root above support, which knows mathematics alone; tiny by itself."""
    folder, _, name = file.rpartition("/")
    above = other.rpartition("/")[0]
    if folder == "studies":
        return True
    if file in ("tiny/world.py", "tiny/judge.py"):
        return other in ("tiny/world.py", "tiny/judge.py")
    if folder.startswith("tiny"):
        return above != "studies" and other != "train.py"
    if folder == "support":
        return above == "support" or other in ("ddim_logprob.py", "lora.py")
    if name == "eval.py":  # the tiny model's judge is shown beside the scores
        return above in ("", "support") or other in ("tiny/world.py", "tiny/judge.py")
    return above in ("", "support")


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
    assert {"train.py", "support/pipeline.py", "tiny/world.py"} <= set(files)
    graph = {file: imports(file, files) for file in files}
    found = {"b2rl.py", "eval.py", "support/run_folder.py", "support/report.py"}
    assert found <= graph["train.py"], "arrows are found"
    forbidden = [(a, b) for a in files for b in graph[a] if not may_import(a, b)]
    assert not forbidden
    users = {a for a in files if not a.startswith(("tiny/", "studies/"))}
    of_tiny = {a for a in users for b in graph[a] if b.startswith("tiny/")}
    assert len(of_tiny) <= 1, f"the tiny model is read in one place: {of_tiny}"
    assert circle(graph) is None


def test_a_circle_and_an_arrow_upwards_are_found():
    """Of three files as of two, and none where two ways lead to one file."""
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    assert circle({"a": {"b"}, "b": {"a"}}) == ["a", "b"]
    assert circle({"a": {"b", "c"}, "b": {"d"}, "c": {"d"}, "d": set()}) is None
    for arrow in ("support/report.py train.py", "support/prompts.py b2rl.py"):
        assert not may_import(*arrow.split())
    for arrow in ("tiny/world.py support/command.py", "b2rl.py studies/curves.py"):
        assert not may_import(*arrow.split())
    assert may_import("studies/curves.py", "eval.py") and may_import("b2rl.py", "lora.py")
