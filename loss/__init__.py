"""The paper's losses. Stands on torch alone."""
