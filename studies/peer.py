"""A round of TRL's DDPOTrainer against rounds of DDPO and B2 here. Prints a Markdown table.

    python studies/peer.py --python OLD_VENV/bin/python  # other flags go to train.py

That interpreter needs trl==0.23.1 "transformers<5" "diffusers<0.36" peft accelerate ftfy.
Both sides get the same pipeline, prompts and batches and a reward that costs next to
nothing, train all steps, do one update an epoch and take turns, as in `studies/bench.py`.
B2's cost is linear in tau: a whole run costs what its middle does, at tau 17.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import cycle
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from types import SimpleNamespace

FILE = Path(__file__).resolve()
if sys.argv[1:2] == ["--worker"]:  # TRL's interpreter lacks what this project imports
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != FILE.parent]
else:
    sys.path.insert(0, str(FILE.parent.parent))
    import torch

    import run_folder
    import train
    from studies import bench

OURS = ("--tau0=17", "--skip-last=0", "--queries=64", "--reward=jpeg", "--out=runs/bench")


def peak_memory():
    """Bytes that tensors on CUDA, else the process (on Linux), have held at most."""
    cuda, status = sys.modules["torch"].cuda, Path("/proc/self/status")
    if cuda.is_initialized():
        return cuda.max_memory_allocated()
    return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) * 1024


# ---------------------------------------------------------------- TRL's side


def worker(setting):
    """In TRL's interpreter: a round for each line on stdin, its figures as a line of JSON."""
    import accelerate
    import torch

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to stderr
    o, log = SimpleNamespace(**setting), {}
    cpu = o.device == "cpu"
    torch.set_num_threads(o.threads)
    accelerate.PartialState(cpu=cpu)  # TRL logs through accelerate before it sets it up
    from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline

    sync, prompts = (lambda: None) if cpu else torch.cuda.synchronize, cycle(o.prompts)
    with tempfile.TemporaryDirectory() as folder:
        config = DDPOConfig(
            log_with=None,
            accelerator_kwargs={"cpu": cpu},
            project_kwargs={"project_dir": folder},
            mixed_precision={"fp32": "no"}.get(o.precision, o.precision),
            allow_tf32=False,
            sample_num_steps=o.T,
            sample_eta=o.eta,
            sample_guidance_scale=o.guidance,
            sample_batch_size=o.batches[0],
            sample_num_batches_per_epoch=o.queries // o.batches[0],
            train_batch_size=o.batches[1],
            train_gradient_accumulation_steps=o.queries // o.batches[1],
            train_num_inner_epochs=o.epochs,
            train_learning_rate=0.0,
            train_clip_range=o.clip_range,
        )
        model = readable(o.model, f"{folder}/model")
        pipeline = DefaultDDPOStableDiffusionPipeline(model, use_lora=True)
        reward = lambda images, _, __: (images.float().mean((1, 2, 3)), {})
        trainer = DDPOTrainer(config, reward, lambda: (next(prompts), {}), pipeline)
        generate = trainer._generate_samples

        def timed(*args, **options):
            clock = time.perf_counter()
            samples = generate(*args, **options)
            sync()
            log["sampling"] = time.perf_counter() - clock
            return samples

        trainer._generate_samples = timed
        for _ in sys.stdin:
            clock = time.perf_counter()
            trainer.step(0, 0)  # epoch 0 saves nothing
            sync()
            log["round"], log["peak"] = time.perf_counter() - clock, peak_memory()
            print(json.dumps(log), file=answers, flush=True)


def readable(folder, out):
    """A copy of a pipeline folder for transformers < 5: its tokenizer class and names."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, out)
    index, weights = Path(out) / "model_index.json", Path(out) / "text_encoder/model.safetensors"
    index.write_text(index.read_text().replace('"CLIPTokenizer"', '"CLIPTokenizerFast"'))
    state, prefix = load_file(weights), "text_model."
    weights.unlink()  # tensors may still be views of the file
    save_file(
        {prefix + k.removeprefix(prefix): v for k, v in state.items()}, weights, {"format": "pt"}
    )
    return out


# ---------------------------------------------------------------- our side


def turns(flags, command, repeats):
    """Rounds of ours and of the worker in turn; the figures of each, without the first."""
    ours, theirs = [], []
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:

        def pause(s):
            seconds = s.line["seconds"]
            log = {"sampling": seconds["sampling"] + seconds["reward"], "peak": peak_memory()}
            ours.append(log | {"round": sum(seconds.values())})
            process.stdin.write("\n")
            process.stdin.flush()
            theirs.append(json.loads(process.stdout.readline()))
            return len(ours) > repeats

        bench.watch(flags, pause)
    return ours[1:], theirs[1:]


def compare(flags, python, batches, repeats):
    """A row for TRL and a row for ours, beside DDPO and beside B2, in processes of their own."""
    flags, rows = [*OURS, *flags], []
    cfg = train.parse_args(flags)
    model = bench.ROOT / "tiny" if cfg.model == "tiny" else Path(cfg.model).resolve()
    prompts, _ = run_folder.load_prompts(cfg.template, cfg.prompts)
    setting = vars(cfg) | {"model": str(model), "prompts": prompts, "batches": batches[:2]}
    setting["threads"] = cfg.threads or torch.get_num_threads()
    command = [python, str(FILE), "--worker", json.dumps(setting)]
    flags += [f"--sample-batch={batches[-2]}", f"--micro-batch={batches[-1]}"]
    flags += [f"--update-size={cfg.queries}"]
    for name, method in (("DDPO here", bench.DDPO), (f"B2 here, tau {cfg.tau0}", ())):
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            ours, theirs = pool.submit(turns, [*flags, *method], command, repeats).result()
        total = [turn["round"] for turn in theirs]
        for who, log in (("TRL's DDPO", theirs), (name, ours)):
            seconds = [turn["round"] for turn in log]
            sampling = median(turn["sampling"] for turn in log)
            row = {"method": who, "sampling, s a query": sampling / cfg.queries}
            row["training, s a query"] = (median(seconds) - sampling) / cfg.queries
            row["peak, MB"] = max(turn["peak"] for turn in log) // 2**20
            row["times fewer seconds"] = bench.ratio_interval(total, seconds)
            rows.append(row)
    return rows


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--python", required=True, help="an interpreter with TRL 0.23.1")
    add("--repeats", type=int, default=10, help="turns (default 10)")
    sizes = "sample and micro-batch of TRL, then of ours if they differ (default 64 64)"
    add("--batches", type=int, nargs="+", default=[64, 64], metavar="N", help=sizes)
    args, flags = parser.parse_known_args(argv)
    print(*bench.table(compare(flags, args.python, args.batches, args.repeats)), sep="\n")


if __name__ == "__main__":
    worker(json.loads(sys.argv[2])) if sys.argv[1:2] == ["--worker"] else main()
