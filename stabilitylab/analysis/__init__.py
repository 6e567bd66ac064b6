"""Arrays in, findings out: facts, drift, causes and the diagnosis. Pure NumPy; touches no model, renders nothing."""

from stabilitylab.analysis.analyzer import Analyzer
from stabilitylab.analysis.findings import VERDICTS, Diagnosis, Finding, Forecast, Verdict, json_safe, severity

__all__ = ["VERDICTS", "Analyzer", "Diagnosis", "Finding", "Forecast", "Verdict", "json_safe", "severity"]
