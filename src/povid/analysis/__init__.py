"""The analyses of Figures 4 and 5."""
