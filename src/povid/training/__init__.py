"""Training: module, data module, scoring, reference cache, memory, sharding."""
