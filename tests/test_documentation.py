"""What the documentation says is there, is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")]
DOCUMENTS += sorted((ROOT / "docs").glob("*.md"))
every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


def _blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)


@every_document
def test_a_link_leads_to_a_file(document: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", document.read_text())
    assert [link for link in links if "://" not in link and not (document.parent / link).exists()] == []


@every_document
def test_a_make_target_that_is_named_exists(document: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"^make ([a-z-]+)", document.read_text(), re.MULTILINE)) <= targets


@every_document
def test_python_in_the_text_is_python(document: Path) -> None:
    for block in _blocks(document, "python"):
        ast.parse(block)


@every_document
def test_a_policy_in_the_text_loads(document: Path) -> None:
    import attn_compiler

    for block in _blocks(document, "yaml"):
        assert len(attn_compiler.load_policy(block).rules) >= 1


def test_every_folder_of_the_readme_exists() -> None:
    folders = re.findall(r"^\| `([a-z_]+)/` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert folders
    assert [folder for folder in folders if not (ROOT / folder).is_dir()] == []


def test_the_page_of_words_is_what_the_command_prints() -> None:
    from attn_compiler.cli.variants import page
    from attn_compiler.library import words

    assert (ROOT / "docs" / "words.md").read_text() == page(words()), "run `attn variants --markdown > docs/words.md`"


@pytest.mark.parametrize("keys", ["FILE_KEYS", "RULE_KEYS", "MATCH_KEYS", "SLOTS"])
def test_the_page_of_policies_names_every_key(keys: str) -> None:
    from attn_compiler.planning import policy_file, slots

    page = (ROOT / "docs" / "policy.md").read_text()
    known = getattr(policy_file, keys, None) or getattr(slots, keys)
    assert [key for key in known if f"`{key}" not in page] == []
