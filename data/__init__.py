"""Data sets, attacks, augmentation, batches and pools. Stands on utils; knows neither networks nor losses."""
