"""The page that a run writes for its reader: every case with slices, outlines, volume and warnings."""
