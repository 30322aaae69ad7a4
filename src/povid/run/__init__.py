"""Runs: settings, stages, checkpoints, resuming, guards, evaluation."""
