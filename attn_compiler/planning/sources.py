"""Where a policy's tables come from: an input of the model, a tensor given when compiling, a file, or the policy itself."""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from attn_compiler.errors import AttnError, MissingPackageError, PolicyError, did_you_mean
from attn_compiler.planning.yaml_text import Entry, Place, read_yaml

Array = NDArray[np.generic]
Origin = Literal["input", "given", "held"]
Read = TypeVar("Read")


@dataclass(frozen=True)
class Source:
    """A run-time table: `name` is what the model or the caller calls it; a held one has its values here."""

    origin: Origin
    name: str
    array: Array | None = field(default=None, compare=False)

    def fingerprint(self) -> str:
        """What a digest knows of it: values by content."""
        if self.array is None:
            return f"{self.origin}:{self.name}"
        content = hashlib.sha256(np.ascontiguousarray(self.array).tobytes()).hexdigest()
        return f"held:{self.array.dtype}:{self.array.shape}:{content}"


KEYS = ("input", "given", "file", "values")


HELD: Mapping[str, str] = {"truth values": "b", "whole numbers": "iu"}


def read_source(name: str, entry: Entry, folder: Path, holds: str) -> Source:
    """Read `{input: …}`, `{given: …}`, `{file: …}` or `{values: […]}`; the last two show what they hold."""
    source = _source(name, entry, folder)
    if source.array is not None and source.array.dtype.kind not in HELD[holds]:
        raise PolicyError(f'{entry.place}: "{name}" needs a table of {holds}, this one holds {source.array.dtype}')
    return source


def _source(name: str, entry: Entry, folder: Path) -> Source:
    if not isinstance(entry.value, Mapping) or len(entry.value) != 1:
        raise PolicyError(
            f"{entry.place}: expected one of {{input: …}}, {{given: …}}, {{file: …}}, {{values: […]}}, found {entry.kind}"
        )
    (key, inner), *_ = entry.value.items()
    if key not in KEYS:
        raise PolicyError(f'{entry.keys.get(key, entry.place)}: unknown source "{key}"{did_you_mean(key, KEYS)}')
    if key == "values":
        return Source("held", name, _array(inner.plain(), inner.place))
    if not isinstance(inner.value, str):
        raise PolicyError(f"{inner.place}: expected a name, found {inner.kind}")
    if key == "file":
        tables = read_data(inner.value, inner.place, folder)
        if len(tables) != 1:
            raise PolicyError(f"{inner.place}: {inner.value} holds {len(tables)} tables, a label or role needs one")
        return Source("held", name, next(iter(tables.values())))
    return Source("input" if key == "input" else "given", inner.value)


def read_data(written: str, place: Place, folder: Path) -> dict[str, Array]:
    """The tables of a file, those of a mapping by dotted names; a file that is one table has the empty name."""
    path = folder / written
    if not path.is_file():
        raise PolicyError(f"{place}: there is no file {written}; paths are relative to the policy file")
    try:
        return _once(_tables(path, written, place))
    except AttnError:
        raise
    except (OSError, ValueError, EOFError, RecursionError, zipfile.BadZipFile, zlib.error) as error:
        raise PolicyError(f"{place}: {written} cannot be read: {error}") from error


def _once(pairs: Iterable[tuple[str, Read]]) -> dict[str, Read]:
    found: dict[str, Read] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f'"{name}" stands there twice')
        found[name] = value
    return found


def _tables(path: Path, written: str, place: Place) -> Iterator[tuple[str, Array]]:
    match path.suffix:
        case ".npz":
            if not zipfile.is_zipfile(path):  # numpy would suggest to load it as a pickle
                raise ValueError("it is no .npz archive, or a part of one")
            with np.load(path, allow_pickle=False) as archive:
                yield from ((name, archive[name]) for name in archive.files)
        case ".json":
            yield from _flat(json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once), "", place)
        case ".yaml" | ".yml":
            yield from _flat(read_yaml(path.read_text(encoding="utf-8"), written).plain(), "", place)
        case ".safetensors":
            yield from _safetensors(path)
        case _:
            raise PolicyError(f"{place}: {written} is of no known kind; known: .npz, .json, .yaml, .safetensors")


def _safetensors(path: Path) -> Iterator[tuple[str, Array]]:
    try:
        from safetensors import SafetensorError
        from safetensors.numpy import load_file
    except ImportError as error:
        raise MissingPackageError('reading .safetensors needs a package: pip install "attn-compiler[safetensors]"') from error
    try:
        yield from load_file(path).items()
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    except TypeError as error:
        raise ValueError(f"numpy has no such type of numbers, store it as float32: {error}") from error


def _flat(value: object, name: str, place: Place) -> Iterator[tuple[str, Array]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key), place)
    else:
        yield name, _array(value, place)


def _array(value: object, place: Place) -> Array:
    try:
        array = np.array(value)
    except ValueError as error:
        raise PolicyError(f"{place}: the rows of a table have one length: {error}") from error
    if array.dtype.kind not in "bif" or array.size == 0:
        raise PolicyError(f"{place}: expected numbers or truth values, found {str(value)[:40]}")
    return array.astype(np.float64) if array.dtype.kind == "f" else array
