"""`attn.calibrate`: what a policy costs each attention of a model, measured on inputs, and which heads can bear which storage."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from attn_compiler import library
from attn_compiler.algebra.storage import PLAIN, Held, Scaling
from attn_compiler.algebra.variant import Variant
from attn_compiler.errors import PolicyError, ShapeError
from attn_compiler.graph.analysis import Analysis, analyze, carry_out
from attn_compiler.graph.beside import beside
from attn_compiler.graph.weights import fingerprints
from attn_compiler.planning.measured import Cost, Measured, SiteCost
from attn_compiler.planning.plan import Decision, NearMiss, Plan, Refusal
from attn_compiler.planning.planner import Carried, plan
from attn_compiler.planning.policy import Policy
from attn_compiler.planning.resolve import Asked, asked_of
from attn_compiler.planning.site import Site
from attn_compiler.runtime.targets import TARGETS, Target
from attn_compiler.targets.operands import Operands
from attn_compiler.targets.torch_target import Result, attend_torch, refuse
from attn_compiler.whole_file import whole_file

Inputs = Sequence[Mapping[str, Any] | Sequence[Any]]
_library = torch.library.Library("attn_compiler", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("note(Tensor out, Tensor[] operands, int attention, bool exact) -> Tensor")  # type: ignore[no-untyped-call]
_library.define("compare(Tensor exact, Tensor found, int attention, str site, int kv_heads) -> ()")  # type: ignore[no-untyped-call]


@dataclass
class _Totals:
    """Sums over all that was measured of something, row by row: one for each head of an attention."""

    products: Tensor | float = 0.0
    exact: Tensor | float = 0.0
    found: Tensor | float = 0.0
    difference: Tensor | float = 0.0
    largest: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, exact: Tensor, found: Tensor) -> None:
        """Add [batch, rows, …]."""
        a, b = exact.double().transpose(0, 1).flatten(1), found.double().transpose(0, 1).flatten(1)
        self.products = self.products + (a * b).sum(-1)
        self.exact, self.found = self.exact + a.square().sum(-1), self.found + b.square().sum(-1)
        self.difference = self.difference + (a - b).square().sum(-1)
        self.largest = torch.maximum(self.largest.to(a), (a - b).abs().amax(-1))

    def whole(self) -> Cost:
        """The cost of all rows together."""
        products, exact, found, difference = (float(torch.as_tensor(x).sum()) for x in self._sums())
        return _cost(products, exact, found, difference, float(self.largest.max()))

    def rows(self) -> tuple[Cost, ...]:
        """The cost of each."""
        sums = (torch.as_tensor(x).tolist() for x in (*self._sums(), self.largest))
        return tuple(_cost(*row) for row in zip(*sums, strict=True))

    def _sums(self) -> tuple[Tensor | float, ...]:
        return self.products, self.exact, self.found, self.difference


def _cost(products: float, exact: float, found: float, difference: float, largest: float) -> Cost:
    same = 1.0 if exact == found == 0 else 0.0
    cosine = products / (exact * found) ** 0.5 if exact * found > 0 else same
    relative = (difference / exact) ** 0.5 if exact > 0 else (0.0 if difference == 0 else float("inf"))
    return Cost(relative, cosine, largest)


@dataclass
class _Measuring:
    """What was found of one attention: of its heads, and of its result behind the projections that a policy rounds."""

    kv_heads: int
    heads: _Totals = field(default_factory=_Totals)
    result: _Totals = field(default_factory=_Totals)
    operands: Sequence[float] = (0.0, 0.0, 0.0)  # the largest magnitude of q, k and v

    def cost(self) -> SiteCost:
        return SiteCost(self.result.whole(), self.heads.rows(), self.kv_heads, tuple(self.operands))


_NUMBERS = count()
_MEASURING: dict[str, _Measuring] = {}  # while a model runs
_NOTED: dict[int, dict[bool, tuple[Tensor, Sequence[Tensor]]]] = defaultdict(dict)  # of attentions whose results are to come


def _note(out: Tensor, operands: Sequence[Tensor], attention: int, exact: bool) -> Tensor:
    _NOTED[attention][exact] = out, operands
    return out.clone()


def _compare(exact: Tensor, found: Tensor, attention: int, site: str, kv_heads: int) -> None:
    measuring = _MEASURING.setdefault(site, _Measuring(kv_heads))
    measuring.result.add(exact[None, None], found[None, None])
    noted = _NOTED.pop(attention, None)
    if noted:  # not behind the second of several projections
        (of_heads, operands), (rounded, _) = noted[True], noted[False]
        measuring.heads.add(of_heads, rounded)
        measuring.operands = [max(a, float(x.abs().amax())) for a, x in zip(measuring.operands, operands, strict=True)]


_library.impl("note", _note, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
_library.impl("compare", _compare, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("attn_compiler::note", lambda out, *_: torch.empty_like(out), lib=_library)
torch.library.register_fake("attn_compiler::compare", lambda *_: None, lib=_library)
torch.fx.node.has_side_effect(torch.ops.attn_compiler.compare.default)


@dataclass(frozen=True)
class _Noting:
    """A target that computes as the torch target does, and keeps what it computed of an attention, exactly or as decided."""

    attention: int = -1
    exact: bool = True
    name: str = "comparison"

    def refuse(self, operands: Operands, variant: Variant, *, lse: bool = False) -> str | None:
        return refuse(variant, lse=lse)

    def carry(self, site: Site, variant: Variant) -> Carried | Refusal:
        reason = refuse(variant)
        return Refusal(self.name, reason) if reason else Carried("both, compared", gains=False)

    def attend(self, operands: Operands, variant: Variant, *, lse: bool = False) -> Result:
        out, _ = attend_torch(operands, variant)
        return torch.ops.attn_compiler.note(out, [operands.q, operands.k, operands.v], self.attention, self.exact), None


def calibrate(
    model: nn.Module,
    policy: str | Path | Mapping[str, object] | Policy,
    inputs: Inputs,
    *,
    tables: Mapping[str, Tensor] | None = None,
    values: Mapping[str, int] | None = None,
) -> Policy:
    """Run a model on inputs, as it is and as a policy makes it, and return the policy with what it costs.

    Each attention is compared on what the model as it is gives it; the model's result, with all of the policy at work. A rule
    with a `tolerance` is carried out only where the costs were measured and keep it. Of `inputs`, each holds the arguments of
    one call: a mapping of named ones, or a list.
    """
    read = library.load_policy(policy).without_measurements()
    calls = [_arguments(one) for one in inputs]
    if not calls:
        raise ShapeError("calibration needs at least one input: the arguments of a call of the model")
    if model.training:
        raise ShapeError("the model is in training mode; call `model.eval()` before it is calibrated")
    asked = read.with_values(dict(values or {}))
    asked = replace(asked, rules=tuple(replace(rule, tolerance={}) for rule in asked.rules))  # what it costs is the question
    with torch.no_grad():
        plain = [_result(model(*args, **kwargs)) for args, kwargs in calls]
        _MEASURING.clear()
        _run(model, calls, _backend(asked, dict(tables or {}), _both))
        sites = {site: measuring.cost() for site, measuring in _MEASURING.items()}
        found = _run(model, calls, _backend(asked, dict(tables or {}), _decided))
    whole = _Totals()
    for exact, result in zip(plain, found, strict=True):
        whole.add(exact.reshape(1, 1, -1), result.reshape(1, 1, -1))
    weights = dict(sorted(fingerprints(model.named_parameters(remove_duplicate=False))))
    divergence = sum(map(_divergence, plain, found)) / len(plain)
    return read.with_measurements(Measured(read.digest, sites, whole.whole(), divergence, weights))


def choose(model: nn.Module, candidates: Mapping[str, Mapping[str, object]], inputs: Inputs, within: float) -> dict[str, object]:
    """A policy that gives each head the first of several variants whose error stays `within`; heads that bear none are exact.

    `candidates` are slots by name, the cheapest first. Heads that share their keys get the same one, and all heads of an
    attention where any candidate rounds projections, which serve all of them.
    """
    of_site: dict[str, dict[str, SiteCost]] = defaultdict(dict)
    for name, slots in candidates.items():
        measured = calibrate(model, {"version": 1, "rules": [{"match": {}, "attn": dict(slots)}]}, inputs).measured
        assert measured is not None
        for site, cost in measured.sites.items():
            of_site[site][name] = cost
    stored = [slots.get("storage") for slots in candidates.values()]
    together = any(isinstance(storage, Mapping) and "projections" in storage for storage in stored)
    rules = [_rule(site, costs, within, together) for site, costs in of_site.items()]
    said = f"Each head has the cheapest of {', '.join(candidates)} whose error was within {within:g}."
    return {"version": 1, "because": said, "variants": {k: dict(v) for k, v in candidates.items()}, "rules": rules}


def fix_scales(model: nn.Module, policy: Mapping[str, Any], inputs: Inputs) -> dict[str, Any]:
    """The policy, in front of whose rules others fix scales: in each attention, for the largest numbers that inputs bring there.

    What has no scales, or keeps means or channels apart, stays as it is.
    """
    read, found = library.load_policy(policy), list[Site]()
    measured = calibrate(model, read, inputs).measured
    assert measured is not None

    def remember(sites: Sequence[Site], near_misses: Sequence[NearMiss]) -> Plan:
        found.extend(sites)
        return plan(sites, library.load_policy("exact"), (), near_misses)

    def look(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        analyze(gm, example_inputs, remember)
        return gm.forward

    with torch.no_grad():
        _run(model, [_arguments(inputs[0])], look)
    asked = {site.name: asked_of(read, site) for site in found if site.name in measured.sites}
    rules = [_fixed(policy, site, one, measured.sites[site].operands) for site, one in asked.items() if _has_scales(one)]
    return {**policy, "rules": [*rules, *policy["rules"]]}


def _has_scales(asked: Asked) -> bool:
    storage = asked.variant.projected(None).storage if isinstance(asked.variant, Variant) else PLAIN
    return any(_is_fixable(how) for _, how in storage.held())


def _is_fixable(how: Held) -> bool:
    return how.numbers.scaling is Scaling.REAL and not how.smooth and math.isinf(how.outliers)


def _fixed(policy: Mapping[str, Any], site: str, asked: Asked, operands: Sequence[float]) -> dict[str, Any]:
    """The rule that decides a site, for this one alone, with what its operands reached."""
    rule = policy["rules"][asked.rules[0] - 1]
    slots = rule.get("attn")
    if len(asked.rules) > 1 or not isinstance(slots, Mapping) or not isinstance(slots.get("storage"), Mapping):
        raise PolicyError(f"{site}: to fix its scales, its `storage` has to stand in one rule, under `attn`")
    assert isinstance(asked.variant, Variant)
    q, k, v = operands
    largest = {"qk": [q, k], "kv_cache": [k, v], "pv": [v]}
    held = {
        operand: {"type": how.numbers.name, "largest": largest[operand]}
        for operand, how in asked.variant.storage.held()
        if operand in largest and _is_fixable(how)
    }
    return {**rule, "match": {"module": site}, "attn": {**slots, "storage": {**slots["storage"], **held}}}


def _rule(site: str, costs: Mapping[str, SiteCost], within: float, together: bool) -> dict[str, object]:
    some = next(iter(costs.values()))
    sharing = len(some.heads) if together else len(some.heads) // some.kv_heads
    groups: dict[str, list[str]] = defaultdict(list)
    for first in range(0, len(some.heads), sharing):
        mine = range(first, first + sharing)
        chosen = (
            name for name, cost in costs.items() if _bears(cost, mine, within) and (not together or cost.whole.relative <= within)
        )
        groups[next(chosen, "exact")] += map(str, mine)
    match = {"module": site}
    if len(groups) == 1:
        return {"match": match, "attn": next(iter(groups))}
    return {"match": match, "attn": {"heads": {", ".join(heads): name for name, heads in groups.items()}}}


def _bears(cost: SiteCost, heads: Iterable[int], within: float) -> bool:
    return all(cost.heads[head].relative <= within for head in heads)


def _arguments(one: Mapping[str, Any] | Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((), dict(one)) if isinstance(one, Mapping) else (tuple(one), {})


Targets = Callable[[Decision], Target]


def _backend(
    policy: Policy, tables: Mapping[str, Tensor], prepare: Callable[[Analysis], tuple[Analysis, Targets]]
) -> Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]:
    """A backend of torch.compile that runs what was rewritten as it is."""

    def compiled(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        def decide(sites: Sequence[Site], near_misses: Sequence[NearMiss]) -> Plan:
            return plan(sites, policy, (_Noting(),), near_misses)

        analysis, targets = prepare(analyze(gm, example_inputs, decide))
        extra = carry_out(analysis, policy.tables, tables, targets)
        return gm.forward if extra is None else lambda *inputs: analysis.graph(*inputs, *extra)

    return compiled


def _decided(analysis: Analysis) -> tuple[Analysis, Targets]:
    """What was decided, by torch."""
    return analysis, lambda _: TARGETS["torch"]


def _both(analysis: Analysis) -> tuple[Analysis, Targets]:
    """Of every attention that changes, what it computes by itself, and beside it what was decided, compared."""
    described, homes, decisions = list(analysis.described), list(analysis.homes), list(analysis.plan.decisions)
    targets: dict[int, Target] = {}
    for at, (one, home, decision) in enumerate(zip(analysis.described, analysis.homes, analysis.plan.decisions, strict=True)):
        if decision.target is None and decision.projections is None:
            continue
        graph, number = home.graph.graph, next(_NUMBERS)
        copy, results = beside(graph, one if decision.projections else replace(one, makers=(), takers=()))
        for exact, found in results:
            with graph.inserting_after(found):
                told = (exact, found, number, one.site.name, one.site.kv_heads)
                graph.call_function(torch.ops.attn_compiler.compare.default, told)
        decisions[at] = replace(decision, variant=one.site.computes, target="exact", projections=None)
        described, homes = [*described, copy], [*homes, home]
        decisions = [*decisions, replace(decision, target="found")]
        targets |= {id(decisions[at]): _Noting(number), id(decisions[-1]): _Noting(number, exact=False)}
    doubled = replace(
        analysis, described=tuple(described), homes=tuple(homes), plan=replace(analysis.plan, decisions=tuple(decisions))
    )
    return doubled, lambda decision: targets[id(decision)]


def _run(model: nn.Module, calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]], backend: Any) -> list[Tensor]:
    torch.compiler.reset()
    try:
        compiled = torch.compile(model, backend=backend, dynamic=False)
        return [_result(compiled(*args, **kwargs)) for args, kwargs in calls]
    finally:
        torch.compiler.reset()


def _result(out: object) -> Tensor:
    """What a model says: its logits, or the first tensor of its output."""
    if isinstance(out, Mapping):
        out = out["logits"] if "logits" in out else tuple(out.values())
    if isinstance(out, Sequence):
        out = next((x for x in out if isinstance(x, Tensor)), None)
    if not isinstance(out, Tensor):
        raise ShapeError(f"a model that is calibrated returns a tensor, or first of all one; found {type(out).__name__}")
    return out


def _divergence(exact: Tensor, found: Tensor) -> float:
    """Of the second from the first, as logits, in nats for each row."""
    a, b = (x.double().log_softmax(-1).reshape(-1, x.shape[-1]) for x in (exact, found))
    return float((a.exp() * (a - b)).sum(-1).mean())


def write(measured: Measured, path: Path) -> None:
    """Write what was measured: whole, or not at all."""
    with whole_file(path) as file:
        file.write_text(measured.to_json() + "\n", encoding="utf-8")
