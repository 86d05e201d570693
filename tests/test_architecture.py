"""The house: which files there are, who may import whom, which names are public.

A rule that is not met everywhere yet lists its exceptions. A list must be exact: whoever mends one
takes it off.
"""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import jax_mla
import pallas_kernels

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(p for room in ("jax_mla", "pallas_kernels") for p in (ROOT / room).rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}

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

# The house has no other file at the root of a package.
ROOT_FILES = {"__init__", "__main__", "functional", "model", "params", "phases"}
# An op is a folder of these files, of plan.py where work is planned before a launch, and of one
# folder per GPU generation.
OP_FILES = {"NOTES.md", "__init__.py", "api.py", "reference.py", "workloads.py"}
GENERATION_FILES = {"__init__.py", "config.py", "launch.py"}

# The files that map a program of one device over a mesh, and with them what a reader must know.
MAY_MAP = {"jax_mla/layers/mla/on_mesh.py", "jax_mla/layers/moe/on_mesh.py"}
MAPPING_FOLDERS = ("jax_mla/training/pipeline/",)

# Private names of other modules, with the reason.
MAY_REACH = {
    "jax_mla/cli/main.py": {"os._exit"},  # documented, and the only way past a compiling thread
    "jax_mla/cli/train_flags.py": {"argparse._ArgumentGroup"},  # a type that has no public name
    "tests/jax_mla/test_depth.py": {"sys._getframe"},  # counts frames
    "tests/jax_mla/training/test_step.py": {"train_step._cache_size"},  # how often jit compiled
    "tests/test_architecture.py": {"jax_mla._HOME", "jax_mla._SUBPACKAGES"},  # the lazy tables
}
# Simulator and compiler checks stand in for parts of JAX that have no public name.
MAY_REACH_INTO_JAX = ("tests/kernel_tools/", "tests/pallas_kernels/test_flash_attention")

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
# What the public subpackages export; the names of the root are theirs too.
SUBPACKAGE_NAMES = {
    "analysis": {
        "Comparison", "ServingBytes", "TrainingBytes", "cache_bytes_per_token",
        "compare_with_golden", "compare_with_itself", "explain_collectives", "explain_sharding",
        "flops_per_token", "serving_bytes", "training_bytes",
    },
    "cache": {
        "Cache", "LatentCache", "PagedLatentCache", "advance", "append", "capacity", "truncate",
    },
    "checkpoint": {"load", "save"},
    "config": {"DeepSeekConfig", "RopeScaling", "kimi_k2", "tiny", "v2", "v2_lite", "v3"},
    "generation": {"Generated", "SamplingOptions", "generate", "sample"},
    "layers": {
        "Block", "GroupedQueryAttention", "KeyValueCache", "Linear", "MLA", "MoE", "RMSNorm",
        "SwiGLU",
    },
    "serving": {
        "AsyncEngine", "Engine", "Event", "Request", "RequestOptions", "Stats", "StopStrings",
        "TokenLogprobs",
    },
    "sharding": {
        "ExpertDispatch", "MESH_AXES", "Placement", "ShardingRules", "layouts", "make_mesh",
    },
    "text": {
        "ByteTokenizer", "ChatTemplate", "Completion", "JsonTokenizer", "TextStream", "Tokenizer",
        "complete", "continuation_text", "load_chat_template", "load_tokenizer",
    },
    "training": {
        "Batch", "Checkpoints", "NextTokenLoss", "Precision", "Recipe", "Restored", "StepMetrics",
        "StepReport", "TokenRows", "TrainResult", "TrainState", "abstract_state", "cosine",
        "expert_load", "init_state", "make_optimizer", "next_token_loss", "place_batch",
        "read_tokens", "sequence_balance", "state_shardings", "train", "train_step",
        "trainable_mask", "update_router_bias", "warmup_stable_decay",
    },
    "training.pipeline": {
        "Execution", "Op", "Pipeline", "PipelinedGradients", "Schedule", "Span", "Timeline",
        "gpipe", "ideal_bubble", "join_params", "join_state", "loss_and_gradients", "one_f_one_b",
        "pipeline_train_step", "plot_timeline", "simulate", "split_params", "split_state",
    },
}  # fmt: skip


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree_of(path: Path) -> ast.AST:
    return TREES.get(path) or ast.parse(path.read_text(encoding="utf-8"))


def imported_modules(path: Path) -> set[str]:
    """Dotted names of all that a file imports, anywhere in it; `from a import b` gives a.b."""
    package = list(path.relative_to(ROOT).with_suffix("").parts[:-1])
    names = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def file_of(dotted: str) -> Path | None:
    """The file of a module, or of the module that a name is in; None for other packages."""
    for name in (dotted, dotted.rpartition(".")[0]):
        for file in (f"{name.replace('.', '/')}.py", f"{name.replace('.', '/')}/__init__.py"):
            if (ROOT / file) in TREES:
                return ROOT / file
    return None


def reachable(imported: dict[Path, set[Path]], start: Path) -> set[Path]:
    """The files that a file imports, directly or through others."""
    found, waiting = set(), [start]
    while waiting:
        new = imported.get(waiting.pop(), set()) - found
        found |= new
        waiting += new
    return found


NAMED_TUPLE_METHODS = {"_asdict", "_fields", "_make", "_replace"}  # public in spite of their names


def is_private(name: str) -> bool:
    return name.startswith("_") and name.strip("_") != "" and not name.endswith("__")


DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def private_names_reached(path: Path) -> set[str]:
    """Private names that a file imports, or reads from something and does not define itself."""
    nodes = list(ast.walk(tree_of(path)))
    defined = {n.name for n in nodes if isinstance(n, DEFINITIONS)}
    defined |= {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            defined |= {node.attr} if ast.unparse(node.value) == "self" else set()
    reached = {n for n in imported_modules(path) if any(map(is_private, n.split(".")))}
    for node in nodes:
        if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in defined:
            reached |= set() if node.attr in NAMED_TUPLE_METHODS else {ast.unparse(node)}
    return reached


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


@pytest.mark.parametrize("room", ["jax_mla", "pallas_kernels"])
def test_no_files_import_each_other_in_a_circle(room):
    """Imports inside functions and for type checkers included."""
    imported = {}
    for path in of_room(room):
        files = {file_of(name) for name in imported_modules(path)}
        imported[path] = files - {None, path, ROOT / "jax_mla/__init__.py"}
    imported.pop(ROOT / "jax_mla/__init__.py", None)  # the lazy table of public names
    in_circles = {relative(path) for path in imported if path in reachable(imported, path)}
    assert not in_circles


@pytest.mark.parametrize(
    "path",
    [*SOURCES, *sorted((ROOT / "tests").rglob("*.py"))],
    ids=relative,
)
def test_reaches_for_no_private_name_of_another_module(path):
    reached = private_names_reached(path)
    if relative(path).startswith(MAY_REACH_INTO_JAX):
        reached = {n for n in reached if "jax_mla" in n or "pallas_kernels" in n}
    assert reached == MAY_REACH.get(relative(path), set())


def test_one_file_of_each_layer_maps_over_a_mesh():
    found = {
        relative(path)
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if "shard_map" in (getattr(node, "attr", None), getattr(node, "id", None))
        and not relative(path).startswith(MAPPING_FOLDERS)
    }
    assert found == MAY_MAP


def test_the_root_of_jax_mla_has_only_files_of_the_whole_model():
    assert {path.stem for path in (ROOT / "jax_mla").glob("*.py")} == ROOT_FILES


OPS = [p.parent for p in of_room("pallas_kernels") if p.name == "api.py"]


@pytest.mark.parametrize("folder", OPS, ids=lambda folder: folder.name)
def test_op_folder_has_the_files_of_every_op(folder):
    found = {path.name for path in folder.iterdir()} - {"__pycache__"}
    generations = {name for name in found if re.fullmatch(r"sm\d+", name)}
    assert found - generations - {"plan.py"} == OP_FILES
    for generation in generations:
        assert {path.name for path in (folder / generation).iterdir()} >= GENERATION_FILES


def test_every_folder_of_pallas_kernels_is_an_op_or_a_generation():
    folders = {path.parent for path in of_room("pallas_kernels")} - {ROOT / "pallas_kernels"}
    assert {f for f in folders if not re.fullmatch(r"sm\d+", f.name)} == set(OPS)


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_runs_nothing_that_came_from_a_file(path):
    banned_modules = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "torch"}
    assert not {n for n in imported_modules(path) if n.split(".")[0] in banned_modules}
    for node in ast.walk(tree_of(path)):
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
    for node in ast.walk(tree_of(path)):
        assert not (isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv"})


def test_public_names_are_frozen():
    assert set(jax_mla.__all__) == JAX_MLA_NAMES
    public = {n for n, v in vars(pallas_kernels).items() if n[0] != "_" and not inspect.ismodule(v)}
    assert public == PALLAS_KERNELS_NAMES


@pytest.mark.parametrize("name", SUBPACKAGE_NAMES)
def test_public_names_of_subpackages_are_frozen(name):
    package = importlib.import_module(f"jax_mla.{name}")
    assert set(package.__all__) == SUBPACKAGE_NAMES[name]
    for public in package.__all__:
        assert (getattr(package, public).__doc__ or "").strip(), f"{public} has no docstring"


def test_public_subpackages_are_attributes():
    code = "import jax_mla; " + "; ".join(f"jax_mla.{name}" for name in jax_mla._SUBPACKAGES)
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=ROOT)
    assert set(jax_mla._SUBPACKAGES) <= set(SUBPACKAGE_NAMES)


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
