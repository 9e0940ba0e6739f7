"""A JSON Schema of the policy file, for editors: made from the tables that the reader itself goes by.

It knows keys and types. What a text of the policy language may say only the reader knows, with line and column.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from attn_compiler.algebra.variant import EmptyRows
from attn_compiler.planning.mixes import HOW
from attn_compiler.planning.operand_names import RECORDED
from attn_compiler.planning.policy_file import FILE_KEYS, MATCH_KEYS, RULE_KEYS
from attn_compiler.planning.site import Kind, Phase
from attn_compiler.planning.slots import SLOTS
from attn_compiler.planning.sources import KEYS
from attn_compiler.planning.storing import STORED

Schema = Mapping[str, object]

TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
POSITIVE: Schema = {"type": "integer", "minimum": 1}
AMOUNT: Schema = {"type": "number", "minimum": 0}
EXPRESSION: Schema = {"type": ["string", "number"]}
INTEGERS: Schema = {"type": ["string", "integer"]}  # the grammar "0:4, -1"
VARIANT: Schema = {"$ref": "#/$defs/variant"}
SOURCE: Schema = {"$ref": "#/$defs/source"}


def policy_schema() -> dict[str, object]:
    """The schema of a policy file. A key that the reader knows and this does not is an error here."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A policy of attn-compiler",
        **_closed(FILE_KEYS, _FILE, required=("version",)),
        "$defs": {
            "variant": {"anyOf": [TEXT, {"$ref": "#/$defs/slots"}]},
            "slots": _closed(SLOTS, _SLOTS),
            "rule": _closed(RULE_KEYS, _RULE, required=("attn",)),
            "source": {**_closed(KEYS, _SOURCE), "minProperties": 1, "maxProperties": 1},
        },
    }


def _closed(keys: Iterable[str], known: Mapping[str, Schema], required: Iterable[str] = ()) -> dict[str, object]:
    """A mapping with these keys and no others."""
    properties = {key: known[key] for key in keys}
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def _by_name(value: Schema) -> Schema:
    return {"type": "object", "additionalProperties": value}


def _listed(value: Schema) -> Schema:
    return {"type": "array", "items": value}


def _one_or_several(value: Schema) -> Schema:
    return {"anyOf": [value, _listed(value)]}


def _words(words: Iterable[str]) -> Schema:
    return {"enum": list(words)}


_SIZE: Schema = {"anyOf": [TEXT, _listed({"type": ["integer", "string"]})]}
_GEOMETRY = _closed(("size", "before", "after"), {"size": _SIZE, "before": COUNT, "after": COUNT}, required=("size",))
_SIZED: Schema = {"type": "number", "exclusiveMinimum": 0}
_HELD: Mapping[str, Schema] = {
    "type": TEXT, "per": TEXT, "smooth": FLAG, "outliers": _SIZED,
    "largest": {"anyOf": [_SIZED, {"type": "array", "items": _SIZED, "minItems": 1, "maxItems": 2}]},
}  # fmt: skip
_STORAGE: Schema = {"anyOf": [TEXT, _closed(_HELD, _HELD, required=("type",))]}
_MIX: Mapping[str, Schema] = {
    "how": _words(HOW),
    "branches": _by_name(VARIANT),
    "weights": {"anyOf": [EXPRESSION, _by_name(EXPRESSION)]},
}
_SELECT: Mapping[str, Schema] = {
    "size": POSITIVE, "represent": EXPRESSION, "choose": EXPRESSION, "scope": _words(("head", "shared", "token")),
    "always": _one_or_several(_words(("first", "self"))),
}  # fmt: skip
_SLOTS: Mapping[str, Schema] = {
    "geometry": _SIZE,
    "mask": EXPRESSION,
    "empty_rows": _words(rule.value for rule in EmptyRows if rule is not EmptyRows.NAN),
    "heads": _by_name(VARIANT),
    "mix": _closed(_MIX, _MIX, required=("how", "branches")),
    "over": _words(("tokens", "channels")),
    "select": _closed(_SELECT, _SELECT, required=("size",)),
    "operands": _closed(tuple(RECORDED), {name: _words(known) for name, known in RECORDED.items()}),
    "storage": _closed(STORED, dict.fromkeys(STORED, _STORAGE)),
    "emit": _one_or_several(_words(("rows", "columns", "column_sums"))),
    **dict.fromkeys(("order", "scale", "score", "normalizer", "feature", "state"), EXPRESSION),
    **dict.fromkeys(("context", "edit", "output"), _one_or_several(EXPRESSION)),
}
_MATCH: Mapping[str, Schema] = {
    "module": TEXT,
    "kind": _one_or_several(_words(kind.value for kind in Kind)),
    "layers": INTEGERS,
    "phase": _one_or_several(_words(phase.value for phase in Phase)),
    "min_tokens": COUNT,
    "max_tokens": COUNT,
}
_RULE: Mapping[str, Schema] = {
    "match": _closed(MATCH_KEYS, _MATCH),
    "attn": VARIANT,
    "fallback": _words(("exact", "error")),
    "tolerance": _closed(("site", "logits"), {"site": AMOUNT, "logits": AMOUNT}),
    "untrained": _words(("refuse", "allow")),
    **dict.fromkeys(("name", "because"), TEXT),
    **dict.fromkeys(("also", "replace_mask"), FLAG),
}
_SOURCE: Mapping[str, Schema] = {"values": _listed({}), **dict.fromkeys(("input", "given", "file"), TEXT)}
_FILE: Mapping[str, Schema] = {
    "version": {"const": 1},
    "geometries": _by_name(_GEOMETRY),
    "roles": _by_name({"anyOf": [INTEGERS, SOURCE]}),
    "labels": _by_name(SOURCE),
    "data": _by_name(TEXT),
    "variants": _by_name(VARIANT),
    "rules": _listed({"$ref": "#/$defs/rule"}),
    **dict.fromkeys(("because", "parameters"), TEXT),
}
