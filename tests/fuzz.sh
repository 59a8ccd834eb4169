#!/usr/bin/env bash
# Fuzzes the readers of files with libFuzzer, AddressSanitizer and UndefinedBehaviorSanitizer, in a build folder of its
# own. What ends a run is written to build-fuzz/FORMAT-crash-*, -oom-*, -timeout-*; the status is then 1.
#
#   tests/fuzz.sh [FORMAT | all] [SECONDS]     jpeg, png, audio, safetensors, npy; all of them, 60 seconds each
#
# Needs clang with libFuzzer, and LuaJIT's and zlib's headers (apt: clang, libluajit-5.1-dev, zlib1g-dev).
set -euo pipefail
cd "$(dirname "$0")/.."
formats=(jpeg png audio safetensors npy)
seconds=${2:-60}
[ "${1:-all}" = all ] || formats=("$1")

# kernels as they are, by GCC, whose vector extensions they use
cmake -S . -B build-fuzz -G Ninja -DVERTEX_CUDA=OFF >/dev/null
cmake --build build-fuzz --target vertex_kernels >/dev/null
# the rest by clang, told what happens in it
flags=(-std=gnu11 -g -O1 -fno-omit-frame-pointer -fno-sanitize-recover=undefined -I. -Ikernels -Icore)
read -ra packages <<<"$(pkg-config --cflags --libs libjpeg libpng sndfile samplerate)"
library=build-fuzz/libvertex.so
core=(core/*.c core/data/*.c core/comm/{comm,self,staged,choose}.c)
[ -e $library ] && [ -z "$(find core build-fuzz/libvertex_kernels.a -newer $library)" ] ||
  clang "${flags[@]}" -fsanitize=fuzzer-no-link,address,undefined -fvisibility=hidden -fPIC -shared \
    -DVX_VERSION='"fuzz"' "${core[@]}" \
    -Wl,--whole-archive build-fuzz/libvertex_kernels.a -Wl,--no-whole-archive "${packages[@]}" \
    -l:libgomp.so.1 -lm -ldl -lpthread -o $library
read -ra packages <<<"$(pkg-config --cflags --libs luajit zlib)"
status=0
for format in "${formats[@]}"; do
  clang "${flags[@]}" -fsanitize=fuzzer,address,undefined -DFORMAT="\"$format\"" -DROOT="\"$PWD\"" tests/fuzz/fuzz.c \
    $library -Wl,-rpath,"$PWD/build-fuzz" "${packages[@]}" -o "build-fuzz/fuzz-$format"
  case $format in
    jpeg) seeds=(tests/fixtures/images tests/fixtures/sampling) ;;
    png) seeds=(tests/fixtures/images) ;;
    audio) seeds=(tests/fixtures/audio) ;;
    *) seeds=("tests/fuzz/seeds/$format") ;;
  esac
  mkdir -p "build-fuzz/corpus-$format"
  echo "== $format: $seconds s"
  VERTEX_LIB=$PWD/$library VERTEX_POOL=0 OMP_NUM_THREADS=1 LSAN_OPTIONS=suppressions=tests/fuzz/leaks.txt \
    "build-fuzz/fuzz-$format" "build-fuzz/corpus-$format" "${seeds[@]}" -max_total_time="$seconds" -max_len=20000 \
    -timeout=20 -rss_limit_mb=3000 \
    -artifact_prefix="build-fuzz/$format-" -print_final_stats=1 >"build-fuzz/$format.log" 2>&1 ||
    { status=1; grep -E "ERROR|SUMMARY|told from|Test unit written" "build-fuzz/$format.log"; }
  grep -E "number_of_executed_units" "build-fuzz/$format.log" || true
done
exit $status
