"""What every end to end test starts from: nothing compiled, nothing measured, and, where asked for, a quick code generator."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch

from attn_compiler import backend
from attn_compiler import torch_private as private
from attn_compiler.runtime import cpp
from end_to_end.models import interpreted


@pytest.fixture(autouse=True)
def _nothing_is_compiled_yet() -> Iterator[None]:
    torch.compiler.reset()
    backend._RECENT.clear()  # it holds a limited number: tests count what is new
    yield
    torch.compiler.reset()


@pytest.fixture(autouse=True)
def _no_machine_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Generated kernels are faster, but for a few queries."""
    monkeypatch.setattr(cpp, "_few_gain", lambda dtype, queries, keys: 2.0 if queries > cpp.FEW else 0.5)
    monkeypatch.setattr(cpp, "_rows_gain", lambda *_: 2.0)
    monkeypatch.setattr(cpp, "_dense_gain", lambda *_: 2.0)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What we do to a graph is all that is tested."""
    monkeypatch.setattr(private, "inductor", lambda: interpreted)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """As `quick`, with one entry for each graph that was compiled to its end: Dynamo also calls backends, then starts again."""
    done: list[int] = []

    def counting(gm: torch.fx.GraphModule, inputs: Sequence[object], config_patches: object = None) -> Callable[..., object]:
        result = interpreted(gm, inputs)
        done.append(len(gm.graph.nodes))
        return result

    monkeypatch.setattr(private, "inductor", lambda: counting)
    return done
