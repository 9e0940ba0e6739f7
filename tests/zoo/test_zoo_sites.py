"""What is known of each attention of the zoo besides what it computes: name, kind, heads, layer, and where its queries stand."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import fx

from attn_compiler.algebra.notation import notation
from attn_compiler.graph.analysis import analyze
from attn_compiler.planning.plan import Plan
from attn_compiler.planning.site import Site
from zoo.capture import Example, visit_graphs
from zoo.catalogue import ZOO
from zoo.sweep import configurations

GOLDENS = Path(__file__).parent.parent / "goldens" / "sites"
SAMPLE = {"llama", "gemma3", "swin", "sd3", "t5_pad", "nn_tdec", "siglip", "perceiver", "segformer"}

CASES = [
    pytest.param(name, implementation, id=f"{name}-{implementation}", marks=[] if name in SAMPLE else [pytest.mark.full])
    for name, implementation in configurations()
]


def told(site: Site) -> str:
    heads = f"{site.heads} heads" if site.heads == site.kv_heads else f"{site.heads} heads over {site.kv_heads}"
    layer = "no layer" if site.layer is None else f"layer {site.layer} of {site.layers}"
    stands = f"query i at {notation(site.frame.position)}" if site.frame else "queries at unknown places"
    return f"{site.name or '(no module)'}: {site.kind.value}, {heads}, {layer}, {stands}\n"


@pytest.mark.filterwarnings("ignore")  # of the models' own code
@pytest.mark.parametrize(("name", "implementation"), CASES)
def test_what_is_known_of_each_attention(name: str, implementation: str, update_golden: bool) -> None:
    sites: list[Site] = []

    def visit(gm: fx.GraphModule, example_inputs: list[Example]) -> None:
        sites.extend(one.site for one in analyze(gm, example_inputs, lambda *_: Plan()).described)

    visit_graphs(*ZOO[name].make(implementation), visit)
    path, found = GOLDENS / f"{name}.txt", "".join(map(told, sites))
    if update_golden:
        path.write_text(found, encoding="utf-8")
    assert found == path.read_text(encoding="utf-8"), "if the new text is right, run pytest with --update-golden"
