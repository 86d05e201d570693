"""Latent caches: the data, their pages, their shards on a mesh, and whether they fit."""
