"""The glyph recipe: tens of thousands of classes, drawn by the fonts of this machine.

`fused-losses train --data glyphs` on the command line, `train(GlyphConfig(...), folder)` and
`compare(...)` from Python.
"""

from fused_losses.train.glyphs.compare import compare
from fused_losses.train.glyphs.config import GlyphConfig
from fused_losses.train.glyphs.run import train

__all__ = ["GlyphConfig", "compare", "train"]
