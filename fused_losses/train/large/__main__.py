"""`torchrun --max-restarts 10 -m fused_losses.train.large`."""

from fused_losses.train.large.cli import main

raise SystemExit(main())
