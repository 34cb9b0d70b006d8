"""K and V in virtual memory: layouts, caches and sequences. It knows no models."""
