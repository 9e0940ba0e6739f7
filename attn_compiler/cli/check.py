"""`attn check`: whether a policy file can be read, and what it says."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from attn_compiler.errors import AttnError
from attn_compiler.library import load_policy, ready_policies
from attn_compiler.planning.policy import Policy, Rule
from attn_compiler.planning.schema import policy_schema


def check(
    policy: Annotated[str | None, typer.Argument(help="A policy file, or the name of a ready policy.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result for programs.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print a JSON Schema of policy files, for editors.")] = False,
) -> None:
    """Check a policy file: print its rules and its digest, or all that is wrong with it.

    `attn check --schema > attn.schema.json` writes what an editor needs to complete and check policies while they are typed.
    """
    if schema:
        typer.echo(json.dumps(policy_schema(), indent=2))
        return
    if policy is None:
        raise typer.BadParameter(f"name a policy file or a ready policy: {', '.join(ready_policies())}", param_hint="POLICY")
    try:
        found = load_policy(policy)
    except AttnError as error:
        if not as_json:
            typer.echo(str(error), err=True)
        else:
            typer.echo(json.dumps({"ok": False, "error": str(error)}, ensure_ascii=False))
        raise typer.Exit(1) from error
    if as_json:
        typer.echo(json.dumps(_record(found), ensure_ascii=False))
    else:
        _print(found)


def _print(policy: Policy) -> None:
    typer.echo(f"{policy.name or 'policy'} is a policy of {len(policy.rules)} rule{'' if len(policy.rules) == 1 else 's'}")
    if policy.because:
        typer.echo(f"  because {policy.because.strip()}")
    for rule in policy.rules:
        typer.echo(f"  {rule.title}: {rule.match} → {_says(rule)}")
        if rule.because:
            typer.echo(f"    because {rule.because.strip()}")
    typer.echo(f"  digest {policy.digest}")


def _record(policy: Policy) -> dict[str, object]:
    rules = [
        {
            "number": r.number,
            "name": r.name,
            "where": str(r.match),
            "attn": r.attn.plain(),
            "also": r.also,
            "fallback": r.fallback,
        }
        for r in policy.rules
    ]
    return {"ok": True, "name": policy.name, "digest": policy.digest, "rules": rules}


def _says(rule: Rule) -> str:
    said = rule.attn.plain()
    if not isinstance(said, dict):
        return str(said)
    return ", ".join(f"{slot}: {value if isinstance(value, str) else json.dumps(value)}" for slot, value in said.items())
