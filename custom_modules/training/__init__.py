"""Training: denoiser and classifier from slice tags, then the segmenter from their maps.

`slices` holds the data set, `sampling` draws from it. `steps` computes one iteration of denoiser and classifier,
`segmentation` one of the segmenter; `handlers` and `checkpoints` act around them. `distill` and `map_labels` make the
segmenter's labels from maps, `supervised` reads masks for the upper bound.
"""
