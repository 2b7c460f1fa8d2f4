"""The data sets, one file each: `Settings` (schema of the YAML section) and `load` (arrays, or a list of image files).

A file may declare `FOLDER_NAMES`, a regular expression: if the YAML names no data set and a folder name in `dataset_dir`, in
lower case, matches, this data set is used. Further optional attributes: `BUILT_IN`: no `dataset_dir` is needed; `POISONED`: the
set is already poisoned; `SIGN`: name of a file by which its folder is recognized; `BACKDOORBENCH`: its name in BackdoorBench.
"""

DECLARED = ("Settings", "load")
