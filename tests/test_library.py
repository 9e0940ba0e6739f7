"""The library finds words lazily, in our folder and in a user's, and says what is wrong with a file."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from attn_compiler import library
from attn_compiler.algebra.expr import k, q
from attn_compiler.errors import LanguageError, LibraryError
from attn_compiler.planning.language import Scope, parse_call, parse_mask
from attn_compiler.planning.words import Declared, Word

EVERY_WORD = [word for folder in library.words().values() for word in folder.values()]
SHADE = 'from attn_compiler.algebra.expr import k, q\ndef shade(n: int = 2):\n    """A shade."""\n    return k < q - n\n'


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(library, "_added", {})
    monkeypatch.setattr(library, "_words", None)
    (tmp_path / "masks").mkdir()
    known = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - known:
        if name.startswith("attn_compiler_added"):
            del sys.modules[name]


@pytest.mark.parametrize("word", EVERY_WORD, ids=lambda word: f"{word.folder}/{word.name}")
def test_a_word_has_a_signature_a_documentation_and_a_stable_name(word: Word) -> None:
    assert word.summary.endswith(".")
    assert {p.name for p in word.parameters} <= set(word.hints)
    assert word.function.__module__ == f"attn_compiler.patterns.{word.folder}.{word.name}"
    assert pickle.loads(pickle.dumps(word.function)) is word.function


@pytest.mark.parametrize(
    ("folder", "text"),
    [
        ("selectors", "top(16)"), ("selectors", "top(0.2)"), ("selectors", "top_p(0.9)"), ("selectors", "norm_mean"),
        ("edits", 'move("0:4", "4:8", keep=0.6)'), ("edits", 'scale_keys("0:4", 1.5)'), ("edits", "identity(0.1)"),
    ],
)  # fmt: skip
def test_a_word_that_nothing_carries_yet_is_declared(folder: str, text: str) -> None:
    found = parse_call(text, folder, library.words(), Scope(strict=False))
    assert isinstance(found, Declared)
    assert (found.folder, found.name) == (folder, text.partition("(")[0])


@pytest.mark.parametrize(("folder", "text"), [("states", "gate(matrix)"), ("storages", "block(0)"), ("selectors", "top(many)")])
def test_the_arguments_of_a_declared_word_are_checked(folder: str, text: str) -> None:
    with pytest.raises(LanguageError, match="expected"):
        parse_call(text, folder, library.words(), Scope())


def test_a_word_of_ones_own_is_a_file(own: Path) -> None:
    before = library.source_digest()
    (own / "masks" / "shade.py").write_text(SHADE)
    library.add(own)
    assert parse_mask("shade(3)", library.words(), Scope()).keep == (k < q - 3)
    assert library.source_digest() != before


def test_a_word_of_ones_own_may_not_hide_another(own: Path) -> None:
    (own / "masks" / "causal.py").write_text(SHADE)
    with pytest.raises(LibraryError, match="would hide the word `causal`"):
        library.add(own)
    assert "shade" not in library.words()["masks"]


@pytest.mark.parametrize(("source", "says"), [('"""A."""\n', "must define"), ("def dark():\n    pass\n", "docstring")])
def test_a_file_without_its_word_is_an_error_when_asked_for(own: Path, source: str, says: str) -> None:
    (own / "masks" / "dark.py").write_text(source)
    library.add(own)
    with pytest.raises(LibraryError, match=says):
        parse_mask("dark", library.words(), Scope())


def test_a_folder_without_words_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LibraryError, match="none of the folders"):
        library.add(tmp_path)


def test_an_unknown_policy_is_an_error() -> None:
    with pytest.raises(LibraryError, match="no ready policy"):
        library.policy_path("nothing")
