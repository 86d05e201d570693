#!/usr/bin/env bash
# Everything that needs a GPU, from a checkout and without a network.
#
#   benchmarks/gpu_check.sh              everything; writes $OUT/gpu_check.md and figures as json
#   benchmarks/gpu_check.sh GROUP...     only these; writes $OUT/gpu_check_GROUP.md
#       tests       a case a kernel, stopping at the first failure; then all gpu tests
#       bench       figures of every kernel at a few shapes, comparisons with peers
#       sanitizer   compute-sanitizer's memcheck and racecheck on small cases
#       --seconds N     the time of all stages together, 530: for machines that give ten minutes
#       --dry-run       on any machine: parses every command and lists what it would run
#
# Every stage has a limit. Those of one group fit into 530 s together; those of all do not, so what
# is worth most comes first: that each kernel works, its first figures, all tests, then comparisons
# over more shapes, then the sanitizer. What finds too little time left is reported as FAILED, with
# the command that gives it more.
#
# OUT (benchmarks/results) and PYTHON (python3) may be set. Wheels of peers and of pytest's plugins
# in benchmarks/peers/wheels/ are used where they load (peers/README.md). After a stage that fails
# the next one runs; the exit code is 1 if any did. What this machine does not have or does not
# support is reported as "did not run".
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
out=${OUT:-benchmarks/results} python=${PYTHON:-python3}
is_dry=false seconds=530 chosen=()
usage() {
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2
    exit 2
}
while (($#)); do
    case $1 in
        --dry-run) is_dry=true ;;
        --seconds) [[ ${2-} =~ ^[0-9]+$ ]] && seconds=$2 && shift || usage ;;
        tests | bench | sanitizer) chosen+=("$1") ;;
        *) usage ;;
    esac
    shift
done
title=gpu_check
for group in ${chosen[@]+"${chosen[@]}"}; do title+=_$group; done
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$out" "$work/site"
report=$out/$title.md summary=$work/summary details=$work/details
: >"$summary" >"$details"
deadline=$((SECONDS + seconds)) status=0 group='' planned=0
export PYTHONPATH=$PWD:$PWD/tests:$work/site${PYTHONPATH:+:$PYTHONPATH}
export XLA_PYTHON_CLIENT_PREALLOCATE=false PYTHONUNBUFFERED=1

# Whether the stages of a group are wanted, which follow.
wants() {
    group=$1
    ((${#chosen[@]} == 0)) || [[ " ${chosen[*]} " == *" $1 "* ]]
}

# stage NAME SECONDS COMMAND: runs a command within its own time and within what is left of all.
stage() {
    local name=$1 wanted=$2 limit=$2 begin=$SECONDS result code refused
    shift 2
    ((limit > deadline - SECONDS)) && limit=$((deadline - SECONDS))
    echo "== $name (at most $limit s): $*"
    if ((limit <= 0)); then
        code=none && : >"$work/log"
    else
        # As ^C, at which pytest still counts what has passed.
        timeout -s INT -k 10 "$limit" "$@" >"$work/log" 2>&1
        code=$?
    fi
    # Of compute-sanitizer, on a device or a driver that it does not know.
    refused=$(grep -m 1 -iE '^=+ .*device not supported' "$work/log") && code=refused
    case $code in
        0) result=passed ;;
        none) result="FAILED: no time was left" ;;
        refused) result="did not run: ${refused##*= }" ;;
        124 | 137) result="FAILED: out of time after $limit s" ;;
        *) result="FAILED: exit code $code" ;;
    esac
    [[ $result == FAILED* ]] && status=1
    [[ $result == FAILED*time* ]] && ((limit < wanted)) &&
        result+=" of $wanted (gpu_check.sh${group:+ $group}, or --seconds, gives more)"
    tail -n 40 "$work/log"
    echo "-- $name: $result, $((SECONDS - begin)) s"
    echo "| $name | $result | $((SECONDS - begin)) |" >>"$summary"
    printf '\n## %s\n\n`%s`\n\n```\n%s\n```\n' "$name" "$*" "$(tail -n 400 "$work/log")" >>"$details"
    write_report
}

# The whole report after every stage, so that what is cut short leaves what it has.
write_report() {
    printf '# GPU check\n\n%s\n\n| stage | result | seconds |\n| --- | --- | --- |\n%s\n%s\n' \
        "\`benchmarks/gpu_check.sh${chosen[*]+ ${chosen[*]}}\` on $(date -u +%Y-%m-%d), $seconds s at most." \
        "$(cat "$summary")" "$(cat "$details")" >"$report"
}

# As `stage`, for --dry-run: the command with options that let it stop after parsing.
check() {
    local name=$1 limit=$2
    planned=$((planned + limit))
    shift 2
    if "$@" >"$work/log" 2>&1; then
        echo "ok      $name (at most $limit s): $*"
    else
        echo "BROKEN  $name: $*" && tail -n 5 "$work/log" && status=1
    fi
}

if $is_dry; then run=check list=(--list) collect=(--collect-only)
else run=stage list=() collect=(); fi

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

$run environment 40 bash -c environment

peers=benchmarks/peers bench=("$python" -m pallas_kernels.bench)
# The reference's matmuls are many shapes, run a few times each: choosing the best is not worth it.
# A run that is cut off has printed its failures; an older pytest than ours is good enough here.
tests=(env XLA_FLAGS=--xla_gpu_autotune_level=0 "$python" -m pytest -m gpu -q -W default
    -o minversion=8 -p no:cacheprovider --tb=short --failures-at-once)
# A kernel that waits for a barrier that nobody arrives at would take the time of all others.
"$python" -c 'import pytest_timeout' 2>/dev/null && tests+=(--timeout=60 --timeout-method=thread)
all_tests=("${tests[@]}" tests/pallas_kernels)
# Most of their time is compilation, on the host.
"$python" -c 'import xdist' 2>/dev/null && all_tests+=(-n $(($(nproc) > 12 ? 12 : $(nproc))))
first_tests=("${tests[@]}" -x
    'tests/pallas_kernels/gpu/test_mla_decode_gpu.py::test_flash_mla_matrix[B2-T2-N64-causal-512+64-page64-bfloat16]'
    'tests/pallas_kernels/test_flash_attention_sm90.py::test_small_cases_on_a_gpu[B1-T133-S133-N1-G1-K64-H64-causal-deterministic-sms132-bfloat16]'
    'tests/pallas_kernels/test_flash_attention_sm90.py::test_small_cases_on_a_gpu[B1-T133-S133-N1-G1-K64-H64-causal-sms1-bfloat16]')

if wants tests; then
    $run "gpu tests, a case a kernel" 90 "${first_tests[@]}" "${collect[@]}"
fi
if wants bench; then
    $run "MLA decode, first figures" 60 "${bench[@]}" mla_decode --smoke \
        --json "$out/mla_decode.json" "${list[@]}"
    $run "flash attention, first figures" 90 "$python" $peers/flash_attention_peers.py --smoke \
        --json "$out/flash_attention.json" "${list[@]}"
    $run "MLA decode against peers" 75 "$python" $peers/mla_decode_peers.py \
        --json "$out/mla_decode_peers.json" "${list[@]}" \
        --only 'T1-N(16|64|128)-S(4096|16384)-b|T2-N128-S(4096|16384)(-ragged)?-b|listed'
fi
if wants tests; then
    $run "gpu tests" 400 "${all_tests[@]}" "${collect[@]}"
fi
if wants bench; then
    $run "flash attention against peers" 220 "$python" $peers/flash_attention_peers.py \
        --json "$out/flash_attention_peers.json" "${list[@]}" \
        --only 'causal-B4-S4096-N16|full-B1-S16384-N16|packed|T2048'
    $run "grouped matmul, first figures" 30 "${bench[@]}" grouped_matmul --smoke \
        --json "$out/grouped_matmul.json" "${list[@]}"
fi

# Memory that JAX's allocator pools is one block to memcheck: every array needs its own.
sanitize() {
    local cases=tests/pallas_kernels/gpu/sanitizer_cases.py limit=200 sanitizer only tool
    sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
    if [[ -z $sanitizer ]]; then
        echo "sanitizer: compute-sanitizer is not on this machine"
        echo "| sanitizer | did not run: compute-sanitizer is not on this machine | 0 |" >>"$summary"
        $is_dry && check "sanitizer cases" $((2 * limit)) "$python" $cases --list
        return
    fi
    # Other kernels, of XLA, are left alone; the option has had two names.
    only=$("$sanitizer" --help 2>/dev/null | grep -oE -m1 -e '--kernel-(name|regex)' | head -n 1)
    only=${only:+$only kns=mosaic_gpu_kernel}
    for tool in memcheck racecheck; do
        # shellcheck disable=SC2086
        $run "sanitizer $tool" $limit env XLA_PYTHON_CLIENT_ALLOCATOR=platform "$sanitizer" \
            --tool $tool $only --error-exitcode 9 "$python" $cases "${list[@]}"
    done
}
if wants sanitizer; then sanitize; fi

if $is_dry; then
    rmdir "$out" 2>/dev/null
    echo "all of this takes at most $planned s, and is stopped after $seconds s"
else
    write_report
    echo && cat "$summary" && echo "report: $report"
fi
exit $status
