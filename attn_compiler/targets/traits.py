"""What later queries ask of a token besides its key and value: gates made of a block's input, its key before a rotation.

A cache holds these rows beside keys, [batch, heads, tokens] or as keys are, in the order of `traits`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_compiler.algebra import expr as e
from attn_compiler.algebra.expr import table
from attn_compiler.algebra.variant import Variant
from attn_compiler.targets.operands import Operands

KEY = "k_unrotated"  # the key before its rotary embedding
FIRST = "attn.first"  # a table: the position of the first key


class Trait(NamedTuple):
    """One row of a token: a table that its variant makes, summed up over the tokens where it is `running`, or KEY."""

    name: str
    running: bool = False

    def heads(self, heads: int) -> int:
        """How many numbers a token has of it; 0: it is as long as a key."""
        return 0 if self.name == KEY else heads


def traits(variant: Variant) -> tuple[Trait, ...]:
    """All that a variant asks of tokens, in one order wherever it is asked."""
    parts = variant.parts()
    key = (Trait(KEY),) if any("k" in part.unrotated for part in parts) else ()
    nodes = {node for expression in variant.expressions() for node in expression.walk()}
    by_token = {node.value for node in nodes if node.op == "table" and node.mentions(e.q, e.k)}
    made = {one.name: Trait(one.name, one.running) for part in parts for one in part.made if one.name in by_token}
    return key + tuple(made[name] for name in sorted(made))


def with_traits(operands: Operands, variant: Variant, of: Sequence[Trait], rows: Sequence[Tensor]) -> tuple[Operands, Variant]:
    """The call and the variant that read these rows of the keys which are here, wherever in a text these stand."""
    if not of:
        return operands, variant
    first = operands.k_positions
    assert not isinstance(first, Tensor)
    tables = {FIRST: torch.full((), first, dtype=torch.int64, device=operands.k.device)}  # type: ignore[arg-type]
    unrotated = operands.unrotated
    for trait, x in zip(of, rows, strict=True):
        if trait.name == KEY:
            q = unrotated[0] if unrotated else operands.q
            unrotated = q, x.repeat_interleave(operands.k.shape[1] // x.shape[1], dim=1)
        else:  # a running log is 0 before the first key
            tables[trait.name] = F.pad(x.double().cumsum(dim=2) if trait.running else x, (1, 0))
    names = tables.keys()
    here = 1 - table(FIRST)

    def counted(node: e.Expr) -> e.Expr:
        if node.op != "table" or node.value not in names or not node.mentions(e.q, e.k):
            return node
        return table(str(node.value), *node.args[:-1], node.args[-1] + here, sort=node.sort)

    told = replace(operands, tables={**operands.tables, **tables}, unrotated=unrotated)
    return told, variant.map(lambda x: x.transform(counted))


def empty(of: Trait, k: Tensor, heads: int) -> Tensor:
    """A tensor as the rows of tokens with these keys are, not filled."""
    count = of.heads(heads)
    wide = torch.promote_types(k.dtype, torch.float32)
    return k.new_empty((k.shape[0], count, k.shape[2]), dtype=wide) if count else torch.empty_like(k)
