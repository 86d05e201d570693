"""`jax-mla generate` on a small byte-level model: options, streaming, several prompts."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from weights import random_params

import jax_mla
from jax_mla.cli.main import main
from jax_mla.text.tokenizer import ByteTokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = dataclasses.replace(
        jax_mla.tiny(), hidden_size=32, intermediate_size=32, num_hidden_layers=2, vocab_size=272,
        num_attention_heads=2,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("model") / "small"
    jax_mla.save(path, random_params(config), config)
    return path


@pytest.fixture
def generate(folder, capsys):
    def run(*words: str) -> str:
        argv = ["generate", "--model", str(folder), "--max-new-tokens", "12", *words]
        assert main(argv) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return run


def test_text_is_what_the_library_generates(folder, generate):
    params, config = jax_mla.load(folder)
    tokenizer = ByteTokenizer()
    tokens = jnp.array([tokenizer.encode("Moses")], jnp.int32)
    out = jax_mla.generate(params, config, tokens, max_new_tokens=12)
    text = tokenizer.decode(np.asarray(out.tokens)[0, : int(out.lengths[0])].tolist())
    assert generate("--prompt", "Moses") == f"Moses{text}\n"


def test_streamed_text_is_the_text(generate):
    assert generate("--prompt", "Moses", "--stream") == generate("--prompt", "Moses")


def test_prompts_of_a_batch_do_not_depend_on_each_other(generate):
    both = json.loads(generate("--prompt", "Moses", "--prompt", "A", "--json"))["completions"]
    for one in both:
        alone = json.loads(generate("--prompt", one["prompt"], "--json"))["completions"]
        assert alone == [one]


def test_a_mesh_writes_the_same_text(generate):
    words = ["--prompt", "Moses", "--prompt", "A", "--json"]
    alone = json.loads(generate(*words))["completions"]
    layout = ["--mesh", "data=2,tensor=2", "--rules", "tensor_parallel"]
    assert json.loads(generate(*words, *layout))["completions"] == alone


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--rules ddp", "--rules ddp shards over a mesh and needs --mesh"),
        ("--mesh data=2", "cannot be split over 2 devices of mesh axis 'data'"),
        ("--mesh tensor=3", "cannot be split over 3 devices of mesh axis 'tensor'"),
        (
            "--max-new-tokens 4095",
            "a prompt of 2 tokens and 4095 new ones are more than the 4096 positions that",
        ),
    ],
    ids=["rules", "prompts", "weights", "positions"],
)
def test_what_does_not_fit_is_one_line(words, message, folder, capsys):
    argv = ["generate", "--model", str(folder), "--prompt", "a", *words.split()]
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1


def test_json_schema(generate):
    found = json.loads(generate("--prompt", "Möse", "--json"))
    assert set(found) == {"completions", "seconds", "tokens_per_second"}
    (one,) = found["completions"]
    assert found["tokens_per_second"] * found["seconds"] == pytest.approx(one["num_tokens"])
    assert set(one) == {"prompt", "text", "num_prompt_tokens", "num_tokens"}
    assert one["num_prompt_tokens"] == 6  # bos, and two bytes for ö
    assert 1 <= one["num_tokens"] <= 12


def test_no_text_is_a_prompt_if_the_tokenizer_begins_one(folder, generate, monkeypatch, capsys):
    (one,) = json.loads(generate("--prompt", "", "--json"))["completions"]
    assert one["num_prompt_tokens"] == 1
    monkeypatch.setattr(ByteTokenizer, "encode", lambda self, text: [*text.encode()])
    assert main(["generate", "--model", str(folder), "--prompt", ""]) == 2
    assert capsys.readouterr().err == "error: the prompt '' has no tokens\n"


def test_seed_decides_what_is_sampled(generate):
    texts = [generate("--prompt", "A", "--temperature", "3", "--seed", seed) for seed in "112"]
    assert texts[0] == texts[1] != texts[2]


def test_streaming_two_prompts_is_refused(folder, capsys):
    argv = ["generate", "--model", str(folder), "--prompt", "a", "--prompt", "b", "--stream"]
    assert main(argv) == 2
    assert capsys.readouterr() == ("", "error: streaming takes one prompt, got 2\n")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--top-p", "1.5"),
        ("--temperature", "-1"),
        ("--min-p", "-0.1"),
        ("--seed", "9" * 23),
        ("--seed", "-1"),
    ],
)
def test_option_out_of_range_is_one_line(option, value, folder, capsys):
    argv = [
        "generate",
        "--model",
        str(folder),
        "--prompt",
        "a",
        "--temperature",
        "1",
        option,
        value,
    ]
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and value in err and err.count("\n") == 1
