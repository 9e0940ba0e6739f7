"""Times what compiling costs besides Inductor: each of our passes, and what they are of a whole compilation.

    python benchmarks/passes.py FOLDER

writes `passes.md` into FOLDER.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when transformers is imported
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))  # where the zoo lives

import torch
from torch import Tensor, fx, nn
from torch._inductor.utils import fresh_cache

from _tables import Row, markdown, processor
from attn_compiler import library
from attn_compiler.backend import Settings
from attn_compiler.graph.capture import capture
from attn_compiler.graph.describe import describe
from attn_compiler.graph.match import match
from attn_compiler.graph.rewrite import Replacement, rewrite
from attn_compiler.graph.symbolic import SymbolicReader
from attn_compiler.planning.plan import NearMiss
from attn_compiler.runtime.targets import TARGETS
from zoo.capture import Example, visit_graphs
from zoo.catalogue import ZOO


def llama(layers: int) -> tuple[nn.Module, dict[str, Tensor]]:
    import transformers

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 99}
    config = transformers.LlamaConfig(num_hidden_layers=layers, attn_implementation="eager", **sizes)
    model = transformers.LlamaForCausalLM(config)
    return model.eval(), {"input_ids": torch.randint(0, 99, (2, 64))}


MODELS: dict[str, Callable[[], tuple[nn.Module, dict[str, Tensor]]]] = {
    "llama, 12 layers": lambda: llama(12),
    "llama, 32 layers": lambda: llama(32),
    "swin": lambda: ZOO["swin"].make("eager"),
}


STEPS = ("capture", "match", "describe", "plan", "rewrite")


def measured(name: str, *, dynamic: bool) -> Row:
    """The seconds of each pass over all graphs of a model, and what they are of a compilation that finds no cache."""
    spent = dict.fromkeys(STEPS, 0.0)
    sites = 0

    def visit(gm: fx.GraphModule, example_inputs: Sequence[Example]) -> None:
        nonlocal sites
        began = time.perf_counter()

        def lap(step: str) -> None:
            nonlocal began
            now = time.perf_counter()
            spent[step] += now - began
            began = now

        graph = capture(gm, example_inputs)
        lap("capture")
        matches = match(graph)
        lap("match")
        reader = SymbolicReader(graph)
        described = [one for found in matches.sites if not isinstance(one := describe(graph, found, reader), NearMiss)]
        lap("describe")
        plan = Settings(library.load_policy("exact")).planner([one.site for one in described], matches.near_misses)
        lap("plan")
        chosen = [(one, decision) for one, decision in zip(described, plan.decisions, strict=True) if decision.target]
        rewrite(graph, [Replacement(one, decision.variant, TARGETS[decision.target]) for one, decision in chosen])
        lap("rewrite")
        sites += len(described)

    visit_graphs(*MODELS[name](), visit, dynamic=dynamic)
    cold = compiled_cold(name, dynamic=dynamic)
    per_site = 1000 * (spent["match"] + spent["describe"] + spent["plan"]) / max(1, sites)
    seconds = {f"{step} [s]": f"{spent[step]:.3f}" for step in STEPS}
    shares = {f"{step} / cold [%]": f"{100 * spent[step] / cold:.1f}" for step in ("capture", "rewrite")}
    lengths = "dynamic" if dynamic else "static"
    found = {"model": name, "lengths": lengths, "sites": sites}
    row = {**found, **seconds, "match to plan, a site [ms]": f"{per_site:.1f}", "cold compile [s]": f"{cold:.1f}", **shares}
    print(row, flush=True)
    return row


def compiled_cold(name: str, *, dynamic: bool) -> float:
    """The seconds of a first call that finds nothing in any cache."""
    model, inputs = MODELS[name]()
    torch.compiler.reset()
    with fresh_cache(), torch.no_grad():
        began = time.perf_counter()
        torch.compile(model, backend="attn", dynamic=dynamic)(**inputs)
        return time.perf_counter() - began


def main() -> None:
    torch.set_num_threads(1)
    measured("swin", dynamic=False)  # the first time imports much
    rows = [measured(name, dynamic=dynamic) for name in MODELS for dynamic in (False, True)]
    where = f"{processor()}, {os.cpu_count()} CPUs (load {os.getloadavg()[0]:.1f}), torch {torch.__version__}, one thread"
    text = f"# What our passes cost while compiling\n\nOn {where}.\n\n{markdown(rows)}"
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "passes.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
