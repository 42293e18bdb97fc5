"""Data: folders of volumes, labels and slice tags become a datalist; `python -m custom_modules.data` builds one."""
