"""One attention as onnxruntime's own GroupQueryAttention, which knows a causal window."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def write_group_query(path: Path, length: int, heads: int, dim: int, window: int) -> None:
    """Write a file that takes q, k and v as [1, heads, length, dim], as ours do; it is given tokens before heads."""
    shape = [1, heads, length, dim]
    constants = {
        "tokens_first": np.array([1, length, heads * dim]),
        "heads_apart": np.array([1, length, heads, dim]),
        "last": np.array([length - 1], np.int32),
        "all": np.array(length, np.int32),
    }
    nodes = []
    for name in ("q", "k", "v"):
        nodes.append(helper.make_node("Transpose", [name], [f"{name}_turned"], perm=[0, 2, 1, 3]))
        nodes.append(helper.make_node("Reshape", [f"{name}_turned", "tokens_first"], [f"{name}_flat"]))
    nodes.append(
        helper.make_node(
            "GroupQueryAttention",
            ["q_flat", "k_flat", "v_flat", "", "", "last", "all"],
            ["flat", "keys", "values"],
            domain="com.microsoft",
            num_heads=heads,
            kv_num_heads=heads,
            local_window_size=window,
        )
    )
    nodes.append(helper.make_node("Reshape", ["flat", "heads_apart"], ["turned"]))
    nodes.append(helper.make_node("Transpose", ["turned"], ["out"], perm=[0, 2, 1, 3]))
    graph = helper.make_graph(
        nodes,
        "group_query",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("q", "k", "v")],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(x, name) for name, x in constants.items()],
    )
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
