"""The device: the pool of pages, the compiled programs, and running steps on them."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jax_mla.config.model import DeepSeekConfig
from jax_mla.params import Params
from jax_mla.serving import programs
from jax_mla.serving.batch import INTEGERS, NUMBERS, pack, pack_biases, pack_options
from jax_mla.serving.request import MAX_BIASED_TOKENS, Request
from jax_mla.serving.scheduler import CHUNK_ROWS, Row, Step
from jax_mla.sharding.placement import placement_of
from jax_mla.sharding.rules import ShardingRules

OnRecompile = Literal["count", "error"]
# Pages that one call copies or poisons, and tokens that one call adds to a history.
PAGES_AT_ONCE, TOKENS_AT_ONCE = 8, 1024
_VARIANTS: tuple[programs.Variant, ...] = ("greedy", "sampled", "full")


@dataclasses.dataclass(frozen=True)
class Program:
    """The name of a program: what it does, and for which shapes."""

    kind: Literal["chunk", "decode", "choose", "remember", "copy", "poison"]
    batch: int = 0
    num_tokens: int = 0
    table_width: int = 0
    variant: programs.Variant = "greedy"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes that programs are compiled for."""

    num_pages: int
    page_size: int
    max_batch: int
    chunk_tokens: int
    max_tokens: int
    deterministic: bool

    @property
    def table_widths(self) -> list[int]:
        """16 pages, 64, 256, ... up to the longest sequence; deterministic: only that."""
        longest = min(-(-self.max_tokens // self.page_size), self.num_pages)
        widths = [16 * 4**i for i in range(16) if 16 * 4**i < longest]
        return [longest] if self.deterministic else [*widths, longest]

    @property
    def batches(self) -> list[int]:
        """1, 2, 4, ... up to max_batch; deterministic: 1, one request after the other."""
        if self.deterministic:
            return [1]
        return [*(2**i for i in range(32) if 2**i < self.max_batch), self.max_batch]

    @property
    def chunks(self) -> list[tuple[int, int]]:
        """Batch and tokens of chunks: one prompt's, or the ends of a few."""
        short = max(self.chunk_tokens // CHUNK_ROWS, 1)
        if self.deterministic:
            return [(1, self.chunk_tokens)]
        return [(1, short), (CHUNK_ROWS, short), (1, self.chunk_tokens)]


@dataclasses.dataclass(frozen=True)
class Part:
    """Rows of a step that one call computes: their hidden states, and tokens if any is a last."""

    rows: Sequence[Row]
    x: jax.Array
    chosen: programs.Chosen | None

    def read(self) -> list[tuple[programs.Chosen, int]]:
        """Waits. Of each row that is a last, where its token is: in numpy arrays, at an index."""
        if self.chosen is None:
            jax.block_until_ready(self.x)
            return []
        chosen = jax.device_get(self.chosen)
        return [(chosen, i) for i, row in enumerate(self.rows) if row.is_last]


class Runner:
    """Runs planned steps, in their order, without waiting for them."""

    def __init__(
        self,
        params: Params,
        config: DeepSeekConfig,
        sizes: Sizes,
        *,
        paranoid: bool = False,
        on_recompile: OnRecompile = "count",
        rules: ShardingRules | None = None,
    ):
        self.sizes, self._params, self._config = sizes, params, config
        self._paranoid, self._on_recompile = paranoid, on_recompile
        self._model = programs.Model(config, rules)
        self._compiled: dict[Program, Callable[..., Any]] = {}
        self._is_warm = False
        self.num_recompiles = 0
        self._history_of: dict[int, Request] = {}  # whose history a slot has
        dtype = params["embed_tokens"]["weight"].dtype
        shape = (config.num_hidden_layers, sizes.num_pages, sizes.page_size, config.cache_row_dim)
        everywhere = None
        if placement_of(params, rules) is not None:
            mesh = jax.tree.leaves(params)[0].sharding.mesh
            everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        fill = np.nan if paranoid else 0
        self._pages = jnp.full(shape, fill, dtype, device=everywhere)
        self._slots = programs.Slots(
            jnp.zeros(sizes.max_batch, jnp.int32, device=everywhere),
            jnp.zeros((sizes.max_batch, config.vocab_size), jnp.int32, device=everywhere),
        )

    def run(self, step: Step) -> list[Part]:
        """Dispatches a step, in one part or in several."""
        if self._paranoid:
            for pages in _parts(step.new_pages, PAGES_AT_ONCE):
                self._on_pages("poison", _padded(pages, self.sizes.num_pages))
        for copies in _parts(step.copies, PAGES_AT_ONCE):
            source, target = zip(*copies, strict=True)
            self._on_pages("copy", _padded(source, 0), _padded(target, self.sizes.num_pages))
        # Alone, a row's numbers depend on nothing else.
        parts = [[row] for row in step.rows] if self.sizes.deterministic else [step.rows]
        return [self._run(step.kind, rows) for rows in parts]

    def _run(self, kind: Literal["chunk", "decode"], rows: Sequence[Row]) -> Part:
        width = max(len(row.request.table) for row in rows)
        width = next(w for w in self.sizes.table_widths if w >= width)
        if kind == "chunk":
            longest = max(row.count for row in rows)
            shapes = self.sizes.chunks
            batch, num_tokens = next((b, t) for b, t in shapes if b >= len(rows) and t >= longest)
            program = Program("chunk", batch, num_tokens, width)
            before = self._params, self._pages
        else:
            batch, num_tokens = next(b for b in self.sizes.batches if b >= len(rows)), 1
            program = Program("decode", batch, 1, width)
            before = self._params, self._pages, self._slots
        work = pack(
            rows,
            batch=batch,
            num_tokens=num_tokens,
            table_width=width,
            num_slots=self.sizes.max_batch,
        )
        x, self._pages = self._program(program)(*before, work)
        has_last = any(row.is_last for row in rows)
        return Part(rows, x, self._choose(x, rows, work) if has_last else None)

    def _choose(self, x: jax.Array, rows: Sequence[Row], work: np.ndarray) -> programs.Chosen:
        requests = [row.request for row in rows]
        variant = self._variant(requests)
        for request in requests:
            self._keep_history(request)
        head = np.ascontiguousarray(work[:, : len(INTEGERS)])
        numbers = pack_options(requests, len(work))
        biases = None  # filling them in takes longer than the rest of a plain step's arrays
        if variant == "full":
            biases = pack_biases(rows, len(work), self._config.vocab_size)
        program = self._program(Program("choose", len(work), variant=variant))
        chosen, self._slots = program(self._params, self._slots, x, head, numbers, biases)
        return chosen

    def _variant(self, requests: Sequence[Request]) -> programs.Variant:
        if self.sizes.deterministic or not all(r.options.is_plain for r in requests):
            return "full"
        return "sampled" if any(r.sampling.temperature for r in requests) else "greedy"

    def _keep_history(self, request: Request) -> None:
        """Loads what a request with penalties has written before it got its slot."""
        slot = request.slot
        if slot is None or self._history_of.get(slot) is request:
            return
        self._history_of[slot] = request
        if not request.options.has_penalty:
            return
        for begin in range(0, len(request.ids), TOKENS_AT_ONCE):
            ids = request.ids[begin : begin + TOKENS_AT_ONCE]
            positions = np.arange(begin, begin + TOKENS_AT_ONCE)
            tokens = np.full(TOKENS_AT_ONCE, self._config.vocab_size, np.int32)
            tokens[: len(ids)] = ids
            is_prompt = (positions < len(request.prompt)).astype(np.int32)
            self._slots = self._program(Program("remember"))(
                self._slots, np.int32(slot), tokens, is_prompt, np.int32(begin == 0)
            )

    def _on_pages(self, kind: Literal["copy", "poison"], *which: np.ndarray) -> None:
        self._pages = self._program(Program(kind))(self._pages, *which)

    def programs(self) -> list[Program]:
        """All that a step may need."""
        s = self.sizes
        batches = sorted({*s.batches, *(batch for batch, _ in s.chunks)})
        variants = ("full",) if s.deterministic else _VARIANTS
        return [
            *(Program("chunk", b, t, w) for b, t in s.chunks for w in s.table_widths),
            *(Program("decode", b, 1, w) for b in s.batches for w in s.table_widths),
            *(Program("choose", b, variant=v) for b in batches for v in variants),
            Program("remember"),
            Program("copy"),
            *([Program("poison")] if self._paranoid else []),
        ]

    def warm_up(self, on_program: Callable[[int, int], None] = lambda done, total: None) -> float:
        """Compiles all programs, several at a time; the seconds that it took.

        Args:
          on_program: called with how many are compiled, and how many there are.
        """
        begin, missing = (
            time.perf_counter(),
            [p for p in self.programs() if p not in self._compiled],
        )
        on_program(0, len(missing))
        with concurrent.futures.ThreadPoolExecutor() as pool:
            compiling = {pool.submit(self._compile, program): program for program in missing}
            for done, future in enumerate(concurrent.futures.as_completed(compiling), start=1):
                self._compiled[compiling[future]] = future.result()
                on_program(done, len(missing))
        self._is_warm = True
        return time.perf_counter() - begin

    def _program(self, program: Program) -> Callable[..., Any]:
        if program not in self._compiled:
            if self._is_warm:
                self.num_recompiles += 1
                if self._on_recompile == "error":
                    raise RuntimeError(f"{program} was not compiled by warm_up")
            self._compiled[program] = self._compile(program)
        return self._compiled[program]

    def _compile(self, program: Program) -> Callable[..., Any]:
        dtype = self._params["embed_tokens"]["weight"].dtype
        pages, slots = (jax.tree.map(_abstract, x) for x in (self._pages, self._slots))
        integer = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
        number = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
        batch, options = program.batch, dict[str, Any](model=self._model)
        work = integer((batch, len(INTEGERS) + program.num_tokens + program.table_width))
        if program.kind == "chunk":
            function, arguments, donated = programs.chunk, (self._params, pages, work), 1
            options["num_tokens"] = program.num_tokens
        elif program.kind == "decode":
            function, arguments, donated = programs.decode, (self._params, pages, slots, work), 1
        elif program.kind == "choose":
            x = jax.ShapeDtypeStruct(
                (batch, self._config.hidden_size), dtype, sharding=slots.token.sharding
            )
            biased = (batch, MAX_BIASED_TOKENS)
            biases = (integer(biased), number(biased)) if program.variant == "full" else None
            columns = integer((batch, len(INTEGERS))), number((batch, len(NUMBERS)))
            function, arguments = programs.choose, (self._params, slots, x, *columns, biases)
            donated, options["variant"] = 1, program.variant
        elif program.kind == "remember":
            tokens = integer((TOKENS_AT_ONCE,))
            arguments = slots, integer(()), tokens, tokens, integer(())
            function, donated, options = programs.remember, 0, {}
        else:
            which = [integer((PAGES_AT_ONCE,))] * (2 if program.kind == "copy" else 1)
            function = programs.copy_pages if program.kind == "copy" else programs.poison_pages
            arguments, donated, options = (pages, *which), 0, {}
        jitted = jax.jit(function, donate_argnums=donated, static_argnames=tuple(options))
        return jitted.lower(*arguments, **options).compile()


def _abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
    sharding = x.sharding if isinstance(x.sharding, jax.sharding.NamedSharding) else None
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _parts(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (items[begin : begin + size] for begin in range(0, len(items), size))


def _padded(pages: Sequence[int], filler: int) -> np.ndarray:
    return np.asarray([*pages, *[filler] * (PAGES_AT_ONCE - len(pages))], np.int32)
