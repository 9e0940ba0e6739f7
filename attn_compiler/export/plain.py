"""The target of files that run without us: attention as PyTorch's own operators, spelled out once the program is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx

from attn_compiler import torch_private as private
from attn_compiler.algebra.variant import Variant
from attn_compiler.export.called import Called, called
from attn_compiler.export.program import Rewritten, hold, renamed, results
from attn_compiler.graph.rewrite import splice
from attn_compiler.planning.plan import Refusal
from attn_compiler.planning.planner import Carried
from attn_compiler.planning.site import Site
from attn_compiler.runtime.exported import attend_by, record
from attn_compiler.targets.choice import TorchTarget
from attn_compiler.targets.exported import FIRST_QUERY
from attn_compiler.targets.operands import Operands
from attn_compiler.targets.tilings import Tilings, tilings
from attn_compiler.targets.torch_target import Result

LISTED = "blocks of queries, each with the tiles of keys that a list names"
_TORCH = TorchTarget()


@dataclass(frozen=True)
class PlainTarget:
    """Plain operators that do the same in every call; `site` names the attention that they are made for."""

    site: str = ""

    @property
    def name(self) -> str:
        return _TORCH.name

    def refuse(self, operands: Operands, variant: Variant, *, lse: bool = False) -> str | None:
        return _TORCH.refuse(operands, variant, lse=lse)

    def attend(self, operands: Operands, variant: Variant, *, lse: bool = False) -> Result:
        """Record the operator that `spelled` takes apart; what goes on from a state has nothing to choose."""
        if operands.past or lse:
            return _TORCH.attend(operands, variant, lse=lse)
        return record(self.site, operands, variant), None

    def carry(self, site: Site, variant: Variant) -> Carried | Refusal:
        """Whether a mask leaves tiles empty is known once its tables are: it is taken, and may come out as it was."""
        if any(part.dropout for part in variant.parts()):
            return Refusal(self.name, "its dropout is active: call `model.eval()`")
        if any(how.largest for part in variant.parts() for _, how in part.storage.held()):
            return Refusal(self.name, "a file cannot warn of what scales cut off that a policy fixes: leave `largest` out")
        if any(part.order is not None for part in variant.parts()):
            return Refusal(self.name, "a file cuts blocks of tokens that share scales as they come: leave the `order` out")
        carried = _TORCH.carry(site, variant)
        if isinstance(carried, Refusal):
            return carried
        return replace(carried, gains=carried.gains or site.form == "scaled_dot_product_attention with a mask")


def spelled(result: Rewritten) -> Rewritten:
    """Let each attention of a program be plain operators in place; the plan says of each how it came out."""
    program = result.program
    before, added = results(program), list[Tensor]()
    forms: dict[str, str] = {}
    for module in (one for one in program.graph_module.modules() if isinstance(one, fx.GraphModule)):
        outermost = module is program.graph_module
        for one in called(program, module.graph):
            by = tilings(one.spec, one.contents if outermost else {})
            lists = by.tensors() if outermost else []
            by = by if lists else Tilings(one.spec.call.variant, {})
            nodes = [private.add_input(module, f"attn_list_{len(added) + at}", x) for at, x in enumerate(lists)]
            added += lists
            _spell(module.graph, one, by, nodes)
            forms |= {one.spec.call.name: LISTED} if lists else {}
        module.recompile()
    hold(program, added)
    renamed(program, before)
    decided = zip(result.names, result.plan.decisions, strict=True)
    decisions = tuple(replace(one, form=forms.get(name, one.form)) for name, one in decided)
    return replace(result, plan=replace(result.plan, decisions=decisions))


def _spell(graph: fx.Graph, one: Called, by: Tilings, lists: Sequence[fx.Node]) -> None:
    """Put operators in the place of one attention; a first position that is a size goes in as a number."""
    names = ("q", "k", "v", *one.spec.call.tables)
    operands = [x.args[1] if name == FIRST_QUERY else x for name, x in zip(names, one.operands, strict=True)]
    given: list[Any] = [*operands, *lists]
    fragment = private.retrace(_computation(one, by), [x.meta["val"] if isinstance(x, fx.Node) else x for x in given])
    splice(graph, one.node, fragment, given)


def _computation(one: Called, by: Tilings) -> Callable[..., Tensor]:
    count = len(one.operands)

    def compute(*values: Tensor) -> Tensor:
        return attend_by(values[:count], one.spec.call, by.of(values[count:]))

    return compute
