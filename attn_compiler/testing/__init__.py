"""Checks a variant, yours too, against its meaning: random cases, derived error budgets, one call that sweeps a variant."""

from attn_compiler.testing.budget import assert_all_within_budget, assert_within_budget
from attn_compiler.testing.case import Case, assert_case, drawn_case, on, plain, variant_of
from attn_compiler.testing.check import check_variant
from attn_compiler.testing.fuzz import random_case

__all__ = [
    "Case",
    "assert_all_within_budget",
    "assert_case",
    "assert_within_budget",
    "check_variant",
    "drawn_case",
    "on",
    "plain",
    "random_case",
    "variant_of",
]
