"""Writes files whole, or not at all: what fails its check never gets the name that was asked for."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from attn_compiler.errors import ExportError

Result = TypeVar("Result")


def check_folder(path: Path) -> None:
    """Raise before any work is done for a file that has no place."""
    if not path.parent.is_dir():
        raise ExportError(f"there is no folder {path.parent}, where {path.name} should be written")


def place(
    path: Path, save: Callable[[Path], None], check: Callable[[Path], Result], companion: str | None = None
) -> tuple[Result, int]:
    """Save what belongs to `path` in a folder beside it, check it there, and move it all; the result, and how many bytes it is.

    What stands in that folder when the check is done goes along, under its own name; the file itself comes last. A `companion`
    of a file that is written over goes with it, where there is no new one.
    """
    outdated = {path.with_name(companion)} if companion and path.exists() else set()
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.", suffix=".part") as folder:
        unfinished = Path(folder) / path.name
        save(unfinished)
        result = check(unfinished)
        parts = sorted(Path(folder).iterdir(), key=lambda part: part.name == path.name)
        size = sum(part.stat().st_size for part in parts)
        for old in outdated - {path.with_name(part.name) for part in parts}:
            old.unlink(missing_ok=True)
        for part in parts:
            part.replace(path.parent / part.name)
    return result, size
