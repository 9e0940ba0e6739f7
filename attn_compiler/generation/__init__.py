"""Generating text: caches that hold what a policy needs."""
