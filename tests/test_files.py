"""Files: a stop leaves the old one or the new one, equal data are equal bytes, damage is told."""

import json
import os
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file

from files import aside, read_json, read_safetensors, write_json, write_safetensors, write_text

NESTED = "[" * 200_000


def test_a_stop_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with pytest.raises(KeyboardInterrupt), aside(path) as part:
        part.write_text("half of the n")
        assert path.read_text() == "old"
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    write_text(path, "é")
    assert path.read_bytes() == "é".encode() and list(tmp_path.iterdir()) == [path]


def test_every_file_follows_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        write_json(tmp_path / "a.json", {})
        write_safetensors(tmp_path / "a.safetensors", {"w": torch.zeros(2)})
    finally:
        os.umask(old)
    assert {stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()} == {0o640}


def test_json_comes_back(tmp_path):
    data = {"a": [1, 2.5, None, "é"], "b": {"c": True}}
    write_json(tmp_path / "a.json", data)
    assert read_json(tmp_path / "a.json") == data
    assert read_json(tmp_path / "none.json") is None
    assert (tmp_path / "a.json").read_text().endswith("}\n")


@pytest.mark.parametrize("text", [b"", b"{cut", b"\xff\xfe{}", NESTED.encode(), b"9" * 5000])
def test_damaged_json_ends_with_one_line(tmp_path, capsys, text):
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(SystemExit) as stop:
        read_json(tmp_path / "a.json")
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and f"{tmp_path}/a.json is damaged" in err


def test_tensors_and_header_come_back_and_equal_data_are_equal_bytes(tmp_path):
    """In whatever order they came; the library keeps none of the header's keys."""
    tensors = {"b": torch.randn(2, 3), "a": torch.randn(4).to(torch.bfloat16)}
    header = {"rounds": 3, "history": {"a cat": [[0, [0.5]]], "a 'dog'": []}}
    write_safetensors(tmp_path / "one", tensors, header)
    for n in range(5):
        again = {k: tensors[k] for k in ("a", "b")}
        write_safetensors(tmp_path / "two", again, dict(reversed(header.items())))
        assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes(), n
    back, read = read_safetensors(tmp_path / "one")
    assert read == header and back.keys() == tensors.keys()
    assert all(torch.equal(back[k], tensors[k]) for k in tensors)
    write_safetensors(tmp_path / "plain", {"t": torch.randn(3, 2).T})  # not contiguous
    assert read_safetensors(tmp_path / "plain")[1] == {}
    assert load_file(tmp_path / "plain")["t"].shape == (2, 3)


@pytest.mark.parametrize("header", ["{cut", "[1]", "3", NESTED])
def test_a_header_that_is_no_runs_is_a_value_error(tmp_path, header):
    save_file({"w": torch.zeros(2)}, tmp_path / "a", {"run": header})
    with pytest.raises(ValueError):
        read_safetensors(tmp_path / "a")


def test_damaged_tensors_are_a_value_error(tmp_path):
    write_safetensors(tmp_path / "a", {"w": torch.zeros(200)})
    whole = (tmp_path / "a").read_bytes()
    for damaged in (whole[:-9], whole[:4], b"", b"no tensors at all"):
        (tmp_path / "a").write_bytes(damaged)
        with pytest.raises(ValueError):
            read_safetensors(tmp_path / "a")
    with pytest.raises(OSError):
        read_safetensors(tmp_path / "none")


def test_diffusers_data_of_a_lora_is_read(tmp_path):
    data = {"unet.r": 4, "unet.lora_alpha": 8}
    save_file({"w": torch.zeros(2)}, tmp_path / "a", {"lora_adapter_metadata": json.dumps(data)})
    assert read_safetensors(tmp_path / "a")[1] == data
