"""Pictures and sketches of schedules, however large."""

import sys
from pathlib import Path

import numpy as np
import pytest

from attn_compiler.algebra.expr import h, k, q
from attn_compiler.algebra.variant import Variant
from attn_compiler.errors import MissingPackageError
from attn_compiler.planning.raster import EMPTY, FULL, MIXED, raster
from attn_compiler.planning.schedule import schedule

BAND = (k <= q) & (q - k < 128)


def test_a_sketch_shows_each_tile() -> None:
    assert schedule(Variant(mask=BAND), 256, 256).text() == "▒▒······\n██▒▒····\n▒▒██▒▒··\n··▒▒██▒▒"


def test_a_sketch_of_a_million_tokens_is_as_wide_as_asked() -> None:
    lines = schedule(Variant(mask=k <= q), 1 << 20, 1 << 20).text(width=40).splitlines()
    assert {len(line) for line in lines} == {40}
    assert [line.count("█") for line in lines] == list(range(0, 40, 2))


def test_a_cell_is_full_only_where_all_its_tiles_are() -> None:
    runs = schedule(Variant(mask=BAND), 1000, 1000, tile=(8, 8)).of()
    fine, coarse = raster(runs, 125, 125), raster(runs, 25, 25)
    for y, x in np.ndindex(25, 25):
        tiles = fine[5 * y : 5 * y + 5, 5 * x : 5 * x + 5]
        assert coarse[y, x] == (FULL if (tiles == FULL).all() else MIXED if tiles.any() else EMPTY)


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_picture_is_written_in_the_format_of_its_name(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"mask.{ending}"
    schedule(Variant(mask=(k <= q) & (q - k < 128 * (h + 1))), 512, 512, heads=2).draw(path)
    assert path.read_bytes()[:5] in (b"\x89PNG\r", b"<?xml")


def test_an_empty_schedule_can_be_drawn(tmp_path: Path) -> None:
    schedule(Variant(mask=BAND), 0, 0).draw(tmp_path / "nothing.png")
    assert (tmp_path / "nothing.png").exists()


def test_without_matplotlib_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingPackageError, match="pip install"):
        schedule(Variant(), 8, 8).draw(tmp_path / "mask.png")
