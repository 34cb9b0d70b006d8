"""Capture of computations into CUDA graphs, and their compilation. Nothing here depends on transformers."""
