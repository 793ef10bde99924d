"""Prompts c: the paper's three templates (App. H), or a file of the user.

    .txt             a prompt a line; sections [train] and [unseen] for both lists
    .jsonl, .json    JSON Lines: an object a line, with "prompt" or "text"
    .csv             a column of that name

UTF-8, with or without a byte-order mark. White space of any kind is one space.
"""

import csv
import io
import json
from pathlib import Path

from processes import die
from tiny.world import read_lists

TABLES = (".jsonl", ".json", ".csv")


def load_prompts(template, path=None):
    """The prompts to train on and the unseen ones, two lists; doubles count once.

    Ends with one line for a file that can not be read, or that would be read in part.
    """
    if path is None:
        lists = read_lists()
        return lists[f"{template} train"], lists[f"{template} unseen"]
    kind = Path(path).suffix.lower()
    if kind not in (".txt", "", *TABLES):
        die(f"{path} is no known kind of prompt file: name it .txt, .jsonl or .csv")
    try:
        lists = {"": read_table(path, kind)} if kind in TABLES else read_lists(path)
    except (OSError, ValueError, RecursionError, csv.Error) as problem:
        reason = getattr(problem, "strerror", None) or problem
        die(f"cannot read the prompt file {path}: {reason}")
    if not any(lists.values()):
        die(f"the prompt file {path} holds no prompt: write one a line")
    if foreign := lists.keys() - {"", "train", "unseen"}:
        die(f"{path} has a list [{min(foreign)}]: call it [train] or [unseen]")
    if ("" in lists) == ("train" in lists):
        die(f"{path}: the prompts to train on must all be under [train], or above [unseen]")
    train, unseen = lists.get("train", lists.get("")), lists.get("unseen", [])
    if kind not in TABLES and any(prompt.startswith('{"') for prompt in train):
        die(f"{path} looks like JSON Lines: name it .jsonl")
    return list(dict.fromkeys(train)), list(dict.fromkeys(unseen))


def read_table(path, kind):
    """The prompts of a JSON Lines or CSV file. Raises OSError, ValueError, csv.Error."""
    text = Path(path).read_text(encoding="utf-8-sig")
    if kind == ".csv":
        rows = list(csv.DictReader(io.StringIO(text)))
    else:
        rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    prompts = []
    for row in rows:
        prompt = row.get("prompt", row.get("text")) if isinstance(row, dict) else None
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError('each row needs a text called "prompt" or "text"')
        prompt.encode()  # a ValueError for half of a surrogate pair
        prompts.append(" ".join(prompt.split()))
    return prompts
