#!/usr/bin/env bash
# Everything a GPU machine can tell of this package, in one command and under nine minutes, without a network:
#
#     bash bench/gpu_check.sh OUT
#
# Needs Linux, Python with PyTorch, Triton, ninja, pytest and a C++ compiler; nvcc and compute-sanitizer are used
# where they are. Builds the extension in place, runs the tests on the card, the memory checker and the quick suite;
# logs, result file and report go to OUT, the table is printed last. A stage that fails or runs out of time is said
# so, and the rest goes on. Without a GPU the kernels are compiled ahead of time for sm_80 and sm_90a and what their
# machine code is made of listed; what needs a card is labelled as not run.
# PYTHON names the interpreter: .venv/bin/python where there is one, else python3. Exit status 1 if a stage failed.
set -uo pipefail

[ $# -eq 1 ] || { echo "usage: bash bench/gpu_check.sh OUT" >&2; exit 2; }
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 MAX_JOBS=${MAX_JOBS:-$(nproc)}
budget_s=520 failed=0
: > "$out/stages.txt"

say() { echo "$*" | tee -a "$out/stages.txt"; }

# stage NAME LIMIT_S COMMAND...: its output goes to OUT/NAME.log, its verdict to OUT/stages.txt.
stage() {
  local name=$1 limit=$2 start=$SECONDS status verdict
  shift 2
  [ $((budget_s - SECONDS)) -lt "$limit" ] && limit=$((budget_s - SECONDS))
  if [ "$limit" -lt 10 ]; then say "$name: NOT RUN, no time left"; failed=1; return 1; fi
  timeout --kill-after=5 "$limit" "$@" > "$out/$name.log" 2>&1
  status=$?
  case $status in
    0) verdict=ok ;;
    124 | 137) verdict="FAILED, out of time ($limit s)" failed=1 ;;
    *) verdict="FAILED, status $status" failed=1 ;;
  esac
  say "$name: $verdict, $((SECONDS - start)) s: $(grep -v '^[[:space:]]*$' "$out/$name.log" | tail -n 1 | cut -c1-150)"
  return "$status"
}

not_run() { say "$1: NOT RUN, $2"; }

say "gpu_check of $(git rev-parse --short HEAD 2> /dev/null || echo 'no commit'), $(date -u +%Y-%m-%dT%H:%MZ), $(uname -srm)"
say "$("$python" -c 'import sys, torch, triton; print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, Triton {triton.__version__}")' 2>&1 | tail -n 1)"
say "GPU: $(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2> /dev/null || echo none)"
if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2> /dev/null; then gpu=1; else gpu=; fi

stage build 150 "$python" setup.py build_ext --inplace
stage backends 60 "$python" -m gssf_kernels
if [ -n "$gpu" ]; then
  stage tests 240 "$python" -m pytest -q --durations=5 -p no:cacheprovider \
    tests/test_triton.py tests/test_values.py tests/test_autograd.py tests/test_contracts.py tests/test_errors.py
  if command -v compute-sanitizer > /dev/null; then
    stage sanitizer 60 compute-sanitizer --tool memcheck --error-exitcode 9 "$python" -m bench.sanitize
  else
    not_run sanitizer "compute-sanitizer not found"
  fi
  stage suite 180 "$python" -m bench suite quick --device cuda --out "$out/cuda-quick.json"
  [ -s "$out/cuda-quick.json" ] && stage page 60 "$python" -m bench report "$out/cuda-quick.json"
else
  stage lowering 500 "$python" -m bench.lowering --out "$out/machine-code.md"
  for name in tests sanitizer suite; do not_run "$name" "PyTorch sees no CUDA device"; done
fi

echo
if [ -n "$gpu" ]; then
  cat "$out/cuda-quick.md" 2> /dev/null || echo "no table: the suite measured nothing"
else
  echo "Compiled ahead of time, not run:"
  cat "$out/machine-code.md" 2> /dev/null
fi
echo
cat "$out/stages.txt"
exit "$failed"
