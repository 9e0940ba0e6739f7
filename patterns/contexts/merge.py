"""Tokens that are much alike attend as one: token merging (ToMe for Stable Diffusion), and the agents of AgentSD."""

from __future__ import annotations

from attn_compiler.algebra.context import Merge
from attn_compiler.errors import LanguageError
from attn_compiler.planning.geometry import Geometry
from attn_compiler.planning.words import CountPerAxis, TableName


def merge(
    share: float,
    cell: CountPerAxis = (2,),
    agents: float | None = None,
    power: float = 1.0,
    shortcut: float = 0.0,
    by: TableName | None = None,
    *,
    geometry: Geometry | None = None,
) -> Merge:
    """A share of the tokens of a grid is merged into the likest first tokens of cells; with `agents`, these gather the values.

    What is alike is told by the keys, by a table [batch, tokens, numbers], or by `operands: {metric: residual}`. Queries meet
    agents at the scale to the `power`, and `shortcut` times its value is added to each result.
    """
    if geometry is None or len(geometry.size) != 2 or geometry.before or geometry.after:
        raise LanguageError("`merge` needs a `geometry` of two axes with nothing beside it")
    if not 0 < share < 1 or (agents is not None and not share < agents < 1):
        raise LanguageError("`merge` takes a share of the tokens between 0 and 1, and `agents` a larger one")
    if agents is None and power != 1:
        raise LanguageError("the `power` of `merge` is that of the scale at which queries meet `agents`, and there are none")
    rows, columns = geometry.per_axis(cell)
    return Merge(share, (rows, columns), geometry.sides or (), by or "", agents, power, shortcut)
