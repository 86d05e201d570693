"""Matrix products of rows sorted by expert."""

from pallas_kernels.grouped_matmul.api import grouped_matmul as grouped_matmul
