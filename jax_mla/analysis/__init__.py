"""What a model costs and does: where parameters lie, collectives, memory, operations, parity."""
