"""The versions of ONNX's operators that files are written in."""

from __future__ import annotations

OPSETS = (24, 18)  # the newest that PyTorch writes and onnxruntime runs; what older importers know
OPSET = OPSETS[0]
