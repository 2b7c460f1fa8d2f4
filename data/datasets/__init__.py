"""The data sets, one file each: `Settings` (the schema of its YAML section) and `load` (raw uint8 images and labels)."""
