#!/usr/bin/env bash
# What a GPU machine tells of this package in one command, without a network: correctness first, in under seven minutes.
#
#     bash bench/gpu_check.sh OUT [--wheels DIR] [--lines LINE,LINE] [--compile] [--only STAGE,STAGE]
#
# Needs Linux, Python with PyTorch, Triton, ninja, pytest and a C++ compiler; pytest-xdist, pytest-timeout, nvcc and
# compute-sanitizer are used where they are. In this order:
#
#   build       the extension in place; one that is there and loads is kept (is it of these sources? that is not asked)
#   tests       pytest -m "gpu and not hopper" on all cores, 60 s a test
#   cuda-build  the extension with csrc/cuda; one that has it is kept
#   hopper      pytest -m hopper
#   memcheck    compute-sanitizer over every Triton kernel (bench/sanitize.py)
#   tune        other tiles for a few lines of tiles.SWEEP (bench/tune.py): a proposed table, nothing in the tree changes
#   suite       the quick suite and its page (page), where a minute is left
#
# --lines: of the table for `tune`, "all" for all. --wheels: peers to measure beside ours, installed from the wheels in
# DIR into a folder of this run's own. --compile: torch.compile's variants in the suite too. --only: these stages alone
# of the above, backends, wheels, racecheck and machine-code; the builds then build whatever is there.
#
# OUT gets at most eight files: stages.txt (a line each), log.txt (what they said), failures.txt (each failed test with
# its traceback, written as it fails), tiles.md, cuda-quick.json, .md, .png, cuda-quick-roofline.png. A stage that fails
# or runs out of time is said so, and the rest goes on; the exit status is then 1. Without a GPU the kernels are compiled
# ahead of time for sm_80 and sm_90a and what their machine code is made of goes to machine-code.md; what needs a card is
# labelled as not run.
# PYTHON names the interpreter: .venv/bin/python where there is one, else python3. BUDGET_S: seconds for all, 400.
set -uo pipefail

usage() {
  echo "usage: bash bench/gpu_check.sh OUT [--wheels DIR] [--lines LINE,LINE] [--compile] [--only STAGE,STAGE]" >&2
  exit 2
}

out="" wheels="" without=(--without compile) only=""
lines=half-narrow,tf32-narrow,tf32-wide,half-wide  # the persistent ones, and the one that spills where it is persistent
while [ $# -gt 0 ]; do
  case $1 in
    --wheels) [ -d "${2:-}" ] || { echo "--wheels: expected a folder, got '${2:-}'" >&2; exit 2; }
              wheels=$(cd "$2" && pwd); shift 2 ;;
    --lines) [ -n "${2:-}" ] || usage; lines=$2; shift 2 ;;
    --compile) without=(); shift ;;
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
cores=$(env -u OMP_NUM_THREADS nproc)  # which takes that for the number of cores
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 MAX_JOBS=${MAX_JOBS:-$cores}
budget_s=${BUDGET_S:-400} failed=0
work=$(mktemp -d) || exit 2
trap 'rm -rf "$work"' EXIT
for file in stages log failures; do : > "$out/$file.txt"; done
# Python asks at its start whether SIGINT is ignored, as it is in what a script runs in the background.
if env --default-signal=INT true 2> /dev/null; then listening=(env --default-signal=INT); else listening=(); fi

say() { echo "$*" | tee -a "$out/stages.txt"; }

wanted() { [ -z "$only" ] || [[ $only == *",$1,"* ]]; }

not_run() { ! wanted "$1" || say "$1: NOT RUN, $2"; }

# left LIMIT_S: that, or what is left of the budget where it is less.
left() { echo $((budget_s - SECONDS < $1 ? budget_s - SECONDS : $1)); }

# stage NAME LIMIT_S COMMAND...: what it says goes to log.txt, its verdict to stages.txt. Out of time, it is interrupted,
# so that it can say what it has, and killed 10 s later. With cut=1 that is no failure.
stage() {
  local name=$1 limit from start=$SECONDS status verdict
  limit=$(left "$2")
  shift 2
  wanted "$name" || return 0
  if [ "$limit" -lt 10 ]; then say "$name: NOT RUN, no time left"; failed=1; return 1; fi
  echo "== $name: $*" >> "$out/log.txt"
  from=$(wc -c < "$out/log.txt")
  timeout --signal=INT --kill-after=10 "$limit" "${listening[@]}" "$@" >> "$out/log.txt" 2>&1
  status=$?
  case $status in
    0) verdict=ok ;;
    124 | 137) if [ -n "${cut:-}" ]; then verdict="stopped, as time ran out"; else verdict="FAILED, out of time ($limit s)" failed=1; fi ;;
    *) verdict="FAILED, status $status" failed=1 ;;
  esac
  say "$name: $verdict, $((SECONDS - start)) s: $(tail -c "+$((from + 1))" "$out/log.txt" | grep -v '^[[:space:]]*$' | tail -n 1 | cut -c1-150)"
  return "$status"
}

# built WORD: whether the report of this installation has WORD loaded or built; asked only where no stage is named. (Not
# by grep -q, which leaves early: the report's broken pipe would fail it.)
built() { [ -z "$only" ] && "$python" -m gssf_kernels 2> /dev/null | grep -E "^$1 +(loaded|built)\$" > /dev/null; }

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

if built extension; then
  say "build: kept, the extension that is there loads"
else
  stage build 150 "$python" setup.py build_ext --inplace
fi
stage backends 60 "$python" -m gssf_kernels
if [ -n "$wheels" ] && wanted wheels; then
  export -f install_wheels
  export python wheels work
  stage wheels 60 bash -c install_wheels
  [ -d "$work/site" ] && export PYTHONPATH=$PYTHONPATH:$work/site
fi
if [ -n "$gpu" ]; then
  # Compilation takes most of the tests' time. Neighbours share kernels, and stay with one worker (worksteal). A test
  # that hangs in a kernel hears no signal: its worker is ended, and another goes on. Without workers that would be all.
  pytest=(env OMP_NUM_THREADS=1 "$python" -m pytest -q -rf --tb=short --durations=8 -p no:cacheprovider "--failures=$out/failures.txt")
  if "$python" -c 'import xdist' 2> /dev/null; then
    pytest+=(-n "$cores" --dist worksteal) by=thread
  else
    by=signal
  fi
  ! "$python" -c 'import pytest_timeout' 2> /dev/null || pytest+=(--timeout=60 "--timeout-method=$by")
  stage tests 190 "${pytest[@]}" -m "gpu and not hopper"
  if built csrc/cuda; then
    say "cuda-build: kept, the extension that is there has csrc/cuda"
    stage hopper 60 "${pytest[@]}" -m hopper
  elif ! command -v nvcc > /dev/null; then
    not_run hopper "nvcc not found"
  elif stage cuda-build 120 env FORCE_CUDA=1 "$python" setup.py build_ext --inplace; then
    stage hopper 60 "${pytest[@]}" -m hopper
  else
    not_run hopper "csrc/cuda was not built"
  fi
  sanitizer memcheck 80
  [ -z "$only" ] || sanitizer racecheck 150
  # What is left is for these two; the suite keeps what it has measured when it is interrupted.
  if [ -z "$only" ] && [ "$(left 100)" -lt 40 ]; then
    not_run tune "no time left"
  else
    stage tune 120 "$python" -m bench.tune --lines "$lines" --out "$out/tiles.md" --seconds $(($(left 120) - 20))
  fi
  if [ -z "$only" ] && [ "$(left 100)" -lt 60 ]; then
    not_run suite "no time left"
  else
    cut=1 stage suite $(($(left 270) - 30)) "$python" -m bench suite quick --device cuda "${without[@]}" --out "$out/cuda-quick.json"
    if [ -s "$out/cuda-quick.json" ]; then
      stage page 30 "$python" -m bench report "$out/cuda-quick.json"
    else
      not_run page "the suite measured nothing"
    fi
  fi
  [ -z "$only" ] || stage machine-code 400 "$python" -m bench.lowering --out "$out/machine-code.md"
else
  stage machine-code 400 "$python" -m bench.lowering --out "$out/machine-code.md"
  for name in tests hopper memcheck tune suite; do not_run "$name" "PyTorch sees no CUDA device"; done
fi

echo
if [ -n "$gpu" ]; then
  for page in cuda-quick.md tiles.md; do [ ! -s "$out/$page" ] || cat "$out/$page"; done
  head --bytes=5000 "$out/failures.txt"
else
  echo "Compiled ahead of time, not run:"
  cat "$out/machine-code.md" 2> /dev/null
fi
echo
cat "$out/stages.txt"
exit "$failed"
