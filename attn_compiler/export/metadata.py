"""What an exported file says of its attentions: labels of ONNX functions, a line or a string of MLIR, an entry of a .pt2."""

from __future__ import annotations

import json
import textwrap
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from attn_compiler.errors import ExportError
from attn_compiler.export.program import Rewritten
from attn_compiler.planning.formula import formulas, whole
from attn_compiler.targets.onnx.choice import STRATEGIES

PREFIX = "attn."
ATTENTIONS = "attn.attentions"
BYTECODE = ".mlirbc"
ENDINGS = (".onnx", ".mlir", BYTECODE, ".pt2")
_WIDTH = 100
MOST = 1 << 24  # characters of a first line that is read


@dataclass(frozen=True)
class Labelled:
    """One attention of a file."""

    name: str
    computes: str
    outcome: str
    rule: str
    strategy: str
    sizes: Mapping[str, int | str]

    def lines(self) -> Iterator[str]:
        """What is said of it, in lines that fit a terminal."""
        sizes = ", ".join(f"{name} {size}" for name, size in self.sizes.items())
        yield f"{self.name}: {self.outcome}, by {self.rule}"
        for term, says in (("computes", self.computes), ("runs", STRATEGIES.get(self.strategy, self.strategy)), ("shape", sizes)):
            yield textwrap.fill(says, _WIDTH, initial_indent=f"  {term:10}", subsequent_indent=" " * 12)


def labels(path: Path) -> tuple[Labelled, ...]:
    """The attentions of a file, in its order; a file that we did not write has none."""
    if not path.is_file():
        raise ExportError(f"there is no file {path}")
    return {".onnx": _of_onnx, ".mlir": _of_mlir, BYTECODE: _of_bytecode, ".pt2": _of_package}[path.suffix](path)


def written(result: Rewritten, function: str = "") -> list[dict[str, object]]:
    """What files without functions of ours say of the attentions that were rewritten, in one of several functions."""
    within = f" in {function}" if function else ""
    decided = zip(result.names, result.plan.decisions, strict=True)
    found = []
    for name, one in ((name, one) for name, one in decided if one.target):
        site = one.site
        sizes = {
            "heads": site.heads,
            "kv_heads": site.kv_heads,
            "q_len": site.q_len,
            "k_len": site.k_len,
            "head_dim": site.head_dim,
        }
        computes = whole(formulas(one.variant, site))
        found.append(asdict(Labelled(name + within, computes, one.outcome, one.rule, one.form, sizes)))
    return found


def _of_mlir(path: Path) -> tuple[Labelled, ...]:
    with path.open(encoding="utf-8") as file:
        mark, _, text = file.readline(MOST).partition(": ")
    return _read(text) if mark == f"// {ATTENTIONS}" else ()


def _of_bytecode(path: Path) -> tuple[Labelled, ...]:
    """Strings stand in bytecode as they are, with a zero behind; the section that holds them is near the end."""
    _, mark, rest = path.read_bytes().rpartition(f"{ATTENTIONS}: ".encode())
    return _read(rest.partition(b"\0")[0].decode()) if mark else ()


def _of_package(path: Path) -> tuple[Labelled, ...]:
    """AOTInductor keeps what it is told of a model in a file of its own within the archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            held = [json.loads(archive.read(name)) for name in archive.namelist() if name.endswith("_metadata.json")]
    except zipfile.BadZipFile as error:
        raise ExportError(f"{path} is no package of AOTInductor: {error}") from error
    return next((_read(one[ATTENTIONS]) for one in held if ATTENTIONS in one), ())


def _read(text: str) -> tuple[Labelled, ...]:
    return tuple(Labelled(**one) for one in json.loads(text))


def _of_onnx(path: Path) -> tuple[Labelled, ...]:
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, onnx.checker.ValidationError) as error:
        raise ExportError(f"{path} is no ONNX model: {error}") from error
    return tuple(_labelled(one) for one in model.functions if one.domain == "attn")


def _labelled(function: Any) -> Labelled:
    held = {entry.key.removeprefix(PREFIX): entry.value for entry in function.metadata_props}
    sizes = json.loads(held["sizes"])
    return Labelled(function.name, held["computes"], held["outcome"], held["rule"], held["strategy"], sizes)


def record(found: tuple[Labelled, ...]) -> list[dict[str, object]]:
    """The same for programs."""
    return [asdict(one) for one in found]
