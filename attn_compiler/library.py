"""Reads folders of words, ready policies and kernels: the content that this package ships, and a user's own."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType

from attn_compiler.errors import LibraryError, did_you_mean
from attn_compiler.planning.policy import Policy
from attn_compiler.planning.policy_file import read_policy
from attn_compiler.planning.words import Word, Words

FOLDERS = (
    "masks", "scores", "normalizers", "features", "states", "orders", "selectors", "edits", "outputs", "storages",
    "contexts", "denominators", "units",
)  # fmt: skip


def folder(name: str) -> Path:
    """`patterns` or `codegen`: inside of the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    if (package / name).is_dir():
        return package / name
    # Without this guard, a stranger's folder in site-packages could be taken for ours.
    if (package.parent / "pyproject.toml").is_file() and (package.parent / name).is_dir():
        return package.parent / name
    raise LibraryError(f"attn-compiler is installed without its folder `{name}`; install it again")


class _Folder(Mapping[str, Word]):
    """The words of one folder; a file is loaded when its word is first asked for."""

    def __init__(self, name: str, files: Mapping[str, tuple[Path, str]]) -> None:
        self.name, self._files = name, files
        self._loaded: dict[str, Word] = {}

    def __getitem__(self, name: str) -> Word:
        if name not in self._loaded:
            path, package = self._files[name]
            self._loaded[name] = _word(self.name, name, path, f"{package}.{self.name}.{name}")
        return self._loaded[name]

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._files))

    def __len__(self) -> int:
        return len(self._files)


_OWN = "attn_compiler.patterns"
_added: dict[Path, str] = {}
_words: Words | None = None


def words() -> Words:
    """Every word, by folder and name."""
    global _words
    if _words is None:
        _words = _collect({folder("patterns"): _OWN, **_added})
    return _words


def add(own: str | Path) -> None:
    """Add a folder of the same shape as `patterns/`: its words are known from now on."""
    global _words
    path = Path(own).resolve()
    if not any((path / name).is_dir() for name in FOLDERS):
        raise LibraryError(f"{path} has none of the folders {', '.join(FOLDERS)}")
    package = f"attn_compiler_added.{path.name}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    added = {**_added, path: package}
    _words = _collect({folder("patterns"): _OWN, **added})
    _added[path] = package


def source_digest() -> str:
    """A digest of the sources of all words, for the keys of caches."""
    digest = hashlib.sha256()
    for known in words().values():
        for word in known.values():
            digest.update(f"{word.folder}/{word.name}\0".encode() + word.path.read_bytes() + b"\0")
    return digest.hexdigest()


def policy_path(name: str) -> Path:
    """The file of a ready policy."""
    known = {path.stem: path for path in (folder("patterns") / "policies").glob("*.yaml")}
    if name not in known:
        raise LibraryError(f'there is no ready policy "{name}"{did_you_mean(name, known)}')
    return known[name]


def load_policy(source: str | Path | Mapping[str, object] | Policy) -> Policy:
    """Read a policy: a path, the name of a ready one, YAML text, or a mapping."""
    if isinstance(source, Policy):
        return source
    if isinstance(source, str) and source in ready_policies():
        source = policy_path(source)
    return read_policy(source, words(), source_digest())


def ready_policies() -> tuple[str, ...]:
    """The names of the policies that come with the package."""
    return tuple(sorted(path.stem for path in (folder("patterns") / "policies").glob("*.yaml")))


def _collect(roots: Mapping[Path, str]) -> Words:
    return {name: _Folder(name, _files(name, roots)) for name in FOLDERS}


def _files(name: str, roots: Mapping[Path, str]) -> Mapping[str, tuple[Path, str]]:
    found: dict[str, tuple[Path, str]] = {}
    for root, package in roots.items():
        for path in sorted((root / name).glob("*.py")):
            word = path.stem
            if word in found:
                raise LibraryError(f"{path} would hide the word `{word}` of {found[word][0]}; give it another name")
            found[word] = (path, package)
    return found


def _word(of: str, name: str, path: Path, module_name: str) -> Word:
    module = sys.modules.get(module_name) or _load(module_name, path)
    function = getattr(module, name, None)
    if not callable(function):
        raise LibraryError(f"{path} must define the word of its name: `def {name}(…)`")
    if not function.__doc__:
        raise LibraryError(f"{path}: `{name}` needs a docstring, whose first line is its line in the documentation")
    return Word(of, name, function, path)


def _load(module_name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise LibraryError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # before it runs: dataclasses look themselves up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_name]
        raise
    return module
