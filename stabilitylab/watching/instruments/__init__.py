"""Instruments: one for each kind of tensor; each reduces it once, for all probes that need it. See `panel`."""
