"""What the documentation shows: pictures of pages, and samples of output, all from a few runs that are kept."""
