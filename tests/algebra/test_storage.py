"""How operands are held, as a value: on the wire, in words, and refused by whoever does not know it."""

from __future__ import annotations

import pytest

from attn_compiler import library
from attn_compiler.algebra import wire
from attn_compiler.algebra.integers import IntegerSet
from attn_compiler.algebra.storage import Storage
from attn_compiler.algebra.variant import Variant, passed_over
from attn_compiler.errors import PolicyError
from attn_compiler.planning.language import Scope
from attn_compiler.planning.storing import read_storage
from attn_compiler.planning.yaml_text import entry_of


def storage(slots: object) -> Storage:
    return read_storage(entry_of(slots), library.words(), Scope())


WRITTEN = [
    {"qk": "int8"},
    {"qk": {"type": "int8", "per": "block(64)", "smooth": True}, "pv": "bf16"},
    {"kv_cache": {"type": "nvfp4", "outliers": 6}, "pv": "mxfp4"},
]


@pytest.mark.parametrize("slots", WRITTEN, ids=str)
def test_a_storage_survives_the_wire_in_a_variant_and_in_its_groups(slots: object) -> None:
    variant = Variant(storage=storage(slots), groups=((IntegerSet.parse("0:2"), Variant(storage=storage({"pv": "fp8_e5m2"}))),))
    assert wire.read(wire.write(variant)) == variant
    assert wire.write(variant) != wire.write(Variant(groups=variant.groups))


def test_a_storage_says_how_its_operands_are_held() -> None:
    said = {operand: str(how) for operand, how in storage(WRITTEN[1]).held()}
    assert said == {"qk": "int8, per block(64), smoothed", "pv": "bf16"}
    assert str(storage(WRITTEN[2]).kv_cache) == "nvfp4, channels from 6 on apart"


def test_what_shares_a_scale_is_the_operand_s_own_unless_said() -> None:
    found = storage({"qk": "int8", "pv": "int8", "kv_cache": "int8"})
    assert [str(how) for _, how in found.held()] == ["int8, per token", "int8, per channel", "int8, per token"]


@pytest.mark.parametrize("name", ["nvfp4", "bf16"])
def test_types_that_say_themselves_what_shares_a_scale_are_not_told(name: str) -> None:
    with pytest.raises(PolicyError, match="leave `per` out"):
        storage({"qk": {"type": name, "per": "token"}})


def test_whoever_does_not_know_a_storage_has_something_against_it() -> None:
    inside = Variant(groups=((IntegerSet.parse(0), Variant(storage=storage({"qk": "int8"}))),))
    assert passed_over(Variant()) is None
    assert passed_over(inside) == "it does not carry `storage`"
    assert passed_over(inside, ("storage",)) is None
