"""Data: folders of volumes, labels and slice tags become a datalist; `python -m custom_modules.data` builds one.

`layouts` finds cases on disk, `reader`, `dicom`, `geometry` and `labels` read them, `tags` and `annotation` give them
slice tags, `splits` divides them by patient, `datalist` lists and checks them, and `tag_volume` takes the tags through
transforms.
"""
