"""``python -m stabilitylab`` is the command ``stabilitylab``."""

from stabilitylab.commands.cli import main

if __name__ == "__main__":
    main()
