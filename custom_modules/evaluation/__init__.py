"""Evaluation: masks against labels, slice by slice and volume by volume."""
