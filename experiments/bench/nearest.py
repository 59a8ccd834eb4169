"""The nearest code by the k-means of faiss and of scikit-learn: a worker of quantizer.lua, as quantizer.py is.

    python3 nearest.py BASELINE METRIC N D M THREADS INPUTS RESULT CLOCK

Baselines:
    faiss    IndexFlatL2 (cosine: IndexFlatIP of unit vectors), which faiss.Kmeans assigns with: search(z, 1)
    sklearn  KMeans.predict with the codes as its centers: the assignment of Lloyd's algorithm
"""
import os
import resource
import sys
import time

baseline, metric = sys.argv[1:3]
n, d, m, threads = map(int, sys.argv[3:7])
inputs, result_path = sys.argv[7:9]
clock = time.process_time if sys.argv[9] == "processor" else time.perf_counter
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = str(threads)

import numpy as np  # noqa: E402  threads first


def unit(x):
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def of_faiss(codebook):
    import faiss
    faiss.omp_set_num_threads(threads)

    def nearest(z, codes):
        index = faiss.IndexFlatL2(d) if metric == "euclid" else faiss.IndexFlatIP(d)
        index.add(codes if metric == "euclid" else unit(codes))
        return index.search(z, 1)[1][:, 0]  # the length of z does not matter to the order of products
    return nearest, faiss.__version__


def of_sklearn(codebook):
    import sklearn
    from sklearn.cluster import KMeans
    means = KMeans(n_clusters=len(codebook), init=codebook, n_init=1, max_iter=1).fit(codebook)

    def nearest(z, codes):
        means.cluster_centers_ = codes if metric == "euclid" else unit(codes)
        return means.predict(z if metric == "euclid" else unit(z))
    return nearest, sklearn.__version__


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


numbers = np.fromfile(inputs, np.float32)
rows, codebook = numbers[:n * d].reshape(n, d), numbers[n * d:(n + m) * d].reshape(m, d)
nearest, version = {"faiss": of_faiss, "sklearn": of_sklearn}[baseline](codebook)
codes, base = nearest(rows[:64], codebook), peak()
print("ready", version, flush=True)
for line in sys.stdin:
    command = line.strip()
    if command == "run":
        start = clock()
        codes = nearest(rows, codebook)
        print(f"{(clock() - start) * 1e3:.4f} 0", flush=True)
    elif command == "save":
        codes.astype(np.int32).tofile(result_path)
        print("saved", flush=True)
    elif command == "memory":
        print(peak() - base, flush=True)
