"""`python -m quality FOLDER`, in the folder `benchmarks`."""

from __future__ import annotations

from quality.distilled import main

main()
