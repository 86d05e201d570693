"""`python -m jax_mla` is the command line `jax-mla`."""

import sys

from jax_mla.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
