"""Training: denoiser and classifier from slice tags, then the segmenter from their maps."""
