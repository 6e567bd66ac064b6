"""Thin adapters to the loops that people already have."""

from stabilitylab.integrations import easyedit, transformers

__all__ = ["easyedit", "transformers"]
