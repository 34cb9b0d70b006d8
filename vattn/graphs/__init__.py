"""CUDA graphs of what is launched, and its compilation. It knows no models."""
