"""What a rule asks for at a site and does not get: names that match, promises nobody checks, heads that are not there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from attn_compiler import library
from attn_compiler.algebra.expr import k, q
from attn_compiler.algebra.variant import Variant
from attn_compiler.errors import RefusedError
from attn_compiler.planning.plan import Plan
from attn_compiler.planning.planner import plan
from attn_compiler.planning.policy import Match
from attn_compiler.planning.site import Frame, Kind, Phase, Site
from attn_compiler.targets.choice import TorchTarget


def site(name: str = "model.layers.3.self_attn") -> Site:
    return Site(
        name, Kind.SELF, Phase.PREFILL, 3, 8, 2, 8, 4, 1024, 1024, 64, 64, "float32", Variant(mask=k <= q), Frame(), 1024, 1024
    )


def planned(text: str) -> Plan:
    return plan((site(),), library.load_policy(f"version: 1\n{text}\n"), (TorchTarget(),))


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("dit.**", "dit", True),
        ("dit.**", "dit.blocks.0", True),
        ("dit.**", "ditto.blocks", False),
        ("**.attn", "attn", True),
        ("**.attn", "a.b.attn", True),
        ("**.attn", "a.xattn", False),
        ("a.**.c", "a.c", True),
        ("a.**.c", "a.b.b.c", True),
        ("a.**.c", "a.bc", False),
        ("**", "", True),
        ("**", "a.b", True),
        ("*", "a", True),
        ("*", "a.b", False),
        ("a.*", "a", False),
        ("a.*.c", "a.b.c", True),
        ("a.*.c", "a.b.b.c", False),
        ("layers.?.attn", "layers.3.attn", True),
        ("layers.?.attn", "layers.13.attn", False),
        ("a.(b|c)", "a.b", False),
    ],
)
def test_a_star_is_one_part_of_a_name_and_two_are_any_number(pattern: str, name: str, matches: bool) -> None:
    assert Match(module=pattern).excludes(site(name)) is not matches


def test_a_tolerance_that_nobody_measures_is_refused() -> None:
    decision = planned("rules: [{attn: {mask: window(4)}, tolerance: {site: 0.02}}]").decisions[0]
    assert decision.exact
    assert decision.variant == site().computes
    assert "was not measured: run `attn calibrate" in decision.refusals[0].reason


def test_a_tolerance_that_nobody_measures_is_fatal_where_the_rule_says_so() -> None:
    with pytest.raises(RefusedError, match="was not measured: run `attn calibrate"):
        planned("rules: [{attn: {mask: window(4)}, tolerance: {logits: 0.02}, fallback: error}]")


@pytest.mark.parametrize("attn", ["exact", "{mask: causal}", "{mask: causal & window(1024)}"])
def test_what_stays_exact_needs_no_measurement(attn: str) -> None:
    assert planned(f"rules: [{{attn: {attn}, tolerance: {{site: 0.02}}, fallback: error}}]").decisions[0].exact


@pytest.mark.parametrize("heads", ["8:12", "9:20"])
def test_a_group_without_a_head_of_the_site_is_refused(heads: str) -> None:
    decision = planned(f'rules: [{{attn: {{heads: {{"{heads}": {{mask: window(4)}}}}}}}}]').decisions[0]
    assert decision.exact
    assert decision.refusals[0].reason == f"heads {heads}: the site has 8, none of them is among these"


def test_a_slice_of_heads_is_clipped_as_in_python() -> None:
    decision = planned('rules: [{attn: {heads: {"4:20": {mask: window(4)}}}}]').decisions[0]
    assert not decision.refusals
    assert [sorted(heads.members(8)) for heads, _ in decision.variant.groups] == [[4, 5, 6, 7], [0, 1, 2, 3]]


def test_parameters_that_nothing_reads_are_a_warning() -> None:
    warnings = planned("parameters: trained.safetensors\nrules: [{attn: exact}]").warnings
    assert warnings == ("trained.safetensors is not read: no variant of this policy has parameters",)


@pytest.mark.parametrize(
    "slots",
    [
        "output: local_conv(3)",
        'context: "extra(memory, 2)"',
        "normalizer: softmax(sink=sink)",
        'scale: "alpha[h]"',
        'heads: {"0": {context: "agents(4, near, far)"}}',
    ],
)
def test_parameters_that_any_slot_reads_are_read(slots: str) -> None:
    given = "".join(f"  {name}: {{given: {name}}}\n" for name in ("memory", "sink", "alpha", "near", "far"))
    assert planned(f"parameters: trained.safetensors\nlabels:\n{given}rules: [{{attn: {{{slots}}}}}]").warnings == ()


def test_layers_that_a_model_does_not_have_match_nothing() -> None:
    found = planned('rules: [{match: {layers: "100"}, attn: exact}]').warnings
    assert found == ("rule 1 matches nothing: no attention is in layers 100",)


def test_parameters_that_are_missing_are_refused_by_name() -> None:
    decision = planned("parameters: maps.safetensors\nrules: [{attn: {mask: causal, feature: hedgehog}}]").decisions[0]
    assert decision.refused
    assert decision.refusals[0].reason == "it has parameters, hedgehog_k, hedgehog_q, which maps.safetensors does not hold"
    decision = planned("rules: [{attn: {mask: causal, feature: hedgehog}}]").decisions[0]
    assert decision.refusals[0].reason == "it has parameters, hedgehog_k, hedgehog_q, which no `parameters:` of the policy hold"


def test_parameters_come_from_their_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "maps.npz", hedgehog_q=np.zeros((8, 64, 32)), hedgehog_k=np.zeros((8, 64, 32)), share=np.zeros(8))
    (tmp_path / "p.yaml").write_text(
        "version: 1\nparameters: maps.npz\nrules:\n  - attn:\n      mix:\n        how: gate\n        weights: {far: share}\n"
        "        branches: {near: {mask: window(64)}, far: {mask: causal & ~window(64), feature: hedgehog}}\n"
    )
    found = plan((site(),), library.load_policy(tmp_path / "p.yaml"), (TorchTarget(),))
    assert not found.warnings
    assert not found.decisions[0].refused
    assert found.decisions[0].variant.tables() == {"hedgehog_q", "hedgehog_k", "share"}


def test_a_mix_is_not_mixed_again_and_takes_what_a_later_rule_adds() -> None:
    mix = "mix: {how: sum, branches: {a: {mask: window(4)}, b: {mask: window(8)}}}"
    again = planned(f"rules: [{{attn: {{{mix}}}}}, {{also: true, attn: {{scale: 7}}}}]").decisions[0].variant
    assert again.mix
    assert [branch.scale.value for _, branch in again.mix.branches] == [7, 7]
    twice = planned(f"rules: [{{attn: {{scale: 7}}}}, {{also: true, attn: {{{mix}}}}}]").decisions[0]
    assert twice.variant.mix
