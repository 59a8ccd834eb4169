"""k-means of faiss or scikit-learn from given first codes: seconds of an iteration, mean squared distance, version.

    python3 experiments/bench/kmeans.py {faiss,sklearn} X.npy START.npy ITERATIONS THREADS

Called by kmeans.lua. faiss samples unless told not to (max_points_per_centroid); scikit-learn stops early unless its
tolerance is 0.
"""
import sys
import time

import numpy as np

package, iterations, threads = sys.argv[1], int(sys.argv[4]), int(sys.argv[5])
x, start = np.load(sys.argv[2]), np.load(sys.argv[3])
if package == "faiss":
    import faiss

    faiss.omp_set_num_threads(threads)
    kmeans = faiss.Kmeans(x.shape[1], len(start), niter=iterations, max_points_per_centroid=len(x),
                          min_points_per_centroid=1)
    began = time.perf_counter()
    kmeans.train(x, init_centroids=start)
    squared, _ = kmeans.index.search(x, 1)
    seconds, objective, version = time.perf_counter() - began, squared.mean(dtype=np.float64), faiss.__version__
else:
    import sklearn
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    with threadpool_limits(threads):
        began = time.perf_counter()
        found = KMeans(len(start), init=start, n_init=1, max_iter=iterations, tol=0, algorithm="lloyd").fit(x)
    seconds, objective, version = time.perf_counter() - began, found.inertia_ / len(x), sklearn.__version__
print(seconds / iterations, objective, version)
