"""Steps as arrays."""

import dataclasses

import numpy as np

import jax_mla
from jax_mla.serving import batch
from jax_mla.serving.request import Request, RequestOptions
from jax_mla.serving.scheduler import Row

SAMPLING = jax_mla.SamplingOptions(temperature=0.5, top_k=7, min_p=0.25)


def request(**options) -> Request:
    options = RequestOptions(**options)
    r = Request([4, 5, 6], max_new_tokens=9, sampling=SAMPLING, options=options, stop_ids=(3, 8))
    r.slot, r.table = 2, [11, 7]
    return r


def columns(work) -> dict[str, list[int]]:
    return dict(zip(batch.INTEGERS, work[:, : len(batch.INTEGERS)].T.tolist(), strict=True))


def test_a_chunk():
    rows = [Row(request(seed=2**32 - 1), 1, 2, True)]
    work = batch.pack(rows, batch=2, num_tokens=4, table_width=3, num_slots=5)
    assert work.dtype == np.int32
    assert columns(work) == {
        "slot": [2, 5], "start": [1, 0], "count": [2, 0], "is_last": [1, 0], "seed": [-1, 0],
        "position": [0, 0], "top_k": [7, 0],
    }  # fmt: skip
    assert work[:, 7:11].tolist() == [[5, 6, 0, 0], [0, 0, 0, 0]]
    assert work[:, 11:].tolist() == [[11, 7, -1], [-1, -1, -1]]


def test_a_token_that_is_not_read_back_is_taken_from_the_device():
    r = request()
    rows = [Row(r, 3, 1, True)]
    assert batch.pack(rows, batch=1, num_tokens=1, table_width=2, num_slots=5)[0, 7] == -1
    r.ids.append(9)
    work = batch.pack(rows, batch=1, num_tokens=1, table_width=2, num_slots=5)
    assert work[0, 7] == 9 and columns(work)["position"] == [1]


def test_options_that_are_off():
    plain = Request([1], max_new_tokens=1, sampling=jax_mla.SamplingOptions())
    options = batch.pack_options([request(presence_penalty=0.5), plain], 3)
    np.testing.assert_array_equal(
        options, [[0.5, 1, 0.25, 1, 0.5, 0], [0, 1, 0, 1, 0, 0], [0, 0, 0, 1, 0, 0]]
    )


def test_every_sampling_option_reaches_the_device():
    """A new field without a column would be ignored in silence."""
    columns = {*batch.INTEGERS, *batch.NUMBERS}
    assert {field.name for field in dataclasses.fields(jax_mla.SamplingOptions)} <= columns


def test_min_tokens_hold_back_the_stop_ids():
    r = request(min_tokens=1, logit_bias={8: 2.0, 1: -1.0})
    ids, values = batch.pack_biases([Row(r, 0, 3, True), Row(r, 3, 1, True)], 3, 50)
    found = [
        dict(zip(*row, strict=True)) for row in zip(ids.tolist(), values.tolist(), strict=True)
    ]
    assert found == [{8: -np.inf, 1: -1.0, 3: -np.inf, 50: 0}, {8: 2.0, 1: -1.0, 50: 0}, {50: 0}]
