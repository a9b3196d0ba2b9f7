#!/usr/bin/env bash
# Everything a GPU machine can tell of this package, in one command and under nine minutes, without a network:
#
#     bash bench/gpu_check.sh OUT [--wheels DIR] [--tune] [--only STAGE,STAGE]
#
# Needs Linux, Python with PyTorch, Triton, ninja, pytest and a C++ compiler; nvcc and compute-sanitizer are used
# where they are. Builds the extension in place, runs the tests on the card, measures the quick suite, and looks for
# bad memory accesses and races. --wheels: peers to measure beside ours, installed from the wheels in DIR into a
# folder of this run's own. --tune: times other tiles too and writes a proposed table (bench/tune.py); nothing in the
# tree is changed. Both take of the time of what comes behind them. --only: these stages alone, of build, backends,
# wheels, tests, suite, page, tune, cuda-build, hopper, memcheck, racecheck, more-tests, machine-code: for what a first
# call had no time for.
#
# OUT gets at most eight files: stages.txt (a line each), log.txt (what they said), cuda-quick.json, .md, .png,
# cuda-quick-roofline.png, tiles.md. The table is printed last. A stage that fails or runs out of time is said so, and
# the rest goes on; the exit status is then 1. Without a GPU the kernels are compiled ahead of time for sm_80 and
# sm_90a and what their machine code is made of goes to machine-code.md; what needs a card is labelled as not run.
# PYTHON names the interpreter: .venv/bin/python where there is one, else python3. BUDGET_S: seconds for all, 520.
set -uo pipefail

usage() {
  echo "usage: bash bench/gpu_check.sh OUT [--wheels DIR] [--tune] [--only STAGE,STAGE]" >&2
  exit 2
}

out="" wheels="" tune="" only=""
while [ $# -gt 0 ]; do
  case $1 in
    --wheels) [ -d "${2:-}" ] || { echo "--wheels: expected a folder, got '${2:-}'" >&2; exit 2; }
              wheels=$(cd "$2" && pwd); shift 2 ;;
    --tune) tune=1; shift ;;
    --only) [ -n "${2:-}" ] || usage; only=",$2,"; shift 2 ;;
    -*) usage ;;
    *) [ -z "$out" ] || usage; out=$1; shift ;;
  esac
done
[ -n "$out" ] || usage
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 MAX_JOBS=${MAX_JOBS:-$(nproc)}
budget_s=${BUDGET_S:-520} failed=0
work=$(mktemp -d) || exit 2
trap 'rm -rf "$work"' EXIT
: > "$out/stages.txt"
: > "$out/log.txt"

say() { echo "$*" | tee -a "$out/stages.txt"; }

wanted() { [ -z "$only" ] || [[ $only == *",$1,"* ]]; }

not_run() { ! wanted "$1" || say "$1: NOT RUN, $2"; }

# left LIMIT_S: that, or what is left of the budget where it is less.
left() { echo $((budget_s - SECONDS < $1 ? budget_s - SECONDS : $1)); }

# stage NAME LIMIT_S COMMAND...: what it says goes to log.txt, its verdict to stages.txt.
stage() {
  local name=$1 limit from start=$SECONDS status verdict
  limit=$(left "$2")
  shift 2
  wanted "$name" || return 0
  if [ "$limit" -lt 10 ]; then say "$name: NOT RUN, no time left"; failed=1; return 1; fi
  echo "== $name: $*" >> "$out/log.txt"
  from=$(wc -c < "$out/log.txt")
  timeout --kill-after=8 "$limit" "$@" >> "$out/log.txt" 2>&1
  status=$?
  case $status in
    0) verdict=ok ;;
    124 | 137) verdict="FAILED, out of time ($limit s)" failed=1 ;;
    *) verdict="FAILED, status $status" failed=1 ;;
  esac
  say "$name: $verdict, $((SECONDS - start)) s: $(tail -c "+$((from + 1))" "$out/log.txt" | grep -v '^[[:space:]]*$' | tail -n 1 | cut -c1-150)"
  return "$status"
}

# All wheels at once; where one of them does not fit this machine, each by itself.
# shellcheck disable=SC2317,SC2012  # called by name below
install_wheels() {
  local pip=("$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile
             --find-links "$wheels" --target "$work/site") count=0 total=0
  "${pip[@]}" "$wheels"/*.whl && { echo "all of $(ls "$wheels"/*.whl | wc -l) wheels installed"; return 0; }
  rm -rf "$work/site"
  for wheel in "$wheels"/*.whl; do
    total=$((total + 1))
    if "${pip[@]}" "$wheel"; then count=$((count + 1)); else echo "left out: $(basename "$wheel")"; fi
  done
  echo "$count of $total wheels installed"
  [ "$count" -gt 0 ]
}

# A tool of compute-sanitizer over every kernel. Some virtual machines do not let it near the device.
sanitizer() {
  local name=$1 limit
  wanted "$name" || return 0
  if ! command -v compute-sanitizer > /dev/null; then not_run "$name" "compute-sanitizer not found"; return; fi
  if [ ! -e "$work/probe" ]; then
    timeout --kill-after=5 40 compute-sanitizer "$python" -c 'import torch; torch.zeros(1, device="cuda").cpu()' > "$work/probe" 2>&1
  fi
  if grep -qi "not supported" "$work/probe"; then
    not_run "$name" "compute-sanitizer: $(grep -i 'not supported' "$work/probe" | head -n 1 | cut -c1-100)"
    return
  fi
  limit=$(left "$2")
  if [ "$limit" -lt 45 ]; then say "$name: NOT RUN, no time left"; failed=1; return; fi
  stage "$name" "$limit" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$name" --error-exitcode 9 \
    "$python" -m bench.sanitize --seconds $((limit - 30))
}

say "gpu_check of $(git rev-parse --short HEAD 2> /dev/null || echo 'no commit'), $(date -u +%Y-%m-%dT%H:%MZ), $(uname -srm)"
say "$("$python" -c 'import sys, torch, triton; print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, Triton {triton.__version__}")' 2>&1 | tail -n 1)"
say "GPU: $(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2> /dev/null || echo none)"
if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2> /dev/null; then gpu=1; else gpu=""; fi

stage build 150 "$python" setup.py build_ext --inplace
stage backends 60 "$python" -m gssf_kernels
if [ -n "$wheels" ] && wanted wheels; then
  export -f install_wheels
  export python wheels work
  stage wheels 60 bash -c install_wheels
  [ -d "$work/site" ] && export PYTHONPATH=$PYTHONPATH:$work/site
fi
if [ -n "$gpu" ]; then
  # Compilation takes most of the tests' time, and side by side it takes less of it.
  parallel=$("$python" -c 'import os, xdist; print(f"-n {min(8, len(os.sched_getaffinity(0)))}")' 2> /dev/null)
  # shellcheck disable=SC2086
  stage tests 200 "$python" -m pytest -q --durations=8 -p no:cacheprovider $parallel -k "not cpu and not nothing_waits" \
    tests/test_cuda.py tests/test_capture.py tests/test_mining_triton.py tests/test_pairs_triton.py tests/test_project_triton.py \
    tests/test_certified_triton.py tests/test_dense_triton.py tests/test_values.py
  stage suite 180 "$python" -m bench suite quick --device cuda --out "$out/cuda-quick.json"
  if [ -s "$out/cuda-quick.json" ]; then
    stage page 40 "$python" -m bench report "$out/cuda-quick.json"
  else
    not_run page "the suite measured nothing"
  fi
  [ -z "$tune" ] || stage tune 170 "$python" -m bench.tune --out "$out/tiles.md" --seconds $(($(left 170) - 30))
  if command -v nvcc > /dev/null; then
    if stage cuda-build 120 env FORCE_CUDA=1 "$python" setup.py build_ext --inplace; then
      stage hopper 60 "$python" -m pytest -q -p no:cacheprovider tests/test_hopper.py
    else
      not_run hopper "csrc/cuda was not built"
    fi
  else
    not_run hopper "nvcc not found"
  fi
  sanitizer memcheck 75
  sanitizer racecheck 75
  # shellcheck disable=SC2086
  stage more-tests 150 "$python" -m pytest -q --durations=8 -p no:cacheprovider $parallel -k "not cpu and not nothing_waits" \
    tests/test_small_triton.py tests/test_few_triton.py tests/test_small_relations_triton.py \
    tests/test_relative_goal_triton.py tests/test_slabs_triton.py tests/test_persistent.py
  [ -z "$only" ] || stage machine-code 400 "$python" -m bench.lowering --out "$out/machine-code.md"
else
  stage machine-code 400 "$python" -m bench.lowering --out "$out/machine-code.md"
  for name in tests suite hopper memcheck racecheck more-tests ${tune:+tune}; do not_run "$name" "PyTorch sees no CUDA device"; done
fi

echo
if [ -n "$gpu" ]; then
  cat "$out/cuda-quick.md" 2> /dev/null || echo "no table: the suite measured nothing"
  [ ! -s "$out/tiles.md" ] || cat "$out/tiles.md"
else
  echo "Compiled ahead of time, not run:"
  cat "$out/machine-code.md" 2> /dev/null
fi
echo
cat "$out/stages.txt"
exit "$failed"
