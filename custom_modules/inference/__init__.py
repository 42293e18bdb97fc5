"""Inference: from a volume to slices, through any method, and back to a mask in the geometry of the volume."""
