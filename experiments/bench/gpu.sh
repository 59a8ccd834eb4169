#!/usr/bin/env bash
# Everything that wants to be known of a GPU, in one command of at most 9 minutes, from a tree that ./setup.sh has
# built:
#
#     experiments/bench/gpu.sh OUT [--data DIR] [--device cuda:0] [--python python3] [--seconds 540]
#     experiments/bench/gpu.sh OUT --dry     the same at tiny sizes on the emulator, without PyTorch: tests this script
#
# bundle.sh beside it takes the tree to a machine where nothing can be installed.
#
# In the order of their worth, so that what the time is too short for is the least of it:
#   device      the card, its driver, and its ceilings (roofline.cu)
#   specs       tests/cuda_spec.lua and graph_spec.lua on the card: every op and golden file against the CPU,
#               recorded steps
#   op*         quantizer.lua: the smoothed quantizers at S, B, C, op by op and in a graph, against PyTorch, and S
#               against float64
#   ae-*        ae_step.lua: a training step at the paper's presets, batch 16, float32 and bf16, against PyTorch eager
#               and compiled
#   train-*     short trainings of four methods, on the images of DIR if given
#   sanitizer   compute-sanitizer's memcheck and racecheck over the specs of one op of each kind
# OUT/NAME.txt is what each said, OUT/summary.txt how each ended and how long it took; CSV files lie beside them.
set -u

usage() { sed -n '5,6s/^# *//p' "$0" >&2; exit 2; }
out='' data='' device=cuda:0 python=python3 seconds=540 dry=''
while [ $# -gt 0 ]; do
  case $1 in
    --data | --device | --python | --seconds)
      [ $# -gt 1 ] || usage
      declare "${1#--}=$2"
      shift ;;
    --dry) dry=yes device=emu:0 python=none seconds=3600 ;;
    -*) usage ;;
    *) [ -z "$out" ] || usage; out=$1 ;;
  esac
  shift
done
[ -n "$out" ] || usage
[[ $seconds =~ ^[0-9]+$ ]] || { echo "--seconds $seconds: expected a number" >&2; exit 2; }
[ -z "$data" ] || [ -d "$data" ] || { echo "--data $data: no such folder" >&2; exit 2; }
[[ -z $out || $out = /* ]] || out=$PWD/$out
[[ -z $data || $data = /* ]] || data=$PWD/$data
cd "$(dirname "$0")/../.." || exit 2
[ -f build/libvertex.so ] || { echo "build/libvertex.so is not there: run ./setup.sh first" >&2; exit 2; }
if [ -e "$out" ] && [ -n "$(ls -A "$out")" ]; then echo "$out is not empty; give another folder" >&2; exit 2; fi
mkdir -p "$out" || exit 2
export device
if ! reason=$(luajit - 2>&1 <<'END'
  dofile "lua/vertex/start.lua"
  local ok, why = pcall(require("vertex").device, os.getenv "device")
  if not ok then print((tostring(why):gsub("^[^:]*:%d+: ", ""))) os.exit(1) end
END
); then
  echo "no measurements: $reason" | tee "$out/summary.txt" >&2
  exit 1
fi

failed=0
# part NAME LIMIT COMMAND...: runs it, at most LIMIT seconds and no longer than there is left.
part() {
  local name=$1 left=$((seconds - SECONDS)) limit=$2 start=$SECONDS status
  shift 2
  [ -z "$dry" ] || limit=$((10 * limit)) # it is no test of the machine's speed
  [ "$limit" -lt "$left" ] || limit=$left
  if [ "$limit" -lt 3 ]; then
    printf '%-24s left out: no time\n' "$name" | tee -a "$out/summary.txt"
    return
  fi
  timeout -k 5 "$limit" "$@" >"$out/$name.txt" 2>&1
  status=$?
  local word=ok
  if [ $status -eq 124 ] || [ $status -eq 137 ]; then word="stopped after $limit s"
  elif [ $status -ne 0 ]; then word="FAILED ($status)"; fi
  [ $status -eq 0 ] || failed=1
  printf '%-24s %-20s %4d s\n' "$name" "$word" $((SECONDS - start)) | tee -a "$out/summary.txt"
}

# shellcheck disable=SC2317
describe() {
  git log -1 --format='%H %cd' 2>/dev/null
  nvidia-smi 2>/dev/null
  "$python" -c 'import torch; print("torch", torch.__version__)' 2>/dev/null
  luajit -e 'dofile "lua/vertex/start.lua"
    for _, d in ipairs(require("vertex").devices()) do print(d.name, d.description) end'
  [ -n "$dry" ] || build/cuda_roofline "${device#cuda:}"
}
export -f describe
export python dry

if [ -n "$dry" ]; then
  specs=(--filter=norm) shapes=96x8x40x2 rounds=1 presets=(tiny) batch=1 steps=1
  preset=tiny train_steps=2 train_batch=2
  data=$out/images # a few small images: the set made on the fly has too many for the emulator
  mkdir -p "$data/train" "$data/val"
  export data
  luajit - <<'END'
  dofile "lua/vertex/start.lua"
  local vx = require "vertex"
  for i = 1, 8 do
    local path = ("%s/%s/%d.png"):format(os.getenv "data", i <= 6 and "train" or "val", i)
    vx.data.save(path, vx.data.procedural(32, 1, i))
  end
END
else
  specs=(-t cuda) shapes=S,B,C rounds=5 presets=(64x64x32-8192 64x64x3-8192 16x16x32-1024) batch=16 steps=10
  preset=small train_steps=400 train_batch=16
fi

has_torch=''
cuda_in_torch='import torch, sys; sys.exit(not torch.cuda.is_available())'
[ "$python" = none ] || ! "$python" -c "$cuda_in_torch" 2>/dev/null || has_torch=yes
[ -n "$has_torch" ] || python=none

part device 40 bash -c describe
part specs 120 busted "${specs[@]}" -o plainTerminal tests/cuda_spec.lua tests/graph_spec.lua
quantizers() { # NAME LIMIT SHAPES METHODS ARGUMENTS...
  part "$1" "$2" luajit experiments/bench/quantizer.lua --device "$device" --sections op --shapes "$3" \
    --methods "$4" "${@:5}"
}
step() { # NAME LIMIT PRESET ARGUMENTS...
  part "$1" "$2" luajit experiments/bench/ae_step.lua --device "$device" --csv "$out/ae.csv" --batch "$batch" \
    --steps "$steps" --rounds 1 --preset "$3" "${@:4}"
}
training() { # NAME LIMIT METHODS ARGUMENTS...
  part "$1" "$2" luajit experiments/ae_sweep.lua --device "$device" --preset "$preset" --steps "$train_steps" \
    --batch "$train_batch" ${data:+--data "$data"} --methods "$3" --quiet "${@:4}"
}
quantizers op 110 "$shapes" softmax-knn-ce,softmax-knn-l2,softmax-ppl \
  --python none --rounds "$rounds" --seconds 3 --errors no --out "$out"
for p in "${presets[@]}"; do
  step "ae-$p-f32" 40 "$p" --python "$python"
  step "ae-$p-bf16" 40 "$p" --python "$python" --autocast bf16
  step "ae-$p-eager" 20 "$p" --python none --graph off --methods softmax-knn-ce
done
[ -z "$has_torch" ] || quantizers op-torch 90 "$shapes" softmax-knn-ce \
  --python "$python" --baselines naive,chunk --rounds 3 --seconds 3 --errors no --out "$out"
[ -z "$has_torch" ] || step ae-compiled-bf16 120 "${presets[0]}" --python "$python" --autocast bf16 --compile
quantizers op-errors 30 "${shapes%%,*}" softmax-knn-ce,softmax-knn-l2 \
  --python none --rounds 1 --errors yes --out "$out/errors"
training train-graph 60 softmax-knn-ce,sgumbel-knn-ce,hgumbel-ppl,ste-euclid --out "$out/train"
training train-bf16 30 softmax-knn-ce --autocast bf16 --out "$out/train-bf16"

sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
left_out() { printf '%-24s left out: %s\n' sanitizer "$1" | tee -a "$out/summary.txt"; }
if [ -n "$dry" ]; then left_out 'the emulator has no sanitizer'
elif [ -z "$sanitizer" ]; then left_out 'there is no compute-sanitizer'
else
  filters=(--filter={group_norm,sepconv2d,softmax,smooth,hard,vertex_knn,sum,scatter_add,adamw,linear}.agrees)
  for tool in memcheck racecheck; do
    part "sanitizer-$tool" 60 "$sanitizer" --tool $tool --target-processes all --error-exitcode 9 \
      busted "${specs[@]}" -o plainTerminal "${filters[@]}" tests/cuda_spec.lua
  done
fi
exit $failed
