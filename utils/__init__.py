"""The bottom layer: configuration, runtime and reporting. Imports no other folder of the project."""
