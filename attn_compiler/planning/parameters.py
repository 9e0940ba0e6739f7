"""The parameters that a policy's variants add to a model: which those are at a site, their shapes, and what they start as."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from attn_compiler.algebra.context import Context, added
from attn_compiler.algebra.expr import Expr, Sort, const, h, k, kv, layer, q, score
from attn_compiler.algebra.feature import component, feature, x
from attn_compiler.algebra.made import channel
from attn_compiler.algebra.notation import text
from attn_compiler.algebra.output import Local, tap
from attn_compiler.algebra.simplify import simplify
from attn_compiler.algebra.variant import Variant, reads
from attn_compiler.errors import PolicyError
from attn_compiler.planning.plan import Decision
from attn_compiler.planning.site import Site
from attn_compiler.planning.sources import Source

Start = NDArray[np.float32]


@dataclass(frozen=True)
class Parameter:
    """One tensor of a policy for all layers, of which each site reads its own part. A map of features starts as the identity."""

    name: str
    shape: tuple[int, ...]
    number: float = 0.0  # what it starts as, where it is no map
    maps: bool = False

    def start(self) -> Start:
        """The values before any training."""
        if self.maps:
            return np.broadcast_to(np.eye(*self.shape[-2:], dtype=np.float32), self.shape).copy()
        return np.full(self.shape, self.number, dtype=np.float32)

    def misfit(self, found: tuple[int, ...]) -> str:
        """What is wrong with values of that shape; nothing if they fit. Leading axes may lack, features are free."""
        wanted: tuple[int | None, ...] = (*self.shape[:-1], None) if self.maps else self.shape
        tail = wanted[len(wanted) - len(found) :]
        if len(found) <= len(wanted) and all(size in (n, 1) or n is None for size, n in zip(found, tail, strict=True)):
            return ""
        said = ", ".join("features" if n is None else str(n) for n in wanted)
        return f'"{self.name}" is {list(found)}, and this model needs [{said}], leading axes as far as they matter'


def parameters_of(variant: Variant, site: Site, names: Iterable[str]) -> Iterator[Parameter]:
    """Which of the tables called `names` a variant reads at a site, as parameters of the whole model."""
    wanted = frozenset(names)
    for node in reads(variant):
        if node.value in wanted:
            yield _parameter(node, variant, site)


def all_parameters(decided: Iterable[tuple[Variant, Site]], names: Iterable[str]) -> dict[str, Parameter]:
    """The parameters of all sites of a model, by name; sites that would share a part of one are an error."""
    wanted = frozenset(names)
    found: dict[str, Parameter] = {}
    owners: dict[tuple[str, int | None], Site] = {}
    for variant, site in decided:
        for one in set(parameters_of(variant, site, wanted)):
            other = owners.setdefault((one.name, site.layer), site)
            if other is not site or found.setdefault(one.name, one) != one:
                first = other if other is not site else next(s for (name, _), s in owners.items() if name == one.name)
                raise PolicyError(_shared(one.name, first, site))
    return found


def starts(decisions: Iterable[Decision], sources: Mapping[str, Source]) -> dict[str, Source]:
    """What nobody trained and a rule allows all the same: the parameters that these decisions read and no file holds."""
    decided = [(decision.variant, decision.site) for decision in decisions if decision.target is not None]
    names = {name for variant, site in decided for name in lacking(variant, site, sources)}
    return {one.name: Source("held", one.name, one.start()) for one in all_parameters(decided, names).values()}


def lacking(variant: Variant, site: Site, sources: Mapping[str, Source]) -> frozenset[str]:
    """The tables that a variant reads and that neither its site nor a policy brings."""
    derived = {table.name for part in variant.parts() for table in part.derived}
    known = {*sources, *site.tables, *derived, *site.computes.tables()}
    if site.frame:
        known |= site.frame.position.tables() | (site.frame.first_key.tables() if site.frame.first_key is not None else set())
    return variant.tables() - known


def _parameter(node: Expr, variant: Variant, site: Site) -> Parameter:
    name = str(node.value)
    if not name.isidentifier():
        raise PolicyError(f'"{name}" cannot be a parameter of a model: its name is made of letters, digits and `_`')
    sizes = {layer: site.layers or 1, h: site.heads, kv: site.kv_heads, component: site.head_dim, feature: site.head_dim}
    sizes[channel] = site.input_width
    sizes[tap] = next((step.taps for step in _convolutions(variant) if step.weights == node), 0)
    contexts = (one for part in variant.parts() for one in part.context if isinstance(one, Context))
    for one in (one for one in contexts if node in one.expressions()):
        sizes |= {added: one.count, component: (site.head_dim, site.value_dim)[one.expressions().index(node)]}
        sizes |= {q: math.prod(one.grid), k: math.prod(one.grid)} if one.grid else {}
    strange = [text(place) for place in node.args if place not in sizes]
    if strange or node.sort is not Sort.REAL:
        raise PolicyError(
            f'{site.name}: "{name}" is read at `{", ".join(strange)}`, whose size is no part of the model, so it cannot be '
            "trained as a parameter; parameters are read by layer, head and component: give it as a table"
            if strange
            else f'{site.name}: "{name}" holds no real numbers, so it cannot be trained as a parameter: give it as a table'
        )
    shape = tuple(sizes[place] for place in node.args)
    return Parameter(name, shape, _neutral(node, variant), maps=feature in node.args)


def _convolutions(variant: Variant) -> Iterator[Local]:
    yield from (step for part in variant.parts() for step in part.output if isinstance(step, Local))


def _neutral(node: Expr, variant: Variant) -> float:
    """0, unless that would leave nothing of products, of a score, of a branch or of the result: then 1."""
    parts = variant.parts()
    mixed = [weight for part in parts if part.mix for weight in part.mix.weights]
    factors = [weight for weight in mixed if simplify(weight.substitute({node: const(0.0)})) == const(0.0)]
    factors += [part.scale for part in parts if simplify(part.scale.substitute({node: const(0.0)})) == const(0.0)]
    scores = [s for s in (part.score for part in parts) if not simplify(s.substitute({node: const(0.0)})).mentions(score)]
    steps = [step for part in parts for step in part.output if isinstance(step, Expr)]
    steps = [step for step in steps if not simplify(step.substitute({node: const(0.0)})).mentions(x)]
    return 1.0 if any(e.mentions(node) for e in (*factors, *scores, *steps)) else 0.0


def _shared(name: str, first: Site, second: Site) -> str:
    layers = f"layer {second.layer}" if first.layer == second.layer else f"layers {first.layer} and {second.layer}"
    return (
        f'{first.name} and {second.name} ({layers}) would share the parameter "{name}", or need it in two shapes: give each a '
        f"rule of its own, whose words name other parameters, as `hedgehog(other_q, other_k)` does"
    )
