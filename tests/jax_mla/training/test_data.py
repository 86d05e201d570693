"""Rows of tokens: all of them once an epoch, each batch a function of its number."""

import dataclasses

import numpy as np
import pytest

import jax_mla
from jax_mla.text.tokenizer import ByteTokenizer
from jax_mla.training import TokenRows, read_tokens


def rows(runs, **options):
    return TokenRows(runs, **{"batch_rows": 2, "row_tokens": 5, "vocab_size": 1000} | options)


def test_every_token_but_the_first_is_predicted_once_an_epoch():
    """Two files whose rows do not fill them: 25 tokens are 6 rows, 12 are 2 and 3 left over."""
    runs = [np.arange(25, dtype=np.uint16), np.arange(100, 112, dtype=np.uint32)]
    data = rows(runs)
    assert (data.num_rows, data.num_tokens, data.batch_tokens) == (8, 32, 10)
    epoch = np.concatenate([data.batch(i).tokens for i in range(4)])
    assert epoch.dtype == np.int32 and (np.diff(epoch, axis=1) == 1).all()
    assert sorted(epoch[:, 1:].ravel()) == [*range(1, 25), *range(101, 109)]


def test_a_batch_depends_on_seed_and_number_alone():
    runs = [np.arange(401, dtype=np.uint16)]
    first, again = (rows(runs, seed=3) for _ in range(2))
    order = [first.batch(i).tokens for i in range(100)]
    for i in (99, 0, 50, 49):
        assert (again.batch(i).tokens == order[i]).all()
    epochs = np.stack(order)[:, :, 0].reshape(2, 100)
    assert (epochs[0] != epochs[1]).any() and (np.sort(epochs[0]) == np.sort(epochs[1])).all()
    assert (rows(runs, seed=4).batch(0).tokens != order[0]).any()


def test_a_batch_may_straddle_epochs():
    data = rows([np.arange(13, dtype=np.uint16)])  # 3 rows in batches of 2
    starts = np.concatenate([data.batch(i).tokens[:, 0] for i in range(3)])
    assert sorted(starts[:3]) == sorted(starts[3:]) == [0, 4, 8]


def test_documents_can_be_separated():
    run = np.array([1, 2, 9, 3, 9, 9, 4, 5, 6], np.uint16)
    batch = rows([run], row_tokens=9, batch_rows=1, separator=9).batch(0)
    assert batch.segment_ids.tolist() == [[0, 0, 0, 1, 1, 2, 3, 3, 3]]
    assert rows([run]).batch(0).segment_ids is None


def test_other_data_have_another_fingerprint():
    run = np.arange(50, dtype=np.uint16)
    one = rows([run]).fingerprint()
    assert rows([run.copy()]).fingerprint() == one
    changed = run.copy()
    changed[-1] = 7
    others = rows([changed]), rows([run], seed=1), rows([run[:-1]]), rows([run], row_tokens=4)
    assert all(other.fingerprint() != one for other in others)


def test_files_of_text_and_tokens(tmp_path):
    config = jax_mla.tiny()
    (tmp_path / "a.txt").write_text("hé", encoding="utf-8")
    got = read_tokens(tmp_path / "a.txt", config, ByteTokenizer())
    assert got.tolist() == [256, *"hé".encode(), 257]
    np.save(tmp_path / "b.npy", np.arange(6, dtype=np.uint16))
    mapped = read_tokens(tmp_path / "b.npy", config, None)
    assert isinstance(mapped, np.memmap) and mapped.tolist() == [0, 1, 2, 3, 4, 5]


def bad_files(folder):
    np.save(folder / "floats.npy", np.zeros(4))
    np.save(folder / "rows.npy", np.zeros((2, 3), np.uint16))
    np.save(folder / "pickle.npy", np.array([{}]), allow_pickle=True)
    (folder / "empty.npy").write_bytes(b"")
    (folder / "latin.txt").write_bytes(b"\xff\xe9")
    (folder / "plain.txt").write_text("text")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.txt", "none.txt is not a file"),
        ("floats.npy", r"holds float64 of shape \(4,\), tokens are one axis of uint16 or uint32"),
        ("rows.npy", r"holds uint16 of shape \(2, 3\)"),
        ("pickle.npy", "is not a .npy file of tokens"),
        ("empty.npy", "is not a .npy file of tokens"),
        ("latin.txt", "is neither UTF-8 text nor a .npy file"),
        ("plain.txt", "is text, which needs a tokenizer"),
    ],
)
def test_bad_files_are_refused(tmp_path, name, message):
    bad_files(tmp_path)
    tokenizer = None if name == "plain.txt" else ByteTokenizer()
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_tokens(tmp_path / name, jax_mla.tiny(), tokenizer)


def test_bad_sizes_are_refused():
    runs = [np.arange(4, dtype=np.uint16), np.arange(3, dtype=np.uint16)]
    with pytest.raises(ValueError, match="the longest file has 4 tokens, a row needs 5"):
        rows(runs)
    with pytest.raises(ValueError, match="at least 1 row of 2 tokens, got 2 rows of 1"):
        rows(runs, row_tokens=1)
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        rows([np.arange(9)], seed=-1)
    data = dataclasses.replace(rows([np.arange(9, dtype=np.uint16)]), vocab_size=5)
    with pytest.raises(ValueError, match="token id 8 is outside the vocabulary of 5"):
        data.batch(0)
    with pytest.raises(ValueError, match="token id 4294967296 is outside the vocabulary of 1000"):
        rows([np.arange(9) + 2**32]).batch(0)  # which 32 bits would hold as 0 to 8


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([np.ones(9)], "token ids, which are integers, got float64 of shape \\(9,\\)"),
        ([[1, 2, 3, 4, 5]], "must be a list of arrays of one axis, got list of shape \\(5,\\)"),
        (np.arange(9), "must be a list of arrays of one axis, got int64 of shape \\(9,\\)"),
        ([np.ones((3, 3), int)], "arrays of one axis, got int64 of shape \\(3, 3\\)"),
    ],
    ids=["floats", "list", "one_array", "two_axes"],
)
def test_what_are_no_runs_of_tokens_is_refused(runs, message):
    with pytest.raises(ValueError, match=message):
        rows(runs)


def test_a_negative_id_is_refused():
    with pytest.raises(ValueError, match="token id -1 is outside the vocabulary of 1000"):
        rows([np.array([1, 2, -1, 3, 4])]).batch(0)
