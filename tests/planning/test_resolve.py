"""Rules over sites: what a policy makes of one, and why not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from attn_compiler import library
from attn_compiler.algebra.expr import Sort, b, i, k, k_len, q, q_len, score, table, tanh
from attn_compiler.algebra.simplify import simplify
from attn_compiler.algebra.variant import EmptyRows, Variant
from attn_compiler.errors import RefusedError
from attn_compiler.planning.formula import formulas, whole
from attn_compiler.planning.plan import Decision, Plan, Refusal
from attn_compiler.planning.planner import plan
from attn_compiler.planning.site import Frame, Kind, Phase, Site
from attn_compiler.targets.choice import TorchTarget

VALID = table("valid", b, k, sort=Sort.BOOL)


def site(**changes: object) -> Site:
    plain = Site(
        "model.layers.3.self_attn", Kind.SELF, Phase.PREFILL, 3, 8, 2, 8, 4, 1024, 1024, 64, 64, "float32",
        Variant(mask=k <= q), Frame(), 1024, 1024,
    )  # fmt: skip
    return replace(plain, **changes)  # type: ignore[arg-type]


def planned(rules: str, *sites: Site) -> Plan:
    return plan(sites or (site(),), library.load_policy(f"version: 1\nrules:\n{rules}\n"), (TorchTarget(),))


def decided(rules: str, at: Site | None = None) -> Decision:
    return planned(rules, at or site()).decisions[0]


def test_without_a_rule_a_site_is_exact() -> None:
    decision = plan((site(),), library.load_policy("exact"), (TorchTarget(),)).decisions[0]
    assert decision.exact
    assert decision.rule == "no rule"
    assert decision.form == "scaled_dot_product_attention(is_causal)"


def test_a_mask_joins_the_site_s_own() -> None:
    decision = decided("  - attn: {mask: window(16)}", site(computes=Variant(mask=(k <= q) & VALID)))
    assert simplify(decision.variant.mask) == simplify((k <= q) & VALID & (abs(q - k) < 16))
    assert not decision.exact


def test_a_rule_that_restates_the_mask_is_exact() -> None:
    assert decided("  - attn: {mask: causal}").exact
    assert decided("  - attn: {mask: causal & window(1024)}").exact
    assert not decided("  - attn: {mask: causal & window(1023)}").exact


def test_the_first_rule_decides() -> None:
    decision = decided("  - {match: {layers: 3}, attn: exact}\n  - {attn: {mask: window(4)}}")
    assert decision.rule == "rule 1"
    assert decision.exact


@pytest.mark.parametrize(
    ("match", "holds"),
    [
        ("{}", True),
        ("{module: 'model.layers.*.self_attn'}", True),
        ("{module: 'model.**'}", True),
        ("{module: 'model.*'}", False),
        ("{module: 'model.layers.?.self_attn'}", True),
        ("{layers: '-5'}", True),
        ("{layers: '-1'}", False),
        ("{layers: '1::2'}", True),
        ("{layers: '3, 99'}", True),
        ("{kind: [cross, self]}", True),
        ("{kind: cross}", False),
        ("{phase: decode}", False),
        ("{min_tokens: 1024}", True),
        ("{min_tokens: 1025}", False),
        ("{max_tokens: 1024}", True),
        ("{max_tokens: 1023}", False),
    ],
)
def test_all_that_is_written_must_hold(match: str, holds: bool) -> None:
    found = planned(f"  - {{name: far, match: {match}, attn: {{mask: window(4)}}}}")
    assert (found.decisions[0].rule == 'rule 1 "far"') is holds
    assert bool(found.warnings) is not holds


def test_layers_of_a_block_alone_are_refused() -> None:
    decision = decided("  - {match: {layers: 0}, attn: {mask: window(4)}}", site(layer=None, layers=None))
    assert "compiled alone" in decision.refusals[0].reason
    assert decision.exact


def test_also_adds_slots_and_refuses_to_set_one_twice() -> None:
    added = decided("  - {attn: {mask: window(4)}}\n  - {also: true, attn: {scale: 0.5}}")
    assert added.variant.scale.value == 0.5
    twice = decided("  - {attn: {mask: window(4)}}\n  - {also: true, attn: {mask: window(8)}}")
    assert "set by an earlier rule" in twice.refusals[0].reason
    assert twice.exact


def test_replacing_a_mask_keeps_the_padding() -> None:
    at = site(computes=Variant(mask=(k <= q) & VALID))
    decision = decided("  - {replace_mask: true, attn: {mask: 'window(4, 8)'}}", at)
    assert simplify(decision.variant.mask) == simplify(VALID & (q - k < 4) & (k - q < 8))


def test_replacing_a_mask_keeps_unwritten_cache_slots_hidden() -> None:
    at = site(q_len=4, q_hint=4, frame=Frame(i + (k_len - q_len)), computes=Variant(mask=k <= q))
    decision = decided("  - {replace_mask: true, attn: {mask: all}}", at)
    assert decision.variant.mask.value is True  # the last query stands at the last of the keys
    static = site(q_len=4, q_hint=4, frame=Frame(i + table("start")), computes=Variant(mask=k <= q))
    decision = decided("  - {replace_mask: true, attn: {mask: all}}", static)
    assert simplify(decision.variant.mask) == simplify(k <= table("start") + 3)


def test_replacing_a_run_time_mask_is_refused() -> None:
    at = site(computes=Variant(mask=table("mask", b, i, k, sort=Sort.BOOL)))
    assert "cannot be told" in decided("  - {replace_mask: true, attn: {mask: window(4)}}", at).refusals[0].reason


def test_distances_need_a_frame() -> None:
    at = site(frame=None, kind=Kind.CROSS)
    assert "nobody knows" in decided("  - attn: {mask: window(4)}", at).refusals[0].reason
    assert not decided("  - attn: {mask: sinks(4)}", at).refusals


def test_positions_count_from_the_first_valid_key() -> None:
    first = table("first_key:valid", b)
    decision = decided("  - attn: {mask: window(16) | sinks(4)}", site(frame=Frame(first_key=first)))
    assert simplify(decision.variant.mask) == simplify((k <= q) & ((abs(q - k) < 16) | (k - first < 4)))


@pytest.mark.parametrize(
    "slots",
    ["mask: window(16) | sinks(4)", "mask: chunks(8)", 'score: "where(k < 4, score + 1, score)"',
     "heads: {0: exact, rest: {mask: window(16) | sinks(4)}}"],
)  # fmt: skip
def test_positions_are_refused_in_a_cache_that_lets_go_of_its_oldest_keys(slots: str) -> None:
    at = site(frame=Frame(slides=True))
    (refusal,) = decided(f"  - attn: {{{slots}}}", at).refusals
    assert "its oldest keys are gone" in refusal.reason
    assert decided(f"  - attn: {{{slots}}}").target


@pytest.mark.parametrize("slots", ["mask: window(16)", "score: score + alibi()", "mask: dilated(2) & window(8)"])
def test_distances_are_known_in_a_cache_that_lets_go_of_its_oldest_keys(slots: str) -> None:
    at = site(frame=Frame(slides=True))
    assert decided(f"  - attn: {{{slots}}}", at).target


def test_a_mask_is_not_replaced_in_a_cache_that_lets_go_of_its_oldest_keys() -> None:
    rule = "  - {attn: {mask: causal & window(16)}, replace_mask: true}"
    assert "its oldest keys are gone" in decided(rule, site(frame=Frame(slides=True))).refusals[0].reason
    assert decided(rule).target


def test_groups_take_what_stands_beside_them() -> None:
    decision = decided(
        "  - attn: {scale: 0.5, heads: {'0:2': exact, '-1': {mask: window(4), scale: 0.25}, rest: {mask: window(8)}}}"
    )
    by_head = {head: group for chosen, group in decision.variant.groups for head in chosen.members(8)}
    assert by_head[0] == site().computes
    assert by_head[7].scale.value == 0.25
    assert by_head[3].scale.value == 0.5
    assert simplify(by_head[3].mask) == simplify((k <= q) & (q - k < 8))


def test_heads_out_of_range_are_refused() -> None:
    assert "outside of 0 … 7" in decided("  - attn: {heads: {'9': exact}}").refusals[0].reason


def test_slots_that_nothing_carries_are_refused() -> None:
    decision = decided("  - attn: {mask: causal, emit: rows}")
    assert decision.refusals == (Refusal("rule 1", "no target carries `emit` yet"),)
    assert decision.exact


def test_a_refusal_can_be_fatal() -> None:
    with pytest.raises(RefusedError, match="fallback: error"):
        decided("  - {fallback: error, attn: {mask: causal, emit: rows}}")


def test_score_speaks_of_what_the_site_computes() -> None:
    capped = Variant(mask=k <= q, score=tanh(score / 30.0) * 30.0)
    decision = decided("  - attn: {score: 'score + decay(0.5)'}", site(computes=capped))
    assert decision.variant.score.mentions(score)
    assert any(node.op == "tanh" for node in decision.variant.score.walk())


def test_a_new_mask_gives_empty_rows_zero_unless_it_says_otherwise() -> None:
    at = site(computes=Variant(mask=k <= q, empty_rows=EmptyRows.MEAN))
    assert decided("  - attn: {mask: window(4)}", at).variant.empty_rows is EmptyRows.ZERO
    assert decided("  - attn: {mask: window(4), empty_rows: mean}", at).variant.empty_rows is EmptyRows.MEAN


def test_weights_that_are_read_elsewhere_keep_their_code() -> None:
    decision = decided("  - attn: {mask: window(4)}", site(blocked="its attention weights are also read by output"))
    assert decision.target is None
    assert "also read" in decision.refusals[0].reason


def test_a_rule_that_matches_nothing_is_a_warning() -> None:
    found = planned("  - {name: far, match: {module: nowhere}, attn: {mask: window(4)}}")
    (says,) = found.warnings
    assert says.startswith('rule 1 "far" matches nothing: no attention is named nowhere; they are called like model.layers.')


def test_a_rule_behind_one_that_takes_everything_is_a_warning() -> None:
    found = planned("  - attn: exact\n  - {match: {kind: self}, attn: {mask: window(4)}}")
    assert found.warnings == ("rule 2 decides nothing: earlier rules take all that it matches",)


def test_an_addition_to_what_no_rule_decided_is_a_warning() -> None:
    found = planned("  - {also: true, attn: {mask: window(4)}}")
    assert found.warnings == ("rule 1 adds nothing: no earlier rule decides what it matches",)


def test_rules_are_judged_over_all_graphs_of_a_model() -> None:
    rules = "  - {match: {kind: self}, attn: exact}\n  - {match: {kind: cross}, attn: exact}"
    one, other = planned(rules, site()), planned(rules, site(kind=Kind.CROSS))
    assert "rule 2 matches nothing" in one.warnings[0]
    assert "rule 1 matches nothing" in other.warnings[0]
    assert (one + other).warnings == ()
    assert len((one + one).warnings) == 1


def test_a_policy_that_met_no_attention_says_so_once() -> None:
    rules = "  - {match: {kind: self}, attn: exact}\n  - {match: {kind: cross}, attn: exact}"
    policy = library.load_policy("version: 1\nrules:\n" + rules)
    assert plan((), policy, ()).warnings == ("no attention was found, so that no rule decided anything",)


def test_counting_what_a_rule_matches_makes_no_length_a_condition() -> None:
    asked: list[int] = []
    dynamic = site(longer=lambda tokens: bool(asked.append(tokens)))
    planned("  - attn: exact\n  - {match: {min_tokens: 7}, attn: exact}", dynamic)
    assert asked == []


def test_a_storage_is_part_of_what_is_decided() -> None:
    decision = decided("  - attn: {storage: {qk: int8}}")
    assert decision.outcome == "approximate"
    assert decision.form.endswith("of operands rounded as they would be held")
    assert "q and k: held in int8, per token" in whole(formulas(decision.variant, decision.site))


def test_projections_that_nobody_knows_are_refused() -> None:
    assert "of which this call knows nothing" in decided("  - attn: {storage: {projections: int8}}").refusals[0].reason


def test_heads_that_share_their_keys_have_one_cache() -> None:
    def grouped(heads: str) -> Decision:
        return decided(f"  - attn: {{heads: {{'{heads}': {{storage: {{kv_cache: int8}}}}}}}}")

    assert grouped("0:2").outcome == "approximate"
    assert "share the keys of kv head 0 with others" in grouped("0").refusals[0].reason
