"""Prompts: the paper's lists, and every form of a user's file that people have."""

import json

import pytest

from prompts import load_prompts
from tiny.world import read_lists


def test_the_papers_lists():
    """Sizes of App. H; no prompt is in both lists of a template."""
    lists = [load_prompts(n) for n in (1, 2, 3)]
    assert [tuple(map(len, both)) for both in lists] == [(45, 90), (40, 40), (40, 30)]
    assert lists[0][0][0] == "a cat washing dishes" and not set(lists[0][0]) & set(lists[0][1])
    assert lists[2] == (read_lists()["3 train"], read_lists()["3 unseen"])


CAT, DOG = ["a cat"], ["a dog"]


@pytest.mark.parametrize(
    "name, content, train, unseen",
    [
        ("my.txt", "# mine\n a cat \n\na dog\n", CAT + DOG, []),
        ("my.txt", "a cat\na dog\na cat\n", CAT + DOG, []),
        ("my", "a cat", CAT, []),
        ("my.txt", "[train]\na cat\n[unseen]\na dog\n", CAT, DOG),
        ("my.txt", "[unseen]\na dog\n[train]\na cat\n", CAT, DOG),
        ("my.txt", "a cat\n[unseen]\na dog\n", CAT, DOG),
        ("my.txt", "\ufeff[train]\na cat\n[unseen]\na dog\n", CAT, DOG),  # Notepad's mark
        ("my.txt", "\ufeffa cat\n", CAT, []),
        ("my.TXT", "[train]\r\na cat\r\n\r\n[unseen]\r\na dog\r\n", CAT, DOG),
        ("my.txt", "\ta\tcat \t\n\u00a0a  dog\n", CAT + DOG, []),
        ("my.txt", "[ train ]\na cat\n\n[unseen]\n\n# none\n", CAT, []),
        ("my.jsonl", '{"prompt": "a cat"}\n\n{"prompt": "a  dog ", "id": 3}\n', CAT + DOG, []),
        ("my.jsonl", '\ufeff{"text": "a cat"}\r\n{"text": "a cat"}\r\n', CAT, []),
        ("my.json", '{"text": "a\\u2028cat", "prompt": "a dog"}', DOG, []),
        ("my.jsonl", '{"text": "a\u2028cat"}\n', CAT, []),  # a line's end for Python, not in JSON
        ("my.csv", "prompt\na cat\na dog\n", CAT + DOG, []),
        ("my.CSV", '\ufeffid,text\r\n1,"a\ncat"\r\n2,a dog\r\n', CAT + DOG, []),
        ("my.csv", '"prompt","text"\n"a cat","a dog"\n', CAT, []),
    ],
)
def test_forms_of_a_file(tmp_path, name, content, train, unseen):
    (tmp_path / name).write_bytes(content.encode())
    assert load_prompts(1, tmp_path / name) == (train, unseen)


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("my.txt", None, "No such file"),
        ("my.txt", "", "holds no prompt"),
        ("my.txt", "# a comment\n\n[train]\n", "holds no prompt"),
        ("my.txt", "[animals]\na cat\n", "[animals]: call it [train]"),
        ("my.txt", "[train]\na cat\n[test]\na dog\n", "[test]: call it"),
        ("my.txt", "[unseen]\na dog\n", "must all be under [train]"),
        ("my.txt", "a bird\n[train]\na cat\n", "must all be under [train]"),
        ("my.txt", b"\xff\xfea\x00 \x00c\x00", "cannot read"),  # UTF-16
        ("my.txt", '{"prompt": "a cat"}\n{"prompt": "a dog"}\n', "name it .jsonl"),
        ("my.yaml", "- a cat\n", "name it .txt, .jsonl or .csv"),
        ("my.parquet", b"PAR1\x00", "name it .txt, .jsonl or .csv"),
        ("my.jsonl", "a cat\n", "cannot read"),
        ("my.jsonl", "", "holds no prompt"),
        ("my.jsonl", '{"prompt": "a cat"}\n{"prompt": "a d', "cannot read"),
        ("my.jsonl", '["a cat", "a dog"]', 'needs a text called "prompt" or "text"'),
        ("my.jsonl", '"a cat"\n', 'needs a text called "prompt" or "text"'),
        ("my.jsonl", '{"caption": "a cat"}\n', 'needs a text called "prompt" or "text"'),
        ("my.jsonl", '{"prompt": 3}\n', 'needs a text called "prompt" or "text"'),
        ("my.jsonl", '{"prompt": "a cat"}\n{"prompt": " "}\n', "needs a text"),
        ("my.jsonl", '{"prompt": "\\ud800"}\n', "cannot read"),  # half a character
        ("my.json", json.dumps([{"prompt": "a cat"}], indent=1), "cannot read"),
        ("my.jsonl", "[" * 200_000, "cannot read"),
        ("my.csv", "caption,id\na cat,1\n", "needs a text"),
        ("my.csv", "a cat\na dog\n", "needs a text"),
        ("my.csv", "id,prompt\n1,a cat\n2\n", "needs a text"),
        ("my.csv", "prompt\n" + "a" * 200_000 + "\n", "cannot read"),
        ("my.csv", "prompt\n", "holds no prompt"),
    ],
)
def test_files_that_are_refused(tmp_path, capsys, name, content, words):
    """With one line that names the file, and never in part."""
    if content is not None:
        content = content if isinstance(content, bytes) else content.encode()
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        load_prompts(1, str(tmp_path / name))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1
    assert err.startswith("error: ") and str(tmp_path / name) in err and words in err
