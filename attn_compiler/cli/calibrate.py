"""`attn calibrate`: what a policy costs the attentions of a model, measured, and kept beside the policy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from attn_compiler.calibration import calibrate as calibrated
from attn_compiler.calibration import write
from attn_compiler.cli.model_source import Asked, build
from attn_compiler.errors import PolicyError
from attn_compiler.planning.measured import Measured, beside


def calibrate(
    model: Annotated[
        str, typer.Argument(help="package.module:factory, which may return (model, inputs), or hf:type,key=value….")
    ],
    policy: Annotated[Path, typer.Argument(help="A policy file.")],
    length: Annotated[int, typer.Option(help="Tokens of the input, where the factory gives none.", min=1)] = 256,
    batch: Annotated[int, typer.Option(help="Rows of that input.", min=1)] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the costs for programs.")] = False,
) -> None:
    """Measure what a policy costs a model, attention by attention and head by head, and write that beside the policy.

    From then on, its rules with a `tolerance` are carried out where the costs keep it, and refused with the figures elsewhere.
    Inputs that a factory returns are what is measured on; a model named hf:… has random weights and gets random tokens.
    """
    if not policy.is_file():
        raise PolicyError(f"there is no policy file {policy}, beside which costs could be written")
    built = build(model, Asked(length, batch, weights=True))
    found = calibrated(built.model, policy, [built.kwargs or built.args]).measured
    assert found is not None
    write(found, beside(policy))
    typer.echo(found.to_json() if as_json else "\n".join(_lines(found)))
    if not as_json:
        typer.echo(f"\nwritten to {beside(policy)}")


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
