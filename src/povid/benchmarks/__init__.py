"""One file per benchmark: its questions, its prompt, its score. Nothing here imports torch."""
