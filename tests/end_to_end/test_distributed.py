"""Data parallel training: two processes, DDP's own splitting of graphs, the gradients of one process that sees all."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import attn_compiler as attn
from attn_compiler import torch_private as private
from end_to_end.models import WINDOW, assert_outcome, interpreted, like_llama, llama, tokens


def model() -> nn.Module:
    torch.manual_seed(0)
    return llama("eager").train()


def half(ids: Tensor, rank: int) -> Tensor:
    return ids[rank : rank + 1]


def loss(out: Tensor) -> Tensor:
    return (out * torch.linspace(-1, 1, out[0].numel()).reshape(out[0].shape).to(out.dtype)).sum()


def one_process(rank: int, rendezvous: str, results: str) -> None:
    private.inductor = lambda: interpreted
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    dist._DEFAULT_FIRST_BUCKET_BYTES = 4096
    parallel = DistributedDataParallel(model(), bucket_cap_mb=0.01)  # many buckets: Dynamo splits the graph
    compiled = torch.compile(parallel, backend="attn", options={"policy": WINDOW})
    out = like_llama(half(tokens(2, 16), rank))(compiled)
    loss(out).backward()
    gradients = [p.grad for p in parallel.parameters()]
    rewritten = sum(d.target is not None for report in attn.reports() for d in report.decisions)
    torch.save((out.detach(), gradients, rewritten, len(attn.reports())), f"{results}/{rank}.pt")
    dist.barrier()
    os._exit(0)  # freeing the group, PyTorch may wait for its threads with the interpreter's lock, for which these wait


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    mp.spawn(one_process, (str(tmp_path / "rendezvous"), str(tmp_path)), nprocs=2)
    (first, gradients, rewritten, graphs), (second, others, *_) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert rewritten == 2
    assert graphs > 1
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(gradients, others, strict=True))

    def by_hand(one: nn.Module) -> Tensor:
        return like_llama(tokens(2, 16), 8)(one)

    assert_outcome([torch.cat([first, second]), *(2 * g for g in gradients)], model(), by_hand, loss)
