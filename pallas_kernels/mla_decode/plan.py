"""How one decode step is split over a GPU: which part of it reads which pages."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32, Integer

from pallas_kernels import hardware
from pallas_kernels.checks import host_values, require, require_integer, require_rank

REQUEST_OVERHEAD_TOKENS = 320  # starting and finishing a request costs as much as reading these


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MLADecodePlan:
    """Which pages each part of the GPU reads; a part is one multiprocessor per tile of query rows.

    Part i reads from page begin_page[i] of request begin_request[i] up to page end_page[i] of
    request end_request[i], and all requests between the two. end_request is inclusive, end_page
    exclusive. A part with begin_request > end_request is idle. A request of length 0 counts as one
    page, so that some part writes its result.

    Fields:
      begin_split: which of the splits of begin_request this part computes.
      num_splits: running sum; request b has num_splits[b + 1] - num_splits[b] splits.
      page_size, num_rows: what the plan was made for.
    """

    begin_request: Int32[Array | np.ndarray, "num_parts"]
    begin_page: Int32[Array | np.ndarray, "num_parts"]
    end_request: Int32[Array | np.ndarray, "num_parts"]
    end_page: Int32[Array | np.ndarray, "num_parts"]
    begin_split: Int32[Array | np.ndarray, "num_parts"]
    num_splits: Int32[Array | np.ndarray, " num_requests_and_one"]
    page_size: int = dataclasses.field(metadata={"static": True})
    num_rows: int = dataclasses.field(metadata={"static": True})

    @property
    def num_parts(self) -> int:
        return self.begin_request.shape[0]

    @property
    def max_splits(self) -> int:
        """Static bound of num_splits[-1]: how many partial results a step can have."""
        return self.num_splits.shape[0] - 1 + self.num_parts


def mla_decode_plan(
    lengths: Integer[Array | np.ndarray, " B"],
    *,
    num_rows: int,
    page_size: int = 64,
    num_sms: int | None = None,
) -> MLADecodePlan:
    """Splits the pages of a batch evenly over the multiprocessors of a GPU.

    Every request costs its pages (at least one) plus a fixed overhead. The costs, laid end to end,
    are cut every `share`, for num_parts = max(num_sms // ceil(num_rows / 64), 1) parts. Starting
    inside a request costs the overhead once more, so no part costs more than the share plus one
    overhead. The share is ceil(total / num_parts), or up to one overhead more if that makes the
    largest part smaller, for example because it leaves requests whole.

    Depends on lengths alone: compute it once per step, before the loop over layers. Jits.

    Args:
      lengths: tokens in cache of every request.
      num_rows: T * N, query rows that read the same cache.
      page_size: tokens per page.
      num_sms: multiprocessors; None asks the default device, or takes an H200's 132 off GPU.

    Raises:
      ValueError: a size is not positive, or a length is negative.

    Cost: O((B + num_parts) log B) on the device for every share tried (six with pages of 64).
    Source: FlashMLA's tile scheduler, whose serial walk is a prefix sum and a search here.
    """
    op = "mla_decode_plan"
    require_rank(op, lengths=(lengths, 1))
    require_integer(op, lengths=lengths)
    num_sms = hardware.num_sms() if num_sms is None else num_sms
    for name, size in (
        ("batch", lengths.shape[0]),
        ("num_rows", num_rows),
        ("page_size", page_size),
        ("num_sms", num_sms),
    ):
        require(size > 0, f"{op}: {name} must be positive, got {size}")
    if (values := host_values(lengths)) is not None:
        require(values.min() >= 0, f"{op}: lengths must not be negative, got {values.min()}")
    num_parts = max(num_sms // -(-num_rows // hardware.WGMMA_ROWS), 1)
    return _plan(jnp.asarray(lengths), num_parts, page_size, num_rows)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _plan(lengths, num_parts, page_size, num_rows):
    overhead = -(-REQUEST_OVERHEAD_TOKENS // page_size)
    pages = jnp.maximum(-(-lengths.astype(jnp.int32) // page_size), 1)
    end = jnp.cumsum(pages + overhead)
    cut = functools.partial(_cut, pages, end, num_parts=num_parts, overhead=overhead)
    # A larger share may cut between requests where a smaller one cuts inside of them. Among equals
    # argmin takes the first, which is the largest share: it leaves the fewest splits to combine.
    shares = -(-end[-1] // num_parts) + jnp.arange(overhead, -1, -1)
    largest_cost, fields = jax.vmap(cut)(shares)
    best = jnp.argmin(largest_cost)
    fields = {name: values[best] for name, values in fields.items()}
    return MLADecodePlan(**fields, page_size=page_size, num_rows=num_rows)


def _cut(pages, end, share, *, num_parts, overhead):
    """Cost of the largest part, and the fields of the plan, when costs are cut every `share`."""
    begin = end - pages - overhead
    # Page j of request b is at begin[b] + overhead + j on the line of costs; its part is that
    # divided by the share.
    first_part = (begin + overhead) // share
    last_part = (end - 1) // share
    num_splits = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(last_part - first_part + 1)])

    cuts = share * jnp.arange(num_parts + 1)
    # B after the last one. A search would need B to be known, and `jax.export` may leave it open.
    request = jnp.sum(end[None, :] <= cuts[:, None], axis=1, dtype=jnp.int32)
    inside = jnp.minimum(request, pages.shape[0] - 1)
    page = jnp.where(request < pages.shape[0], jnp.maximum(cuts - begin[inside] - overhead, 0), 0)
    part = jnp.arange(num_parts)
    # A cut before page 0 leaves its request to the next part: this one ends a request earlier.
    ends_inside = page[1:] > 0
    end_request = jnp.where(ends_inside, request[1:], request[1:] - 1)
    last_page = pages[jnp.maximum(end_request, 0)]
    border = jnp.where(page > 0, cuts, jnp.where(request < pages.shape[0], begin[inside], end[-1]))
    cost = border[1:] - border[:-1] + jnp.where(page[:-1] > 0, overhead, 0)
    return jnp.max(cost), dict(
        begin_request=request[:-1],
        begin_page=page[:-1],
        end_request=end_request,
        end_page=jnp.where(ends_inside, page[1:], last_page),
        begin_split=jnp.where(page[:-1] > 0, part - first_part[inside[:-1]], 0),
        num_splits=num_splits,
    )
