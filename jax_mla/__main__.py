"""`python -m jax_mla` is the command line `jax-mla`."""

from jax_mla.cli.main import program

if __name__ == "__main__":
    program()
