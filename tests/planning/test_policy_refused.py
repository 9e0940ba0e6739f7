"""Policies that are refused when they are read: what would be misread, half read, or never hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from attn_compiler import library
from attn_compiler.errors import PolicyError


def rule(attn: str = "exact", match: str = "{}") -> str:
    return f"version: 1\nrules:\n  - match: {match}\n    attn: {attn}\n"


def refused(text: object) -> str:
    with pytest.raises(PolicyError) as caught:
        library.load_policy(text)  # type: ignore[arg-type]
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "place", "said"),
    [
        (rule("{mask: window(4, right=2)}"), "policy:4:28", "quote it"),
        (rule("{mask: strided(4, 2, head_step=1) & causal, scale: 1}"), "policy:4:29", "quote it"),
        (rule("{heads: {rest: {mask: window(4, 2)}}}"), "policy:4:43", "quote it"),
        (rule("{mask: chunks([7, 7], shift=3)}"), "policy:4:25", "into quotes"),
        (rule(match="{layers: 0:2, -1}"), "policy:3:26", "quote it"),
        (rule(match="{kind: []}"), "policy:3:19", "found an empty list"),
        (rule(match="{layers: [0, 1]}"), "policy:3:21", "found a list"),
        (rule(match="{min_tokens: 9, max_tokens: 3}"), "policy:3:40", "at least `min_tokens`, 9"),
        (rule(match="{min_tokens: 1_000}"), "policy:3:25", "expected a number of tokens, found '1_000'"),
        (rule("[causal]"), "policy:4:11", "found a list"),
        (rule("{geometry: [0, 4], mask: ball(2)}"), "policy:4:22", "at least 1, not 0"),
        (rule("{mask: ball(2)}"), "policy:4:18", "set the slot `geometry`"),
        (rule("{storage: {qk: int9}}"), "policy:4:26", 'did you mean "int8"'),
        (rule("{feature: elu}"), "policy:4:21", 'there is no word "elu" in features'),
        (rule("{over: chanels}"), "policy:4:18", 'did you mean "channels"'),
        (rule("{emit: [row]}"), "policy:4:19", 'did you mean "rows"'),
        (rule("{empty_rows: nan}"), "policy:4:24", "expected one of zero, mean, unmasked"),
        (rule("{operands: {q: qq}}"), "policy:4:26", "q_unrotated"),
        (rule("{operands: {gat: x}}"), "policy:4:23", 'did you mean "gate"'),
        (rule("{select: {represent: mean}}"), "policy:4:20", "needs the `size`"),
        (rule("{select: {size: 0}}"), "policy:4:27", "at least 1, found 0"),
        (rule("{select: {size: 3, choose: tpo(3)}}"), "policy:4:38", 'no word "tpo" in selectors'),
        (rule("{select: {size: 3, always: [frist]}}"), "policy:4:39", 'did you mean "first"'),
        (rule("{storage: {qk: {per: token}}}"), "policy:4:26", "needs a `type`"),
        (rule("{storage: {qk: {type: token}}}"), "policy:4:33", "expected a type"),
        (rule("{storage: {qk: {type: int8, per: int8}}}"), "policy:4:44", "shares a scale"),
        (rule("{storage: {qk: {type: int8, smooth: 1}}}"), "policy:4:47", "true or false"),
        (rule("{storage: {qk: {type: int8, outliers: -6}}}"), "policy:4:49", "above 0, found -6"),
        (rule("{mix: {how: sum}}"), "policy:4:17", "`how` and `branches`"),
        (rule("{mix: {how: sum, branches: {a: {msk: causal}}}}"), "policy:4:43", 'did you mean "mask"'),
        (rule("{mix: {how: sum, branches: {near: exact}, weights: {naer: 1}}}"), "policy:4:63", 'did you mean "near"'),
        ("version: 1.0\nrules: []\n", "policy:1:10", "version 1, found 1.0"),
        ("version: true\nrules: []\n", "policy:1:10", "version 1, found True"),
        ("version: 1\nrules: !!python/object:os.system []\n", "policy:2:8", "tags"),
        ("version: 1\nvariants: &a {x: *a}\nrules: []\n", "policy", "inside of what it names"),
        ("version: 1\nvariants: {exact: {mask: causal}}\nrules: []\n", "policy:2:19", "another name"),
        ("version: 1\nroles: {a: {given: x}}\nlabels: {a: {given: y}}\n", "policy:3:13", "stands among `roles` already"),
        ('version: 1\nroles: {class: "0:1"}\nrules: []\n', "policy:2:16", "a word of Python; give it another name"),
        ("version: 1\nlabels: {my-turn: {given: x}}\nrules: []\n", "policy:2:19", "letters, digits and `_` alone"),
        ("version: 1\nroles: {a: {values: [1, 0]}}\nrules: []\n", "policy:2:12", "needs a table of truth values"),
        ("version: 1\nlabels: {a: {values: [1.5, 0]}}\nrules: []\n", "policy:2:13", "needs a table of whole numbers"),
        ("version: 1\nlabels: {a: {values: [[1], [1, 2]]}}\nrules: []\n", "policy:2:22", "one length"),
        ("version: 1\ngeometries: {g: {size: [4, 4], before: true}}\n", "policy:2:17", "whole numbers"),
        ("version: 1\nrules: []\n---\nversion: 1\n", "policy:3:1", "another document"),
        ("version: 2", "policy:1:10", "version 1, found 2"),
        ("   ", "policy", "the file is empty"),
    ],
)
def test_what_would_be_misread_is_refused_at_its_place(text: str, place: str, said: str) -> None:
    message = refused(text)
    assert message.startswith(f"{place}: ")
    assert said in message


@pytest.mark.parametrize("source", [3, None, ["version: 1"]])
def test_what_is_no_policy_at_all_is_told_what_one_is(source: object) -> None:
    assert "a path, the name of a ready policy, YAML text or a mapping" in refused(source)


def test_a_mapping_names_the_way_to_what_is_wrong() -> None:
    assert refused({"version": 1, "rules": [{"attn": {"msk": "causal"}}]}).startswith("policy.rules[0].attn")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.json", b"{"),
        ("t.json", b"\xff\xfe"),
        ("t.json", b"[" * 100_000),
        ("t.json", b'{"a": [1], "a": [2]}'),
        ("t.json", b'{"a.b": [1], "a": {"b": [2]}}'),
        ("t.npz", b""),
        ("t.npz", b"junk"),
        ("t.npz", b"PK\x03\x04 cut short"),
        ("t.safetensors", b"junk"),
        ("t.txt", b"[1]"),
    ],
)
def test_a_damaged_file_of_tables_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    path = tmp_path / "p.yaml"
    path.write_text(f"version: 1\ndata: {{x: {name}}}\nrules: []\n")
    message = refused(path)
    assert message.startswith("p.yaml:2:11: ")
    assert name in message
    assert "pickle" not in message


def test_no_pickle_is_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", a=np.array([{1}], dtype=object))
    path = tmp_path / "p.yaml"
    path.write_text("version: 1\ndata: {x: t.npz}\nrules: []\n")
    assert "t.npz cannot be read" in refused(path)
