"""What is learned: objectives and distortions; torch only."""
