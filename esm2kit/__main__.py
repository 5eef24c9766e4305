"""`python -m esm2kit`: the command line."""

from esm2kit.cli.main import main
from esm2kit.core.processes import exit_process

if __name__ == "__main__":
    exit_process(main())
