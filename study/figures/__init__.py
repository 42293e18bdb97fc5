"""Figures of a study's results: `pictures` holds the parts, every other file one figure of the paper or two."""
