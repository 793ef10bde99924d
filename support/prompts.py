"""Prompts c: the paper's three templates (App. H, `prompts.txt`), or a file of the user.

A text file has a prompt a line; lines [train] and [unseen] split it into both lists.
UTF-8, with or without a byte-order mark. White space of any kind is one space. A line
that begins with # is a comment.
"""

from pathlib import Path

from support.command import die

PROMPTS = Path(__file__).resolve().parent.parent / "prompts.txt"


def read_lists(path=PROMPTS):
    """A text file of prompts -> {section: [prompt, ...]}, in the file's order.

    A line [name] opens a section; prompts before the first are in section "". Blank
    lines, comments and sections without prompts do not count. Raises OSError and
    UnicodeDecodeError.
    """
    lists, section = {}, ""
    for line in Path(path).read_text(encoding="utf-8-sig").split("\n"):
        line = " ".join(line.split())
        if line.startswith("[") and line.endswith("]"):
            section = line[1:-1].strip()
        elif line and not line.startswith("#"):
            lists.setdefault(section, []).append(line)
    return lists


def load_prompts(template, path=None, say=lambda text: None):
    """The prompts to train on and the unseen ones, two lists; doubles count once.

    `say` is told what a reader of the file could miss. Ends with one line for a file
    that can not be read, or that would be read in part.
    """
    if path is None:
        lists = read_lists()
        return lists[f"{template} train"], lists[f"{template} unseen"]
    if Path(path).suffix.lower() not in (".txt", ""):
        die(f"{path} is no text file of prompts: write a prompt a line, and name it .txt")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        lists = read_lists(path)
    except UnicodeError:
        die(f"cannot read the prompt file {path}: it is no UTF-8 text, save it as UTF-8")
    except OSError as problem:
        die(f"cannot read the prompt file {path}: {problem.strerror}")
    if not lists:
        die(f"the prompt file {path} holds no prompt: write one a line, without # before it")
    if foreign := lists.keys() - {"", "train", "unseen"}:
        die(f"{path} has a list [{min(foreign)}]: call it [train] or [unseen]")
    if ("" in lists) == ("train" in lists):
        die(f"{path}: the prompts to train on must all be under [train], or above [unseen]")
    train = list(dict.fromkeys(lists.get("train", lists.get(""))))
    unseen = list(dict.fromkeys(lists.get("unseen", [])))
    for prompt in train + unseen:
        if not any(c.isprintable() and not c.isspace() for c in prompt):
            die(f"{path} has a prompt of invisible characters alone: {ascii(prompt)}")
        if prompt.startswith('{"'):
            die(f"{path} looks like JSON: write a prompt a line")
    if comments := sum(line.lstrip().startswith("#") for line in text.split("\n")):
        say(f"{path}: {comments} lines begin with # and are comments, so no prompts.")
    if both := [prompt for prompt in unseen if prompt in train]:
        say(f"{path}: {len(both)} prompts stand under [train] and [unseen], e.g. {both[0]!r}.")
    return train, unseen
