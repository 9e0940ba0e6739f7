"""What attentions whose parts are linear, or see a window, hold of the past: the latest tokens, and states of all before them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from attn_compiler.algebra import expr as e
from attn_compiler.algebra import wire
from attn_compiler.algebra.bounds import Interval
from attn_compiler.algebra.expr import Expr
from attn_compiler.algebra.feature import Feature
from attn_compiler.algebra.output import expressions_of
from attn_compiler.algebra.simplify import conjuncts, simplify
from attn_compiler.algebra.variant import Variant, reads
from attn_compiler.planning.site import Site
from attn_compiler.targets import past
from attn_compiler.targets.held import asks_how_many, neighbors, of_heads, seen
from attn_compiler.targets.linear import linear
from attn_compiler.targets.operands import PLACE, Operands, head_groups
from attn_compiler.targets.past import continued, remembered
from attn_compiler.targets.traits import traits

Leaf = tuple[tuple[int, ...], Variant]  # some heads, and what they compute: without groups, without branches


def leaves(variant: Variant, heads: int) -> Iterator[Leaf]:
    """What the heads of a variant compute, branch by branch."""
    for members, of_group in head_groups(variant, heads):
        branches = (of_group,) if of_group.mix is None else (branch for _, branch in of_group.mix.branches)
        yield from ((members, branch) for branch in branches)


def objection(variant: Variant, heads: int) -> str | None:
    """Why the past of a variant cannot be its latest tokens and states; None if it can."""
    if asks_how_many(variant):
        return "it follows from how many tokens there are, and steps do not know how many there will be"
    for _, leaf in leaves(variant, heads):
        kept = None if linear(leaf) else seen(leaf, heads)
        reason = past.objection(leaf) if kept is None else _first_tokens(kept.first)
        if reason:
            return reason
    return None


def latest(variant: Variant, heads: int) -> int:
    """How many of the latest tokens a query has to find beside itself, where there is no objection."""
    beside = [neighbors(part) for part in of_heads(variant, heads)]
    return max(*beside, *(_latest(leaf, heads) for _, leaf in leaves(variant, heads)))


def is_state(variant: Variant) -> bool:
    """Whether a single state is all that an attention needs of its past, wherever in a text it stands."""
    if variant.groups or variant.mix is not None or variant.made or variant.unrotated or past.objection(variant) is not None:
        return False
    return bool(remembered_parts(variant, 1)) and latest(variant, 1) == 0


def _knows_no_places(variant: Variant) -> bool:
    """Whether tokens that join states one after the other need not know where they stand.

    What says who sees whom, and how that fades, may speak of distances, and what a call makes of tokens comes with them.
    """
    parts = variant.parts()
    if any(node.mentions(e.q, e.k) for node in reads(variant)):
        return False
    weights = () if variant.mix is None else variant.mix.weights
    plain = (*weights, *(node for part in parts for node in _beside_distances(part)))
    made = {one.name for part in parts for one in part.made}
    given = (node.transform(lambda x: e.const(0.0) if x.op == "table" and x.value in made else x) for node in plain)
    return not any(node.mentions(e.q, e.k, e.i, PLACE) for node in given)


def _beside_distances(part: Variant) -> tuple[Expr, ...]:
    """The expressions of a part that do not say how far tokens are apart."""
    found = linear(continued(part)) if part.mix is None else None
    results = (e for step in part.output for e in expressions_of(step))
    own = part.scale, *part.normalizer.expressions(), *part.feature.expressions(), *results
    if found is None:
        return own
    faded = () if found.fades is None else _steps(found.fades)
    return (*own, found.shown, *faded)


def _steps(fades: Expr) -> tuple[Expr, ...]:
    """What a running log is multiplied with for each token, or itself where it does not grow by the same at each."""
    slope, at = (*fades.args, None, None)[:2]
    return (slope,) if fades.op == "mul" and slope is not None and at is not None and at == e.real(e.k) else (fades,)


def remembered_parts(variant: Variant, heads: int) -> tuple[Leaf, ...]:
    """The parts whose states, beside the latest tokens, are all that later queries need; none where that is not enough."""
    parts = states(variant, heads) if _knows_no_places(variant) else ()
    return parts if parts and not objection(variant, heads) else ()


def states(variant: Variant, heads: int) -> tuple[Leaf, ...]:
    """The linear parts of a variant: each has a state of its own."""
    return tuple((members, leaf) for members, leaf in leaves(variant, heads) if linear(continued(leaf)))


def divided(past: tuple[Tensor, ...], variants: Sequence[Variant]) -> list[tuple[Tensor, ...]]:
    """The states of a call as those of its groups, or of its branches."""
    counts = [len(states(variant, 1)) if past else 0 for variant in variants]
    return [past[sum(counts[:n]) : sum(counts[: n + 1])] for n in range(len(counts))]


def joined(operands: Operands, variant: Variant, past: Sequence[Tensor], shown: Expr = e.true) -> tuple[Tensor, ...]:
    """The states after those tokens of a call that are `shown`, behind what `past` stands for; none: no tokens were before."""
    parts = states(variant, operands.heads)
    before = tuple(past) or (None,) * len(parts)
    return tuple(
        remembered(
            operands if len(members) == operands.heads else operands.take(members), replace(leaf, mask=leaf.mask & shown), state
        )
        for (members, leaf), state in zip(parts, before, strict=True)
    )


def summed(variant: Variant, site: Site) -> str:
    """A short text that says what states are sums of: two variants with the same one may read each other's.

    That is the side of the keys: what becomes of them, how they fade, whom no query sees. The mask of the site itself is left
    out, since padding never joins a state.
    """
    own = {*conjuncts(site.computes.mask)}
    numbers = {e.heads: site.heads, e.dim: site.head_dim, e.layer: site.layer, e.layers: site.layers}
    facts = {leaf: Interval(n, n) for leaf, n in numbers.items() if n is not None}
    said = hashlib.sha256(repr(traits(variant)).encode())
    for members, leaf in states(variant, site.heads):
        found = linear(continued(leaf))
        assert found is not None
        keys = Variant(
            mask=e.every(*(part for part in conjuncts(found.shown) if part not in own)),
            score=e.const(0.0) if found.fades is None else found.fades,
            feature=Feature("", (), leaf.feature.of_k),
            delta=leaf.delta,
            context=leaf.context,
            unrotated=tuple(name for name in leaf.unrotated if name == "k"),
        ).map(lambda x: simplify(x, facts))
        said.update(f"{members} {wire.write(keys)}".encode())
    return said.hexdigest()[:16]


def unremembered(site: Site, variant: Variant) -> str | None:
    """Why states and the latest tokens do not serve a variant at a site of which no more is left; None if they do."""
    count, lacks = len(states(variant, site.heads)), objection(variant, site.heads)
    needed, asked = f"{count} states" if not lacks else "every token", tuple(one.name for one in traits(variant))
    if not lacks and site.kept:
        near = latest(variant, site.heads)
        if count == site.recalls and near <= site.kept.latest and asked == site.traits:
            if summed(variant, site) == site.summed:
                return None
            needed = "states of other sums"
        else:
            needed += f" and the latest {near} tokens{_with(asked)}"
    held = f"{site.recalls} states and {site.kept}{_with(site.traits)}"
    return f"this model's cache holds {held}, and this needs {needed}: make both with one policy"


def _with(asked: Sequence[str]) -> str:
    return f" with {', '.join(asked)}" if asked else ""


def _latest(leaf: Variant, heads: int) -> int:
    found = linear(leaf)
    if found:
        return max(0, (found.behind or 0) - 1)
    kept = seen(leaf, heads)
    assert kept is not None
    return kept.latest


def _first_tokens(first: int) -> str | None:
    return f"its queries see the first {first} tokens for ever, and only the latest are held beside states" if first else None
