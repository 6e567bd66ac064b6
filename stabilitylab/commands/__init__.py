"""The command line: one file a verb. Arguments in, exit code out; the work is done elsewhere."""
