"""What the training loop stands on: processes, optimiser, checkpoints, previews, log, report."""
