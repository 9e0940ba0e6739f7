"""The shape that CONTRIBUTING.md asks of every file, held by machine."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("attn_compiler", "patterns", "codegen", "tests", "benchmarks", "examples")
CONTENT = ("patterns", "codegen")

LONGEST_FILE = 400
LONGEST_FUNCTION = 60  # the aim is 40; a long table in a function is fine, a long argument is not
BANNED_NAMES = {"utils", "util", "helpers", "helper", "common", "base", "manager", "misc"}

# A new torch release is this file's work; benchmarks and tests may look into torch, to see what it does.
TORCH_PRIVATE = Path("attn_compiler/torch_private.py")
PRIVATE_THOUGH_NAMED_LIKE_PUBLIC = ("torch.fx.experimental", "torch.fx.proxy", "torch.fx.traceback", "torch.compiler.config")

# A graph that cannot be rewritten must still compile, whatever the reason.
MAY_CATCH_EVERYTHING = {Path("attn_compiler/backend.py")}

Function = ast.FunctionDef | ast.AsyncFunctionDef

MODULES = sorted(
    path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py") if "__pycache__" not in path.parts
)
every_module = pytest.mark.parametrize("path", MODULES, ids=str)


def _tree(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(), filename=str(path))


def _functions(tree: ast.Module) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def _imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{name.name}" for name in node.names)


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def _is_private_to_torch(dotted: str) -> bool:
    """Operators (`torch.ops.aten._softmax`) have a schema that is public, whatever they are called."""
    if dotted.startswith("torch.ops."):
        return False
    inside = any(map(_is_private, dotted.split(".")))
    return dotted.split(".")[0] == "torch" and (inside or dotted.startswith(PRIVATE_THOUGH_NAMED_LIKE_PUBLIC))


def _dotted(node: ast.expr, imported: dict[str, str]) -> str:
    """An attribute as it would be imported: `fx.Node` is `torch.fx.Node`; of a value, `?.Node`."""
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value, imported)}.{node.attr}"
    return imported.get(node.id, "?") if isinstance(node, ast.Name) else "?"


def _touches_private_torch(tree: ast.Module) -> set[str]:
    imported = {"self": "self", "cls": "cls"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {(x.asname or x.name.split(".")[0]): (x.name if x.asname else x.name.split(".")[0]) for x in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported |= {(x.asname or x.name): f"{node.module}.{x.name}" for x in node.names}
    read = {_dotted(node, imported) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names = {name for name in (*_imports(tree), *read) if _is_private_to_torch(name)}
    own = {name.removeprefix("self.") for name in read} | {function.name for function in _functions(tree)}
    last = {name: name.split(".")[-1] for name in read if name.startswith("?.")}
    of_values = {name for name, attribute in last.items() if _is_private(attribute) and attribute not in own}
    return names | of_values | {name for name in read if name.endswith(".node.expr")}


def _swallows_everything(handler: ast.ExceptHandler) -> bool:
    last = handler.body[-1]
    if isinstance(last, ast.Raise) and last.exc is None:
        return False
    caught = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(x is None or (isinstance(x, ast.Name) and x.id in {"Exception", "BaseException"}) for x in caught)


@every_module
def test_a_file_is_short(path: Path) -> None:
    assert len((ROOT / path).read_text().splitlines()) <= LONGEST_FILE


@every_module
def test_a_module_opens_with_what_it_is_for(path: Path) -> None:
    source = (ROOT / path).read_text()
    assert not source.strip() or ast.get_docstring(ast.parse(source))


@every_module
def test_a_function_is_short(path: Path) -> None:
    lengths = {f.name: (f.end_lineno or f.lineno) - f.lineno + 1 for f in _functions(_tree(path))}
    assert {name: length for name, length in lengths.items() if length > LONGEST_FUNCTION} == {}


@every_module
def test_a_file_is_named_after_what_it_holds(path: Path) -> None:
    assert not {path.stem, *path.parent.parts} & BANNED_NAMES


@every_module
def test_no_error_is_swallowed_unseen(path: Path) -> None:
    handlers = [node for node in ast.walk(_tree(path)) if isinstance(node, ast.ExceptHandler)]
    assert path in MAY_CATCH_EVERYTHING or not any(map(_swallows_everything, handlers))


@pytest.mark.parametrize("path", [path for path in MODULES if path.parts[0] == "attn_compiler"], ids=str)
def test_the_engine_imports_no_content(path: Path) -> None:
    content = (*CONTENT, *(f"attn_compiler.{folder}" for folder in CONTENT))
    found = {name for name in _imports(_tree(path)) if name.startswith(tuple(f"{x}." for x in content))}
    assert found == set()


@pytest.mark.parametrize(
    "path", [x for x in MODULES if x.parts[0] not in ("tests", "benchmarks") and x != TORCH_PRIVATE], ids=str
)
def test_what_is_private_to_torch_is_touched_in_one_place(path: Path) -> None:
    assert _touches_private_torch(_tree(path)) == set()


@pytest.mark.parametrize(
    ("source", "touched"),
    [
        ("from torch._ops import OpOverload", "torch._ops.OpOverload"),
        ("from torch import _C", "torch._C"),
        ("import torch._dynamo", "torch._dynamo"),
        ("import torch\ndef f(): return torch._C._functorch", "torch._C._functorch"),
        ("from torch import fx\nfx.experimental.proxy_tensor", "torch.fx.experimental.proxy_tensor"),
        ("from torch.fx.experimental.symbolic_shapes import hint_int", "torch.fx.experimental.symbolic_shapes.hint_int"),
        ("def f(node): return node.target._schema", "?.target._schema"),
        ("def f(size): return size.node.expr", "?.node.expr"),
    ],
)
def test_what_is_private_to_torch_is_seen(source: str, touched: str) -> None:
    assert touched in _touches_private_torch(ast.parse(source))


@pytest.mark.parametrize("path", [path for path in MODULES if path.parts[0] == "tests"], ids=str)
def test_a_test_imports_no_other_test(path: Path) -> None:
    assert not {name for name in _imports(_tree(path)) if name.startswith(("tests.", "test_"))}


@pytest.mark.parametrize("path", [path for path in MODULES if path.parent == Path("examples")], ids=str)
def test_an_example_has_a_main(path: Path) -> None:
    assert "main" in {function.name for function in _functions(_tree(path))}


def test_no_folder_of_tests_is_a_package() -> None:
    assert list((ROOT / "tests").rglob("__init__.py")) == []
