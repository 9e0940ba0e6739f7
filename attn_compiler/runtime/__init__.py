"""Attention that runs, outside of any graph."""
