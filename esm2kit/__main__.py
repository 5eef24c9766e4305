"""`python -m esm2kit`: the command line."""

from esm2kit.cli.main import main
from esm2kit.core.processes import finish

if __name__ == "__main__":
    finish(main())
