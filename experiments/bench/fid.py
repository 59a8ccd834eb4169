#!/usr/bin/env python3
"""The Fréchet distance of two sets of features by NumPy and SciPy; experiments/bench/fid.lua calls it.

    python3 fid.py a.npy b.npy WAY        prints the distance and seconds, those of the covariances among them

WAY is how the trace of the covariances' root is found: geig, eigenvalues of the product by scipy.linalg.eigvalsh (the
shortest); eigh, by numpy.linalg.eigh (a root of the one, then eigenvalues); sqrtm, as pytorch-fid does.
"""
import sys
import time

import numpy as np
import scipy.linalg

a, b = np.load(sys.argv[1]), np.load(sys.argv[2])
way = sys.argv[3]
began = time.perf_counter()
a, b = a.astype(np.float64), b.astype(np.float64)
m1, s1, m2, s2 = a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False)
if way == "sqrtm":
    root = np.trace(scipy.linalg.sqrtm(s1 @ s2).real)
elif way == "eigh":
    w, v = np.linalg.eigh(s1)
    r = v * np.sqrt(np.maximum(w, 0)) @ v.T
    root = np.sqrt(np.maximum(np.linalg.eigvalsh(r @ s2 @ r), 0)).sum()
else:
    root = np.sqrt(np.maximum(scipy.linalg.eigvalsh(s2, s1, type=2), 0)).sum()
distance = ((m1 - m2) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * root
print(repr(float(distance)), time.perf_counter() - began)
