"""What later queries ask of a token besides its key and value: gates made of a block's input, its key before a rotation.

A cache holds these rows beside keys, [batch, heads, tokens (, dim)] or as keys are, in the order of `traits`.
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
from attn_compiler.algebra.feature import component
from attn_compiler.algebra.made import Made
from attn_compiler.algebra.variant import Variant
from attn_compiler.targets.operands import Operands

KEY = "k_unrotated"  # the key before its rotary embedding
FIRST = "attn.first"  # a table: the position of the first key


class Trait(NamedTuple):
    """One row of a token: a table that its variant makes, summed up over the tokens where it is `running`, or KEY.

    Of a table each head has one number, or as many as of a key where it is `wide`.
    """

    name: str
    running: bool = False
    wide: bool = False

    def heads(self, heads: int) -> int:
        """How many heads have numbers of their own; 0: those of keys."""
        return 0 if self.name == KEY else heads


def traits(variant: Variant) -> tuple[Trait, ...]:
    """All that a variant asks of tokens, in one order wherever it is asked."""
    parts = variant.parts()
    key = (Trait(KEY),) if any("k" in part.unrotated for part in parts) else ()
    nodes = {node for expression in variant.expressions() for node in expression.walk()}
    by_token = {node.value for node in nodes if node.op == "table" and node.mentions(e.q, e.k)}
    asked = (one for part in parts for one in part.made if isinstance(one, Made) and one.name in by_token)
    made = {one.name: Trait(one.name, one.running, one.weights.mentions(component)) for one in asked}
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
            tables[trait.name] = F.pad(x.double().cumsum(dim=2) if trait.running else x, (0, 0, 1, 0) if trait.wide else (1, 0))
    names = tables.keys()
    here = 1 - table(FIRST)

    def counted(node: e.Expr) -> e.Expr:
        if node.op != "table" or node.value not in names or not node.mentions(e.q, e.k):
            return node
        at = (place + here if place.mentions(e.q, e.k) else place for place in node.args)
        return table(str(node.value), *at, sort=node.sort)

    told = replace(operands, tables={**operands.tables, **tables}, unrotated=unrotated)
    return told, variant.map(lambda x: x.transform(counted))


def empty(of: Trait, k: Tensor, heads: int) -> Tensor:
    """A tensor as the rows of tokens with these keys are, not filled."""
    count = of.heads(heads)
    real, dim = torch.promote_types(k.dtype, torch.float32), k.shape[3:] if of.wide else ()
    return k.new_empty((k.shape[0], count, k.shape[2], *dim), dtype=real) if count else torch.empty_like(k)
