#!/usr/bin/env python3
"""Turns a PyTorch file of weights into a safetensors file, which Vertex reads.

    python3 experiments/pth_to_safetensors.py weights.pth weights.safetensors      needs torch and nothing else

The file holds a state dict, or a dict with one under "state_dict" or "model". It is read without running code from it
(weights_only). What is no tensor is named and left out.
"""
import ctypes
import json
import os
import struct
import sys

import torch

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
          torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    source, target = sys.argv[1:]
    state = torch.load(source, map_location="cpu", weights_only=True)
    for key in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict):
        sys.exit(f"{source} holds a {type(state).__name__}, expected a state dict")
    header, tensors, at = {"__metadata__": {"source": os.path.basename(source)}}, [], 0
    for name, x in state.items():
        if not isinstance(x, torch.Tensor) or x.dtype not in DTYPES:
            print(f"left out: {name}, a {x.dtype if isinstance(x, torch.Tensor) else type(x).__name__}")
            continue
        x = x.detach().contiguous()
        size = x.numel() * x.element_size()
        header[name] = {"dtype": DTYPES[x.dtype], "shape": list(x.shape), "data_offsets": [at, at + size]}
        tensors.append((x, size))
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(target + ".part", "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for x, size in tensors:
            f.write(ctypes.string_at(x.data_ptr(), size) if size else b"")
    os.replace(target + ".part", target)
    print(f"{target}: {len(tensors)} tensors, {at / 1e6:.1f} MB")


main()
