"""Everything in the documentation that shows what the code prints and draws, made anew.

    python -m benchmarks.docs_assets [--runs]

--runs: the kept runs too, which takes two minutes; else only what is shown of them, which takes one.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks.docs_assets import kept, pictures, samples
from stabilitylab.record.run import load


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", action="store_true", help="make the kept runs anew first")
    if parser.parse_args().runs:
        kept.make()
    made = samples.made()
    for page in samples.pages():
        samples.put(page, made)
    with tempfile.TemporaryDirectory() as scratch:
        pictures.make({name: load(path) for name, path in kept.unpack(Path(scratch)).items()})


if __name__ == "__main__":
    main()
