"""Prompts in, continuations out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jax_mla.checks.sizes import check_positive
from jax_mla.config.model import DeepSeekConfig
from jax_mla.text.stream import TextStream, continuation_text
from jax_mla.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from jax_mla.params import Params
    from jax_mla.sharding.rules import ShardingRules


@dataclasses.dataclass(frozen=True)
class Completion:
    """A prompt and its continuation.

    Attributes:
      text: of the new tokens alone; the prompt's text and this are the text of the whole.
      prompt_tokens: ids of the prompt.
      tokens: ids that were generated, the end token included.
    """

    prompt: str
    text: str
    prompt_tokens: list[int]
    tokens: list[int]


def complete(
    params: Params,
    config: DeepSeekConfig,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    key: Any = None,
    eos_token_ids: int | tuple[int, ...] | None = None,
    rules: ShardingRules | None = None,
    stream: Callable[[str], None] | None = None,
) -> list[Completion]:
    """Continues `prompts` as one batch, by `jax_mla.generate`, whose options these are.

    Args:
      tokenizer: of the model, as `load_tokenizer` returns it.
      stream: called with each new part of the text of the only prompt while it is generated.

    Raises:
      ValueError: prompts is one string, or a prompt has no tokens, is not UTF-8, or leaves too few
        of the model's positions for the new tokens; `stream` comes with several prompts; or an
        option is out of range, as in `jax_mla.generate`.
    """
    # Here, so that tokenizers can be used without jax.
    from jax_mla.generation import generate

    check_positive(max_new_tokens=max_new_tokens)
    if isinstance(prompts, str):
        raise ValueError(f"prompts must be a list of strings, got the string {prompts!r}")
    if not prompts:
        raise ValueError("prompts must hold at least one prompt, got none")
    if stream is not None and len(prompts) != 1:
        raise ValueError(f"streaming takes one prompt, got {len(prompts)}")
    ids = [_encoded(tokenizer, prompt) for prompt in prompts]
    lengths = np.array([len(row) for row in ids], np.int32)
    tokens = np.zeros((len(ids), lengths.max()), np.int32)
    for row, values in zip(tokens, ids, strict=True):
        row[: len(values)] = values
    text = TextStream(tokenizer, ids[0])

    def show(step: np.ndarray) -> None:
        if stream is not None and (piece := text.feed(int(step[0]))):
            stream(piece)

    out = generate(
        params,
        config,
        tokens,
        lengths=lengths,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        key=key,
        eos_token_ids=eos_token_ids,
        rules=rules,
        stream=None if stream is None else show,
    )
    if stream is not None and (piece := text.end()):
        stream(piece)
    new = zip(np.asarray(out.tokens), np.asarray(out.lengths), strict=True)
    new_ids = [row[:length].tolist() for row, length in new]
    return [
        Completion(prompt, continuation_text(tokenizer, before, after), before, after)
        for prompt, before, after in zip(prompts, ids, new_ids, strict=True)
    ]


def _encoded(tokenizer: Tokenizer, prompt: str) -> list[int]:
    if any("\ud800" <= letter <= "\udfff" for letter in prompt):
        raise ValueError(f"the prompt {prompt!r} is not UTF-8")
    ids = tokenizer.encode(prompt)
    if not ids:
        raise ValueError(f"the prompt {prompt!r} has no tokens")
    return ids
