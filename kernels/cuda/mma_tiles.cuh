/* mma_tiles.cuh: products on tensor cores in float32 accuracy, for items (rows, or codes) of 8 KT numbers, KT = 2, or a
 * multiple of 4. Every number is split into two TF32 numbers, and a product is three: hi hi + hi lo + lo hi. What is
 * left out is 2^-21 of the product, as much as float32's own rounding of a sum. ROUGH products are hi hi alone.
 *
 * Shapes. A warp holds 16 items against 64 others, or 8 N of them, 8 at a time (mma.m16n8k8). With q = lane % 4,
 * s[t][0] and s[t][1] belong to item lane / 4 and the others 8 t + 2 q and 8 t + 2 q + 1; s[t][2] and s[t][3] to item
 * lane / 4 + 8 and the same others.
 *
 * Depth. The order of the numbers within a product of 8 is free, as long as both operands have it: number 2 q goes to
 * the instruction's place q, number 2 q + 1 to place q + 4. So both come with one 8-byte load, and what one product
 * leaves in registers is an operand of the next as it stands: weights s times the others' numbers needs no shared
 * memory in between.
 */
#ifndef VX_MMA_TILES_CUH
#define VX_MMA_TILES_CUH

#include "cuda.cuh"

constexpr int MMA_OTHERS = 64; /* that a warp's 16 items meet at a time */

/* Floats from one item to the next in shared memory: 8 more than a multiple of 32, or 24: then the 16 lanes of half a
 * warp, which load 8 bytes of 4 items each, meet all banks. */
#define ITEM_PITCH(KT) (8 * (KT) + 8)

/* Splits x into hi + lo, to 2^-22 of it. */
VX_DEVICE void split(float x, uint32_t *hi, uint32_t *lo)
{
    *hi = vx_to_tf32(x);
    *lo = vx_to_tf32(x - __uint_as_float(*hi));
}

/* Loads items first .. first + count - 1 of (end,8 KT) into shared memory, asynchronously; those from `end` on are
 * zeros. `thread` of `threads` does its share. The caller commits. */
template <int KT>
VX_DEVICE void load_items(float *shared, const float *items, int64_t first, int64_t end, int count, int thread,
                          int threads)
{
    const float *from = items + first * 8 * KT;
    for (int i = thread; i < count * 2 * KT; i += threads) {
        const int at = i / (2 * KT), d = i % (2 * KT) * 4;
        const bool there = first + at < end;
        vx_copy_async(shared + at * ITEM_PITCH(KT) + d, there ? from + 4 * i : items, there);
    }
}

/* Adds a product of split numbers. */
template <bool ROUGH>
VX_DEVICE void mma_split(float *d, const uint32_t *hi, const uint32_t *lo, const uint32_t *high, const uint32_t *low)
{
    if (!ROUGH) vx_mma_tf32(d, lo, high), vx_mma_tf32(d, hi, low);
    vx_mma_tf32(d, hi, high);
}

/* Adds products: s += <item, other> for the warp's 16 items (a: the first of them) and 8 N others (b). */
template <int KT, bool ROUGH = false, int N>
VX_DEVICE void mma_product(float (&s)[N][4], const float *a, const float *b)
{
    const int lane = threadIdx.x % 32, r = lane / 4, q = lane % 4;
#pragma unroll
    for (int k = 0; k < KT; k++) {
        uint32_t hi[4], lo[4];
        const float2 x = *(const float2 *)(a + r * ITEM_PITCH(KT) + 8 * k + 2 * q);
        const float2 y = *(const float2 *)(a + (r + 8) * ITEM_PITCH(KT) + 8 * k + 2 * q);
        split(x.x, hi, lo), split(y.x, hi + 1, lo + 1), split(x.y, hi + 2, lo + 2), split(y.y, hi + 3, lo + 3);
#pragma unroll
        for (int t = 0; t < N; t++) {
            uint32_t high[2], low[2];
            const float2 z = *(const float2 *)(b + (8 * t + r) * ITEM_PITCH(KT) + 8 * k + 2 * q);
            split(z.x, high, low), split(z.y, high + 1, low + 1);
            mma_split<ROUGH>(s[t], hi, lo, high, low);
        }
    }
}

/* Adds mixtures: o += s times the others' numbers (b). o[k][0] and o[k][1] belong to item lane / 4 and its numbers 8 k
 * + 2 q and 8 k + 2 q + 1; o[k][2] and o[k][3] to item lane / 4 + 8 and the same numbers. */
template <int KT, bool ROUGH = false, int N>
VX_DEVICE void mma_mix(float (&o)[KT][4], const float (&s)[N][4], const float *b)
{
    const int lane = threadIdx.x % 32, r = lane / 4, q = lane % 4;
#pragma unroll
    for (int t = 0; t < N; t++) {
        uint32_t hi[4], lo[4];
        split(s[t][0], hi, lo), split(s[t][2], hi + 1, lo + 1), split(s[t][1], hi + 2, lo + 2),
            split(s[t][3], hi + 3, lo + 3);
#pragma unroll
        for (int k = 0; k < KT; k++) {
            uint32_t high[2], low[2];
            split(b[(8 * t + 2 * q) * ITEM_PITCH(KT) + 8 * k + r], high, low);
            split(b[(8 * t + 2 * q + 1) * ITEM_PITCH(KT) + 8 * k + r], high + 1, low + 1);
            mma_split<ROUGH>(o[k], hi, lo, high, low);
        }
    }
}

/* Adds up over the four lanes that share an item. */
VX_DEVICE float quad_sum(float x)
{
    x += __shfl_xor_sync(VX_ALL_LANES, x, 1);
    return x + __shfl_xor_sync(VX_ALL_LANES, x, 2);
}

#endif
