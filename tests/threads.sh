#!/usr/bin/env bash
# Runs the specs of data loaders under ThreadSanitizer, in a build folder of its own; the status is 1 where a race is
# reported or a test fails. GCC's OpenMP is not built for the sanitizer, which takes its barriers for none: reports with
# an OpenMP region in them are left out, and what is looked at are the streams' own threads. By hand.
#
#   tests/threads.sh [SPEC...]     all specs that open streams, unless some are named
set -euo pipefail
cd "$(dirname "$0")/.."
specs=("$@")
[ $# -gt 0 ] || specs=(tests/{stream,images,audio,speech,vectors}_spec.lua)

cmake -S . -B build-threads -G Ninja -DVERTEX_CUDA=OFF -DVERTEX_SANITIZE=thread >/dev/null
cmake --build build-threads --target vertex >/dev/null
cp build/libvertex_emu.so build-threads/ # which the specs want; it is not looked at
printf '%s\n' race:_omp_fn race:libgomp.so signal:libvertex_emu.so >build-threads/suppressions

# Children of the specs are not preloaded. setarch: the sanitizer's memory has fixed places. It delays signals, so what
# is interrupted is left out.
VERTEX_LIB=$PWD/build-threads/libvertex.so OMP_NUM_THREADS=1 LD_PRELOAD=$(gcc -print-file-name=libtsan.so) \
  TSAN_OPTIONS="suppressions=$PWD/build-threads/suppressions exitcode=1 history_size=7" setarch -R luajit -e "
    local ffi = require 'ffi'
    ffi.cdef 'int unsetenv(const char *name);'
    package.path = './lua/?.lua;./lua/?/init.lua;./?.lua;' .. package.path
    require 'vertex.core.library'
    ffi.C.unsetenv 'LD_PRELOAD'
    ffi.C.unsetenv 'VERTEX_LIB'
  " "$(command -v busted)" --ignore-lua --filter-out=interrupted "${specs[@]}"
