"""How well the analysis detects, places, explains and forecasts: ``python -m benchmarks.detection``."""
