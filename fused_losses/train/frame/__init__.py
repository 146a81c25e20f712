"""What every trainer here shares: options, steps, checkpoints, runs, progress and reports."""
