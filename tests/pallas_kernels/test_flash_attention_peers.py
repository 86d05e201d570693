"""What flash attention is compared with: that peers are asked for the same attention."""

import importlib.util
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as fused
from kernel_tools.aot import lower_for_cuda

from pallas_kernels import bench, flash_attention, timing
from pallas_kernels.flash_attention import workloads
from pallas_kernels.flash_attention.workloads import WORKLOADS, Workload

PATH = Path(__file__).parents[2] / "benchmarks/peers/flash_attention_peers.py"
SPEC = importlib.util.spec_from_file_location("flash_attention_peers", PATH)
assert SPEC is not None and SPEC.loader is not None
peers = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(peers)

DIRECTIONS = pytest.mark.parametrize("is_backward", [False, True], ids=["forward", "backward"])


def packed(K, H, **options):
    return Workload(B=2, S=40, N=2, G=2, K=K, H=H, num_documents=3, **options)


def peer(monkeypatch, workload, name):
    """A peer's function, as on a machine with an H200 and the library."""
    with monkeypatch.context() as patch:
        patch.setattr(jax, "default_backend", lambda: "gpu")
        return peers.peers(workload)[name](workload)


def stand_in(q, k, v, *, q_seqlen, kv_seqlen, q_offsets=None, kv_offsets=None, scale, mask_type):
    """cuDNN's attention, after its documentation: a row or a segment has its own lengths."""
    assert kv_seqlen is q_seqlen and kv_offsets is q_offsets
    lengths, ids = q_seqlen, None
    if q_offsets is not None:
        assert q_offsets.shape == (len(q), q_seqlen.shape[1] + 1)
        place, begins = jnp.arange(q.shape[1])[None, :, None], q_offsets[:, None, :-1]
        ids = jnp.argmax((place >= begins) & (place < begins + q_seqlen[:, None]), -1)
        lengths = None
    causal = mask_type is fused.MaskType.PADDING_CAUSAL
    assert causal or mask_type is fused.MaskType.PADDING
    options = {"causal": causal, "scale": scale, "segment_ids": ids, "lengths": lengths}
    return flash_attention(q, k, v, **options, implementation="xla")


@pytest.mark.parametrize(
    "name, K, is_backward, causal",
    [
        ("cudnn", 16, False, False),
        ("cudnn", 16, True, True),
        ("cudnn-rows", 24, False, True),
        ("cudnn-rows", 24, True, False),
    ],
    ids=["full", "causal-backward", "rows-causal", "rows-full-backward"],
)
def test_packed_documents_are_compared(monkeypatch, name, K, is_backward, causal):
    """Through the benchmark, which looks at the result first; a wrong scale has no time."""
    monkeypatch.setattr(timing, "SAMPLES", 1)
    monkeypatch.setattr(timing, "SAMPLE_SECONDS", 0)
    workload = packed(K, 16, is_backward=is_backward, causal=causal)
    monkeypatch.setattr(fused, "dot_product_attention", stand_in)
    right = peer(monkeypatch, workload, name)

    def too_steep(*arrays, scale, **options):
        return stand_in(*arrays, scale=1.5 * scale, **options)

    monkeypatch.setattr(fused, "dot_product_attention", too_steep)
    wrong = peer(monkeypatch, workload, name)
    both = {"right": lambda _: right, "wrong": lambda _: wrong}
    right, wrong = bench.measure("flash_attention", workload, [], both)
    assert right.us is not None and right.note == ""
    assert wrong.us is None and wrong.note.startswith("WRONG")


def test_peers_that_fail_or_are_absent_leave_the_other_figures(monkeypatch, tmp_path):
    def breaks(workload):
        def run(q, k, v):
            raise RuntimeError("out of luck")

        return run

    def absent(workload):
        raise NotImplementedError("is not installed")

    one = Workload(B=1, S=8, N=2, G=2, K=4, H=4, is_backward=True, dtype="float32")
    monkeypatch.setattr(workloads, "QUICK", [one])
    monkeypatch.setattr(peers, "peers", lambda workload: {"broken": breaks, "absent": absent})
    path = tmp_path / "figures.json"
    assert peers.main(["--quick", "--json", str(path)]) == 0
    rows = {row.pop("implementation"): row for row in json.loads(path.read_text())["results"]}
    assert list(rows) == ["mosaic_gpu", "broken", "absent", "xla"]
    assert rows["mosaic_gpu"]["note"].startswith("skipped: flash_attention: implementation")
    assert rows["broken"]["note"] == "FAILED: RuntimeError out of luck"
    assert rows["absent"]["note"] == "skipped: is not installed"
    assert rows["xla"]["us"] > 0 and rows["xla"]["note"] == ""


def test_rows_hold_a_document_each(rng):
    rows = peers.Rows(np.array([3, 1, 4]), lambda q, k, v, lengths: lengths)
    x = rng.standard_normal((2, 8, 5)).astype(np.float32)
    arranged = np.asarray(rows.arrange(x))
    assert arranged.shape == (6, 128, 5)
    np.testing.assert_array_equal(arranged[5, :4], x[1, 4:])
    np.testing.assert_array_equal(arranged[3], np.pad(x[1, :3], ((0, 125), (0, 0))))
    np.testing.assert_array_equal(rows.restore(arranged), x)
    np.testing.assert_array_equal(rows(arranged, None, None), [3, 1, 4] * 2)


@DIRECTIONS
@pytest.mark.parametrize("name, K", [("cudnn", 128), ("cudnn-rows", 192)], ids=["packed", "rows"])
def test_packed_documents_lower_for_cudnn(monkeypatch, name, K, is_backward):
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(fused, "is_cuda_compute_capability_equal", lambda capability: False)
    workload = packed(K, 128, is_backward=is_backward)
    implementation = peer(monkeypatch, workload, name)
    arrange = getattr(implementation, "arrange", lambda arrays: arrays)

    def run(*arrays):
        return workload.function(implementation)(*workload.prepare(arrays, implementation))

    text = lower_for_cuda(run, *jax.eval_shape(lambda: arrange(workload.arrays())))
    calls = re.findall(r'@(__cudnn\w*\$\w+)\(.*?backend_config = "(.*?)"(?:, |\})', text)
    assert [target for target, _ in calls][1:] == is_backward * ["__cudnn$fmhaSoftmaxBackward"]
    for _, written in calls:
        config = json.loads(written.replace("\\22", '"'))["cudnn_fmha_backend_config"]
        assert config["mask_type"] == "PADDING_CAUSAL"
        assert config["max_seg_per_batch"] == (3 if name == "cudnn" else 1)
        assert config["fmha_scale"] == pytest.approx(K**-0.5)


def test_places_of_packed_documents_in_memory(monkeypatch):
    """What JAX makes of them: tokens before each document, all sequences one after another."""
    workload, given = packed(16, 16), {}
    monkeypatch.setattr(fused, "dot_product_attention", lambda *x, **options: given.update(options))
    q, k, v, _ = workload.arrays()
    peer(monkeypatch, workload, "cudnn")(q, k, v)
    names = "q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets"
    q_sizes, _, q_places, k_places = fused._fix_seqlen_offsets(*(given[n] for n in names), q, k)
    sizes = np.tile(workload.document_lengths(), 2)
    np.testing.assert_array_equal(q_sizes.reshape(-1), sizes)
    for places in (q_places, k_places):
        np.testing.assert_array_equal(places.reshape(-1)[:7], np.cumsum([0, *sizes]) * 2 * 16)


def test_values_of_another_width_are_refused(monkeypatch):
    with pytest.raises(NotImplementedError, match="one list of places for keys of 24 and values"):
        peer(monkeypatch, packed(24, 16), "cudnn")


def test_every_workload_has_a_peer_or_a_reason(monkeypatch):
    for workload in WORKLOADS:
        for name in peers.peers(workload):
            try:
                assert callable(peer(monkeypatch, workload, name))
            except NotImplementedError as reason:
                assert str(reason)
    packed = [workload for workload in WORKLOADS if workload.num_documents > 1]
    assert {(w.K, w.is_backward) for w in packed} == {
        (K, backward) for K in (192, 128) for backward in (False, True)
    }
