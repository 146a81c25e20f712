"""Glyphs: every character of every installed font that can draw it, one class a character."""

from fused_losses.datasets.glyphs.load import (
    CACHE_VARIABLE,
    Font,
    Glyphs,
    Split,
    cache_folder,
    hold_out,
    load_glyphs,
    look_alikes,
)

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
