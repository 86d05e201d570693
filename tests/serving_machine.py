"""A machine that serves without arrays: the scheduler over pages that hold tokens.

It stands in for the device. A page holds the tokens that were written to it, and by what step, and
the next token of a sequence is a hash of all tokens that its table shows at that time: whatever is
lost, stale or written by another request changes it.
"""

import dataclasses
import hashlib

from jax_mla.serving.invariants import check_state, check_step
from jax_mla.serving.scheduler import Scheduler, Step

VOCAB = 5


def next_token(ids, seed) -> int:
    return hashlib.blake2b(repr((list(ids), seed)).encode()).digest()[0] % VOCAB


def continuation(request) -> list[int]:
    """What a request writes alone."""
    ids = list(request.prompt)
    while len(ids) < len(request.prompt) + request.max_new_tokens:
        ids.append(next_token(ids, request.options.seed))
        if ids[-1] in request.stop_ids:
            break
    return ids[len(request.prompt) :]


@dataclasses.dataclass
class InFlight:
    step: Step
    chosen: list[int]
    pages: set[int]


class Machine:
    """Runs steps on pages of tokens, with up to two in flight."""

    def __init__(self, scheduler: Scheduler):
        self.scheduler = scheduler
        num_pages = len(scheduler.pool.references)
        self.pages = [[(None, None)] * scheduler.page_size for _ in range(num_pages)]
        self.last_token: dict[int, int] = {}
        self.in_flight: list[InFlight] = []

    def dispatch(self) -> bool:
        """Plans a step and runs it; False if there is none."""
        step = self.scheduler.plan()
        if step is None:
            return False
        check_step(self.scheduler, step)
        for page in step.new_pages:
            self.pages[page] = [(None, None)] * self.scheduler.page_size
        for source, target in step.copies:
            self.pages[target] = list(self.pages[source])
        limit = self.scheduler.chunk_tokens
        assert sum(row.count for row in step.rows if step.kind == "chunk") <= limit
        chosen = [token for row in step.rows if (token := self._run(step.kind, row)) is not None]
        named = {page for row in step.rows for page in row.request.table}
        named |= {page for copy in step.copies for page in copy}
        self.in_flight.append(InFlight(step, chosen, named))
        return True

    def _run(self, kind, row) -> int | None:
        request, size = row.request, self.scheduler.page_size
        assert row.count >= 1
        for position in range(row.start, row.start + row.count):
            if position < len(request.ids):
                token = request.ids[position]
            else:  # chosen by the step before and not read back
                token = self.last_token[request.slot]
            origin = "decode" if kind == "decode" else row.start
            self.pages[request.table[position // size]][position % size] = token, origin
        rows = [
            self.pages[request.table[p // size]][p % size] for p in range(row.start + row.count)
        ]
        seen = [token for token, _ in rows]
        if self.scheduler.deterministic:
            chunk = self.scheduler.chunk_tokens
            for position, (_, origin) in enumerate(rows):
                is_prompt = position < len(request.prompt)
                assert origin == (position // chunk * chunk if is_prompt else "decode")
        assert seen[: len(request.ids)] == request.ids[: len(seen)]
        if not row.is_last:
            return None
        self.last_token[request.slot] = next_token(seen, request.options.seed)
        return self.last_token[request.slot]

    def read_back(self) -> None:
        done = self.in_flight.pop(0)
        assert self.scheduler.in_flight[0] is done.step
        receivers = self.scheduler.read_back(done.chosen)
        assert len(receivers) == len(done.chosen)

    def step(self) -> bool:
        """As the engine does: the next step is dispatched before the last one is read back."""
        has_planned = self.dispatch()
        if self.in_flight and (not has_planned or len(self.in_flight) > 1):
            self.read_back()
            return True
        return has_planned

    def run(self, max_steps: int) -> int:
        """Steps until nothing is left to do; how many."""
        for count in range(max_steps):
            if not self.step():
                assert not self.scheduler.waiting and not self.scheduler.running
                return count
            self.check()
        raise AssertionError(f"requests are left after {max_steps} steps")

    def check(self) -> None:
        check_state(self.scheduler)
        for flight in self.in_flight:
            assert not any(map(self.scheduler.pool.is_free, flight.pages)), "freed while in flight"
