#!/usr/bin/env python3
"""Makes wav2vec2/*.safetensors: small random models of torchaudio's, computed in float64 and stored as float32.

    python3 tests/golden/make_wav2vec2.py          needs torch, torchaudio and safetensors; their versions are kept

A file holds the state dict as weight.NAME, a padded batch (waveform, lengths), and what comes of it: features,
feature_lengths, layer.N (each block), output, and for s = sum(output * cotangent), cotangent 0 on padded frames,
grad.waveform and grad.NAME. Metadata: config (torchaudio's keywords), versions.
"""
import json
import os

import torch
import torchaudio
from safetensors.torch import save_file

BASE = dict(encoder_projection_dropout=0.0, encoder_attention_dropout=0.0, encoder_ff_interm_dropout=0.0,
            encoder_dropout=0.0, encoder_layer_drop=0.0, aux_num_out=None)
CASES = {
    "group-norm-post": dict(
        BASE, extractor_mode="group_norm", extractor_conv_layer_config=[(8, 10, 5), (6, 3, 2)],
        extractor_conv_bias=False, encoder_embed_dim=12, encoder_pos_conv_kernel=8, encoder_pos_conv_groups=4,
        encoder_num_layers=2, encoder_num_heads=3, encoder_ff_interm_features=20, encoder_layer_norm_first=False),
    "layer-norm-pre": dict(
        BASE, extractor_mode="layer_norm", extractor_conv_layer_config=[(7, 10, 5), (8, 3, 2), (6, 2, 2)],
        extractor_conv_bias=True, encoder_embed_dim=20, encoder_pos_conv_kernel=7, encoder_pos_conv_groups=2,
        encoder_num_layers=2, encoder_num_heads=4, encoder_ff_interm_features=24, encoder_layer_norm_first=True),
    "auxiliary": dict(
        BASE, extractor_mode="group_norm", extractor_conv_layer_config=[(5, 10, 5), (5, 3, 3)],
        extractor_conv_bias=True, encoder_embed_dim=8, encoder_pos_conv_kernel=5, encoder_pos_conv_groups=1,
        encoder_num_layers=1, encoder_num_heads=1, encoder_ff_interm_features=9, encoder_layer_norm_first=True,
        aux_num_out=3),
}
LENGTHS = (700, 431, 560)


def randomise(model, generator):
    """Gives every parameter a value that makes its part matter: no identity norms, no zero biases."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            r = torch.randn(p.shape, generator=generator)
            if name.endswith("original0"):
                p.mul_(torch.exp(0.3 * r))
            elif "layer_norm" in name:
                p.copy_(1 + 0.2 * r if name.endswith("weight") else 0.1 * r)
            elif name.endswith("bias"):
                p.copy_(0.1 * r)
            else:
                p.copy_(r / (p.numel() / p.shape[0]) ** 0.5)


for name, config in CASES.items():
    generator = torch.Generator().manual_seed(7)
    model = torchaudio.models.wav2vec2_model(**config)
    randomise(model, generator)
    tensors = {"weight." + k: v.clone() for k, v in model.state_dict().items()}
    model = model.double().train()
    lengths = torch.tensor(LENGTHS)
    waves = torch.randn(len(LENGTHS), max(LENGTHS), generator=generator)
    waves *= torch.arange(max(LENGTHS))[None] < lengths[:, None]
    x = waves.double().requires_grad_()
    features, frames = model.feature_extractor(x, lengths)
    layers = model.encoder.extract_features(features, frames)
    y = model.encoder(features, frames)
    if model.aux is not None:
        y = model.aux(y)
    cotangent = torch.randn(y.shape, generator=generator)
    cotangent *= (torch.arange(y.shape[1])[None] < frames[:, None])[..., None]
    (y * cotangent.double()).sum().backward()
    tensors.update({"waveform": waves, "lengths": lengths.int(), "features": features, "output": y,
                    "feature_lengths": frames.int(), "cotangent": cotangent, "grad.waveform": x.grad})
    tensors.update({f"layer.{i}": layer for i, layer in enumerate(layers)})
    tensors.update({"grad." + k: p.grad for k, p in model.named_parameters()})
    tensors = {k: v.detach().float().contiguous() if v.is_floating_point() else v for k, v in tensors.items()}
    here = os.path.join(os.path.dirname(os.path.abspath(__file__)), "wav2vec2")
    save_file(tensors, os.path.join(here, name + ".safetensors"), {
        "config": json.dumps({k: v for k, v in config.items() if v is not None}),
        "versions": f"torch {torch.__version__}, torchaudio {torchaudio.__version__}"})
    print(name, sum(p.numel() for p in model.parameters()), "parameters, frames", frames.tolist())
