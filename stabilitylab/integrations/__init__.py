"""Thin adapters to the loops that people already have."""

from stabilitylab.integrations import accelerate, easyedit, transformers

__all__ = ["accelerate", "easyedit", "transformers"]
