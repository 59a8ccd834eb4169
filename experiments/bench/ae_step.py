"""The autoencoder of experiments/autoencoder.lua in PyTorch: median and least milliseconds of a training step
(forward, backward, AdamW).

    python3 experiments/bench/ae_step.py PRESET BATCH STEPS THREADS METHOD [compile] [bf16] [cuda:0]

Channels-last, float32, as fast as eager PyTorch lets it be: group norm and SiLU by its own kernels, depthwise
separable convolutions, fused AdamW where the version has it. With bf16 the network runs under torch.autocast, the
quantizer in float32. METHOD is none, softmax-knn-ce (the paper's, written out), or one that vector-quantize-pytorch
has: ema-euclid, simvq, fsq, rvq-euclid, with the options that Vertex has by default (straight through, which is the
package's faster form). Called by ae_step.lua, which interleaves it with Vertex.
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


def levels(codes):
    """Those that Vertex chooses: from 8 down, as often as each divides what is left."""
    found = []
    for level in range(8, 1, -1):
        while codes % level == 0 and (codes == level or codes // level >= 2):
            found.append(level)
            codes //= level
    return found


class SoftmaxKnnCe(nn.Module):
    def __init__(self, dim, codes, k):
        super().__init__()
        self.k = k
        self.codebook = nn.Parameter(torch.randn(codes, dim) / dim ** 0.5)
        self.log_tau = nn.Parameter(torch.tensor([0.1]).log())

    def forward(self, z):
        rows = z.reshape(-1, z.shape[-1])
        logits = F.normalize(rows, dim=1) @ F.normalize(self.codebook, dim=1).t() / self.log_tau.exp()
        log_p = F.log_softmax(logits, 1)
        return (log_p.exp() @ self.codebook).reshape(z.shape), -log_p.topk(self.k, dim=0).values.mean()


class Packaged(nn.Module):
    """A quantizer of vector-quantize-pytorch: rows (B, T, D) -> quantized, loss."""

    def __init__(self, method, dim, codes):
        super().__init__()
        import vector_quantize_pytorch as package
        if method == "ema-euclid":
            self.inner = package.VectorQuantize(dim, codes, rotation_trick=False)
        elif method == "rvq-euclid":
            self.inner = package.ResidualVQ(dim=dim, codebook_size=codes, num_quantizers=4, rotation_trick=False)
        elif method == "simvq":
            self.inner = package.SimVQ(dim, codes, rotation_trick=False)
        else:
            self.inner = package.FSQ(levels(codes), dim=dim)

    def forward(self, z):
        out = self.inner(z)
        return out[0], out[2].sum() if len(out) > 2 else 0.0


def make_quantizer(method, dim, codes, k):
    if method == "none":
        return None
    return SoftmaxKnnCe(dim, codes, k) if method == "softmax-knn-ce" else Packaged(method, dim, codes)


class Autoencoder(nn.Module):
    def __init__(self, channels, quantizer):
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
        self.encoder, self.decoder, self.quantizer = nn.Sequential(*enc), nn.Sequential(*dec), quantizer

    def forward(self, x):
        z = self.encoder(x)
        if self.quantizer is None:
            return self.decoder(z), 0.0
        b, c, h, w = z.shape
        with torch.autocast(z.device.type, enabled=False):
            y, reg = self.quantizer(z.float().permute(0, 2, 3, 1).reshape(b, h * w, c))
        return self.decoder(y.reshape(b, h, w, c).permute(0, 3, 1, 2)), reg


def main():
    preset, method = sys.argv[1], sys.argv[5]
    batch, steps, threads = (int(text) for text in sys.argv[2:5])
    p = PRESETS[preset]
    device = next((a for a in sys.argv[6:] if a.startswith("cuda")), "cpu")
    torch.set_num_threads(threads)
    torch.manual_seed(1)
    model = Autoencoder(p["channels"], make_quantizer(method, p["channels"][-1], p["codes"], p["k"]))
    model = model.to(device, memory_format=torch.channels_last)
    parameters = [q for q in model.parameters() if q.requires_grad]
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
