"""Writes ONNX nodes one after the other, constants once for a whole function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from attn_compiler.algebra.expr import Sort

Number = bool | int | float
Value = ir.Value | Number
Attribute = int | float | str | Sequence[int] | ir.Graph
DTYPES: Mapping[str, ir.DataType] = {
    "float64": ir.DataType.DOUBLE,
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
    "int64": ir.DataType.INT64,
    "int32": ir.DataType.INT32,
    "int16": ir.DataType.INT16,
    "int8": ir.DataType.INT8,
    "uint8": ir.DataType.UINT8,
    "bool": ir.DataType.BOOL,
}
_NUMPY = {"float64": np.float64, "float32": np.float32, "float16": np.float16, "int64": np.int64, "bool": np.bool_}


def type_of(sort: Sort, real: str) -> str:
    """How values of a sort are held, where real numbers are held as `real`."""
    return {Sort.BOOL: "bool", Sort.INDEX: "int64", Sort.REAL: real}[sort]


@dataclass
class Shared:
    """What is one for a function and all graphs inside of it: constants, which stand in front, and numbers for names."""

    front: list[ir.Node] = field(default_factory=list)
    constants: dict[tuple[object, ...], ir.Value] = field(default_factory=dict)
    numbers: count[int] = field(default_factory=count)


@dataclass
class Nodes:
    """The nodes of a function, or of a graph inside of one of its nodes, which sees all that stands around it."""

    shared: Shared = field(default_factory=Shared)
    written: list[ir.Node] = field(default_factory=list)

    def op(self, operator: str, *inputs: ir.Value | None, **attributes: Attribute) -> ir.Value:
        """The one result of a standard operator."""
        result = self.named(operator.lower())
        self.write(operator, inputs, [result], attributes)
        return result

    def write(
        self,
        operator: str,
        inputs: Sequence[ir.Value | None],
        results: Sequence[ir.Value],
        attributes: Mapping[str, Attribute],
        domain: str = "",
    ) -> None:
        """Write an operator with as many results as there are names for them."""
        attrs = ir.convenience.convert_attributes(attributes)
        name = f"{results[0].name}_node"
        self.written.append(ir.Node(domain, operator, inputs, attributes=attrs, outputs=results, name=name))

    def named(self, stem: str) -> ir.Value:
        """A value with a name of its own."""
        return ir.Value(name=f"{stem}_{next(self.shared.numbers)}")

    def constant(self, value: object, dtype: str) -> ir.Value:
        """A number or an array of numbers."""
        array: NDArray[np.generic] = np.asarray(value, _NUMPY[dtype])
        key = (dtype, array.shape, array.tobytes())
        if key not in self.shared.constants:
            result = self.shared.constants[key] = self.named("constant")
            attributes = ir.convenience.convert_attributes({"value": ir.tensor(array)})
            self.shared.front.append(
                ir.Node("", "Constant", [], attributes=attributes, outputs=[result], name=f"{result.name}_node")
            )
        return self.shared.constants[key]

    def index(self, value: Value) -> ir.Value:
        """A count or place as a tensor without axes."""
        return value if isinstance(value, ir.Value) else self.constant(value, "int64")

    def vector(self, *sizes: Value) -> ir.Value:
        """Sizes as a tensor of one axis."""
        if not any(isinstance(size, ir.Value) for size in sizes):
            return self.constant(sizes, "int64")
        parts = [self.op("Reshape", self.index(size), self.constant([1], "int64")) for size in sizes]
        return parts[0] if len(parts) == 1 else self.op("Concat", *parts, axis=0)

    def size(self, x: ir.Value, axis: int) -> ir.Value:
        """The length of an axis, as a tensor without axes."""
        shape = self.op("Shape", x, start=axis, end=axis + 1)
        return self.op("Squeeze", shape, self.constant([0], "int64"))

    def reshape(self, x: ir.Value, *sizes: Value) -> ir.Value:
        """Other axes; 0 keeps an axis, -1 is what is left."""
        return self.op("Reshape", x, self.vector(*sizes))

    def turned(self, x: ir.Value, axes: int = 4) -> ir.Value:
        """The last two of so many axes exchanged."""
        return self.op("Transpose", x, perm=[*range(axes - 2), axes - 1, axes - 2])

    def range(self, start: Value, stop: Value, step: Value = 1) -> ir.Value:
        """The numbers from `start` to before `stop`."""
        if isinstance(start, int) and isinstance(stop, int) and isinstance(step, int):
            return self.constant(np.arange(start, stop, step), "int64")
        return self.op("Range", self.index(start), self.index(stop), self.index(step))

    def slice(self, x: ir.Value, axis: int, start: Value, stop: Value, step: Value = 1) -> ir.Value:
        """Neighbors along one axis, or every so many of them."""
        return self.op("Slice", x, *(self.vector(part) for part in (start, stop, axis, step)))

    def inside(self, body: Callable[[Nodes], tuple[Sequence[ir.Value], Sequence[ir.Value]]], name: str) -> ir.Graph:
        """A graph inside of a node: `body` writes it and says what it takes and gives."""
        nodes = Nodes(self.shared)
        inputs, outputs = body(nodes)
        return ir.Graph(inputs, outputs, nodes=nodes.written, name=name)

    def carrying(
        self, step: Step, carried: Sequence[ir.Value], types: Sequence[str], numbers: ir.Value
    ) -> tuple[list[ir.Value], ir.Value]:
        """Go over numbers with values that each step hands on; those after the last, and what steps give along a new axis 2."""

        def body(inner: Nodes) -> tuple[Sequence[ir.Value], Sequence[ir.Value]]:
            given = [ir.Value(name=inner.named("carried").name, type=ir.TensorType(DTYPES[held])) for held in types]
            number = ir.Value(name=inner.named("number").name, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([]))
            left, out = step(inner, number, given)
            return [*given, number], [*left, out]

        after, stacked = [self.named("after") for _ in carried], self.named("scan")
        attributes: dict[str, Attribute] = {"num_scan_inputs": 1, "scan_output_axes": [2], "body": self.inside(body, "chunk")}
        self.write("Scan", [*carried, numbers], [*after, stacked], attributes)
        return after, stacked


Step = Callable[[Nodes, ir.Value, Sequence[ir.Value]], tuple[Sequence[ir.Value], ir.Value]]
