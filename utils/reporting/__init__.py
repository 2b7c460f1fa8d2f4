"""What a run shows: logs, metrics, plots, the report page, the ranking of suspects."""
