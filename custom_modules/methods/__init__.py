"""Methods: from a batch of prepared slices to a map of each. Every method is a callable (x_0, network, slices)."""
