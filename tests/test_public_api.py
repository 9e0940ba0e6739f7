"""The names that other people's scripts rely on."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import attn_compiler
from attn_compiler import errors

PROMISED = {"attend", "errors", "explain", "library", "load_policy", "reference", "testing"}
LATER = {
    "adapt",
    "cache",
    "calibrate",
    "choose",
    "distill",
    "encode",
    "export_mlir",
    "export_onnx",
    "export_pt2",
    "fix_scales",
    "kernel_source",
    "schedule",
    "step",
}
# What the functions take and return, what was decided.
CONVENIENT = {"Adapted", "Codes", "Distilled", "ExportReport", "Policy", "Report", "Tables", "Variant", "reports"}

ERRORS = [error for _, error in inspect.getmembers(errors, inspect.isclass) if issubclass(error, Exception)]


def test_what_is_promised_is_there() -> None:
    assert set(attn_compiler.__all__) >= PROMISED


def test_nothing_else_is_public() -> None:
    assert set(attn_compiler.__all__) <= PROMISED | LATER | CONVENIENT


def test_the_names_are_sorted() -> None:
    assert list(attn_compiler.__all__) == sorted(attn_compiler.__all__)


@pytest.mark.parametrize("name", sorted(PROMISED))
def test_a_public_name_resolves(name: str) -> None:
    assert getattr(attn_compiler, name) is not None


@pytest.mark.parametrize("name", sorted(PROMISED - {"errors", "library", "testing"}))
def test_a_public_function_says_what_it_does(name: str) -> None:
    assert inspect.getdoc(getattr(attn_compiler, name))


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.__name__)
def test_one_except_clause_catches_every_error(error: type[Exception]) -> None:
    assert issubclass(error, errors.AttnError)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("attend", ["q", "k", "v", "variant", "scale", "bias", "tables", "values", "q_positions", "k_positions"]),
        ("reference", ["q", "k", "v", "variant"]),
        ("explain", ["model", "args", "kwargs", "policy", "tables", "values"]),
    ],
)
def test_a_signature_begins_as_promised(name: str, parameters: list[str]) -> None:
    found = list(inspect.signature(getattr(attn_compiler, name)).parameters)
    assert found[: len(parameters)] == parameters


def test_the_algebra_imports_without_torch() -> None:
    path = str(Path(attn_compiler.__file__).parent)
    probe = (
        "import sys, types; package = types.ModuleType('attn_compiler'); "
        f"package.__path__ = [{path!r}]; sys.modules['attn_compiler'] = package; "
        "import attn_compiler.algebra.variant; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", probe], check=True)


def test_every_layer_imports_on_its_own() -> None:
    for layer in ("algebra", "planning", "targets", "runtime", "graph"):
        assert importlib.import_module(f"attn_compiler.{layer}").__doc__
