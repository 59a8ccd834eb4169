#!/usr/bin/env python3
"""Makes own.*.safetensors: float64 results for the options that the other files here leave at their defaults.

    python3 tests/golden/make.py [folder]        needs numpy and torch; the same files come out every time

Each file holds z, codebook, log_tau, gumbel, cotangent and what a training forward and backward should give for them:
quantized, reg (with its weight), codes, and the gradients of sum(quantized * cotangent) / n + reg. The metadata names
method and options.
The formulas are written here a second time, from their definitions, and differentiated by torch's autograd.
"""
import json
import os
import struct
import sys

import numpy as np
import torch

torch.set_default_dtype(torch.float64)


def sphere(x):
    return x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def rotate(z, q):
    """lambda R z with lambda and R constant."""
    with torch.no_grad():
        nz, nq = z.norm(dim=-1, keepdim=True), q.norm(dim=-1, keepdim=True)
        zh, qh = z / nz, q / nq
        r = sphere(zh + qh)
        scale = nq / nz
    return scale * (z - 2 * r * (r * z).sum(-1, keepdim=True) + 2 * qh * (zh * z).sum(-1, keepdim=True))


def hard(estimator, metric, z, book, o):
    if metric == "cosine":
        z, book = sphere(z), sphere(book)
    distance = ((z[:, None, :] - book[None]) ** 2).sum(-1)
    code = distance.argmin(1)
    check_margin(-distance)
    q = book[code]
    if estimator == "ste":
        y = (q if o["codebook_grad"] else q.detach()) + z - z.detach()
    else:
        y = rotate(z, q.detach())
    squares = o["beta"] * (z - q.detach()) ** 2 + (z.detach() - q) ** 2
    reg = squares.sum(1).mean() if o["reduction"] == "sum" else squares.mean()
    return y, reg, code


def check_margin(score):
    """float32 must not be able to choose another code."""
    if score.shape[1] < 2:
        return
    best = score.detach().topk(2, dim=1).values
    assert ((best[:, 0] - best[:, 1]) > 1e-5 * best.abs().max()).all()


def nearest(score, k, shards):
    """Rows of the k largest in each column: k / shards from each part of the rows, ties to the lowest row."""
    n = score.shape[0]
    chosen = []
    for h in range(shards):
        a, b = h * n // shards, (h + 1) * n // shards
        chosen.append(a + torch.argsort(score[a:b].detach(), dim=0, descending=True, stable=True)[: k // shards])
    return torch.cat(chosen)


def dirichlet_mle(log_p):
    """Newton's method from far below, damped; then one more step that autograd sees, which has the gradient of the
    maximum."""
    g, alpha = log_p.mean(0), None
    target = g.detach()
    alpha = torch.full_like(target, 1e-3)
    psi = torch.digamma

    def step(alpha, g):
        trigamma, whole = torch.polygamma(1, alpha), torch.polygamma(1, alpha.sum())
        slope = g - psi(alpha) + psi(alpha.sum())
        shift = (slope / trigamma).sum() / (1 / whole - (1 / trigamma).sum())
        return (slope + shift) / trigamma

    for _ in range(2000):
        move = step(alpha, target)
        alpha = torch.maximum(alpha + move, alpha / 2)
    assert (step(alpha, target).abs() < 1e-11 * alpha).all()
    return alpha + step(alpha, g)


def dirichlet_kl(a, b):
    def log_beta(x):
        return torch.lgamma(x).sum() - torch.lgamma(x.sum())

    return log_beta(b) - log_beta(a) + ((a - b) * (torch.digamma(a) - torch.digamma(a.sum()))).sum()


def perez_cruz(p, q, k):
    """The estimate of KL(P | Q) from points of each, over the dimension of the simplex."""

    def squared(a, b):
        return ((a[:, None, :] - b[None]) ** 2).sum(-1)

    nu = squared(p, q).sort(1).values[:, k - 1]
    own = squared(p, p)
    rho = (own + torch.diag(torch.full((len(p),), torch.inf))).sort(1).values[:, k - 1]
    assert rho.min() > 1e-20 and nu.min() > 1e-20
    return ((nu.log() - rho.log()).mean() / 2) + np.log(len(q) / (len(p) - 1)) / (p.shape[1] - 1)


def smooth(sampler, regularizer, z, book, log_tau, gumbel, o, vertices, prior):
    logits = sphere(z) @ sphere(book).T / log_tau.exp()
    log_pi = torch.log_softmax(logits, dim=1)
    pi = log_pi.exp()
    p = pi if sampler == "softmax" else torch.softmax((log_pi + gumbel) / o["gumbel_tau"], dim=1)
    check_margin(p.log())
    code = p.argmax(1)
    if sampler == "hgumbel":
        hot = torch.nn.functional.one_hot(code, book.shape[0]).to(p)
        y = hot @ book + (p - p.detach()) @ book.detach()
    else:
        y = p @ book
    if regularizer == "none":
        reg = torch.zeros(())
    elif regularizer == "dirichlet":
        m = book.shape[0]
        alpha = torch.full((m,), o["alpha"])
        expected = torch.digamma(alpha) - torch.digamma(alpha.sum())
        reg = dirichlet_kl(alpha, dirichlet_mle(torch.cat([log_pi, expected[None]]))) / m
    elif regularizer == "pkl":
        reg = perez_cruz(prior, pi, o["neighbour"])
    elif regularizer == "ppl":
        mean = pi.mean(0)
        reg = 1 - torch.exp(-(mean * mean.log()).sum()) / book.shape[0]
    else:
        which = torch.arange(book.shape[0]) if vertices is None else vertices
        deviation = -log_pi if regularizer == "knn-ce" else 1 - 2 * pi + (pi**2).sum(1, keepdim=True)
        deviation = deviation[:, which]
        reg = torch.gather(deviation, 0, nearest(-deviation, o["k"], o["shards"])).mean()
    return y, reg, code


def save(path, arrays, metadata):
    header, offset, blobs = {"__metadata__": metadata}, 0, []
    for name in sorted(arrays):
        a = np.ascontiguousarray(arrays[name])
        kind = {"float32": "F32", "int32": "I32"}[str(a.dtype)]
        header[name] = {"dtype": kind, "shape": list(a.shape), "data_offsets": [offset, offset + a.nbytes]}
        offset += a.nbytes
        blobs.append(a.tobytes())
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text + b"".join(blobs))


DEFAULTS = dict(groups=1, k=4, tau=0.15, beta=1.0, weight=1.0, gumbel_tau=1.0, shards=1, reduction="sum",
                codebook_grad=True, vertices=0)
# Of a hard method estimator and metric, of a smoothed one sampler and regularizer.
HARD = {
    "ste-euclid": ("ste", "euclid"),
    "ste-cosine": ("ste", "cosine"),
    "re-euclid": ("rotation", "euclid"),
    "re-cosine": ("rotation", "cosine"),
}
SAMPLERS, REGULARIZERS = ("hgumbel", "sgumbel", "softmax"), ("ppl", "knn-l2", "knn-ce", "none", "dirichlet", "pkl")
SMOOTH = {f"{sampler}-{regularizer}": (sampler, regularizer) for sampler in SAMPLERS for regularizer in REGULARIZERS}
OWN = {"softmax-dirichlet": dict(alpha=0.5), "softmax-pkl": dict(alpha=0.0, neighbour=1)}  # alpha 0: 1 / codes

#         label, method, n, dim, codes, options
CASES = [
    ("vertices", "softmax-knn-ce", 40, 12, 12, dict(groups=2, vertices=5)),
    ("vertices", "sgumbel-knn-l2", 40, 6, 70, dict(vertices=9, k=3)),
    ("shards", "softmax-knn-l2", 42, 6, 10, dict(shards=3, k=6)),
    ("shards", "hgumbel-knn-ce", 41, 8, 11, dict(shards=2, groups=2)),
    ("gumbel-tau", "sgumbel-ppl", 40, 6, 17, dict(gumbel_tau=0.5)),
    ("gumbel-tau", "hgumbel-knn-ce", 40, 6, 17, dict(gumbel_tau=2.0)),
    ("no-codebook-grad", "ste-euclid", 40, 6, 12, dict(codebook_grad=False)),
    ("no-codebook-grad", "ste-cosine", 40, 6, 12, dict(codebook_grad=False)),
    ("mean", "re-euclid", 40, 6, 12, dict(reduction="mean", beta=0.25)),
    ("mean", "ste-cosine", 40, 6, 12, dict(reduction="mean", groups=2)),
    ("weight", "softmax-ppl", 40, 6, 12, dict(weight=2.5)),
    ("weight", "re-cosine", 40, 6, 12, dict(weight=0.5, beta=2.0)),
    ("weight", "sgumbel-knn-ce", 40, 6, 12, dict(weight=0.125)),
    ("none", "softmax-none", 40, 6, 12, dict()),
    ("none", "sgumbel-none", 40, 6, 12, dict(groups=3)),
    ("none", "hgumbel-none", 40, 6, 12, dict(gumbel_tau=0.7)),
    ("panels", "sgumbel-knn-ce", 70, 17, 130, dict(tau=0.05)),
    ("panels", "softmax-knn-l2", 70, 33, 65, dict(tau=0.04)),
    ("plane", "softmax-knn-ce", 30, 2, 3, dict(k=2, tau=0.5)),
    ("single", "softmax-knn-ce", 7, 5, 1, dict(k=7, tau=0.5)),
    ("all-rows", "hgumbel-knn-l2", 9, 5, 20, dict(k=9)),
    ("prior", "softmax-dirichlet", 40, 6, 12, dict()),
    ("prior", "softmax-pkl", 40, 6, 12, dict()),
    ("other-prior", "softmax-dirichlet", 50, 12, 20, dict(groups=2, alpha=0.05, tau=0.4, weight=0.5)),
    ("other-prior", "softmax-pkl", 50, 12, 20, dict(groups=2, alpha=0.5, tau=0.4, neighbour=3)),
]


def make(folder):
    for number, (label, method, n, dim, codes, given) in enumerate(CASES):
        o = {**DEFAULTS, **OWN.get(method, {}), **given}
        rng = np.random.default_rng(5000 + number)
        g, width = o["groups"], dim // o["groups"]

        def draw(*shape):
            return rng.standard_normal(shape).astype(np.float32)

        a = {"z": draw(n, dim), "codebook": draw(g, codes, width), "cotangent": draw(n, dim)}
        a["log_tau"] = np.log(np.array([o["tau"]])).astype(np.float32)
        a["gumbel"] = -np.log(-np.log(rng.uniform(1e-6, 1 - 1e-6, (n, g, codes)))).astype(np.float32)
        if o["vertices"]:
            a["vertices"] = np.stack([rng.permutation(codes)[: o["vertices"]] for _ in range(g)]).astype(np.int32)
        if method == "softmax-pkl":
            a["prior"] = rng.dirichlet(np.full(codes, o["alpha"] or 1 / codes), n + 7).astype(np.float32)
        prior = torch.tensor(a["prior"].astype(np.float64)) if "prior" in a else None
        z, book, log_tau = (torch.tensor(a[name].astype(np.float64), requires_grad=True)
                            for name in ("z", "codebook", "log_tau"))
        ys, regs, cs = [], [], []
        for i in range(g):
            part = z[:, i * width : (i + 1) * width]
            if method in HARD:
                y, reg, code = hard(*HARD[method], part, book[i], o)
            else:
                which = torch.tensor(a["vertices"][i].astype(np.int64)) if o["vertices"] else None
                noise = torch.tensor(a["gumbel"][:, i].astype(np.float64))
                y, reg, code = smooth(*SMOOTH[method], part, book[i], log_tau, noise, o, which, prior)
            ys.append(y), regs.append(reg), cs.append(code)
        quantized, reg = torch.cat(ys, 1), o["weight"] * sum(regs) / g
        total = (quantized * torch.tensor(a["cotangent"].astype(np.float64))).sum() / n + reg
        total.backward()

        def f32(x):
            return x.detach().numpy().astype(np.float32)

        a["quantized"], a["reg"] = f32(quantized), f32(reg).reshape(1)
        a["codes"] = torch.stack(cs, 1).numpy().astype(np.int32)
        for name, x in (("z", z), ("codebook", book), ("log_tau", log_tau)):
            a["grad_" + name] = f32(x.grad if x.grad is not None else torch.zeros_like(x))
        metadata = {"method": method, "case": label, "n": str(n), "dim": str(dim), "codes": str(codes),
                    "total": "sum(quantized * cotangent)/n + reg"}
        metadata.update({key: str(value) for key, value in o.items()})
        save(os.path.join(folder, f"own.{label}.{method}.safetensors"), a, metadata)


if __name__ == "__main__":
    make(sys.argv[1] if len(sys.argv) > 1 else os.path.dirname(os.path.abspath(__file__)))
