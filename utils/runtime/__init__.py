"""What a run computes on: devices, precision, processes, and steps as CUDA graphs."""
