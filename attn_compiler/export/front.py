"""`attn.export_onnx`: a model with its policy as one ONNX file that any onnxruntime runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attn_compiler import library
from attn_compiler.errors import ExportError, MissingPackageError
from attn_compiler.export.program import Rewritten, rewritten, traced
from attn_compiler.export.report import ExportReport
from attn_compiler.planning.policy import Policy
from attn_compiler.planning.report import report_of
from attn_compiler.targets.onnx.choice import check_strategy

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def export_onnx(
    model: nn.Module,
    args: Sequence[Any],
    path: str | Path,
    policy: str | Path | Mapping[str, object] | Policy | None = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    tables: Mapping[str, Tensor] | None = None,
    values: Mapping[str, int] | None = None,
    dynamic_shapes: Any = None,
    strategy: str = "auto",
    decode: bool = False,
    flavor: Literal["plain", "genai"] = "plain",
) -> ExportReport:
    """Write a model and what a policy makes of its attentions as an ONNX file of standard operators.

    Each attention that is rewritten is one local function `attn::<its name>`. The file is compared in onnxruntime with the
    rewritten model on random inputs before it gets its name: where they differ, there is no file. `dynamic_shapes` is that
    of torch.export; `tables` become constants of the file; `strategy` forces a form of the functions (`dense`, `scan`, `either`,
    `listed`). Lengths like those the file is meant for let the comparison see what will run.
    """
    if decode or flavor != "plain":
        raise ExportError("decoding with caches is not exported yet: leave out `decode` and `flavor`")
    check_strategy(strategy)
    if not Path(path).parent.is_dir():
        raise ExportError(f"there is no folder {Path(path).parent}, where {Path(path).name} should be written")
    _need_packages()
    read = library.load_policy(policy if policy is not None else "exact").with_values(dict(values or {}))
    with torch.no_grad():
        program = traced(model, args, kwargs or {}, dynamic_shapes)
        result = rewritten(program, read, dict(tables or {}))
        return _written(result, read, Path(path), args, kwargs or {}, strategy)


def _written(
    result: Rewritten, policy: Policy, path: Path, args: Sequence[Any], kwargs: Mapping[str, Any], strategy: str
) -> ExportReport:
    from attn_compiler.export.check import check
    from attn_compiler.export.files import write
    from attn_compiler.export.translation import translated

    made = translated(result, strategy)
    checks, size = write(made.model, path, lambda at: check(at, result, args, kwargs))
    return ExportReport(path, report_of(result.plan, policy), made.strategies, checks, size)


def _need_packages() -> None:
    for package in _PACKAGES:
        if find_spec(package) is None:
            raise MissingPackageError(f'exporting to ONNX needs the package {package}: pip install "attn-compiler[onnx]"')
