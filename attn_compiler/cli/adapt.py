"""`attn adapt`: trains the parameters that a policy adds to a model, and writes them beside the policy."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from attn_compiler import library
from attn_compiler.adaptation.adapted import Adapted
from attn_compiler.adaptation.distill import Distilled, Tell, distill
from attn_compiler.adaptation.texts import BYTES, pieces, tokens_of
from attn_compiler.cli.model_source import Asked, Built, ModelError, build
from attn_compiler.errors import PolicyError, ShapeError
from attn_compiler.planning.parameter_file import write_parameters

_TOLD = 20  # lines of progress


def adapt(
    model: Annotated[str, typer.Argument(help="package.module:factory, or hf:type,key=value… (random weights).")],
    policy: Annotated[Path, typer.Argument(help="A policy file, which names its `parameters:`.")],
    text: Annotated[list[Path] | None, typer.Option(help="A file or a folder of text to learn from; may be repeated.")] = None,
    tokenizer: Annotated[str, typer.Option(help="A folder with the model's tokenizer, or bytes.")] = BYTES,
    batches: Annotated[
        str | None, typer.Option(help="Instead of text, package.module:function, which gives an iterable of batches.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Batches on which each attention learns from its own output.", min=1)] = 500,
    logits: Annotated[int, typer.Option(help="Batches after those, on the model's logits.", min=0)] = 0,
    low_rank: Annotated[
        int, typer.Option(help="Let those also change the linear maps beside each attention, by so many ranks.", min=0)
    ] = 0,
    rate: Annotated[float, typer.Option(help="The rate of learning, which falls to zero.")] = 0.01,
    length: Annotated[int, typer.Option(help="Tokens of a row of text.", min=1)] = 256,
    batch: Annotated[int, typer.Option(help="Rows of text in a batch.", min=1)] = 2,
    state: Annotated[
        Path | None, typer.Option(help="How far training is; <parameters>.training.pt, unless given. Goes on where it was.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print every loss for programs.")] = False,
) -> None:
    """Train the parameters that a policy adds until each attention gives what it gave before, and write them beside the policy.

    Nothing of the model is changed; with --low-rank, the weights that changed in a copy of it stand in a second file.
    Broken off, the same command goes on where it was; it draws the same text again.
    """
    if not policy.is_file():
        raise PolicyError(f"there is no policy file {policy}, beside which parameters could be written")
    read = library.load_policy(policy)
    if not read.parameters:
        raise PolicyError(
            f"{policy} does not say where its parameters go: add `parameters: {policy.name.split('.')[0]}.safetensors`"
        )
    built = build(model, Asked(length, batch, weights=True))
    lessons = _lessons(built, text or [], tokenizer, batches, batch, length)
    kept = state or read.folder / f"{read.parameters}.training.pt"
    tell = None if as_json else _telling(steps + logits)
    found = distill(built.model, read, lessons, steps=steps, logits=logits, low_rank=low_rank, rate=rate, state=kept, tell=tell)
    written = [found.model.save()]
    if low_rank:
        written.append(_write_changed(built.model, found.model, written[0].with_suffix(".weights.safetensors")))
    paths = [str(path) for path in written]
    said = json.dumps({"written": paths[0], "weights": paths[1:], "curve": found.curve}, indent=2)
    typer.echo(said if as_json else _said(found, paths))


def _write_changed(before: nn.Module, adapted: Adapted, path: Path) -> Path:
    """Write the weights that training changed, as they are now, by the model's own names."""
    own = before.state_dict()
    changed = {name: x for name, x in adapted.model.state_dict().items() if not torch.equal(x, own[name])}
    write_parameters(path, {name: x.float().cpu().numpy() for name, x in changed.items()}, adapted.steps)
    return path


def _lessons(built: Built, text: list[Path], tokenizer: str, batches: str | None, rows: int, length: int) -> Iterable[Any]:
    if bool(text) == bool(batches):
        raise ShapeError("say what to learn from: either --text, or --batches package.module:function")
    if batches:
        return _called(batches)
    config = getattr(built.model, "config", None)
    return pieces(tokens_of(text, tokenizer, getattr(config, "vocab_size", None)), rows, length)


def _called(name: str) -> Iterator[Any]:
    """What a function of the user's gives."""
    where, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(where), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ModelError(f'"{name}" names no function that gives batches: {error}') from error
    return iter(found())


def _telling(total: int) -> Tell:
    every = max(1, total // _TOLD)

    def tell(step: int, loss: float) -> None:
        if step % every == 0 or step == total:
            typer.echo(f"step {step} of {total}: {loss:.4g}")

    return tell


def _said(found: Distilled, written: list[str]) -> str:
    lines = [f"{losses[0]:9.4g} -> {losses[-1]:9.4g}  {name}" for name, losses in found.curve.items() if losses]
    return "\n".join(
        [
            "",
            "of each attention's output, the part that is wrong at first and at last:",
            *lines,
            f"\nwritten to {' and '.join(written)}",
        ]
    )
