/* span_mask.c: span_mask, distractors: what Wav2Vec 2.0 hides from its transformer, and what a hidden frame's code is
 * to be told from [Baevski et al. 2020, "wav2vec 2.0: a framework for self-supervised learning of speech
 * representations"; the rule of fairseq's compute_mask_indices].
 *
 * A row of `length` frames gets n = floor(probability length / span + u) spans, u uniform in [0, 1), and at least
 * `least`; they begin at different frames of 0 .. length - span - 1, so that the last frame is never masked, and may
 * overlap. Every row then loses masked frames at random until it has no more than the row with the fewest. A row too
 * short for a span is left whole, and the others are not thinned to it.
 *
 * Cost: O(T log T) a row. The random numbers are laid out in shared/span_mask.h.
 */
#include <stdlib.h>

#include "core/rng.h"
#include "cpu/scratch.h"
#include "shared/span_mask.h"

#include <omp.h>
#include <string.h>

enum { SERIAL_ROWS = 2 };

static int ascending(const void *a, const void *b)
{
    const uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

/* Returns what t is sorted by: its random word, then t itself. */
static uint64_t key_of(uint64_t seed, uint64_t stream, int64_t row, int64_t T, int64_t t, int frame)
{
    const vx_philox4 r = vx_philox(seed, stream, span_block(row, T, t, frame));
    return (uint64_t)r.word[t % 4] << 32 | (uint32_t)t;
}

/* Masks a row's spans. Returns how many frames are masked. keys: room for T. */
static int32_t mask_row(uint8_t *mask, uint64_t *keys, int64_t row, int64_t T, int64_t length, double probability,
                        int64_t span, int64_t least, uint64_t seed, uint64_t stream)
{
    const int64_t starts = length - span;
    const double u = vx_philox(seed, stream, (uint64_t)row * span_blocks(T)).word[0] * 0x1p-32;
    const int64_t n = span_count(length, starts, probability, span, least, u);
    memset(mask, 0, (size_t)T);
    if (!n) return 0;
    for (int64_t t = 0; t < starts; t++) keys[t] = key_of(seed, stream, row, T, t, 0);
    qsort(keys, (size_t)starts, sizeof *keys, ascending);
    for (int64_t i = 0; i < n; i++) memset(mask + (uint32_t)keys[i], 1, (size_t)span);
    int32_t count = 0;
    for (int64_t t = 0; t < T; t++) count += mask[t];
    return count;
}

/* Unmasks all but `kept` frames of a row. */
static void thin_row(uint8_t *mask, uint64_t *keys, int64_t row, int64_t T, int64_t kept, uint64_t seed,
                     uint64_t stream)
{
    int64_t count = 0;
    for (int64_t t = 0; t < T; t++)
        if (mask[t]) keys[count++] = key_of(seed, stream, row, T, t, 1);
    qsort(keys, (size_t)count, sizeof *keys, ascending);
    for (int64_t i = kept; i < count; i++) mask[(uint32_t)keys[i]] = 0;
}

/* Fills mask (B,T), frames (B,T): the masked places b T + t of all rows in ascending order, then -1, and count (B), how
 * many a row has. lengths (B): frames of each row, NULL: T. Working space: 8 T bytes a thread. */
int VX_CPU(span_mask)(vx_tensor *mask, vx_tensor *frames, vx_tensor *count, vx_tensor *lengths, double probability,
                      int64_t span, int64_t least, uint64_t seed, uint64_t stream)
{
    const int64_t B = mask->shape[0], T = mask->shape[1];
    uint8_t *masked = (uint8_t *)mask->data;
    int32_t *at = vx_i32(frames), *counts = vx_i32(count);
    const int32_t *length = lengths ? vx_i32(lengths) : 0;
    for (int64_t b = 0; length && b < B; b++)
        if (length[b] < 0 || length[b] > T)
            return vx_fail(VX_EINVAL, "span_mask: length %d of row %lld is outside 0 .. %lld", (int)length[b],
                           (long long)b, (long long)T);
    uint64_t *keys = vx_scratch("span_mask", sizeof *keys * (size_t)(T * omp_get_max_threads() + 1));
    if (!keys) return VX_ENOMEM;
#pragma omp parallel for schedule(static) if (B >= SERIAL_ROWS)
    for (int64_t b = 0; b < B; b++)
        counts[b] = mask_row(masked + b * T, keys + T * omp_get_thread_num(), b, T, length ? length[b] : T, probability,
                             span, least, seed, stream);
    int32_t fewest = INT32_MAX;
    for (int64_t b = 0; b < B; b++)
        if (counts[b] && counts[b] < fewest) fewest = counts[b];
#pragma omp parallel for schedule(static) if (B >= SERIAL_ROWS)
    for (int64_t b = 0; b < B; b++)
        if (counts[b] > fewest) {
            thin_row(masked + b * T, keys + T * omp_get_thread_num(), b, T, fewest, seed, stream);
            counts[b] = fewest;
        }
    vx_scratch_free(keys);
    int64_t n = 0;
    for (int64_t i = 0; i < B * T; i++)
        if (masked[i]) at[n++] = (int32_t)i;
    while (n < B * T) at[n++] = -1;
    return VX_OK;
}

/* Fills distractors (N,K): for the masked frame n, K places of others of its row among the N, with replacement. frames
 * (N): ascending places b T + t. */
int VX_CPU(distractors)(vx_tensor *distractors, vx_tensor *frames, int64_t T, uint64_t seed, uint64_t stream)
{
    const int64_t N = distractors->shape[0], K = distractors->shape[1];
    const int32_t *at = vx_i32(frames);
    int32_t *to = vx_i32(distractors);
    for (int64_t n = 0; n < N; n++) {
        if (at[n] < 0 || (n && at[n] <= at[n - 1]))
            return vx_fail(VX_EINVAL, "distractors: frame %d at place %lld, expected ascending places from 0 on",
                           (int)at[n], (long long)n);
        const int64_t row = at[n] / T;
        if ((!n || at[n - 1] / T != row) && (n + 1 == N || at[n + 1] / T != row))
            return vx_fail(VX_EINVAL, "distractors: row %lld has one masked frame, expected two or more",
                           (long long)row);
    }
    int64_t end = 0;
    for (int64_t first = 0; first < N; first = end) {
        while (end < N && at[end] / T == at[first] / T) end++;
#pragma omp parallel for schedule(static) if ((end - first) * K >= 4096)
        for (int64_t n = first; n < end; n++)
            for (int64_t k = 0; k < K; k++) {
                const uint64_t e = (uint64_t)(n * K + k);
                to[e] = (int32_t)distractor_of(vx_philox(seed, stream, e / 4).word[e % 4], first, end - first, n);
            }
    }
    return VX_OK;
}
