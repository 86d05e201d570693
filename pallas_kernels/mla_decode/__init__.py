"""Paged absorbed MLA decode and the plan of its work."""

from pallas_kernels.mla_decode.api import MLADecodeOutput as MLADecodeOutput
from pallas_kernels.mla_decode.api import mla_decode as mla_decode
from pallas_kernels.mla_decode.plan import MLADecodePlan as MLADecodePlan
from pallas_kernels.mla_decode.plan import mla_decode_plan as mla_decode_plan
