"""What all training methods share: opening, resuming, evaluating and saving a run, and plain supervised training."""
