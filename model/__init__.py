"""Networks, their optimizers, inference and the virtual model. Imports only utils, neither data nor losses."""
