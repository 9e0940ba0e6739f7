"""What an exported file says of its attentions: read back from the labels of its functions."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from attn_compiler.errors import ExportError
from attn_compiler.targets.onnx.choice import STRATEGIES

PREFIX = "attn."
_WIDTH = 100


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
