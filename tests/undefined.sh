#!/usr/bin/env bash
# Runs the specs of numbers and the property test on kernels that say where C leaves a result undefined: integers that
# overflow, shifts, divisions by 0, arrays of no elements, floats that fit into no integer. In a build folder of its own
# (tens of minutes on two cores); the status is 1 where something is reported or a test fails. By hand.
#
#   tests/undefined.sh [SPEC...]     the specs of ops and quantizers, unless some are named
set -uo pipefail
cd "$(dirname "$0")/.."
specs=("$@")
[ $# -gt 0 ] || specs=(tests/{ops,empty,quantizer,assign,nearest,smooth_cells,kmeans}_spec.lua)

cmake -S . -B build-undefined -G Ninja -DVERTEX_CUDA=OFF \
  -DVERTEX_SANITIZE=signed-integer-overflow,shift,integer-divide-by-zero,vla-bound,float-cast-overflow >/dev/null &&
  cmake --build build-undefined --target vertex >/dev/null || exit
cp build/libvertex_emu.so build-undefined/ # which the specs want; it is not looked at

reports=build-undefined/reports
rm -rf $reports && mkdir $reports
export VERTEX_LIB=$PWD/build-undefined/libvertex.so UBSAN_OPTIONS=print_stacktrace=1:log_path=$PWD/$reports/of
status=0
luajit tests/property.lua 20000 || status=1
for spec in "${specs[@]}"; do busted "$spec" || status=1; done
if [ -n "$(ls $reports)" ]; then
  cat $reports/*
  status=1
fi
exit $status
