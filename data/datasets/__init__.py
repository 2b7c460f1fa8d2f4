"""The data sets, one file each: `Settings` (the schema of its YAML section) and `load` (arrays, or a list of picture files).

A file may declare `FOLDER_NAMES`, a regular expression: a `dataset_dir` whose name it matches, in lower case, is this data
set where the YAML names none. `BUILT_IN` says that it needs no `dataset_dir`, `POISONED` that it is a set poisoned before,
`SIGN` a file by which such a folder is recognized, `BACKDOORBENCH` how BackdoorBench calls it.
"""
