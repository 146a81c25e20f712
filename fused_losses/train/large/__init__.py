"""The distributed trainer for `ClassCenters`: any number of classes, ranks and restarts.

`torchrun ... -m fused_losses.train.large` on the command line, `train(LargeConfig(...), folder)`
inside a process group from Python.
"""

from fused_losses.train.large.config import LargeConfig
from fused_losses.train.large.loop import train

__all__ = ["LargeConfig", "train"]
