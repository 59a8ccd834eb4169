/* span_mask.cu: span_mask, distractors on CUDA: the numbers of span_mask.c, which says what they mean.
 *
 * A block takes a row. Instead of sorting, a thread counts the keys below its own: O(T^2) comparisons a row, T a few
 * hundred. What is wrong with lengths or frames is reported late, and such a row is treated as one that is not.
 */
#include "cuda/cuda.cuh"
#include "shared/span_mask.h"

enum { BLOCK = 256 };

/* Says whether t is among the first n of the candidates, those of 0 .. count - 1 for which mask (NULL: all) is set. */
VX_DEVICE bool among_first(const uint32_t *words, const uint8_t *mask, int64_t count, int64_t t, int64_t n)
{
    const uint32_t own = words[t];
    int64_t before = 0;
    for (int64_t i = 0; i < count; i++)
        if (!mask || mask[i]) before += words[i] < own || (words[i] == own && i < t);
    return before < n;
}

/* Draws the words of a row's starts, or frames. */
VX_DEVICE void draw_words(uint32_t *words, vx_draw draw, int64_t row, int64_t T, int64_t count, int frame)
{
    for (int64_t t = threadIdx.x; t < count; t += BLOCK)
        words[t] = vx_philox(draw.seed, draw.stream, span_block(row, T, t, frame)).word[t % 4];
    __syncthreads();
}

/* Masks a row's spans and counts its masked frames; words (B,T), chosen (B,T): working space. */
VX_KERNEL mask_kernel(uint8_t *mask, int32_t *counts, uint32_t *words, uint8_t *chosen, const int32_t *lengths,
                      int64_t B, int64_t T, double probability, int64_t span, int64_t least, vx_random random,
                      vx_data_check outside)
{
    __shared__ float shared[32];
    const vx_draw draw = vx_draw_now(random);
    for (int64_t b = blockIdx.x; b < B; b += gridDim.x) {
        int64_t length = lengths ? lengths[b] : T;
        if (length < 0 || length > T) {
            if (threadIdx.x == 0) vx_report(outside, b);
            length = 0;
        }
        const int64_t starts = length - span;
        const double u = vx_philox(draw.seed, draw.stream, (uint64_t)b * span_blocks(T)).word[0] * 0x1p-32;
        const int64_t n = span_count(length, starts, probability, span, least, u);
        draw_words(words + b * T, draw, b, T, starts, 0);
        for (int64_t t = threadIdx.x; t < T; t += BLOCK)
            chosen[b * T + t] = n > 0 && t < starts && among_first(words + b * T, NULL, starts, t, n);
        __syncthreads();
        float count = 0; /* exact: T < 2^24 */
        for (int64_t t = threadIdx.x; t < T; t += BLOCK) {
            uint8_t covered = 0;
            for (int64_t i = max((long long)0, (long long)(t - span + 1)); i <= t; i++) covered |= chosen[b * T + i];
            mask[b * T + t] = covered;
            count += covered;
        }
        count = vx_block_sum(count, shared);
        if (threadIdx.x == 0) counts[b] = (int32_t)count;
        __syncthreads();
    }
}

/* Finds the fewest masked frames of a row that has any; one thread. */
VX_KERNEL fewest_kernel(int32_t *fewest, const int32_t *counts, int64_t B)
{
    int32_t least = INT32_MAX;
    for (int64_t b = 0; b < B; b++)
        if (counts[b] && counts[b] < least) least = counts[b];
    *fewest = least;
}

/* Unmasks all but the first *fewest frames of a row; kept (B,T): working space. */
VX_KERNEL thin_kernel(uint8_t *mask, const int32_t *counts, uint32_t *words, uint8_t *kept, const int32_t *fewest,
                      int64_t B, int64_t T, vx_random random)
{
    const vx_draw draw = vx_draw_now(random);
    for (int64_t b = blockIdx.x; b < B; b += gridDim.x) {
        const bool thinned = counts[b] > *fewest;
        draw_words(words + b * T, draw, b, T, thinned ? T : 0, 1);
        for (int64_t t = threadIdx.x; t < T; t += BLOCK)
            kept[b * T + t] = mask[b * T + t] && (!thinned || among_first(words + b * T, mask + b * T, T, t, *fewest));
        __syncthreads();
        for (int64_t t = threadIdx.x; t < T; t += BLOCK) mask[b * T + t] = kept[b * T + t];
        __syncthreads();
    }
}

/* Writes a row's masked places behind those of the rows before it, and its part of the -1 at the end; every row that
 * has any has *fewest. A block for each row. */
VX_KERNEL place_kernel(int32_t *frames, int32_t *counts, const uint8_t *mask, const int32_t *raw, const int32_t *fewest,
                       int64_t B, int64_t T)
{
    for (int64_t b = blockIdx.x; b < B; b += gridDim.x) {
        int64_t first = 0, total = 0;
        for (int64_t i = 0; i < B; i++) {
            const int64_t here = raw[i] ? *fewest : 0;
            first += i < b ? here : 0;
            total += here;
        }
        if (threadIdx.x == 0) counts[b] = raw[b] ? *fewest : 0;
        for (int64_t t = threadIdx.x; t < T; t += BLOCK) {
            int64_t before = 0;
            for (int64_t i = 0; i < t; i++) before += mask[b * T + i];
            if (mask[b * T + t]) frames[first + before] = (int32_t)(b * T + t);
            if (b * T + t >= total) frames[b * T + t] = -1;
        }
    }
}

/* Fills mask (B,T), frames (B,T) and count (B). Working space: 6 bytes a frame. */
int vx_cuda_span_mask(vx_tensor *mask, vx_tensor *frames, vx_tensor *count, vx_tensor *lengths, double probability,
                      int64_t span, int64_t least, uint64_t seed, uint64_t stream)
{
    const int64_t B = mask->shape[0], T = mask->shape[1];
    const vx_random random = vx_draws(seed, stream);
    if (!mask->numel) {
        if (B) VX_CUDA(cudaMemsetAsync(count->data, 0, sizeof(int32_t) * (size_t)B, vx_stream()));
        return vx_status();
    }
    const vx_data_check outside =
        vx_data_check_of(VX_EINVAL, 1, "the length of row %%lld is outside 0 .. %lld", (long long)T);
    uint32_t *words = VX_SCRATCH(uint32_t, B * T);
    uint8_t *chosen = VX_SCRATCH(uint8_t, B * T);
    int32_t *raw = VX_SCRATCH(int32_t, B + 1), *fewest = raw + B;
    const unsigned grid = vx_grid(B, 1);
    VX_LAUNCH(mask_kernel, grid, BLOCK, 0, (uint8_t *)mask->data, raw, words, chosen, lengths ? vx_i32(lengths) : NULL,
              B, T, probability, span, least, random, outside);
    VX_LAUNCH(fewest_kernel, 1, 1, 0, fewest, raw, B);
    VX_LAUNCH(thin_kernel, grid, BLOCK, 0, (uint8_t *)mask->data, raw, words, chosen, fewest, B, T, random);
    VX_LAUNCH(place_kernel, grid, BLOCK, 0, vx_i32(frames), vx_i32(count), (uint8_t *)mask->data, raw, fewest, B, T);
    return vx_status();
}

/* Returns the first of the ascending frames (N) that is at least x. */
VX_DEVICE int64_t lower_bound(const int32_t *frames, int64_t N, int64_t x)
{
    int64_t low = 0, high = N;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (frames[middle] < x) low = middle + 1;
        else high = middle;
    }
    return low;
}

VX_KERNEL distractors_kernel(int32_t *to, const int32_t *frames, int64_t N, int64_t K, int64_t T, vx_random random,
                             vx_data_check order, vx_data_check alone)
{
    const vx_draw draw = vx_draw_now(random);
    for (int64_t e = vx_first(); e < N * K; e += vx_step()) {
        const int64_t n = e / K, row = frames[n] / T;
        const bool ordered = frames[n] >= 0 && (n == 0 || frames[n - 1] < frames[n]);
        const int64_t first = lower_bound(frames, N, row * T), end = lower_bound(frames, N, (row + 1) * T);
        const bool good = ordered && first <= n && n < end && end - first > 1;
        if (!ordered) vx_report(order, n);
        else if (end - first < 2) vx_report(alone, row);
        const uint32_t word = vx_philox(draw.seed, draw.stream, (uint64_t)e / 4).word[e % 4];
        to[e] = good ? (int32_t)distractor_of(word, first, end - first, n) : 0;
    }
}

/* Fills distractors (N,K). */
int vx_cuda_distractors(vx_tensor *distractors, vx_tensor *frames, int64_t T, uint64_t seed, uint64_t stream)
{
    const int64_t N = distractors->shape[0], K = distractors->shape[1];
    const vx_random random = vx_draws(seed, stream);
    if (!distractors->numel) return VX_OK;
    const vx_data_check order =
        vx_data_check_of(VX_EINVAL, 1, "the frame at place %%lld: expected ascending places from 0 on");
    const vx_data_check alone = vx_data_check_of(VX_EINVAL, 1, "row %%lld has one masked frame, expected two or more");
    VX_LAUNCH(distractors_kernel, vx_grid(N * K, BLOCK), BLOCK, 0, vx_i32(distractors), vx_i32(frames), N, K, T, random,
              order, alone);
    return vx_status();
}
