"""The autoencoder of experiments/autoencoder.lua in PyTorch: median and least milliseconds of a training step
(forward, backward, AdamW).

    python3 experiments/bench/ae_step.py PRESET BATCH STEPS THREADS {none,softmax-knn-ce} [compile] [bf16] [cuda:0]

Channels-last, float32, as fast as eager PyTorch lets it be: group norm and SiLU by its own kernels, depthwise
separable convolutions, fused AdamW where the version has it. With bf16 the network runs under torch.autocast, the
quantizer in float32. The quantizer is the paper's, written out. Called by ae_step.lua, which interleaves it with
Vertex.
"""
import statistics
import sys
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

PRESETS = {
    "tiny": dict(size=32, channels=[64, 64, 32, 32], codes=256, k=4),
    "small": dict(size=64, channels=[64, 64, 32, 32], codes=1024, k=4),
    "16x16x32-1024": dict(size=256, channels=[128, 128, 64, 64, 32, 32], codes=1024, k=8),
    "64x64x3-8192": dict(size=256, channels=[128, 64, 32, 3], codes=8192, k=32),
    "64x64x32-8192": dict(size=256, channels=[128, 64, 32, 32], codes=8192, k=32),
}


def sepconv(i, o, stride=1):
    return nn.Sequential(nn.Conv2d(i, i, 3, stride, 1, groups=i, bias=False), nn.Conv2d(i, o, 1))


def groups(c):
    g = max(1, min(32, c // 4))
    while c % g:
        g -= 1
    return g


class Residual(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.n1, self.c1 = nn.GroupNorm(groups(c), c), sepconv(c, c)
        self.n2, self.c2 = nn.GroupNorm(groups(c), c), sepconv(c, c)

    def forward(self, x):
        return x + self.c2(F.silu(self.n2(self.c1(F.silu(self.n1(x))))))


class Autoencoder(nn.Module):
    def __init__(self, channels, codes, k, quantize):
        super().__init__()
        n = len(channels)
        enc = [nn.Conv2d(3, channels[0], 3, 1, 1)]
        for i in range(1, n - 1):
            enc += [sepconv(channels[i - 1], channels[i], 2), Residual(channels[i])]
        enc += [sepconv(channels[n - 2], channels[n - 1])]
        dec = [sepconv(channels[n - 1], channels[n - 2])]
        for i in range(n - 2, 0, -1):
            dec += [nn.Upsample(scale_factor=2, mode="nearest"), sepconv(channels[i], channels[i - 1]),
                    Residual(channels[i - 1])]
        dec += [nn.Conv2d(channels[0], 3, 3, 1, 1)]
        self.encoder, self.decoder, self.k, self.quantize = nn.Sequential(*enc), nn.Sequential(*dec), k, quantize
        self.codebook = nn.Parameter(torch.randn(codes, channels[-1]) / channels[-1] ** 0.5)
        self.log_tau = nn.Parameter(torch.tensor([0.1]).log())

    def forward(self, x):
        z = self.encoder(x)
        if not self.quantize:
            return self.decoder(z), 0.0
        b, c, h, w = z.shape
        with torch.autocast(z.device.type, enabled=False):
            rows = z.float().permute(0, 2, 3, 1).reshape(-1, c)
            logits = F.normalize(rows, dim=1) @ F.normalize(self.codebook, dim=1).t() / self.log_tau.exp()
            log_p = F.log_softmax(logits, 1)
            y = log_p.exp() @ self.codebook
            reg = -log_p.topk(self.k, dim=0).values.mean()
        y = y.reshape(b, h, w, c).permute(0, 3, 1, 2)
        return self.decoder(y), reg


def main():
    preset, quantizer = sys.argv[1], sys.argv[5]
    batch, steps, threads = (int(text) for text in sys.argv[2:5])
    p = PRESETS[preset]
    device = next((a for a in sys.argv[6:] if a.startswith("cuda")), "cpu")
    torch.set_num_threads(threads)
    torch.manual_seed(1)
    model = Autoencoder(p["channels"], p["codes"], p["k"], quantizer != "none")
    model = model.to(device, memory_format=torch.channels_last)
    parameters = [q for q in model.parameters()
                  if quantizer != "none" or (q is not model.codebook and q is not model.log_tau)]
    try:
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    except (TypeError, RuntimeError):
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.99), weight_decay=1e-4)
    net = torch.compile(model) if "compile" in sys.argv[6:] else model
    x = torch.randn(batch, 3, p["size"], p["size"]).to(device, memory_format=torch.channels_last)
    times = []
    for i in range(steps + 3):
        start = time.perf_counter()
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled="bf16" in sys.argv[6:]):
            y, reg = net(x)
        loss = F.mse_loss(y.float(), x) + reg
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        loss.item()
        if i >= 3:
            times.append((time.perf_counter() - start) * 1e3)
    print(f"{statistics.median(times):.4f} {min(times):.4f} {torch.__version__}")


main()
