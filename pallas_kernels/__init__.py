"""Kernels on arrays: each op with an XLA implementation that defines it and runs anywhere."""

from pallas_kernels.flash_attention import flash_attention as flash_attention
from pallas_kernels.grouped_matmul import grouped_matmul as grouped_matmul
from pallas_kernels.merge_attention import merge_attention as merge_attention
from pallas_kernels.mla_decode import MLADecodeOutput as MLADecodeOutput
from pallas_kernels.mla_decode import MLADecodePlan as MLADecodePlan
from pallas_kernels.mla_decode import mla_decode as mla_decode
from pallas_kernels.mla_decode import mla_decode_plan as mla_decode_plan
