"""The parts of a model: small Flax modules that declare weights and call pure functions."""
