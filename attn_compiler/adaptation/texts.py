"""Text to learn from: files, as tokens, and pieces of them drawn at random, the same ones for the same seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attn_compiler.errors import MissingPackageError, ShapeError

BYTES = "bytes"  # the tokenizer whose tokens are the bytes of a file


def tokens_of(paths: Sequence[Path], tokenizer: str, vocabulary: int | None) -> Tensor:
    """All files, and those in folders, one after the other, as the numbers of their tokens."""
    files = [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path]) if not file.is_dir()]
    if not files:
        raise ShapeError(f"there is no file to learn from in {', '.join(map(str, paths)) or 'nothing'}")
    raw = b"\n".join(file.read_bytes() for file in files)
    ids = torch.frombuffer(bytearray(raw), dtype=torch.uint8).long() if tokenizer == BYTES else _tokenized(raw, tokenizer)
    if vocabulary is not None and len(ids) and int(ids.max()) >= vocabulary:
        raise ShapeError(
            f'the tokenizer "{tokenizer}" writes token {int(ids.max())}, and the model knows {vocabulary}: give the model\'s own'
        )
    return ids


def pieces(ids: Tensor, rows: int, length: int, seed: int = 0) -> Iterator[Tensor]:
    """Batches [rows, length] from anywhere in a text, without end."""
    if len(ids) < length:
        raise ShapeError(
            f"the text has {len(ids)} tokens, and a batch takes {length} in a row: give more of it, or a lower length"
        )
    drawn = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(0, len(ids) - length + 1, (rows, 1), generator=drawn)
        yield ids[starts + torch.arange(length)]


def _tokenized(raw: bytes, folder: str) -> Tensor:
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise MissingPackageError("tokenizers need the package transformers: pip install transformers") from error
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ShapeError(f'"{folder}" is no tokenizer: name a folder that transformers reads one from, or {BYTES}') from error
    return torch.tensor(tokenizer(raw.decode("utf-8", errors="replace"))["input_ids"])
