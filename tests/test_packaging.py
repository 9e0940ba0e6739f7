"""A wheel built from the tracked files carries everything that an installation needs."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CONTENT = ("patterns", "codegen")
BUILD = "from setuptools import build_meta; build_meta.build_wheel('dist')"


def _files() -> list[Path]:
    """What git tracks or would add: leftovers of builds are not part of the project."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    paths = (Path(name) for name in listing.split("\0") if name)
    return sorted(path for path in paths if (ROOT / path).is_file())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    source = tmp_path_factory.mktemp("source")
    for path in _files():
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, source / path)
    built = subprocess.run([sys.executable, "-W", "error", "-c", BUILD], cwd=source, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    [path] = (source / "dist").glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.mark.parametrize("folder", CONTENT)
def test_the_wheel_carries_every_file_of_a_content_folder(wheel: zipfile.ZipFile, folder: str) -> None:
    expected = {f"attn_compiler/{path.as_posix()}" for path in _files() if path.parts[0] == folder}
    assert expected
    assert expected <= set(wheel.namelist())


def test_the_wheel_carries_every_file_of_the_engine(wheel: zipfile.ZipFile) -> None:
    expected = {path.as_posix() for path in _files() if path.parts[0] == "attn_compiler"}
    assert expected <= set(wheel.namelist())


def test_the_wheel_carries_nothing_but_the_package(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" not in name}
    assert tops == {"attn_compiler"}


def test_an_installed_wheel_knows_its_words(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path / "site")
    probe = "from attn_compiler import library; print(library.words()['masks']['window'].path)"
    found = subprocess.run(
        [sys.executable, "-c", probe],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    assert Path(found.stdout.strip()).is_relative_to(tmp_path / "site")


def test_the_wheel_says_it_is_typed(wheel: zipfile.ZipFile) -> None:
    assert "attn_compiler/py.typed" in wheel.namelist()


def test_the_wheel_registers_the_backend_and_the_command(wheel: zipfile.ZipFile) -> None:
    [name] = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    entry_points = configparser.ConfigParser()
    entry_points.read_string(wheel.read(name).decode())
    assert dict(entry_points["torch_dynamo_backends"]) == {"attn": "attn_compiler.backend:attn"}
    assert dict(entry_points["console_scripts"]) == {"attn": "attn_compiler.cli:app"}


@pytest.mark.parametrize("target", ["attn_compiler.backend:attn", "attn_compiler.cli:app"])
def test_an_entry_point_resolves(target: str) -> None:
    module, name = target.split(":")
    probe = f"import {module}; assert callable({module}.{name})"
    found = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr


def test_every_pinned_requirement_is_an_exact_version() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert [line for line in pins if "==" not in line] == []
    assert any(line.startswith("torch==") for line in pins)
