"""The data sets, one file each: `Settings` (the schema of its YAML section) and `load` (arrays, or a list of picture files)."""
