"""`attn calibrate`: what a policy costs the attentions of a model, measured, and kept beside the policy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from attn_compiler.calibration import calibrate as calibrated
from attn_compiler.calibration import fix_scales, write
from attn_compiler.cli.model_source import Asked, build
from attn_compiler.errors import PolicyError
from attn_compiler.planning.measured import Measured, beside
from attn_compiler.planning.yaml_text import read_yaml
from attn_compiler.whole_file import whole_file


def calibrate(
    model: Annotated[
        str, typer.Argument(help="package.module:factory, which may return (model, inputs), or hf:type,key=value….")
    ],
    policy: Annotated[Path, typer.Argument(help="A policy file.")],
    length: Annotated[int, typer.Option(help="Tokens of the input, where the factory gives none.", min=1)] = 256,
    batch: Annotated[int, typer.Option(help="Rows of that input.", min=1)] = 1,
    static: Annotated[
        Path | None, typer.Option(help="Also write the policy with scales fixed by what was seen, here; costs are those of it.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the costs for programs.")] = False,
) -> None:
    """Measure what a policy costs a model, attention by attention and head by head, and write that beside the policy.

    From then on, its rules with a `tolerance` are carried out where the costs keep it, and refused with the figures elsewhere.
    Inputs that a factory returns are what is measured on; a model named hf:… has random weights and gets random tokens.
    """
    if not policy.is_file():
        raise PolicyError(f"there is no policy file {policy}, beside which costs could be written")
    built = build(model, Asked(length, batch, weights=True))
    inputs: list[Any] = [built.kwargs or built.args]
    if static is not None:
        fixed = fix_scales(built.model, _plain(policy), inputs)
        with whole_file(static) as file:
            file.write_text(yaml.safe_dump(fixed, sort_keys=False, allow_unicode=True, width=120), encoding="utf-8")
        policy = static
    found = calibrated(built.model, policy, inputs).measured
    assert found is not None
    write(found, beside(policy))
    typer.echo(found.to_json() if as_json else "\n".join(_lines(found)))
    if not as_json:
        typer.echo(f"\nwritten to {beside(policy)}")


def _plain(policy: Path) -> Mapping[str, Any]:
    """What stands in a policy file."""
    held = read_yaml(policy.read_text(encoding="utf-8"), policy.name).plain()
    if not isinstance(held, Mapping) or "rules" not in held:
        raise PolicyError(f"{policy} has no `rules` whose scales could be fixed")
    return held


def _lines(found: Measured) -> list[str]:
    lines = [f"{'relative L2':>12} {'cosine':>9} {'largest':>9}  worst head"]
    for site, cost in found.sites.items():
        worst = max(range(len(cost.heads)), key=lambda head: cost.heads[head].relative)
        whole = cost.whole
        said = f"{whole.relative:12.3g} {whole.cosine:9.6f} {whole.largest:9.3g}"
        lines.append(f"{said}  {worst} ({cost.heads[worst].relative:.3g})  {site}")
    if found.logits:
        said = f"{found.logits.relative:12.3g} {found.logits.cosine:9.6f} {found.logits.largest:9.3g}"
        lines.append(f"{said}  the model's result, {found.divergence:.3g} nats apart as logits")
    return lines
