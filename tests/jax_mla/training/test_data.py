"""Rows of tokens: all of them once an epoch, each batch a function of its number."""

import dataclasses

import numpy as np
import pytest

import jax_mla
from jax_mla.text import ByteTokenizer
from jax_mla.training import TokenRows, next_token_loss, read_tokens


def rows(files, **options):
    return TokenRows(files, **{"batch_rows": 2, "row_tokens": 5, "vocab_size": 1000} | options)


def test_every_token_but_the_first_of_a_file_is_predicted_once_an_epoch():
    """Two files, 37 tokens: 9 rows of 4 new tokens each; the fourth holds the end of the first."""
    files = [np.arange(25, dtype=np.uint16), np.arange(100, 112, dtype=np.uint32)]
    data = rows(files, batch_rows=3)
    assert (data.num_rows, data.num_tokens, data.batch_tokens) == (9, 35, 15)
    batches = [data.batch(i) for i in range(3)]
    assert all(batch.tokens.dtype == np.int32 for batch in batches)
    assert predicted(batches) == [*range(1, 25), *range(101, 112)]


def predicted(batches) -> list[int]:
    """The tokens whose prediction from the one before is counted, in order."""
    found = []
    for batch in batches:
        is_same = batch.segment_ids[:, 1:] == batch.segment_ids[:, :-1]
        assert (np.diff(batch.tokens, axis=1)[is_same] == 1).all()
        found += batch.tokens[:, 1:][is_same].tolist()
    return sorted(found)


def test_files_shorter_than_a_row_share_rows():
    """The loss does not cross from one to the next, whatever their lengths; none is left out."""
    lengths = [1, 3, 0, 2, 7, 1, 1, 4, 9, 0, 5]
    files = [np.arange(n) + 100 * i for i, n in enumerate(lengths)]
    data = rows(files, batch_rows=1, row_tokens=9, vocab_size=1100)
    batches = [data.batch(i) for i in range(data.num_rows)]
    whole = np.concatenate(files)[: 8 * data.num_rows + 1]
    wanted = sorted(token for token in whole.tolist() if token % 100)
    assert predicted(batches) == wanted and data.num_tokens == len(wanted)
    assert data.total_tokens - len(whole) < 8


def test_one_file_has_no_segments():
    """So that the step is compiled once: all batches of some data have segment ids, or none."""
    one, two = rows([np.arange(50)]), rows([np.arange(40), np.arange(10)])
    assert all(one.batch(i).segment_ids is None for i in range(6))
    assert all(two.batch(i).segment_ids is not None for i in range(6))


def test_the_reported_case_of_many_short_files():
    """200 files of 25 tokens and one of 40,002: 45,002 tokens, of which less than a row is left."""
    files = [np.arange(25)] * 100 + [np.arange(40_002) % 900] + [np.arange(25)] * 100
    data = rows(files, batch_rows=4, row_tokens=64)
    assert data.total_tokens == 45_002 and data.num_rows == 45_001 // 63
    assert 45_002 - data.seen_tokens(1000) < 63
    held = np.concatenate([data.batch(i).tokens.ravel() for i in range(179)])
    assert set(held) == set(range(900))


def test_tokens_that_some_batches_hold_are_counted_once():
    files = [np.arange(30), np.arange(30, 101)]
    data = rows(files, row_tokens=6, seed=2)
    held = set()
    for index in range(15):
        assert data.seen_tokens(index) == len(held)
        held |= set(data.batch(index).tokens.ravel().tolist())
    assert data.seen_tokens(10) == data.seen_tokens(10**9) == len(held) == 101


def test_the_loss_of_packed_files_is_that_of_each_alone(config, params):
    files = [np.random.default_rng(i).integers(0, 256, n) for i, n in enumerate((6, 1, 6, 6))]
    batch = rows(files, batch_rows=1, row_tokens=19).batch(0)
    packed = next_token_loss(params, config, batch.tokens, segment_ids=batch.segment_ids)
    alone = [next_token_loss(params, config, file[None]) for file in files if len(file) > 1]
    total = sum(float(one.loss) * int(one.num_tokens) for one in alone)
    assert int(packed.num_tokens) == sum(int(one.num_tokens) for one in alone) == 15
    np.testing.assert_allclose(float(packed.loss), total / 15, rtol=1e-5)


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
    batch = rows([run[:5], run[5:]], row_tokens=9, batch_rows=1, separator=9).batch(0)
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
    (tmp_path / "dos.txt").write_bytes(b"a\r\nb\rc\n")
    got = read_tokens(tmp_path / "dos.txt", config, ByteTokenizer())
    assert bytes(got[1:-1].tolist()) == b"a\r\nb\rc\n"
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
    files = [np.arange(3, dtype=np.uint16), np.arange(1, dtype=np.uint16)]
    with pytest.raises(ValueError, match="a row needs 5 tokens, all files together have 4"):
        rows(files)
    with pytest.raises(ValueError, match="a row needs 5 tokens, all files together have 0"):
        rows([])
    with pytest.raises(ValueError, match="at least 1 row of 2 tokens, got 2 rows of 1"):
        rows(files, row_tokens=1)
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        rows([np.arange(9)], seed=-1)
    data = dataclasses.replace(rows([np.arange(9, dtype=np.uint16)]), vocab_size=5)
    with pytest.raises(ValueError, match="token id 8 is outside the vocabulary of 5"):
        data.batch(0)
    with pytest.raises(ValueError, match="token id 4294967296 is outside the vocabulary of 1000"):
        rows([np.arange(9) + 2**32]).batch(0)  # which 32 bits would hold as 0 to 8


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([np.ones(9)], "token ids, which are integers, got float64 of shape \\(9,\\)"),
        ([[1, 2, 3, 4, 5]], "must be a list of arrays of one axis, got list of shape \\(5,\\)"),
        (np.arange(9), "must be a list of arrays of one axis, got int64 of shape \\(9,\\)"),
        ([np.ones((3, 3), int)], "arrays of one axis, got int64 of shape \\(3, 3\\)"),
    ],
    ids=["floats", "list", "one_array", "two_axes"],
)
def test_files_that_hold_no_tokens_are_refused(files, message):
    with pytest.raises(ValueError, match=message):
        rows(files)


def test_a_negative_id_is_refused():
    with pytest.raises(ValueError, match="token id -1 is outside the vocabulary of 1000"):
        rows([np.array([1, 2, -1, 3, 4])]).batch(0)
