"""A reward of the user's own, `file.py:function`: its code runs apart from the run.

Modules beside the file can be imported by it, and by nothing else. What the code sets in
the process (folder, gradients, default types, ...) holds until it returns. An exception
becomes a `Stop` that shows the lines of the user's code.
"""

import os
import pkgutil
import signal
import sys
import traceback
import types
from functools import partial
from pathlib import Path

import torch

from processes import Stop, die

ROOT = Path(__file__).resolve().parent


def split_name(name):
    """The path and function of "path/file.py:function"; None for a built-in reward."""
    path, colon, function = name.rpartition(":")
    return (Path(path), function) if colon and path.endswith(".py") else None


def own_reward(name):
    """The function of --reward file.py:function. This runs the file's code.

    Ends with the user's own lines and one line of ours if the file does not run.
    """
    path, function = split_name(name)
    file = UserFile(path, f"reward {name}")
    try:
        file.run(file.execute)
    except Stop as problem:
        die(problem)
    reward = getattr(file.module, function, None)
    if not callable(reward):
        die(f"reward {name}: {path} has no function {function}")
    call = partial(file.run, reward)
    call.to = partial(file.run, getattr(reward, "to", lambda device: reward))
    return call


def attribute(owner, name):
    return partial(getattr, owner, name), partial(setattr, owner, name)


def no_default_device(_):
    """How torch starts, and a run with it."""
    torch.set_default_device(None)
    context = getattr(torch, "_GLOBAL_DEVICE_CONTEXT", None)
    if getattr(context, "device_context", 0) is None:  # torch 2.9 can not read a None again
        del context.device_context


# What code can change in a process, and a run depends on: how to read it, how to set
# it. Random state is not in it, as all noise of a run is keyed, nor are environment
# variables, which a run reads at its start.
PROCESS = (
    (os.getcwd, os.chdir),
    (lambda: sys.path[:], partial(setattr, sys, "path")),
    attribute(sys, "stdout"),
    attribute(sys, "stderr"),
    (partial(signal.getsignal, signal.SIGINT), partial(signal.signal, signal.SIGINT)),
    (partial(signal.getsignal, signal.SIGTERM), partial(signal.signal, signal.SIGTERM)),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_default_device, no_default_device),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    attribute(torch.backends.cudnn, "benchmark"),
    attribute(torch.backends.cudnn, "deterministic"),
)


def restore(values):
    """Set what does not have its value of `PROCESS` any more."""
    for (read, write), value in zip(PROCESS, values):
        try:
            same = read() == value
        except Exception:  # a folder that was deleted, a device that is not there
            same = False
        if not same:
            write(value)


def one_line(problem):
    """An exception's name and the first line of its message."""
    lines = "".join(traceback.format_exception_only(problem)).split("\n")
    return next(line for line in lines if not line.startswith(" "))[:200]


class UserFile:
    """The file at `path`, called `what` in messages, and the modules beside it."""

    def __init__(self, path, what):
        self.path, self.what = path.resolve(), what
        self.module = types.ModuleType(f"own_{path.stem}")
        self.module.__file__ = str(self.path)
        self.modules = {self.module.__name__: self.module}
        # Names of the user's modules. Their model.py is not ours, but a library that is
        # loaded keeps its name, and a user's rewards.py can import ours.
        beside = {m.name for m in pkgutil.iter_modules([str(self.path.parent)])}
        ours = {m.name for m in pkgutil.iter_modules([str(ROOT)])}
        loaded = sys.modules.keys() - (ours if self.path.parent != ROOT else set())
        self.names = beside - loaded - {path.stem} | {self.module.__name__}

    def owns(self, module_name):
        return str(module_name).partition(".")[0] in self.names

    def swap_modules(self, modules):
        """Put `modules` in the place of those with the user's names; returns these."""
        old = {name: m for name, m in sys.modules.copy().items() if self.owns(name)}
        for name in old:
            del sys.modules[name]
        sys.modules.update(modules)
        return old

    def execute(self):
        exec(compile(self.path.read_bytes(), self.path, "exec"), vars(self.module))

    def run(self, function, *inputs):
        """function(*inputs), where the function is or runs the user's code.

        Raises `Stop` for whatever that raises, sys.exit included; Ctrl-C and torch's
        OutOfMemoryError stay themselves.
        """
        before = [read() for read, _ in PROCESS]
        outside = self.swap_modules(self.modules)
        sys.path.insert(0, str(self.path.parent))
        try:
            return function(*inputs)
        except (KeyboardInterrupt, torch.OutOfMemoryError):
            raise
        except BaseException as problem:
            raise Stop(self.explain(problem)) from problem
        finally:
            self.modules = self.swap_modules(outside)
            restore(before)

    def explain(self, problem):
        """The user's own lines in an exception's traceback, four calls; then the reason."""
        frames = traceback.walk_tb(problem.__traceback__)
        own = ((f, line) for f, line in frames if self.owns(f.f_globals.get("__name__")))
        text = traceback.StackSummary.extract(own, limit=-4).format()
        if isinstance(problem, SyntaxError):
            text += traceback.format_exception_only(problem)[:-1]
        head = [f"from the code of {self.what}:\n", *text] if text else []
        return "".join([*head, f"{self.what} raised {one_line(problem)}"])
