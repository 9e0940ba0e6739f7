"""Models written to files that other programs run."""

from attn_compiler.export.decoder import Decoder
from attn_compiler.export.front import export_onnx
from attn_compiler.export.mlir.front import export_mlir
from attn_compiler.export.pt2 import export_pt2
from attn_compiler.export.report import ExportReport

__all__ = ["Decoder", "ExportReport", "export_mlir", "export_onnx", "export_pt2"]
