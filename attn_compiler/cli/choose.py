"""`attn choose`: gives each head the cheapest of several variants whose measured error is small enough, as a policy file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from attn_compiler.calibration import calibrate, choose, write
from attn_compiler.cli.model_source import Asked, build
from attn_compiler.errors import PolicyError
from attn_compiler.planning.measured import beside
from attn_compiler.planning.yaml_text import read_yaml
from attn_compiler.whole_file import whole_file

_EXAMPLE = "`variants: {four: {storage: {qk: int4}}, eight: {storage: {qk: int8}}}`"


def chosen(
    model: Annotated[
        str, typer.Argument(help="package.module:factory, which may return (model, inputs), or hf:type,key=value….")
    ],
    candidates: Annotated[Path, typer.Argument(help="A policy file whose `variants` are tried, the cheapest first.")],
    within: Annotated[float, typer.Option(help="The largest error of a head's output (relative L2).", min=0.0)],
    output: Annotated[Path, typer.Option(help="The policy file to write; what it costs is written beside it.")],
    length: Annotated[int, typer.Option(help="Tokens of the input, where the factory gives none.", min=1)] = 256,
    batch: Annotated[int, typer.Option(help="Rows of that input.", min=1)] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the policy for programs.")] = False,
) -> None:
    """Measure several variants on a model, and write the policy that gives each head the first one that costs it little enough.

    Heads that bear none stay exact. What is written promises that error as its `tolerance`, and is measured as a whole.
    """
    variants = _variants(candidates)
    built = build(model, Asked(length, batch, weights=True))
    inputs: list[Any] = [built.kwargs or built.args]
    found = choose(built.model, variants, inputs, within)
    rules = [{**rule, "tolerance": {"site": within}} for rule in _rules(found)]
    policy: dict[str, Any] = {**found, "rules": rules}
    measured = calibrate(built.model, policy, inputs).measured
    assert measured is not None
    with whole_file(output) as file:
        file.write_text(yaml.safe_dump(policy, sort_keys=False, allow_unicode=True, width=120), encoding="utf-8")
    write(measured, beside(output))
    lines = [f"{_said(rule)}  {rule['match']['module']}" for rule in rules]
    typer.echo(json.dumps(policy, indent=2) if as_json else "\n".join(lines))
    if not as_json:
        typer.echo(f"\nwritten to {output}, and what it costs to {beside(output)}")


def _variants(path: Path) -> Mapping[str, Mapping[str, object]]:
    """The candidates of a file, in their order."""
    try:
        held = read_yaml(path.read_text(encoding="utf-8"), path.name).plain()
    except FileNotFoundError as error:
        raise PolicyError(f"there is no policy file {path}, whose `variants` could be tried") from error
    variants = held.get("variants") if isinstance(held, Mapping) else None
    if not isinstance(variants, Mapping) or not variants or not all(isinstance(slots, Mapping) for slots in variants.values()):
        raise PolicyError(f"{path} has no `variants`, each with its slots, the cheapest first: {_EXAMPLE}")
    assert isinstance(held, Mapping)
    other = sorted(set(held) - {"version", "because", "variants", "rules"})
    if other:
        raise PolicyError(f"{path}: the variants to choose from cannot read `{other[0]}`; write what they need into their slots")
    return variants


def _rules(policy: Mapping[str, object]) -> list[dict[str, Any]]:
    rules = policy["rules"]
    assert isinstance(rules, list)
    return rules


def _said(rule: Mapping[str, Any]) -> str:
    """How many heads got what."""
    asked = rule["attn"]
    if isinstance(asked, str):
        return f"all heads {asked}"
    counted = Counter({name: len(heads.split(", ")) for heads, name in asked["heads"].items()})
    return ", ".join(f"{count} heads {name}" for name, count in counted.most_common())
