"""Layouts that tests compute on, each stated once: a mesh of eight devices, and rules for it."""

import dataclasses
import math
from collections.abc import Iterable, Sequence

import jax
import pytest
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

import jax_mla
from jax_mla.sharding import MESH_AXES, ExpertDispatch, Placement, ShardingRules, layouts


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh and the rules that shard a model over it.

    Attributes:
      axes: the size of every mesh axis that is larger than 1.
      rules: None for those of `ShardingRules()`.
    """

    axes: dict[str, int]
    rules: ShardingRules | None = None

    def mesh(self, devices: list[jax.Device] | None = None) -> Mesh:
        """Of fake devices, or of the first ones of `devices`."""
        return jax_mla.make_mesh(**self.axes, devices=devices)

    def abstract_mesh(self) -> AbstractMesh:
        """Of no devices, so that nothing can be refused for their platform."""
        shape = tuple(self.axes.get(axis, 1) for axis in MESH_AXES)
        types = (jax.sharding.AxisType.Auto,) * len(MESH_AXES)
        return AbstractMesh(shape, MESH_AXES, axis_types=types)

    def placement(self) -> Placement:
        return Placement(self.abstract_mesh(), self.rules or ShardingRules())

    def dispatching(self, method: str, capacity: float | None = None) -> "Layout":
        """The same with another dispatch of experts."""
        rules = self.rules or ShardingRules()
        rules = dataclasses.replace(rules, dispatch=ExpertDispatch(method, capacity))
        return dataclasses.replace(self, rules=rules)

    def flags(self) -> str:
        """What the command line takes for one of the published layouts."""
        (name,) = (name for name, rules in layouts.LAYOUTS.items() if rules() == self.rules)
        return f"--mesh {','.join(f'{axis}={n}' for axis, n in self.axes.items())} --rules {name}"

    def place(self, params: dict, config: jax_mla.DeepSeekConfig) -> dict:
        """Parameters sharded over the mesh."""
        return jax.device_put(params, jax_mla.param_shardings(config, self.mesh(), self.rules))

    def replicate(self, arrays):
        """Arrays of which every device of the mesh holds all."""
        return jax.device_put(arrays, jax.sharding.NamedSharding(self.mesh(), PartitionSpec()))

    def abstract_params(self, config: jax_mla.DeepSeekConfig, mesh=None) -> dict:
        """Shapes, dtypes and shardings of the parameters, on this layout's mesh or another one."""
        shapes = jax.eval_shape(lambda: jax_mla.init(jax.random.key(0), config))
        shardings = jax_mla.param_shardings(config, mesh or self.mesh(), self.rules)
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            shapes, shardings,
        )  # fmt: skip


SENDING = dataclasses.replace(layouts.tensor_parallel(), dispatch=ExpertDispatch("a2a"))
# By name. Where two differ in one thing, tests are about that thing.
MESH_LAYOUTS = {
    # Rows of the batch; and what is held of the rest: all, or ever less of it.
    "ddp": Layout({"data": 8}, layouts.ddp()),
    "zero1": Layout({"data": 8}, layouts.zero1()),
    "zero2": Layout({"data": 8}, layouts.zero2()),
    "zero3": Layout({"data": 4, "fsdp": 2}, layouts.zero3()),
    # Heads and widths.
    "tensor": Layout({"tensor": 4}, layouts.tensor_parallel()),
    "data_tensor": Layout({"data": 2, "tensor": 4}, layouts.tensor_parallel()),
    # Experts: tokens gathered, or sent to them.
    "data_expert": Layout({"data": 2, "expert": 4}, layouts.tensor_parallel()),
    "data_expert_a2a": Layout({"data": 2, "expert": 4}, SENDING),
    "data_tensor_expert": Layout({"data": 2, "tensor": 2, "expert": 2}, layouts.tensor_parallel()),
    "data_tensor_expert_a2a": Layout({"data": 2, "tensor": 2, "expert": 2}, SENDING),
    # Experts, and other rows on every device.
    "dp_attention_ep": Layout({"data": 2, "expert": 4}, layouts.dp_attention_ep()),
    "dp_attention_ep_8": Layout({"expert": 8}, layouts.dp_attention_ep()),
    # Positions; and the cache as well.
    "sequence": Layout({"sequence": 8}),
    "data_sequence_tensor": Layout({"data": 2, "sequence": 2, "tensor": 2}),
    "context": Layout({"data": 2, "sequence": 4}, layouts.context_parallel()),
    "defaults": Layout({"fsdp": 2, "tensor": 2, "expert": 2}),
}


def shard_bytes(tree) -> int:
    """Bytes of a device's shards of sharded arrays, or of their shapes."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def slow_unless(is_fast: Sequence[str], names: Iterable[str]) -> list:
    """Parameters of a test: these names, all but the fast ones marked slow."""
    return [n if n in is_fast else pytest.param(n, marks=pytest.mark.slow) for n in names]
