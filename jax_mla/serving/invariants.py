"""What holds between any two steps, whatever the requests do. For tests and for paranoid mode."""

from __future__ import annotations

from collections import Counter

from jax_mla.serving.scheduler import Scheduler, Step


def check_state(scheduler: Scheduler) -> None:
    """Every page is accounted for, and every request is in one place.

    Raises:
      RuntimeError: one is not; this is a bug of the scheduler.
    """
    pool = scheduler.pool
    held = Counter(page for request in scheduler.running for page in request.table)
    held.update(page for _, pages in scheduler.leaving for page in pages)
    held.update(source for source, _ in scheduler.copies)
    for page, references in enumerate(pool.references):
        _require(references == held[page], f"page {page} is held {held[page]} times, {references=}")
        _require(pool.is_free(page) == (references == 0), f"page {page} is free and held")
    scheduler.prefix.check()
    slots = [request.slot for request in scheduler.running]
    _require(None not in slots, "a running request has no slot")
    _require(
        len({*slots, *scheduler.free_slots}) == len(slots) + len(scheduler.free_slots), "slots"
    )
    for requests in (scheduler.waiting, scheduler.running):
        orders = [request.order for request in requests]
        _require(orders == sorted(orders), "requests are out of order")
        _require(all(r.finish_reason is None for r in requests), "a request has ended and is kept")
    for request in scheduler.waiting:
        _require(not request.table and request.slot is None, "a waiting request holds pages")
    for request in scheduler.running:
        rows = len(request.table) * scheduler.page_size
        _require(request.num_cached <= rows, f"{request.num_cached} tokens in {rows} rows")
    if not scheduler.in_flight:
        _require(not scheduler.leaving, "pages leave, and no step is in flight")


def check_step(scheduler: Scheduler, step: Step) -> None:
    """A step that was just planned writes only to pages that nobody shares.

    Raises:
      RuntimeError: it does not; this is a bug of the scheduler.
    """
    _require(bool(step.rows), "a step computes nothing")
    size = scheduler.page_size
    written = [target for _, target in step.copies]
    for row in step.rows:
        end = -(-(row.start + row.count) // size)
        written += row.request.table[row.start // size : end]
    # Sources of copies are held too, but copied before anything is written.
    tables = Counter(page for request in scheduler.running for page in request.table)
    for page in written:
        _require(tables[page] == 1, f"page {page} of {tables[page]} requests is written")


def _require(is_met: bool, what: str) -> None:
    if not is_met:
        raise RuntimeError(f"an invariant of the scheduler is broken: {what}")
