"""Attention over blocks, forward and backward, and the merge of two partial results."""

from pallas_kernels.flash_attention.api import flash_attention as flash_attention
from pallas_kernels.flash_attention.merge import merge_attention as merge_attention
