"""Sweeps: one command trains and tests a list of configurations, and ends with a table and a plot.

    python -m utils.sweep config/sweeps/ratio.yaml --gpu 0,1

`plan` turns a sweep file into runs, `status` reads how far each run is, `workers` runs ASD.py and test.py as child processes,
`progress` shows them, `table` and `plot` make the report. docs/sweeps.md is the user's guide.
"""
