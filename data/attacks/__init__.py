"""The attacks, one file each: `Settings` (the schema of its YAML section) and `Attack` (puts the trigger on raw images)."""
