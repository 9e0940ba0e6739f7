"""Counts the attentions found in the zoo, beside those that Inductor's own patterns find on the same models.

    python benchmarks/recall.py FOLDER [MODEL ...]

writes `recall.md` and `recall.json` into FOLDER.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when transformers is imported
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))  # where the zoo lives

from rich.progress import track

from _inductor import count_fused
from _tables import Row, markdown, write_json
from zoo.catalogue import FAMILIES
from zoo.entry import Entry
from zoo.finding import find


@dataclass(frozen=True)
class Count:
    """What was found in one model under one of its implementations."""

    family: str
    model: str
    implementation: str
    outcome: str
    sites: int
    found: int
    near_misses: int
    inductor: int | None  # None where it has nothing to find: the model calls SDPA itself
    expected: int | None

    @property
    def recalled(self) -> int:
        """Sites found whole; fragments of one, and what has to be refused, are none."""
        return min(self.found, self.expected or 0)

    @property
    def invented(self) -> int:
        """Sites where there should be none: the worst that can happen."""
        return 0 if self.expected is None else max(self.found - self.expected, 0)


def count(family: str, entry: Entry, implementation: str) -> Count:
    """Count both ways on one model."""
    model, inputs = entry.make(implementation)
    matches = find(model, inputs)
    inductor = None if implementation == "sdpa" else count_fused(model, inputs)
    return Count(
        family,
        entry.name,
        implementation,
        entry.outcome.value,
        entry.sites,
        len(matches.sites),
        len(matches.near_misses),
        inductor,
        entry.found,
    )


def summary(counts: Sequence[Count]) -> list[Row]:
    """One row per family and implementation, and one for all."""
    groups = {(c.family, c.implementation) for c in counts}
    rows = [_total(f"{f}, {i}", [c for c in counts if (c.family, c.implementation) == (f, i)]) for f, i in sorted(groups)]
    return [*rows, _total("all", counts)]


def _total(name: str, counts: Sequence[Count]) -> Row:
    compared = [c for c in counts if c.inductor is not None]
    return {
        "models": name,
        "configurations": len(counts),
        "sites": sum(c.sites for c in counts),
        "found": sum(c.recalled for c in counts),
        "invented": sum(c.invented for c in counts),
        "sites (Inductor)": sum(c.sites for c in compared) if compared else "-",
        "found (Inductor)": sum(min(c.inductor or 0, c.sites) for c in compared) if compared else "-",
        "invented (Inductor)": sum(max((c.inductor or 0) - c.sites, 0) for c in compared) if compared else "-",
    }


def report(counts: Sequence[Count]) -> str:
    """The whole as Markdown: sums, then what differs from what was expected, then every model."""
    rows = [{key: "-" if x is None else x for key, x in asdict(c).items()} for c in counts]
    surprises = [row for c, row in zip(counts, rows, strict=True) if c.expected is not None and c.found != c.expected]
    return (
        "# Recall over the zoo\n\n"
        "`found` counts at most the sites there are; `invented` counts those beyond. Inductor is asked for inference,\n"
        "where it fuses most, and only about models that do not call `scaled_dot_product_attention` themselves.\n\n"
        f"{markdown(summary(counts))}\n## Other than expected\n\n{markdown(surprises)}\n## Every model\n\n{markdown(rows)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the tables go")
    parser.add_argument("models", nargs="*", help="names from the zoo; all without any")
    chosen = parser.parse_args()
    cases = [
        (family, entry, implementation)
        for family, entries in FAMILIES.items()
        for entry in entries
        for implementation in entry.implementations
        if not chosen.models or entry.name in chosen.models
    ]
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the models' own code
        counts = [count(*case) for case in track(cases, description="counting")]
    chosen.folder.mkdir(parents=True, exist_ok=True)
    (chosen.folder / "recall.md").write_text(report(counts))
    write_json(chosen.folder / "recall.json", {"counts": [asdict(c) for c in counts]})
    print(markdown(summary(counts)))


if __name__ == "__main__":
    main()
