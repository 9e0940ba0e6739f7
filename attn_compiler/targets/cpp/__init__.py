"""A variant into the source of a C++ kernel."""
