"""The expanded and the absorbed form of latent attention, and which is cheaper."""

from __future__ import annotations

from typing import cast, get_args

from jax_mla.checks.sizes import check_one_of
from jax_mla.config.model import DeepSeekConfig
from jax_mla.phases import Form

# Operations that a GPU does in the time it moves one byte (an H200: 790 TFLOP/s over 4.3 TB/s).
FLOP_PER_BYTE = 184


def check_form(form: str | None) -> Form | None:
    """`form`, a ValueError if there is none of that name."""
    check_one_of("form", form, (*get_args(Form), None))
    return cast(Form | None, form)


def resolve_form(
    form: str | None, config: DeepSeekConfig, num_queries: int, num_cached: int
) -> Form:
    """`form` itself, or the cheaper one when None.

    Raises:
      ValueError: there is no form of that name.
    """
    return check_form(form) or choose_form(config, num_queries, num_cached)


def choose_form(config: DeepSeekConfig, num_queries: int, num_cached: int) -> Form:
    """The cheaper way to attend `num_queries` new tokens to themselves and `num_cached` older ones.

    Expanding makes keys and values of every token, absorbing folds those weights into queries and
    outputs, so that attention runs on the latents themselves. With S = cached + T tokens and
    pairs = T (cached + T / 2), two steps each:

        expanded  make keys, values  2 S N C (P + H) operations, S N (P + R + H) numbers written
                  attend             2 pairs N (P + R + H),      as many read
        absorbed  fold the weights   2 T N C (P + H)
                  attend             2 pairs N (2 C + R),        S (C + R) numbers read

    A step costs its operations or its 2-byte numbers, whichever takes a GPU longer. For V3's sizes
    the forms break even near T = 170 over a long cache: decoding absorbs, prefill expands.

    Source: DeepSeek-V2, arXiv 2405.04434, section 2.1 and appendix C.
    """
    N, C, R = config.num_attention_heads, config.kv_lora_rank, config.qk_rope_head_dim
    P, H, T, S = config.qk_nope_head_dim, config.v_head_dim, num_queries, num_cached + num_queries
    pairs = T * (num_cached + T / 2)
    weights = 2 * N * C * (P + H)

    def step(operations, numbers):
        return max(operations, FLOP_PER_BYTE * 2 * numbers)

    keys_values = S * N * (P + R + H)
    expanded = step(S * weights, keys_values) + step(2 * pairs * N * (P + R + H), keys_values)
    absorbed = T * weights + step(2 * pairs * N * (2 * C + R), S * (C + R))
    return "expanded" if expanded < absorbed else "absorbed"
