"""The defenses, one file each: `Settings` (its YAML section and its stages) and `Defense` (trains one epoch after another)."""

DECLARED = ("Settings", "Defense")
