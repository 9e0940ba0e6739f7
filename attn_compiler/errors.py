"""Every exception this package raises: what was expected, what was found, where, and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

MOST_NAMES = 40  # more of them help nobody


class AttnError(Exception):
    """Root of all errors raised here; catch this one to catch them all."""


class AlgebraError(AttnError, TypeError):
    """An expression was built from parts that do not fit together."""


class LanguageError(AttnError, ValueError):
    """A text of the policy language (a mask, a score, a set of integers) cannot be understood."""


class PolicyError(AttnError, ValueError):
    """A policy file is wrong; the message carries file, line and column."""


class TableError(AttnError, LookupError):
    """A table that an expression reads is missing, or has the wrong shape or type."""


class ShapeError(AttnError, ValueError):
    """Tensors whose shapes, dtypes or devices do not fit each other."""


class LibraryError(AttnError, ImportError):
    """A folder of words is missing or holds a file that does not define its word."""


class CaptureError(AttnError, RuntimeError):
    """A graph cannot be brought into the form the matcher reads."""


class RefusedError(AttnError, RuntimeError):
    """A rule said `fallback: error` and its decision was refused."""


class UnknownLengthError(AttnError, RuntimeError):
    """A rule asks for a length that is only known when the model runs."""


class PictureError(AttnError, ValueError):
    """A picture cannot be written as was asked."""


class MissingPackageError(AttnError, ImportError):
    """An optional package is needed for what was asked."""


class DerivativeError(AttnError, RuntimeError):
    """A derivative was asked for that generated kernels do not compute."""


class CompilerError(AttnError, RuntimeError):
    """A generated kernel cannot be built on this machine."""


class ExportError(AttnError, RuntimeError):
    """A model cannot be exported, or what was exported does not compute what the model does."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean "…"?`, or else the list of known words, to end an error message with."""
    names = sorted(set(known))
    near = get_close_matches(word, names, n=1, cutoff=0.6)
    if near:
        return f'; did you mean "{near[0]}"?'
    return f"; known: {', '.join(names[:MOST_NAMES])}{', …' if len(names) > MOST_NAMES else ''}" if names else ""
