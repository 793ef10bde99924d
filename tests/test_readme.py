"""The README's map from equations to functions, and its commands' flags, can not rot."""

import importlib
import re

from conftest import ROOT

# Flags of torchrun, TensorBoard and this suite
OTHERS = {"--help", "--nproc", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--logdir", "--kills",
          "--full-size"}  # fmt: skip
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_function_of_the_map_exists_in_its_file_and_cites_the_paper():
    rows = [line for line in README.splitlines() if re.match(r"\| (Eq|App|Table|Alg|Sec|LoRA)", line)]
    assert len(rows) >= 16
    for row in rows:
        _, names, files, _ = (cell for cell in re.split(r" ?\| ?", row)[1:])
        modules = [importlib.import_module(f[:-3]) for f in re.findall(r"`(\w+\.py)`", files)]
        for name in re.findall(r"`(\w+)`", names):
            assert any(hasattr(module, name) for module in modules), f"{name} is not in {files}"


def test_equations_1_to_9_are_in_the_map():
    rows = " ".join(re.findall(r"^\| (Eq\.[^|]*)", README, re.M))
    assert {int(n) for n in re.findall(r"\b([1-9])\b(?!²)", rows)} >= set(range(1, 10))


def test_every_flag_named_in_the_readme_exists():
    files = ("train.py", "runs.py", "eval.py", "tiny.py", "bench.py", "results/run_all.py")
    sources = "".join((ROOT / f).read_text(encoding="utf-8") for f in files)
    import train

    settings = {f"--{name.replace('_', '-')}" for name, *_ in train.SETTINGS}
    for flag in set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", README)) - OTHERS:
        assert flag in settings or f'"{flag}"' in sources, flag
