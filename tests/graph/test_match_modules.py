"""Attentions inside modules, bodies and exported programs are found with their names; what is none is left alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint

from attn_compiler.algebra.expr import b, h, i, k
from attn_compiler.graph.capture import bodies, capture, capture_body
from attn_compiler.graph.match import Matches, match
from attn_compiler.graph.replay import Replay
from attn_compiler.testing import assert_all_within_budget

HEADS, KV_HEADS, DIM, LENGTH = 4, 2, 8, 12
WIDTH = HEADS * DIM
Core = Callable[[Tensor, Tensor, Tensor], Tensor]


class Attention(nn.Module):
    """Projections around a hand-written attention."""

    def __init__(self, core: Core, kv_heads: int = HEADS) -> None:
        super().__init__()
        self.core, self.kv_heads = core, kv_heads
        self.qkv = nn.Linear(WIDTH, WIDTH + 2 * kv_heads * DIM)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        kv = self.kv_heads * DIM
        q, k, v = (t.view(batch, length, -1, DIM).transpose(1, 2) for t in self.qkv(x).split([WIDTH, kv, kv], -1))
        return self.core(q, k, v).transpose(1, 2).reshape(batch, length, WIDTH)


def lower(n: int) -> Tensor:
    return torch.tril(torch.ones(n, n, dtype=torch.bool))


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * DIM**-0.5).masked_fill(~lower(q.shape[-2]), -torch.inf).softmax(-1) @ v


def read_by_others(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    p = (q @ k.mT * DIM**-0.5).softmax(-1)
    return p @ v + p.mean()


def biased(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, heads, length, dim = q.shape
    q, k, v = (t.reshape(batch * heads, length, dim) for t in (q, k, v))
    bias = torch.triu(torch.full((length, length), float("-inf")), 1).expand(batch * heads, length, length)
    return torch.bmm(torch.baddbmm(bias, q, k.mT, alpha=dim**-0.5).softmax(-1), v).view(batch, heads, length, dim)


def matched(model: nn.Module, *args: Any, dynamic: bool | None = None, **kwargs: Any) -> tuple[list[Matches], Any]:
    """Compile `model` so that every site is computed from its record; return the matches and the output."""
    torch._dynamo.reset()
    seen: list[Matches] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        captured = capture(gm, example_inputs)
        seen.append(match(captured))
        return Replay(captured, seen[-1].sites).run

    return seen, torch.compile(model, backend=backend, dynamic=dynamic)(*args, **kwargs)


def test_weights_that_somebody_reads_are_reported() -> None:
    (found,), _ = matched(Attention(read_by_others), torch.randn(2, LENGTH, WIDTH))
    assert [str(node.target) for node in found.sites[0].escapes] == ["aten.mean.default"]
    (found,), _ = matched(Attention(plain), torch.randn(2, LENGTH, WIDTH))
    assert found.sites[0].escapes == ()


class Route(nn.Module):
    """A mixture of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 4)
        self.experts = nn.Parameter(torch.randn(4, WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bsn,bsnf->bsf", self.gate(x).softmax(-1), torch.einsum("bse,nef->bsnf", x, self.experts))


class Pool(nn.Module):
    """Pooling by weights that are no product of two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(x).transpose(1, 2).softmax(-1) @ x


class Lookup(nn.Module):
    """A soft embedding: keys and values are parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(31, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.table.weight.T).softmax(-1) @ self.table.weight


@pytest.mark.parametrize("kind", [Route, Pool, Lookup], ids=lambda kind: kind.__name__)
def test_what_is_no_attention_is_left_alone(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = kind(), torch.randn(2, LENGTH, WIDTH)
    (found,), out = matched(model, x)
    assert found.sites == ()
    assert len(found.near_misses) == 1
    assert torch.equal(out, model(x))


def encoder(train: bool) -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, HEADS, 48, 0.0, batch_first=True), 2).train(train)


def decoder() -> nn.Module:
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, HEADS, 48, 0.0, batch_first=True), 2)


def multihead(**kwargs: Any) -> nn.Module:
    return nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **kwargs)


X, Y = torch.randn(2, LENGTH, WIDTH), torch.randn(2, 9, WIDTH)
PADDING = torch.arange(LENGTH) >= torch.tensor([[LENGTH], [LENGTH - 4]])
MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...], dict[str, Any], int]] = {
    "multihead with weights": (multihead, (X, X, X), {}, 1),
    "multihead without weights": (multihead, (X, X, X), {"need_weights": False}, 1),
    "multihead, masked": (multihead, (X, X, X), {"attn_mask": ~lower(LENGTH), "need_weights": False}, 1),
    "multihead, masked, with weights": (multihead, (X, X, X), {"attn_mask": ~lower(LENGTH)}, 1),
    "multihead, padded": (multihead, (X, X, X), {"key_padding_mask": PADDING}, 1),
    "multihead, cross": (multihead, (X, Y, Y), {}, 1),
    "multihead, cross, other widths": (lambda: multihead(kdim=WIDTH, vdim=WIDTH), (X, Y, Y), {}, 1),
    "encoder in evaluation": (lambda: encoder(False), (X,), {}, 2),
    "encoder in training": (lambda: encoder(True), (X,), {}, 2),
    "decoder": (decoder, (X, Y), {"tgt_is_causal": True, "tgt_mask": nn.Transformer.generate_square_subsequent_mask(LENGTH)}, 4),
}


@pytest.mark.parametrize("name", MODULES)
def test_the_modules_of_torch_are_seen_through(name: str) -> None:
    torch.manual_seed(0)
    make, args, kwargs, sites = MODULES[name]
    model = make()
    found, out = matched(model, *args, **kwargs)
    assert sum(len(one.sites) for one in found) == sites, found
    assert {math.prod(int(a.size) for a in site.heads) for one in found for site in one.sites} == {HEADS}
    wide = [x.double() if x.is_floating_point() else x for x in args]
    given = {key: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for key, x in kwargs.items()}

    def results(out: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
        return [x.detach() for x in (out if isinstance(out, tuple) else (out,)) if x is not None]

    exact = results(copy.deepcopy(model).double()(*wide, **given))
    assert_all_within_budget(results(out), exact, lambda: results(model(*args, **kwargs)))


def test_flex_attention_is_found() -> None:
    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result = flex_attention(q, k, v, enable_gqa=True)
        assert isinstance(result, Tensor)
        return result

    torch._dynamo.reset()
    seen: list[Matches] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        seen.append(match(capture(gm, example_inputs)))
        return gm.forward

    with torch.no_grad():
        torch.compile(Attention(core, KV_HEADS), backend=backend)(torch.randn(2, LENGTH, WIDTH))
    (site,) = seen[0].sites
    assert site.idiom == "flex"
    assert [math.prod(int(a.size) for a in group) for group in (site.heads, site.kv_heads)] == [HEADS, KV_HEADS]


def test_a_site_says_where_it_stands() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([Attention(plain), Attention(F.scaled_dot_product_attention)])})

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.model["layers"]:
                x = layer(x)
            return x

    (found,), _ = matched(Stack(), X)
    assert [site.name for site in found.sites] == ["model.layers.0", "model.layers.1"]
    assert "test_match_modules.py:" in found.sites[0].where


def test_an_operand_of_the_scores_is_read_at_coordinates() -> None:
    (found,), _ = matched(Attention(biased), X)
    (site,) = found.sites
    (bias,) = next(step.operands() for step in site.steps if step.op == "add")
    assert [site.at(axis) for axis in bias.axes] == [b * HEADS + h, i, k]


def test_sites_in_a_checkpointed_block_are_found_in_its_body() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Attention(plain)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = checkpoint(self.inner, x, use_reentrant=False)
            return result

    torch._dynamo.reset()
    seen: list[tuple[int, ...]] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        captured = capture(gm, example_inputs)
        inner = [capture_body(body) for body in bodies(captured)]
        seen.append((len(match(captured).sites), *(len(match(body).sites) for body in inner)))
        return gm.forward

    torch.compile(Block(), backend=backend)(X)
    assert seen == [(0, 1)]


def test_an_exported_graph_is_matched_unchanged() -> None:
    program = torch.export.export(Attention(plain), (X,))
    assert len(match(capture(program.graph_module)).sites) == 1
