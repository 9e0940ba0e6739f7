"""Policy files: the worked examples load, and whatever is wrong with a file is said with its place."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from attn_compiler import library
from attn_compiler.algebra.expr import k, k_len, log, q, sqrt
from attn_compiler.algebra.simplify import simplify
from attn_compiler.errors import PolicyError
from attn_compiler.planning.policy import Policy
from attn_compiler.planning.site import Kind
from attn_compiler.planning.slots import Slots, read_slots

EXAMPLES = sorted((Path(__file__).parents[1] / "fixtures" / "policies").glob("*.yaml"))


def slots_of(policy: Policy, rule: int) -> Slots:
    """What a rule sets, read as if at a site of layer 3."""
    read = read_slots(policy.rules[rule].attn, policy.naming)
    assert read is not None
    return read


def rule(attn: str, *, match: str = "{}", more: str = "") -> str:
    return f"version: 1\nrules:\n  - match: {match}\n    attn: {attn}\n{more}"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_a_worked_example_loads(path: Path) -> None:
    policy = library.load_policy(path)
    assert policy.rules
    assert len(policy.digest) == 64


@pytest.mark.parametrize("name", library.ready_policies())
def test_a_ready_policy_loads_and_says_why_it_exists(name: str) -> None:
    policy = library.load_policy(name)
    assert policy.because
    assert all(not (slots and slots.unsupported()) for slots in (read_slots(r.attn, policy.naming) for r in policy.rules))


def test_the_streaming_example_means_what_it_says() -> None:
    policy = library.load_policy(EXAMPLES[0].parent / "streaming.yaml")
    assert read_slots(policy.rules[0].attn, policy.naming) is None
    assert policy.rules[0].match.kind == (Kind.SELF,)
    assert policy.rules[0].match.layers is not None
    assert policy.rules[0].match.layers.members(8) == {0, 1, 7}
    mask = slots_of(policy, 1).mask
    assert mask is not None
    assert simplify(mask.keep) == simplify((k <= q) & ((abs(q - k) < 1024) | (k < 4)))


def test_a_scale_is_an_expression() -> None:
    scale = slots_of(library.load_policy(EXAMPLES[0].parent / "video_neighborhood.yaml"), 0).scale
    assert scale is not None
    assert scale.mentions(k_len)
    assert sqrt(log(k_len)).op == scale.op


@pytest.mark.parametrize(
    ("text", "place", "said"),
    [
        ("version: 2\nrules: []\n", "policy:1:10", "version 1, found 2"),
        ("rules: []\n", "policy:1:1", "`version: 1` is missing"),
        ("version: 1\nrulez: []\n", "policy:2:1", 'did you mean "rules"'),
        ("version: 1\nversion: 1\n", "policy:2:1", "stands here twice; it was first at line 1"),
        (rule("{mask: cuasal}"), "policy:4:18", 'did you mean "causal"'),
        (rule("{mask: window(-1)}"), "policy:4:18", "at least 1, found `-1`"),
        (rule("{mask: window(4, 2)}"), "policy:4:28", "quote it"),
        (rule("{maks: causal}"), "policy:4:12", 'did you mean "mask"'),
        (rule("{mask: causal and window(3)}"), "policy:4:18", "write `&` instead of `and`"),
        (rule("nope"), "policy:4:11", 'unknown variant "nope"'),
        (rule("{heads: {'0:2': exact, '1:3': exact}}"), "policy:4:19", "head 1 is named twice"),
        (rule("{heads: {'0:2:0': exact}}"), "policy:4:20", "the step"),
        (rule("exact", match="{layers: '0:2:0'}"), "policy:3:21", "the step"),
        (rule("exact", match="{kind: slf}"), "policy:3:19", "expected self, cross, joint, pool"),
        (rule("exact", match="{min_tokens: many}"), "policy:3:25", "expected a number of tokens"),
        (rule("exact", match="{modul: x}"), "policy:3:13", 'did you mean "module"'),
        (rule("exact", more="    fallback: dense\n"), "policy:5:15", "exact or error"),
        (rule("exact", more="    also: yes\n"), "policy:5:11", "true or false, found 'yes'"),
        ("version: 1\nrules: exact\n", "policy:2:8", "`rules` is a list"),
        ("version: 1\nrules:\n  - {match: {}}\n", "policy:3:5", "has no `attn`"),
        ("version: 1\ndata: {x: y.json}\nrules: []\n", "policy:2:11", "there is no file y.json"),
        ("version: 1\nlabels: {d: {inptu: ids}}\nrules: []\n", "policy:2:14", 'did you mean "input"'),
        ("version: 1\ngeometries: {g: {size: [4, 4], befor: 1}}\nrules: []\n", "policy:2:32", 'did you mean "before"'),
        ("version: 1\nvariants:\n  a: b\n  b: a\nrules: []\n", "policy:", "contains itself"),
        ("a: [\n", "policy:2:1", "no YAML"),
        ("- 1\n- 2\n", "policy:1:1", "found a list"),
        ("\n", "policy", "the file is empty"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(text: str, place: str, said: str) -> None:
    with pytest.raises(PolicyError) as caught:
        library.load_policy(text)
    assert place in str(caught.value)
    assert said in str(caught.value)


def test_all_errors_of_a_file_are_said_together() -> None:
    with pytest.raises(PolicyError) as caught:
        library.load_policy("version: 1\nrules:\n  - {attn: {mask: cuasal}}\n  - {attn: {maks: causal}}\n")
    assert "policy:3:" in str(caught.value)
    assert "policy:4:" in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="there is no policy file"):
        library.load_policy(tmp_path / "missing.yaml")
    with pytest.raises(PolicyError, match="cannot be read"):
        library.load_policy(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PolicyError, match="cannot be read"):
        library.load_policy(tmp_path / "binary.yaml")


def test_yaml_is_read_as_version_1_2(tmp_path: Path) -> None:
    policy = library.load_policy(rule("{heads: {4:8: exact, rest: {mask: causal}}}", more="    tolerance: {site: 1e-3}\n"))
    assert policy.rules[0].tolerance == {"site": 1e-3}
    assert slots_of(policy, 0).heads[0][0] is not None
    assert str(slots_of(policy, 0).heads[0][0]) == "4:8"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (rule("{mask: causal & window(4)}"), rule("{mask: 'window( 4 ) & (causal)'}")),
        (rule("{mask: sinks(2) | window(4)}"), "# why\n" + rule("{mask: window(4) | sinks(2)}")),
        (
            rule("{mask: causal}"),
            "rules:\n  - attn: {mask: causal}\n    match: {}\n    fallback: exact\n    also: false\nversion: 1\n",
        ),
        (rule("near").replace("rules:", "variants: {near: {mask: causal}}\nrules:"), rule("{mask: causal}")),
        (rule("{mask: causal}"), rule("{mask: causal}", more="    because: reasons\n    name: first\n")),
    ],
)
def test_what_means_the_same_has_one_digest(one: str, other: str) -> None:
    assert library.load_policy(one).digest == library.load_policy(other).digest


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (rule("{mask: causal & window(4)}"), rule("{mask: causal & window(5)}")),
        (rule("{mask: causal}"), rule("exact")),
        (rule("{mask: causal}"), rule("{mask: causal}", more="    fallback: error\n")),
        (rule("{mask: causal}"), rule("{mask: causal}", match="{kind: self}")),
        (rule("{mask: causal}"), rule("{mask: causal}", more="    replace_mask: true\n")),
        (rule("{mask: causal, scale: 0.5}"), rule("{mask: causal, scale: 0.25}")),
    ],
)
def test_what_means_another_thing_has_another_digest(one: str, other: str) -> None:
    assert library.load_policy(one).digest != library.load_policy(other).digest


def test_the_contents_of_named_files_count(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text("version: 1\ndata: {spans: s.json}\nrules: [{attn: {mask: 'causal & span(spans.a, spans.b)'}}]\n")
    digests = set()
    for alpha in (1.0, 2.0):
        (tmp_path / "s.json").write_text(json.dumps({"a": [alpha], "b": [0.5]}))
        digests.add(library.load_policy(path).digest)
    assert len(digests) == 2


def test_tables_are_read_from_every_kind_of_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", a=np.arange(3))
    (tmp_path / "t.yaml").write_text("a: [1, 2]\nb: {c: [0.5]}\n")
    policy = tmp_path / "p.yaml"
    policy.write_text("version: 1\ndata: {x: t.npz, y: t.yaml}\nlabels: {z: {values: [0, 0, 1]}}\nrules: []\n")
    tables = library.load_policy(policy).tables
    assert {name: source.array.tolist() for name, source in tables.items() if source.array is not None} == {
        "x.a": [0, 1, 2],
        "y.a": [1, 2],
        "y.b.c": [0.5],
        "z": [0, 0, 1],
    }


def test_a_mapping_and_its_text_are_one_policy() -> None:
    mapping = {"version": 1, "rules": [{"match": {}, "attn": {"mask": "causal"}}]}
    assert library.load_policy(mapping).digest == library.load_policy(rule("{mask: causal}")).digest
