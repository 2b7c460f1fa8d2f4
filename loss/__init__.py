"""The losses of ASD and of the other defenses. Imports only torch."""
