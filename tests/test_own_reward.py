"""A reward of the user's own: its file, the modules beside it, its forms, its errors."""

import os
import sys
import time

import pytest
import torch

import rewards
from rewards import check_reward_name, load_reward, reward_code
from support.command import Stop

PROMPTS = ["a cat washing dishes", "a dog", "a cat washing dishes"]
IMAGES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
BRIGHTNESS = IMAGES.mean((1, 2, 3))


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """No module and no folder of one test is there in the next."""
    monkeypatch.setattr(sys, "path", sys.path[:])
    yield
    for name, module in list(sys.modules.items()):
        spec = getattr(module, "__spec__", None)  # of a package without a file, too
        if spec and str(tmp_path) in f"{spec.origin}{spec.submodule_search_locations}":
            del sys.modules[name]


@pytest.fixture
def write(tmp_path):
    """write(name, text) -> the path of a file in a folder of the user's."""

    def write_file(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return str(path)

    return write_file


def called(name):
    return load_reward(name)(IMAGES, PROMPTS)


def stop_of(name):
    """The message with which the reward `name` ends a round, or does not load: one line."""
    with pytest.raises(Stop) as stop:
        called(name)
    assert "\n" not in str(stop.value)
    return str(stop.value)


def error_of(name, capsys):
    """The line that is printed when the reward `name` is refused."""
    with pytest.raises(SystemExit) as stop:
        load_reward(name)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    return error[:-1]


# ---------------------------------------------------------------- its forms

FORMS = """
from __future__ import annotations
from dataclasses import dataclass
import numpy as np
import torch

@dataclass
class Two:
    number: int = 2

def score(images, prompts):
    return images.mean((1, 2, 3))

def with_twos(images, prompts):
    return np.arange(len(prompts)) * Two().number

# as the common DDPO trainers have them

def scores_and_info(images, prompts):
    return score(images, prompts).numpy(), {"seconds": 1}

def with_metadata(images, prompts, metadata):
    assert metadata == [{}, {}, {}] and metadata[0] is not metadata[1]
    metadata[0]["mine"] = 1
    return score(images, prompts)

def metadata_left_open(images, prompts, metadata=None):
    assert metadata is None
    return score(images, prompts)

def builds_one():
    def inner(images, prompts, metadata):
        return with_metadata(images, prompts, metadata).numpy(), {}
    return inner

def column(images, prompts):
    return score(images, prompts)[:, None]

def row_of_arrays(images, prompts):
    return score(images, prompts).numpy().reshape(1, 3, 1)

def as_list(images, prompts):
    return [[float(x)] for x in score(images, prompts)]

class Plain:
    def __init__(self):
        self.factor = 1

    def __call__(self, images, prompts):
        return self.factor * score(images, prompts)

class WithMetadata(Plain):
    def __call__(self, images, prompts, metadata):
        return with_metadata(images, prompts, metadata), {}

class Module(torch.nn.Module):
    def forward(self, images, prompts, metadata):
        return with_metadata(images, prompts, metadata)

class ModuleThatIsCalled(torch.nn.Module):
    def __call__(self, images, prompts, metadata):
        return with_metadata(images, prompts, metadata), {}

class Static:
    @staticmethod
    def score(images, prompts):
        return score(images, prompts)

made = Plain()
module = Module()
method = WithMetadata().__call__
any_arguments = lambda *inputs: score(*inputs)
from_a_library = torch.nn.Identity()
"""
NAMES = "score scores_and_info with_metadata metadata_left_open builds_one column row_of_arrays "
NAMES += "as_list Plain WithMetadata Module ModuleThatIsCalled made module method any_arguments"


@pytest.mark.parametrize("function", NAMES.split())
def test_a_reward_runs_in_the_form_that_people_have(write, function):
    path = write("my_reward.py", FORMS)
    assert check_reward_name(f"{path}:{function}") is None
    reward = load_reward(f"{path}:{function}")
    for _ in range(2):
        scores = reward(IMAGES, PROMPTS)
        torch.testing.assert_close(scores, BRIGHTNESS)
        assert scores.shape == (3,) and scores.dtype == torch.float32


def test_the_prompts_and_their_order_reach_the_reward(write):
    text = "def f(x, prompts):\n    assert type(prompts) is list\n    return map(len, prompts)"
    assert "returned a map" in stop_of(write("mine.py", text) + ":f")
    text = "def f(x, prompts):\n    return [len(p) for p in prompts]"
    assert called(write("mine2.py", text) + ":f").tolist() == [20, 5, 20]
    assert called(write("my_reward.py", FORMS) + ":with_twos").tolist() == [0, 2, 4]


def test_the_example_of_the_docstring_runs(write):
    code = rewards.__doc__.split("makes PIL pictures):")[1].split("Rewards written")[0]
    path = write("brightness.py", "\n".join(line[4:] for line in code.splitlines()))
    torch.testing.assert_close(called(f"{path}:score"), BRIGHTNESS)


@pytest.mark.parametrize("name", ["pil.py", "rewards.py"])
def test_a_reward_may_use_our_pil_pictures(write, name):
    """Even in a file that is called rewards.py as ours is."""
    text = """
from rewards import to_pil

def width(images, prompts):
    return [picture.width for picture in to_pil(images)]
"""
    assert called(write(name, text) + ":width").tolist() == [8, 8, 8]
    assert sys.modules["rewards"] is rewards


def test_gradients_are_off_always(write):
    """While the file runs, while it builds the reward and in every call."""
    text = """
import torch

assert not torch.is_grad_enabled()

def build():
    assert not torch.is_grad_enabled()
    weight = torch.nn.Parameter(torch.ones(1))
    def inner(images, prompts):
        assert not torch.is_grad_enabled() and not (weight * 2).requires_grad
        return weight * images.mean((1, 2, 3))
    return inner
"""
    with torch.enable_grad():
        reward = load_reward(write("mine.py", text) + ":build")
        assert not reward(IMAGES, PROMPTS).requires_grad and torch.is_grad_enabled()
        assert not reward(IMAGES.clone().requires_grad_(), PROMPTS).requires_grad


def test_a_reward_with_a_model_of_its_own_can_be_moved(write):
    """By --offload: an object with `.to`."""
    text = """
import torch

class Score(torch.nn.Linear):
    def forward(self, images, prompts):
        return [self.weight.is_meta] * len(prompts)

score = Score(1, 1)

def builds():
    return score
"""
    path = write("mine.py", text)
    for function in ("score", "builds"):
        reward = load_reward(f"{path}:{function}")
        reward.to("meta")
        assert reward(IMAGES, PROMPTS).tolist() == [1, 1, 1] and reward.model.weight.is_meta
    load_reward(write("my_reward.py", FORMS) + ":score").to("meta")  # nothing to move


# ---------------------------------------------------------------- its name, its modules, processes


POOL = """
import multiprocessing

class Half:
    def __call__(self, number):
        return number / 2

def spawn(images, prompts):
    numbers = [float(picture.mean()) for picture in images]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.map_async(Half(), numbers).get(timeout=25)
"""


@pytest.mark.parametrize("name", ["pooled.py", "it's mine/rewards.py", "json.py"])
def test_a_pool_of_spawned_processes_finds_the_file(write, name, capsys):
    """As on macOS, Windows and in Python 3.14: what it is sent has the module's name on it."""
    start = time.perf_counter()
    torch.testing.assert_close(called(write(name, POOL) + ":spawn"), BRIGHTNESS / 2)
    assert time.perf_counter() - start < 20
    said = capsys.readouterr().out
    assert ("is called like another module" in said) == (name != "pooled.py")


@pytest.mark.parametrize("name", ["rewards.py", "train.py", "support.py", "json.py", "torch.py"])
def test_a_file_called_like_another_module(write, name, tmp_path, capsys):
    """It is imported as folder.file, which is said; the other one stays what it was."""
    stem = name[:-3]
    was = __import__(stem)
    path = write(f"mine/{name}", "def score(images, prompts): return [len(__name__)] * 3")
    assert called(f"{path}:score")[0] == len(f"mine.{stem}") and sys.modules[stem] is was
    said = f"{name} is called like another module, so it is imported as mine.{stem}.\n"
    assert capsys.readouterr().out == said


def test_two_files_of_one_name_are_two_rewards(write):
    """As two metrics of eval.py; their folders may have one name, too."""
    for name in ("mine.py", "my/rewards.py"):
        names = [write(f"{n}/{name}", f"n = {n}\nf = lambda x, p: [n] * 3") for n in (10, 20)]
        first, second = (load_reward(f"{path}:f") for path in names)
        assert first(IMAGES, PROMPTS)[0] == 10 and second(IMAGES, PROMPTS)[0] == 20


PLACES = ["rewards/rewards.py", "v1.0/rewards.py", "support/rewards.py", "my-rewards/my-reward.py"]


@pytest.mark.parametrize("name", PLACES)
def test_a_file_may_lie_anywhere_and_have_any_name(write, name):
    assert called(write(name, "f = lambda x, p: [5] * 3") + ":f").tolist() == [5, 5, 5]


def test_modules_beside_the_file_can_be_imported(write):
    """At its start and at a call. The file may be anywhere; the modules are plain ones."""
    write("helper.py", "value, calls = 10, 0")
    write("late/__init__.py", "")
    write("late/part.py", "value = 1000")
    text = """
import helper

def score(images, prompts):
    import late.part
    helper.calls += 1
    return [helper.value + late.part.value + helper.calls] * len(prompts)
"""
    reward = load_reward(write("mine.py", text) + ":score")
    assert [reward(IMAGES, PROMPTS)[0].item() for _ in range(2)] == [1011, 1012]


def test_the_users_modules_do_not_take_the_place_of_ours(write, tmp_path):
    """Their folder comes last: ours and Python's keep their names."""
    write("lora.py", "1 / 0")
    write("json.py", "1 / 0")
    text = "import json, lora\n\ndef score(images, prompts):\n    return [len(json.dumps([]))] * 3"
    assert called(write("mine.py", text) + ":score").tolist() == [2, 2, 2]
    assert str(tmp_path) in sys.path[-2:] and sys.path[0] != str(tmp_path)


def test_what_the_file_sets_while_it_is_imported_holds_in_its_calls(write):
    """`sys.path`, as people do who score with a repository of somebody else."""
    write("elsewhere/theirs.py", "value = 7")
    text = """
import os, sys
sys.path.insert(0, os.path.join(os.path.dirname(__file__), "elsewhere"))
os.environ["MINE"] = "3"

def score(images, prompts):
    import theirs
    return [theirs.value + int(os.environ["MINE"])] * len(prompts)
"""
    try:
        assert called(write("mine.py", text) + ":score").tolist() == [10, 10, 10]
    finally:
        os.environ.pop("MINE")


def test_a_name_is_the_users_home(write, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    write("mine.py", "f = lambda x, p: [1] * 3")
    assert called("~/mine.py:f").tolist() == [1, 1, 1] and reward_code("~/mine.py:f")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.py").symlink_to(tmp_path / "mine.py")
    assert called("link.py:f").tolist() == [1, 1, 1]


# ---------------------------------------------------------------- errors

BROKEN = """
def raises(images, prompts):
    return images.no_such_thing

def one_argument(images):
    return images.mean((1, 2, 3))

def four(images, prompts, metadata, more):
    return [1] * 3

def leaves(images, prompts):
    raise SystemExit(7)

def leaves_quietly(images, prompts):
    raise SystemExit

def deep(images, prompts):
    return deep(images, prompts)

def talks(images, prompts):
    raise ValueError("first\\nsecond")

def chats(images, prompts):
    raise ValueError("b" * 999)

class Own(BaseException):
    pass

def own(images, prompts):
    raise Own(5)

class Broken:
    def __init__(self):
        raise OSError("no weights")

class NeedsMore:
    def __init__(self, path):
        pass

def huge(images, prompts):
    return [0, 3e38, 0]

def minus_huge(images, prompts):
    return [0, 0, -1e30]

def nan(images, prompts):
    return [float("nan"), 0, 0], {}

def builds_none():
    def inner(images, prompts):
        return [1] * 3

def builds_number():
    return 1

number = 3
"""


@pytest.mark.parametrize(
    "function, reason, line",
    [
        ("raises", "AttributeError: 'Tensor' object has no attribute 'no_such_thing'", 3),
        (
            "one_argument",
            "TypeError: one_argument() takes 1 positional argument but 2 were given",
            0,
        ),
        ("four", "TypeError: four() missing 2 required positional arguments: ", 0),
        ("leaves", "SystemExit: 7", 12),
        ("leaves_quietly", "SystemExit()", 15),
        ("deep", "RecursionError: maximum recursion depth exceeded", 18),
        ("talks", "ValueError: first", 21),
        ("chats", ("ValueError: " + "b" * 999)[:200], 24),
        ("own", "Own: 5", 30),
        ("Broken", "OSError: no weights", 34),
        ("NeedsMore", "TypeError: ", 0),
    ],
)
def test_an_error_is_shown_with_the_users_own_traceback_then_in_one_line(
    write, capsys, function, reason, line
):
    path = write("mine.py", BROKEN)
    assert stop_of(f"{path}:{function}").startswith(f"reward {path}:{function} raised {reason}")
    said = capsys.readouterr().err
    assert said.startswith("Traceback (most recent call last):\n")
    if line:
        assert f'File "{path}", line {line}, in ' in said


@pytest.mark.parametrize(
    "function, words",
    [
        ("huge", "3.*e+38 for the prompt 'a dog'"),
        ("minus_huge", "-1.*e+30 for the prompt 'a cat washing dishes'"),
        ("nan", "nan for the prompt 'a cat washing dishes'"),
    ],
)
def test_a_number_that_can_not_be_summed_names_its_prompt(write, function, words, capsys):
    path = write("mine.py", BROKEN)
    first, _, last = words.partition("*")
    message = stop_of(f"{path}:{function}").removeprefix(f"reward {path}:{function} returned ")
    assert message.startswith(first) and message.endswith(last)
    assert not capsys.readouterr().err  # nothing was raised


def test_an_error_in_a_library_shows_the_way_there(write, capsys):
    """The error is raised in torch, which is called by the helper, called by the reward."""
    write("helper.py", "import torch\n\ndef add(x):\n    return torch.nn.Linear(3, 1)(x)\n")
    text = "from helper import add\n\ndef score(images, prompts):\n    return add(images)\n"
    path = write("mine.py", text)
    assert f"reward {path}:score raised RuntimeError: mat1 and mat2" in stop_of(f"{path}:score")
    said = capsys.readouterr().err
    helper = path.replace("mine", "helper")
    lines = [f'File "{path}", line 4, in score', f'File "{helper}", line 4, in add']
    assert 0 < said.index(lines[0]) < said.index(lines[1])


@pytest.mark.parametrize(
    "text, words, reason",
    [
        ("import os\n1 / 0\n", "line 2, in <module>\n    1 / 0\n", "ZeroDivisionError: div"),
        ("a = 1\nb = (\n", "line 2\n    b = (\n", "SyntaxError: '(' was never closed"),
        ('a = "\0"', "", "SyntaxError: source code"),
        ("import no_such_module", "line 1, in", "ModuleNotFoundError: No module named"),
        ("import next_door", 'next_door.py", line 2\n    c d\n', "SyntaxError: invalid"),
        ("raise ValueError('a\\n' * 99 + 'b' * 999)", "line 1, in", "ValueError: a"),
        ("import sys; sys.exit()", "sys.exit()", "SystemExit"),
        ("import sys; sys.exit(0)", "line 1, in <module>", "SystemExit: 0"),
        ("a = '\udcff'", "", "SyntaxError: (unicode error)"),
    ],
)
def test_a_file_that_does_not_run_shows_its_lines_and_ends(tmp_path, capsys, text, words, reason):
    (tmp_path / "next_door.py").write_text("a = 1\nc d\n")
    (tmp_path / "mine.py").write_bytes(text.encode("utf-8", "surrogateescape"))
    name = f"{tmp_path}/mine.py:score"
    if "source code" in reason and sys.version_info < (3, 11):
        reason = reason.replace("SyntaxError", "ValueError")  # Python 3.10 calls it so
    assert stop_of(name).startswith(f"reward {name} raised {reason}")
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, words",
    [
        ("aesthetic", "one of clip, bert, jpeg"),
        ("missing.py:score", "there is no file"),
        ("x" * 300, "unknown --reward xxx"),
        ("x" * 300 + ".py:score", "there is no file"),
        ("{folder}:score", "there is no file"),
        ("{own}", "or your own as file.py:function"),
    ],
)
def test_a_name_is_refused_without_loading(write, tmp_path, name, words, capsys):
    (tmp_path / "folder.py").mkdir()
    name = name.format(own=write("mine.py", "1 / 0"), folder=tmp_path / "folder.py")
    assert words in check_reward_name(name) and "\n" not in check_reward_name(name)
    assert error_of(name, capsys) == f"error: {check_reward_name(name)}"


@pytest.mark.parametrize(
    "function", ["absent", "number", "", "a b", "builds_none", "builds_number"]
)
def test_what_is_no_reward_ends_with_one_line(write, function, capsys):
    """Also where the return of the inner function is forgotten, or a function's arguments."""
    path = write("mine.py", BROKEN)
    wanted = (
        f"error: reward {path}:{function}: {function} of {path} is no function, and builds none"
    )
    assert error_of(f"{path}:{function}", capsys) == wanted


@pytest.mark.parametrize("kind", [KeyboardInterrupt, torch.OutOfMemoryError])
def test_ctrl_c_and_out_of_memory_stay_themselves(write, kind, capsys):
    raises = f"import builtins, torch; raise {kind.__module__}.{kind.__name__}"
    path = write("mine.py", f"import torch\ndef score(images, prompts):\n    {raises}\n")
    with pytest.raises(kind):
        called(f"{path}:score")
    with pytest.raises(kind):
        load_reward(write("now.py", f"import torch\n{raises}\n") + ":score")
    assert not capsys.readouterr().err


# ---------------------------------------------------------------- the mark of its code


def test_the_mark_is_of_the_file_and_of_what_it_imports_from_its_folder(write, tmp_path):
    """Whenever it imports it, and by whatever way. Other files there may change."""
    text = """
import json, no_such_module
from part import one

def f(x, p):
    import late
    return json, one, late

1 / 0
"""
    name = write("mine.py", text) + ":f"
    for helper in ("part/__init__.py", "part/one.py", "late.py", "second.py"):
        write(helper, "import second" if helper == "late.py" else "1 / 0")
    write("other.py", "")
    write("json.py", "")
    mark = reward_code(name)
    assert mark and "second" not in sys.modules, "nothing is run"
    assert reward_code(name) == mark == reward_code(name.replace(":f", ":g"))
    write("other.py", "changed = 1")
    write("notes.txt", "changed")
    assert reward_code(name) == mark
    marks = {mark}
    for changed in ("mine.py", "part/__init__.py", "part/one.py", "late.py", "second.py"):
        path = tmp_path / changed
        old = path.read_text()
        path.write_text(old + "\n# edited\n")
        marks.add(reward_code(name))
        path.write_text(old)
        assert reward_code(name) == mark
    assert len(marks) == 6
    assert reward_code("clip") == reward_code("jpeg") == ""


def test_the_mark_of_a_file_that_is_no_code_is_that_of_its_bytes(tmp_path):
    """It ends when it is imported, which says more."""
    marks = set()
    for text in (b"a = (", b"b = (", b"a = '\xff'", b"a = '\xfe'", b""):
        (tmp_path / "mine.py").write_bytes(text)
        marks.add(reward_code(f"{tmp_path}/mine.py:a"))
    assert len(marks) == 5 and "" not in marks


def test_the_mark_does_not_depend_on_the_place(write):
    text = "import helper\ndef f(x, p): return 1"
    names = [write(f"{folder}/mine.py", text) + ":f" for folder in ("a", "b/c")]
    for folder in ("a", "b/c"):
        write(f"{folder}/helper.py", "a = 1")
    assert reward_code(names[0]) == reward_code(names[1])
