"""The way to a launch: nothing on it has the host wait for the device, once a call of the same shape has been made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import attn_compiler as attn
from attn_compiler.errors import ShapeError
from attn_compiler.runtime import triton_decode, triton_gradients, triton_kernels, triton_states, triton_visits
from attn_compiler.runtime.gradients import Given
from attn_compiler.runtime.kernel_source import shape_of
from attn_compiler.runtime.kernels import Shape
from attn_compiler.runtime.states import Call

pytest.importorskip("triton")

WAITS = ("_local_scalar_dense", "equal", "index", "index_put_", "lift_fresh", "nonzero")  # read by the host, or copied from it


class Seen(TorchDispatchMode):
    """The names of all operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: object, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _kernels_are_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel does is no part of the way to it."""
    for module in (triton_kernels, triton_gradients, triton_decode, triton_visits, triton_states):
        monkeypatch.setattr(module, "call", lambda *_: None)


def shape(variant: object, q_len: int) -> Shape:
    return shape_of(variant, q_len=q_len, k_len=64, heads=4, kv_heads=2, head_dim=16, target="triton")  # type: ignore[arg-type]


def operands(q_len: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.randn(1, 4, q_len, 16), torch.randn(1, 2, 64, 16), torch.randn(1, 2, 64, 16), torch.empty(1, 4, q_len, 16)


def forward(variant: object) -> None:
    triton_kernels.run(shape(variant, 64), *operands(64), torch.empty(1, 4, 64), [], kept=0)


def backward(variant: object) -> None:
    q, k, v, out = operands(64)
    given = Given(q, k, v, [], out, torch.zeros(2, 1, 4, 64), out)
    triton_gradients.gradients(shape(variant, 64), given, [])


def decode(variant: object) -> None:
    launches = triton_decode.launches(shape(variant, 1))
    triton_decode.run(launches, *operands(1), None, [], (0, 1), (63, 0))


def gather() -> None:
    log = torch.zeros(1, 4, 600, dtype=torch.float64)
    q, k, v, out = (torch.zeros(1, 4, 600, 16) for _ in range(4))
    for reverse in (False, True):
        triton_states.gather(Call(q, k, v, out, out[..., 0], (log, log), None, 0, reverse), "float32")


CALLS: Mapping[str, Callable[[object], None]] = {"forward": forward, "backward": backward, "decode": decode}
VARIANTS: Mapping[str, object] = {
    "window": "causal & window(9)",
    "mean": {"mask": "causal & keys('1::5')", "empty_rows": "mean"},
    "by head": {"mask": "causal", "empty_rows": "mean", "heads": {"0::2": {"mask": "causal & window(9)"}}},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", CALLS)
def test_the_host_waits_for_nothing(name: str, variant: str) -> None:
    CALLS[name](VARIANTS[variant])
    with Seen() as seen:
        CALLS[name](VARIANTS[variant])
    assert not seen.names & set(WAITS)


def test_linear_attention_has_the_host_wait_for_nothing() -> None:
    with Seen() as seen:
        gather()
    assert seen.names
    assert not seen.names & set(WAITS)


@pytest.mark.parametrize("wait", [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: x.add_(torch.tensor([1.0]))])
def test_what_would_wait_is_seen(wait: Callable[[Tensor], object]) -> None:
    with Seen() as seen:
        wait(torch.ones(3))
    assert seen.names & set(WAITS)


def test_only_the_first_call_of_a_shape_puts_tables_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[object] = []
    for module in (triton_visits, triton_gradients, triton_decode):
        put = module.on_device
        monkeypatch.setattr(module, "on_device", lambda *given, put=put: copied.append(given) or put(*given))
    triton_decode._on.cache_clear()  # groups of heads are those of many shapes
    fresh = {"mask": "causal", "empty_rows": "mean", "heads": {"1::2": {"mask": "causal & window(7)"}}}
    for name, run in CALLS.items():
        run(fresh)
        assert copied, name
        copied.clear()
        run(fresh)
        assert not copied, name


# What is asked for, its table, and another one of the same size: what they show is found out by kernels of their own.
SHOWN: Mapping[str, tuple[object, str, Tensor, Tensor]] = {
    "documents": ("causal & same(documents)", "documents", torch.arange(64) // 32, torch.arange(64) // 7),
    "windows by head": ("causal & span(reaches, 0)", "reaches", torch.full((4,), 9.0), torch.full((4,), 40.0)),
    "bitmaps": ("causal & blocks(shown, 16)", "shown", torch.eye(4).bool().repeat(4, 1, 1), torch.ones(4, 4, 4).bool()),
    "a bias": ({"mask": "causal", "score": "score + relative(bias, 64)"}, "bias", torch.ones(4, 127), torch.zeros(4, 127)),
}


@pytest.mark.parametrize("queries", [64, 1])
@pytest.mark.parametrize("name", SHOWN)
def test_what_is_launched_follows_from_no_table(name: str, queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a graph that is played again is right for all of them: kernels and sizes stay, tables are read where they lie."""
    launched: list[object] = []
    read: set[int] = set()

    def call(_: Tensor, kernel: Any, grid: tuple[int, ...], arguments: object, options: object) -> None:
        launched.append((kernel, grid, tree_map_only(Tensor, lambda x: (x.dtype, x.shape, x.stride()), arguments), options))
        read.update(x.data_ptr() for x in tree_leaves(arguments) if isinstance(x, Tensor))

    for module in (triton_kernels, triton_gradients, triton_decode, triton_visits):
        monkeypatch.setattr(module, "call", call)
    asked, table, *contents = SHOWN[name]
    held = contents[0].clone().requires_grad_(table == "bias" and queries > 1)
    q, k, v, _ = (x.requires_grad_(queries > 1) for x in operands(queries))
    trained = [x for x in (q, k, v, held) if x.requires_grad and queries > 1]
    before: list[object] = []
    for new in (contents[0], *contents):  # the first call of a shape makes its kernels
        launched.clear()
        read.clear()
        held.data.copy_(new)
        with Seen() as seen:
            out = attn.attend(q, k, v, asked, tables={table: held}, target="triton")  # type: ignore[arg-type]
            assert isinstance(out, Tensor)
            if trained:
                torch.autograd.grad(out, trained, torch.empty_like(out))
        assert held.data_ptr() in read
        if before:
            assert launched == before
            assert not seen.names & set(WAITS)
        before = list(launched)
    # Before each kernel its mask is cut to what tables show; a bias is no mask, and its gradient takes a kernel more.
    assert len(before) == ((4 if table == "bias" else 6) if trained else 2)


def test_gradients_of_a_sink_in_the_log_sum_exp_of_queries_that_see_nothing_are_refused() -> None:
    q, k, v = (torch.randn(1, 4, 8, 16) for _ in range(3))
    asked, sink = {"mask": "causal(-2)", "normalizer": "softmax(sink=sink)"}, torch.zeros(4, requires_grad=True)
    with pytest.raises(ShapeError, match="no gradients of a table in the log-sum-exp of queries that see nothing"):
        attn.attend(q, k, v, asked, tables={"sink": sink}, target="triton", return_lse=True)
