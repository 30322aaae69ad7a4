"""What a training step costs: ours, the plain way, the released code's and TRL's, on the same model and data."""
