"""Selection of an implementation: first that can, named or refused with the reason."""

import importlib
import inspect
from typing import get_args, get_type_hints

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels
from pallas_kernels import dispatch
from pallas_kernels.dispatch import Implementation

KERNEL = Implementation(
    "mosaic_gpu",
    run=lambda x, *, bias: x + bias,
    why_not=lambda x, *, bias: None if x.shape[0] % 64 == 0 else "needs a multiple of 64 rows",
)
XLA = Implementation("xla", run=lambda x, *, bias: x - bias)
TABLE = (KERNEL, XLA)


@pytest.mark.parametrize(("rows", "name"), [(64, "mosaic_gpu"), (63, "xla")])
def test_none_chooses_the_first_that_can(rows, name):
    chosen = dispatch.select("op", TABLE, None, jnp.zeros(rows), bias=1)
    assert chosen.name == name


@pytest.mark.parametrize("name", ["mosaic_gpu", "xla"])
def test_a_name_is_obeyed(name):
    assert dispatch.select("op", TABLE, name, jnp.zeros(64), bias=1).name == name


def test_a_name_that_cannot_run_is_refused_with_the_reason():
    with pytest.raises(
        NotImplementedError,
        match="op: implementation 'mosaic_gpu' cannot run here: needs a multiple of 64 rows",
    ):
        dispatch.select("op", TABLE, "mosaic_gpu", jnp.zeros(63), bias=1)


def test_a_documented_name_without_a_kernel_is_refused_with_the_reason():
    with pytest.raises(NotImplementedError, match="this version has no mosaic_gpu kernel for op"):
        dispatch.select("op", (XLA,), "mosaic_gpu", jnp.zeros(64), bias=1)


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(
        ValueError, match=r"must be one of \['mosaic_gpu', 'xla'\] or None, got 'cuda'"
    ):
        dispatch.select("op", TABLE, "cuda", jnp.zeros(64), bias=1)


def test_call_runs_what_was_selected_and_names_it_in_the_trace():
    def run(x):
        return dispatch.call("op", TABLE, None, x, bias=1)

    for rows, value, name in ((64, 1, "op.mosaic_gpu"), (63, -1, "op.xla")):
        assert (jax.jit(run)(jnp.zeros(rows)) == value).all()
        assert name in jax.jit(run).lower(jnp.zeros(rows)).as_text(debug_info=True)


def test_an_error_of_a_kernel_is_not_hidden_by_the_next():
    def broken(x):
        raise RuntimeError("a bug")

    table = (Implementation("mosaic_gpu", run=broken), Implementation("xla", run=lambda x: x))
    with pytest.raises(RuntimeError, match="a bug"):
        dispatch.call("op", table, None, jnp.zeros(1))


def test_explain_lists_every_documented_name():
    assert dispatch.explain("op", TABLE, jax.ShapeDtypeStruct((63,), jnp.float32), bias=1) == [
        ("mosaic_gpu", "needs a multiple of 64 rows"),
        ("xla", None),
    ]
    assert dispatch.explain("op", (XLA,), jnp.zeros(64), bias=1) == [
        ("mosaic_gpu", "this version has no mosaic_gpu kernel for op yet"),
        ("xla", None),
    ]


@pytest.mark.parametrize("op", ["mla_decode", "flash_attention", "grouped_matmul"])
def test_every_op_ends_with_xla_and_documents_the_same_names(op):
    function = getattr(pallas_kernels, op)
    table = inspect.getmodule(function).IMPLEMENTATIONS
    assert table[-1].name == "xla" and table[-1].why_not() is None
    literal, _ = get_args(get_type_hints(function)["implementation"])
    assert get_args(literal) == dispatch.NAMES == get_args(dispatch.Name)
    assert [one.name for one in table] == [
        n for n in dispatch.NAMES if n in {o.name for o in table}
    ]


@pytest.mark.parametrize("op", ["mla_decode", "flash_attention", "grouped_matmul"])
def test_no_name_stands_for_two_implementations(op):
    """`select` and `explain` look at the first entry of a name only."""
    table = importlib.import_module(f"pallas_kernels.{op}.api").IMPLEMENTATIONS
    names = [one.name for one in table]
    assert sorted(names, key=dispatch.NAMES.index) == names
    assert len({*names}) == len(names)
    assert names[-1] == "xla"
