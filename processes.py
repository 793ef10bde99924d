"""How a process begins and ends, and how several of torchrun share a round's work.

Every sum and share here is the identity in a single process. Noise is keyed
(`ddim_logprob.py`), so the number of processes changes nothing but rounding.
"""

import argparse
import difflib
import os
import re
import sys

import torch
import torch.distributed as dist


class Stop(Exception):
    """The run can not go on; the message says why and what to do."""


def die(message):
    """Bad input: one clear line, exit code 2, no traceback."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


# What other trainers call a flag of ours
SYNONYMS = {
    "--learning-rate": "--lr",
    "--output-dir": "--out",
    "--pretrained-model-name-or-path": "--model",
    "--train-batch-size": "--micro-batch",
    "--batch-size": "--micro-batch",
    "--num-train-epochs": "--rounds",
    "--max-train-steps": "--rounds",
    "--mixed-precision": "--precision",
    "--resume-from-checkpoint": "--resume",
    "--checkpointing-steps": "--save-every",
    "--gradient-checkpointing": "--checkpointing",
}


class Parser(argparse.ArgumentParser):
    """Flags with underscores or hyphens; bad input ends with a line that names the nearest flag."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False)

    def parse_known_args(self, args=None, namespace=None):
        words = []
        for word in sys.argv[1:] if args is None else args:
            flag, equals, value = word.partition("=")
            words.append((flag.replace("_", "-") if flag[:2] == "--" else flag) + equals + value)
        return super().parse_known_args(words, namespace)

    def error(self, message):
        for flag in re.findall("--[a-z0-9-]+", message) if "unrecognized" in message else ():
            near = difflib.get_close_matches(flag, self._option_string_actions, 1)
            near = [SYNONYMS[flag]] if flag in SYNONYMS else near
            if near and near[0] in self._option_string_actions:
                message += f"; did you mean {near[0]}?"
        die(f"{message} (see --help)")


def init_processes(device):
    """Join torchrun's process group if there is one; returns (rank, world size, device)."""
    if "WORLD_SIZE" not in os.environ:
        return 0, 1, device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size(), device


def share(owners, rank, world):
    """The positions of `owners` (n ints) that this process works on: those of every world-th owner.

    Equal owners stay in one process, as the two trajectories of a DPO pair must.
    Returns (m,) long.
    """
    return (torch.tensor(owners, dtype=torch.long) % world == rank).nonzero().flatten()


def all_sum(tensor, device):
    """The sum of `tensor` over all processes, bit for bit the tensor itself in a single one."""
    if not dist.is_initialized():
        return tensor
    total = tensor.to(device)
    dist.all_reduce(total)
    return total.to(tensor.device)


def gather(values, device):
    """The values (n,) of every process, of any length each, one after the other: (N,) float32."""
    if not dist.is_initialized():
        return values
    rank, world = dist.get_rank(), dist.get_world_size()
    lengths = torch.zeros(world, dtype=torch.long)
    lengths[rank] = len(values)
    lengths = all_sum(lengths, device).tolist()
    whole, begin = torch.zeros(sum(lengths)), sum(lengths[:rank])
    whole[begin : begin + len(values)] = values
    return all_sum(whole, device)


def sum_gradients(parameters, device):
    """Add up the gradients of all processes; one that trained nothing adds zeros."""
    for p in parameters if dist.is_initialized() else ():
        p.grad = all_sum(torch.zeros_like(p) if p.grad is None else p.grad, device)
