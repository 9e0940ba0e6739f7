"""A symbolic reader gives, at every place, the number that the graph computes there."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from attn_compiler.algebra.bounds import Interval
from attn_compiler.algebra.evaluate import evaluate_scalar
from attn_compiler.algebra.expr import Expr, Sort, symbol
from attn_compiler.graph.capture import capture
from attn_compiler.graph.symbolic import SymbolicReader

Function = Callable[..., Tensor]


def traced(function: Function, *args: Tensor) -> tuple[fx.GraphModule, fx.Node]:
    gm = make_fx(function, pre_dispatch=True, tracing_mode="fake")(*args)
    (output,) = (n for n in gm.graph.nodes if n.op == "output")
    return gm, output.args[0]


class Values(fx.Interpreter):
    """Runs a graph and keeps what every node computed."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.seen: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.seen[n.name] = result.clone() if isinstance(result, Tensor) else result
        return result


def symbolic(function: Function, *args: Tensor) -> tuple[Expr, SymbolicReader]:
    gm, node = traced(function, *args)
    reader = SymbolicReader(gm)
    places = tuple(symbol(f"x{n}", Sort.INDEX) for n in range(node.meta["val"].ndim))
    facts = {x: Interval(0, size - 1) for x, size in zip(places, node.meta["val"].shape, strict=True)}
    return reader.at(node, places, facts), reader


def check(function: Function, *args: Tensor) -> Expr:
    """Compare at every place; return the expression."""
    gm, _ = traced(function, *args)
    values = Values(gm)
    expected = values.run(*(a.clone() for a in args))
    e, reader = symbolic(function, *args)
    tables = {name: values.seen[found.node.name].tolist() for name, found in reader.tables.items()}
    for at in product(*map(range, expected.shape)):
        env = {symbol(f"x{n}", Sort.INDEX): x for n, x in enumerate(at)}
        got = evaluate_scalar(e, env, tables)
        want = expected[at].item()
        assert got == want or abs(got - want) <= 1e-5 * max(abs(want), 1), (at, got, want, e)
    return e


ids = torch.tensor([[0, 0, 1, 1, 2], [3, 3, 3, 4, 4]])

EXACT: dict[str, tuple[Function, tuple[Tensor, ...]]] = {
    "tril": (lambda: torch.ones(4, 5, dtype=torch.bool).tril(1), ()),
    "triu_fill": (lambda: torch.full((4, 4), -torch.inf).triu(1), ()),
    "repeat": (lambda: torch.arange(3).repeat(2, 2), ()),
    "interleave": (lambda: torch.arange(3).repeat_interleave(2), ()),
    "merge": (lambda: torch.arange(24).view(2, 3, 4).transpose(0, 1).reshape(6, 4), ()),
    "split": (lambda: torch.arange(24).view(4, 6).t().reshape(2, 3, 2, 2), ()),
    "cat": (lambda: torch.cat([torch.zeros(2), torch.ones(3), torch.arange(2).float()]), ()),
    "pad": (lambda: torch.nn.functional.pad(torch.arange(4), (2, 1), value=7), ()),
    "roll": (lambda: torch.arange(5).roll(2, 0), ()),
    "flip": (lambda: torch.arange(6).view(2, 3).flip(1), ()),
    "eye": (lambda: torch.eye(4), ()),
    "negative_select": (lambda: torch.arange(6).view(2, 3)[:, -1], ()),
    "constant_cumsum": (lambda: (torch.arange(5).diff(prepend=torch.arange(5)[:1] - 1) != 1).cumsum(0), ()),
    "float_mask": (lambda: (1.0 - torch.ones(3, 3).tril()) * torch.finfo(torch.float32).min, ()),
    "product_of_masks": (lambda: torch.ones(4, 4).tril() * torch.ones(4, 4).triu(-1), ()),
    "where": (lambda: torch.where(torch.arange(4)[:, None] >= torch.arange(4), 0.1, -1.0), ()),
    "documents": (lambda x: x[:, :, None] == x[:, None, :], (ids,)),
    "advanced": (lambda x: x[torch.arange(2)[:, None], torch.arange(4) + 1], (ids,)),
    "gather": (lambda x: x.gather(1, torch.arange(4).expand(2, 4)), (ids,)),
    "embedding": (lambda x, w: torch.nn.functional.embedding(x, w), (ids, torch.randn(5, 3))),
    "running_sum": (lambda x: x.cumsum(1) + torch.arange(5), (ids,)),
    "to_bool": (lambda x: x.bool() & (torch.arange(5) > 1), (ids,)),
    "buckets": (lambda: ((torch.arange(9).float() + 1).log() * 3).long(), ()),
    "trunc": (lambda: (torch.arange(9) * 0.5 - 2).long(), ()),
    "masked_fill": (lambda x: x.float().masked_fill(x == 3, -1e9), (ids,)),
    "clamp": (lambda x: (x - 2).clamp(-1, 1), (ids,)),
    "stack": (lambda x: torch.stack([x, x + 1, x * 2], 1), (ids,)),
}


@pytest.mark.parametrize("name", EXACT)
def test_every_place_reads_as_the_graph_computes_it(name: str) -> None:
    function, args = EXACT[name]
    check(function, *args)


@pytest.mark.parametrize("name", ["tril", "repeat", "merge", "split", "pad", "roll", "constant_cumsum", "float_mask", "where"])
def test_what_is_made_of_indices_needs_no_table(name: str) -> None:
    function, args = EXACT[name]
    assert not symbolic(function, *args)[0].tables()


def test_logarithms_that_are_truncated_become_a_table() -> None:
    assert symbolic(*EXACT["buckets"][:1])[0].op == "table"


def test_a_write_through_an_alias_is_not_missed() -> None:
    def written(x: Tensor) -> Tensor:
        y = x.clone()
        y[:, 1:3].fill_(9)
        return y + 1

    check(written, ids)


def test_a_write_in_place_is_followed() -> None:
    def written(x: Tensor) -> Tensor:
        y = torch.zeros(2, 5)
        y.masked_fill_(x == 3, -5.0)
        return y + 1

    assert check(written, ids).tables() == {"x_1"}


def test_nested_vmaps_are_read() -> None:
    def mask(x: Tensor) -> Tensor:
        def rule(b: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return (torch.ops.aten.index(x, [b, q]) == torch.ops.aten.index(x, [b, k])) & (k <= q)

        every = torch.vmap(torch.vmap(torch.vmap(rule, (None, None, 0)), (None, 0, None)), (0, None, None))
        return every(torch.arange(2), torch.arange(5), torch.arange(5)) & torch.ones(5, dtype=torch.bool)

    found: list[Expr] = []

    def backend(gm: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        aten = capture(gm, inputs)
        (output,) = (n for n in aten.graph.nodes if n.op == "output")
        places = tuple(symbol(f"x{n}", Sort.INDEX) for n in range(3))
        facts = {x: Interval(0, size - 1) for x, size in zip(places, (2, 5, 5), strict=True)}
        found.append(SymbolicReader(aten).at(output.args[0][0], places, facts))
        return gm.forward

    expected = torch.compile(mask, backend=backend, dynamic=False)(ids)
    (e,) = found
    (name,) = e.tables()
    for at in product(range(2), range(5), range(5)):
        env = {symbol(f"x{n}", Sort.INDEX): x for n, x in enumerate(at)}
        assert evaluate_scalar(e, env, {name: ids.tolist()}) == expected[at].item()


_SIZES = [1, 2, 3, 4, 6]


def _steps() -> list[Callable[[Tensor, int], Tensor]]:
    return [
        lambda x, n: x.transpose(0, n % x.ndim),
        lambda x, n: x.unsqueeze(n % (x.ndim + 1)),
        lambda x, n: x.reshape(-1),
        lambda x, n: x.reshape(-1, x.shape[-1]) if x.ndim > 1 else x.reshape(1, -1),
        lambda x, n: x.flip(n % x.ndim),
        lambda x, n: x.roll(n, n % x.ndim),
        lambda x, n: x.narrow(n % x.ndim, 0, max(1, x.shape[n % x.ndim] - 1)),
        lambda x, n: x + n,
        lambda x, n: x * (n + 1) - 3,
        lambda x, n: x // (n + 1),
        lambda x, n: x % (n + 2),
        lambda x, n: torch.where(x > n, x, n - x),
        lambda x, n: torch.cat([x, x + n], n % x.ndim),
        lambda x, n: torch.nn.functional.pad(x, (n % 3, 1), value=n),
        lambda x, n: x.clamp(max=n),
        lambda x, n: x + torch.arange(x.shape[-1]),
        lambda x, n: x.repeat_interleave(2, n % x.ndim),
        lambda x, n: x.abs().sqrt().mul(n).floor().long() if n % 2 else -x,
        lambda x, n: ((x < n) | (x == 2 * n)).long(),
    ]


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, len(_steps()) - 1), st.integers(0, 5)), max_size=6), st.sampled_from(_SIZES), st.booleans()
)
def test_random_programs_read_as_they_compute(steps: list[tuple[int, int]], size: int, known: bool) -> None:
    def program(given: Tensor) -> Tensor:
        x = torch.arange(2 * size).view(2, size) if known else given * 1
        for which, n in steps:
            x = _steps()[which](x, n) if x.numel() < 60 or which not in (12, 16) else x
        return x

    check(program, torch.randint(-9, 9, (2, size)))
