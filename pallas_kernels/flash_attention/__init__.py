"""Attention over blocks, forward and backward."""

from pallas_kernels.flash_attention.api import flash_attention as flash_attention
