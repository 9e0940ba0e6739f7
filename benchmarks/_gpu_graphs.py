"""Whether a CUDA graph that is played again follows its tables: what they show is cut and listed by kernels within the graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

import attn_compiler as attn
from _gpu_checks import cut_by_number
from attn_compiler.errors import ShapeError
from attn_compiler.runtime.attend import Target
from attn_compiler.testing.budget import assert_all_within_budget

LENGTH, HEADS, DIM = 256, 2, 64
Play = Callable[[], Sequence[Tensor]]  # the results of what the operands hold now, always in the same tensors


def _documents(seed: int) -> Tensor:
    return (torch.arange(LENGTH) >= 64 + 40 * seed).long()


def _blocks(seed: int) -> Tensor:
    shown = torch.rand(HEADS, LENGTH // 32, LENGTH // 32, generator=torch.Generator().manual_seed(seed)) < 0.4
    return shown | torch.eye(LENGTH // 32, dtype=torch.bool)


def _reaches(seed: int) -> Tensor:
    return torch.tensor([20.0, 150.0]) * (1 + seed)


def _bias(seed: int) -> Tensor:
    return torch.randn(HEADS, 2 * LENGTH - 1, generator=torch.Generator().manual_seed(seed)).bfloat16()


# What is asked for, how many queries there are, and the table at a time.
CASES: Mapping[str, tuple[object, int, str, Callable[[int], Tensor]]] = {
    "documents": ("causal & same(documents)", LENGTH, "documents", _documents),
    "bitmaps": ("causal & blocks(shown, 32)", LENGTH, "shown", _blocks),
    "windows by head": ("causal & span(reaches, 0)", LENGTH, "reaches", _reaches),
    "a bias by distance": ({"mask": "causal", "score": f"score + relative(bias, {LENGTH})"}, LENGTH, "bias", _bias),
    "few queries": ("causal & span(reaches, 0)", 1, "reaches", _reaches),
}


def replayed(device: str) -> dict[str, str]:
    """What became of each case: right at first, and again once its table and its operands hold something else."""
    with cut_by_number(0):
        return {name: _replayed(*case, device) for name, case in CASES.items()}


def _replayed(asked: object, queries: int, name: str, table: Callable[[int], Tensor], device: str) -> str:
    held = operands(queries, table(0), device)

    def results(target: Target, dtype: torch.dtype = torch.bfloat16) -> Sequence[Tensor]:
        q, k, v = (x.detach().to(dtype).requires_grad_(queries > 1) for x in held[:3])
        read = held[3].detach().requires_grad_(name == "bias")
        given = [x for x in (q, k, v, read) if x.requires_grad]
        out = attn.attend(q, k, v, asked, tables={name: read}, target=target)  # type: ignore[arg-type]
        assert isinstance(out, Tensor)
        return [out.detach(), *(torch.autograd.grad(out, given, torch.ones_like(out)) if given else ())]

    try:
        run = partial(results, "triton")
        play = captured(run) if is_played_again(device) else run
        for time in range(3):
            for x, new in zip(held, operands(queries, table(time), device, time), strict=True):
                x.copy_(new)
            found, exact = play(), results("reference", torch.float64)
            assert_all_within_budget(found, exact, lambda: results("torch"))
    except (AssertionError, RuntimeError, ShapeError) as failure:
        return f"{type(failure).__name__}: {failure}"
    return "right"


def is_played_again(device: str) -> bool:
    """Without a GPU there is no graph: the call is made again."""
    return device == "cuda"


def operands(queries: int, table: Tensor, device: str, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = (queries, LENGTH, LENGTH)
    drawn = [torch.randn(1, HEADS, length, DIM, generator=generator, dtype=torch.float32).bfloat16() for length in lengths]
    return [x.to(device) for x in (*drawn, table)]


def captured(run: Play) -> Play:
    """The same as a CUDA graph: launched once beside it, so that everything is compiled and chosen, then recorded."""
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        run()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()

    def play() -> Sequence[Tensor]:
        graph.replay()
        return results

    return play
