"""Prompts: the paper's lists, and the files that people write."""

import pytest

from support.prompts import PROMPTS, load_prompts, read_lists


def test_the_papers_lists():
    """Sizes of App. H; no prompt is in both lists of a template."""
    lists = [load_prompts(n) for n in (1, 2, 3)]
    assert [tuple(map(len, both)) for both in lists] == [(45, 90), (40, 40), (40, 30)]
    assert all(not set(train) & set(unseen) for train, unseen in lists)
    assert lists[0][0][0] == "a cat washing dishes" and PROMPTS.name == "prompts.txt"
    assert lists[2] == (read_lists()["3 train"], read_lists()["3 unseen"])


CAT, DOG = ["a cat"], ["a dog"]


@pytest.mark.parametrize(
    "name, content, train, unseen",
    [
        ("my.txt", " a cat \n\na dog\n", CAT + DOG, []),
        ("my.txt", "a cat\na dog\na cat\n", CAT + DOG, []),
        ("my", "a cat", CAT, []),
        ("my.txt", "[train]\na cat\n[unseen]\na dog\na dog\n", CAT, DOG),
        ("my.txt", "[unseen]\na dog\n[train]\na cat\n", CAT, DOG),
        ("my.txt", "a cat\n[unseen]\na dog\n", CAT, DOG),
        ("my.txt", "\ufeff[train]\na cat\n[unseen]\na dog\n", CAT, DOG),  # Notepad's mark
        ("my.txt", "\ufeffa cat\n", CAT, []),
        ("my.TXT", "[train]\r\na cat\r\n\r\n[unseen]\r\na dog\r\n", CAT, DOG),
        ("my.txt", "\ta\tcat \t\n\u00a0a  dog\n", CAT + DOG, []),
        # ends of a line for Python's splitlines alone: an editor shows one line
        ("my.txt", "a\u2028cat\na\x0bdog\n", CAT + DOG, []),
        ("my.txt", "a\x0ccat\na\u2029\x85dog\na\x1cdog", CAT + DOG, []),
        ("my.txt", "[\u2028train ]\na cat\n[unseen]\n", CAT, []),
        (
            "my.txt",
            "a zero\u200bwidth space\n\u200ba cat\n",
            ["a zero\u200bwidth space", "\u200ba cat"],
            [],
        ),
        ("my.txt", "{a cat}\n[a dog\n", ["{a cat}", "[a dog"], []),
    ],
)
def test_forms_of_a_file(tmp_path, name, content, train, unseen):
    """Nothing of these is worth a line on the screen."""
    (tmp_path / name).write_bytes(content.encode())
    told = []
    assert load_prompts(1, tmp_path / name, told.append) == (train, unseen)
    assert not told


def test_comments_are_left_out_and_counted(tmp_path):
    """A prompt may begin with # by mistake; one in the middle of a line is no comment."""
    path = tmp_path / "my.txt"
    path.write_text("#1 dad mug on a table\n  # a comment\na bird #1\n[unseen]\n#a dog\na fox\n")
    told = []
    assert load_prompts(1, path, told.append) == (["a bird #1"], ["a fox"])
    assert len(told) == 1 and told[0].startswith(f"{path}: 3 lines begin with #")
    path.write_text("#1 dad mug\na cat\n")
    load_prompts(1, path, told.append)
    assert told[1].startswith(f"{path}: 1 line")
    assert load_prompts(1, path) == (CAT, [])  # nobody need be told


def test_a_prompt_under_both_lists_is_told(tmp_path):
    """As unseen it would be none. It is however what the file says."""
    path = tmp_path / "my.txt"
    path.write_text("[train]\na cat\na  dog\na fox\n[unseen]\na dog\na cat\na bird\n")
    told = []
    train, unseen = load_prompts(1, path, told.append)
    assert train == ["a cat", "a dog", "a fox"] and unseen == ["a dog", "a cat", "a bird"]
    assert len(told) == 1 and "2 prompts stand under [train] and [unseen]" in told[0]
    assert "'a dog'" in told[0]


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("my.txt", None, "No such file"),
        ("my.txt", "", "holds no prompt"),
        ("my.txt", "# a comment\n\n[train]\n", "holds no prompt"),
        ("my.txt", "#1 dad mug\n", "without # before it"),
        ("my.txt", "[animals]\na cat\n", "[animals]: call it [train]"),
        ("my.txt", "[train]\na cat\n[test]\na dog\n", "[test]: call it"),
        ("my.txt", "[Train]\na cat\n", "[Train]: call it [train]"),
        ("my.txt", "[unseen]\na dog\n", "must all be under [train]"),
        ("my.txt", "a bird\n[train]\na cat\n", "must all be under [train]"),
        ("my.txt", "a cat".encode("utf-16"), "save it as UTF-8"),  # with its mark
        ("my.txt", "caf\u00e9\n".encode("latin-1"), "save it as UTF-8"),
        ("my.txt", '{"prompt": "a cat"}\n{"prompt": "a dog"}\n', "looks like JSON"),
        ("my.txt", 'a cat\n[unseen]\n{"prompt": "a dog"}\n', "looks like JSON"),
        ("my.txt", "a cat\n".encode("utf-16-le"), "invisible characters alone: '\\x00'"),
        ("my.txt", "a cat\n\u200b\n", "invisible characters alone: '\\u200b'"),
        ("my.txt", "a cat\n[unseen]\n\u2060 \u00ad\n", "'\\u2060 \\xad'"),
        ("my.jsonl", '{"prompt": "a cat"}\n', "write a prompt a line, and name it .txt"),
        ("my.csv", "prompt\na cat\n", "write a prompt a line, and name it .txt"),
        ("my.yaml", "- a cat\n", "write a prompt a line, and name it .txt"),
        ("my.parquet", b"PAR1\x00", "write a prompt a line, and name it .txt"),
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
    assert stop.value.code == 2 and err.count("\n") == 1 and err.isascii()
    assert err.startswith("error: ") and str(tmp_path / name) in err and words in err
