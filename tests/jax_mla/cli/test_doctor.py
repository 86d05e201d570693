"""`jax-mla doctor`: what it reports is what JAX and the ops themselves say."""

import json

import jax
import pytest

from jax_mla.cli import doctor
from jax_mla.cli.main import main


def test_json_schema(capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"versions", "devices", "ops", "advice"}
    assert found["versions"]["jax"] == jax.__version__
    assert len(found["devices"]) == jax.local_device_count()
    assert set(found["ops"]) == {"mla_decode", "flash_attention", "grouped_matmul"}


def test_exactly_one_implementation_of_each_op_is_chosen(capsys):
    main(["doctor", "--json"])
    for table in json.loads(capsys.readouterr().out)["ops"].values():
        assert [one["name"] for one in table] == ["mosaic_gpu", "xla"]
        chosen = [one for one in table if one["is_chosen"]]
        assert len(chosen) == 1 and chosen[0]["why_not"] is None
        assert all(
            one["why_not"] for one in table if jax.default_backend() == "cpu" and one not in chosen
        )


def test_text_says_why_not_and_what_to_install(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "mosaic_gpu" in out and "mla_decode" in out
    if jax.default_backend() == "cpu":
        assert doctor.INSTALL_GPU in out


@pytest.mark.parametrize("error", [RuntimeError("no CUDA\nlibrary"), AssertionError()])
def test_no_device_is_reported_not_hidden(error, monkeypatch, capsys):
    def fail():
        raise error

    monkeypatch.setattr(jax, "local_devices", fail)
    assert main(["doctor"]) == 1
    assert "jax finds no device: " in capsys.readouterr().out
