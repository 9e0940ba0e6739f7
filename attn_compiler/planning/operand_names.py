"""The slot `operands`: which tensors of a block a variant works on, besides q, k and v as they come."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from attn_compiler.algebra.context import Merge
from attn_compiler.algebra.expr import Expr, Sort, b, const, exp, h, layer, log, maximum, sigmoid, table
from attn_compiler.algebra.feature import component, x
from attn_compiler.algebra.made import Made, Taken, channel
from attn_compiler.algebra.variant import Variant
from attn_compiler.planning.entries import mapping, one_of
from attn_compiler.planning.plan import Refusal
from attn_compiler.planning.site import Site
from attn_compiler.planning.yaml_text import Entry

RECORDED = {
    "q": ("q", "q_unrotated"), "k": ("k", "k_unrotated"), "v": ("v",), "gate": ("x",), "metric": ("k", "x", "residual"),
}  # fmt: skip
METRIC = "metric"  # the table by which tokens are told to be alike
_NEAR_ONE = 4.0  # what gates start from: exp(-softplus(-4)) is 0.98
_SLOWLY = 16.0  # what GLA divides the log of a sigmoid by


def read_operands(entry: Entry) -> Mapping[str, str]:
    """Read `{q: q_unrotated, k: k_unrotated, gate: x}`; what is said of an operand that a site has anyway means nothing."""
    given = mapping(entry, tuple(RECORDED), "operand", "{q: q_unrotated, k: k_unrotated, gate: x}")
    chosen = {name: one_of(inner, RECORDED[name]) for name, inner in given.items()}
    return {name: one for name, one in chosen.items() if one not in (name, "k")}


def with_operands(variant: Variant, chosen: Mapping[str, str], site: Site) -> Variant | Refusal:
    """The variant that works on these tensors, where the graph proves which they are."""
    unrotated = tuple(name for name in ("q", "k") if name in chosen)
    if unrotated and not site.rotated:
        return Refusal("rule", f"nobody knows {' and '.join(unrotated)} before a rotary embedding at this site")
    measured = _measured(variant, chosen, site)
    if isinstance(measured, Refusal):
        return measured
    variant = measured
    if "gate" not in chosen:
        return replace(variant, unrotated=unrotated)
    if not site.input_width:
        return Refusal(
            "rule", "nobody knows the input of the block that this site's q, k and v are projected from, token by token"
        )
    if variant.gates is not None and variant.feature.width(site.head_dim) != site.head_dim:
        return Refusal(
            "rule", "its gates follow from the input of the block number by number of a head, and its features are more or fewer"
        )
    if site.q_len != site.k_len and not site.recalls:
        return Refusal(
            "rule",
            "its gates follow from the input of the block, and this cache keeps nothing of that: make one by `attn.cache` with "
            "this policy",
        )
    return replace(variant, unrotated=unrotated, made=(*variant.made, *_made(variant, site.tables)))


def _measured(variant: Variant, chosen: Mapping[str, str], site: Site) -> Variant | Refusal:
    """The variant that merges tokens by a tensor of the block, where it is asked for one."""
    source = chosen.get("metric")
    if source is None:
        return variant
    if not any(isinstance(one, Merge) and not one.metric for one in variant.context):
        return Refusal("rule", "it names a `metric`, and no `merge` asks for one")
    if not site.input_width or (source == "residual" and not site.normed):
        what = "what a norm made the input of the block of" if source == "residual" else "the input of the block"
        return Refusal("rule", f"nobody knows {what} that this site's q, k and v are projected from, token by token")
    context = tuple(replace(one, metric=METRIC) if isinstance(one, Merge) else one for one in variant.context)
    taken = Taken(METRIC, "residual" if source == "residual" else "x")
    return replace(variant, context=context, made=(*variant.made, taken))


def _made(variant: Variant, own: Mapping[str, object]) -> Iterator[Made]:
    """How each table that a variant reads token by token, besides the site's own, follows from the input of the block."""
    beta = _tables(variant.delta) if variant.delta is not None else {}
    for name in beta:
        yield Made(name, table(f"{name}_x", layer, h, channel, sort=Sort.REAL), sigmoid(x))
    for name in _tables(variant.score).keys() - own.keys():
        rate, bias = (table(f"{name}_{part}", layer, h, sort=Sort.REAL) for part in ("rate", "bias"))
        opened = -exp(rate) * _softplus(x + bias - _NEAR_ONE)
        yield Made(name, table(f"{name}_x", layer, h, channel, sort=Sort.REAL), opened, running=True)
    for name in _tables(variant.gates) if variant.gates is not None else ():
        bias = table(f"{name}_bias", layer, h, component, sort=Sort.REAL)
        opened = -_softplus(-(x + bias)) / _SLOWLY
        yield Made(name, table(f"{name}_x", layer, h, channel, component, sort=Sort.REAL), opened, running=True)
    for step in (one for one in variant.output if isinstance(one, Expr)):
        for name, node in _tables(step).items():
            if node.args[-1] == component:
                yield Made(name, table(f"{name}_x", layer, h, channel, component, sort=Sort.REAL))


def _tables(expression: Expr) -> dict[str, Expr]:
    """The tables that an expression reads row by row."""
    reads = (node for node in expression.walk() if node.op == "table" and b in node.args)
    return {str(node.value): node for node in reads}


def _softplus(z: Expr) -> Expr:
    return maximum(z, const(0.0)) + log(1.0 + exp(-abs(z)))
