"""What a model is made of: the fields of a published config.json, checked and frozen."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from jax_mla.config.rope import RopeScaling, is_number, yarn_mscale

TopkMethod = Literal["greedy", "group_limited_greedy", "noaux_tc"]
ScoringFunc = Literal["softmax", "sigmoid"]
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
DTYPES = tuple(DTYPE_BYTES)  # that parameters and caches may have


def is_token_id(value: Any) -> bool:
    """An integer of 32 bits; published configs may say -1 for no padding."""
    return type(value) is int and -(2**31) <= value < 2**31


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepSeekConfig:
    """A DeepSeek-family architecture; field names are the checkpoints' own. Hashable.

    `dtype` is that of new parameters and caches. Layers before `first_k_dense_replace` are dense,
    the rest are mixtures of experts; dense models (`youtu`, `minicpm3`) have
    `n_routed_experts=None`. `eos_token_id` is a tuple: generation stops at any of its ids.

    Raises:
      ValueError: sizes disagree; the message names both with their values.
    """

    model_type: str = "deepseek_v3"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    attention_bias: bool = False

    moe_intermediate_size: int | None = None
    n_routed_experts: int | None = None
    n_shared_experts: int | None = None
    num_experts_per_tok: int | None = None
    first_k_dense_replace: int = 0
    n_group: int | None = None
    topk_group: int | None = None
    topk_method: TopkMethod = "noaux_tc"
    scoring_func: ScoringFunc = "sigmoid"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0

    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_interleave: bool = True
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 4096

    scale_emb: float = 1.0
    scale_depth: float | None = None
    dim_model_base: int | None = None

    tie_word_embeddings: bool = False
    num_nextn_predict_layers: int = 0
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is None and name in _MAY_BE_NONE:
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"{name} must be an integer, got {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("first_k_dense_replace", "num_nextn_predict_layers", "n_shared_experts"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 0):
                raise ValueError(f"{name} must be an integer of at least 0, got {value!r}")
        for name in _POSITIVE_FLOATS:
            value = getattr(self, name)
            if value is not None and not (is_number(value) and value > 0):
                raise ValueError(f"{name} must be a finite number above 0, got {value!r}")
        for name, choices in _CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"{name} {value!r} is not one of {', '.join(choices)}")
        for name in ("bos_token_id", "pad_token_id"):
            if (value := getattr(self, name)) is not None and not is_token_id(value):
                raise ValueError(f"{name} must be a token id or null, got {value!r}")
        eos = self.eos_token_id
        if not isinstance(eos, tuple) or not all(is_token_id(i) for i in eos):
            raise ValueError(f"eos_token_id must be a tuple of token ids, got {eos!r}")
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
    def from_hf(cls, config: Mapping[str, Any]) -> DeepSeekConfig:
        """Reads the dict of a published config.json, in its old or new spelling of rope.

        Raises:
          ValueError: the architecture is unknown or has a part that this library does not compute;
            the message names the field and its value.
        """
        from jax_mla.config.hf import read

        return read(config)

    def to_hf(self) -> dict[str, Any]:
        """The dict to write as config.json.

        `from_hf` reads it back to an equal config, with two exceptions: no expert groups come back
        as one group, and fields that a family fixes (deepseek_v2: norm_topk_prob=False) as fixed;
        `save` refuses the latter.
        """
        from jax_mla.config.hf import write

        return write(self)


_POSITIVE = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
    "moe_intermediate_size", "n_routed_experts", "num_experts_per_tok", "n_group", "topk_group",
    "max_position_embeddings",
)  # fmt: skip
_POSITIVE_FLOATS = (
    "rms_norm_eps", "rope_theta", "routed_scaling_factor", "scale_emb", "scale_depth",
    "dim_model_base", "initializer_range",
)  # fmt: skip
_CHOICES = {
    "model_type": (
        "deepseek_v2", "deepseek_v3", "kimi_k2", "youtu", "minicpm3", "glm4_moe_lite",
    ),
    "topk_method": ("greedy", "group_limited_greedy", "noaux_tc"),
    "scoring_func": ("softmax", "sigmoid"),
    "dtype": DTYPES,
}  # fmt: skip
_MAY_BE_NONE = {
    "q_lora_rank", "moe_intermediate_size", "n_routed_experts", "num_experts_per_tok", "n_group",
    "topk_group",
}  # fmt: skip


def check_config(config) -> None:
    if not isinstance(config, DeepSeekConfig):
        raise ValueError(f"config must be a DeepSeekConfig, got {type(config).__name__}")
