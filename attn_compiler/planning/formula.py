"""What an attention computes, as mathematics for people: a formula, and below it what its parts are, each by its name."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from attn_compiler.algebra.bounds import Box
from attn_compiler.algebra.expr import (
    Expr,
    Sort,
    acc,
    const,
    dim,
    i,
    mass,
    q,
    rebuild,
    score,
    seen,
    symbol,
    table,
    values,
    where,
)  # fmt: skip
from attn_compiler.algebra.feature import Block, Feature, norm, x
from attn_compiler.algebra.made import Made, Taken
from attn_compiler.algebra.notation import notation
from attn_compiler.algebra.output import Step, mean_square
from attn_compiler.algebra.variant import EmptyRows, Mix, Variant
from attn_compiler.planning.classify import Named, classify, label
from attn_compiler.planning.planner import facts_of
from attn_compiler.planning.site import Site

SHORT = 48  # what is no longer stands in the formula itself
DOT = symbol("q·k", Sort.REAL)
_SAID = {acc: "Σ w·v", mass: "Σ w", seen: "n", values: "Σ v"}
_GATHERED = {leaf: symbol(said, Sort.REAL) for leaf, said in _SAID.items()}
_EMPTY_ROWS = {
    EmptyRows.MEAN: "the mean of v",
    EmptyRows.UNMASKED: "attention without the mask",
    EmptyRows.NAN: "NaN",
}
_HELD = {"qk": "q and k", "pv": "weights and v", "kv_cache": "the cache"}


@dataclass(frozen=True)
class Part:
    """A condition or a term, and what it is called."""

    name: str
    says: str


@dataclass(frozen=True)
class Formula:
    """`heads` are those it holds for, where not for all."""

    says: str
    parts: tuple[Part, ...]
    heads: str = ""

    def __str__(self) -> str:
        """All of it in one line."""
        parts = ", ".join(f"{part.name}: {part.says}" for part in self.parts)
        where = f" where {parts}" if parts else ""
        return (f"heads {self.heads}: " if self.heads else "") + self.says + where


def formulas(variant: Variant, site: Site) -> tuple[Formula, ...]:
    """One formula, or one for each group of heads."""
    if variant.groups:
        return tuple(_formula(group, site, str(heads)) for heads, group in variant.groups)
    return (_formula(variant, site),)


def whole(found: Sequence[Formula]) -> str:
    """Formulas as one text."""
    return "; ".join(map(str, found))


def _formula(variant: Variant, site: Site, heads: str = "") -> Formula:
    if variant.mix is not None:
        return _mixed(variant.mix, variant.output, site, heads)
    speaking = _Speaking(site)
    named = speaking.named(variant)
    long = {one.part: symbol(one.name, Sort.REAL) for one in named if one.part.sort is Sort.REAL}
    product = _scaled(variant.scale, site).substitute({DOT: _product(variant.feature)})
    scaled = speaking.by_index(variant.score).substitute(long).substitute({score: product})
    says = f"{_normalized(variant, speaking)}( {speaking.says(scaled)} )"
    says += f", dropout {variant.dropout:g}" if variant.dropout else ""
    parts = [*speaking.parts(named), *_maps(variant.feature)]
    if variant.delta is not None:
        parts.append(Part("delta rule", f"β = {speaking.says(speaking.by_index(variant.delta))}"))
    if variant.gates is not None:
        parts.append(Part("gates", f"each feature · exp(its {speaking.says(speaking.by_index(variant.gates))} at q − at k)"))
    parts += [Part("keys", str(one)) for one in variant.context]
    if variant.unrotated:
        parts.append(Part(" and ".join(variant.unrotated), "as they are before the rotary embedding"))
    parts += [Part(one.name, _made(one, speaking)) for one in variant.made]
    parts += _results(variant.output, speaking)
    if variant.empty_rows in _EMPTY_ROWS:
        parts.append(Part("no key seen", _EMPTY_ROWS[variant.empty_rows]))
    parts += [Part(_HELD[operand], f"held in {how}") for operand, how in variant.storage.held()]
    if variant.order is not None:
        parts.append(Part("blocks of tokens", f"cut in order of {speaking.says(speaking.by_index(variant.order))}"))
    return Formula(says, tuple(parts), heads)


def _mixed(mix: Mix, output: Sequence[Step], site: Site, heads: str) -> Formula:
    """The branches by their names, and below it what each of them is."""
    speaking = _Speaking(site)
    weighed = (_times(symbol(name, Sort.REAL), weight) for (name, _), weight in zip(mix.branches, mix.weights, strict=True))
    inner = [(name, _formula(branch, site)) for name, branch in mix.branches]
    parts = [
        part for name, one in inner for part in (Part(name, one.says), *(Part(f"{name}, {p.name}", p.says) for p in one.parts))
    ]
    parts += _results(output, speaking)
    return Formula(f"{mix.how.value}( {', '.join(map(speaking.says, weighed))} )", tuple(parts), heads)


def _made(one: Made | Taken, speaking: _Speaking) -> str:
    """What a table is of which the block's input, x, says every token."""
    if isinstance(one, Taken):
        return "x, the input of the block" if one.source == "x" else "what x, the input of the block, is a norm of"
    product = symbol(f"x·{next(iter(one.weights.tables()))}", Sort.REAL)
    said = speaking.says(speaking.by_index(one.each.substitute({x: product})))
    return f"{said}, summed up over the tokens" if one.running else said


def _results(steps: Sequence[Step], speaking: _Speaking) -> list[Part]:
    """What becomes of a head's result, o, before it is the output."""
    said = {x: symbol("o", Sort.REAL), mean_square: symbol("mean(o²)", Sort.REAL)}
    return [
        Part("result", speaking.says(speaking.by_index(step.substitute(said))) if isinstance(step, Expr) else f"o + {step}")
        for step in steps
    ]


def _times(value: Expr, weight: Expr) -> Expr:
    return value if weight == const(1.0) else weight * value


def _normalized(variant: Variant, speaking: _Speaking) -> str:
    """The normalizer; linear ones are told apart by what becomes of the sum."""
    normalizer = variant.normalizer
    return (
        f"{normalizer.name}[ {speaking.says(normalizer.output.substitute(_GATHERED))} ]"
        if normalizer.weight == score
        else normalizer.name
    )


def _product(map_: Feature) -> Expr:
    if map_.is_identity:
        return DOT
    return symbol("φ(q)·φ(k)" if map_.of_q == map_.of_k else "φ(q)·ψ(k)", Sort.REAL)


def _maps(map_: Feature) -> Iterator[Part]:
    """What the features of queries are, and those of keys where they are others."""
    if not map_.is_identity:
        yield Part("φ(x)", _blocks(map_.of_q))
        if map_.of_q != map_.of_k:
            yield Part("ψ(x)", _blocks(map_.of_k))


def _blocks(blocks: Sequence[Block]) -> str:
    """Feature maps beside each other, in brackets."""

    def says(block: Block) -> str:
        vector = x if block.weights is None else symbol(f"x·{block.weights.value}", Sort.REAL)
        vector = symbol("⊗".join([str(vector.value)] * block.power), Sort.REAL)
        each = notation(block.each.substitute({x: vector, norm: symbol("‖x‖", Sort.REAL)}))
        return f"softmax({each})" if block.softmax else each

    return f"[{', '.join(map(says, blocks))}]" if len(blocks) > 1 else says(blocks[0])


def _scaled(scale: Expr, site: Site) -> Expr:
    """q·k, scaled: by the root of the width, if that is what the number is."""
    usual = scale == Variant().scale or (
        isinstance(scale.value, int | float) and math.isclose(scale.value, site.head_dim**-0.5, rel_tol=1e-12)
    )
    if usual:
        return DOT / symbol(f"√{site.head_dim}", Sort.REAL)
    return DOT if scale == const(1.0) else DOT * scale.substitute({dim: const(site.head_dim)})


@dataclass(frozen=True)
class _Speaking:
    """Names and texts at one site."""

    site: Site

    @property
    def shifted(self) -> bool:
        """Whether a query's position is something else than its index."""
        return self.site.frame is not None and self.site.frame.position != i

    def named(self, variant: Variant) -> list[Named]:
        """The long terms of its score, then the conditions of its mask; equal names are numbered."""
        found = classify(self.by_index(variant.mask), self.by_index(variant.score), self._facts())
        terms = [one for one in found if one.part.sort is Sort.REAL and self._is_long(one.part)]
        shown = terms + [one for one in found if one.part.sort is Sort.BOOL and one.part.value is not True]
        times = Counter(one.name for one in shown)
        numbers = {name: iter(range(1, count + 1)) for name, count in times.items() if count > 1}
        return [Named(f"{one.name} {next(numbers[one.name])}" if one.name in numbers else one.name, one.part) for one in shown]

    def _is_long(self, term: Expr) -> bool:
        return len(self.says(term)) > SHORT and not term.mentions(score)

    def says(self, e: Expr) -> str:
        """An expression in the words of the model: positions, and tables as the model calls them."""
        spoken = e.substitute({i: q}) if not self.shifted else e
        return notation(_pruned(_indexed(spoken).transform(self._titled)))

    def parts(self, named: Iterable[Named]) -> Iterator[Part]:
        """Each part, and below it the long label that two tokens have to share."""
        for one in named:
            labels = {e: found for e in one.part.walk() if (found := label(e)) is not None and len(self.says(found)) > SHORT // 2}
            shared = dict.fromkeys(labels, symbol("label(q) = label(k)", Sort.BOOL))
            yield Part(one.name, self.says(one.part.substitute(shared)))
            yield from (Part("label(k)", self.says(found)) for found in dict.fromkeys(labels.values()))

    def by_index(self, e: Expr) -> Expr:
        """What is recognized speaks of `i`."""
        return e.substitute({q: i}) if not self.shifted or not e.mentions(i) else e

    def _facts(self) -> Box:
        facts = facts_of(self.site)
        return {leaf: known for leaf, known in facts.items() if not (self.shifted and leaf in (i, q))}

    def _titled(self, e: Expr) -> Expr:
        titles = _titles(tuple((name, table.title) for name, table in self.site.tables.items()))
        return table(titles[str(e.value)], *e.args, sort=e.sort) if e.op == "table" and e.value in titles else e


@lru_cache(maxsize=256)
def _titles(tables: tuple[tuple[str, str], ...]) -> Mapping[str, str]:
    """What to call each table: what the model calls it, unless two would be called the same."""
    times = Counter(title for _, title in tables)
    return {name: title for name, title in tables if title and times[title] == 1}


def _indexed(e: Expr) -> Expr:
    """The same, where an index below zero counts from the end: `x if 0 ≤ x else x + n` is `x`."""

    def plain(index: Expr) -> Expr:
        if index.op != "where" or index.args[0].op != "le" or index.args[0].args != (const(0), index.args[1]):
            return index
        return index.args[1]

    return e.transform(lambda node: rebuild(node, tuple(map(plain, node.args))) if node.op == "table" else node)


def _pruned(e: Expr) -> Expr:
    """The same without what is asked a second time: `x if c else (y if c else z)` is `x if c else z`."""

    def once(node: Expr) -> Expr:
        if node.op == "where" and node.args[2].op == "where" and node.args[2].args[0] == node.args[0]:
            return where(node.args[0], node.args[1], node.args[2].args[2])
        return node

    return e.transform(once)
