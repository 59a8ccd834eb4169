#!/usr/bin/env bash
# Runs the lab: every step of every program, checked against float64 and timed, after the machine's ceilings.
#
#   kernels/lab/run.sh [--quick] [assign] [forward] [backward] [amx]
#
# runs the first three where none is named, at D = 32 and D = 3; forward and backward also late in training, and at a
# tau at which that saves nothing. amx is for VERTEX_SIMD=amx and amxtwin. VERTEX_SIMD (one of kernels/cpu/variants.def)
# chooses the vectors, as it does for the library, of which build/ must hold a current one; OMP_NUM_THREADS the threads.
# --quick only checks, at small sizes. Ends with 1 where a step disagrees with float64.
set -euo pipefail
cd "$(dirname "$0")/../.."

quick=""
programs=()
for argument in "$@"; do
  case $argument in
    --quick) quick=quick ;;
    assign | forward | backward | amx) programs+=("$argument") ;;
    *) sed -n '2,9s/^# \{0,1\}//p' kernels/lab/run.sh >&2; exit 2 ;;
  esac
done
[ ${#programs[@]} -gt 0 ] || programs=(assign forward backward)

[ -e build/libvertex.so ] || { echo "build/libvertex.so is not there: ./setup.sh builds it" >&2; exit 2; }
# the library's list of variants: name, flags, 1 where this processor runs it, 1 where it may be chosen by itself; of
# those the best is the last
variants=$(luajit - <<'END'
local ffi = require "ffi"
ffi.cdef "const char *vx_cpu_variants(void);"
io.write(ffi.string(ffi.load("./build/libvertex.so").vx_cpu_variants()))
END
)
usable=$(awk -F'\t' '$3 { print $1 }' <<<"$variants")
simd=${VERTEX_SIMD:-$(awk -F'\t' '$3 && $4 { print $1 }' <<<"$variants" | tail -n 1)}
grep -qxF -- "$simd" <<<"$usable" || { echo "VERTEX_SIMD: '$simd' is none of" $usable >&2; exit 2; }
flags=$(awk -F'\t' -v simd="$simd" '$1 == simd { print $2 }' <<<"$variants")

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
compile() { # shellcheck disable=SC2086
  ${CC:-cc} -std=gnu11 -O3 $flags -ffp-contract=fast -fno-math-errno -fno-trapping-math -fopenmp \
    -Wall -Wextra -Wshadow -Wno-psabi -Wno-aggressive-loop-optimizations \
    -I. -Ikernels -DVX_VARIANT=lab "kernels/lab/$1.c" -o "$folder/$1" -Lbuild -lvertex -Wl,-rpath,"$PWD/build" -lm
}

threads=${OMP_NUM_THREADS:-$(nproc)}
echo "$(sed -n 's/^model name\s*: //p' /proc/cpuinfo | head -1), $simd, $threads threads"
roof=""
[ -n "$quick" ] || { compile roofline; roof=$folder/roofline; }

status=0
start() { "$folder/$1" "${@:2}" ${roof:+"$roof"} || status=1; }
for program in "${programs[@]}"; do
  compile "$program"
  case $program-$quick in # N D M K
    amx-*) start amx "$quick" ;;
    assign-) start assign 9216 32 8192 0; start assign 73728 3 8192 0 ;;
    assign-quick) start assign 192 32 256 0; start assign 3072 3 640 0 ;;
    *-)
      start "$program" 9216 32 4096 8
      start "$program" 18432 3 8192 8
      start "$program" 36864 3 8192 8 late 0.003
      start "$program" 18432 3 8192 8 late 0.1 ;;
    *-quick)
      start "$program" 192 32 256 4
      start "$program" 192 3 256 4
      start "$program" 1152 3 640 8 late 0.001 # where few rows are near a code: some of these have no 8 in reach
      start "$program" 1152 3 640 8 late 0.1 ;;
  esac
done
exit $status
