"""How well the operation that first made a value NaN or infinite is found: the truths, written down beforehand."""
