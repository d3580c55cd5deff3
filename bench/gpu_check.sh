#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one call of at most nine minutes: build with CUDA, GPU tests, the machine's own
# ceilings, races against PyTorch, precision, compute-sanitizer; one record and a readable table. gpu_check.py does the
# work and says which parts there are (bench/gpu_check.sh --help).
#
#   bench/gpu_check.sh                      all parts; record in bench/records/
#   bench/gpu_check.sh build ceilings       these parts; record in runs/gpu/
#   bench/gpu_check.sh --skip sanitize
#
# Needs torch with CUDA, nvcc, and the packages that gpu_check.py lists; what is missing is installed if there is a
# network (packages may also be on PYTHONPATH). PYTHON names the interpreter; SKIP_INSTALL=1 takes tsrfast as installed.
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu_check.py" "$@"
