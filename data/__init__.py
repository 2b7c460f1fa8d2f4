"""Data sets, attacks, augmentation, batches and pools. Imports utils only; contains neither networks nor losses."""
