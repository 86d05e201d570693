"""Paged MLA decode on Hopper GPUs, in Mosaic GPU."""
