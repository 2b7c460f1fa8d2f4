"""Names of the files that record, in a run's folder, which data it was begun with."""

POISON_INDEX = "poison_idx.npy"  # (N,) float64: 1 for the images that the attack poisoned
STORED_SET = "set.json"  # the description of a stored poisoned set
SEED_SAMPLES = "seed_samples.txt"  # the names of the seed samples, if the user gave them
