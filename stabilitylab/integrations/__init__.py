"""Thin adapters to the loops that people already have."""

from stabilitylab.integrations import easyedit

__all__ = ["easyedit"]
