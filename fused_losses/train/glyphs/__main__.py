"""`python -m fused_losses.train.glyphs`: the same as `fused-losses train --data glyphs`."""

from fused_losses.train.glyphs.cli import main

# drawing processes import this file, too
if __name__ == "__main__":
    raise SystemExit(main())
