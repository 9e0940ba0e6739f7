"""Rows that are shorter than others, padded in front, in files that decode: each is what it is alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import attn_compiler as attn
from attn_compiler.errors import ExportError, ShapeError
from attn_compiler.export import Decoder
from end_to_end.by_hand import policy, with_weights
from end_to_end.models import tokens
from export.test_decoding import llama

WINDOW, SINKS = policy("causal & window(8)"), policy("causal & (window(8) | sinks(2))")
LENGTH, SHORT = 20, 4  # so short that a window would see what stands in front


def written(path: Path, asked: object, *, padded: bool = True) -> tuple[attn.ExportReport, Decoder]:
    ids = tokens(2, 24)
    more = {"kwargs": {"attention_mask": torch.ones_like(ids)}} if padded else {}
    report = attn.export_onnx(with_weights(llama()), (ids,), path / "model.onnx", asked, decode=True, **more)  # type: ignore[arg-type]
    return report, Decoder(path / "model.onnx")


def batch() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two prompts, the second one padded in front; what is there of them; and the second one alone."""
    prompt = tokens(2, LENGTH).numpy()
    there = np.ones_like(prompt)
    there[1, : LENGTH - SHORT] = 0
    return prompt, there, prompt[1:, LENGTH - SHORT :]


@pytest.mark.parametrize(
    ("asked", "holds"),
    [(WINDOW, "the latest 7 tokens"), (SINKS, "every token"), ("exact", "every token")],
    ids=["window", "sinks", "all"],
)
def test_a_row_that_is_padded_goes_on_as_it_does_alone(asked: object, holds: str, tmp_path: Path) -> None:
    report, decoder = written(tmp_path, asked)
    assert set(report.caches.values()) == {holds}
    prompt, there, alone = batch()
    text = decoder.generate(prompt, 12, there=there)
    assert text[1, LENGTH - SHORT :].tolist() == decoder.generate(alone, 12)[0].tolist()
    assert text[0].tolist() == decoder.generate(prompt[:1], 12)[0].tolist()
    assert text[1, LENGTH:].tolist() != decoder.generate(prompt, 12)[1, LENGTH:].tolist(), "the padding would have been seen"


def test_padding_stands_in_front(tmp_path: Path) -> None:
    _, decoder = written(tmp_path, WINDOW)
    prompt, there, _ = batch()
    with pytest.raises(ExportError, match="in front of their tokens"):
        decoder.generate(prompt, 1, there=there[:, ::-1])
    with pytest.raises(ShapeError, match=r"\[2, 20\]"):
        decoder.generate(prompt, 1, there=there[:, 1:])


def test_a_file_without_a_mask_says_how_to_get_one(tmp_path: Path) -> None:
    _, decoder = written(tmp_path, WINDOW, padded=False)
    prompt, there, _ = batch()
    with pytest.raises(ExportError, match="attention_mask"):
        decoder.generate(prompt, 1, there=there)
