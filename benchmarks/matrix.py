"""Rebuilds every attention of the zoo from what was recovered of it, in each way of compiling, and counts.

    python benchmarks/matrix.py FOLDER [WAY ...]

writes `zoo.md` and `zoo.json` into FOLDER; ways that are not asked about keep the numbers that stand there.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when transformers is imported
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))  # where the zoo lives

import diffusers
import torch
import transformers

from _tables import Row, markdown, processor
from zoo.sweep import WAYS, Swept, sweep


@dataclass(frozen=True)
class Measured:
    """One way of compiling, and where it was measured."""

    swept: Swept
    processor: str
    versions: str
    date: str

    @property
    def row(self) -> Row:
        counts = {"sites": self.swept.sites, "found": self.swept.found, "rebuilt": self.swept.rebuilt}
        return {"way": self.swept.way, **counts, "invented": self.swept.invented, "date": self.date, "processor": self.processor}


def read(path: Path) -> dict[str, Measured]:
    """What was measured before."""
    kept = json.loads(path.read_text()) if path.exists() else {}
    return {way: Measured(**{**entry, "swept": Swept(**entry["swept"])}) for way, entry in kept.items()}


def report(measured: Sequence[Measured]) -> str:
    """The counts of every way, and everything that is not as it should be."""
    known = {one.swept.way for one in measured}
    missing = [way for way in WAYS if way not in known]
    misses = [f"- {one.swept.way}: {miss}\n" for one in measured for miss in one.swept.misses]
    return (
        "# The zoo, rebuilt\n\n"
        "A site is *found* where the matcher reports one that the model has, and *invented* where it has none. It is *rebuilt*\n"
        "where a graph in which it is computed from its recovered expressions and tables alone gives the same outputs and\n"
        "gradients, within the error budget; one difference anywhere counts all sites of a model as not rebuilt.\n\n"
        f"{markdown([one.row for one in measured])}\n"
        f"With {'; '.join(sorted({one.versions for one in measured}))}. Not measured: {', '.join(missing) or 'nothing'}.\n\n"
        f"## Other than expected\n\n{''.join(misses) or 'nothing'}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the tables go")
    parser.add_argument("ways", nargs="*", help="as `inference-float32-static`; all without any")
    chosen = parser.parse_args()
    chosen.folder.mkdir(parents=True, exist_ok=True)
    kept = chosen.folder / "zoo.json"
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, diffusers {diffusers.__version__}"
    for way in chosen.ways or WAYS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the models' own code
            swept = sweep(WAYS[way])
        print(swept)
        measured = read(kept) | {way: Measured(swept, processor(), versions, f"{datetime.now(UTC):%Y-%m-%d}")}
        in_order = [measured[one] for one in WAYS if one in measured]
        kept.write_text(json.dumps({one.swept.way: asdict(one) for one in in_order}, indent=2) + "\n")
        (chosen.folder / "zoo.md").write_text(report(in_order))


if __name__ == "__main__":
    main()
