"""Integer sums of products: the form in which index arithmetic is compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, reduce
from math import gcd

from attn_compiler.algebra.expr import Expr, Sort, apply, const
from attn_compiler.algebra.notation import text


@dataclass(frozen=True)
class Linear:
    """`constant` plus integer multiples of atoms, which are whatever is no sum; no factor is zero."""

    factors: Mapping[Expr, int]
    constant: int = 0

    @property
    def terms(self) -> tuple[tuple[Expr, int], ...]:
        """Atoms with their factors, in canonical order."""
        return tuple(sorted(self.factors.items(), key=lambda term: text(term[0])))

    def __add__(self, other: Linear) -> Linear:
        factors = dict(self.factors)
        for atom, factor in other.factors.items():
            factors[atom] = factors.get(atom, 0) + factor
        return Linear({a: n for a, n in factors.items() if n}, self.constant + other.constant)

    def __mul__(self, factor: int) -> Linear:
        return Linear({a: n * factor for a, n in self.factors.items() if factor}, self.constant * factor)

    def __sub__(self, other: Linear) -> Linear:
        return self + other * -1

    def plus(self, constant: int) -> Linear:
        return Linear(self.factors, self.constant + constant)

    def divisor(self) -> int:
        """The greatest number that divides every factor; 0 without atoms."""
        return reduce(gcd, self.factors.values(), 0)


@lru_cache(maxsize=1 << 16)
def linear(e: Expr) -> Linear:
    """An index as a sum."""
    match e.op:
        case "const":
            assert isinstance(e.value, int)
            return Linear({}, e.value)
        case "add":
            return linear(e.args[0]) + linear(e.args[1])
        case "sub":
            return linear(e.args[0]) - linear(e.args[1])
        case "neg":
            return linear(e.args[0]) * -1
        case "mul":
            return _multiplied(*(linear(x) for x in e.args))
    return Linear({e: 1})


def _multiplied(a: Linear, b: Linear) -> Linear:
    """A product is not expanded: the bounds of `(q - k) * (q - k)` are known, those of its terms are not."""
    if not a.factors or not b.factors:
        return b * a.constant if not a.factors else a * b.constant
    (n, ours), (m, theirs) = _factored(a), _factored(b)
    product = reduce(lambda x, y: apply("mul", x, y), sorted(ours + theirs, key=text))
    return Linear({product: n * m})


def _factored(sum_: Linear) -> tuple[int, tuple[Expr, ...]]:
    """The number that divides all of a sum, with its sign, and the factors that are left."""
    divisor = gcd(sum_.divisor(), sum_.constant) * (1 if sum_.terms[0][1] > 0 else -1)
    rest = expression(Linear({a: n // divisor for a, n in sum_.factors.items()}, sum_.constant // divisor))
    factors: tuple[Expr, ...] = ()
    while rest.op == "mul":
        rest, last = rest.args
        factors = (last, *factors)
    return divisor, (rest, *factors)


def expression(sum_: Linear) -> Expr:
    """The canonical expression of a sum: what is added, what is subtracted, the constant."""
    added = [_times(atom, n) for atom, n in sum_.terms if n > 0]
    taken = [_times(atom, -n) for atom, n in sum_.terms if n < 0]
    if not added:
        if not taken:
            return const(sum_.constant)
        if sum_.constant:
            added = [const(sum_.constant)]
            sum_ = Linear(sum_.factors)
        else:
            added, taken = [-taken[0]], taken[1:]
    result = reduce(lambda a, b: a + b, added)
    result = reduce(lambda a, b: a - b, taken, result)
    if sum_.constant:
        result = result + sum_.constant if sum_.constant > 0 else result - -sum_.constant
    return result


def at_most_zero(difference: Linear) -> Expr:
    """`difference <= 0`: positive terms stand on the left, negative ones on the right, and the constant beside the latter."""
    divisor = difference.divisor()
    if divisor == 0:
        return const(difference.constant <= 0)
    factors = {atom: n // divisor for atom, n in difference.factors.items()}
    constant = -(-difference.constant // divisor)
    left = Linear({atom: n for atom, n in factors.items() if n > 0})
    right = Linear({atom: -n for atom, n in factors.items() if n < 0})
    if not left.factors:
        return apply("le", const(constant), expression(right))
    return apply("le", expression(left), expression(right.plus(-constant)))


def _times(atom: Expr, factor: int) -> Expr:
    return atom if factor == 1 else factor * atom


def is_index(*operands: Expr) -> bool:
    return all(x.sort is Sort.INDEX for x in operands)
