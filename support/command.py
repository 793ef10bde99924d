"""How a command begins and ends: flags, and one clear line where something is wrong."""

import argparse
import difflib
import re
import sys

from tqdm import tqdm


class Stop(Exception):
    """The run can not go on; the message says why and what to do."""


def die(message):
    """Bad input: one clear line, exit code 2, no traceback."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def first_line(problem):
    """An exception's name and the first line of its message, at most 200 characters."""
    text = str(problem).strip()
    return f"{type(problem).__name__}: {text.splitlines()[0]}"[:200] if text else repr(problem)


def positive(text):
    """A whole number from 1 to 32767, for argparse, which names this function."""
    if not 1 <= int(text) < 2**15:
        raise ValueError
    return int(text)


def progress(items, name):
    """A bar called `name` over the items; none where the output is no terminal."""
    return tqdm(items, desc=name, leave=False, disable=None)


class Parser(argparse.ArgumentParser):
    """Flags with underscores or hyphens; a wrong flag ends with a line that names the nearest."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False)

    def parse_known_args(self, args=None, namespace=None):
        words = []
        for word in sys.argv[1:] if args is None else args:
            flag, equals, value = word.partition("=")
            if flag.startswith("--"):
                flag = flag.replace("_", "-")
            words.append(flag + equals + value)
        return super().parse_known_args(words, namespace)

    def error(self, message):
        if "unrecognized" in message:
            for flag in re.findall("--[a-z0-9-]+", message):
                for near in difflib.get_close_matches(flag, self._option_string_actions, 1, 0.82):
                    message += f"; did you mean {near}?"
        die(f"{message} (see --help)")
