#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one call: build with CUDA, GPU tests, benchmarks, compute-sanitizer; then one
# record, bench/records/<date>_<gpu>.json. Exit code 0 only if every step passed.
#
#   bench/gpu_check.sh [arguments for the benchmarks' pytest, e.g. --benchmark-max-time=0.3]
#
# Needs torch with CUDA, nvcc, and the packages below; what is missing is installed if there is a network (packages may
# also be on PYTHONPATH). PYTHON names the interpreter; SKIP_INSTALL=1 tests what is installed already.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root" || exit 1
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
steps=$work/steps
: > "$steps"

fail() { printf 'gpu_check: %s\n' "$1" >&2; exit 1; }

"$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2> /dev/null ||
  fail "$python has no torch that sees a CUDA device"

missing=$("$python" - <<'PY'
import importlib.util
wanted = {
    "scikit_build_core": "scikit-build-core", "pybind11": "pybind11", "numpy": "numpy", "pytest": "pytest",
    "pytest_benchmark": "pytest-benchmark", "hypothesis": "hypothesis", "safetensors": "safetensors", "typer": "typer",
    "rich": "rich", "matplotlib": "matplotlib", "jinja2": "jinja2", "pyarrow": "pyarrow", "PIL": "pillow",
}
print(" ".join(package for module, package in wanted.items() if importlib.util.find_spec(module) is None))
PY
)
for tool in cmake ninja; do
  command -v "$tool" > /dev/null || "$python" -c "import $tool" 2> /dev/null || missing="$missing $tool"
done
if [ -n "${missing// /}" ]; then
  # shellcheck disable=SC2086
  "$python" -m pip install -q --retries 1 --timeout 10 $missing ||
    fail "missing and not to be had: $missing (install them, or put them on PYTHONPATH)"
fi

# step NAME COMMAND...: runs it, remembers the outcome.
step() {
  local name=$1
  shift
  printf '\n=== %s\n' "$name"
  if "$@"; then
    printf '%s\tpassed\n' "$name" >> "$steps"
  else
    printf '%s\tfailed\n' "$name" >> "$steps"
    return 1
  fi
}
# From another folder: in the root, `python -m pytest` would import the source tree instead of what is installed.
tests() { (cd "$work" && "$python" -m pytest -q -p no:cacheprovider "$@"); }

if [ -z "${SKIP_INSTALL:-}" ]; then
  step "install with CUDA" \
    "$python" -m pip install --no-build-isolation --no-deps -C cmake.define.TSRFAST_CUDA=ON . || exit 1
fi
(cd "$work" && "$python" -c 'from tsrfast import _native; raise SystemExit(not _native._C.with_cuda)') ||
  fail "the installed tsrfast has no CUDA kernels"

step "pytest -m cuda" tests "$root/tests" -m "cuda and not slow"

sanitizer=$(command -v compute-sanitizer || true)
[ -n "$sanitizer" ] || for home in "${CUDA_HOME:-}" /usr/local/cuda; do
  [ -n "$home" ] && [ -x "$home/bin/compute-sanitizer" ] && sanitizer=$home/bin/compute-sanitizer && break
done
# Without PyTorch's cache each tensor is an allocation of its own, and running past its end is seen.
sanitized() {
  (cd "$work" && PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$1" --error-exitcode 9 --target-processes all \
    "$python" -m pytest -q -x -p no:cacheprovider "$root/tests/ops" -m "cuda and not slow" -k is_the_reference)
}
for tool in memcheck racecheck initcheck; do
  if [ -n "$sanitizer" ]; then
    step "compute-sanitizer $tool" sanitized "$tool"
  else
    printf 'compute-sanitizer %s\tskipped: not found\n' "$tool" >> "$steps"
  fi
done

printf '\n=== benchmarks and record\n'
"$python" bench/record.py --steps "$steps" "$@"
