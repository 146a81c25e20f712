"""Glyphs: every character of every installed font that can draw it, one class a character.

Fonts are the variation: tens of thousands of classes on any machine with CJK fonts, thousands with
matplotlib's own. Drawn once into a cache file, then read at random like any other set.
"""

from fused_losses.datasets.glyphs.cache import CACHE_VARIABLE, cache_folder
from fused_losses.datasets.glyphs.load import load_glyphs
from fused_losses.datasets.glyphs.look_alikes import look_alikes
from fused_losses.datasets.glyphs.set import Font, Glyphs
from fused_losses.datasets.glyphs.split import Split, hold_out

__all__ = [
    "CACHE_VARIABLE",
    "Font",
    "Glyphs",
    "Split",
    "cache_folder",
    "hold_out",
    "load_glyphs",
    "look_alikes",
]
