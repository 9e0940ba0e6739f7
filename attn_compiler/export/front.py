"""`attn.export_onnx`: a model with its policy as one ONNX file that any onnxruntime runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attn_compiler import library
from attn_compiler.errors import ExportError, MissingPackageError, did_you_mean
from attn_compiler.export.files import check_folder
from attn_compiler.export.prepared import Prepared
from attn_compiler.export.program import rewritten, traced
from attn_compiler.export.report import ExportReport
from attn_compiler.export.trials import runs
from attn_compiler.planning.policy import Policy
from attn_compiler.planning.report import report_of
from attn_compiler.runtime.exported import OnnxTarget
from attn_compiler.targets.onnx.choice import check_strategy
from attn_compiler.targets.onnx.opsets import OPSET, OPSETS

_FLAVORS = ("plain", "genai")
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
    opset: int = OPSET,
    check: bool = True,
) -> ExportReport:
    """Write a model and what a policy makes of its attentions as an ONNX file of standard operators.

    Each attention that is rewritten is one local function `attn::<its name>`. The file is compared in onnxruntime with the
    rewritten model on random inputs before it gets its name: where they differ, there is no file; `check=False` leaves that out.
    `dynamic_shapes` is that of torch.export; `tables` become constants of the file; `strategy` forces a form of the functions
    (`attn_compiler.targets.onnx.choice.STRATEGIES` lists them; where an attention has none such, the report says why not);
    `opset=18` is for importers that do not know ONNX's own `Attention`. Lengths like those the file is meant for let the
    comparison see what will run.

    With `decode`, the model is one of transformers that generates text, and its caches are inputs and outputs: one file reads
    prompts and single tokens (`attn_compiler.export.Decoder`), and a layer remembers what the policy lets later tokens see.
    `flavor="genai"` writes `genai_config.json` beside it, for onnxruntime-genai: the same, but each cache holds the whole text.
    """
    _check_flavor(flavor, decode)
    if decode and dynamic_shapes is not None:
        raise ExportError("a file that decodes takes any number of rows and tokens: leave out `dynamic_shapes`")
    check_strategy(strategy)
    if opset not in OPSETS:
        raise ExportError(f"files are written in opset {' or '.join(map(str, OPSETS))}; found {opset}")
    check_folder(Path(path))
    _need_packages()
    read = library.load_policy(policy if policy is not None else "exact").with_values(dict(values or {}))
    with torch.no_grad():
        if decode:
            write_step = {"plain": _stepwise, "genai": _for_genai}[flavor]
            prepared = write_step(model, args, kwargs or {}, read, dict(tables or {}), Path(path))
        else:
            program = traced(model, args, kwargs or {}, dynamic_shapes)
            result = rewritten(program, read, dict(tables or {}), OnnxTarget)
            prepared = Prepared(result, lambda: runs(program, result.module, args, kwargs or {}))
        return _written(prepared, read, Path(path), strategy, opset, check=check)


def _check_flavor(flavor: str, decode: bool) -> None:
    """Raise where names are asked for that nobody reads."""
    if flavor not in _FLAVORS:
        raise ExportError(f'there is no flavor "{flavor}"{did_you_mean(flavor, _FLAVORS)}; there are {" and ".join(_FLAVORS)}')
    if flavor == "genai" and not decode:
        raise ExportError('onnxruntime-genai generates text: `flavor="genai"` needs `decode=True`')


def _stepwise(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], policy: Policy, tables: Mapping[str, Tensor], path: Path
) -> Prepared:
    from attn_compiler.export.decoding import decoding
    from attn_compiler.export.recalling import recalling
    from attn_compiler.export.stepwise import stepwise

    states = partial(recalling, model, policy=policy, given=tables)
    return decoding(stepwise(model, args, kwargs, states=states), policy, tables)


def _for_genai(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], policy: Policy, tables: Mapping[str, Tensor], path: Path
) -> Prepared:
    """onnxruntime-genai makes room for logits of all tokens and, in each layer, for keys of the whole text."""
    from attn_compiler.export.decoder import PADDING
    from attn_compiler.export.decoding import decoding
    from attn_compiler.export.genai import NAME, genai_config
    from attn_compiler.export.stepwise import stepwise

    if kwargs.get(PADDING) is not None:
        raise ExportError(f'onnxruntime-genai\'s texts begin together here: leave `{PADDING}` out, or `flavor="genai"`')
    step = stepwise(model, args, kwargs, logits=0)
    whole = decoding(step, policy, tables, hold=lambda variant, heads: None, remembering=lambda variant: False, codes=False)
    return replace(whole, beside={NAME: genai_config(model, step, path)})


def _written(prepared: Prepared, policy: Policy, path: Path, strategy: str, opset: int, *, check: bool) -> ExportReport:
    from attn_compiler.export.check import check as checked
    from attn_compiler.export.onnx_files import write
    from attn_compiler.export.translation import translated

    result = prepared.rewritten
    made = translated(result, strategy, opset)
    prepared.finish(made.model)
    trials = prepared.runs() if check else ()
    checks, size = write(made.model, path, lambda at: checked(at, result.module, trials), prepared.beside)
    return ExportReport(path, report_of(result.plan, policy), made.strategies, checks, size, prepared.caches, made.notes)


def _need_packages() -> None:
    for package in _PACKAGES:
        if find_spec(package) is None:
            raise MissingPackageError(f'exporting to ONNX needs the package {package}: pip install "attn-compiler[onnx]"')
