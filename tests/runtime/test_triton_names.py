"""What Triton kernels call tables means nothing else in them, whatever the tables are called."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import attn_compiler as attn
from attn_compiler.algebra import expr as e
from attn_compiler.algebra.expr import Sort
from attn_compiler.runtime.attend import Target
from attn_compiler.runtime.kernel_source import shape_of
from attn_compiler.runtime.triton_orders import order
from attn_compiler.targets.triton.blocks import KINDS, Blocks, Kind
from attn_compiler.testing import variant_of
from attn_compiler.testing.budget import assert_all_within_budget

pytest.importorskip("triton")

ASKED: Mapping[str, Mapping[str, object]] = {
    "softmax": {"mask": "causal & window(40)", "score": "score + relative({}, 80)"},
    "sigmoid of norms": {"mask": "causal", "score": "cosine(0.2) + relative({}, 80)", "normalizer": "sigmoid"},
    "tiles in a list": {"mask": "strided(16, 2)", "score": "score + relative({}, 80)"},
}


def printed(asked: str, kind: Kind, table: str) -> ast.stmt:
    """A kernel, without the functions that it calls."""
    variant = {slot: x.format(table) if isinstance(x, str) else x for slot, x in ASKED[asked].items()}
    shape = shape_of(variant, q_len=1 if kind == "decode" else 300, k_len=300, heads=1, head_dim=16, target="triton")
    return ast.parse(order(shape, kind, Blocks(), "sm_90", wanted=(table,)).text).body[-1]


def given(tree: ast.AST) -> list[str]:
    """The names that get a value, as often as they do."""
    return [node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]


def pointers(tree: ast.AST) -> set[str]:
    """What tables and their gradients are called."""
    assigned = [node for node in ast.walk(tree) if isinstance(node, ast.Assign)]
    unpacked = [node for node in assigned if isinstance(node.value, ast.Name) and node.value.id in ("tables", "sums")]
    return {name for node in unpacked for name in given(node)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("asked", ASKED)
def test_a_table_may_be_called_like_anything_in_a_kernel(asked: str, kind: Kind) -> None:
    tree = printed(asked, kind, "bias")
    assert pointers(tree)
    for name in {*given(tree)} - pointers(tree):
        renamed = printed(asked, kind, name)
        names = given(renamed)
        assert all(names.count(one) == 1 for one in pointers(renamed)), name
        assert len(pointers(renamed)) == len(pointers(tree)), name


TWO = [("slope", "begin"), ("bias", "of_bias"), ("of_bias", "bias"), ("a.b", "a_b"), ("q", "table_q")]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("names", TWO, ids=str)
@pytest.mark.parametrize("target", ["triton", "cpp"])
def test_tables_are_told_apart(target: Target, names: tuple[str, str]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, *tables = (torch.randn(shape, generator=generator) for shape in [(1, 1, 40, 16), (1, 79), (1, 79)])
    asked = variant_of({"mask": "causal", "normalizer": "sigmoid"}, heads=1, kv_heads=1)
    biases = (e.table(name, e.h, e.q - e.k + 39, sort=Sort.REAL) for name in names)
    asked = replace(asked, score=sum(biases, asked.score))

    def gradients(target: Target, real: torch.dtype = torch.float32) -> list[Tensor]:
        leaves = [one.to(real).requires_grad_() for one in (x, *tables)]
        out = attn.attend(*leaves[:1] * 3, asked, tables=dict(zip(names, leaves[1:], strict=True)), target=target)
        assert isinstance(out, Tensor)
        return list(torch.autograd.grad((out * torch.linspace(-1, 1, 16)).sum(), leaves))

    assert_all_within_budget(gradients(target), gradients("reference", torch.float64), lambda: gradients("torch"))
