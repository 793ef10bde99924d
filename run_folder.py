"""What a run reads, writes and resumes: one folder of text, pictures and safetensors.

    config.json                        every setting; paths are relative to the folder
    metrics.jsonl                      a line a round
    checkpoint.safetensors             LoRA, optimizer; in its header the round and reward history
    pytorch_lora_weights.safetensors   what diffusers' `load_lora_weights(folder)` reads
    webui_lora.safetensors             the same LoRA under the names of web UIs
    before.json, after.json            a score a picture; summary.json: their means and gains
    grids/*.png, README.md             pictures of the same noise; a model card

No random state is kept, since all noise is keyed (`ddim_logprob.py`). `files.py` writes
safely.
"""

import contextlib
import hashlib
import json
import math
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from files import read_json, read_safetensors, write_json, write_safetensors, write_text
from model import ROOT
from processes import Stop, die
from prompts import load_prompts

# Flags that may be given beside --resume: they change no expectation of what was done
# before
WITH_RESUME = (
    *("resume", "rounds", "threads", "checkpointing", "offload", "compile", "channels_last"),
    *("sample_batch", "micro_batch", "decode_batch", "report_to", "save_every"),
)
MAY_BE_NULL = ("out", "prompts", "prediction_type", "image_size", "preset", "validation_prompt")
OUT_OF_MEMORY = (
    "out of GPU memory: lower --micro-batch (the gradient stays the same), --sample-batch or "
    "--decode-batch, or add --checkpointing --offload"
)
CHECKPOINT, LORA = "checkpoint.safetensors", "pytorch_lora_weights.safetensors"


# ---------------------------------------------------------------- settings


def method_slug(cfg):
    """The algorithm and its strategies for the name of a folder, e.g. ddpo-bpt-bs."""
    bpt = [] if cfg["no_bpt"] else ["bpt" if cfg["interval"] == "backward" else "forward"]
    return "-".join([cfg["algo"], *bpt, *([] if cfg["no_bs"] else ["bs"])])


def default_folder(cfg, given):
    """runs/<model>-<reward>-<prompts>-<method>-seed<seed>, and the numbers `given` by flags."""
    prompts = Path(cfg["prompts"]).stem if cfg["prompts"] else f"template{cfg['template']}"
    reward = Path(cfg["reward"]).name.replace(".py:", "-")
    words = [Path(cfg["model"]).stem, reward, prompts, method_slug(cfg), f"seed{cfg['seed']}"]
    words += [f"{name}{value}" for name, value in given.items() if value is not None]
    return "runs/" + "-".join(words).encode()[:200].decode(errors="ignore")


def versions():
    """What a run was made with: the commit of this repository and the libraries' versions."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    out = {"commit": commit, "python": sys.version.split()[0]}
    for package in ("torch", "diffusers", "transformers", "open_clip_torch"):
        with contextlib.suppress(PackageNotFoundError):
            out[package] = version(package)
    return out


def move_paths(config, folder, into):
    """The settings with local paths relative to `folder` (`into`), or to where we are again.

    In config.json they start with ./ or ../: other words are names of a hub, or of ours.
    """
    config, start, end = dict(config), *((".", folder) if into else (folder, "."))
    for name in ("model", "prompts", "reward"):
        path, function = str(config.get(name) or ""), ""
        if name == "reward":
            path, _, function = path.rpartition(":")
        is_path = path.startswith(("./", "../"))
        if into:
            is_path = path != "tiny" and os.path.exists(path)
        if is_path:  # links to folders are followed: every way to the run leads to the file
            way, file = os.path.split(os.path.abspath(os.path.join(start, path)))
            path = os.path.join(os.path.realpath(way), file)
            path = Path(os.path.relpath(path, os.path.realpath(end))).as_posix()
            path = f"./{path}" if into and not path.startswith("..") else path
            config[name] = f"{path}:{function}" if function else path
    return config


def read_config(folder):
    """The settings of the run in `folder`, paths relative to the working directory."""
    config = read_json(Path(folder) / "config.json")
    if not isinstance(config, dict) or not config.get("model") or not config.get("rounds"):
        die(f"{folder} holds no run: there is no config.json of a run in it")
    return move_paths({k: v for k, v in config.items() if k != "made_with"}, folder, False)


def parse_settings(parser, settings, source):
    """Settings of the file `source`, checked by the command line's own parser as flags are.

    Each must come out as it went in: "20" is no number. Ends with one line.
    """
    words, known = [], vars(parser.parse_args([]))
    for name, value in settings.items():
        if name not in known or name in ("out", "resume"):
            die(f"{source}: there is no setting {name!r}")
        flag = f"--{name.replace('_', '-')}"
        for v in value if isinstance(value, list) else [value]:
            if v is not None and v is not known[name]:
                words += [flag] if v is True else [f"{flag}={v}"]
    parser.error = lambda message: die(f"{source}: {message}")
    parsed = parser.parse_args(words)
    for name, value in settings.items():
        if getattr(parsed, name) != value:
            die(f"{source}: {name} can not be {value!r}")
    return parsed


def resumed_settings(args, parser):
    """The settings of the run that args.resume names, but for the flags of `WITH_RESUME`."""
    defaults = vars(parser.parse_args([]))
    given = {k: v for k, v in vars(args).items() if v != defaults[k] and k != "resume"}
    if other := [f"--{k.replace('_', '-')}" for k in given if k not in WITH_RESUME]:
        die(f"--resume takes all settings from the run: leave out {', '.join(other)}")
    config, source = read_config(args.resume), f"{args.resume}/config.json"
    for name in sorted(defaults.keys() - {*WITH_RESUME, *MAY_BE_NULL}):
        if config.get(name) is None:
            die(f"{source} has no {name}: it is damaged or of another version")
    resumed = parse_settings(parser, config | given, source)
    resumed.resume = args.resume
    return resumed


def fingerprint(config, reward_source=""):
    """Hashes of the settings, prompts and reward code that a checkpoint belongs to, by name.

    Where the run lies and what `WITH_RESUME` may change do not count.
    """
    left_out = {*WITH_RESUME, "out", "device", "prompts"}
    kept = {k: v for k, v in config.items() if v and k not in left_out}
    kept |= {k: Path(kept[k]).name for k in ("model", "reward")}
    prompts = load_prompts(config["template"], config["prompts"])
    data = {"settings": sorted(kept.items()), "prompts": prompts, "reward code": reward_source}
    return {k: hashlib.sha256(json.dumps(v).encode()).hexdigest() for k, v in data.items()}


# ---------------------------------------------------------------- the folder


def holds_run(folder):
    """Has a run in `folder` got anywhere? One that failed while it loaded may be begun again."""
    files = [os.path.join(folder, f) for f in ("metrics.jsonl", "before.json", CHECKPOINT)]
    return any(os.path.exists(file) and os.path.getsize(file) for file in files)


def lock(folder):
    """Hold the folder until the handle is closed or this process ends; ends if another holds it."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        die(f"another process works in {folder}: wait for its end, or take another --out")
    except OSError:  # a file system without locks
        pass
    return handle


def open_folder(cfg, worker):
    """The run folder, checked, with its config.json there before anything heavy is loaded."""
    folder = Path(cfg.out)
    if cfg.resume:
        check_run(folder, cfg)
    if worker == 0:
        config = {k: v for k, v in vars(cfg).items() if k not in ("resume", "out")}
        config = move_paths(config, folder, True) | {"made_with": versions()}
        write_json(folder / "config.json", config)
    return folder


def check_run(folder, cfg):
    """The one judge of what a resumed run will read: what it lets pass is trusted afterwards.

    config.json has been through `resumed_settings`; `keep_metrics` repairs
    metrics.jsonl. Ends with one line. That the weights fit the model, `load_checkpoint`
    sees when that is there.
    """
    _, header = read_checkpoint(folder)
    if header is not None:
        compare_marks(folder, header, fingerprint(vars(cfg)), ("settings", "prompts"))
        if header["rounds_done"] > cfg.rounds:
            die(f"{folder} has {header['rounds_done']} rounds, more than --rounds {cfg.rounds}")
    train, unseen = load_prompts(cfg.template, cfg.prompts)
    lists = {"train": train[: cfg.eval_prompts], "unseen": unseen[: cfg.eval_prompts]}
    lists["validation"] = cfg.validation_prompt or []
    counts = {name: len(c) * cfg.eval_images for name, c in lists.items() if c}
    before = read_json(folder / "before.json")
    if before is not None and not are_scores(before, counts):
        die(f"{folder}/before.json is damaged or of other prompts: delete it, it is drawn again")


def are_scores(data, counts):
    """Has the data, for each list of prompts, `counts` scores and the judge's marks or None?"""
    if not isinstance(data, dict) or data.keys() != counts.keys():
        return False
    for name, n in counts.items():
        of_list = data[name] if isinstance(data[name], dict) else {}
        scores, marks = of_list.get("score"), of_list.get("recognised")
        if not are_numbers(scores, n) or (marks is not None and not are_numbers(marks, n)):
            return False
    return True


def are_numbers(values, n):
    """Are the values a list of n finite numbers?"""
    if not isinstance(values, list) or len(values) != n:
        return False
    return all(isinstance(v, float) and math.isfinite(v) for v in values)


@contextlib.contextmanager
def resumable(folder):
    """Inside, the folder is ours; any stop ends with the reason and the command that resumes."""
    processes, rank = os.environ.get("LOCAL_WORLD_SIZE"), os.environ.get("RANK", "0")
    command = f"torchrun --nproc_per_node {processes}" if processes else "python"
    again = f"Finished rounds are saved. To go on: {command} train.py --resume {folder}"

    def end(reason):
        saved = os.path.exists(os.path.join(folder, CHECKPOINT))
        return f"{reason}. {again}" if saved else f"{reason}."

    handle = None
    try:
        if rank == "0":
            (Path(folder) / "grids").mkdir(parents=True, exist_ok=True)
            handle = lock(folder)
        yield
    except KeyboardInterrupt:
        if rank == "0":
            print("\n" + end("Stopped"), file=sys.stderr)
        raise SystemExit(130) from None
    except Stop as problem:
        die(end(problem))
    except torch.OutOfMemoryError:
        die(end(OUT_OF_MEMORY))
    except OSError as problem:
        die(end(f"cannot write to {folder}: {problem.strerror or problem}"))
    finally:
        if handle is not None:
            os.close(handle)


# ---------------------------------------------------------------- checkpoint, metrics


def save_checkpoint(folder, lora, optimizer, header):
    """Everything that a bit-exact resume needs, in one file and one rename.

    lora: parameters by name. header: JSON data with the rounds done, the reward
    history, the gradient scaler and the fingerprint. So weights and round can not
    disagree: a wrong round is a wrong tau.
    """
    tensors = {name: value.detach().cpu() for name, value in lora.items()}
    for name, parameter in lora.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}:{name}"] = value.detach().cpu()
    write_safetensors(folder / CHECKPOINT, tensors, header | {"tensors": len(tensors)})


def read_checkpoint(folder):
    """Tensors and header of the run's checkpoint; no header if no round is done."""
    path = os.path.join(folder, CHECKPOINT)
    if not os.path.exists(path):
        return {}, None
    try:
        tensors, header = read_safetensors(path)
        rounds, history = header["rounds_done"], header["history"]
        if type(rounds) is not int or rounds < 1:
            raise ValueError(f"it says that {rounds} rounds are done")
        if len(tensors) != header["tensors"]:
            raise ValueError(f"{len(tensors)} of its {header['tensors']} tensors are there")
        if not all(v.isfinite().all() for v in tensors.values()):
            raise ValueError("a weight is not finite")
        for i, scores in (entry for past in history.values() for entry in past):
            if type(i) is not int or not are_numbers(scores, len(scores)):
                raise ValueError("the history of its rewards")
        if header["skipped_in_a_row"] not in range(5):
            raise ValueError(f"{header['skipped_in_a_row']} skipped updates in a row")
        header["fingerprint"].items(), header["scaler"].items()  # dictionaries
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as problem:
        die(f"{path} is damaged ({type(problem).__name__}: {problem})")
    return tensors, header


def compare_marks(folder, header, mark, names):
    """End with one line if the checkpoint was made with other settings, prompts or reward code."""
    what_to_do = "put the old ones back, or start anew with another --out"
    for name in names:
        if header["fingerprint"].get(name) != mark[name]:
            die(f"{folder} has other {name} than its {CHECKPOINT}: {what_to_do}")


def load_checkpoint(folder, lora, optimizer, cfg, mark):
    """Restore weights and optimizer in place; mark: this run's `fingerprint`.

    Returns the header, None before round 1. Ends with one line for another model or
    reward.
    """
    saved, header = read_checkpoint(folder)
    if header is None:
        print(f"{folder} has no checkpoint yet: starting from its first round")
        return None
    compare_marks(folder, header, mark, mark)
    wrong = {key.rpartition(":")[2] for key in saved} ^ lora.keys()
    for key, value in saved.items():
        kind, _, name = key.rpartition(":")
        fits = kind == "step" or name not in lora or value.shape == lora[name].shape
        wrong |= set() if fits else {name}
    if wrong or bool(header["scaler"]) != (cfg.precision == "fp16"):
        what = min(wrong, default="its scale")
        die(f"{folder}/{CHECKPOINT} is damaged or of another model: {what} does not fit")
    with torch.no_grad():
        for key, value in saved.items():
            kind, _, name = key.rpartition(":")
            if kind:  # the step stays on the CPU, as AdamW makes it
                device = "cpu" if kind == "step" else lora[name].device
                optimizer.state[lora[name]][kind] = value.to(device)
            else:
                lora[name].copy_(value)
    return header


def read_metrics(folder):
    """The whole lines of a run's metrics.jsonl; a line cut in the middle is no line."""
    path, lines = Path(folder) / "metrics.jsonl", []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.split("\n"):
        with contextlib.suppress(ValueError, RecursionError):
            line = json.loads(line)
            kinds = {"round": int, "queries": int, "reward_mean": float}
            if isinstance(line, dict) and all(type(line.get(k)) is v for k, v in kinds.items()):
                lines.append(line)
    return lines


def keep_metrics(folder, rounds):
    """Cut metrics.jsonl back to the `rounds` that the checkpoint holds; tell what is lost."""
    lines = {line["round"]: line for line in read_metrics(folder)}  # a round counts once
    kept = sorted(i for i in lines if 1 <= i <= rounds)
    write_text(folder / "metrics.jsonl", "".join(json.dumps(lines[i]) + "\n" for i in kept))
    if lost := sorted(set(range(1, rounds + 1)) - set(kept)):
        print(f"metrics.jsonl has lost {len(lost)} rounds ({lost[0]} to {lost[-1]})")
    if (ahead := max(lines, default=0) - rounds) > 1:
        print(f"metrics.jsonl has {ahead} rounds more than the checkpoint: they are run again")


def append_metrics(folder, line):
    """A line of strict JSON: what is NaN or infinite becomes null."""
    bad = [k for k, v in line.items() if isinstance(v, float) and not math.isfinite(v)]
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(line | dict.fromkeys(bad)) + "\n")
