"""Poisoned sets on disk: this project's own format (`folder`, `export`) and the records of BackdoorBench (`record_*`)."""
