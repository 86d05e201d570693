#!/usr/bin/env bash
# Everything that needs a GPU, in under nine minutes, from a checkout and without a network:
# figures of every kernel at a few shapes, the gpu tests, comparisons with peers, the sanitizer.
#
#   benchmarks/gpu_check.sh              writes $OUT/gpu_check.md and figures as json
#   benchmarks/gpu_check.sh --dry-run    on any machine: lists the stages and parses each command
#
# OUT (benchmarks/results) and PYTHON (python3) may be set. Wheels of peers in
# benchmarks/peers/wheels/ are used where they load (peers/README.md). A stage that fails or runs
# out of its time is reported and the next one runs; the exit code is 1 if any did.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
out=${OUT:-benchmarks/results} python=${PYTHON:-python3}
is_dry=false
case "${1:-}" in
    --dry-run) is_dry=true ;;
    "") ;;
    *) sed -n '2,12s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$out" "$work/site"
report=$out/gpu_check.md summary=$work/summary details=$work/details
: >"$summary" >"$details"
deadline=$((SECONDS + 530)) status=0
export PYTHONPATH=$PWD:$PWD/tests:$work/site${PYTHONPATH:+:$PYTHONPATH}
export XLA_PYTHON_CLIENT_PREALLOCATE=false PYTHONUNBUFFERED=1

# stage NAME SECONDS COMMAND: runs a command within its own time and within what is left of all.
stage() {
    local name=$1 limit=$2 begin=$SECONDS result code
    shift 2
    ((limit > deadline - SECONDS)) && limit=$((deadline - SECONDS))
    echo "== $name (at most $limit s): $*"
    if ((limit <= 0)); then
        code=124 && : >"$work/log"
    else
        timeout -k 5 "$limit" "$@" >"$work/log" 2>&1
        code=$?
    fi
    case $code in
        0) result=passed ;;
        124 | 137) result="FAILED: out of time after $limit s" status=1 ;;
        *) result="FAILED: exit code $code" status=1 ;;
    esac
    tail -n 40 "$work/log"
    echo "-- $name: $result, $((SECONDS - begin)) s"
    echo "| $name | $result | $((SECONDS - begin)) |" >>"$summary"
    printf '\n## %s\n\n`%s`\n\n```\n%s\n```\n' "$name" "$*" "$(tail -n 400 "$work/log")" >>"$details"
    write_report
}

# The whole report after every stage, so that what is cut short leaves what it has.
write_report() {
    printf '# GPU check\n\n%s\n\n| stage | result | seconds |\n| --- | --- | --- |\n%s\n%s\n' \
        "\`benchmarks/gpu_check.sh\` on $(date -u +%Y-%m-%d)." "$(cat "$summary")" \
        "$(cat "$details")" >"$report"
}

# As `stage`, for --dry-run: the command with options that let it stop after parsing.
check() {
    local name=$1 limit=$2
    shift 2
    if "$@" >"$work/log" 2>&1; then
        echo "ok      $name (at most $limit s): $*"
    else
        echo "BROKEN  $name: $*" && tail -n 5 "$work/log" && status=1
    fi
}

if $is_dry; then run=check parse=(--only '^no such workload$') collect=(--collect-only) list=(--list)
else run=stage parse=() collect=() list=(); fi

install_wheels() {
    local wheels=(benchmarks/peers/wheels/*.whl)
    [[ -e ${wheels[0]} ]] || { echo "no wheels: peers that need one are skipped"; return; }
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$work/site" \
        "${wheels[@]}" || echo "pip failed: peers that need a wheel are skipped"
}

environment() {
    install_wheels
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.max.sm,power.limit \
        --format=csv 2>&1
    uname -rm
    "$python" - <<'PYTHON'
import importlib.metadata, platform
print("Python", platform.python_version())
for name in ("jax", "jaxlib", "jax-cuda13-plugin", "flax", "numpy", "torch", "sgl-flash-mla", "tokamax"):
    try:
        print(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        print(name, "is not installed")
PYTHON
    echo "commit $(git rev-parse HEAD 2>/dev/null || echo unknown), sources" \
        "$(find pallas_kernels -name '*.py' -print0 | sort -z | xargs -0 cat | sha256sum | cut -c1-16)"
}
export -f environment install_wheels
export python work

bench=("$python" -m pallas_kernels.bench)
peers=benchmarks/peers
# The reference's matmuls are many shapes, run a few times each: choosing the best is not worth it.
tests=(env XLA_FLAGS=--xla_gpu_autotune_level=0 "$python" -m pytest tests/pallas_kernels -m gpu -q -W default -p no:cacheprovider)
# Most of their time is compilation, on the host.
"$python" -c 'import xdist' 2>/dev/null && tests+=(-n $(($(nproc) > 12 ? 12 : $(nproc))))
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
cases=tests/pallas_kernels/gpu/sanitizer_cases.py

$run environment 40 bash -c environment
$run "MLA decode, first figures" 60 "${bench[@]}" mla_decode --smoke --json "$out/mla_decode.json" "${parse[@]}"
$run "flash attention, first figures" 75 "$python" $peers/flash_attention_peers.py --smoke \
    --json "$out/flash_attention.json" "${parse[@]}"
$run "gpu tests" 220 "${tests[@]}" "${collect[@]}"
$run "MLA decode against peers" 75 "$python" $peers/mla_decode_peers.py --json "$out/mla_decode_peers.json" \
    --only 'T1-N(16|64|128)-S(4096|16384)-b|T2-N128-S(4096|16384)(-ragged)?-b|listed' "${parse[@]}"
if [[ -n $sanitizer ]]; then
    # Other kernels, of XLA, are left alone; the option has had two names.
    only=$("$sanitizer" --help 2>/dev/null | grep -oE -m1 -e '--kernel-(name|regex)' | head -n 1)
    only=${only:+$only kns=mosaic_gpu_kernel}
    for tool in memcheck racecheck; do
        # shellcheck disable=SC2086
        $run "sanitizer $tool" 60 "$sanitizer" --tool $tool $only --error-exitcode 9 "$python" $cases "${list[@]}"
    done
else
    echo "sanitizer: compute-sanitizer is not on this machine"
    echo "| sanitizer | did not run: compute-sanitizer is not on this machine | 0 |" >>"$summary"
    $is_dry && check "sanitizer cases" 60 "$python" $cases --list
fi
$run "flash attention against peers" 100 "$python" $peers/flash_attention_peers.py \
    --json "$out/flash_attention_peers.json" --only 'causal-B4-S4096-N16|full-B1-S16384-N16|packed' "${parse[@]}"
$run "grouped matmul, first figures" 30 "${bench[@]}" grouped_matmul --smoke \
    --json "$out/grouped_matmul.json" "${parse[@]}"

if $is_dry; then
    rmdir "$out" 2>/dev/null
else
    write_report
    echo && cat "$summary" && echo "report: $report"
fi
exit $status
