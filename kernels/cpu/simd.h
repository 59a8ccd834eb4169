/* simd.h: one float vector for all CPU variants: 16 lanes with AVX-512, 8 with AVX2, 4 otherwise (SSE2, NEON), as GCC's
 * vector extension, so that + - * / and a * b + c (contracted to FMA) are written plainly. Only what the language lacks
 * has a function here. */
#ifndef VX_SIMD_H
#define VX_SIMD_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "core/rng.h"
#include "shared/common.h"

#if defined(__AVX512F__)
#define VX_LANES 16
#include <immintrin.h>
#elif defined(__AVX2__)
#define VX_LANES 8
#include <immintrin.h>
#else
#define VX_LANES 4
#if defined(__SSE2__)
#include <emmintrin.h>
#endif
#endif

typedef float vf __attribute__((vector_size(VX_LANES * 4)));
typedef int32_t vi __attribute__((vector_size(VX_LANES * 4)));
typedef uint32_t vu __attribute__((vector_size(VX_LANES * 4)));
typedef float vf_unaligned __attribute__((vector_size(VX_LANES * 4), aligned(4), may_alias));

typedef double vd __attribute__((vector_size(VX_LANES * 8)));

static inline vf vf_load(const float *p) { return *(const vf_unaligned *)p; }
static inline void vf_store(float *p, vf x) { *(vf_unaligned *)p = x; }
static inline vf vf_set1(float x) { return x - (vf){0}; }
static inline vf vf_zero(void) { return (vf){0}; }

/* Returns a b + c, rounded once where there is an instruction for it. Plainly written, x y + z w may become either of
 * two FMAs. */
static inline vf vf_fma(vf a, vf b, vf c)
{
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
    return _mm256_fmadd_ps(a, b, c);
#else
    return a * b + c;
#endif
}

/* Stores past the caches: p's line is written whole and need not be read first, which is two thirds of the traffic
 * where nothing will read it soon. For outputs that vf_streams() approves; vf_stream_end() comes before another thread
 * reads them. */
static inline void vf_stream(float *p, vf x)
{
#if defined(__AVX512F__)
    _mm512_stream_ps(p, x);
#else
    vf_store(p, x);
#endif
}

static inline void vf_stream_end(void)
{
#if defined(__AVX512F__)
    _mm_sfence();
#endif
}

/* Says whether to stream an output of this size, its rows a multiple of `row` floats apart: it must be too large for
 * the caches, and every vector a whole line. */
static inline int vf_streams(const float *p, int64_t floats, int64_t row)
{
    return VX_LANES == 16 && floats >= 1 << 20 && row % 16 == 0 && (uintptr_t)p % 64 == 0;
}

/* Loads the first n lanes (0 <= n <= VX_LANES); the others are 0. */
static inline vf vf_load_n(const float *p, int n)
{
#if defined(__AVX512F__)
    return _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
#elif defined(__AVX2__)
    return _mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)));
#else
    return (vf){n > 0 ? p[0] : 0, n > 1 ? p[1] : 0, n > 2 ? p[2] : 0, n > 3 ? p[3] : 0};
#endif
}

/* Stores the first n lanes. */
static inline void vf_store_n(float *p, vf x, int n)
{
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), x);
#elif defined(__AVX2__)
    _mm256_maskstore_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)), x);
#else
    if (n > 0) p[0] = x[0];
    if (n > 1) p[1] = x[1];
    if (n > 2) p[2] = x[2];
    if (n > 3) p[3] = x[3];
#endif
}

/* Returns mask ? yes : no, lane by lane; lanes of the mask are 0 or -1. */
static inline vf vf_select(vi mask, vf yes, vf no)
{
#if defined(__AVX2__) && !defined(__AVX512F__)
    return _mm256_blendv_ps(no, yes, (__m256)mask);
#else
    return (vf)(((vi)yes & mask) | ((vi)no & ~mask));
#endif
}

/* Returns the larger; b where one of them is NaN. */
static inline vf vf_max(vf a, vf b)
{
#if defined(__AVX512F__)
    return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
    return _mm256_max_ps(a, b);
#elif defined(__SSE2__)
    return _mm_max_ps(a, b);
#else
    return vf_select(a > b, a, b);
#endif
}

/* Returns the smaller; b where one of them is NaN. */
static inline vf vf_min(vf a, vf b)
{
#if defined(__AVX512F__)
    return _mm512_min_ps(a, b);
#elif defined(__AVX2__)
    return _mm256_min_ps(a, b);
#elif defined(__SSE2__)
    return _mm_min_ps(a, b);
#else
    return vf_select(a < b, a, b);
#endif
}

static inline vf vf_sqrt(vf a)
{
#if defined(__AVX512F__)
    return _mm512_sqrt_ps(a);
#elif defined(__AVX2__)
    return _mm256_sqrt_ps(a);
#elif defined(__SSE2__)
    return _mm_sqrt_ps(a);
#else
    vf r;
    for (int i = 0; i < VX_LANES; i++) r[i] = sqrtf(a[i]);
    return r;
#endif
}

/* Rounds two vectors to bf16x2, two bfloat16 to a lane: low[l] in the lower half of lane l, high[l] in the upper. To
 * nearest, ties to even; NaN stays NaN. */
static inline vu vu_bf16x2(vf low, vf high)
{
#if defined(__AVX512BF16__)
    const __m512i interleaved =
        (__m512i)(short __attribute__((vector_size(64)))){0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                          8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return (vu)_mm512_permutexvar_epi16(interleaved, (__m512i)_mm512_cvtne2ps_pbh(high, low));
#else
    vu a = (vu)low, b = (vu)high;
    a = (vu)vf_select(low != low, (vf)(a | 0x400000), (vf)(a + 0x7fff + (a >> 16 & 1)));
    b = (vu)vf_select(high != high, (vf)(b | 0x400000), (vf)(b + 0x7fff + (b >> 16 & 1)));
    return a >> 16 | (b & 0xffff0000);
#endif
}

/* Returns sum + a's upper halves times b's + a's lower halves times b's, a and b bf16x2, rounded to float32 after each
 * addition. The products are exact, so that the two versions agree but for results below 2^-126. */
static inline vf vf_dot_bf16x2(vf sum, vu a, vu b)
{
#if defined(__AVX512BF16__)
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
#else
    sum += (vf)(a & 0xffff0000) * (vf)(b & 0xffff0000);
    return sum + (vf)(a << 16) * (vf)(b << 16);
#endif
}

/* Returns 1 / x within 1 ulp, where 2^-126 <= |x| <= 2^126: with AVX-512 a table and a Newton step, a quarter of the
 * time of a division. */
static inline vf vf_reciprocal(vf x)
{
#if defined(__AVX512F__)
    vf r = _mm512_rcp14_ps(x);
    return r + r * (1.0f - x * r);
#else
    return 1.0f / x;
#endif
}

/* Returns a / b within 2 ulp, for b within the range of vf_reciprocal(). */
static inline vf vf_quotient(vf a, vf b)
{
#if defined(__AVX512F__)
    return a * vf_reciprocal(b);
#else
    return a / b;
#endif
}

/* Returns 1 where any lane of the mask is set. */
static inline int vi_any(vi mask)
{
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
    return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
    int any = 0;
    for (int i = 0; i < VX_LANES; i++) any |= mask[i];
    return any != 0;
#endif
}

/* Swaps lanes: lane i of the result is lane i ^ distance of x. */
VX_INLINE vf vf_swap(vf x, int distance)
{
    vi lane;
    for (int i = 0; i < VX_LANES; i++) lane[i] = i ^ distance;
    return __builtin_shuffle(x, lane);
}

/* Adds up the lanes, always as the same tree: halves, quarters, ... two. */
static inline float vf_sum(vf x)
{
#if VX_LANES > 8
    x = x + vf_swap(x, 8);
#endif
#if VX_LANES > 4
    x = x + vf_swap(x, 4);
#endif
    x = x + vf_swap(x, 2);
    x = x + vf_swap(x, 1);
    return x[0];
}

/* Returns the largest lane. */
static inline float vf_maximum(vf x)
{
#if VX_LANES > 8
    x = vf_max(x, vf_swap(x, 8));
#endif
#if VX_LANES > 4
    x = vf_max(x, vf_swap(x, 4));
#endif
    x = vf_max(x, vf_swap(x, 2));
    x = vf_max(x, vf_swap(x, 1));
    return x[0];
}

static inline vd vd_of(vf x) { return __builtin_convertvector(x, vd); }

/* Adds up the lanes, as the same tree. */
static inline double vd_sum(vd x)
{
    double t[VX_LANES];
    memcpy(t, &x, sizeof t);
    for (int n = VX_LANES / 2; n > 0; n /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < n; i++) t[i] += t[i + n];
    return t[0];
}

/* Rounds to an integer, halves to even; |x| < 2^22. */
static inline vf vf_round(vf x)
{
#if defined(__AVX512F__)
    return _mm512_roundscale_ps(x, 8);
#elif defined(__AVX2__)
    return _mm256_round_ps(x, 8);
#else
    const vf magic = vf_set1(12582912.0f); /* 1.5 2^23 */
    return (x + magic) - magic;
#endif
}

/* Returns p 2^n, for integers n; without AVX-512 only where the result's exponent is in range. */
static inline vf vf_scale(vf p, vf n)
{
#if defined(__AVX512F__)
    return _mm512_scalef_ps(p, n);
#else
    return (vf)((vu)p + ((vu) __builtin_convertvector(n, vi) << 23));
#endif
}

/* Replaces x[i] by 2^x[i], x[i] < 128, for count (a constant) vectors. Degree-5 minimax polynomial on [-0.5, 0.5] times
 * a power of two: 1.4 ulp down to 2^-126; between there and 2^-127 the value is off by up to 2^-127, below it is 0,
 * except with AVX-512, whose scaling is gradual; NaN stays NaN. Step by step for all vectors: each is a chain of ten
 * operations, and processors do not look far enough ahead to overlap chains that stand one behind the other. */
VX_INLINE void vf_exp2_many(const int count, vf *x)
{
    vf n[16], p[16];
#if !defined(__AVX512F__)
#pragma GCC unroll 16
    for (int i = 0; i < count; i++) x[i] = vf_max(vf_set1(-127.0f), x[i]); /* there p is 1 and the exponent's field 0 */
#endif
#pragma GCC unroll 16
    for (int i = 0; i < count; i++) n[i] = vf_round(x[i]);
#pragma GCC unroll 16
    for (int i = 0; i < count; i++) x[i] -= n[i];
#pragma GCC unroll 16
    for (int i = 0; i < count; i++) p[i] = x[i] * 1.32647271e-3f + 9.67151268e-3f;
#pragma GCC unroll 16
    for (int i = 0; i < count; i++) p[i] = p[i] * x[i] + 5.55073374e-2f;
#pragma GCC unroll 16
    for (int i = 0; i < count; i++) p[i] = p[i] * x[i] + 2.40222421e-1f;
#pragma GCC unroll 16
    for (int i = 0; i < count; i++) p[i] = p[i] * x[i] + 6.93146978e-1f;
#pragma GCC unroll 16
    for (int i = 0; i < count; i++) p[i] = p[i] * x[i] + 1.0f;
#pragma GCC unroll 16
    for (int i = 0; i < count; i++) x[i] = vf_scale(p[i], n[i]);
}

/* Returns 2^t, +inf from 128 on. */
static inline vf vf_exp2(vf t)
{
#if !defined(__AVX512F__)
    t = vf_min(vf_set1(128.0f), t); /* there p is 1 and the exponent's field that of inf */
#endif
    vf_exp2_many(1, &t);
    return t;
}

/* Returns e^x by a two-term reduction, within 0.7 ulp in the range of vf_exp2(). */
static inline vf vf_exp(vf x)
{
    const float log2e = 1.44269504088896341f;
    x = vf_min(vf_set1(89.0f),
               vf_max(vf_set1(-104.0f), x)); /* far out the reduction's own rounding would exceed the result */
    vf n = vf_round(x * log2e);
    vf r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    vf p = vf_set1(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    vf q = vf_scale(p, n);
#if defined(__AVX512F__)
    return q;
#else
    q = vf_select(x < vf_set1(-87.33654f), vf_zero(), q);
    return vf_select(x > vf_set1(88.72283f), vf_set1(INFINITY), q);
#endif
}

static inline vf vf_abs(vf x) { return (vf)((vi)x & 0x7fffffff); }

/* Returns x, which must not be negative, with the sign of s. */
static inline vf vf_with_sign(vf x, vf s) { return (vf)((vi)x | ((vi)s & INT32_MIN)); }

/* Returns the natural logarithm within 1 ulp: x = 2^e m with m in [sqrt(1/2), sqrt(2)), then a polynomial in m - 1
 * (Cephes). Subnormals are scaled up first; 0 gives -inf, a negative number NaN. */
static inline vf vf_log(vf x)
{
    const vf least = vf_set1(1.17549435e-38f);
    vi subnormal = x < least;
    vi bits = (vi)vf_select(subnormal, x * 8388608.0f, x) - 0x3f3504f3;
    vf e = __builtin_convertvector((bits >> 23) - (subnormal & 23), vf);
    vf r = (vf)((bits & 0x7fffff) + 0x3f3504f3) - 1.0f;
    vf z = r * r;
    vf p = vf_set1(7.0376836292e-2f);
    p = p * r - 1.1514610310e-1f;
    p = p * r + 1.1676998740e-1f;
    p = p * r - 1.2420140846e-1f;
    p = p * r + 1.4249322787e-1f;
    p = p * r - 1.6668057665e-1f;
    p = p * r + 2.0000714765e-1f;
    p = p * r - 2.4999993993e-1f;
    p = p * r + 3.3333331174e-1f;
    p = p * (r * z) - e * 2.12194440e-4f;
    p = p - 0.5f * z;
    vf y = (r + p) + e * 0.693359375f;
    y = vf_select(x == INFINITY, x, y);
    y = vf_select(x == 0.0f, vf_set1(-INFINITY), y);
    return vf_select((x < 0.0f) | (x != x), vf_set1(NAN), y);
}

/* Returns 1 / (1 + e^-x). */
static inline vf vf_sigmoid(vf x) { return 1.0f / (1.0f + vf_exp(-x)); }

/* Returns the hyperbolic tangent within 1.5 ulp: an odd polynomial (Cephes) where 1 - 2 / (e^2x + 1) would cancel. */
static inline vf vf_tanh(vf x)
{
    vf t = vf_abs(x), z = x * x;
    vf p = vf_set1(-5.70498872745e-3f);
    p = p * z + 2.06390887954e-2f;
    p = p * z - 5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z - 3.33332819422e-1f;
    p = (p * z) * x + x;
    vf q = 1.0f - 2.0f / (vf_exp(t + t) + 1.0f);
    return vf_select(t < 0.625f, p, vf_with_sign(q, x));
}

/* Returns the error function within 1 ulp: an odd polynomial below 0.93, 1 - e^q(|x|) above. */
static inline vf vf_erf(vf x)
{
    vf t = vf_abs(x), z = x * x;
    vf q = vf_set1(-1.72853470e-5f) * t + 3.83197126e-4f;
    vf u = vf_set1(-3.88396438e-3f) * t + 2.42546219e-2f;
    q = q * z + u;
    q = q * t - 1.06777877e-1f;
    q = q * t - 6.34846687e-1f;
    q = q * t - 1.28717512e-1f;
    q = q * t - t;
    /* the polynomial turns upwards far out, where erf has long been 1 */
    q = 1.0f - vf_exp(vf_select(t > 9.0f, vf_set1(-100.0f), q));
    vf p = vf_set1(-5.96761703e-4f);
    p = p * z + 4.99119423e-3f;
    p = p * z - 2.67681349e-2f;
    p = p * z + 1.12819925e-1f;
    p = p * z - 3.76125336e-1f;
    p = p * z + 1.28379166e-1f;
    p = p * x + x;
    return vf_select(t <= 0.927734375f, p, vf_with_sign(q, x));
}

/* Computes the high and low halves of the 64-bit products a m. */
static inline void vu_multiply(vu a, uint32_t m, vu *high, vu *low)
{
#if defined(__AVX512F__)
    __m512i x = (__m512i)a, y = _mm512_set1_epi32((int)m);
    __m512i even = _mm512_mul_epu32(x, y), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), y);
    *low = (vu)_mm512_mask_shuffle_epi32(even, 0xaaaa, odd, (_MM_PERM_ENUM)0xa0);
    *high = (vu)_mm512_mask_shuffle_epi32(odd, 0x5555, even, (_MM_PERM_ENUM)0xf5);
#elif defined(__AVX2__)
    __m256i x = (__m256i)a, y = _mm256_set1_epi32((int)m);
    __m256i even = _mm256_mul_epu32(x, y), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), y);
    *low = (vu)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
    *high = (vu)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
#else
    for (int i = 0; i < VX_LANES; i++) {
        uint64_t p = (uint64_t)a[i] * m;
        (*high)[i] = (uint32_t)(p >> 32);
        (*low)[i] = (uint32_t)p;
    }
#endif
}

/* Does vx_philox() for VX_LANES consecutive Philox blocks: lane l of word[w] is word w of block + l. */
static inline void vu_philox(uint64_t seed, uint64_t stream, uint64_t block, vu word[4])
{
    vu lane;
    for (int i = 0; i < VX_LANES; i++) lane[i] = (uint32_t)i;
    vu c0 = (uint32_t)block + lane;
    vu c1 = (uint32_t)(block >> 32) - (vu)(c0 < lane); /* the carry: a true comparison is -1 */
    vu c2 = (uint32_t)stream - (vu){0}, c3 = (uint32_t)(stream >> 32) - (vu){0};
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; round++) {
        vu high0, low0, high1, low1;
        vu_multiply(c0, VX_PHILOX_M0, &high0, &low0);
        vu_multiply(c2, VX_PHILOX_M1, &high1, &low1);
        c0 = high1 ^ c1 ^ k0;
        c1 = low1;
        c2 = high0 ^ c3 ^ k1;
        c3 = low0;
        k0 += VX_PHILOX_W0;
        k1 += VX_PHILOX_W1;
    }
    word[0] = c0, word[1] = c1, word[2] = c2, word[3] = c3;
}

/* Does vx_unit() for each lane. */
static inline vf vf_unit(vu word)
{
    return (__builtin_convertvector((vi)(word >> 9), vf) + 0.5f) * (1.0f / 8388608.0f);
}

/* Returns bit l set where a > b in lane l; NaN is not. */
static inline uint32_t vf_greater_bits(vf a, vf b)
{
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ);
#elif defined(__AVX2__)
    return (uint32_t)_mm256_movemask_ps((__m256)(a > b));
#elif defined(__SSE2__)
    return (uint32_t)_mm_movemask_ps((__m128)(a > b));
#else
    vi mask = a > b;
    uint32_t bits = 0;
    for (int i = 0; i < VX_LANES; i++) bits |= (uint32_t)(mask[i] & 1) << i;
    return bits;
#endif
}

/* Returns a > b ? yes : no, lane by lane, without a vector of masks in between. */
static inline vi vi_where_greater(vf a, vf b, vi yes, vi no)
{
#if defined(__AVX512F__)
    return (vi)_mm512_mask_blend_epi32(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), (__m512i)no, (__m512i)yes);
#elif defined(__AVX2__)
    return (vi)_mm256_blendv_ps((__m256)no, (__m256)yes, (__m256)(a > b));
#else
    vi mask = a > b;
    return (yes & mask) | (no & ~mask);
#endif
}

/* Says whether a[v] > b[v] in any lane of count (1 .. 16, a constant) vectors. */
VX_INLINE int vf_any_greater(const int count, const vf *a, const vf *b)
{
#if defined(__AVX512F__)
    __mmask16 none = 0xffff; /* each comparison keeps the lanes that have not passed */
#pragma GCC unroll 16
    for (int v = 0; v < count; v++) none = _mm512_mask_cmp_ps_mask(none, a[v], b[v], _CMP_NGT_UQ);
    return none != 0xffff;
#else
    vi any = {0};
#pragma GCC unroll 16
    for (int v = 0; v < count; v++) any |= (vi)(a[v] > b[v]);
    return vf_greater_bits((vf)(any & 0x3f800000), vf_zero()) != 0;
#endif
}

/* Turns denormals off in this thread, on x86: results below 2^-126 become 0 instead of costing a hundred cycles each.
 * Returns what vx_denormals_restore() is to be given. */
static inline unsigned vx_denormals_off(void)
{
#if defined(__SSE2__)
    unsigned before = _mm_getcsr();
    _mm_setcsr(before | 0x8040);
    return before;
#else
    return 0;
#endif
}

static inline void vx_denormals_restore(unsigned before)
{
#if defined(__SSE2__)
    _mm_setcsr(before);
#else
    (void)before;
#endif
}

/* Loads the first n lanes; where n = VX_LANES is known at compile time that is a plain load. */
VX_INLINE vf vf_load_upto(const float *p, int n) { return n == VX_LANES ? vf_load(p) : vf_load_n(p, n); }
/* Stores the first n lanes likewise. */
VX_INLINE void vf_store_upto(float *p, vf x, int n)
{
    if (n == VX_LANES) vf_store(p, x);
    else vf_store_n(p, x, n);
}
/* Stores the first n lanes, past the caches where stream is 1. */
VX_INLINE void vf_put(float *p, vf x, int n, int stream)
{
    if (stream) vf_stream(p, x);
    else vf_store_upto(p, x, n);
}

#endif
