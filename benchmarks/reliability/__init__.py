"""What is promised of reliability, tried: one module a promise; `python -m benchmarks.reliability`."""
