"""`attn variants`: every word of the policy language."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import chain
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from attn_compiler.algebra.expr import Expr
from attn_compiler.algebra.notation import text
from attn_compiler.library import words
from attn_compiler.planning.words import Word, Words

PAGE = """# Words of the policy language

Written by `attn variants --markdown`; [`policy.md`](policy.md) says where they stand.
"""


def variants(
    as_json: Annotated[bool, typer.Option("--json", help="Print a list for programs.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the page of the documentation.")] = False,
) -> None:
    """List the words that a policy may use, with what they mean."""
    known = words()
    if as_json:
        typer.echo(json.dumps([_record(word) for word in chain(*_in_order(known))]))
    elif markdown:
        typer.echo(page(known), nl=False)
    else:
        _print(known)


def page(known: Words) -> str:
    """The words as a page of markdown."""
    return PAGE + "".join(map(_section, _in_order(known)))


def _section(folder: list[Word]) -> str:
    meanings = ((_signature(word), _meaning(word).replace("|", r"\|")) for word in folder)
    lines = "".join(f"| `{written}` | {meaning} |\n" for written, meaning in meanings)
    return f"\n## {folder[0].folder.capitalize()}\n\n| word | means |\n|---|---|\n{lines}"


def _record(word: Word) -> dict[str, object]:
    named = {"folder": word.folder, "word": word.name, "signature": _signature(word)}
    return {**named, "summary": word.summary, "carried": word.is_carried}


def _print(known: Words) -> None:
    table = Table("folder", "word", "meaning", box=None, pad_edge=False)
    for folder in _in_order(known):
        for first, word in enumerate(folder):
            table.add_row("" if first else word.folder, _signature(word), _meaning(word))
    Console(markup=False).print(table)


def _in_order(known: Words) -> Iterator[list[Word]]:
    return (list(folder.values()) for folder in known.values() if folder)


def _meaning(word: Word) -> str:
    return word.summary if word.is_carried else f"{word.summary} (Nothing carries it yet.)"


def _signature(word: Word) -> str:
    """As it is written in a policy: without what the scope supplies."""
    written = [p for p in word.parameters if p.kind is not p.KEYWORD_ONLY]
    return f"{word.name}({', '.join(map(_parameter, written))})" if written else word.name


def _parameter(parameter: inspect.Parameter) -> str:
    name, default = parameter.name, parameter.default
    if parameter.kind is parameter.VAR_POSITIONAL:
        return f"{name}, …"
    if default is parameter.empty:
        return name
    if default is None:
        return f"{name}=…"
    if isinstance(default, tuple):
        return f"{name}={', '.join(map(str, default))}"
    return f"{name}={_denominators().get(default, text(default)) if isinstance(default, Expr) else default}"


@cache
def _denominators() -> Mapping[object, str]:
    """The formulas that have a name."""
    return {word.function(): word.name for word in words()["denominators"].values() if not word.parameters}
