"""Times what compiling costs besides Inductor: capture, match, and what describing, planning and rewriting add.

    python benchmarks/passes.py FOLDER

writes `passes.md` into FOLDER.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read when transformers is imported
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))  # where the zoo lives

import torch
from torch import Tensor, fx, nn

from _tables import Row, markdown
from attn_compiler.graph.capture import capture
from attn_compiler.graph.describe import describe
from attn_compiler.graph.match import match
from attn_compiler.graph.rewrite import Replacement, rewrite
from attn_compiler.graph.symbolic import SymbolicReader
from attn_compiler.planning.plan import NearMiss
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


def measured(name: str, *, dynamic: bool) -> Row:
    """The seconds of each pass over all graphs of a model, the second time: nothing is imported any more."""
    spent = dict.fromkeys(("capture", "match", "describe", "rewrite"), 0.0)
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
        rewrite(graph, [Replacement(one, one.site.computes) for one in described])
        lap("rewrite")
        sites += len(described)

    visit_graphs(*MODELS[name](), visit, dynamic=dynamic)
    per_site = 1000 * (spent["match"] + spent["describe"]) / max(1, sites)
    lengths = "dynamic" if dynamic else "static"
    seconds = {f"{step} [s]": round(t, 3) for step, t in spent.items()}
    return {"model": name, "lengths": lengths, "sites": sites, **seconds, "match + describe a site [ms]": round(per_site, 1)}


def main() -> None:
    torch.set_num_threads(1)
    measured("swin", dynamic=False)
    rows = [measured(name, dynamic=dynamic) for name in MODELS for dynamic in (False, True)]
    machine = f"{platform.machine()}, {os.cpu_count()} CPUs, torch {torch.__version__}, one thread"
    text = f"# What our passes cost while compiling\n\nOn {machine}; other work ran on the same machine.\n\n{markdown(rows)}"
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "passes.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
