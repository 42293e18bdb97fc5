"""What several tests share: tiny networks, volumes of a few voxels, runs of a bundle."""
