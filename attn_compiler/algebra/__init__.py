"""The language in which attention is defined; plain Python, imports no framework."""
