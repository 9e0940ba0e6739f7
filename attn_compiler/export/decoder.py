"""Generates text in onnxruntime with a file that `export_onnx(…, decode=True)` wrote."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attn_compiler.errors import ExportError, ShapeError

Tokens = NDArray[np.int64]
Choose = Callable[[NDArray[Any]], Tokens]  # from logits [rows, vocabulary], the next token of each row


def likeliest(logits: NDArray[Any]) -> Tokens:
    """The token with the largest logit."""
    found: Tokens = logits.argmax(-1)
    return found


class Decoder:
    """One file, which reads a prompt and the tokens after it alike; what it remembers stays in onnxruntime's memory."""

    def __init__(self, path: str | Path, options: Any = None) -> None:
        import onnxruntime

        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._wrap = onnxruntime.OrtValue.ortvalue_from_numpy
        self._past = {x.name: x for x in self._session.get_inputs() if x.name.startswith("past_key_values.")}
        # onnxruntime's GroupQueryAttention, which reads codes, takes several tokens behind others for one row alone.
        self._one_by_one = any(x.type in ("tensor(int8)", "tensor(uint8)") for x in self._past.values())
        self._padded = PADDING in [x.name for x in self._session.get_inputs()]
        self._outputs = [x.name for x in self._session.get_outputs()]
        if not self._past or "logits" not in self._outputs:
            raise ExportError(f"{path} has no cache among its inputs: it was not written with `decode=True`")

    def start(self, rows: int) -> Mapping[str, Any]:
        """The past of texts that have not begun."""
        sizes = {name: [n if isinstance(n, int) else 0 for n in x.shape[1:]] for name, x in self._past.items()}
        empty = {name: np.zeros((rows, *sizes[name]), _DTYPES[x.type]) for name, x in self._past.items()}
        return {name: self._wrap(x) for name, x in empty.items()}

    def step(
        self, tokens: Tokens, before: int, past: Mapping[str, Any], there: Tokens | None = None
    ) -> tuple[NDArray[Any], Mapping[str, Any]]:
        """Read more tokens of each row, behind that many: the logits of what follows, and the past for the next call.

        `there` says of all tokens, those before included, whether they are (1), or stand in front of a shorter row (0).
        """
        rows, count = tokens.shape
        there = self._there(rows, before + count, there)
        if self._one_by_one and rows > 1 and before and count > 1:
            for place in range(count - 1):
                _, past = self.step(tokens[:, place : place + 1], before + place, past, there[:, : before + place + 1])
            return self.step(tokens[:, -1:], before + count - 1, past, there)
        positions = np.maximum(there.cumsum(1)[:, before:] - 1, 0)
        given = {"input_ids": tokens, "position_ids": positions, **({PADDING: there} if self._padded else {})}
        wrapped = {name: self._wrap(np.ascontiguousarray(x, np.int64)) for name, x in given.items()}
        results = dict(zip(self._outputs, self._session.run_with_ort_values(self._outputs, {**wrapped, **past}), strict=True))
        logits = results.pop("logits").numpy()[:, -1]
        return logits, {name.replace("present", "past_key_values"): x for name, x in results.items()}

    def _there(self, rows: int, length: int, there: Tokens | None) -> Tokens:
        if there is None:
            return np.ones((rows, length), np.int64)
        if there.shape != (rows, length):
            raise ShapeError(f"`there` is said of {[rows, length]} tokens, those before included; found {list(there.shape)}")
        if not self._padded and not there.all():
            raise ExportError(f"this file's rows are of one length: export it with `{PADDING}` among its inputs")
        if (np.diff(there, axis=1) < 0).any() or not there[:, -1].all():
            raise ExportError("rows are padded in front of their tokens, and nowhere else")
        return there

    def generate(
        self, prompt: Tokens, count: int, *, there: Tokens | None = None, end: int | None = None, choose: Choose = likeliest
    ) -> Tokens:
        """The prompts and up to `count` tokens after them; a row that met `end` goes on with it.

        Shorter prompts are padded in front: `there` is 1 for the tokens that are, as `attention_mask` of transformers has it.
        """
        if prompt.ndim != 2 or not prompt.shape[1]:
            raise ShapeError(f"a prompt is [rows, tokens], with one token at least; found {list(prompt.shape)}")
        text, new, past = prompt, prompt, self.start(len(prompt))
        there = self._there(len(prompt), prompt.shape[1], there)
        for _ in range(count):
            logits, past = self.step(new, text.shape[1] - new.shape[1], past, there)
            new = choose(logits)[:, None]
            if end is not None:
                new = np.where((text[:, prompt.shape[1] :] == end).any(1, keepdims=True), end, new)
            text, there = np.concatenate([text, new], axis=1), np.concatenate([there, np.ones_like(new)], axis=1)
            if end is not None and (text[:, prompt.shape[1] :] == end).any(1).all():
                break
        return text


PADDING = "attention_mask"
_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
}
