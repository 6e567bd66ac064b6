"""A real BLIP2-OPT on handwritten digits, small enough to be edited until it breaks on a laptop."""
