"""Reports: what people read, what programs read, and that nothing is hidden by grouping."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from attn_compiler import library
from attn_compiler.algebra.expr import Expr, Sort, b, const, i, k, q, same, table
from attn_compiler.algebra.notation import notation
from attn_compiler.algebra.variant import Variant
from attn_compiler.planning.findings import costs, findings, ranges
from attn_compiler.planning.plan import Decision, NearMiss, Plan, Refusal
from attn_compiler.planning.planner import plan
from attn_compiler.planning.report import WIDTH, Report, report_of
from attn_compiler.planning.site import Form, Frame, Kind, Phase, Site
from attn_compiler.targets.choice import TorchTarget

CAUSAL = Variant(mask=k <= q)
LOCAL = Variant(mask=(k <= q) & (q <= k + 255))
BLOCKS: Form = "blocks of queries, each with the keys in reach"


def _decision(layer: int, variant: Variant = CAUSAL, length: int = 1024) -> Decision:
    site = Site(
        name=f"model.layers.{layer}.attn",
        kind=Kind.SELF,
        phase=Phase.PREFILL,
        layer=layer,
        layers=12,
        batch=1,
        heads=4,
        kv_heads=2,
        q_len=length,
        k_len=length,
        head_dim=16,
        value_dim=16,
        dtype="float32",
        computes=variant,
        frame=Frame(),
        q_hint=length,
        k_hint=length,
    )
    return Decision(site, "no rule", variant, exact=True, target="torch", form=BLOCKS)


def _plan(*decisions: Decision) -> Plan:
    misses = (NearMiss("model.router", "softmax", "what follows is <no> contraction"),)
    return Plan(decisions, misses, ("rule 3 matches nothing",))


def test_interleaved_layers_are_two_groups_that_name_their_layers() -> None:
    found = findings([_decision(n, CAUSAL if n == 5 else LOCAL) for n in range(11)])
    assert [group.name for group in found] == ["model.layers.{0-4, 6-10}.attn", "model.layers.5.attn"]


def test_every_second_layer_is_written_as_a_row() -> None:
    assert ranges([0, 2, 4, 6, 8]) == "0, 2 … 8"
    assert ranges([0, 1, 2, 5]) == "0-2, 5"


def test_no_attention_is_lost_by_grouping() -> None:
    decisions = [_decision(n, CAUSAL if n % 3 else LOCAL) for n in range(12)]
    assert sorted(d.site.name for group in findings(decisions) for d in group.decisions) == sorted(d.site.name for d in decisions)


def test_a_refusal_sets_an_attention_apart() -> None:
    refused = replace(_decision(1), refusals=(Refusal("torch", "cannot"),))
    assert len(findings([_decision(0), refused, _decision(2)])) == 2


def test_a_report_fits_a_terminal_and_says_everything() -> None:
    reason = "a long reason " * 20
    refused = replace(_decision(0, LOCAL), rule="rule 1", target=None, refusals=(Refusal("torch", reason),), refused=True)
    text = str(Report(_plan(refused)))
    assert max(map(len, text.splitlines())) <= WIDTH
    for said in (
        "window(256)",
        "q − k < 256",
        "attn: kept as written, rule 1 is refused",
        "model.router",
        "warning: rule 3 matches nothing",
        "a long reason",
    ):
        assert said in text


def test_json_holds_every_site_and_its_version() -> None:
    found = json.loads(Report(_plan(_decision(0, LOCAL), _decision(1))).to_json())
    assert found["version"] == 1
    assert [site["layer"] for site in found["sites"]] == [0, 1]
    assert found["sites"][0]["costs"]["density_after"] < found["sites"][1]["costs"]["density_after"] < 1
    assert found["warnings"] == ["rule 3 matches nothing"]
    assert found["sites"][0]["parts"][1] == {"name": "window(256)", "says": "q − k < 256"}


def test_a_record_cannot_be_taken_for_what_it_is_not() -> None:
    """What runs where a rule is refused is exact, and still not what was asked for."""
    refused = replace(_decision(0), rule="rule 1", target=None, refusals=(Refusal("rule 1", "cannot"),), refused=True)
    decisions = [_decision(0), replace(_decision(1), exact=False), replace(_decision(2), target=None), refused]
    records = json.loads(Report(Plan(tuple(decisions))).to_json())["sites"]
    assert [record["outcome"] for record in records] == ["exact", "approximate", "kept", "refused"]
    assert [record["becomes"] is None for record in records] == [False, False, True, True]
    assert all("exact" not in record for record in records)
    assert str(Report(Plan(tuple(decisions)))).startswith(
        "policy exact · 4 attentions in 1 graph: 1 exact, 1 approximate, 1 kept as written, 1 refused\n"
    )


def test_why_a_policy_and_its_rules_are_there_is_shown() -> None:
    policy = library.load_policy(
        "version: 1\nbecause: Long prompts.\nrules: [{match: {kind: self}, because: It may., attn: {mask: window(9)}}]"
    )
    report = report_of(plan((_decision(0).site,), policy, (TorchTarget(),)), policy)
    text, document = str(report), json.loads(report.to_json())
    assert "because   Long prompts." in text
    assert "because   It may." in text
    assert (document["because"], document["digest"]) == ("Long prompts.", policy.digest)
    assert document["rules"] == [{"rule": "rule 1", "because": "It may.", "decides": 1}]


def test_a_page_is_escaped_and_leaves_no_other_file(tmp_path: Path) -> None:
    Report(_plan(_decision(0, LOCAL))).to_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "&lt;no&gt;" in page
    assert "<no>" not in page
    assert "http" not in page
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.parametrize("length", [0, 1, 1000])
@pytest.mark.parametrize(
    "mask", [const(True), table("valid", b, k, sort=Sort.BOOL), same(table("document", b, q), table("document", b, k))]
)
def test_costs_are_known_for_tables_and_empty_lengths(length: int, mask: Expr) -> None:
    cost = costs(_decision(0, Variant(mask=mask), length))
    assert 0 <= cost.after.flops <= 2 * 32 * 4 * length * length


def test_a_form_that_skips_nothing_costs_all() -> None:
    dense = replace(_decision(0, LOCAL), form="scaled_dot_product_attention with a mask")
    assert costs(dense).density_after == 1
    assert costs(_decision(0, LOCAL)).density_after < 1


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (q <= k + 255, "q − k < 256"),
        ((q <= k + 7) & (k <= q + 7), "|q − k| < 8"),
        ((k <= i + 7) & (i <= k + 7), "|i − k| < 8"),
        ((q <= k + 7) & (k <= q + 3), "q − k < 8 ∧ k − q < 4"),
        (k <= q, "k ≤ q"),
        (k <= 3, "k ≤ 3"),
    ],
)
def test_distances_are_written_as_people_say_them(mask: Expr, says: str) -> None:
    assert notation(mask) == says


def test_linear_attention_costs_its_sums_and_no_map() -> None:
    form: Form = "states, to which keys are added up chunk by chunk"
    linear = replace(_decision(0), form=form)
    found = costs(linear)
    assert found.density_after == 0
    assert found.after.flops < found.before.flops
    assert "no map" in str(Report(_plan(linear)))
