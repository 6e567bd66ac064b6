"""The scan: what a model, its editor and its canary look like before the first edit. Reads, and decides nothing."""
