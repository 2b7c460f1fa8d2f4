"""The attacks, one file each: `Settings` (schema of the YAML section) and `Attack` (puts the trigger on raw images)."""

DECLARED = ("Settings", "Attack")
