"""A model cut into stages: which layers run on which devices."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jax_mla.checks.sizes import check_positive
from jax_mla.config.leaf_types import STACKS, TOP_LEVEL, check_known, flatten, leaf_type
from jax_mla.config.leaves import stacks_of
from jax_mla.config.model import DeepSeekConfig
from jax_mla.params import Params, param_shardings
from jax_mla.sharding.axes import MESH_AXES
from jax_mla.sharding.mesh import check_mesh
from jax_mla.sharding.placement import partition_spec
from jax_mla.sharding.rules import LOGICAL_AXES, SPLITS, ShardingRules, as_tuple


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """The stages of a model. Hashable.

    The embedding is in the first stage; norm, head and loss are in the last. A tied embedding is in
    both. Within a stage the other axes of the mesh are used as in a model without stages.

    Attributes:
      mesh: from `make_mesh`; stage i has the devices with index i on the axis `stage`. Every
        process must have some of the mesh's devices.
      rules: the layout within a stage.
      layers_per_stage: how many layers each stage has. None splits evenly; stages with one layer
        more come first, since the last one also has the head.

    Raises:
      ValueError: layers_per_stage does not fit the stages or the layers, the rules split something
        else over `stage`, or the mesh is not from `make_mesh` or leaves a process without devices.
    """

    config: DeepSeekConfig
    mesh: Mesh
    rules: ShardingRules = ShardingRules()  # noqa: RUF009 - frozen
    layers_per_stage: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        _check_mesh(self.mesh)
        _check_rules(self.rules, self.mesh)
        _check_layers(self.layers_per_stage, self.num_stages, self.config.num_hidden_layers)

    @property
    def num_stages(self) -> int:
        return self.mesh.shape["stage"]

    @property
    def stage_rules(self) -> ShardingRules:
        """The rules within a stage, which never splits its layers."""
        return dataclasses.replace(self.rules, layers=None)

    @property
    def has_two_embeddings(self) -> bool:
        """Whether the first and the last stage each hold a copy of a tied embedding."""
        return self.num_stages > 1 and self.config.tie_word_embeddings

    @functools.cached_property
    def layers(self) -> tuple[tuple[int, int], ...]:
        """The half-open range [first, end) of layers of every stage."""
        sizes, num_stages = self.layers_per_stage, self.num_stages
        if sizes is None:
            even, more = divmod(self.config.num_hidden_layers, num_stages)
            sizes = tuple(even + (stage < more) for stage in range(num_stages))
        ends = [sum(sizes[: stage + 1]) for stage in range(num_stages)]
        return tuple(zip([0, *ends[:-1]], ends, strict=True))

    def stacks(self, stage: int) -> dict[str, range]:
        """The indices that a stage has in every stack of the parameter dict."""
        first, end = self.layers[stage]
        found = {
            name: range(max(first - of.start, 0), min(end - of.start, len(of)))
            for name, of in stacks_of(self.config).items()
        }
        return {name: of_stage for name, of_stage in found.items() if of_stage}

    @functools.cached_property
    def meshes(self) -> tuple[Mesh, ...]:
        """The mesh of every stage: all six axes, with `stage` of size 1."""
        axis = self.mesh.axis_names.index("stage")
        return tuple(
            Mesh(devices, self.mesh.axis_names, axis_types=self.mesh.axis_types)
            for devices in np.split(self.mesh.devices, self.num_stages, axis)
        )

    def sharding(self, stage: int, *logical_axes: str | None) -> NamedSharding:
        """The sharding of an array with these axes on a stage; without any, it is replicated."""
        return NamedSharding(self.meshes[stage], partition_spec(self.stage_rules, logical_axes))

    def param_shardings(self, stage: int, rules: ShardingRules | None = None) -> Params:
        """The tree of a stage's parameters, with NamedShardings instead of arrays.

        Args:
          rules: None takes `stage_rules`.
        """
        rules = self.stage_rules if rules is None else rules
        whole = param_shardings(self.config, self.meshes[stage], rules)
        return self.part(whole, stage, take=lambda sharding, first, end: sharding)

    def is_here(self, stage: int) -> bool:
        """Whether this process has a device of the stage, and so runs its programs."""
        return bool(self.meshes[stage].local_devices)

    @functools.cached_property
    def joined_rules(self) -> ShardingRules:
        """The layout of the whole model's parameters and state while no stage computes.

        Adds `stage` to the axes of `embed` and `latent` where hidden_size, kv_lora_rank and
        q_lora_rank can be divided so; otherwise every stage keeps a full copy.
        """
        rules = _also_over_stages(self.stage_rules)
        try:
            for of in (rules, rules.gradients(), rules.optimizer()):
                param_shardings(self.config, self.mesh, of)
        except ValueError:
            return self.stage_rules
        return rules

    def part(
        self,
        tree: Any,
        stage: int,
        *,
        take: Callable[[Any, int, int], Any] = lambda x, first, end: x[first:end],
    ) -> Any:
        """A stage's part of the whole model's parameters, gradients or optimizer state; no copies.

        Args:
          take: maps a leaf of stacked layers and a range [first, end) of them to the stage's leaf.
        """
        return jax.tree.map(
            lambda x: self._part(x, stage, take) if _holds_params(x) else x,
            tree,
            is_leaf=_holds_params,
        )

    def _part(self, params: Params, stage: int, take) -> Params:
        check_known(params)
        first, end = self.layers[stage]
        is_last = end == self.config.num_hidden_layers
        has_embedding = first == 0 or (is_last and self.config.tie_word_embeddings)
        of_stack, part = self.stacks(stage), {}
        for name, value in params.items():
            if name in STACKS:
                if name in of_stack:
                    a, b = of_stack[name].start, of_stack[name].stop
                    part[name] = jax.tree.map(lambda x, a=a, b=b: take(x, a, b), value)
            elif has_embedding if _is_embedding(name, value) else is_last:
                part[name] = value
        return part


def _is_embedding(name: str, value: Any) -> bool:
    return any(leaf_type(path).part == "embedding" for path in flatten({name: value}))


def _check_mesh(mesh: Mesh) -> None:
    """It has the axes of `make_mesh`, and devices of every process."""
    check_mesh(mesh, has_devices=True)
    if set(mesh.axis_names) != set(MESH_AXES):
        raise ValueError(
            f"the mesh of a pipeline must have all axes {MESH_AXES} of jax_mla.make_mesh, got axes "
            f"{mesh.axis_names}"
        )
    processes = {device.process_index for device in mesh.devices.flat}
    if len(processes) != jax.process_count():
        raise ValueError(
            f"the mesh of a pipeline must have devices of all {jax.process_count()} processes, got "
            f"devices of {sorted(processes)} only"
        )


def _check_rules(rules: ShardingRules, mesh: Mesh) -> None:
    """Layers are split over stages, and nothing else is."""
    if any(mesh.shape[name] > 1 for name in as_tuple(rules.layers) if name != "stage"):
        raise ValueError(f"a pipeline splits layers over 'stage', rules.layers is {rules.layers!r}")
    for name in LOGICAL_AXES + SPLITS:
        value = getattr(rules, name)
        if name != "layers" and "stage" in as_tuple(value):
            raise ValueError(
                f"a pipeline splits layers over 'stage' and nothing else, rules.{name} is {value!r}"
            )


def _check_layers(sizes: tuple[int, ...] | None, num_stages: int, num_layers: int) -> None:
    """Every stage has a layer, and every layer a stage."""
    if num_stages > num_layers:
        raise ValueError(f"{num_stages} stages need as many layers, the config has {num_layers}")
    if sizes is None:
        return
    if not isinstance(sizes, tuple):  # anything else could not be hashed
        raise ValueError(f"layers_per_stage must be a tuple, got {sizes!r}")
    check_positive(**{f"layers_per_stage[{i}]": size for i, size in enumerate(sizes)})
    if len(sizes) != num_stages or sum(sizes) != num_layers:
        raise ValueError(
            f"layers_per_stage={sizes} must have {num_stages} stages and {num_layers} layers, it "
            f"has {len(sizes)} and {sum(sizes)}"
        )


def _holds_params(x: Any) -> bool:
    """A dict shaped like the parameters of the model or of a stage, whatever its leaves."""
    return isinstance(x, dict) and bool(TOP_LEVEL & x.keys())


def _also_over_stages(rules: ShardingRules) -> ShardingRules:
    """Rules that split what ZeRO splits over `stage` as well."""
    split = ("embed", "latent", "gradient_split", "optimizer_split")
    axes = {name: getattr(rules, name) for name in split}
    more = {
        name: (*as_tuple(value), "stage")
        for name, value in axes.items()
        if value is not None or not name.endswith("_split")
    }
    return dataclasses.replace(rules, **more)
