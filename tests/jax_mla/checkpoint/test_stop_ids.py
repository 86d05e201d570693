"""The ids at which generation stops: generation_config.json wins, and save keeps them."""

import json

import numpy as np
import pytest

import jax_mla
from jax_mla.checkpoint.folder import open_folder, read_model_config


@pytest.fixture
def folder(edited):
    """A folder whose config.json says 1, with a generation_config.json if it is given one."""

    def make(generation=None):
        made = edited("v3", eos_token_id=1)
        if generation is not None:
            (made / "generation_config.json").write_text(json.dumps(generation))
        return made

    return make


@pytest.mark.parametrize(
    ("generation", "want"),
    [
        (None, (1,)),
        ({}, (1,)),
        ({"eos_token_id": None}, (1,)),
        ({"eos_token_id": []}, (1,)),
        ({"eos_token_id": 7}, (7,)),
        ({"eos_token_id": [7, 9]}, (7, 9)),
        ({"eos_token_id": [1, 7], "temperature": 0.6}, (1, 7)),
    ],
    ids=str,
)
def test_generation_config_says_where_to_stop(folder, tmp_path, generation, want):
    made = folder(generation)
    params, config = jax_mla.load(made)
    assert config.eos_token_id == want
    assert read_model_config(made) == open_folder(made).model_config() == config
    jax_mla.save(tmp_path / "out", params, config)
    assert jax_mla.load(tmp_path / "out")[1] == config
    for file in ("config.json", "generation_config.json"):
        written = json.loads((tmp_path / "out" / file).read_text())["eos_token_id"]
        assert written == (list(want) if len(want) > 1 else want[0])


def test_generate_stops_there(folder):
    plain = folder()
    prompt = np.arange(2, 10)[None]
    out = jax_mla.generate(*jax_mla.load(plain), prompt, max_new_tokens=12, eos_token_ids=())
    fifth = int(out.tokens[0, 4])
    first = out.tokens[0].tolist().index(fifth)
    (plain / "generation_config.json").write_text(json.dumps({"eos_token_id": [fifth]}))
    stopped = jax_mla.generate(*jax_mla.load(plain), prompt, max_new_tokens=12)
    assert stopped.lengths.tolist() == [first + 1]


@pytest.mark.parametrize("wrong", ["x", 1.5, [1, None], {"a": 1}])
def test_refuses_what_is_no_id(folder, wrong):
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id must be a token"):
        jax_mla.load(folder({"eos_token_id": wrong}))


def test_refuses_what_is_no_json(folder):
    made = folder()
    (made / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"generation_config\.json is not JSON"):
        jax_mla.load(made)
