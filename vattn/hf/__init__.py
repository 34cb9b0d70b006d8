"""``VirtualCache``: the drop-in cache for Hugging Face models, and its decode steps inside ``generate``."""

from vattn.hf.cache import CACHE_KEYWORD, DecodeStats, VirtualCache, install

__all__ = ["CACHE_KEYWORD", "DecodeStats", "VirtualCache", "install"]
