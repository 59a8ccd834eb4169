"""A Wav2Vec 2.0 pretraining step in torchaudio and PyTorch: answers each line "step" with its milliseconds.

    python3 experiments/bench/w2v_step.py SETTINGS          a JSON object; w2v_step.lua writes it

The model is torchaudio's wav2vec2_model, in training mode; hidden frames, distractors, loss and quantizer are those of
experiments/wav2vec.lua, written as PyTorch users do: spans by numpy, distractors by torch.randint, cosine similarity,
cross entropy, AdamW (fused where there is such). The quantizer is softmax-knn-ce, or none at all.
"""
import json
import sys
import time

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchaudio

s = json.loads(sys.argv[1])
torch.set_num_threads(s["threads"])
torch.manual_seed(1)
device = torch.device(s["device"])
random = np.random.default_rng(1)


class Pretraining(nn.Module):
    def __init__(self):
        super().__init__()
        self.wav2vec2 = torchaudio.models.wav2vec2_model(**s["model"], aux_num_out=None)
        channels, width = s["model"]["extractor_conv_layer_config"][-1][0], s["model"]["encoder_embed_dim"]
        self.mask_embedding = nn.Parameter(torch.rand(width))
        self.project_q, self.project_y = nn.Linear(channels, s["dim"]), nn.Linear(width, s["dim"])
        if s["quantizer"] == "softmax-knn-ce":
            self.codebook = nn.Parameter(torch.randn(s["groups"], s["codes"], s["dim"] // s["groups"]))
            self.log_tau = nn.Parameter(torch.tensor([0.1]).log())

    def quantize(self, z):
        if s["quantizer"] == "none":
            return z, 0.0
        parts, reg = [], 0.0
        with torch.autocast(device.type, enabled=False):
            for g, part in enumerate(z.float().chunk(s["groups"], dim=1)):
                logits = F.normalize(part, dim=1) @ F.normalize(self.codebook[g], dim=1).t() / self.log_tau.exp()
                log_p = F.log_softmax(logits, 1)
                parts.append(log_p.exp() @ self.codebook[g])
                reg = reg - log_p.topk(s["k"], dim=0).values.mean() / s["groups"]
        return torch.cat(parts, 1), reg

    def forward(self, waves):
        model = self.wav2vec2
        features, _ = model.feature_extractor(waves, None)
        mask, n = spans(features.shape[0], features.shape[1])
        hidden = features[mask]
        q, reg = self.quantize(self.project_q(model.encoder.feature_projection.layer_norm(hidden)))
        x = model.encoder.feature_projection(features)
        x = torch.where(mask[..., None], self.mask_embedding.to(x.dtype), x)
        y = self.project_y(model.encoder.transformer(x)[mask])
        rows = y.shape[0]
        others = torch.randint(0, n - 1, (rows, s["distractors"]), device=device)
        place = torch.arange(rows, device=device)[:, None]
        others = others + (others >= place % n) + place // n * n
        logits = F.cosine_similarity(y[:, None].float(), torch.cat([q[:, None], q[others]], 1).float(), dim=-1) / 0.1
        same = (q[others] == q[:, None]).all(-1)
        logits = torch.cat([logits[:, :1], logits[:, 1:].masked_fill(same, float("-inf"))], 1)
        return F.cross_entropy(logits, torch.zeros(rows, dtype=torch.long, device=device)) + reg


def spans(batch, frames):
    """A mask (batch,frames) with the same number n of hidden frames in every row, and n."""
    rows = []
    for _ in range(batch):
        count = max(2, int(s["mask_probability"] * frames / s["mask_span"] + random.random()))
        starts = random.choice(frames - s["mask_span"], count, replace=False)
        rows.append(np.unique(starts[:, None] + np.arange(s["mask_span"])))
    n = min(len(row) for row in rows)
    mask = np.zeros((batch, frames), bool)
    for b, row in enumerate(rows):
        mask[b, random.choice(row, n, replace=False)] = True
    return torch.from_numpy(mask).to(device), n


model = Pretraining().to(device).train()
options = dict(lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0)
try:
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **options)
except (TypeError, RuntimeError):
    optimizer = torch.optim.AdamW(model.parameters(), **options)
waves = torch.randn(s["batch"], s["crop"], device=device)


def step():
    start = time.perf_counter()
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=s["autocast"] == "bf16"):
        loss = model(waves)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    loss.item()
    return (time.perf_counter() - start) * 1e3


step()
print("ready", f"{torch.__version__}/torchaudio-{torchaudio.__version__}", flush=True)
for _ in sys.stdin:
    try:
        print(f"{step():.4f}", flush=True)
    except torch.OutOfMemoryError:
        print("oom", flush=True)
