"""K and V in virtual memory: layouts, caches and sequences. Nothing in this package depends on a model."""
