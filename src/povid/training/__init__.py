"""How it is learned: module, data module, scoring, reference cache."""
