"""attn-compiler: finds every attention in a PyTorch model and rewrites it as a policy says."""

from attn_compiler import errors, library, testing
from attn_compiler.adaptation.adapted import Adapted, adapt
from attn_compiler.adaptation.distill import Distilled, distill
from attn_compiler.algebra.variant import Variant
from attn_compiler.backend import reports
from attn_compiler.calibration import calibrate, choose, fix_scales
from attn_compiler.explain import explain
from attn_compiler.export.front import export_onnx
from attn_compiler.export.mlir.front import export_mlir
from attn_compiler.export.pt2 import export_pt2
from attn_compiler.export.report import ExportReport
from attn_compiler.generation.front import cache
from attn_compiler.graph.tables import Tables
from attn_compiler.library import load_policy
from attn_compiler.planning.policy import Policy
from attn_compiler.planning.report import Report
from attn_compiler.runtime.attend import attend, reference
from attn_compiler.runtime.codes import encode
from attn_compiler.runtime.kernel_source import kernel_source
from attn_compiler.runtime.schedule import schedule
from attn_compiler.runtime.step import step
from attn_compiler.targets.rows import Codes

__all__ = [
    "Adapted",
    "Codes",
    "Distilled",
    "ExportReport",
    "Policy",
    "Report",
    "Tables",
    "Variant",
    "adapt",
    "attend",
    "cache",
    "calibrate",
    "choose",
    "distill",
    "encode",
    "errors",
    "explain",
    "export_mlir",
    "export_onnx",
    "export_pt2",
    "fix_scales",
    "kernel_source",
    "library",
    "load_policy",
    "reference",
    "reports",
    "schedule",
    "step",
    "testing",
]
