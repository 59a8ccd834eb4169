/* kmeans_start.c: rows that k-means begins with, by k-means++ [1]: the first at random, each further one with a
 * probability proportional to its squared distance from the nearest row chosen before.
 *
 * Distances are of differences, x - c, so that rows far from the origin lose nothing; very large and very small rows
 * are scaled before (frame.h). They are added up in double in
 * blocks of BLOCK_ROWS, whose sums are added in order: the choice does not depend on the number of threads. Cost: M
 * passes over x, 3 N D flops each. Working space: 4 (N + M) bytes.
 *
 * [1] Arthur and Vassilvitskii 2007, k-means++: the advantages of careful seeding
 */
#include "frame.h"
#include "cpu/row_norms.h"
#include "cpu/scratch.h"

enum { BLOCK_ROWS = 256 };

/* Draws number i of (seed, stream): uniform in (0, 1), with 53 bits. */
static double draw(uint64_t seed, uint64_t stream, int64_t i)
{
    vx_philox4 r = vx_philox(seed, stream, (uint64_t)i);
    return ((double)(r.word[0] >> 5) * 67108864.0 + (double)(r.word[1] >> 6) + 0.5) / 9007199254740992.0;
}

/* Returns |scale a - scale b|^2 of D elements. */
static inline float squared_distance(const float *a, const float *b, int64_t D, float scale)
{
    vf sum = vf_zero();
    int64_t d = 0;
    for (; d + VX_LANES <= D; d += VX_LANES) {
        vf difference = vf_load(a + d) * scale - vf_load(b + d) * scale;
        sum += difference * difference;
    }
    vf rest = vf_load_n(a + d, (int)(D - d)) * scale - vf_load_n(b + d, (int)(D - d)) * scale;
    return vf_sum(sum + rest * rest);
}

/* Finds the row in whose share of the sum of `nearest` the number target, of 0 .. total, falls. */
static int64_t find(const float *nearest, int64_t N, const double *sums, int64_t blocks, double target)
{
    int64_t block = 0;
    while (block + 1 < blocks && target >= sums[block]) target -= sums[block++];
    int64_t end = vx_min64(N, (block + 1) * BLOCK_ROWS), last = -1;
    for (int64_t n = block * BLOCK_ROWS; n < end; n++) {
        if (nearest[n] > 0) last = n;
        if (nearest[n] > 0 && target < nearest[n]) return n;
        target -= nearest[n];
    }
    while (last < 0) /* rounding may leave a target at the end of a block without a share */
        for (int64_t n = --block * BLOCK_ROWS; n < (block + 1) * BLOCK_ROWS; n++)
            if (nearest[n] > 0) last = n;
    return last;
}

/* Chooses index (M), rows of x (N,D), 0-based. Once every row equals a chosen one, more are drawn evenly and repeat.
 * Where x is refused, index stays as it was. */
int VX_CPU(kmeans_start)(vx_tensor *index, vx_tensor *x, uint64_t seed, uint64_t stream)
{
    const int64_t N = x->shape[0], D = x->shape[1], M = index->shape[0], blocks = vx_ceil_div(N, BLOCK_ROWS);
    const float *rows = vx_f32(x);
    int64_t bad = first_nonfinite(rows, N, D, 0);
    if (bad >= 0) return vx_fail(VX_ENONFINITE, "kmeans_start: row %lld of x holds a NaN or Inf", (long long)bad);
    const float scale = frame_scale(largest_of(rows, N * D));
    double *sums = 0;
    float *nearest = 0;
    int32_t *start = 0;
    scratch memory = {.op = "kmeans_start"};
    while (scratch_pass(&memory)) {
        sums = carve_f64(&memory, blocks);
        nearest = carve_f32(&memory, N);
        start = carve_i32(&memory, M);
    }
    if (!memory.base) return VX_ENOMEM;
    double total = 0;
    for (int64_t m = 0; m < M; m++) {
        const double u = draw(seed, stream, m);
        const int64_t chosen = total > 0 ? find(nearest, N, sums, blocks, u * total) : (int64_t)(u * (double)N);
        start[m] = (int32_t)chosen;
        if (m + 1 == M) break;
        const float *center = rows + chosen * D;
#pragma omp parallel for schedule(static)
        for (int64_t block = 0; block < blocks; block++) {
            double sum = 0;
            for (int64_t n = block * BLOCK_ROWS; n < vx_min64(N, (block + 1) * BLOCK_ROWS); n++) {
                float distance = squared_distance(rows + n * D, center, D, scale);
                if (m == 0 || distance < nearest[n]) nearest[n] = distance;
                sum += nearest[n];
            }
            sums[block] = sum;
        }
        total = 0;
        for (int64_t block = 0; block < blocks; block++) total += sums[block];
    }
    memcpy(vx_i32(index), start, (size_t)M * sizeof *start);
    scratch_free(&memory);
    return VX_OK;
}
