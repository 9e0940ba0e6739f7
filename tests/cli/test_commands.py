"""The command line: what people see, and what programs read."""

import json
from pathlib import Path

from typer.testing import CliRunner

from attn_compiler.cli import app

runner = CliRunner()


def test_a_mask_is_sketched() -> None:
    result = runner.invoke(app, ["draw", "causal & window(128)", "--length", "256"])
    assert result.exit_code == 0
    assert "▒▒██▒▒··" in result.stdout
    assert "density" in result.stdout


def test_a_picture_is_written(tmp_path: Path) -> None:
    result = runner.invoke(app, ["draw", "causal", "--length", "256", "--out", str(tmp_path / "causal.png")])
    assert result.exit_code == 0
    assert (tmp_path / "causal.png").exists()


def test_programs_read_numbers() -> None:
    result = runner.invoke(app, ["draw", "causal", "--length", "256", "--json"])
    found = json.loads(result.stdout)
    assert found["density"] == 10 / 16
    assert found["panels"] == [{"heads": [0], "density": 10 / 16, "full_tiles": 6, "mixed_tiles": 4}]


def test_an_order_makes_a_neighborhood_sparser() -> None:
    command = ["draw", "neighborhood([9, 9])", "--length", "4096", "--geometry", "64,64", "--json"]
    rows, tiles = (json.loads(runner.invoke(app, command + more).stdout)["density"] for more in ([], ["--ordered"]))
    assert tiles < rows


def test_a_wrong_mask_is_one_message_and_no_traceback() -> None:
    result = runner.invoke(app, ["draw", "causal & windw(4)", "--length", "256"])
    assert result.exit_code == 2
    assert "windw" in result.stderr
    assert "window" in result.stderr
    assert "Traceback" not in result.output


def test_a_wrong_geometry_is_explained() -> None:
    result = runner.invoke(app, ["draw", "causal", "--length", "256", "--geometry", "wide"])
    assert result.exit_code == 2
    assert 'written like "56,56"' in result.stderr


def test_every_word_is_listed_with_its_meaning() -> None:
    listed = json.loads(runner.invoke(app, ["variants", "--json"]).stdout)
    window = next(row for row in listed if (row["folder"], row["word"]) == ("masks", "window"))
    assert window["signature"].startswith("window(left")
    assert all(row["summary"] for row in listed)
    assert "window" in runner.invoke(app, ["variants"]).stdout
