"""Networks, their optimizers, inference and the virtual model. Stands on utils; knows neither data nor losses."""
