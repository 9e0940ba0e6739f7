"""Files are written whole, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from attn_compiler.whole_file import whole_file


def test_a_file_gets_its_name_when_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "kept.txt"
    path.write_text("old")
    with whole_file(path) as file:
        file.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "kept.txt"
    path.write_text("old")
    with pytest.raises(ValueError, match="halfway"), whole_file(path) as file:  # noqa: PT012
        file.write_text("ne")
        raise ValueError("halfway")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
