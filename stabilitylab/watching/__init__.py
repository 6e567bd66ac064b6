"""Watching: from a model in an edit loop to one row per edit. Measures; knows no formula and decides nothing."""
