"""Works out what a site computes: its score program, masks and biases as a variant over `b h i k` and run-time tables."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import fx

from attn_compiler import torch_private as private
from attn_compiler.algebra.bounds import Box, Interval
from attn_compiler.algebra.expr import (
    Expr,
    Sort,
    acc,
    b,
    const,
    exp,
    h,
    i,
    k,
    k_len,
    mass,
    peak,
    q_len,
    score,
    table,
    true,
    where,
)
from attn_compiler.algebra.simplify import implied, simplify
from attn_compiler.algebra.variant import SOFTMAX, EmptyRows, Normalizer, Variant
from attn_compiler.errors import AlgebraError, CaptureError
from attn_compiler.graph.atom import product
from attn_compiler.graph.calls import Call, Size, is_tensor
from attn_compiler.graph.fills import Fill, Split, assume, empty_rows, never_empty, split
from attn_compiler.graph.flex import flex_mask, flex_score
from attn_compiler.graph.record import SCORE, GraphSite, Operand, Step, StepArgument
from attn_compiler.graph.symbolic import SymbolicReader, Table
from attn_compiler.graph.symbolic_pointwise import POINTWISE
from attn_compiler.graph.symbolic_reading import Index, OpaqueError, Reading, as_bool, combine
from attn_compiler.planning.plan import Refusal


@dataclass(frozen=True)
class Recovered:
    """What a site computes, and what its tables are."""

    variant: Variant
    tables: Mapping[str, Table]
    facts: Box
    notes: tuple[str, ...] = ()
    literal: Variant | None = None  # where there are notes: the same with nothing taken out of its scores


class _CannotError(Exception):
    """Why a site has no variant. Becomes a refusal."""


def recover(gm: fx.GraphModule, site: GraphSite, reader: SymbolicReader) -> Recovered | Refusal:
    """The variant of `site`, exact, or why there is none."""
    try:
        return _Recovery(gm, site, reader).run()
    except _CannotError as reason:
        return Refusal("recover", str(reason))


class _Recovery:
    def __init__(self, gm: fx.GraphModule, site: GraphSite, reader: SymbolicReader) -> None:
        self._gm, self._site, self.reader = gm, site, reader
        queries, keys = site.lengths
        sizes = {b: product(site.batch), h: product(site.heads), i: queries, k: keys}
        self.facts: Box = {at: Interval(0, size - 1 if isinstance(size, int) else math.inf) for at, size in sizes.items()}
        self.facts |= {below: Interval(1, math.inf) for below in self._below(sizes)}
        self._notes: list[str] = []

    def _below(self, sizes: Mapping[Expr, Size]) -> Iterator[Expr]:
        """How far each coordinate stays below a size that is only known when running; never less than 1."""
        for at, size in sizes.items():
            if not isinstance(size, int):
                try:
                    yield simplify(self.reader.number(size) - at)
                except OpaqueError:
                    continue

    def run(self) -> Recovered:
        site = self._site
        scale, value, sink = self._program()
        if site.idiom == "flex":
            value = self._flex()
        found = split(simplify_real(value, self.facts), self.facts)
        if site.causal:
            found = replace(found, keep=simplify(found.keep & (k <= i), self.facts), fills=(*found.fills, _CAUSAL))
        rows = self._rows(found)
        if found.value.mentions(score) is False:
            raise _CannotError("the scores do not enter the softmax")
        variant = Variant(
            mask=found.keep,
            empty_rows=rows,
            scale=scale,
            score=found.value,
            normalizer=SOFTMAX if sink is None else with_sink(sink),
            dropout=site.dropout,
        )
        variant = self._after(variant).map(self._lengths())
        literal = self._literal(variant, value).map(self._lengths()) if self._notes else None
        tables = {name: self.reader.tables[name] for name in sorted(variant.tables() | (literal or variant).tables())}
        return Recovered(variant, tables, self.facts, tuple(self._notes), literal)

    def _literal(self, variant: Variant, value: Expr) -> Variant:
        """What rows get that see no key is then left to the same arithmetic as in the model."""
        mask = simplify(k <= i, self.facts) if self._site.causal else true
        return replace(variant, mask=mask, score=value, empty_rows=EmptyRows.ZERO)

    def _program(self) -> tuple[Expr, Expr, Expr | None]:
        """The scale, the score made of it, and the logit of a sink."""
        scale, value, sink = const(1.0), score, None
        for step in self._site.steps:
            if step.op == "cast":
                continue
            if step.op == "cat":
                sink = self._sink(step, value)
                continue
            if sink is not None:
                raise _CannotError(f"a sink's logit goes through `{step.op}` ({step.node})")
            factor = self._factor(step)
            terms = None if factor is None else _sum_with_score(value)
            if factor is not None and terms is not None:
                scale = combine("mul", scale, factor)
                value = score if terms == const(0.0) else score + combine("mul", terms, factor)
            else:
                value = self._applied(step, value)
        return scale, value, sink

    def _flex(self) -> Expr:
        try:
            made = flex_score(self._gm, self._site.anchor, self.reader, self.facts)
            shown = flex_mask(self._gm, self._site.anchor, self.reader, self.facts)
        except (OpaqueError, CaptureError) as failure:
            raise _CannotError(f"a function of `{self._site.anchor}` has no formula") from failure
        return made if shown == true else where(shown, made, -math.inf)

    def _factor(self, step: Step) -> Expr | None:
        """What a step multiplies all scores by."""
        if step.op not in ("mul", "div") or step.arguments.get("rounding_mode") is not None:
            return None
        by = step.arguments["other"] if step.arguments["self"] is SCORE else step.arguments["self"]
        if isinstance(by, Operand) or by is SCORE or (step.op == "div" and step.arguments["self"] is not SCORE):
            return None
        number = self.value(by, step)
        if number.sort is Sort.INDEX:
            number = const(float(number.value)) if number.is_const else number  # type: ignore[arg-type]
        return number if step.op == "mul" else combine("div", 1.0, number)

    def _applied(self, step: Step, value: Expr) -> Expr:
        rule = POINTWISE.get(step.op)
        if rule is None:
            raise _CannotError(f"`{step.op}` has no formula ({step.node})")
        try:
            return rule(_StepReading(self, step, value))
        except (OpaqueError, AlgebraError, KeyError) as failure:
            raise _CannotError(f"`{step.op}` has no formula here ({step.node})") from failure

    def _sink(self, step: Step, value: Expr) -> Expr:
        tensors = step.arguments["tensors"]
        if self._site.extra != 1 or not isinstance(tensors, tuple) or len(tensors) != 2:
            raise _CannotError(f"more than one column stands beside the keys ({step.node})")
        (operand,) = (x for x in tensors if isinstance(x, Operand))
        sink = self.operand(operand, step)
        if sink.mentions(k):
            raise _CannotError(f"the column beside the keys depends on them ({step.node})")
        return sink

    def _after(self, variant: Variant) -> Variant:
        """Steps behind the softmax: only such that change nothing, or only what empty rows get."""
        for step in self._site.after:
            if step.op in ("cast", "dropout"):
                continue
            weights = simplify_real(self._applied(step, score), self.facts)
            zeroed = _zeroing(weights)
            if zeroed is None or not implied(variant.mask, zeroed, self.facts):
                raise _CannotError(f"`{step.op}` changes the weights behind the softmax ({step.node})")
            if simplify(zeroed, self.facts) == variant.mask:
                variant = replace(variant, empty_rows=EmptyRows.ZERO)
            elif not never_empty(variant.mask, self.facts):
                raise _CannotError(f"`{step.op}` changes what rows get that see no key ({step.node})")
        return variant

    def _rows(self, found: Split) -> EmptyRows:
        rows = empty_rows(found, self.facts)
        if rows is None and all(fill.rows in (EmptyRows.MEAN, EmptyRows.ZERO) for fill in found.fills):
            self._notes.append(_SEVERAL)
            return EmptyRows.MEAN
        if rows is None:
            raise _CannotError("keys are hidden in several ways, and what a row gets that sees none of them is no one thing")
        if rows is EmptyRows.ZERO and not self._site.empty_rows_are_zero and not never_empty(found.keep, self.facts):
            return EmptyRows.NAN
        if (
            rows is EmptyRows.MEAN
            and self._site.q.node in self.reader.recorded
            and not all(fill.replaces for fill in found.fills)
        ):
            self._notes.append(_GRADIENT)
        return rows

    def value(self, x: StepArgument, step: Step) -> Expr:
        """A step's argument over `b h i k`."""
        if isinstance(x, Operand):
            return self.operand(x, step)
        if isinstance(x, fx.Node):
            return self._read(x, (), step) if is_tensor(x) and not x.meta["val"].shape else self._number(x, step)
        if isinstance(x, bool | int | float):
            return const(x)
        raise _CannotError(f"{x!r} is no number ({step.node})")

    def _number(self, x: fx.Node, step: Step) -> Expr:
        if is_tensor(x):
            return self._read(x, (const(0),) * len(x.meta["val"].shape), step)
        return self.reader.number(x)

    def operand(self, x: Operand, step: Step) -> Expr:
        """A tensor beside the scores, at the place that `b h i k` name."""
        index = [self._site.at(axis) for axis in x.axes]
        if any(at is None for at in index):
            raise _CannotError(f"a symbolic size hides where {x.node} is read")
        return self._read(x.node, tuple(simplify(at, self.facts) for at in index if at is not None), step)

    def _read(self, node: fx.Node, index: Index, step: Step) -> Expr:
        seen = self.reader.versions.read(node, step.node)
        if seen is None:
            return self.reader.table(node, index, by=step.node)
        return self.reader.at(seen, index, self.facts)

    def _lengths(self) -> _Renamed:
        found: dict[Expr, Expr] = {}
        queries, keys = self._site.lengths
        for size, length in ((queries, q_len), (keys, k_len), (keys - queries, k_len - q_len)):  # the last one: of a cache
            name = _name(size)
            if name is not None:
                found.setdefault(table(name), length)
        return _Renamed(found)


@dataclass(frozen=True)
class _Renamed:
    lengths: Mapping[Expr, Expr]

    def __call__(self, e: Expr) -> Expr:
        return e.substitute(self.lengths) if self.lengths else e


def _name(size: Size) -> str | None:
    return None if isinstance(size, int) or not private.formula(size).is_Symbol else str(size)


_CAUSAL = Fill(-math.inf, replaces=True)
_SEVERAL = (
    "rows that see no key get the mean of v here; the model hides keys in several ways and gives what rounding makes of that"
)
_GRADIENT = "rows that see no key get the mean of v; here no gradient reaches their queries, which in the model one does"


class _StepReading(Reading):
    """A step of the score program, as the rules of pointwise operations see it."""

    def __init__(self, recovery: _Recovery, step: Step, value: Expr) -> None:
        super().__init__(recovery.reader.view(recovery.facts), step.node, Call(step.op, step.arguments), ())
        object.__setattr__(self, "_recovery", (recovery, step, value))

    @property
    def dtype(self) -> torch.dtype:
        return torch.float64  # roundings on the way are the model's precision, not its meaning

    def operand(self, argument: StepArgument) -> Expr:
        recovery: _Recovery = self._recovery[0]  # type: ignore[attr-defined]
        step: Step = self._recovery[1]  # type: ignore[attr-defined]
        value: Expr = self._recovery[2]  # type: ignore[attr-defined]
        return value if argument is SCORE else recovery.value(argument, step)


def _sum_with_score(value: Expr) -> Expr | None:
    """What is added to a bare score, if nothing else happened to it."""
    if value == score:
        return const(0.0)
    if value.op == "add" and value.args[0] == score and not value.args[1].mentions(score):
        return value.args[1]
    return None


def _zeroing(weights: Expr) -> Expr | None:
    """The condition without which a weight becomes zero, if that is all that happens to it."""
    for choice in (x for x in weights.walk() if x.op == "where" and x.sort is not Sort.BOOL):
        for condition, truth in ((choice.args[0], True), (~choice.args[0], False)):
            kept, gone = assume(weights, choice.args[0], truth), assume(weights, choice.args[0], not truth)
            if kept == score and gone.is_const and gone.value == 0:
                return as_bool(condition)
    return None


def simplify_real(e: Expr, facts: Box) -> Expr:
    """Canonical conditions; sums and products stay as the model wrote them."""
    done: dict[Expr, Expr] = {}

    def change(node: Expr) -> Expr:
        if node.sort is not Sort.BOOL:
            if node.op == "where" and node.args[0].is_const:
                return node.args[1] if node.args[0].value else node.args[2]
            return node
        if node not in done:
            done[node] = simplify(node, facts)
        return done[node]

    return e.transform(change)


def with_sink(logit: Expr) -> Normalizer:
    """Softmax with one more score that has no value."""
    return Normalizer("softmax", weight=exp(score - peak), output=acc / (mass + exp(logit - peak)))
