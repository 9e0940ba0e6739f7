"""Models written as MLIR by torch-mlir."""
