"""The paper's losses. Imports only torch."""
