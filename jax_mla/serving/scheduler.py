"""The scheduler: who runs in the next step, with which pages. Plain Python, no arrays.

A step is planned while the one before it still runs on the device: what that one writes counts as
done, and tokens that it chooses are fed without having been seen. The pages that a request leaves
are free for others only when no step that names them is in flight.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Literal

from jax_mla.checks.sizes import check_positive
from jax_mla.serving.pages import PagePool
from jax_mla.serving.prefix import Key, Match, PrefixCache
from jax_mla.serving.request import FinishReason, Request

# Prompts that share a chunk step have at most this part of its tokens each.
CHUNK_ROWS = 4
# One page in so many is kept free of new requests, so that running ones can grow.
RESERVED_PART = 100


@dataclasses.dataclass(frozen=True)
class Row:
    """Tokens start to start + count of one request, which are appended to its cache.

    Attributes:
      is_last: no known token comes after them, so that the next one is chosen.
    """

    request: Request
    start: int
    count: int
    is_last: bool


@dataclasses.dataclass(frozen=True)
class Step:
    """One call of a program.

    Attributes:
      copies: pages (source, target) to copy before anything is written.
      new_pages: pages that hold nothing yet.
    """

    number: int
    kind: Literal["chunk", "decode"]
    rows: list[Row]
    copies: list[tuple[int, int]]
    new_pages: list[int]

    @property
    def choosing(self) -> list[Request]:
        """Requests whose next token the step chooses, in the order of its rows."""
        return [row.request for row in self.rows if row.is_last]


@dataclasses.dataclass
class Counters:
    """Sums since the start."""

    computed_tokens: int = 0
    hit_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    page_copies: int = 0
    steps: int = 0
    finished: dict[str, int] = dataclasses.field(default_factory=dict)


class Scheduler:
    """Requests in order of priority, then arrival; pages on demand; preemption by recompute.

    Args:
      max_batch: requests that run at a time.
      chunk_tokens: of prompts, in one step.
      max_tokens: of a prompt and its continuation.
      deterministic: what a request computes depends on nothing but itself. Chunks begin at
        multiples of chunk_tokens, only whole chunks of prompts are shared, and what was decoded is
        decoded again after a preemption.

    Usage: `plan` a step, run it, plan the next one, then `read_back` the tokens of the first.
    """

    def __init__(
        self,
        *,
        num_pages: int,
        page_size: int,
        max_batch: int,
        chunk_tokens: int,
        max_tokens: int,
        deterministic: bool = False,
    ):
        check_positive(
            page_size=page_size,
            max_batch=max_batch,
            chunk_tokens=chunk_tokens,
            max_tokens=max_tokens,
        )
        if deterministic and chunk_tokens % page_size:
            raise ValueError(
                f"chunk_tokens must be a multiple of page_size={page_size} where deterministic, "
                f"got {chunk_tokens}"
            )
        self.page_size, self.chunk_tokens, self.max_tokens = page_size, chunk_tokens, max_tokens
        self.deterministic = deterministic
        self.prefix = PrefixCache(page_size)
        self.pool = PagePool(num_pages, self.prefix.forget)
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.in_flight: deque[Step] = deque()
        self.counters = Counters()
        self.free_slots = list(range(max_batch))[::-1]
        self._num_arrived = 0
        self._last_kind: Literal["chunk", "decode"] = "decode"
        self._must_drain = False
        # Pages that nobody wants any more, and the step in flight that may still use them.
        self.leaving: deque[tuple[int, list[int]]] = deque()
        # For the next step. The sources of copies are held.
        self.copies: list[tuple[int, int]] = []
        self._new_pages: list[int] = []

    def submit(self, request: Request) -> None:
        """Queues a request.

        Raises:
          ValueError: it could never run; the message has the numbers.
        """
        if request.max_tokens > self.max_tokens:
            raise ValueError(
                f"a prompt of {len(request.prompt)} tokens and {request.max_new_tokens} new ones "
                f"must be at most {self.max_tokens + 1} together, the longest sequence"
            )
        needed, num_pages = self._num_pages(request.max_tokens), len(self.pool.references)
        if needed > num_pages:
            raise ValueError(
                f"a prompt of {len(request.prompt)} tokens and {request.max_new_tokens} new ones "
                f"need {needed} pages of {self.page_size} tokens, the pool has {num_pages}"
            )
        if self.deterministic:
            request.fork_of = None  # logits of the last token of a prompt are those of a chunk
        request.arrival = self._num_arrived
        self._num_arrived += 1
        bisect.insort(self.waiting, request, key=lambda r: r.order)

    def abort(self, request: Request) -> None:
        """Ends a request wherever it is. One that has ended stays as it is."""
        self.finish(request, "abort")

    def finish(self, request: Request, reason: FinishReason) -> None:
        if request.finish_reason is not None:
            return
        request.finish_reason = reason
        self.counters.finished[reason] = self.counters.finished.get(reason, 0) + 1
        if request.slot is None:
            self.waiting.remove(request)
        else:
            self._leave(request)

    def end_overdue(self, now: float) -> list[Request]:
        """Ends requests that are past their deadline, and returns them."""
        overdue = [
            r
            for r in (*self.waiting, *self.running)
            if r.deadline is not None and now >= r.deadline
        ]
        for request in overdue:
            self.finish(request, "timeout")
        return overdue

    def plan(self) -> Step | None:
        """The next step, or None: if steps are in flight, until one is read back.

        Chunks and decoding alternate, so that a long prompt delays others by one chunk at a time.
        """
        self._must_drain = False
        is_chunk_next = self._last_kind == "decode" or not any(r.is_decoding for r in self.running)
        turns = ("chunk", "decode") if is_chunk_next else ("decode", "chunk")
        for kind in turns:
            if rows := self._chunk_rows() if kind == "chunk" else self._decode_rows():
                return self._planned(kind, rows)
            if self._must_drain:
                return None
        return None

    def read_back(self, chosen: Sequence[int]) -> list[Request | None]:
        """Takes the tokens that the oldest step in flight chose for its `choosing` requests.

        Args:
          chosen: -1 where there is none, because logits are not finite.

        Returns:
          The requests that each of the tokens was added to; None for one that had ended before.
        """
        step = self.in_flight.popleft()
        while self.leaving and self.leaving[0][0] <= step.number:
            self.pool.release(self.leaving.popleft()[1])
        receivers: list[Request | None] = []
        for request, token in zip(step.choosing, chosen, strict=True):
            request.num_unread -= 1
            has_ended = request.finish_reason is not None
            receivers.append(None if has_ended else request)
            if not has_ended:
                self._write(request, token)
        return receivers

    def _write(self, request: Request, token: int) -> None:
        if token < 0:
            return self.finish(request, "error")
        request.ids.append(token)
        self.counters.generated_tokens += 1
        self._register(request)
        if token in request.stop_ids:
            self.finish(request, "stop")
        elif len(request.ids) > request.max_tokens:
            self.finish(request, "length")

    def _planned(self, kind: Literal["chunk", "decode"], rows: list[Row]) -> Step:
        """Counts the rows as computed."""
        step = Step(self.counters.steps, kind, rows, self.copies, self._new_pages)
        self.leaving.append((step.number, [source for source, _ in self.copies]))
        self.copies, self._new_pages = [], []
        self.in_flight.append(step)
        self._last_kind = kind
        self.counters.steps += 1
        self.counters.page_copies += len(step.copies)
        for row in rows:
            row.request.num_cached += row.count
            row.request.num_unread += row.is_last
            self.counters.computed_tokens += row.count
            self._register(row.request)
        return step

    def _chunk_rows(self) -> list[Row]:
        """One prompt's chunk, or the ends of a few prompts."""
        small = max(self.chunk_tokens // CHUNK_ROWS, 1)
        rows: list[Row] = []
        for request in self._prefilling():
            remaining = request.num_chunked - request.num_cached
            if remaining > small or self.deterministic:
                return rows or [self._row(request, min(remaining, self.chunk_tokens))]
            rows.append(self._row(request, remaining))
            if len(rows) == CHUNK_ROWS:
                break
        return rows

    def _decode_rows(self) -> list[Row]:
        rows = []
        for request in list(self.running):
            if not request.is_decoding:
                continue
            while request.slot is not None and not self._has_room(request):
                if self.in_flight:  # what ends there may leave pages
                    self._must_drain = True
                    return []
                self._preempt(self.running[-1])
            if request.slot is not None:
                rows.append(self._row(request, 1))
        return rows

    def _row(self, request: Request, count: int) -> Row:
        end = request.num_cached + count
        return Row(request, request.num_cached, count, end == request.num_tokens)

    def _prefilling(self) -> Iterator[Request]:
        """Requests with tokens to compute in chunks, in their order; new ones as they fit.

        One that takes the pages of others comes before them: they have no row in the step yet.
        """
        may_admit = True
        for request in sorted((*self.running, *self.waiting), key=lambda r: r.order):
            if request.slot is None and may_admit and not self._waits_for_parent(request):
                may_admit = self._admit(request)
            if request.is_prefilling:
                yield request

    def _waits_for_parent(self, request: Request) -> bool:
        """Soon the pages of the request that it is a fork of can be shared."""
        parent = request.fork_of
        return parent is not None and parent.finish_reason is None and not parent.has_prompt

    def _admit(self, request: Request) -> bool:
        """Gives a request a slot and pages for all its tokens, if both are there."""
        if not self.free_slots and not self._preempt_for(request):
            return False
        match = self._match(request)
        if not self._fits(request, match):
            match = dataclasses.replace(match, partial=None, num_partial=0)
        while not self._fits(request, match):
            if not self._preempt_for(request):
                return False
        copied = [] if match.partial is None else [match.partial]
        self.pool.hold([*match.pages, *copied])
        new = self._allocate(self._num_pages(len(request.ids)) - len(match.pages))
        self.copies += [(source, new[0]) for source in copied]
        request.table, request.page_keys = [*match.pages, *new], match.keys
        hit = len(match.pages) * self.page_size + match.num_partial
        self._start(request, hit)
        return True

    def _start(self, request: Request, num_hit: int) -> None:
        request.slot = self.free_slots.pop()
        request.num_cached = num_hit
        request.num_chunked = len(request.prompt if self.deterministic else request.ids)
        if request.num_chunked - num_hit == 1 and not self.deterministic:
            request.num_chunked = num_hit  # one token is decoded
        if request.num_hit_tokens is None:
            request.num_hit_tokens = num_hit
        self.counters.hit_tokens += num_hit
        self.waiting.remove(request)
        bisect.insort(self.running, request, key=lambda r: r.order)

    def _match(self, request: Request) -> Match:
        """The pages to share, and the page to copy."""
        if (parent := request.fork_of) is not None and parent.has_prompt:
            return self._fork(request, parent)
        match = self.prefix.match(request.ids, self._root(request))
        if not self.deterministic:
            return match
        prompt_chunks = (len(request.prompt) - 1) // self.chunk_tokens
        chunks = min(len(match.pages) * self.page_size // self.chunk_tokens, prompt_chunks)
        whole = chunks * self.chunk_tokens // self.page_size
        return Match(match.pages[:whole], match.keys[:whole])

    def _fork(self, request: Request, parent: Request) -> Match:
        """All of the prompt but its last token, whose logits are needed again."""
        shared = len(request.prompt) - 1
        full, rest = divmod(shared, self.page_size)
        partial = parent.table[full] if rest else None
        return Match(parent.table[:full], parent.page_keys[:full], partial, rest)

    def _fits(self, request: Request, match: Match) -> bool:
        kept = [*match.pages, *([] if match.partial is None else [match.partial])]
        num_free = self.pool.num_free - sum(map(self.pool.is_free, kept))
        reserved = -(-len(self.pool.references) // RESERVED_PART) if self.running else 0
        needed = self._num_pages(len(request.ids)) - len(match.pages)
        return num_free - needed >= reserved

    def _has_room(self, request: Request) -> bool:
        """Has a page of its own for the next row."""
        index = request.num_cached // self.page_size
        if index < len(request.table):
            return True
        if self.pool.num_free == 0:
            return False
        request.table += self._allocate(1)
        return True

    def _allocate(self, count: int) -> list[int]:
        pages = self.pool.allocate(count)
        if pages is None:
            raise RuntimeError(f"{count} pages were counted as free, {self.pool.num_free} are")
        self._new_pages += pages
        return pages

    def _preempt(self, request: Request) -> None:
        """Takes a request's pages. It waits, and computes again what is no longer cached then."""
        self.counters.preemptions += 1
        self._leave(request)
        request.num_cached = request.num_chunked = 0
        request.fork_of = None
        bisect.insort(self.waiting, request, key=lambda r: r.order)

    def _preempt_for(self, request: Request) -> bool:
        """Preempts a running request of lower priority; False if there is none, or not yet."""
        if not self.running or self.running[-1].options.priority >= request.options.priority:
            return False
        self._must_drain = bool(self.in_flight)
        if not self._must_drain:
            self._preempt(self.running[-1])
        return not self._must_drain

    def _leave(self, request: Request) -> None:
        """Gives up slot and pages. Steps in flight may still write to these."""
        if request.slot is None:
            return
        self.free_slots.append(request.slot)
        self.running.remove(request)
        pages, request.table, request.page_keys, request.slot = request.table, [], [], None
        pages += [source for source, target in self.copies if target in pages]
        self.copies = [copy for copy in self.copies if copy[1] not in pages]
        if self.in_flight:
            self.leaving.append((self.in_flight[-1].number, pages))
        else:
            self.pool.release(pages)

    def _register(self, request: Request) -> None:
        """Makes full pages findable whose rows are computed by steps planned before the next."""
        known = min(request.num_cached, len(request.ids))
        if self.deterministic:
            known = min(known, len(request.prompt) // self.chunk_tokens * self.chunk_tokens)
        keys, size = request.page_keys, self.page_size
        while (begin := len(keys) * size) + size <= known:
            parent = keys[-1] if keys else self._root(request)
            page = request.table[len(keys)]
            keys.append(self.prefix.register(page, parent, request.ids[begin : begin + size]))

    def _root(self, request: Request) -> Key:
        return self.prefix.root(cache_salt=request.options.cache_salt)

    def _num_pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)
