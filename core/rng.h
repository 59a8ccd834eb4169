/* rng.h: Philox 4x32-10 [Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"], counter-based: the numbers
 * are a function of (seed, stream, index) alone, so any thread, in any order, on the CPU or a GPU, draws the same ones,
 * and a backward pass draws again what the forward pass drew. Plain C, also compiled as CUDA.
 *
 * Layout of element e of a flat tensor: block e / 4, word e % 4.
 * Layout of the Gumbel noise of row r (= n G + g), code m: panels of 64 codes, P = ceil(M / 64) of them a row;
 *   block (r P + m / 64) 16 + m % 16,  word (m % 64) / 16
 * so that sixteen consecutive blocks give sixteen consecutive codes in each of their four words: a vector of 16 lanes
 * computes sixteen blocks at once and needs no shuffle.
 * Layout of the word that decides on element e of a flat tensor under dropout: that of row 0, code e.
 * Layout of the dropout of attention for head n (= b H + h), query t and key s, of T each: numbers of 16 bits, eight
 * queries to a block;
 *   block (n ceil(T / 8) + t / 8) T + s,  word t % 8 / 2,  the lower half of it where t is even, else the upper.
 */
#ifndef VX_RNG_H
#define VX_RNG_H

#include <stdint.h>

#ifndef VX_RNG_INLINE /* a compiler for devices has more to say before a function (kernels/cuda/cuda.cuh) */
#define VX_RNG_INLINE static inline
#endif

typedef struct vx_philox4 {
    uint32_t word[4];
} vx_philox4;

#define VX_PHILOX_M0 0xD2511F53u
#define VX_PHILOX_M1 0xCD9E8D57u
#define VX_PHILOX_W0 0x9E3779B9u
#define VX_PHILOX_W1 0xBB67AE85u

VX_RNG_INLINE vx_philox4 vx_philox(uint64_t seed, uint64_t stream, uint64_t block)
{
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    vx_philox4 c = {{(uint32_t)block, (uint32_t)(block >> 32), (uint32_t)stream, (uint32_t)(stream >> 32)}};
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)VX_PHILOX_M0 * c.word[0], p1 = (uint64_t)VX_PHILOX_M1 * c.word[2];
        vx_philox4 n = {
            {(uint32_t)(p1 >> 32) ^ c.word[1] ^ k0, (uint32_t)p1, (uint32_t)(p0 >> 32) ^ c.word[3] ^ k1, (uint32_t)p0}};
        c = n;
        k0 += VX_PHILOX_W0;
        k1 += VX_PHILOX_W1;
    }
    return c;
}

/* Gives a uniform number of the open interval (0, 1): the centres of 2^23 equal cells, all exact in float32. */
VX_RNG_INLINE float vx_unit(uint32_t word) { return ((float)(word >> 9) + 0.5f) * (1.0f / 8388608.0f); }

/* Give block and word of the Gumbel noise of row r, code m; see the banner. */
VX_RNG_INLINE uint64_t vx_gumbel_block(uint64_t row, uint64_t code, uint64_t codes)
{
    return (row * ((codes + 63) / 64) + code / 64) * 16 + code % 16;
}

VX_RNG_INLINE int vx_gumbel_word(uint64_t code) { return (int)(code % 64 / 16); }

/* Gives the block of the dropout of attention for queries t .. t + 7, t a multiple of 8, and key 0; see the banner. */
VX_RNG_INLINE uint64_t vx_attention_block(uint64_t head, uint64_t t, uint64_t T)
{
    return (head * ((T + 7) / 8) + t / 8) * T;
}

#endif
