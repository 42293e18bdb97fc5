"""Networks: the denoiser, the noisy-image classifier, the segmenter, and the one module that holds them."""
