"""`attn demo`: a small language model compiled three ways on this machine, measured side by side."""

from __future__ import annotations

import importlib
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from attn_compiler.backend import reports
from attn_compiler.errors import MissingPackageError
from attn_compiler.runtime.schedule import schedule

OWN_WINDOW, WINDOW = 512, 128
MASK = f"causal & window({WINDOW})"
POLICY = {"version": 1, "because": "A demonstration.", "rules": [{"match": {"kind": "self"}, "attn": {"mask": MASK}}]}
Run = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Way:
    """One way to compile the model, and what it measured."""

    name: str
    run: Run
    seconds: tuple[float, ...] = ()

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def demo(
    length: Annotated[int, typer.Option(help="Tokens of the prompt.", min=16)] = 4096,
    layers: Annotated[int, typer.Option(help="Layers of the model.", min=1)] = 4,
    hidden: Annotated[int, typer.Option(help="Width of the model.", min=64)] = 512,
    repeats: Annotated[int, typer.Option(help="How often each way is measured.", min=1)] = 5,
    out: Annotated[Path, typer.Option(help="Where the picture is written.")] = Path("demo-output"),
) -> None:
    """Compile a model whose own mask is a window, by Inductor and by us, and measure both on this machine."""
    torch.manual_seed(0)
    typer.echo(f"{_machine()}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}")
    typer.echo(
        f"Mistral architecture, random weights: {layers} layers of {hidden}, window {OWN_WINDOW}, {length} tokens, float32\n"
    )
    model, tokens = _model(layers, hidden), torch.randint(3, 512, (1, length))
    names = ("Inductor", 'backend="attn", no policy', 'backend="attn", policy')
    before = len(reports())
    ways = [
        Way(names[0], _compiled(model, "inductor", None)),
        Way(names[1], _compiled(model, "attn", None)),
        Way(names[2], _compiled(model, "attn", POLICY)),
    ]
    with torch.no_grad():
        outputs = [way.run(tokens) for way in ways]
        asked_for = _narrowed(model, tokens)
        ways = _measured(ways, tokens, repeats)
    for report in reports()[before:]:
        typer.echo(f"{report}\n")
    for way, output in zip(ways, outputs, strict=True):
        difference = (output - outputs[0]).abs().max().item()
        typer.echo(
            f"{way.name:28} {1000 * way.median:8.0f} ms   {ways[0].median / way.median:5.2f} × Inductor   "
            f"logits differ by up to {difference:.1e}"
        )
    typer.echo(
        f"\nMedians of {repeats} interleaved runs. Without a policy only the order of sums differs. The policy narrows the window"
    )
    typer.echo(
        "and so changes the results, as it was asked to: from the same weights with `sliding_window` set to that width, run"
    )
    typer.echo(f"eagerly, they differ by up to {(outputs[2] - asked_for).abs().max().item():.1e}.")
    _picture(length, out)


def _model(layers: int, hidden: int) -> torch.nn.Module:
    if find_spec("transformers") is None:
        raise MissingPackageError("the demonstration needs the package transformers: pip install transformers")
    transformers = importlib.import_module("transformers")
    config = transformers.MistralConfig(
        vocab_size=512,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        sliding_window=OWN_WINDOW,
    )
    model: torch.nn.Module = transformers.MistralForCausalLM(config).eval()
    return model


def _compiled(model: torch.nn.Module, backend: str, policy: object) -> Run:
    torch.compiler.reset()
    options: Any = {"policy": policy} if policy is not None else None  # torch's annotation knows no mappings

    # Each way is a function of its own, so that none reuses the code compiled for another.
    def run(tokens: Tensor) -> Tensor:
        logits: Tensor = model(tokens, use_cache=False).logits
        return logits

    compiled: Any = torch.compile(run, backend=backend, options=options, dynamic=False)
    return compiled  # type: ignore[no-any-return]


def _narrowed(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    """The model itself, uncompiled, with the window that the policy asks for."""
    config: Any = model.config
    config.sliding_window = WINDOW
    logits: Tensor = model(tokens, use_cache=False).logits
    config.sliding_window = OWN_WINDOW
    return logits


def _measured(ways: list[Way], tokens: Tensor, repeats: int) -> list[Way]:
    """Take turns, so that what else happens on the machine hits all alike."""
    seconds: dict[str, list[float]] = {way.name: [] for way in ways}
    for _ in range(repeats):
        for way in ways:
            start = time.perf_counter()
            way.run(tokens)
            seconds[way.name].append(time.perf_counter() - start)
    return [Way(way.name, way.run, tuple(seconds[way.name])) for way in ways]


def _machine() -> str:
    """The name of the processor."""
    described = Path("/proc/cpuinfo")
    lines = described.read_text(encoding="utf-8").splitlines() if described.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _picture(length: int, out: Path) -> None:
    if find_spec("matplotlib") is None:
        typer.echo("\nNo picture: pip install matplotlib")
        return
    out.mkdir(parents=True, exist_ok=True)
    path = out / "window.png"
    found = schedule(MASK, length, length)
    found.draw(path)
    typer.echo(f"\n{path}: the policy's mask visits {found.density:.1%} of the map")
