"""Editors that come with stabilitylab, to have something to watch; any other editor can be watched likewise."""
