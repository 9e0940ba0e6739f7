"""What is recovered from a graph is what the graph computes: mask and score at every place, and the output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from attn_compiler.algebra.evaluate import evaluate
from attn_compiler.algebra.expr import Expr, Sort, b, dim, h, heads, i, k, k_len, q_len, score
from attn_compiler.algebra.variant import EmptyRows
from attn_compiler.graph.capture import capture
from attn_compiler.graph.layout import arranged, returned
from attn_compiler.graph.match import match
from attn_compiler.graph.record import GraphSite
from attn_compiler.graph.recover import Recovered, recover
from attn_compiler.graph.symbolic import SymbolicReader, Table
from attn_compiler.planning.plan import Refusal
from attn_compiler.testing import assert_all_within_budget
from zoo import handwritten, text, torch_modules, vision
from zoo.capture import visit_graphs
from zoo.entry import Entry
from zoo.masks import ENTRIES as MASKS


def numbers(e: Expr, leaves: dict[Expr, Tensor], tables: dict[str, Tensor], real: torch.dtype) -> Tensor:
    """Evaluate over arrays, real numbers being of the dtype `real`."""

    def leaf(node: Expr, at: tuple[Tensor, ...]) -> Tensor:
        if node.op == "const":
            return torch.tensor(node.value, dtype=real if node.sort is Sort.REAL else None)
        if node.op == "symbol":
            return leaves[node]
        found = tables[str(node.value)]
        if not found.ndim:
            return found
        places = tuple(x.long().clamp(0, size - 1) for x, size in zip(at[len(at) - found.ndim :], found.shape, strict=True))
        value = found[places]
        return value.to(real) if node.sort is Sort.REAL else value

    of_real = {"real": lambda x: x.to(real), "pow": lambda x, y: x.to(real) ** y}
    return evaluate(e, leaf, {**OPERATIONS, **of_real})


def whole(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: f(x.double()).long()


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    **{op: getattr(torch, op) for op in ("add", "sub", "mul", "div", "neg", "abs", "exp", "log", "sqrt", "tanh", "sigmoid")},
    "lt": torch.lt,
    "le": torch.le,
    "eq": torch.eq,
    "and": torch.logical_and,
    "or": torch.logical_or,
    "not": torch.logical_not,
    "where": torch.where,
    "min": torch.minimum,
    "max": torch.maximum,
    "floordiv": lambda x, y: torch.div(x, y, rounding_mode="floor"),
    "mod": torch.remainder,
    "ceil": whole(torch.ceil),
    "floor": whole(torch.floor),
}


def attention(site: GraphSite, found: Recovered, values: dict[fx.Node, Any], real: torch.dtype) -> Tensor:
    """The output of a site from its variant alone, dense."""
    variant = found.variant
    groups = (site.batch, site.heads, site.queries, site.depth)
    query = arranged(values[site.q.node].to(real), site.q.axes, groups)
    key, value = (
        arranged(values[x.node].to(real), x.axes, (site.batch, site.heads, site.keys, last))
        for x, last in ((site.k, site.depth), (site.v, site.width))
    )
    batch, lots, queries, keys = query.shape[0], query.shape[1], query.shape[2], key.shape[2]
    shapes = {b: (batch, 1, 1, 1), h: (1, lots, 1, 1), i: (1, 1, queries, 1), k: (1, 1, 1, keys)}
    leaves: dict[Expr, Tensor] = {at: torch.arange(max(shape)).view(shape) for at, shape in shapes.items()}
    leaves |= {
        q_len: torch.tensor(queries),
        k_len: torch.tensor(keys),
        dim: torch.tensor(query.shape[-1]),
        heads: torch.tensor(lots),
    }
    tables = {name: real_table(x, values) for name, x in found.tables.items()}
    leaves[score] = query @ key.mT * numbers(variant.scale, leaves, tables, real)
    scores = numbers(variant.score, leaves, tables, real).expand(batch, lots, queries, keys)
    keep = numbers(variant.mask, leaves, tables, torch.float64).expand(batch, lots, queries, keys)
    hidden = scores.masked_fill(~keep, -torch.inf)
    empty = ~keep.any(-1, keepdim=True)
    if variant.empty_rows is EmptyRows.MEAN:
        hidden = torch.where(empty, 0.0, hidden)
    elif variant.empty_rows is EmptyRows.UNMASKED:
        hidden = torch.where(empty, scores, hidden)
    weights = hidden.softmax(-1)
    if variant.empty_rows is EmptyRows.ZERO:
        weights = weights.nan_to_num(0.0)
    total = variant.normalizer.total
    assert total is not None
    if total.op == "add":
        (sink,) = (x.args[0].args[0] for x in total.args if x.op == "exp")
        column = numbers(sink, leaves, tables, real).expand(batch, lots, queries, 1)
        weights = torch.cat([hidden, column], -1).softmax(-1)[..., :-1]
    return weights @ value


def real_table(x: Table, values: dict[fx.Node, Any]) -> Tensor:
    found = values[x.node]
    return torch.as_tensor(found if x.dim is None else found.shape[x.dim])


class Run(fx.Interpreter):
    """Keeps a copy of every value as it was when it was read last: what is made empty is written to in between."""

    def run_node(self, n: fx.Node) -> Any:
        for read in n.all_input_nodes:
            self.keep(read, self.env[read])
        result = super().run_node(n)
        self.keep(n, result)
        return result

    def keep(self, n: fx.Node, result: Any) -> None:
        copied = type(result) is Tensor and n.meta.get("val") is not None
        self.kept[n] = result.clone() if copied else result

    kept: dict[fx.Node, Any]


def assert_computes(site: GraphSite, found: Recovered, values: dict[fx.Node, Any]) -> None:
    """The graph may be as far from the variant's output in float64 as the variant's own in the graph's precision."""
    actual = values[site.out.node]
    groups = (site.batch, site.heads, site.queries, site.width)

    def run(real: torch.dtype) -> list[Tensor]:
        return [returned(attention(site, found, values, real), groups, site.out.axes)]

    assert_all_within_budget([actual], run(torch.float64), lambda: run(actual.dtype), [str(found.variant)])


def recovered(model: nn.Module, inputs: dict[str, Tensor], **how: Any) -> list[Recovered | Refusal]:
    """Every site of a model; what its variant computes is what the graph computes there, within budget."""
    found: list[Recovered | Refusal] = []

    def look(gm: fx.GraphModule, examples: Sequence[Any]) -> None:
        graph = capture(gm, examples)
        sites = match(graph).sites
        reader = SymbolicReader(graph)
        results = [recover(graph, site, reader) for site in sites]
        run = Run(graph, garbage_collect_values=False)
        run.kept = {}
        with torch.no_grad():
            run.run(*examples)
        for site, result in zip(sites, results, strict=True):
            found.append(result)
            if isinstance(result, Recovered) and not result.variant.dropout:
                assert_computes(site, result, run.kept)

    visit_graphs(model, inputs, look, **how)
    return found


ALL = {entry.name: entry for entry in (*MASKS, *handwritten.ENTRIES, *torch_modules.ENTRIES, *text.ENTRIES, *vision.ENTRIES)}
CORE = (
    "llama_packed",
    "t5_pad",
    "gemma3_mm_prefix",
    "bart_padded",
    "bloom",
    "gpt_neo",
    "funnel",
    "mul_mask_gpt1",
    "sink_softmax1",
)
CASES = [
    pytest.param(entry, impl, marks=() if entry.name in CORE else (pytest.mark.full,), id=f"{entry.name}-{impl}")
    for entry in ALL.values()
    for impl in entry.implementations
]


@pytest.mark.parametrize(("entry", "implementation"), CASES)
def test_the_variant_computes_what_the_model_computes(entry: Entry, implementation: str) -> None:
    model, inputs = entry.make(implementation)
    for result in recovered(model, inputs):
        assert isinstance(result, Recovered), result


class WithFlex(nn.Module):
    """Documents and a bias for each head, as functions of flex read them."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.bias = nn.Parameter(torch.randn(2, 24, 24))
        self.slopes = nn.Parameter(torch.rand(2))

    def forward(self, x: Tensor, document: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))

        def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (document[b, i] == document[b, j]) & (i >= j)

        def score(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return s + self.bias[h, i, j] - self.slopes[h] * (i - j)

        out = flex_attention(q, k, v, score, create_block_mask(seen, 2, None, 24, 24, device="cpu"))
        assert isinstance(out, Tensor)
        return out.transpose(1, 2).flatten(2)


def test_the_functions_of_flex_may_read_tables() -> None:
    torch.manual_seed(0)
    inputs = {"x": torch.randn(2, 24, 16), "document": torch.arange(24).div(torch.tensor([[5], [9]]), rounding_mode="floor")}
    (found,) = recovered(WithFlex(), inputs)
    assert isinstance(found, Recovered)
    assert len(found.tables) == 3
    assert "document" in str(found.variant.mask)
