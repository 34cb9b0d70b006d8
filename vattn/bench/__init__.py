"""The measurements behind ``vattn bench``."""
