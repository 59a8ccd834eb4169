#!/bin/sh
# The authors' package of DiVeQ, diveq 0.1.3, space-filling form: what it calls hard quantization at inference is not a
# function of the indices that it returns beside it. Each row becomes the nearest POINT of the curve of lines between
# neighbouring codes, at a place along the line that is a real number; the index is that of the nearest code. So two
# rows with one index come out different, a decoder that is given indices cannot make what the model was evaluated
# with, and errors reported for "M codes" are those of a continuous curve. Training's indices are yet another thing:
# numbers of lines, 0 to M - 2, so that the last code is never counted and its perplexity cannot reach M.
#
# Seen: 1000 normal rows, 16 normal codes of width 4. 747 rows differ from the code that their index names; the 62 rows
# with index 3 have 58 different outputs. Squared error of the returned rows 1.475, of the codes that the indices name
# 1.754. Indices in training: 0 .. 14.
#
# What we do about it: `sf-diveq` trains as the package does (golden files from it), but evaluates, encodes and decodes
# to codes, and counts the nearer end of a line in training.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q diveq==0.1.3 torch==2.15.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from diveq.sf_diveq import SFDIVEQ

torch.manual_seed(0)
M, D, N = 16, 4, 1000
q = SFDIVEQ(M, D, skip_iters=0, avg_iters=0, allow_warning=False)
q.codebook.data = torch.randn(M, D)
z = torch.randn(N, D)
y, index, _ = q.inference(z)
codes = q.codebook.data[index]
off = ((y - codes).norm(dim=1) > 1e-4).sum().item()
outputs = len({tuple(round(v, 4) for v in row) for row in y[index == 3].tolist()})
rows = (index == 3).sum().item()
error, of_codes = ((z - y) ** 2).sum(1).mean().item(), ((z - codes) ** 2).sum(1).mean().item()
_, train_index, _ = q(z)
print(f"rows that are not their code: {off} of {N}; index 3: {rows} rows, {outputs} different outputs")
print(f"squared error {error:.3f}, of the codes that the indices name {of_codes:.3f}")
print(f"training's indices: {train_index.min().item()} .. {train_index.max().item()} of {M} codes")
assert off > N // 2 and outputs > 10 and error < 0.95 * of_codes and train_index.max().item() == M - 2
PYTHON
echo "as described: diveq 0.1.3"
