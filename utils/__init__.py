"""The ground floor: standard library, torch, numpy and yaml only. Knows nothing of data, models or losses."""
