"""`attn check`: what a policy file says, all that is wrong with it, and the schema for editors."""

import json
from pathlib import Path

from typer.testing import CliRunner

from attn_compiler.cli import app
from attn_compiler.planning.schema import policy_schema

runner = CliRunner()


def test_the_schema_for_editors_is_printed() -> None:
    result = runner.invoke(app, ["check", "--schema"])
    assert result.exit_code == 0
    assert json.loads(result.stdout) == policy_schema()


def test_a_check_of_nothing_names_the_ready_policies() -> None:
    result = runner.invoke(app, ["check"])
    assert result.exit_code == 2
    assert "streaming" in result.stderr


def test_a_checked_policy_shows_its_rules_and_its_digest(tmp_path: Path) -> None:
    policy = tmp_path / "window.attn.yaml"
    policy.write_text("version: 1\nrules:\n  - {match: {kind: self, layers: '0:2'}, attn: {mask: causal}}\n", encoding="utf-8")
    shown = runner.invoke(app, ["check", str(policy)])
    assert shown.exit_code == 0
    assert "rule 1: self, in layers 0:2 → mask: causal" in shown.stdout
    found = json.loads(runner.invoke(app, ["check", str(policy), "--json"]).stdout)
    assert found["digest"] in shown.stdout
    assert found["rules"][0]["attn"] == {"mask": "causal"}


def test_a_wrong_policy_exits_with_one_and_says_where(tmp_path: Path) -> None:
    policy = tmp_path / "wrong.attn.yaml"
    policy.write_text("version: 1\nrules:\n  - {match: {kind: self}, attn: {mask: causl}}\n", encoding="utf-8")
    shown, read = (runner.invoke(app, ["check", str(policy), *more]) for more in ([], ["--json"]))
    assert (shown.exit_code, read.exit_code) == (1, 1)
    assert "wrong.attn.yaml:3" in shown.stderr
    assert json.loads(read.stdout)["ok"] is False


def test_one_check_says_every_fault_of_a_rule(tmp_path: Path) -> None:
    policy = tmp_path / "wrong.attn.yaml"
    lines = [
        "version: 1",
        "rules:",
        "  - matches: {}",
        "    match: {kind: slef}",
        "    attn:",
        "      geometry: [4, 4]",
        "      mask: neighborhod(3)",
        "      score: softcp(score, 3)",
        "      nomralizer: softmax",
        "  - attn: {mask: causl}",
    ]
    policy.write_text("\n".join(lines), encoding="utf-8")
    shown = runner.invoke(app, ["check", str(policy)])
    assert all(f"wrong.attn.yaml:{number}:" in shown.stderr for number in (3, 4, 7, 8, 9, 10))
    assert not any(f"wrong.attn.yaml:{number}:" in shown.stderr for number in (1, 2, 5, 6))
