"""How fast the parts of a run are, beside the way most research scripts do them: `python -m benchmark`."""
