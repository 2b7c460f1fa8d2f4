"""The speed of each part of a run, compared with a conventional research script: `python -m benchmark`."""
