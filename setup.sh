#!/usr/bin/env bash
# Installs what Vertex needs, by package name, and builds it into build/. Safe to run again: only what is missing is
# done. Without apt it lists what is missing and stops.
#
#   ./setup.sh         to use Vertex and to run its tests
#   ./setup.sh --cpu   without CUDA kernels and their emulator, which the tests need
#   ./setup.sh --ci    also what .ci/run checks sources with; a compiler's warning ends the build
set -euo pipefail
cd "$(dirname "$0")"
case "$*" in
  '' | --ci | --cpu) ;;
  *) sed -n '5,7s/^# *//p' "$0" >&2; exit 2 ;;
esac

# name of a Debian package, and a command that succeeds where it is there already
needs=(
  "gcc|command -v gcc"
  "g++|command -v g++"
  "cmake|command -v cmake"
  "ninja-build|command -v ninja"
  "pkg-config|command -v pkg-config"
  "luajit|command -v luajit"
  "lua-busted|command -v busted"
  "lua-check|command -v luacheck"
  "lua-filesystem|luajit -e 'require \"lfs\"'"
  "lua-cjson|luajit -e 'require \"cjson\"'"
  "lua-argparse|luajit -e 'require \"argparse\"'"
  "libjpeg-dev|pkg-config --exists libjpeg"
  "libpng-dev|pkg-config --exists libpng"
  "libsndfile1-dev|pkg-config --exists sndfile"
  "libsamplerate0-dev|pkg-config --exists samplerate"
  "libedit2|ldconfig -p | grep -q libedit.so.2"
  "libcairo2|ldconfig -p | grep -q libcairo.so.2"
  "libopenblas0-openmp|ldconfig -p | grep -q liblapack.so.3 && ldconfig -p | grep -q libopenblas.so.0"
  "libzmq5|ldconfig -p | grep -q libzmq.so.5"
  "openmpi-bin|command -v mpirun"
  "libopenmpi-dev|command -v mpicc"
  "libssl3|ldconfig -p | grep -q libcrypto.so.3"
  "fonts-dejavu-core|ls /usr/share/fonts/truetype/dejavu/DejaVuSans.ttf"
)
[ "$*" = --ci ] && needs+=("clang-format|command -v clang-format" "faketime|command -v faketime")

missing=()
for need in "${needs[@]}"; do
  bash -c "${need#*|}" >/dev/null 2>&1 || missing+=("${need%%|*}")
done

if [ ${#missing[@]} -gt 0 ]; then
  if ! command -v apt-get >/dev/null; then
    echo "missing, and there is no apt-get to install it with: ${missing[*]}" >&2
    exit 1
  fi
  as_root=()
  if [ "$(id -u)" -ne 0 ]; then
    if ! command -v sudo >/dev/null; then
      echo "run as root, or install these first: apt-get install ${missing[*]}" >&2
      exit 1
    fi
    as_root=(sudo)
  fi
  echo "installing ${missing[*]}"
  "${as_root[@]}" apt-get update -qq
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
    "${missing[@]}" libc6-dev >/dev/null
fi

[ "$*" = --cpu ] && cuda=OFF || cuda=ON
[ "$*" = --ci ] && werror=ON || werror=OFF
cmake -S . -B build -G Ninja -DCMAKE_BUILD_TYPE=Release -DVERTEX_CUDA=$cuda -DVERTEX_WERROR=$werror \
  | grep -E "^-- (CUDA|NCCL|MPI)" || true
cmake --build build
if [ $cuda = OFF ]; then
  rm -f build/libvertex_cuda.so build/libvertex_emu.so # of an earlier ./setup.sh: they would not fit for long
  echo "CUDA and the tests' emulator are left out; ./setup.sh without --cpu adds them"
fi
luajit lua/vertex/interactive/reference.lua build/reference.md
echo "ready: luajit experiments/ae_sweep.lua"
