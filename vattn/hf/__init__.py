"""``VirtualCache``: the drop-in cache for Hugging Face models, and its decode steps inside ``generate``."""

from vattn.hf.attach import CACHE_KEYWORD
from vattn.hf.cache import VirtualCache
from vattn.hf.decode_stats import DecodeStats
from vattn.hf.patch import install

__all__ = ["CACHE_KEYWORD", "DecodeStats", "VirtualCache", "install"]
