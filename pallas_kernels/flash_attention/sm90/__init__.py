"""Flash attention on Hopper GPUs, in Mosaic GPU."""
