"""The record: readings, the run file that keeps them, and reading it, also while it is written. Needs no torch."""
