"""What keeps a run alive: experiment, settings, checkpoints, resuming, guards."""
