"""How several processes of torchrun share a round's work.

Every sum and share here is the identity in a single process. Noise is keyed
(`ddim_logprob.py`), so the number of processes changes nothing but rounding.
"""

import os

import torch
import torch.distributed as dist


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


def share(groups, rank, world):
    """The positions of `groups` (n ints) that this process works on: those of every world-th group.

    Equal groups stay in one process, as the two trajectories of a DPO pair must.
    Returns (m,) long.
    """
    return (torch.tensor(groups, dtype=torch.long) % world == rank).nonzero().flatten()


def all_sum(tensor, device, op=dist.ReduceOp.SUM):
    """The sum of `tensor` over all processes, bit for bit the tensor itself in a single one."""
    if not dist.is_initialized():
        return tensor
    total = tensor.to(device)
    dist.all_reduce(total, op)
    return total.to(tensor.device)


def all_max(tensor, device):
    """The elementwise maximum over all processes."""
    return all_sum(tensor, device, dist.ReduceOp.MAX)


def sum_gradients(parameters, device):
    """Add up the gradients of all processes; one that trained nothing adds zeros."""
    if not dist.is_initialized():
        return
    for p in parameters:
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        p.grad = all_sum(grad, device)
