"""The house: who may import whom, which names are public, and what no file may contain."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import jax_mla
import pallas_kernels

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(p for room in ("jax_mla", "pallas_kernels") for p in (ROOT / room).rglob("*.py"))

# Top to bottom. A part imports parts of lower floors only.
FLOORS = [
    {"__main__"},
    {"cli"},
    {"serving"},
    {"training"},
    {"analysis", "text"},
    {"generation"},
    {"checkpoint"},
    {"functional"},
    {"params"},
    {"model"},
    {"layers"},
    {"phases"},
    {"cache"},
    {"sharding"},
    {"checks.tokens"},
    {"checks.arrays"},
    {"config"},
    {"checks.sizes", "checks.problems"},
]
FLOOR = {part: depth for depth, floor in enumerate(FLOORS) for part in floor}

# Ops are called by layers.
# The doctor asks every op what would run; training is measured against the device's peak.
# A phase carries a decode plan, and names its type.
PLAN = {"pallas_kernels.MLADecodePlan"}
MAY_NAME_A_PLAN = {"jax_mla/phases.py"}
MAY_ASK_THE_OPS = {"jax_mla/cli/doctor.py", "jax_mla/cli/train_progress.py"}

ROOMS = ("jax_mla", "pallas_kernels")
MAY_MAP = {"jax_mla/layers/mla/on_mesh.py", "jax_mla/layers/moe/on_mesh.py"}

PALLAS_KERNELS_NAMES = {
    "MLADecodeOutput", "MLADecodePlan", "flash_attention", "grouped_matmul", "merge_attention",
    "mla_decode", "mla_decode_plan",
}  # fmt: skip
JAX_MLA_NAMES = {
    "Block", "DeepSeek", "DeepSeekConfig", "ForwardTrace", "Generated", "GroupedQueryAttention",
    "KeyValueCache", "LatentCache", "MLA", "MoE", "PagedLatentCache", "Placement",
    "RMSNorm", "RopeScaling", "SamplingOptions", "ShardingRules", "SwiGLU", "bind", "decode_step",
    "explain_collectives", "explain_sharding", "forward",
    "forward_trace", "generate", "init", "kimi_k2", "load", "make_mesh", "param_shardings",
    "prefill", "sample", "save", "tiny", "v2", "v2_lite", "v3",
}  # fmt: skip
SUBPACKAGE_NAMES = {
    "analysis": {
        "Comparison", "ServingBytes", "TrainingBytes", "cache_bytes_per_token",
        "compare_with_golden", "compare_with_itself", "explain_collectives", "explain_sharding",
        "flops_per_token", "serving_bytes", "training_bytes",
    },
    "text": {
        "ByteTokenizer", "Completion", "JsonTokenizer", "TextStream", "Tokenizer", "complete",
        "continuation_text", "load_tokenizer",
    },
}  # fmt: skip


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported_modules(path: Path) -> set[str]:
    """Dotted names of all that a file imports, anywhere in it; `from a import b` gives a.b."""
    package = list(path.relative_to(ROOT).with_suffix("").parts[:-1])
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def part_of(dotted: str) -> str:
    """`jax_mla.layers.mla.MLA` is of `layers`; a public name is of the part that defines it."""
    names = dotted.split(".")[1:]
    if names[0] not in FLOOR and names[0] in jax_mla._HOME:
        names = jax_mla._HOME[names[0]].split(".")
    return ".".join(names[:2]) if names[0] == "checks" and len(names) > 1 else names[0]


def of_room(room: str) -> list[Path]:
    return [p for p in SOURCES if p.relative_to(ROOT).parts[0] == room]


@pytest.mark.parametrize("path", of_room("pallas_kernels"), ids=relative)
def test_ops_know_no_model(path):
    foreign = {"jax_mla", "flax", "optax", "safetensors", "rich", "tokenizers", "torch"}
    assert not {name for name in imported_modules(path) if name.split(".")[0] in foreign}


@pytest.mark.parametrize("path", of_room("jax_mla"), ids=relative)
def test_imports_point_downwards(path):
    if path in (ROOT / "jax_mla/__init__.py", ROOT / "jax_mla/checks/__init__.py"):
        return  # the lazy table of public names; a folder on several floors
    here = part_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    assert here in FLOOR, f"{relative(path)} is on no floor of the house; add it to FLOORS"
    for name in imported_modules(path):
        if not name.startswith("jax_mla.") or name == "jax_mla.__version__":
            continue
        there = part_of(name)
        assert there in FLOOR, f"{relative(path)} imports {name}, which is on no floor"
        assert there == here or FLOOR[there] > FLOOR[here], f"{relative(path)} imports {name}"


@pytest.mark.parametrize("path", of_room("jax_mla"), ids=relative)
def test_only_layers_call_the_ops_and_only_by_public_name(path):
    if relative(path) in MAY_ASK_THE_OPS:
        return
    found = {n for n in imported_modules(path) if n.split(".")[0] == "pallas_kernels"}
    public = {f"pallas_kernels.{name}" for name in PALLAS_KERNELS_NAMES} | {"pallas_kernels"}
    is_layer = path.relative_to(ROOT).parts[1] == "layers"
    allowed = public if is_layer else PLAN if relative(path) in MAY_NAME_A_PLAN else set()
    assert found <= allowed, f"{relative(path)} imports {sorted(found - allowed)}"


def test_root_of_the_model_holds_few_files():
    found = {p.stem for p in (ROOT / "jax_mla").glob("*.py")}
    assert found == {"__init__", "__main__", "functional", "model", "params", "phases"}


def modules_of(dotted: str) -> str | None:
    """The file that an imported name is defined in or is, as a dotted module."""
    for name in (dotted, dotted.rpartition(".")[0]):
        path = ROOT / name.replace(".", "/")
        if path.with_suffix(".py").is_file():
            return name
        if (path / "__init__.py").is_file() and name != dotted:
            return f"{name}.__init__"
    return None


def test_no_files_import_each_other_in_a_circle():
    """Imports inside of functions and for types alone count: a circle is no better for hiding."""
    graph = {}
    for path in SOURCES:
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if path.name != "__init__.py":  # lists the names of its folder
            found = {modules_of(name) for name in imported_modules(path)} - {None, module}
            graph[module] = {name for name in found if not name.endswith("__init__")}
    done, open_path = set(), []

    def visit(module):
        assert module not in open_path, " -> ".join([*open_path, module])
        if module not in done:
            open_path.append(module)
            for name in sorted(graph.get(module, ())):
                visit(name)
            done.add(open_path.pop())

    for module in sorted(graph):
        visit(module)


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_no_private_name_of_another_file(path):
    names = {name.rpartition(".")[2] for name in imported_modules(path)}
    assert not {n for n in names if n.startswith("_") and not n.startswith("__")}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(ROOMS):
            for alias in node.names:
                is_module = (
                    modules_of(f"{node.module}.{alias.name}") == f"{node.module}.{alias.name}"
                )
                modules |= {alias.asname or alias.name} if is_module else set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            is_private = node.attr.startswith("_") and not node.attr.startswith("__")
            assert not (is_private and node.value.id in modules), f"line {node.lineno}: {node.attr}"


@pytest.mark.parametrize("path", of_room("jax_mla"), ids=relative)
def test_shard_map_has_its_places(path):
    if relative(path) in MAY_MAP or "jax_mla/training/pipeline" in relative(path):
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        assert not (isinstance(node, ast.Attribute) and node.attr == "shard_map")


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_runs_nothing_that_came_from_a_file(path):
    banned_modules = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "torch"}
    assert not {n for n in imported_modules(path) if n.split(".")[0] in banned_modules}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            assert not (isinstance(node.func, ast.Name) and node.func.id in {"eval", "exec"})
            unsafe = {"allow_pickle", "trust_remote_code", "shell"}
            for keyword in node.keywords:
                is_off = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                assert keyword.arg not in unsafe or is_off, f"line {node.lineno}: {keyword.arg}"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_file_has_one_idea(path):
    assert path.stem not in {"utils", "util", "common", "helpers", "base", "misc"}
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= 450, f"{relative(path)} has {lines} lines; aim at 300, split above 450"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_environment_variables_are_no_api(path):
    assert not {n for n in imported_modules(path) if n in {"os.environ", "os.getenv"}}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        assert not (isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv"})


def test_public_names_are_frozen():
    assert set(jax_mla.__all__) == JAX_MLA_NAMES
    public = {n for n, v in vars(pallas_kernels).items() if n[0] != "_" and not inspect.ismodule(v)}
    assert public == PALLAS_KERNELS_NAMES


@pytest.mark.parametrize("name", SUBPACKAGE_NAMES)
def test_public_names_of_subpackages_are_frozen(name):
    package = getattr(jax_mla, name)
    assert set(package.__all__) == SUBPACKAGE_NAMES[name]
    for public in package.__all__:
        assert (getattr(package, public).__doc__ or "").strip(), f"{public} has no docstring"


@pytest.mark.parametrize("name", sorted(JAX_MLA_NAMES))
def test_public_name_of_jax_mla_exists(name):
    assert (getattr(jax_mla, name).__doc__ or "").strip(), f"{name} has no docstring"


@pytest.mark.parametrize("name", sorted(JAX_MLA_NAMES))
def test_help_shows_what_a_public_name_takes(name):
    assert not {"args", "kwargs"} & set(inspect.signature(getattr(jax_mla, name)).parameters)


@pytest.mark.parametrize("name", sorted(PALLAS_KERNELS_NAMES))
def test_public_name_of_pallas_kernels_exists(name):
    assert (getattr(pallas_kernels, name).__doc__ or "").strip(), f"{name} has no docstring"


@pytest.mark.parametrize(
    "code",
    [
        "import jax_mla",
        "import jax_mla; jax_mla.DeepSeekConfig, jax_mla.v3()",
        "from jax_mla.cli.main import main",
        "import jax_mla; jax_mla.analysis.flops_per_token, jax_mla.analysis.training_bytes",
    ],
)
def test_starts_without_jax(code):
    check = (
        "import sys; found = {'jax', 'flax', 'numpy'} & set(sys.modules); assert not found, found"
    )
    subprocess.run([sys.executable, "-c", f"{code}\n{check}"], check=True, timeout=60, cwd=ROOT)
