"""What a model is made of: the fields of a published config.json, checked and frozen."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import jax_mla.config.hf as hf
from jax_mla.config.families import FAMILIES
from jax_mla.config.fields import DTYPE_BYTES as DTYPE_BYTES
from jax_mla.config.fields import (
    DTYPES,
    Count,
    Flag,
    PositiveFloat,
    PositiveNumber,
    Size,
    TokenId,
    TokenIds,
    checks_of,
    dtype_name,
    floats_of,
    is_number,
    one_of,
)
from jax_mla.config.rope import RopeScaling, yarn_mscale

TopkMethod = Literal["greedy", "group_limited_greedy", "noaux_tc"]
ScoringFunc = Literal["softmax", "sigmoid"]
ModelType = Annotated[str, one_of(tuple(FAMILIES))]
DType = Annotated[str, one_of(DTYPES)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepSeekConfig:
    """A DeepSeek-family architecture; field names are the checkpoints' own. Hashable.

    New parameters and caches have `dtype`, stored as a name: jnp.bfloat16 as "bfloat16". Layers
    before `first_k_dense_replace` are dense, the rest are mixtures of experts; dense models
    (`youtu`, `minicpm3`) have `n_routed_experts=None`. `eos_token_id` is a tuple: generation stops
    at any of its ids.

    Raises:
      ValueError: sizes disagree; the message names both with their values.
    """

    model_type: ModelType = "deepseek_v3"
    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Size
    num_attention_heads: Size

    q_lora_rank: Size | None
    kv_lora_rank: Size
    qk_nope_head_dim: Size
    qk_rope_head_dim: Size
    v_head_dim: Size
    attention_bias: Flag = False

    moe_intermediate_size: Size | None = None
    n_routed_experts: Size | None = None
    n_shared_experts: Count | None = None
    num_experts_per_tok: Size | None = None
    first_k_dense_replace: Count = 0
    n_group: Size | None = None
    topk_group: Size | None = None
    topk_method: TopkMethod = "noaux_tc"
    scoring_func: ScoringFunc = "sigmoid"
    norm_topk_prob: Flag = True
    routed_scaling_factor: PositiveFloat = 1.0

    rms_norm_eps: PositiveFloat = 1e-6
    rope_theta: PositiveFloat = 10000.0
    rope_interleave: Flag = True
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: Size = 4096

    scale_emb: PositiveFloat = 1.0
    scale_depth: PositiveFloat | None = None
    dim_model_base: PositiveNumber | None = None

    tie_word_embeddings: Flag = False
    num_nextn_predict_layers: Count = 0
    initializer_range: PositiveFloat = 0.02
    bos_token_id: TokenId | None = None
    eos_token_id: TokenIds = ()
    pad_token_id: TokenId | None = None
    dtype: DType = "float32"

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        for name, check in _CHECKS.items():
            check(name, getattr(self, name))
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim must be even, got {self.qk_rope_head_dim}")
        if self.rope_scaling is not None:
            self._check_rope(self.rope_scaling)
        if self.num_moe_layers:
            self._check_experts()

    def _check_rope(self, scaling: RopeScaling) -> None:
        if scaling.rope_type == "yarn" and self.rope_theta <= 1:
            raise ValueError(f"yarn needs a rope_theta above 1, got {self.rope_theta}")
        half = self.qk_rope_head_dim // 2
        for name in ("short_factor", "long_factor"):
            factors = getattr(scaling, name)
            if factors is not None and len(factors) != half:
                raise ValueError(
                    f"longrope {name} has {len(factors)} entries, expected "
                    f"qk_rope_head_dim / 2 = {half}"
                )

    def _check_experts(self) -> None:
        experts, active, _ = self.moe_sizes
        groups, kept = self.n_group or 1, self.topk_group or 1
        if experts % groups:
            raise ValueError(f"n_routed_experts={experts} is not a multiple of n_group={groups}")
        if kept > groups:
            raise ValueError(f"topk_group={kept} exceeds n_group={groups}")
        available = experts if self.topk_method == "greedy" else kept * (experts // groups)
        if active > available:
            raise ValueError(
                f"num_experts_per_tok={active} exceeds the {available} experts that "
                f"topk_group={kept} of n_group={groups} leaves of n_routed_experts={experts}"
            )

    @property
    def qk_head_dim(self) -> int:
        """P + R, the width of one query head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cache_row_dim(self) -> int:
        """X = C + R, the numbers cached for one token and layer."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def num_dense_layers(self) -> int:
        if self.n_routed_experts is None:
            return self.num_hidden_layers
        return min(self.first_k_dense_replace, self.num_hidden_layers)

    @property
    def num_moe_layers(self) -> int:
        return self.num_hidden_layers - self.num_dense_layers

    @property
    def moe_sizes(self) -> tuple[int, int, int]:
        """E, A and F of the mixture of experts.

        Raises:
          ValueError: the model is dense.
        """
        experts, active = self.n_routed_experts, self.num_experts_per_tok
        width = self.moe_intermediate_size
        if experts is None or active is None or width is None:
            raise ValueError(
                "a mixture of experts needs n_routed_experts, num_experts_per_tok and "
                f"moe_intermediate_size, got {experts}, {active} and {width}"
            )
        return experts, active, width

    @property
    def softmax_scale(self) -> float:
        """(P + R) ** -0.5, times YaRN's mscale squared when `mscale_all_dim` is set."""
        scale = self.qk_head_dim**-0.5
        if (rope := self.rope_scaling) is not None and rope.mscale_all_dim:
            scale *= yarn_mscale(rope.factor, rope.mscale_all_dim) ** 2
        return scale

    @property
    def residual_scale(self) -> float:
        """What a branch is multiplied by before it joins the residual stream (MiniCPM3)."""
        return 1.0 if self.scale_depth is None else self.scale_depth / self.num_hidden_layers**0.5

    @property
    def logits_divisor(self) -> float:
        """What the last hidden state is divided by before the head (MiniCPM3)."""
        return 1.0 if self.dim_model_base is None else self.hidden_size / self.dim_model_base

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], *, dtype: str | None = None) -> DeepSeekConfig:
        """Reads the dict of a published config.json, in its old or new spelling of rope.

        Keys that are not known to change the computation are ignored, with a note in the log of
        "jax_mla".

        Args:
          dtype: replaces what the file says, for instance "auto".

        Raises:
          ValueError: the architecture is unknown or has a part that this library does not compute,
            or two names of one field disagree; the message names the fields and their values.
        """
        fields = hf.read(config, dtype_name(dtype))
        for name in _FLOATS & fields.keys():
            if type(fields[name]) is int and is_number(fields[name]):
                fields[name] = float(fields[name])
        return cls(**fields)

    def to_hf(self) -> dict[str, Any]:
        """The dict to write as config.json.

        `from_hf` reads it back to an equal config, with three exceptions: no expert groups come
        back as one group; a model without experts has the defaults of all fields of experts; and
        what a family fixes (deepseek_v2 with rope_interleave=False) comes back as fixed, or is
        refused. `save` refuses the last.
        """
        return hf.write(dataclasses.asdict(self))


_CHECKS = checks_of(DeepSeekConfig)
_FLOATS = floats_of(DeepSeekConfig)


def check_config(config) -> None:
    if not isinstance(config, DeepSeekConfig):
        raise ValueError(f"config must be a DeepSeekConfig, got {type(config).__name__}")
