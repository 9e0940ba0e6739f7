"""Building kernels: found again, safe among processes, bounded, and clear where something is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from attn_compiler.errors import CompilerError
from attn_compiler.runtime import compiler

SOURCE = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ATTN_CACHE_DIR", str(tmp_path))
    yield
    compiler.compiler.cache_clear()


def forbidden(*_: object, **__: object) -> None:
    raise AssertionError("it is compiled again")


def test_what_is_built_once_is_not_built_again(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiler.load(SOURCE).answer() == 42
    monkeypatch.setattr(compiler, "_compile", forbidden)
    assert compiler.load(SOURCE).answer() == 42


def test_the_source_lies_beside_the_kernel(tmp_path: Path) -> None:
    compiler.load(SOURCE)
    [source] = tmp_path.glob("*.cpp")
    assert source.read_text() == SOURCE


def test_nothing_is_left_of_a_build_that_fails(tmp_path: Path) -> None:
    with pytest.raises(CompilerError, match="nonsense"):
        compiler.load("nonsense")
    assert not list(tmp_path.iterdir())


def test_many_processes_build_the_same_kernel_at_once(tmp_path: Path) -> None:
    program = f"from attn_compiler.runtime import compiler; assert compiler.load({SOURCE!r}).answer() == 42"
    started = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(4)]
    assert [process.wait() for process in started] == [0] * 4
    assert len(list(tmp_path.glob("*.so"))) == 1
    assert not list(tmp_path.glob("building-*"))


def test_the_cache_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "MOST_KERNELS", 2)
    for number in range(4):
        compiler.load(f'extern "C" int answer() {{ return {number}; }}\n')
    assert len(list(tmp_path.glob("*.so"))) == 2
    assert len(list(tmp_path.glob("*.cpp"))) == 2


def test_what_a_killed_build_left_is_cleared_away(tmp_path: Path) -> None:
    old, new = tmp_path / "building-old", tmp_path / "building-new"
    for room in (old, new):
        room.mkdir()
    os.utime(old, (0, 0))
    compiler.load(SOURCE)
    assert not old.exists()
    assert new.exists()


def test_where_nothing_can_be_kept_a_process_builds_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ATTN_CACHE_DIR", str(tmp_path / "file" / "kernels"))
    with pytest.warns(UserWarning, match=r"kernels cannot be kept in .*kernels \(Not a directory\).* ATTN_CACHE_DIR"):
        assert compiler.load(SOURCE).answer() == 42
    monkeypatch.setattr(compiler, "_compile", forbidden)
    assert compiler.load(SOURCE).answer() == 42


def test_kernels_that_are_modules_are_kept_and_bounded_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "MOST_KERNELS", 2)
    first = compiler.module("ANSWER = 42\n")
    assert compiler.module("ANSWER = 42\n") == first
    os.utime(first, (0, 0))
    others = {compiler.module(f"ANSWER = {n}\n") for n in range(2)}
    assert set(tmp_path.glob("*.py")) == others
    (tmp_path / "file").touch()
    monkeypatch.setenv("ATTN_CACHE_DIR", str(tmp_path / "file" / "modules"))
    with pytest.warns(UserWarning, match=r"kernels cannot be kept in .*modules"):
        assert compiler.module("ANSWER = 42\n").read_text() == "ANSWER = 42\n"


def test_a_kernel_of_somebody_else_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def not_yours(*_: object) -> None:
        raise PermissionError

    compiler.load(SOURCE)
    monkeypatch.setattr(os, "utime", not_yours)
    monkeypatch.setattr(compiler, "_compile", forbidden)
    assert compiler.load(SOURCE).answer() == 42


def test_other_flags_are_another_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = 'extern "C" int answer() { return ANSWER; }\n'
    for answer in (1, 2):
        monkeypatch.setenv("ATTN_CXXFLAGS", f"-DANSWER={answer}")
        assert compiler.load(source).answer() == answer


def test_without_a_compiler_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    compiler.compiler.cache_clear()
    with pytest.raises(
        CompilerError, match=r"there is no C\+\+ compiler: install g\+\+, or name one in the environment variable CXX"
    ):
        compiler.load(SOURCE)
