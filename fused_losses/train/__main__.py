"""`python -m fused_losses.train`: the same as `fused-losses train`."""

from fused_losses.train.cli import main

raise SystemExit(main())
