/* gumbel.h: the Gumbel noise of two rows and one panel of 64 codes, drawn again wherever it is needed.
 *
 * With u the uniform number of a code (Philox and its layout are in core/rng.h), E = -log u is exponential, g = -log E
 * is Gumbel, and 1/E = e^g is what a power is multiplied with. Its cost decides the speed of the Gumbel samplers.
 *
 * A Philox state sits in the low halves of 64-bit lanes, even Philox blocks in one vector and odd ones in another: a
 * product then needs no shuffling, and the upper halves may hold anything. The first two rounds are half constant: the
 * counter's upper words are the same for all of them.
 *
 * E = -(e log 2 + log m) for u = 2^e m, m in [sqrt 1/2, sqrt 2), and log(1 + r) = r N(r) / D(r) to 2e-8, so that 1/E
 * takes one quotient and no logarithm: 1/E = D / (-e log 2 D - r N). Relative accuracy holds up to u = 1 - 2^-24, where
 * E is 6e-8.
 *
 * All of it is done for two rows at once, since each step depends on the one before.
 */
#ifndef VX_GUMBEL_H
#define VX_GUMBEL_H

#include "cpu/simd.h"

typedef uint64_t vu64 __attribute__((vector_size(VX_LANES * 4)));

enum { GUMBEL_ROWS = 2, GUMBEL_CHAINS = 2 * GUMBEL_ROWS }; /* even and odd blocks of each row */

/* Multiplies the lanes' low halves with m, to 64 bits. */
static inline vu64 philox_multiply(vu64 a, uint32_t m)
{
#if defined(__AVX512F__)
    return (vu64)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(m));
#elif defined(__AVX2__)
    return (vu64)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(m));
#elif defined(__SSE2__)
    return (vu64)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(m));
#else
    return (a & 0xffffffffu) * m;
#endif
}

/* Returns the lanes' high halves, in the low halves. */
static inline vu64 philox_high(vu64 a)
{
#if defined(__AVX512F__)
    return (vu64)_mm512_shuffle_epi32((__m512i)a,
                                      (_MM_PERM_ENUM)0xf5); /* unlike a shift, not where the products are made */
#else
    return a >> 32;
#endif
}

/* Returns a ^ b ^ c in the low halves. */
static inline vu64 philox_xor(vu64 a, vu64 b, uint32_t c)
{
#if defined(__AVX512F__)
    return (vu64)_mm512_ternarylogic_epi64((__m512i)a, (__m512i)b, _mm512_set1_epi64(c), 0x96);
#else
    return a ^ b ^ (uint64_t)c;
#endif
}

/* Interleaves the low halves of even and odd. */
static inline vu philox_join(vu64 even, vu64 odd)
{
#if defined(__AVX512F__)
    return (vu)_mm512_mask_shuffle_epi32((__m512i)even, 0xaaaa, (__m512i)odd, (_MM_PERM_ENUM)0xa0);
#elif defined(__AVX2__)
    return (vu)_mm256_blend_epi32((__m256i)even, (__m256i)(odd << 32), 0xaa);
#else
    return (vu)((even & 0xffffffffu) | odd << 32);
#endif
}

/* Computes VX_LANES consecutive Philox blocks for each row: word[r][w] holds their words w. They begin at block[r], and
 * must not carry into the upper 32 bits. */
VX_INLINE void philox_rows(uint64_t seed, uint64_t stream, const uint64_t block[GUMBEL_ROWS], vu word[GUMBEL_ROWS][4])
{
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    uint64_t p1 = (uint64_t)VX_PHILOX_M1 * (uint32_t)stream;
    vu64 c0[GUMBEL_CHAINS], c1[GUMBEL_CHAINS], c2[GUMBEL_CHAINS], c3[GUMBEL_CHAINS], lane;
    for (int l = 0; l < VX_LANES / 2; l++) lane[l] = 2 * (uint64_t)l;
        /* rounds 1 and 2, where c1, c2, c3 start as constants */
#pragma GCC unroll 4
    for (int i = 0; i < GUMBEL_CHAINS; i++) {
        const uint32_t s0 = (uint32_t)(p1 >> 32) ^ (uint32_t)(block[i / 2] >> 32) ^ k0;
        const uint64_t p0 = (uint64_t)VX_PHILOX_M0 * s0;
        c3[i] = philox_multiply(lane + (uint64_t)((uint32_t)block[i / 2] + (uint32_t)i % 2), VX_PHILOX_M0);
        c2[i] = philox_high(c3[i]) ^ (uint64_t)((uint32_t)(stream >> 32) ^ k1);
        c1[i] = philox_multiply(c2[i], VX_PHILOX_M1);
        c0[i] = philox_high(c1[i]) ^ (uint64_t)((uint32_t)p1 ^ (k0 + VX_PHILOX_W0));
        c2[i] = c3[i] ^ (uint64_t)((uint32_t)(p0 >> 32) ^ (k1 + VX_PHILOX_W1));
        c3[i] = (vu64){0} + (uint64_t)(uint32_t)p0;
    }
#pragma GCC unroll 8
    for (uint32_t round = 2; round < 10; round++) {
        vu64 q0[GUMBEL_CHAINS], q1[GUMBEL_CHAINS];
#pragma GCC unroll 4
        for (int i = 0; i < GUMBEL_CHAINS; i++)
            q0[i] = philox_multiply(c0[i], VX_PHILOX_M0), q1[i] = philox_multiply(c2[i], VX_PHILOX_M1);
#pragma GCC unroll 4
        for (int i = 0; i < GUMBEL_CHAINS; i++) {
            c0[i] = philox_xor(philox_high(q1[i]), c1[i], k0 + round * VX_PHILOX_W0);
            c2[i] = philox_xor(philox_high(q0[i]), c3[i], k1 + round * VX_PHILOX_W1);
            c1[i] = q1[i];
            c3[i] = q0[i];
        }
    }
#pragma GCC unroll 2
    for (int r = 0; r < GUMBEL_ROWS; r++) {
        word[r][0] = philox_join(c0[2 * r], c0[2 * r + 1]);
        word[r][1] = philox_join(c1[2 * r], c1[2 * r + 1]);
        word[r][2] = philox_join(c2[2 * r], c2[2 * r + 1]);
        word[r][3] = philox_join(c3[2 * r], c3[2 * r + 1]);
    }
}

/* Computes rate[i] = -1 / log(vx_unit(word[i])), four side by side. */
VX_INLINE void gumbel_rate(const vu word[4], vf rate[4])
{
    const int32_t base = 0x3f3504f3; /* sqrt(1/2) */
    vf e[4], r[4], n[4], d[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) r[i] = __builtin_convertvector((vi)(word[i] >> 9), vf) + 0.5f; /* 2^23 u, exactly */
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        vi bits = (vi)r[i] - (base + (23 << 23));
        e[i] = __builtin_convertvector(bits >> 23, vf) * -0.69314718f;
        r[i] = (vf)((bits & 0x7fffff) + base) - 1.0f;
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) n[i] = r[i] * 0.18256297f + 1.0f, d[i] = r[i] * 0.049616249f + 0.5992325f;
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) n[i] = n[i] * r[i] + 1.0f, d[i] = d[i] * r[i] + 1.5f;
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) n[i] *= r[i], d[i] = d[i] * r[i] + 1.0f;
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) rate[i] = vf_quotient(d[i], e[i] * d[i] - n[i]);
}

/* Computes rates[r] (64), 1/E of the panel whose first Philox block is block[r]. */
static inline void gumbel_rates(uint64_t seed, uint64_t stream, const uint64_t block[GUMBEL_ROWS],
                                float *const rates[GUMBEL_ROWS])
{
    for (int first = 0; first < 16; first += VX_LANES) {
        const uint64_t at[GUMBEL_ROWS] = {block[0] + (uint64_t)first, block[1] + (uint64_t)first};
        vu word[GUMBEL_ROWS][4];
        philox_rows(seed, stream, at, word);
#pragma GCC unroll 2
        for (int r = 0; r < GUMBEL_ROWS; r++) {
            vf rate[4];
            gumbel_rate(word[r], rate);
#pragma GCC unroll 4
            for (int w = 0; w < 4; w++) vf_store(rates[r] + w * 16 + first, rate[w]);
        }
    }
}

#endif
