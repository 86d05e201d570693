"""Compiles Mosaic GPU kernels for an H200 on a machine without one, and reads the result.

    @pytest.mark.kernel_aot
    def test_decode_compiles():
        (kernel,) = compile_sm90a(decode, *jax.eval_shape(inputs)).kernels
        kernel.check()                                    # no spills, not serialised, fits
        assert kernel.instructions.of("HGMMA.64x256") == 8
        assert kernel.loop("UTMALDG").of("UTMALDG") == 3  # in the loop that has them

    print(compile_sm90a(decode, *shapes))                 # the figures as a table
    lower_for_cuda(decode, *shapes)                       # any JAX: checks layouts, TMA limits

`compile_sm90a` needs no driver and no CUDA libraries, only the `aot` extra: JAX's CUDA plugin, a
ptxas (PATH, /usr/local/cuda or the pip package) and nvdisasm. Figures are those of the compiler,
not times. Registers are the launch's: kernels that move registers between warpgroups show 168 for
three of them; judge these by spills and by serialisation.
"""

import collections
import contextlib
import dataclasses
import functools
import importlib.util
import inspect
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import jax

from pallas_kernels.hardware import SM90_SHARED_MEMORY_BYTES

# Read when JAX looks for plugins, at the first use of a backend: the check asks for cuDNN and other
# libraries that only running needs.
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

PLUGIN = "jax_plugins.xla_cuda13"
INSTRUCTION = re.compile(
    r"^\s+/\*[0-9a-f]{4,}\*/\s+(?P<predicate>@!?U?P\w+\s+)?(?P<opcode>[A-Z][\w.]*)(?P<operands>.*)$"
)
LABEL = re.compile(r"^(\.L_x_\d+):")
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 151397597184
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 13 minor: 0 }
device_description_str: "NVIDIA H200"
"""


class Instructions(collections.Counter[str]):
    """SASS opcodes, such as "HGMMA.64x256x16.F32.BF16", and how many there are of each."""

    def of(self, opcode: str) -> int:
        """How many opcodes begin with `opcode`, such as "HGMMA.64x256" or "LDS"."""
        return sum(n for name, n in self.items() if name.startswith(opcode))


@dataclasses.dataclass(frozen=True)
class CompiledKernel:
    """Figures of one kernel; shared memory is per CTA, spills are per thread."""

    name: str
    grid: tuple[int, ...]
    cluster: tuple[int, ...]
    threads: int
    registers: int
    shared_memory_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    stack_bytes: int
    serialized: tuple[str, ...]  # ptxas's messages C7510, C7511, C7512: each wgmma is waited for
    injected: tuple[str, ...]  # C7517, C7519: waits and fences that ptxas added around wgmma
    instructions: Instructions
    loops: tuple[Instructions, ...]  # shortest first; an outer loop includes its inner ones
    sass: str = dataclasses.field(repr=False)

    def loop(self, opcode: str) -> Instructions:
        """The shortest loop that has an opcode with this beginning: "HGMMA" finds a consumer's."""
        return next(loop for loop in self.loops if loop.of(opcode))

    def problems(self) -> list[str]:
        """What makes a kernel unfit to ship, one sentence each."""
        found = []
        if self.spill_store_bytes or self.spill_load_bytes:
            found.append(
                f"spills {self.spill_store_bytes} bytes per thread, reloads {self.spill_load_bytes}"
            )
        if self.serialized:
            found.append(f"wgmma serialised: {self.serialized[0]}")
        if self.shared_memory_bytes > SM90_SHARED_MEMORY_BYTES:
            found.append(
                f"shared memory must be at most {SM90_SHARED_MEMORY_BYTES} bytes, got"
                f" {self.shared_memory_bytes}"
            )
        return found

    def check(self) -> None:
        """Raises AssertionError naming every problem."""
        assert not self.problems(), f"{self.name}: {'; '.join(self.problems())}"

    def __str__(self) -> str:
        shown = ("HGMMA", "UTMA", "LDS", "STS", "LDL", "STL", "MUFU", "USETMAXREG", "WARPGROUP")
        opcodes = sorted((op, n) for op, n in self.instructions.items() if op.startswith(shown))
        return (
            f"{self.name}: grid {self.grid}, cluster {self.cluster}, {self.threads} threads,"
            f" {self.registers} registers, {self.shared_memory_bytes} B shared memory,"
            f" spills {self.spill_store_bytes}/{self.spill_load_bytes} B,"
            f" {'SERIALISED' if self.serialized else 'not serialised'},"
            f" {len(self.injected)} waits and fences injected,"
            f" {self.instructions.total()} instructions\n  "
            + ", ".join(f"{opcode} {n}" for opcode, n in opcodes)
        )


@dataclasses.dataclass(frozen=True)
class CompiledProgram:
    """A compiled function: its Mosaic GPU kernels in order of compilation, and its buffers."""

    kernels: tuple[CompiledKernel, ...]
    temp_bytes: int
    argument_bytes: int
    output_bytes: int
    hlo: str = dataclasses.field(repr=False)  # after XLA's optimisation

    def __str__(self) -> str:
        return "\n".join(map(str, self.kernels)) + f"\ntemp {self.temp_bytes} B"


def why_not() -> str | None:
    """Why kernels cannot be compiled here, or None. Imports nothing heavy."""
    if jax.__version_info__ < (0, 11):
        return f"jax {jax.__version__} is older than 0.11, whose compiler output this reads"
    wanted = "install the aot extra"
    if not importlib.util.find_spec("jax_plugins") or not importlib.util.find_spec(PLUGIN):
        return f"no CUDA plugin of JAX ({wanted})"
    for tool in ("ptxas", "nvdisasm"):
        if _find(tool) is None:
            return f"no {tool} on PATH, in /usr/local/cuda or from pip ({wanted})"
    return None


def lower_for_cuda(function, *shapes) -> str:
    """The lowered program of `jax.jit(function)` for an NVIDIA GPU, on any version of JAX."""
    traced = jax.jit(function).trace(*shapes)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def compile_sm90a(function, *shapes) -> CompiledProgram:
    """Compiles `jax.jit(function)` for one H200.

    Args:
      function: calls Mosaic GPU kernels directly, because ops refuse them where there is no GPU.
      *shapes: arguments, as jax.ShapeDtypeStruct or arrays whose values do not matter.

    Raises:
      RuntimeError: nothing was compiled, because the function has no Mosaic GPU kernel.
    """
    from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

    mesh = _h200_mesh()
    everywhere = NamedSharding(mesh, PartitionSpec())
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), shapes
    )
    # Kernels and libraries ask this mesh for the number of SMs, since there is no device to ask.
    abstract = AbstractMesh((), (), abstract_device=mesh.abstract_mesh.abstract_device)
    jitted = jax.jit(lambda *args: function(*args))  # a new function, so that nothing is cached
    with _launches() as launches, _dumped() as output, jax.sharding.use_abstract_mesh(abstract):
        compiled = jitted.lower(*shapes).compile()
    kernels = _parse(output[0], launches)
    if not kernels:
        raise RuntimeError("no Mosaic GPU kernel was compiled")
    memory = compiled.memory_analysis()
    return CompiledProgram(
        kernels=kernels,
        temp_bytes=memory.temp_size_in_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        hlo=compiled.as_text(),
    )


@functools.cache
def h200_devices(count: int, *, hosts: int = 1) -> list[jax.Device]:
    """Devices that describe H200s, for meshes of programs that are compiled and never run."""
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(
        "h200", platform="cuda", target_config=H200, topology=f"1x{hosts}x{count // hosts}"
    )
    return list(topology.devices)


@functools.cache
def _h200_mesh():
    axis_types = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((1,), ("x",), axis_types=axis_types, devices=h200_devices(1))


def _find(tool: str) -> str | None:
    """The program on PATH, in /usr/local/cuda or in a pip package of NVIDIA's."""
    if found := shutil.which(tool) or shutil.which(tool, path="/usr/local/cuda/bin"):
        return found
    packages = (path for root in sys.path for path in Path(root).glob(f"nvidia/*/bin/{tool}"))
    return next(map(str, packages), None)


@contextlib.contextmanager
def _launches() -> Iterator[dict[str, list[dict]]]:
    """Kernel name to the launch parameters of every lowering of it. Private API of JAX."""
    from jax.experimental.mosaic.gpu import core

    launches = collections.defaultdict(list)
    signature = inspect.signature(core._launch)

    def launch(*args, **kwargs):
        bound = signature.bind(*args, **kwargs).arguments
        name = bound["module"].operation.attributes["sym_name"].value
        launches[name].append(
            dict(
                grid=tuple(bound["grid"]),
                cluster=tuple(bound["cluster"]),
                threads=bound["block"][0] * bound["block"][1] * bound["block"][2],
                shared_memory_bytes=int(core._smem_tree_size(bound["smem_buffers"])),
            )
        )
        return original(*args, **kwargs)

    original = core._launch
    with mock.patch.object(core, "_launch", launch):
        yield launches


@contextlib.contextmanager
def _dumped() -> Iterator[list[str]]:
    """Captures what Mosaic GPU's compiler prints: ptxas's log and the SASS of every kernel."""
    from jax.experimental.mosaic.gpu import core

    del core  # importing it sets MOSAIC_GPU_CUDA_ROOT
    output: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "cuda", "bin")
        root.mkdir(parents=True)
        (root / "nvdisasm").symlink_to(_find("nvdisasm") or "")
        printed = Path(folder, "printed")
        switches = {"MOSAIC_GPU_DUMP_PTXAS": "1", "MOSAIC_GPU_DUMP_SASS": "1"}
        switches["MOSAIC_GPU_CUDA_ROOT"] = str(root.parent)
        with mock.patch.dict(os.environ, switches), printed.open("wb") as file:
            sys.stdout.flush()
            saved = os.dup(1)
            os.dup2(file.fileno(), 1)
            try:
                yield output
            finally:
                os.dup2(saved, 1)
                os.close(saved)
        output.append(printed.read_text())


def _parse(output: str, launches: dict[str, list[dict]]) -> tuple[CompiledKernel, ...]:
    """Kernels in `output`; the nth kernel with some name belongs to the nth launch of that name."""
    kernels, seen = [], collections.Counter()
    log_then_sass = r"((?:^ptxas.*\n|^    \d+ bytes.*\n)+)((?:^(?!ptxas).*\n?)*)"
    for log, sass in re.findall(log_then_sass, output, re.MULTILINE):
        name = re.search(r"Compiling entry function '(\w+)_mosaic_gpu_kernel'", log)[1]
        launch = launches[name][min(seen[name], len(launches[name]) - 1)]
        seen[name] += 1
        instructions, loops = _instructions(sass)
        kernels.append(
            CompiledKernel(
                name=name,
                **launch,
                registers=_number(r"Used (\d+) registers", log),
                spill_store_bytes=_number(r"(\d+) bytes spill stores", log),
                spill_load_bytes=_number(r"(\d+) bytes spill loads", log),
                stack_bytes=_number(r"(\d+) bytes stack frame", log),
                serialized=_messages(r"C751[012]", log),
                injected=_messages(r"C751[79]", log),
                instructions=instructions,
                loops=loops,
                sass=sass,
            )
        )
    return tuple(kernels)


def _messages(code: str, log: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in log.splitlines() if re.search(rf"\({code}\)", line))


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"{pattern!r} is not in what ptxas said: {text[:500]}")
    return int(found[1])


def _instructions(sass: str) -> tuple[Instructions, tuple[Instructions, ...]]:
    """Counts of the whole and of every natural loop."""
    blocks, labels = [[]], {}  # a block ends at a label and after a branch
    for line in sass.splitlines():
        if label := LABEL.match(line):
            blocks.append([])
            labels[label[1]] = len(blocks) - 1
        elif instruction := INSTRUCTION.match(line):
            blocks[-1].append(instruction)
            if instruction["opcode"] in ("BRA", "EXIT", "RET"):
                blocks.append([])
    successors = [_successors(i, block, labels) for i, block in enumerate(blocks)]

    def count(indices) -> Instructions:
        return Instructions(line["opcode"] for i in indices for line in blocks[i])

    loops = [count(loop) for loop in _natural_loops(successors)]
    return count(range(len(blocks))), tuple(sorted(loops, key=Instructions.total))


def _successors(i: int, block: list[re.Match], labels: dict[str, int]) -> list[int]:
    last = block[-1] if block else None
    target = last and re.search(r"`\((\.L_x_\d+)\)", last["operands"])
    jump = [labels[target[1]]] if target and last["opcode"].startswith("BRA") else []
    always = last and last["opcode"].startswith(("BRA", "EXIT", "RET")) and not last["predicate"]
    return jump if always else [*jump, i + 1]


def _natural_loops(successors: list[list[int]]) -> list[set[int]]:
    """Blocks of every loop: what reaches a jump back to a header that dominates it."""
    everything = set(range(len(successors)))
    successors = [[s for s in out if s in everything] for out in successors]
    predecessors = {i: [j for j, out in enumerate(successors) if i in out] for i in everything}
    dominators = {i: everything for i in everything} | {0: {0}}
    changed = True
    while changed:
        changed = False
        for i in range(1, len(successors)):
            common = set.intersection(*(dominators[p] for p in predecessors[i]), everything) | {i}
            changed |= common != dominators[i]
            dominators[i] = common
    loops = collections.defaultdict(set)
    for end, out in enumerate(successors):
        for header in set(out) & dominators[end]:
            loop, pending = loops[header] | {header}, [end]
            while pending:
                if (block := pending.pop()) not in loop:
                    loop.add(block)
                    pending += predecessors[block]
            loops[header] = loop
    return list(loops.values())
