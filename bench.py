"""What a round costs: against bare calls, against the least, against TRL. Prints Markdown tables.

    python bench.py                                    # (a) to (d), the bundled tiny model
    python bench.py --part counts --queries 16  # any flag of train.py is passed on to it
    python bench.py --peer OLD_VENV/bin/python         # (e)

    (a) overhead  sample_round and train_round against bare UNet, VAE and reward calls with LoRA
                  injected; `larger`: the same on a UNet ten times larger
    (b) phases    where a round's time goes
    (c) counts    UNet sample-steps against the least that the method needs
    (d) sweep     time and peak memory against T, tau, K, batch sizes; each in its own process
    (e) peer      TRL's DDPOTrainer against our DDPO and B2, on the same pipeline; its interpreter
                  needs trl==0.23.1 "transformers<5" "diffusers<0.36" peft accelerate ftfy
    (v) variants  UNet calls under one option for speed, or without one, against the default's
    (r) ratio     |log p/p_old| before the first update, in each precision (trap 2)
    (m) memory    what a training step holds, by saved-tensor hooks, and the micro-batch that fits

Machines are noisy: times to be compared are taken in turn (A B C A B C ...) after one turn to warm
up; a ratio is the geometric mean over the turns with a 95% t interval of its logarithm. The
learning rate is 0, so that all turns do the same work. (d) and (e) use a reward that costs nothing;
the KL metric and the checkpoint of a round stand in (b) alone.
"""

import argparse
import bisect
import contextlib
import functools
import itertools
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

HERE = Path(__file__).resolve().parent
if "--as-peer" in sys.argv:  # TRL's interpreter has other versions of what this project imports
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != HERE]
else:
    import torch

    import runs
    import train
    from b2rl import RewardNormaliser, select_all, select_pairs, training_interval
    from lora import inject_lora, lora_layers
    from rewards import load_reward

PARTS = ("overhead", "larger", "phases", "counts", "sweep", "peer", "memory", "ratio", "variants")
DDPO = ["--no-bpt", "--no-bs"]
BATCHES = (16, 32, 64, 128, 256)  # UNet batch sizes tried for the bare calls, guidance included
INTERVAL = "--tau0 14 --skip-last 0".split()  # the paper's, where the tiny model's own does not fit
# the larger UNet, or it would take hours
LARGE = "--T 6 --tau0 4 --skip-last 0 --epochs 1 --queries 128".split()
SWEEP = {"T": (14, 20, 40), "tau0": (5, 10, 14, 20), "branches": (2, 4, 8),
         "sample_batch": (8, 16, 32, 64, 128), "micro_batch": (2, 8, 16, 32, 64, 128)}  # fmt: skip
PEER_BATCHES = (8, 16, 32, 64)  # sample and micro batch tried for the best setting of each
PAPER_BATCHES = (8, 2)  # Table 6
HAND_BACK = "--hand-back"  # tells a worker to leave the C library as it is
MB = 2**20

# ---------------------------------------------------------------- time, memory, intervals


def t_quantile(df, steps=40000):
    """97.5% quantile of Student's t: P(|t| < sqrt(df) tan a) ~ integral of cos^(df-1) up to a."""
    width = math.pi / 2 / steps
    area = list(itertools.accumulate(math.cos((k + 0.5) * width) ** (df - 1) for k in range(steps)))
    return math.sqrt(df) * math.tan((bisect.bisect(area, 0.95 * area[-1]) + 0.5) * width)


def ratio_interval(a, b):
    """Paired times a, b -> the geometric mean of a / b and its 95% interval (nan for one pair)."""
    logs = [math.log(x / y) for x, y in zip(a, b, strict=True)]
    mean, half = statistics.fmean(logs), math.nan
    if len(logs) > 1:
        half = t_quantile(len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs))
    return tuple(math.exp(v) for v in (mean, mean - half, mean + half))


def memory(what):
    """Bytes "now", or the "peak" since "reset": tensors if CUDA is in use, else the resident set.

    Not getrusage where it can be helped: a child starts with its parent's ru_maxrss.
    """
    cuda, status = sys.modules["torch"].cuda, Path("/proc/self/status")
    if cuda.is_initialized():
        return {"now": cuda.memory_allocated, "peak": cuda.max_memory_allocated,
                "reset": cuda.reset_peak_memory_stats}[what]()  # fmt: skip
    if what == "reset":
        with contextlib.suppress(OSError):
            return Path("/proc/self/clear_refs").write_text("5")
    if not status.exists():  # not Linux: the peak of the whole process, in bytes on macOS
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    field = "VmRSS" if what == "now" else "VmHWM"
    return int(re.search(field + r":\s+(\d+)", status.read_text())[1]) * 1024


@contextlib.contextmanager
def measured(name, log):
    """Adds the seconds inside to log[name]; log["peak name"] is the peak memory so far."""
    cuda = sys.modules["torch"].cuda
    sync = cuda.synchronize if cuda.is_initialized() else lambda: None
    sync()
    clock = time.perf_counter()
    yield
    sync()
    log[name] = log.get(name, 0.0) + time.perf_counter() - clock
    log[f"peak {name}"] = memory("peak")


def interleave(functions, repeats):
    """Seconds of each function by name, taken in turn, after one turn to warm up."""
    turns = []
    for _ in range(repeats + 1):
        turns.append({})
        for name, function in functions.items():
            with measured(name, turns[-1]):
                function()
    return {name: [turn[name] for turn in turns[1:]] for name in functions}


def table(title, rows):
    """Print dicts of the same keys as a Markdown table; a tuple is a ratio with its interval."""
    shown = [k for k, v in rows[0].items() if not isinstance(v, dict)]
    print(f"\n**{title}**\n\n| " + " | ".join(shown) + " |\n|" + "---|" * len(shown))
    for row in rows:
        cells = [f"{v:.4g}" if isinstance(v, float) else
                 "{:.3f} ({:.3f} to {:.3f})".format(*v) if isinstance(v, tuple) else str(v)
                 for v in (row[k] for k in shown)]  # fmt: skip
        print("| " + " | ".join(cells) + " |", flush=True)
    return rows


# ---------------------------------------------------------------- a round of ours


def setup(flags, free=False):
    """What `train.algorithm_1` sets up for these flags; `free`: a reward that costs nothing.

    s.seen gets the batch size of each call of UNet, VAE and reward, s.log the latter's seconds.
    """
    args = train.parse_args(flags)
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    model = runs.load_model(args, device)
    reward = lambda images, prompts: images.mean((1, 2, 3))  # noqa: E731
    if model.tiny and not free:
        reward = load_reward(args.reward, model.tiny, device, runs.DTYPES[args.precision])
    lora = inject_lora(model.unet, args.rank, seed=args.seed)
    tau = args.T if args.no_bpt else args.tau0
    s = SimpleNamespace(
        args=args, model=model, lora=lora, optimizer=torch.optim.AdamW(lora.values(), lr=0),
        normalise=RewardNormaliser(args.window), roots=args.queries // args.branches, tau=tau,
        interval=training_interval(tau, args.T, args.interval, args.skip_last), log={}, seen={"unet": [], "decode": [],
        "reward": []}, prompts=runs.load_prompts(args.template, args.prompts)[0])  # fmt: skip

    def watched(name, call):
        def wrapper(batch, *rest, **options):
            s.seen[name].append(len(batch))
            with measured(name, s.log):
                return call(batch, *rest, **options)

        return wrapper

    model.unet.register_forward_pre_hook(lambda _, inputs: s.seen["unet"].append(len(inputs[0])))
    model.pipe.vae.decode = watched("decode", model.pipe.vae.decode)
    s.reward = watched("reward", reward)
    return s


def sample(s):
    return train.sample_round(s.model, s.reward, s.prompts, 0, s.interval, s.args, 0, 1)


def fit(s, data, r_hat, kept):
    return train.train_round(s.model, data, r_hat, kept, s.interval, s.optimizer, 0, s.args)


def one_round(s):
    """Sampling and training as in the training loop; seconds and peak memory go to s.log.

    Returns data, r_hat, kept and the batch sizes seen in sampling and in training.
    """
    s.log.clear()
    s.seen |= {name: [] for name in s.seen}
    with measured("sampling", s.log):
        data = sample(s)
    sampling = {name: sizes.copy() for name, sizes in s.seen.items()}
    with measured("training", s.log):
        r_hat = s.normalise(0, data.prompts, data.scores)
        kept = select_all(r_hat) if s.args.no_bs else select_pairs(r_hat, s.args.threshold)
        fit(s, data, r_hat, kept)
    training = {name: sizes[len(sampling[name]):] for name, sizes in s.seen.items()}
    return data, r_hat, kept, sampling, training


# ---------------------------------------------------------------- (a) overhead


def bare(s, sizes, seen=None):
    """A function that does nothing but the model calls, on inputs made beforehand.

    The UNet's at `sizes`; with `seen` the VAE's and the reward's at the sizes seen in sampling,
    without it the UNet's backward passes.
    """
    unet, vae, (C, h, w) = s.model.unet, s.model.pipe.vae, s.model.latent_shape
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    options = dict(device=s.model.device, dtype=unet.dtype)
    text = s.model.embed(s.prompts[:1])
    calls = {n: (torch.randn(n, C, h, w, **options), torch.randint(1, 999, (n,)).to(text.device),
                 text.repeat(n, 1, 1)) for n in set(sizes)}  # fmt: skip
    decode, reward = (seen["decode"], seen["reward"]) if seen else ((), ())
    latents = {n: torch.randn(n, C, h, w, **options) for n in set(decode)}
    pictures = {n: torch.rand(n, 3, h * scale, w * scale) for n in set(reward)}

    def run():
        with torch.set_grad_enabled(seen is None):
            for n in sizes:
                out = unet(*calls[n], return_dict=False)[0]
                if seen is None:
                    out.float().sum().backward()
            for n in decode:
                vae.decode(latents[n], return_dict=False)
            for n in reward:
                s.reward(pictures[n], s.prompts[:1] * n)

    return run


def overhead(s, repeats):
    """(a) Rounds against bare calls at the rounds' own batch sizes, and at the fastest size."""
    data, r_hat, kept, sampling, training = one_round(s)
    rows, million = [], sum(p.numel() for p in s.model.unet.parameters()) / 1e6
    for phase, seen, ours in (("sampling", sampling, lambda: sample(s)),
                              ("training", None, lambda: fit(s, data, r_hat, kept))):  # fmt: skip
        sizes = (seen or training)["unet"]
        if not sizes:  # nothing was kept
            continue
        none = seen and {"decode": [], "reward": []}
        tried = sorted({n for n in (*BATCHES, max(sizes)) if n <= sum(sizes)})
        times = interleave({n: bare(s, [n], none) for n in tried}, 3)
        n = min(tried, key=lambda n: statistics.median(times[n]) / n)
        whole, rest = divmod(sum(sizes), n)
        log = interleave({"round": ours, "own": bare(s, sizes, seen), "fastest": bare(
            s, [n] * whole + [rest] * (rest > 0), seen)}, repeats)  # fmt: skip
        rows.append({"UNet, M": million, "phase": phase, "UNet samples": sum(sizes),
                     "calls": len(sizes), "a round, s": statistics.median(log["round"]),
                     "round / calls of its sizes": ratio_interval(log["round"], log["own"]),
                     "fastest size": n, "round / calls of the fastest size": ratio_interval(
                         log["round"], log["fastest"]), "seconds": log})  # fmt: skip
    return rows


def linked(folder, out, but):
    """`out` made a folder of links to everything in `folder` except the names in `but`."""
    Path(out).mkdir(exist_ok=True)
    for entry in Path(folder).resolve().iterdir():
        if entry.name not in but:
            (Path(out) / entry.name).symlink_to(entry)
    return Path(out)


def grown(folder, out, factor=3.2):
    """A copy of a pipeline folder with a random UNet of about ten times the parameters."""
    from diffusers import UNet2DConditionModel

    config = UNet2DConditionModel.load_config(folder, subfolder="unet")
    heads = config["attention_head_dim"]
    step = math.lcm(config["norm_num_groups"], *(heads if isinstance(heads, list) else [heads]))
    config["block_out_channels"] = [step * round(c * factor / step)
                                    for c in config["block_out_channels"]]  # fmt: skip
    torch.manual_seed(0)
    UNet2DConditionModel.from_config(config).save_pretrained(linked(folder, out, "unet") / "unet")
    return str(out)


def lora_apart(layer, x):
    """The LoRA layer as two products, W x + B (A x), in every precision."""
    low = torch.nn.functional.linear(x.float(), layer.down)
    return layer.base(x) + torch.nn.functional.linear(low, layer.up).to(x.dtype)


def variants(flags, repeats):
    """(v) UNet calls at the default's batch sizes under each option: its time over the default's."""
    from diffusers.models.attention_processor import AttnProcessor

    given = {"channels_last": ["--channels-last"], "bfloat16": ["--precision", "bf16"],
             "torch.compile": ["--compile"],
             "bfloat16, torch.compile": ["--precision", "bf16", "--compile"]}  # fmt: skip
    names = ("default", "plain attention", "LoRA apart", *given, "one thread")
    made = {name: setup([*flags, *given.get(name, [])]) for name in names}
    made["plain attention"].model.unet.set_attn_processor(AttnProcessor())
    for layer in lora_layers(made["LoRA apart"].model.unet).values():
        layer.forward = functools.partial(lora_apart, layer)
    threads = torch.get_num_threads()

    def alone(call):
        def run():
            torch.set_num_threads(1)
            call()
            torch.set_num_threads(threads)

        return run

    rows, base = [{"option": name} for name in names[1:]], made["default"].args
    for phase, seen in (("forward", {"decode": [], "reward": []}), ("forward + backward", None)):
        size = base.micro_batch if seen is None else base.sample_batch
        calls = {n: bare(s, [2 * size], seen) for n, s in made.items()}
        log = interleave(calls | {"one thread": alone(calls["one thread"])}, repeats)
        for row in rows:
            row[f"{phase} / default"] = ratio_interval(log[row["option"]], log["default"])
    return rows


def freed_memory(flags, repeats):
    """(v) Rounds where the C library hands freed memory back, as it does by default, over ours."""
    workers = {name: Worker("--as-worker", [*INTERVAL, *flags, *more])
               for name, more in (("kept", []), ("handed back", [HAND_BACK]))}  # fmt: skip
    turns = [{name: w.round() for name, w in workers.items()} for _ in range(repeats + 1)][1:]
    for worker in workers.values():
        worker.close()
    ratio = {phase: ratio_interval([t["handed back"][phase] for t in turns],
                                   [t["kept"][phase] for t in turns])
             for phase in ("sampling", "training")}  # fmt: skip
    peaks = {f"MB peak, {name}": max(t[name]["peak"] for t in turns) // MB for name in workers}
    return [ratio | peaks]


# ---------------------------------------------------------------- (b) phases, (c) counts


def phases(s, repeats):
    """(b) Mean seconds of each phase, after one round to warm up."""
    names = ("sampling", "decode", "reward", "training", "KL metric", "checkpoint")
    logs = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(repeats + 1):
            clock = time.perf_counter()
            data, _, kept, *_ = one_round(s)
            s.log["sampling"] -= s.log["decode"] + s.log["reward"]
            with measured("KL metric", s.log):
                if len(kept):
                    train.kl_to_base(s.model, data, kept, s.interval, 0, s.args)
            with measured("checkpoint", s.log):
                runs.save_checkpoint(Path(folder), 1, s.lora, s.optimizer, s.normalise.history, 0)
            logs.append({k: s.log[k] for k in names} | {"round": time.perf_counter() - clock})
            logs[-1]["rest"] = logs[-1]["round"] - sum(logs[-1][k] for k in names)
    mean = {k: statistics.fmean(log[k] for log in logs[1:]) for k in (*names, "rest", "round")}
    return [{"phase": k, "s a round": v, "s a query": v / s.args.queries,
             "share": f"{v / mean['round']:.1%}"} for k, v in mean.items()]  # fmt: skip


def least(s, kept):
    """The least UNet sample-steps of a round's sampling and training, guidance doubling each.

    A root: T - tau shared steps, one call at x_tau for all branches, K (tau - 1) after it. An
    epoch, of n = tau - skip_last steps: 2 n - 1 for a pair, which shares x_tau, n for a single.
    """
    halves = 1 if s.args.guidance == 1 else 2
    start, stop = s.interval
    a_root = (s.args.T - start) + 1 + s.args.branches * (start - 1)
    of_root = kept[:, 0].unique(return_counts=True)[1]
    n = start - stop
    an_epoch = sum(2 * n - 1 if pair == 2 else n for pair in of_root.tolist())
    return halves * s.roots * a_root, halves * s.args.epochs * an_epoch


def counts(s, method):
    """(c) UNet sample-steps of a round, counted by a hook on the UNet, against the least."""
    *_, kept, sampling, training = one_round(s)
    queries, rows = s.roots * s.args.branches, []
    for phase, seen, want in zip(("sampling", "training"), (sampling, training), least(s, kept)):
        got = sum(seen["unet"])
        rows.append({"method": method, "tau": s.tau, "phase": phase, "kept": f"{len(kept)} of "
                     f"{queries}", "calls": len(seen["unet"]), "measured": got, "least": want,
                     "measured / least": got / want if want else 1.0,
                     "least a query": want / queries})  # fmt: skip
    return rows


# ---------------------------------------------------------------- a process a setting


class Worker:
    """A process of its own that runs a round when told to, so that peak memory is its own."""

    def __init__(self, mode, setting, threads=None, python=sys.executable):
        self.errors = tempfile.TemporaryFile("w+")
        env = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        env |= {"OMP_NUM_THREADS": str(threads)} if threads else {}
        self.process = subprocess.Popen(
            [python, str(HERE / "bench.py"), mode, json.dumps(setting)], env=env, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors)  # fmt: skip
        self.loaded = self.answer()["loaded"]

    def answer(self):
        if line := self.process.stdout.readline():
            return json.loads(line)
        self.process.wait()
        self.errors.seek(0)
        raise RuntimeError("a worker ended:\n" + self.errors.read()[-2000:])

    def round(self):
        """Seconds of "sampling", "training", bytes "peak sampling", "peak", and "kept"."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self):
        self.process.communicate()
        self.errors.close()


def serve(start, setting):
    """A worker's life: set up, then a round for each line on stdin, answers in JSON on stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to stderr
    with tempfile.TemporaryDirectory() as folder:
        a_round = start(setting, folder)
        print(json.dumps({"loaded": memory("now")}), file=answers, flush=True)
        for _ in sys.stdin:
            log = {}
            memory("reset")
            with measured("round", log):
                log |= a_round()
            log["training"], log["peak"] = log["round"] - log["sampling"], memory("peak")
            print(json.dumps(log), file=answers, flush=True)


def start_ours(flags, _):
    if HAND_BACK in flags:
        runs.keep_freed_memory = lambda: None
    s = setup([flag for flag in flags if flag != HAND_BACK], free=True)
    return lambda: {"kept": len(one_round(s)[2])} | s.log


def start_peer(setting, folder):
    """TRL's DDPOTrainer on our terms. Runs in the peer's interpreter: only stdlib and TRL here."""
    import accelerate
    import torch

    o = SimpleNamespace(**setting)
    torch.set_num_threads(o.threads)
    cpu = o.device == "cpu"
    accelerate.PartialState(cpu=cpu)  # TRL logs through accelerate before it sets it up
    from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline

    config = DDPOConfig(
        log_with=None, accelerator_kwargs={"cpu": cpu}, project_kwargs={"project_dir": folder},
        mixed_precision={"fp32": "no"}.get(o.precision, o.precision), allow_tf32=False,
        sample_num_steps=o.T, sample_eta=o.eta, sample_guidance_scale=o.guidance,
        sample_batch_size=o.sample_batch, sample_num_batches_per_epoch=o.queries // o.sample_batch,
        train_batch_size=o.micro_batch, train_num_inner_epochs=o.epochs, train_learning_rate=0.0,
        train_gradient_accumulation_steps=o.update_size // o.micro_batch,
        train_clip_range=o.clip_range)  # fmt: skip
    pipeline = DefaultDDPOStableDiffusionPipeline(readable(o.model, folder), use_lora=True)
    prompts = itertools.cycle(o.prompts)
    trainer = DDPOTrainer(config, lambda images, _, __: (images.float().mean((1, 2, 3)), {}),
                          lambda: (next(prompts), {}), pipeline)  # fmt: skip
    generate, log = trainer._generate_samples, {"kept": o.queries}

    def timed(*args, **options):
        with measured("sampling", log):
            return generate(*args, **options)

    def a_round():
        log["sampling"] = 0.0
        trainer.step(0, 0)  # epoch 0 saves nothing
        return log

    trainer._generate_samples = timed
    return a_round


def readable(folder, out):
    """A copy of a pipeline folder that transformers < 5 reads, of links where it can be.

    Transformers 5 writes a tokenizer without vocab.json and merges.txt, which only the fast class
    reads, and the weights of a text encoder without the prefix "text_model.".
    """
    from safetensors.torch import load_file, save_file

    folder, name = Path(folder), "model.safetensors"
    out = linked(folder, out, ("model_index.json", "text_encoder"))
    index = json.loads((folder / "model_index.json").read_text())
    if not (folder / "tokenizer/vocab.json").exists():
        index["tokenizer"][1] = "CLIPTokenizerFast"
    (out / "model_index.json").write_text(json.dumps(index))
    linked(folder / "text_encoder", out / "text_encoder", (name,))
    state = load_file(folder / "text_encoder" / name)
    prefix = "" if any(key.startswith("text_model.") for key in state) else "text_model."
    save_file({prefix + key: value for key, value in state.items()}, out / "text_encoder" / name,
              metadata={"format": "pt"})  # fmt: skip
    return str(out)


# ---------------------------------------------------------------- (d) sweep, (e) peer, (m) memory


def worker_row(worker, times, queries):
    """Median times after the first round; memory over all, and of the first and last round."""
    peak = max(t["peak"] for t in times)
    return {**{f"{phase}, s a query": statistics.median(t[phase] for t in times[1:]) / queries
               for phase in ("sampling", "training")},
            "kept": times[-1]["kept"], "MB loaded": worker.loaded // MB,
            "MB peak of sampling": max(t["peak sampling"] for t in times) // MB,
            "MB peak": peak // MB, "peak - loaded": (peak - worker.loaded) // MB,
            "peak of first, last round": " ".join(f"{times[k]['peak'] / MB:.1f}" for k in (0, -1)),
            "rounds": dict(enumerate(times))}  # fmt: skip


def sweep(flags, repeats):
    """(d) One setting changed at a time."""
    flags = [*INTERVAL, *flags]
    rows, base = [], train.parse_args(flags)
    for name, value in ((n, v) for n, values in SWEEP.items() for v in values):
        if name == "tau0" and value > base.T or name == "T" and value < base.tau0:
            continue
        flag = f"--{name.replace('_', '-')}"
        worker = Worker("--as-worker", [*flags, flag, str(value)], base.threads)
        times = [worker.round() for _ in range(repeats + 1)]
        rows.append({"setting": f"{name} {value}", **worker_row(worker, times, base.queries)})
        worker.close()
        print(".", end="", file=sys.stderr, flush=True)
    return rows


def peer(flags, python, repeats, only=None):
    """(e) TRL's DDPO, our DDPO, our B2: seconds and memory, and times fewer seconds than TRL.

    All do one update an epoch. B2's cost is linear in tau, and its schedule in the round, so a
    whole run costs what its middle does, at tau = (tau0 + T) / 2. All steps are trained, as in
    TRL. KL metric: see (b). With `only` every method runs at these batch sizes alone.
    """
    flags = [*INTERVAL, *flags]
    base = train.parse_args(flags)
    assert base.rank == 4, "TRL's LoRA has rank 4"
    threads = base.threads or torch.get_num_threads()
    middle = str((base.tau0 + base.T + 1) // 2)
    ours = {"our DDPO": DDPO, f"our B2 at tau {middle}": ["--tau0", middle]}
    setting = vars(base) | {
        "threads": threads, "update_size": base.queries, "model": str(model_folder(base.model)),
        "prompts": runs.load_prompts(base.template, base.prompts)[0]}  # fmt: skip

    def start(method, batches):
        sizes = dict(zip(("sample_batch", "micro_batch"), batches))
        if method not in ours:
            return Worker("--as-peer", setting | sizes, threads, python)
        extra = f"--threads {threads} --update-size {base.queries} --sample-batch {batches[0]} " \
                f"--micro-batch {batches[1]}"  # fmt: skip
        return Worker("--as-worker", [*flags, *ours[method], *extra.split()], threads)

    chosen = {(method, "given"): only for method in ("TRL's DDPO", *ours)} if only else {}
    for method in () if only else ("TRL's DDPO", *ours):
        times = {}
        for n in (n for n in PEER_BATCHES if base.queries % n == 0):
            worker = start(method, (n, n))
            times[n] = [worker.round() for _ in range(2)][1]
            worker.close()
        pairs = [(a, b) for a in times for b in times if a >= b or method in ours]  # TRL: a >= b
        best = min(pairs, key=lambda p: times[p[0]]["sampling"] + times[p[1]]["training"])
        chosen |= {(method, "paper's"): PAPER_BATCHES, (method, "best"): best}
    workers = {key: start(key[0], batches) for key, batches in chosen.items()}
    turns = [{key: worker.round() for key, worker in workers.items()} for _ in range(repeats + 1)]
    log = {key: [turn[key] for turn in turns] for key in chosen}
    rows = [{"method": key[0], "batches": f"{key[1]} {chosen[key]}",
             **worker_row(workers[key], log[key], base.queries)} for key in chosen]  # fmt: skip
    for worker in workers.values():
        worker.close()
    total = {key: [t["round"] for t in times[1:]] for key, times in log.items()}
    return rows, [{"TRL's batches": theirs, "against": method, "batches": own,
                   "times fewer seconds a query": ratio_interval(
                       total["TRL's DDPO", theirs], total[method, own])}
                  for method in ours for theirs, own in (
                      ("paper's", "paper's"), ("paper's", "best"), ("best", "best"),
                      ("given", "given")) if (method, own) in total]  # fmt: skip


def random_sd14(folder):
    """Stable Diffusion 1.4's architecture at full size, random bfloat16 weights, saved to `folder`.

    The tokenizer is a letter tokenizer, since CLIP's own would have to be downloaded.
    """
    from diffusers import (
        AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel,
    )  # fmt: skip
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(c + "</w>" for c in letters)]
    tokenizer = CLIPTokenizer(vocab={w: n for n, w in enumerate(words)}, merges=[],
                              model_max_length=77)  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    try:
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            sample_size=512)  # fmt: skip
        text = CLIPTextModel(CLIPTextConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
            max_position_embeddings=77, projection_dim=768, vocab_size=49408, bos_token_id=0,
            eos_token_id=1))  # fmt: skip
    finally:
        torch.set_default_dtype(torch.float32)
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                              clip_sample=False, set_alpha_to_one=False, steps_offset=1)  # fmt: skip
    StableDiffusionPipeline(vae, text, tokenizer, unet, scheduler, None, None,
                            requires_safety_checker=False).save_pretrained(folder)  # fmt: skip
    return str(folder)


def saved_bytes(s, n):
    """Bytes that autograd keeps for the backward pass of n guided samples, weights left out.

    Returns the sum and the largest share of one resnet or transformer: what --checkpointing holds
    while it computes that one again.
    """
    from diffusers.models.attention_processor import AttnProcessor2_0
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    unet, kept, units = s.model.unet, {}, []
    weights = {p.untyped_storage().data_ptr() for p in unet.parameters()}
    before = unet.attn_processors
    unet.set_attn_processor(AttnProcessor2_0())  # torch's fused attention, as on a GPU

    def pack(tensor):
        storage = tensor.untyped_storage()  # alive as long as the graph: no address twice
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def enter(module, _):
        units.append(-sum(kept.values()))

    def leave(module, *_):
        units[-1] += sum(kept.values())

    hooks = [hook for m in unet.modules() if isinstance(m, (ResnetBlock2D, Transformer2DModel))
             for hook in (m.register_forward_pre_hook(enter), m.register_forward_hook(leave))]  # fmt: skip
    x = torch.randn(2 * n, *s.model.latent_shape).to(s.model.device, unet.dtype)
    text = s.model.embed(s.prompts[:1]).repeat(2 * n, 1, 1)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = unet(x, torch.full((2 * n,), 500, device=x.device), text).sample
    for hook in hooks:
        hook.remove()
    unet.set_attn_processor(before)
    return (sum(kept.values()), max(units)) if out.requires_grad else (0, 0)


def memory_held(s):
    """(m) What a training step holds, measured, and the micro-batches that 16 and 24 GB take.

    From the difference of two batch sizes: what a sample adds. A tenth is left to the CUDA context
    and to what a step makes and drops at once. With --checkpointing a step holds what enters each
    block and the largest block's tensors; the reward model, VAE and text encoder are off the
    device with --offload.
    """
    size = lambda m: sum(p.numel() * p.element_size() for p in m.parameters())  # noqa: E731
    parts = {"UNet, LoRA": size(s.model.unet), "VAE": size(s.model.pipe.vae),
             "text encoder": size(s.model.pipe.text_encoder),
             "LoRA's gradient and AdamW's state": 12 * sum(p.numel() for p in s.lora.values())}  # fmt: skip
    s.model.unet.disable_gradient_checkpointing()
    (one, unit), (two, units) = saved_bytes(s, 1), saved_bytes(s, 2)
    s.model.unet.enable_gradient_checkpointing()
    outer = saved_bytes(s, 2)[0] - saved_bytes(s, 1)[0]
    plain, saving = two - one, outer + units - unit
    states = s.args.queries * (s.tau + 1) * math.prod(s.model.latent_shape) * 4
    rows = parts | {"a guided sample in training": plain,
                    "a guided sample with --checkpointing": saving,
                    "a round's states, not on the GPU": states}  # fmt: skip
    rows = [{"what": k, "figure": f"{v / MB:.1f} MB"} for k, v in rows.items()]
    away = parts["VAE"] + parts["text encoder"]
    for gb in (16, 24):
        room = 0.9 * gb * 2**30 - sum(parts.values())
        rows.append({"what": f"micro-batch in {gb} GB", "figure": int(room / plain)})
        rows.append({"what": f"micro-batch in {gb} GB, --checkpointing --offload",
                     "figure": int((room + away) / saving)})  # fmt: skip
    return rows


def first_ratio(flags):
    """(r) max |log p/p_old| before any update, with random non-zero LoRA weights (trap 2).

    Equal shapes: one state a UNet call in sampling and in training. Other shapes: branches, pairs
    and full batches. In half precision a UNet's rounding depends on the batch it is called with.
    """
    rows = []
    for precision, shapes in itertools.product(runs.DTYPES, ("equal", "other")):
        one = ["--no-bs", "--queries", "6", "--sample-batch", "1", "--micro-batch", "1"]
        s = setup([*flags, "--precision", precision, *(one if shapes == "equal" else
                                                       ["--queries", "24", "--threshold", "0"])])  # fmt: skip
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in s.lora.values():
                p.copy_(0.05 * torch.randn(p.shape, generator=generator))
        data = sample(s)
        kept = select_all(data.scores) if s.args.no_bs else select_pairs(
            data.scores - data.scores.mean(1, keepdim=True), 0.0)  # fmt: skip
        sums = train.update_gradient(s.model, data, torch.ones_like(data.scores), kept, s.interval,
                                     s.args)  # fmt: skip
        rows.append({"precision": precision, "batch shapes": shapes,
                     "ratios": sums["items"], "max log ratio": f"{sums['max_log_ratio']:.1e}",
                     "of the clip range": f"{sums['max_log_ratio'] / s.args.clip_range:.2%}"})  # fmt: skip
    return rows


# ---------------------------------------------------------------- the command


def model_folder(model):
    return HERE / "tiny" if model == "tiny" else Path(model).resolve()


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in (["--as-peer"], ["--as-worker"]):
        return serve(start_peer if argv[0] == "--as-peer" else start_ours, json.loads(argv[1]))
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--part", nargs="+", choices=PARTS, help="(default: the first five; only "
        "peer if --peer is given)")  # fmt: skip
    add("--model", default="tiny", help="tiny, a diffusers folder, or random-sd14: Stable "
        "Diffusion 1.4 at full size with random weights (default tiny)")  # fmt: skip
    add("--repeats", type=int, default=10, help="turns of each measurement (default 10)")
    add("--peer", metavar="PYTHON", help="an interpreter that has TRL 0.23.1")
    add("--peer-batches", type=int, nargs=2, metavar="N", help="sample and micro batch of all in "
        "--peer, instead of the paper's and a search (--compile takes minutes for each)")  # fmt: skip
    add("--json", metavar="OUT", help="write all figures to this file as well")
    args, rest = parser.parse_known_args(argv)
    if args.part and "peer" in args.part and not args.peer:
        runs.die("--part peer needs --peer PYTHON, an interpreter that has TRL 0.23.1")
    if args.model == "random-sd14":
        with tempfile.TemporaryDirectory() as out:
            folder = random_sd14(Path(out) / "sd14")
            return main([a.replace("random-sd14", folder) for a in argv])
    parts = args.part or (["peer"] if args.peer else PARTS[:5])
    flags = ["--model", args.model, "--out", "runs/bench", *rest]  # a name that holds no run
    few = ["--queries", "64", *flags]  # in (d) and (e), where full rounds would take too long
    base = train.parse_args(flags)
    results = {"machine": f"{platform.machine()}, {os.cpu_count()} cores, {base.device}",
               "threads": base.threads or torch.get_num_threads(), "torch": torch.__version__,
               "flags": " ".join(flags), "repeats": args.repeats}  # fmt: skip
    print(*(f"{k}: {v}" for k, v in results.items()), sep="; ")

    def show(title, rows):
        results[title] = table(title, rows)
        if args.json:
            Path(args.json).write_text(json.dumps(results, indent=1))

    if "overhead" in parts:
        show("(a) Overhead", overhead(setup(flags), args.repeats))
    if "larger" in parts and model_folder(args.model).is_dir():
        with tempfile.TemporaryDirectory() as out:
            large = [*LARGE, *flags, "--model", grown(model_folder(args.model), out)]
            show("(a) Overhead, " + " ".join(LARGE), overhead(setup(large), args.repeats))
    if "phases" in parts:
        show("(b) Phases of a round", phases(setup(flags), args.repeats))
    if "counts" in parts:
        rows = counts(setup([*flags, *DDPO]), "DDPO")
        for tau in dict.fromkeys((base.tau0, base.T)):
            rows += counts(setup([*flags, "--tau0", str(tau)]), "B2")
        show("(c) UNet sample-steps of a round", rows)
    if "sweep" in parts:
        show("(d) One setting changed in " + " ".join(few), sweep(few, min(3, args.repeats)))
    if "memory" in parts:
        show("(m) Memory of a training step", memory_held(setup(flags)))
    if "variants" in parts:
        show("(v) UNet calls under one option", variants(flags, args.repeats))
        show("(v) A round, freed memory handed back / kept", freed_memory(few, args.repeats))
    if "ratio" in parts:
        show("(r) |log p/p_old| before the first update", first_ratio(flags))
    if "peer" in parts:
        rows, ratios = peer(few, args.peer, args.repeats, args.peer_batches)
        show("(e) Against TRL 0.23.1's DDPOTrainer, " + " ".join(few), rows)
        show("(e) Times fewer seconds a query than TRL", ratios)


if __name__ == "__main__":
    main()
