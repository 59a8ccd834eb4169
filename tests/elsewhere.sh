#!/usr/bin/env bash
# Runs the Python of README, "Your own vectors", on a codebook fitted here: NumPy's and PyTorch's results must be ours.
# tests/elsewhere.sh [PYTHON], one with numpy, torch and safetensors; by hand, since the project itself needs none.
set -euo pipefail
python=${1:-python3}
here=$(cd "$(dirname "$0")/.." && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"$python" -c 'import numpy as n
r = n.random.default_rng(1)
n.save("features.npy", (r.normal(size=(4000, 8)) * 3 + 5).astype("f4"))'
luajit "$here/experiments/vq_sweep.lua" --quiet --device cpu --data features.npy --codes 64 --steps 200 \
  --methods softmax-knn-ce --out out/mine >/dev/null
sed -n '/^## Your own vectors/,/^## /p' "$here/README.md" | sed -n '/^```python/,/^```/{/^```/!p}' >readme.py
cat >>readme.py <<'END'
x = torch.from_numpy(np.load("features.npy"))
ours = torch.from_numpy(codes[:, 0].astype("i8"))
same = (encode(x) == ours).float().mean().item()
assert same > 0.999, same  # a tie within float32's rounding may fall the other way
assert torch.allclose(decode(ours), torch.from_numpy(quantized), rtol=1e-5, atol=1e-5)
error = ((quantized - x.numpy()) ** 2).sum() / ((x.numpy() - x.numpy().mean(0)) ** 2).sum()
told = float(open("out/mine/results.csv").read().splitlines()[1].split(",")[2])
assert abs(error - told) < 1e-3 * told, (error, told)
print(f"{same:.2%} of PyTorch's codes are ours; error {error:.4f}, told {told:.4f}")
END
"$python" readme.py
