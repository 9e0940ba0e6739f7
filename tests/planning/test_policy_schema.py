"""The schema for editors says of keys and types what the reader says."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from attn_compiler import library
from attn_compiler.errors import PolicyError
from attn_compiler.planning.schema import policy_schema
from attn_compiler.planning.yaml_text import read_yaml

FIXTURES = Path(__file__).parents[1] / "fixtures" / "policies"
FILES = [*sorted(FIXTURES.glob("*.yaml")), *(library.policy_path(name) for name in library.ready_policies())]
TYPES: Mapping[str, tuple[type, ...]] = {
    "string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,), "array": (list,), "object": (dict,),
}  # fmt: skip
KEYWORDS = {
    "$schema", "$defs", "$ref", "title", "type", "const", "enum", "anyOf", "properties", "required", "additionalProperties",
    "items", "minimum", "exclusiveMinimum", "minProperties", "maxProperties",
}  # fmt: skip


def fits(value: object, schema: object) -> bool:
    """JSON Schema, as far as the schema of a policy goes."""
    assert isinstance(schema, Mapping)
    assert schema.keys() <= KEYWORDS
    if "$ref" in schema:
        return fits(value, policy_schema()["$defs"][schema["$ref"].rpartition("/")[2]])  # type: ignore[index]
    kinds = [schema["type"]] if isinstance(schema.get("type"), str) else schema.get("type", [])
    if kinds and not any(isinstance(value, TYPES[kind]) and (kind == "boolean" or type(value) is not bool) for kind in kinds):
        return False
    if "const" in schema and (value != schema["const"] or type(value) is not type(schema["const"])):
        return False
    if ("enum" in schema and value not in schema["enum"]) or (
        "anyOf" in schema and not any(fits(value, s) for s in schema["anyOf"])
    ):
        return False
    if isinstance(value, int | float) and (
        value < schema.get("minimum", value) or value <= schema.get("exclusiveMinimum", value - 1)
    ):
        return False
    if isinstance(value, list):
        return all(fits(one, schema.get("items", {})) for one in value)
    return not isinstance(value, dict) or _mapping_fits(value, schema)


def _mapping_fits(value: dict[str, object], schema: Mapping[str, object]) -> bool:
    known, other = schema.get("properties", {}), schema.get("additionalProperties", {})
    assert isinstance(known, Mapping)
    counted = schema.get("minProperties", 0) <= len(value) <= schema.get("maxProperties", len(value))  # type: ignore[operator]
    if not counted or not set(schema.get("required", ())) <= value.keys():  # type: ignore[call-overload]
        return False
    return all(
        fits(inner, known[key]) if key in known else other is not False and fits(inner, other) for key, inner in value.items()
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_policy_that_loads_fits_the_schema(path: Path) -> None:
    assert fits(read_yaml(path.read_text(encoding="utf-8"), path.name).plain(), policy_schema())


@pytest.mark.parametrize(
    "text",
    [
        "rules: []",
        "version: 2",
        "version: true",
        "version: 1\nruls: []",
        "version: 1\nrules: {}",
        "version: 1\nrules: [{match: {}}]",
        "version: 1\nrules: [{attn: 3}]",
        "version: 1\nrules: [{attn: {msk: causal}}]",
        "version: 1\nrules: [{attn: {mask: [causal]}}]",
        "version: 1\nrules: [{attn: {empty_rows: nan}}]",
        "version: 1\nrules: [{attn: {heads: [exact]}}]",
        "version: 1\nrules: [{attn: {heads: {rest: 3}}}]",
        "version: 1\nrules: [{attn: {over: rows}}]",
        "version: 1\nrules: [{attn: {select: {represent: mean}}}]",
        "version: 1\nrules: [{attn: {select: {size: 0}}}]",
        "version: 1\nrules: [{attn: {mix: {how: sum}}}]",
        "version: 1\nrules: [{attn: {mix: {how: add, branches: {a: exact}}}}]",
        "version: 1\nrules: [{attn: {storage: {qk: {per: token}}}}]",
        "version: 1\nrules: [{attn: {storage: {qk: {type: int8, outliers: 0}}}}]",
        "version: 1\nrules: [{attn: exact, also: 1}]",
        "version: 1\nrules: [{attn: exact, fallback: warn}]",
        "version: 1\nrules: [{attn: exact, untrained: maybe}]",
        "version: 1\nrules: [{attn: exact, tolerance: {site: -1}}]",
        "version: 1\nrules: [{attn: exact, match: {kind: other}}]",
        "version: 1\nrules: [{attn: exact, match: {module: 3}}]",
        "version: 1\nrules: [{attn: exact, match: {layers: 0.5}}]",
        "version: 1\nrules: [{attn: exact, match: {min_tokens: -1}}]",
        "version: 1\ngeometries: {image: {before: 3}}",
        "version: 1\nlabels: {turn: {input: a, given: b}}",
        "version: 1\nlabels: {turn: {}}",
        "version: 1\nroles: {text: true}",
    ],
)
def test_what_the_schema_refuses_the_reader_refuses(text: str) -> None:
    assert not fits(read_yaml(text, "policy").plain(), policy_schema())
    with pytest.raises(PolicyError):
        library.load_policy(text + "\n")


def test_the_schema_is_json() -> None:
    assert json.loads(json.dumps(policy_schema())) == policy_schema()
