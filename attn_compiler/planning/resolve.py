"""Lays the slots of rules over what a site computes: the variant that a policy asks for there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from attn_compiler.algebra.expr import Expr, const, either, k, q, score
from attn_compiler.algebra.feature import IDENTITY
from attn_compiler.algebra.integers import IntegerSet
from attn_compiler.algebra.output import expressions_of
from attn_compiler.algebra.simplify import conjuncts, simplify
from attn_compiler.algebra.storage import Held, Storage
from attn_compiler.algebra.variant import Delta, EmptyRows, Gates, Mix, Variant
from attn_compiler.errors import LanguageError, PolicyError, UnknownLengthError
from attn_compiler.planning.operand_names import with_operands
from attn_compiler.planning.outside import in_context, merges, with_results
from attn_compiler.planning.parameters import lacking, parameters_of
from attn_compiler.planning.plan import Refusal
from attn_compiler.planning.policy import Policy, Rule
from attn_compiler.planning.positions import (
    LOST,
    UNPADDED,
    UNPLACED,
    counts,
    is_lost,
    masked,
    padding_is_known,
    placed,
    without_tables,
)
from attn_compiler.planning.site import Site
from attn_compiler.planning.slots import SLOTS, Slots, read_slots
from attn_compiler.planning.uses import RuleUse, Uses
from attn_compiler.planning.words import PerToken, Seen

_MERGED = "tokens are merged for all heads and branches alike, so `merge` has no place where there is `heads` or `mix`"


@dataclass(frozen=True)
class Asked:
    """What the rules of a policy make of a site: a variant, or why none."""

    variant: Variant | Refusal
    rule: str
    fatal: bool = False  # a rule said `fallback: error`
    rules: tuple[int, ...] = ()


def asked_of(policy: Policy, site: Site) -> Asked:
    """Let the first rule that matches decide, and `also` rules add their slots to that."""
    variant = site.computes
    titles: list[str] = []
    numbers: list[int] = []
    taken: frozenset[str] = frozenset()
    fatal = False
    for rule in policy.rules:
        if bool(titles) is not rule.also:  # what adds needs something to add to
            continue
        holds = _holds(rule, site)
        if holds is False:
            continue
        titles, numbers, fatal = [*titles, rule.title], [*numbers, rule.number], fatal or rule.fallback == "error"
        if isinstance(holds, Refusal):
            return Asked(holds, rule.title, fatal, tuple(numbers))
        added, taken = _added(variant, policy, taken, rule, site)
        if isinstance(added, Refusal):
            return Asked(added, " and ".join(titles), fatal, tuple(numbers))
        variant = added
    return Asked(variant, " and ".join(titles) or "no rule", fatal, tuple(numbers))


def _holds(rule: Rule, site: Site) -> bool | Refusal:
    """Whether a rule speaks of a site, or why nobody can tell. The layer is asked first: a length may become a guard."""
    in_layer = rule.match.in_layer(site)
    try:
        if in_layer is False or rule.match.excludes(site):
            return False
    except UnknownLengthError as error:
        return Refusal(rule.title, f"it speaks of lengths, and {error}")
    if in_layer is None:
        return Refusal(rule.title, "it speaks of layers, and this block is compiled alone: nobody knows its layer")
    return True


def _added(
    variant: Variant, policy: Policy, taken: frozenset[str], rule: Rule, site: Site
) -> tuple[Variant | Refusal, frozenset[str]]:
    slots = policy.slots(rule, site)
    if slots is None:
        return variant, taken
    twice = slots.set_slots() & taken
    if twice:
        return Refusal(rule.title, f"`{min(twice, key=SLOTS.index)}` is set by an earlier rule already"), taken
    try:
        resolved = resolve(slots, replace(site, computes=variant), replace_mask=rule.replace_mask)
    except (LanguageError, UnknownLengthError) as error:
        return Refusal(rule.title, str(error)), taken
    if isinstance(resolved, Variant):
        resolved = _untrained(resolved, policy, rule, site) or resolved
    if isinstance(resolved, Refusal):
        resolved = replace(resolved, by=rule.title)
    return resolved, taken | slots.set_slots()


def _untrained(variant: Variant, policy: Policy, rule: Rule, site: Site) -> Refusal | None:
    """Why nobody should run a variant before its parameters are trained; None if they are, or if the rule allows it."""
    missing = sorted(lacking(variant, site, policy.tables))
    learned = variant.tables() & policy.learned
    for name in sorted(learned):
        misfit = _misshapen(name, variant, policy, site)
        if misfit:
            return Refusal("rule", f"of its parameters in {policy.parameters}, {misfit}")
    raw = [] if policy.trained else sorted(learned)
    if rule.untrained == "allow":
        try:
            tuple(parameters_of(variant, site, missing))
        except PolicyError as error:
            return Refusal("rule", str(error))
    elif missing:
        where = f"{policy.parameters} does not hold" if policy.parameters else "no `parameters:` of the policy hold"
        return Refusal("rule", f"it has parameters, {', '.join(missing)}, which {where}")
    elif raw:
        said = f"it has parameters, {', '.join(raw)}, that nobody trained since {policy.parameters} was made"
        return Refusal("rule", f"{said}: attn.distill trains them, `untrained: allow` does without")
    return None


def _misshapen(name: str, variant: Variant, policy: Policy, site: Site) -> str:
    """Why a parameter of the policy's file is not the one that this model needs; nothing if it is."""
    held = policy.tables[name].array
    try:
        wanted = tuple(parameters_of(variant, site, [name]))
    except PolicyError:  # read by tokens or rows: a table like any other, whose shape says nothing
        return ""
    return "" if held is None else next(filter(None, (one.misfit(held.shape) for one in wanted)), "")


def resolve(slots: Slots, site: Site, *, replace_mask: bool = False) -> Variant | Refusal:
    """The variant that `slots` make of `site`, or why they make none."""
    found = _of_heads(slots, site, replace_mask)
    return found if isinstance(found, Refusal) else _with_projections(found, site.heads)


def _with_projections(variant: Variant, heads: int) -> Variant | Refusal:
    """The same, whose heads and branches agree on their projections: these serve all of them."""
    asked = set(_projections(variant, heads))
    if len(asked) > 1:
        return Refusal("rule", "its projections serve all heads and branches, and these want them held in several ways")
    return variant.projected(asked.pop())


def _projections(variant: Variant, heads: int) -> Iterator[Held | None]:
    """How each head and each branch wants projections to be held."""
    for _, inner in (*variant.groups, *(variant.mix.branches if variant.mix else ())):
        yield from _projections(inner, heads)
    if not variant.mix and len(frozenset().union(*(own.members(heads) for own, _ in variant.groups))) < heads:
        yield variant.storage.projections


def _of_heads(slots: Slots, site: Site, replace_mask: bool) -> Variant | Refusal:
    unsupported = slots.unsupported()
    if unsupported:
        return Refusal("rule", f"no target carries {', '.join(f'`{slot}`' for slot in unsupported)} yet")
    base = site.computes
    if not slots.heads and not base.groups:
        return _lay(slots, base, site, replace_mask)
    if slots.heads and base.groups:
        return Refusal("rule", "the heads of this site are in groups already")
    wanted: Iterable[tuple[IntegerSet, Slots | None, Variant]] = ((heads, slots, own) for heads, own in base.groups)
    if slots.heads:
        wanted = ((heads, group, base) for heads, group in slots.head_groups(site.heads))
    groups: list[tuple[IntegerSet, Variant]] = []
    for heads, group, own in wanted:
        variant = own if group is None else _lay(group, own, site, replace_mask)
        if isinstance(variant, Refusal):
            return Refusal(variant.by, f"heads {heads}: {variant.reason}")
        groups.append((heads, variant))
    torn = _torn_apart(groups, site) or (_MERGED if any(map(merges, (one for _, one in groups))) else "")
    return Refusal("rule", torn) if torn else replace(base, groups=tuple(groups))


def _torn_apart(groups: Sequence[tuple[IntegerSet, Variant]], site: Site) -> str:
    """Why heads that share their keys cannot be in these groups; nothing if they can."""
    cached: dict[int, Held | None] = {}
    for heads, variant in groups:
        for head in heads.members(site.heads):
            owner = head // (site.heads // site.kv_heads)
            if cached.setdefault(owner, variant.storage.kv_cache) != variant.storage.kv_cache:
                return f"heads {heads} share the keys of kv head {owner} with others, whose `kv_cache` is held otherwise"
    return ""


def _lay(slots: Slots, base: Variant, site: Site, replace_mask: bool) -> Variant | Refusal:
    mix = slots.mix or base.mix
    if mix is None:
        return _lay_alone(slots, base, site, replace_mask)
    if slots.mix is not None and base.mix is not None:
        return Refusal("rule", "an earlier rule mixes branches here already")
    named: list[tuple[str, Slots | None, Variant]] = []
    if slots.mix is not None:
        named = [(name, branch, replace(base, output=())) for name, branch in slots.mix.branches]
    elif base.mix is not None:
        named = [(name, slots, branch) for name, branch in base.mix.branches]
    branches: list[tuple[str, Variant]] = []
    for name, branch, below in named:
        laid = below if branch is None else _lay_alone(branch, below, site, replace_mask)
        if isinstance(laid, Refusal):
            return Refusal(laid.by, f"branch {name}: {laid.reason}")
        if merges(laid):
            return Refusal("rule", f"branch {name}: {_MERGED}")
        branches.append((name, laid))
    derived = tuple(dict.fromkeys(table for _, branch in branches for table in branch.derived))
    mask = simplify(either(*(branch.mask for _, branch in branches)))
    mixed = replace(base, mask=mask, mix=Mix(mix.how, tuple(branches), mix.weights), derived=derived)
    finished = mixed if slots.output is None else with_results(mixed, slots.output, site)
    if isinstance(finished, Refusal):
        return finished
    gates = {name: x for name, x in (slots.operands or {}).items() if name == "gate"}
    return with_operands(finished, gates, site) if gates else finished


def _lay_alone(slots: Slots, base: Variant, site: Site, replace_mask: bool) -> Variant | Refusal:
    """The variant without groups and branches that slots make of another one."""
    laid = _laid(slots, base, site, replace_mask)
    if isinstance(laid, Variant) and slots.kept is not None:
        laid = masked(Seen(slots.kept), laid, site, replace_mask=False)
        laid = laid if isinstance(laid, Refusal) else replace(laid, empty_rows=slots.empty_rows or EmptyRows.ZERO)
    if isinstance(laid, Variant) and (slots.context or laid.context):
        laid = in_context(laid, slots.context or laid.context, site)
    return laid if isinstance(laid, Refusal) or not slots.operands else with_operands(laid, slots.operands, site)


def _laid(slots: Slots, base: Variant, site: Site, replace_mask: bool) -> Variant | Refusal:
    """The same of q, k and v as they come."""
    variant: Variant | Refusal = replace(base, derived=tuple(dict.fromkeys((*base.derived, *slots.derived))))
    assert isinstance(variant, Variant)
    misfit = _misfit(slots, site)
    if misfit:
        return Refusal("rule", misfit)
    if slots.feature is not None or slots.state is not None:
        variant = _linear(slots, variant)
    if isinstance(variant, Refusal):
        return variant
    if slots.scale is not None:
        variant = replace(variant, scale=slots.scale)
    if slots.score is not None:
        if is_lost(site, slots.score):
            return Refusal("rule", f"its score {LOST}")
        variant = replace(variant, score=placed(slots.score, site).substitute({score: variant.score}))
    if slots.state is not None:
        variant = _with_state(slots.state, variant, site, made="gate" in (slots.operands or ()))
    if isinstance(variant, Refusal):
        return variant
    if slots.normalizer is not None:
        variant = replace(variant, normalizer=slots.normalizer)
    if slots.storage is not None:
        variant = _stored(slots.storage, slots.order, variant, site)
    if isinstance(variant, Refusal):
        return variant
    if slots.output is not None:
        variant = with_results(variant, slots.output, site)
    if isinstance(variant, Refusal):
        return variant
    if slots.mask is None:
        return variant if slots.empty_rows is None else replace(variant, empty_rows=slots.empty_rows)
    variant = masked(slots.mask, variant, site, replace_mask)
    if isinstance(variant, Refusal):
        return variant
    return replace(variant, empty_rows=slots.empty_rows or EmptyRows.ZERO)


def _stored(storage: Storage, order: PerToken | None, variant: Variant, site: Site) -> Variant | Refusal:
    """The variant of operands that are held so; where blocks of tokens share scales, it says in which order they are cut."""
    held = variant.held(
        replace(storage, kv_cache=storage.kv_cache or variant.storage.kv_cache), simplify(order.of_k) if order else None
    )
    if held.order is None or held.order == k:
        return replace(held, order=None)
    if site.frame is None or is_lost(site, held.order):
        return Refusal("rule", f"the `order` of its blocks {LOST if site.frame else UNPLACED}")
    if counts(without_tables(held.order)) and not padding_is_known(variant.mask, site):
        return Refusal("rule", f"the `order` of its blocks {UNPADDED}")
    return replace(held, order=placed(held.order, site))


def _with_state(state: Expr | Delta | Gates, variant: Variant, site: Site, *, made: bool) -> Variant | Refusal:
    """What is left of a key at a query is a factor of the score; tables that are made of tokens go wherever these go."""
    if isinstance(state, Gates):
        if site.frame is None or (not made and is_lost(site, state.log)):
            return Refusal("rule", f"its state {UNPLACED if site.frame is None else LOST}")
        return replace(variant, gates=placed(state.log, site))
    if isinstance(state, Delta):
        faded = _with_state(state.left, variant, site, made=made)
        if site.frame is None or (not made and is_lost(site, state.beta)):
            return Refusal("rule", f"its state {UNPLACED if site.frame is None else LOST}")
        return replace(faded, delta=placed(state.beta, site)) if isinstance(faded, Variant) else faded
    if site.frame is None and state.mentions(q, k):
        return Refusal("rule", f"its state {UNPLACED}")
    if is_lost(site, without_tables(state) if made else state):
        return Refusal("rule", f"its state {LOST}")
    return replace(variant, score=_times(variant.score, placed(state, site)))


def _linear(slots: Slots, variant: Variant) -> Variant | Refusal:
    """What is left of an attention whose softmax gives way to features and a state: their product is its score."""
    if variant.score != score and slots.score is None:
        return Refusal("rule", "linear attention has no place for what this site adds to its scores: set `score`")
    return replace(variant, scale=const(1.0), score=score, feature=slots.feature or IDENTITY)


def _times(value: Expr, factor: Expr) -> Expr:
    return value if factor == const(1.0) else value * factor


def _misfit(slots: Slots, site: Site) -> str:
    """Why a site has not what a rule speaks of; nothing if it has."""
    if slots.storage and slots.storage.projections and site.projections.missing:
        return f"of the projections, which it wants to hold otherwise: {site.projections.missing}"
    asked, cached = slots.storage and slots.storage.kv_cache, site.computes.storage.kv_cache
    if asked and cached and asked != cached:
        return f"it wants the cache held in {asked}, and this model's cache is held in {cached}: make it with the same policy"
    if slots.geometry is None:
        return ""
    tokens = slots.geometry.tokens(site.k_hint)
    masks = [site.computes.mask, *([slots.mask.keep] if slots.mask else [])]
    # Where nobody looks ahead, the first tokens of a grid are all that a cache needs to hold.
    fits = not site.at_least(tokens + 1) and (site.at_least(tokens) or any(map(_is_causal, masks)))
    said = f"its geometry, {slots.geometry}, has {tokens} tokens, and this attention has {site.k_hint} keys"
    return "" if fits else f"{said}; `before` and `after` count the tokens that stand beside the grid"


def _is_causal(mask: Expr) -> bool:
    return simplify(k <= q) in conjuncts(simplify(mask))


def uses(policy: Policy, sites: Sequence[Site], took: Sequence[Sequence[int]]) -> Uses:
    """Count over the sites of one graph; `took` are the numbers of the rules that decided each."""
    plain = [site.likely() for site in sites]  # only to count, no length becomes a condition

    def use(rule: Rule) -> RuleUse:
        matched = sum(not rule.match.excludes(site) and rule.match.in_layer(site) is not False for site in plain)
        decided = sum(rule.number in numbers for numbers in took)
        named = rule.match.module is not None
        return RuleUse(rule.title, rule.because.strip(), str(rule.match), named, rule.also, matched, decided)

    example = next((site.name for site in sites if site.name), "")
    return Uses(tuple(map(use, policy.rules)), len(sites), example, _idle_parameters(policy))


def _idle_parameters(policy: Policy) -> str:
    """The file of parameters, where no rule has a slot that reads any: whatever stands in the file, nobody asks for it."""

    def reads(slots: Slots | None) -> bool:
        if slots is None:
            return False
        around = [e for one in slots.context or () for e in one.expressions()]
        around += [e for step in slots.output or () for e in expressions_of(step)]
        scores = [e for e in (slots.scale, slots.score) if e is not None]
        scores += slots.normalizer.expressions() if slots.normalizer else ()
        tables = any(e.tables() for e in (*around, *scores))
        mapped = bool({"feature", "state", "mix"} & slots.set_slots()) or slots.unsupported() != ()
        return tables or mapped or any(reads(group) for _, group in slots.heads)

    return "" if any(reads(read_slots(rule.attn, policy.naming)) for rule in policy.rules) else policy.parameters
