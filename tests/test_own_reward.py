"""A reward of the user's own: its file, the modules beside it, its errors, what it may touch."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

import processes
import rewards
from processes import Stop
from rewards import check_reward_name, load_reward, reward_source

PROMPTS = ["a cat washing dishes", "a dog", "a cat washing dishes"]
IMAGES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
OWN = """
from __future__ import annotations
from dataclasses import dataclass
import numpy as np

@dataclass
class Two:
    number: int = 2

def score(images, prompts):
    return images.mean((1, 2, 3))

def as_array(images, prompts):
    return np.arange(len(prompts)) * Two().number

def raises(images, prompts):
    return images.no_such_thing

def one_argument(images):
    return images.mean((1, 2, 3))

def leaves(images, prompts):
    raise SystemExit(7)

def deep(images, prompts):
    return deeper(images, prompts)

def deeper(images, prompts):
    return deep(images, prompts)

def talks(images, prompts):
    raise ValueError("b" * 999)

number = 3
"""


@pytest.fixture
def write(tmp_path):
    """write(name, text) -> the path of a file in a folder of the user's."""

    def write_file(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return str(path)

    return write_file


@pytest.fixture
def own(write):
    return write("my_reward.py", OWN)


def stop_of(name):
    """The message with which the reward `name` ends a round."""
    reward = load_reward(name)
    with pytest.raises(Stop) as stop:
        reward(IMAGES, PROMPTS)
    return str(stop.value)


def error_of(name, capsys):
    """What is printed when the reward `name` can not be loaded, without the last line's end."""
    with pytest.raises(SystemExit) as stop:
        load_reward(name)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.endswith("\n")
    return error[:-1]


def test_a_function_of_ones_own_file_is_a_reward(own):
    assert check_reward_name(f"{own}:score") is None
    got = load_reward(f"{own}:score")(IMAGES, PROMPTS)
    torch.testing.assert_close(got, IMAGES.mean((1, 2, 3)))
    assert load_reward(f"{own}:as_array")(IMAGES, PROMPTS).tolist() == [0, 2, 4]


def test_the_example_of_the_docstring_runs(write):
    code = rewards.__doc__.split("in full")[1].split("Departures")[0].split("\n\n", 1)[1]
    path = write("brightness.py", "\n".join(line[4:] for line in code.splitlines()))
    got = load_reward(f"{path}:score")(IMAGES, PROMPTS)
    torch.testing.assert_close(got, IMAGES.mean((1, 2, 3)))


@pytest.mark.parametrize("name", ["pil.py", "rewards.py"])
def test_a_reward_may_use_our_pil_pictures(write, name):
    """Even in a file that is called rewards.py as ours is."""
    text = """
from rewards import to_pil

def width(images, prompts):
    return [picture.width for picture in to_pil(images)]
"""
    path = write(name, text)
    assert load_reward(f"{path}:width")(IMAGES, PROMPTS).tolist() == [8, 8, 8]
    assert sys.modules["rewards"] is rewards


# ---------------------------------------------------------------- modules beside the file


def test_a_module_beside_the_file_can_be_imported_by_it_alone(write):
    """At its start and at a call, once; each reward has its own; nothing is left behind."""
    text = """
import helper

def score(images, prompts):
    import late.part
    helper.calls += 1
    return [helper.value + late.part.value + helper.calls] * len(prompts)
"""
    names = []
    for folder, value in (("first", 10), ("second", 20)):
        write(f"{folder}/helper.py", f"value, calls = {value}, 0")
        write(f"{folder}/late/__init__.py", "")
        write(f"{folder}/late/part.py", f"value = {100 * value}")
        names.append(write(f"{folder}/mine.py", text) + ":score")
    path, modules = list(sys.path), set(sys.modules)
    first, second = map(load_reward, names)
    assert first(IMAGES, PROMPTS)[0] == 1011 and second(IMAGES, PROMPTS)[0] == 2021
    assert first(IMAGES, PROMPTS)[0] == 1012 and second(IMAGES, PROMPTS)[0] == 2022
    assert sys.path == path and set(sys.modules) == modules
    with pytest.raises(ImportError):
        import helper  # noqa: F401


def test_the_users_modules_do_not_take_the_place_of_ours(write):
    """A user's processes.py serves the user, ours serves us; a loaded library stays itself."""
    write("processes.py", "value = 5")
    write("json.py", "1 / 0")
    text = """
import json, processes

def score(images, prompts):
    import processes as again
    assert again is processes
    return [processes.value * len(json.dumps([]))] * len(prompts)
"""
    reward = load_reward(write("mine.py", text) + ":score")
    assert reward(IMAGES, PROMPTS).tolist() == [10, 10, 10]
    assert sys.modules["processes"] is processes and sys.modules["json"] is json


def test_a_file_beside_ours_imports_what_the_run_has_loaded(write, monkeypatch):
    """In the folder of rewards.py its modules are ours, not a second copy for the user."""
    path = write("mine.py", "import processes\n\ndef score(images, prompts):\n    pass\n")
    write("processes.py", "1 / 0")  # ours is loaded already
    monkeypatch.setattr("own_reward.ROOT", Path(path).parent)
    load_reward(f"{path}:score")
    assert sys.modules["processes"] is processes


# ---------------------------------------------------------------- errors


def test_an_error_at_a_call_shows_the_users_lines_and_names_the_reward(own):
    lines = stop_of(f"{own}:raises").splitlines()
    assert lines[0] == f"from the code of reward {own}:raises:"
    assert lines[1] == f'  File "{own}", line 17, in raises'
    assert lines[2].strip() == "return images.no_such_thing"
    reason = "AttributeError: 'Tensor' object has no attribute 'no_such_thing'"
    assert lines[-1] == f"reward {own}:raises raised {reason}" and len(lines) <= 5


def test_the_lines_of_modules_beside_the_file_are_shown_and_not_those_of_others(write):
    """The error is raised in torch, which is called by the helper, called by the reward."""
    write("helper.py", "import torch\n\ndef add(x):\n    return torch.nn.Linear(3, 1)(x)\n")
    text = "from helper import add\n\ndef score(images, prompts):\n    return add(images)\n"
    path = write("mine.py", text)
    message = stop_of(f"{path}:score")
    files = [line for line in message.splitlines() if line.startswith("  File ")]
    helper = path.replace("mine", "helper")
    assert files == [f'  File "{path}", line 4, in score', f'  File "{helper}", line 4, in add']
    assert f"\nreward {path}:score raised RuntimeError: mat1 and mat2" in message


def test_an_endless_recursion_and_a_long_message_are_cut(own):
    lines = stop_of(f"{own}:deep").splitlines()
    assert "raised RecursionError" in lines[-1] and 3 < len(lines) < 15
    reason = stop_of(f"{own}:talks").splitlines()[-1].partition(" raised ")[2]
    assert reason == ("ValueError: " + "b" * 999)[:200]


@pytest.mark.parametrize(
    "text, words",
    [
        ("import torch\n1 / 0\n", ["line 2, in <module>\n    1 / 0\n", "ZeroDivisionError: div"]),
        ("a = 1\nb = (\n", ["line 2\n    b = (\n", "raised SyntaxError: '(' was never closed"]),
        ('a = "\0"', ["raised "]),
        ("import no_such_module", ["line 1, in", "ModuleNotFoundError: No module named"]),
        (
            "import bad",
            ["line 1, in <module>", 'bad.py", line 2\n    c d\n', "SyntaxError: invalid"],
        ),
        ("raise ValueError('a\\n' * 99 + 'b' * 999)", ["raised ValueError: a"]),
        ("import sys; sys.exit()", ["sys.exit()", "raised SystemExit"]),
        ("import sys; sys.exit(0)", ["line 1, in <module>", "raised SystemExit: 0"]),
        ("class Own(BaseException): pass\nraise Own(5)", ["line 2, in", "Own: 5"]),
    ],
)
def test_a_file_that_does_not_run_shows_its_lines_and_ends(write, capsys, text, words):
    write("bad.py", "a = 1\nc d\n")
    name = write("mine.py", text) + ":score"
    error = error_of(name, capsys)
    for word in words:
        assert word in error
    assert error.splitlines()[-1].removeprefix("error: ").startswith(f"reward {name} raised ")
    assert len(error.splitlines()) <= 9 and "own_reward.py" not in error


def test_bytes_that_are_no_text_are_told(tmp_path, capsys):
    (tmp_path / "mine.py").write_bytes(b"a = '\xff'\n")
    assert "raised SyntaxError: (unicode error)" in error_of(f"{tmp_path}/mine.py:f", capsys)


def test_sys_exit_in_a_reward_names_it(own):
    assert stop_of(f"{own}:leaves").splitlines()[-1] == f"reward {own}:leaves raised SystemExit: 7"


def test_a_wrong_number_of_arguments_is_one_line(own):
    message = stop_of(f"{own}:one_argument")
    assert message.startswith(f"reward {own}:one_argument raised TypeError: one_argument() takes 1")
    assert "\n" not in message


@pytest.mark.parametrize(
    "name, words",
    [
        ("aesthetic", "one of clip, bert, jpeg"),
        ("missing.py:score", "there is no file missing.py"),
        ("x" * 300, "unknown --reward xxx"),
        ("x" * 300 + ".py:score", "there is no file xxx"),
        ("{folder}:score", "there is no file"),
        ("{own}:", "'' is no function's name"),
        ("{own}:a b", "'a b' is no function's name"),
        ("{own}", "or your own as file.py:function"),
    ],
)
def test_a_name_is_refused_without_loading(own, tmp_path, name, words, capsys):
    (tmp_path / "folder.py").mkdir()
    name = name.format(own=own, folder=tmp_path / "folder.py")
    assert words in check_reward_name(name) and "\n" not in check_reward_name(name)
    assert error_of(name, capsys) == f"error: {check_reward_name(name)}"


@pytest.mark.parametrize("function", ["absent", "number"])
def test_a_missing_function_ends_with_one_line(own, function, capsys):
    error = error_of(f"{own}:{function}", capsys)
    assert error == f"error: reward {own}:{function}: {own} has no function {function}"


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="root reads any other file")
def test_a_file_that_can_not_be_read_ends_with_one_line(tmp_path, capsys):
    (tmp_path / "mine.py").symlink_to("/proc/self/mem")
    name = f"{tmp_path}/mine.py:score"
    error = error_of(name, capsys)
    assert error.startswith(f"error: reward {name} raised OSError: ") and "\n" not in error
    with pytest.raises(SystemExit) as stop:
        reward_source(name)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and f"reward {name}: cannot read" in error
    assert error.count("\n") == 1


# ---------------------------------------------------------------- what it may touch

TOUCH = """
import os, signal, sys, tempfile, torch

def touch():
    {line}
    assert {line_holds}

{at_load}

def score(images, prompts):
    {at_call}
    {end}
    return [1] * len(prompts)
"""
LINES = [
    ("os.chdir('/')", "os.getcwd() == '/'"),
    ("d = tempfile.mkdtemp(); os.chdir(d); os.rmdir(d)", "not os.path.exists(d)"),
    ("sys.path[:] = []", "sys.path == []"),
    ("sys.path = ['x']", "True"),
    ("sys.stdout = None", "sys.stdout is None"),
    ("sys.stderr = None", "True"),
    ("signal.signal(signal.SIGINT, lambda *_: None)", "True"),
    ("signal.signal(signal.SIGTERM, lambda *_: None)", "True"),
    ("torch.set_grad_enabled(not torch.is_grad_enabled())", "True"),
    ("torch.set_default_dtype(torch.float64)", "torch.ones(1).dtype == torch.float64"),
    ("torch.set_default_device('meta')", "torch.ones(1).is_meta"),
    ("torch.set_default_device('cuda:77')", "True"),
    ("torch.set_num_threads(torch.get_num_threads() + 1)", "True"),
    ("torch.set_float32_matmul_precision('medium')", "True"),
    ("torch.backends.cuda.matmul.allow_tf32 = True", "True"),
    ("torch.backends.cuda.matmul.fp32_precision = 'tf32'", "True"),
    ("torch.use_deterministic_algorithms(True)", "True"),
    ("torch.backends.cudnn.benchmark = True", "True"),
    ("torch.backends.cudnn.deterministic = True", "True"),
]
FP32 = hasattr(torch.backends.cuda.matmul, "fp32_precision")  # since torch 2.9
LINES = [case for case in LINES if FP32 or "fp32_precision" not in case[0]]


def state():
    """What a run depends on."""
    python = [os.getcwd(), sys.path[:], sys.stdout, sys.stderr]
    signals = [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]
    new = torch.ones(1)
    tensors = [torch.is_grad_enabled(), new.dtype, new.device, torch.get_num_threads()]
    matmul = [torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32]
    matmul += [FP32 and torch.backends.cuda.matmul.fp32_precision == "tf32"]
    exact = [torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark]
    exact += [torch.backends.cudnn.deterministic]
    return python + signals + tensors + matmul + exact


@pytest.mark.parametrize("end", ["", "1 / 0", "raise KeyboardInterrupt"])
@pytest.mark.parametrize("line, holds", LINES)
def test_what_a_reward_sets_in_the_process_is_undone(write, line, holds, end):
    """After the file ran, after a call, and after one that failed; with and without gradients."""
    before = state()
    text = TOUCH.format(line=line, line_holds=holds, at_load="touch()", at_call="touch()", end=end)
    reward = load_reward(write("mine.py", text) + ":score")
    assert state() == before
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            before = state()
            if end:
                with pytest.raises(Stop if "0" in end else KeyboardInterrupt):
                    reward(IMAGES, PROMPTS)
            else:
                assert reward(IMAGES, PROMPTS).tolist() == [1, 1, 1]
            assert state() == before and torch.is_grad_enabled() == grad


@pytest.mark.parametrize("kind", ["KeyboardInterrupt", "torch.OutOfMemoryError"])
def test_ctrl_c_and_out_of_memory_stay_themselves(write, kind):
    raises = f"raise {kind}"
    path = write("mine.py", f"import torch\ndef score(images, prompts):\n    {raises}\n")
    with pytest.raises(eval(kind)):
        load_reward(f"{path}:score")(IMAGES, PROMPTS)
    with pytest.raises(eval(kind)):
        load_reward(write("now.py", f"import torch\n{raises}\n") + ":score")


def test_a_reward_with_a_model_of_its_own_can_be_moved(write):
    text = """
import torch

class Score(torch.nn.Linear):
    def forward(self, images, prompts):
        return [self.weight.is_meta] * len(prompts)

    def to(self, device):
        assert device != "cpu", "stay away"
        return super().to(device)

score = Score(1, 1)
"""
    name = write("mine.py", text) + ":score"
    reward = load_reward(name)
    reward.to("meta")
    assert reward(IMAGES, PROMPTS).tolist() == [1, 1, 1]
    with pytest.raises(Stop, match=f"reward {name} raised AssertionError: stay away"):
        reward.to("cpu")


# ---------------------------------------------------------------- the file's text


def test_the_source_of_a_reward_is_its_files_text(own, write, tmp_path):
    assert reward_source(f"{own}:score") == OWN
    assert reward_source("clip") == reward_source("jpeg") == ""
    write("my_reward.py", OWN + "# edited")
    assert reward_source(f"{own}:score") == OWN + "# edited"
    texts = set()
    for byte in (b"\xff", b"\xfe", b"\xc3\xbf"):
        (tmp_path / "latin.py").write_bytes(b"# coding: latin-1\na = '" + byte + b"'\n")
        texts.add(reward_source(f"{tmp_path}/latin.py:a"))
    assert len(texts) == 3


def test_an_edited_file_is_run_anew(write):
    """Not its compiled form of before, even if size and time of the file are the same."""
    for value in (1, 2):
        path = write("mine.py", f"def score(images, prompts): return [{value}] * len(prompts)")
        os.utime(path, (0, 0))
        assert load_reward(f"{path}:score")(IMAGES, PROMPTS).tolist() == [value] * 3
