"""``VirtualCache``: the drop-in cache for Hugging Face models, and its decode steps inside ``generate``."""

from vattn.hf.cache import VirtualCache
from vattn.hf.decode_stats import DecodeStats
from vattn.hf.patch import install
from vattn.models.versions import CACHE_KEYWORD

__all__ = ["CACHE_KEYWORD", "DecodeStats", "VirtualCache", "install"]
