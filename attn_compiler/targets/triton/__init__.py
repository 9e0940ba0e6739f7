"""A variant into the source of a Triton kernel."""
