"""The console command `weakseg`: from a folder of volumes to masks, without YAML; thin over the bundles.

`command` reads the command line and ends it well, `tags` writes and checks a CSV of slice tags, `train`, `predict` and
`evaluate` run a bundle, and `bundles` finds it and hands it its knobs.
"""
