"""Networks, their optimizers, scoring and the virtual model. Stands on utils; knows neither data nor losses."""
