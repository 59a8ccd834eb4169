#!/usr/bin/env python3
"""Makes fid/frechet.safetensors: features, their moments, Fréchet distances and an Inception Score by NumPy and SciPy.

    python3 tests/golden/make_frechet.py           needs numpy and scipy; their versions are kept

CASE.a and CASE.b are float32 features. The metadata holds in decimals what follows from them in float64:
CASE.frechet, |m_a - m_b|^2 + tr S_a + tr S_b - 2 tr (S_a S_b)^1/2 with the trace as the sum of the singular values of
F_a F_b', F the centred rows over sqrt(n - 1), which takes no root of a matrix; CASE.sqrtm, the same by
scipy.linalg.sqrtm. scores.logits are float32 logits, whose Inception Score over splits of rows floor(i N / 10) on is
scores.mean and scores.deviation (population).
"""
import json
import os
import struct

import numpy as np
import scipy
import scipy.linalg

generator = np.random.RandomState(7)


def normal(n, d):
    return generator.standard_normal((n, d))


def conditioned(n, d, condition):
    """Rows whose covariance has eigenvalues from 1 down to 1 / condition, in random directions."""
    q, _ = np.linalg.qr(normal(d, d))
    return normal(n, d) * condition ** (-0.5 * np.arange(d) / (d - 1)) @ q


def cases():
    d = 24
    shared = normal(6, d)
    yield "well", normal(200, d), 1.2 * normal(150, d) + 0.3
    yield "ill", conditioned(300, d, 1e10), conditioned(200, d, 1e10)
    yield "offset", 1000 + normal(120, d), 1001 + 0.5 * normal(90, d)
    yield "few", normal(9, d), normal(14, d) + 0.5
    yield "few-a", normal(9, d), normal(90, d)
    yield "few-b", normal(90, d), normal(9, d)
    yield "equal-size", normal(d, d), normal(d + 1, d)
    yield "subspace", normal(80, 6) @ shared, normal(70, 6) @ shared + 1
    yield "subspaces", normal(80, 6) @ normal(6, d), normal(70, 9) @ normal(9, d)
    yield "constant-feature", normal(60, d) * (np.arange(d) != 3), normal(60, d) * (np.arange(d) != 3)


def moments(x):
    return x.mean(0), np.cov(x, rowvar=False)


def exact(a, b):
    (m1, s1), (m2, s2) = moments(a), moments(b)
    f1, f2 = (a - m1) / np.sqrt(len(a) - 1), (b - m2) / np.sqrt(len(b) - 1)
    root = scipy.linalg.svdvals(f1 @ f2.T).sum()
    return ((m1 - m2) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * root


def by_sqrtm(a, b):
    (m1, s1), (m2, s2) = moments(a), moments(b)
    return ((m1 - m2) ** 2).sum() + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2).real)


def inception_score(logits, splits=10):
    p = scipy.special.softmax(logits, axis=1)
    scores = []
    for i in range(splits):
        part = p[i * len(p) // splits:(i + 1) * len(p) // splits]
        scores.append(np.exp((part * (np.log(part) - np.log(part.mean(0)))).sum(1).mean()))
    return np.mean(scores), np.std(scores)


tensors, metadata = {}, {"numpy": np.__version__, "scipy": scipy.__version__}
for name, a, b in cases():
    a, b = a.astype("<f4"), b.astype("<f4")
    tensors[name + ".a"], tensors[name + ".b"] = a, b
    a, b = a.astype(np.float64), b.astype(np.float64)
    metadata[name + ".frechet"], metadata[name + ".sqrtm"] = repr(float(exact(a, b))), repr(float(by_sqrtm(a, b)))
    print(name, metadata[name + ".frechet"], metadata[name + ".sqrtm"])
well = tensors["well.a"].astype(np.float64)
metadata["well.mean"] = json.dumps(well.mean(0).tolist())
metadata["well.covariance"] = json.dumps(np.cov(well, rowvar=False).tolist())
logits = (3 * normal(97, 12)).astype("<f4")
tensors["scores.logits"] = logits
mean, deviation = inception_score(logits.astype(np.float64))
metadata["scores.mean"], metadata["scores.deviation"] = repr(float(mean)), repr(float(deviation))

header, at = {"__metadata__": metadata}, 0
for name, x in tensors.items():
    header[name] = {"dtype": "F32", "shape": list(x.shape), "data_offsets": [at, at + x.nbytes]}
    at += x.nbytes
text = json.dumps(header).encode()
text += b" " * (-len(text) % 8)
with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "fid", "frechet.safetensors"), "wb") as f:
    f.write(struct.pack("<Q", len(text)) + text + b"".join(x.tobytes() for x in tensors.values()))
