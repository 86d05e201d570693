"""Checkpoints of a run: whole or absent, and never restored when damaged."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.dynamic_scale import DynamicScale
from jax.sharding import NamedSharding, PartitionSpec
from numerics import assert_same_bits

import jax_mla
from jax_mla.training import Checkpoints, TrainState, saved_steps
from jax_mla.training.manifest import NAME, find_damage, write_manifest


def make_state(step, size=16):
    params = {
        "layers": {"w": jnp.arange(size * 8, dtype=jnp.float32).reshape(size, 8) + step},
        "norm": jnp.full(4, step, jnp.bfloat16),
    }
    scale = DynamicScale(fin_steps=jnp.int32(step), scale=jnp.float32(2.0 ** (step % 64)))
    optimizer = optax.adam(1e-3)
    return TrainState(params, optimizer.init(params), jnp.int32(step), jnp.int32(2), scale)


def like(state, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state)


@pytest.fixture
def two_steps(tmp_path):
    """A folder with steps 1 and 2."""
    with Checkpoints(tmp_path) as store:
        for step in (1, 2):
            store.save(make_state(step), {"step": step})
        yield store


def test_what_is_restored_is_what_was_saved(two_steps):
    restored = two_steps.restore(like(make_state(0)))
    assert_same_bits(restored.state, make_state(2))
    assert restored.record == {"step": 2} and restored.damaged == ()


def test_the_newest_are_kept_and_nothing_else_is_left(tmp_path):
    (tmp_path / ".step_00000009.partial").mkdir()  # a run was killed here
    (tmp_path / ".step_00000009.partial" / "record.json").write_text("{")
    with Checkpoints(tmp_path, keep=2, in_background=True) as store:
        for step in (1, 2, 10, 123456789):
            store.save(make_state(step), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000010", "step_123456789"]
    assert store.steps() == [10, 123456789]


def test_a_background_save_does_not_see_later_steps(tmp_path):
    """The next step overwrites the arrays while they are written."""
    state = make_state(0, size=300_000)
    wanted = jax.tree.map(lambda x: np.array(x, copy=True), state)
    advance = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    with Checkpoints(tmp_path, in_background=True) as store:
        store.save(state, {})
        for _ in range(3):
            state = advance(state)
        jax.block_until_ready(state)
        assert_same_bits(store.restore(like(wanted)).state, wanted)


def test_a_step_saved_again_replaces_the_old_one(two_steps):
    changed = dataclasses.replace(make_state(2), num_skipped=jnp.int32(7))
    two_steps.save(changed, {"second": True})
    restored = two_steps.restore(like(changed))
    assert restored.state.num_skipped == 7 and restored.record == {"second": True}


def test_no_flipped_bit_is_restored(two_steps, rng):
    """100 single bits anywhere in the newest step, its manifest included."""
    newest = two_steps.folder / "step_00000002"
    files = sorted(path for path in newest.rglob("*") if path.is_file() and path.stat().st_size)
    assert {"record.json", NAME} < {path.name for path in files}
    target = like(make_state(0))
    for _ in range(100):
        path = files[rng.integers(len(files))]
        whole = path.read_bytes()
        at, bit = rng.integers(len(whole)), rng.integers(8)
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
        restored = two_steps.restore(target)
        assert restored.record == {"step": 1}, f"bit {bit} of byte {at} of {path} went unseen"
        assert len(restored.damaged) == 1 and str(newest) in restored.damaged[0]
        path.write_bytes(whole)
    assert two_steps.restore(target).record == {"step": 2}


def truncate(folder):
    path = next(path for path in (folder / "arrays" / "d").iterdir())
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, r"arrays/d/\w+ has \d+ bytes, .* instead of \d+ bytes, .*"),
        (lambda folder: (folder / "record.json").unlink(), "record.json is missing"),
        (lambda folder: (folder / NAME).unlink(), "manifest.json is missing"),
        (lambda folder: (folder / NAME).write_text("[1]"), "manifest.json is damaged"),
        (lambda folder: (folder / "extra").write_text(""), "extra is not listed"),
        (
            lambda folder: (folder / "record.json").write_text('{\n "step": 3\n}\n'),
            r"record.json has 15 bytes, sha256 \w{64} instead of 15 bytes, sha256 \w{64}",
        ),
    ],
    ids=["truncated", "missing", "no manifest", "no list", "extra", "changed"],
)
def test_damage_is_named_and_passed_over(two_steps, damage, reason):
    damage(two_steps.folder / "step_00000002")
    restored = two_steps.restore(like(make_state(0)))
    assert_same_bits(restored.state, make_state(1))
    assert re.fullmatch(f".*step_00000002 is damaged: {reason}", restored.damaged[0])


def test_an_empty_folder_is_no_step(two_steps):
    (two_steps.folder / "step_00000099").mkdir()
    restored = two_steps.restore(like(make_state(0)))
    assert restored.record == {"step": 2} and "manifest.json is missing" in restored.damaged[0]


def test_when_all_are_damaged_nothing_is_restored(two_steps):
    for step in (1, 2):
        (two_steps.folder / f"step_0000000{step}" / NAME).unlink()
    with pytest.raises(ValueError, match=r"no step can be restored.*00002 is.*00001 is damaged"):
        two_steps.restore(like(make_state(0)))


def test_nothing_saved_is_said(tmp_path):
    with Checkpoints(tmp_path / "none") as store:
        assert store.steps() == []
        with pytest.raises(FileNotFoundError, match="none holds no whole steps"):
            store.restore(like(make_state(0)))


def test_another_mesh_takes_it_over(tmp_path):
    def on(mesh, *axes):
        return NamedSharding(mesh, PartitionSpec(*axes))

    eight, four = jax_mla.make_mesh(data=8), jax_mla.make_mesh(data=2, tensor=2)
    state = make_state(3)
    spread = jax.device_put(
        state, jax.tree.map(lambda x: on(eight, "data") if x.ndim == 2 else on(eight), state)
    )
    wanted = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=on(four, "tensor", "data") if x.ndim == 2 else on(four)
        ),
        state,
    )
    with Checkpoints(tmp_path) as store:
        store.save(spread, {})
        restored = store.restore(wanted).state
        assert_same_bits(restored, state)
        assert restored.params["layers"]["w"].sharding == on(four, "tensor", "data")
        assert_same_bits(store.restore(like(state)).state, state)  # and on a single device


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p | {"norm": jnp.zeros(5, jnp.bfloat16)}, r"\[4\], expected bfloat16 \[5\]"),
        (lambda p: p | {"norm": jnp.zeros(4)}, r"is bfloat16 \[4\], expected float32 \[4\]"),
        (lambda p: p | {"more": jnp.zeros(4)}, r"00002 does not hold params.more, which"),
        (
            lambda p: {"norm": p["norm"]},
            r"00002 holds params.layers.w, which this run's state does not have",
        ),
    ],
    ids=["shape", "dtype", "missing", "left over"],
)
def test_other_arrays_are_refused(two_steps, change, message):
    state = make_state(0)
    state = dataclasses.replace(state, params=change(state.params))
    with pytest.raises(ValueError, match=message):
        two_steps.restore(like(state))


def test_an_error_in_the_background_is_raised_by_the_next_call(tmp_path, monkeypatch):
    def full(folder):
        raise OSError(28, "No space left on device", str(folder))

    monkeypatch.setattr(saved_steps, "write_manifest", full)
    with Checkpoints(tmp_path, in_background=True) as store:
        store.save(make_state(1), {})
        with pytest.raises(OSError, match="No space left"):
            store.save(make_state(2), {})
        assert store.steps() == []


def test_a_manifest_lists_every_file(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").write_bytes(b"abc")
    write_manifest(tmp_path)
    assert find_damage(tmp_path) is None
    assert json.loads((tmp_path / NAME).read_text()) == {
        "a/b/c": "3 bytes, sha256 ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    }


def test_keeping_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="keep must be at least 1, got 0"):
        Checkpoints(tmp_path, keep=0)
