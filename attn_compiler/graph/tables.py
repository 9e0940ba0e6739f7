"""Tensors by name, as an option of torch.compile that it can compare."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from attn_compiler.errors import TableError


class Tables(Mapping[str, Tensor]):
    """The tensors that a policy calls `{given: name}`, kept by reference: what is written into them counts at the next call.

    torch.compile compares the options of two compilations of one model, and plain dictionaries of tensors would be compared
    number by number. Two of these are equal if they hold the same tensors.
    """

    def __init__(self, tables: Mapping[str, Tensor] | None = None, /, **more: Tensor) -> None:
        self._tables = {**(tables or {}), **more}
        for name, tensor in self._tables.items():
            if not isinstance(tensor, Tensor):
                raise TableError(f'table "{name}": expected a tensor, found {type(tensor).__name__}')

    def __getitem__(self, name: str) -> Tensor:
        return self._tables[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tables)

    def __len__(self) -> int:
        return len(self._tables)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tables) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}={list(tensor.shape)}" for name, tensor in self._tables.items())
        return f"Tables({shapes})"

    def _identity(self) -> frozenset[tuple[str, int]]:
        return frozenset((name, id(tensor)) for name, tensor in self._tables.items())
