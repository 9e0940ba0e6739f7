"""What a policy means: equal digests are equal meanings, and no slot that a rule sets is lost on the way to a site."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_compiler import library
from attn_compiler.algebra.expr import const, k, q
from attn_compiler.algebra.variant import Variant
from attn_compiler.errors import PolicyError
from attn_compiler.planning.plan import Refusal
from attn_compiler.planning.resolve import Asked, asked_of
from attn_compiler.planning.site import Frame, Kind, Phase, Site

SITE = Site(
    "model.layers.3.self_attn", Kind.SELF, Phase.PREFILL, 3, 8, 2, 8, 4, 1024, 1024, 64, 64, "float32",
    Variant(mask=k <= q), Frame(), 1024, 1024,
)  # fmt: skip
MIX = {"how": "sum", "branches": {"near": {"mask": "window(3)"}, "far": "exact"}}
ATOMS = ("causal", "window(3)", "sinks(2)", "dilated(2)", 'keys("1:4")')


def digest(attn: object, **more: object) -> str:
    return library.load_policy({"version": 1, "rules": [{"match": {}, "attn": attn}], **more}).digest


def asked(*rules: Mapping[str, object]) -> Asked:
    return asked_of(library.load_policy({"version": 1, "rules": list(rules)}), SITE)


def groups(found: Asked) -> dict[str, Variant]:
    assert isinstance(found.variant, Variant)
    return {str(heads): group for heads, group in found.variant.groups}


@settings(max_examples=40)
@given(st.data(), st.lists(st.sampled_from(ATOMS), min_size=2, max_size=4, unique=True), st.sampled_from("&|"))
def test_the_order_of_the_operands_of_a_mask_does_not_count(data: st.DataObject, atoms: list[str], sign: str) -> None:
    shuffled = data.draw(st.permutations(atoms))
    assert digest({"mask": f" {sign} ".join(atoms)}) == digest({"mask": f"{sign}".join(f"({atom})" for atom in shuffled)})


@settings(max_examples=40)
@given(st.data(), st.sampled_from(("zero", "mean", "unmasked")), st.floats(0.01, 4), st.sampled_from(("softmax", "softmax_one")))
def test_the_order_of_keys_does_not_count(data: st.DataObject, empty_rows: str, scale: float, normalizer: str) -> None:
    attn = {
        "mask": "causal", "empty_rows": empty_rows, "scale": scale, "normalizer": normalizer,
        "heads": {"0:2": "exact", "2, 5": {"mask": "window(3)"}, "rest": {"scale": 2}},
    }  # fmt: skip
    shuffled = dict(data.draw(st.permutations(list(attn.items()))))
    shuffled["heads"] = dict(data.draw(st.permutations(list(attn["heads"].items()))))  # type: ignore[attr-defined]
    assert digest(attn) == digest(shuffled)


@settings(max_examples=40)
@given(
    st.lists(st.sampled_from(ATOMS), min_size=1, max_size=3, unique=True),
    st.lists(st.sampled_from(ATOMS), min_size=1, max_size=3),
)
def test_masks_with_one_digest_make_one_variant(some: list[str], others: list[str]) -> None:
    one, other = ({"attn": {"mask": " & ".join(atoms)}} for atoms in (some, others))
    if digest(one["attn"]) == digest(other["attn"]):
        assert asked(one).variant == asked(other).variant
    else:
        assert set(some) != set(others)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"mask": "causal"}, {"mask": "causal", "empty_rows": "zero"}),
        ({"heads": {"0:2": "exact"}}, {"heads": {":2:1": "exact"}}),
        ({"heads": {"0:2, 5": "exact"}}, {"heads": {"5, 0:2": "exact"}}),
        ({"geometry": [4, 8], "mask": "ball(3)"}, {"geometry": "image", "mask": "ball(3)"}),
        ({"storage": {"qk": "int8"}}, {"storage": {"qk": {"type": "int8", "smooth": False}}}),
        ({"mask": "causal"}, {"mask": "causal", "over": "tokens"}),
        ({"output": "norm(rms)"}, {"output": ["norm( rms )"]}),
    ],
)
def test_what_is_written_out_means_what_is_left_out(one: object, other: object) -> None:
    geometries = {"image": {"size": [4, 8], "before": 0}}
    assert digest(one, geometries=geometries) == digest(other, geometries=geometries)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (["h", "w"], ["w", "h"]),
        (["h", "w"], ["h", "h"]),
        (["h", 4], [1 << 20, 4]),
        ("square", [32, 32]),
    ],
)
def test_sizes_that_are_named_differ_as_their_names_do(one: object, other: object) -> None:
    assert digest({"geometry": one, "mask": "ball(3)"}) != digest({"geometry": other, "mask": "ball(3)"})


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"mask": "permuted(window(4), random(1))"}, {"mask": "permuted(window(4), random(2))"}),
        ({"mask": "permuted(window(4), random(seed=layer))"}, {"mask": "permuted(window(4), random(0))"}),
        ({"normalizer": "sigmoid(bias=0)"}, {"normalizer": "sigmoid(bias=1)"}),
        ({"heads": {"0": "exact"}, "scale": 2}, {"heads": {"1": "exact"}, "scale": 2}),
        ({"geometry": [8], "mask": "neighborhood(3, edge='zero')"}, {"geometry": [8], "mask": "neighborhood(3, edge='clip')"}),
        ({"mask": "same(a)"}, {"mask": "same(b)"}),
        ({"mask": "keys(near)"}, {"mask": "keys(far)"}),
        ({"select": {"size": 64}}, {"select": {"size": 32}}),
        ({"mix": MIX | {"weights": 1}}, {"mix": MIX | {"weights": 2}}),
        ({"mix": MIX | {"weights": 1}}, {"mix": MIX}),
        ({"output": ["norm(rms)", "local_conv(3)"]}, {"output": ["local_conv(3)", "norm(rms)"]}),
    ],
)
def test_what_means_another_thing_has_another_digest(one: object, other: object) -> None:
    names = {"labels": {"a": {"input": "x"}, "b": {"given": "x"}}, "roles": {"near": "-4:", "far": ":4"}}
    assert digest(one, **names) != digest(other, **names)


def test_what_is_added_holds_for_every_group_of_heads() -> None:
    found = groups(asked({"attn": {"heads": {"0:2": {"mask": "window(3)"}}}}, {"also": True, "attn": {"scale": 7}}))
    assert [group.scale for group in found.values()] == [const(7), const(7)]
    assert len({group.mask for group in found.values()}) == 2


@pytest.mark.parametrize(
    ("first", "added", "slot"),
    [
        ({"heads": {"0:2": {"mask": "window(3)"}}}, {"mask": "window(5)"}, "mask"),
        ({"mask": "window(5)"}, {"heads": {"0:2": {"mask": "window(3)"}}}, "mask"),
        ({"heads": {"0:2": {"scale": 1}}}, {"heads": {"2:4": {"mask": "window(3)"}}}, "heads"),
        ({"mask": "window(5)"}, {"empty_rows": "mean"}, "empty_rows"),
        ({"empty_rows": "mean"}, {"mask": "window(5)"}, "empty_rows"),
    ],
)
def test_what_some_heads_have_set_cannot_be_set_again(first: object, added: object, slot: str) -> None:
    found = asked({"attn": first}, {"also": True, "attn": added}).variant
    assert isinstance(found, Refusal)
    assert found.reason == f"`{slot}` is set by an earlier rule already"


def test_what_only_adds_leaves_the_decision_to_the_rules_after_it() -> None:
    found = asked({"also": True, "attn": {"scale": 7}}, {"attn": {"mask": "window(9)"}})
    assert found.rule == "rule 2"
    assert found.variant == asked({"attn": {"mask": "window(9)"}}).variant


@pytest.mark.parametrize("inner", ["split", {"heads": {"0": "exact"}}])
def test_a_group_of_heads_is_not_divided_again(inner: object) -> None:
    with pytest.raises(PolicyError, match="has no groups of its own"):
        digest({"heads": {"0:2": inner}}, variants={"split": {"heads": {"0": "exact"}}})
