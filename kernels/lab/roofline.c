/* roofline.c: what this processor can do at best, with the vectors it is compiled for and the threads it is given.
 * Prints one ceiling a line, "name value unit": the numbers that the steps of this folder and
 * experiments/bench/quantizer.lua are held against.
 *
 *     cc -O3 -march=x86-64-v3 -ffp-contract=fast -fopenmp roofline.c -o roof && ./roof THREADS
 *
 *   fma       multiply-adds whose operands stay in registers, 2 flops each; a multiplication and an addition where the
 *             instruction set has no fused one
 *   exp2      2^x for x <= 0, to 1.4 units in the last place: a polynomial of degree 5 and a power of two put into the
 *             exponent, from the L1 cache to the L1 cache
 *   compare   is x > threshold, both read from the L2 cache, one branch for every 64 of them, hardly ever taken
 *   read      sum of an array far larger than the caches
 *   copy      memcpy of one; bytes read and bytes written both count
 *
 * A ceiling is measured REPEATS times, and the best is taken: noise only ever slows a processor down.
 */
#define _GNU_SOURCE
#include <omp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "../shared/common.h"

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif

enum {
    REPEATS = 7,
    CHAINS = 10,       /* independent chains of operations: latency times throughput of any x86 */
    L1_FLOATS = 2048,  /* 8 KB */
    L2_FLOATS = 16384, /* 64 KB, and as much of thresholds */
    ARRAY = 64 << 20,  /* floats of the arrays that come from memory: 256 MB */
};

typedef float vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));

#if defined(__AVX512F__)
#define REGISTER "v"
#elif defined(__SSE2__)
#define REGISTER "x"
#else
#define REGISTER "w"
#endif

static volatile float sink;

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static float total(vf x)
{
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += x[i];
    return sum;
}

/* Return max(a, b), and t rounded to an integer, as a float and, where there is no scaling instruction, as an
 * integer. */
#if defined(__AVX512F__)
#define ROUND(t) ((vf)_mm512_roundscale_ps(t, 8))
#elif defined(__AVX2__)
#define MAX(a, b) ((vf)_mm256_max_ps(a, b))
#define ROUND(t) ((vf)_mm256_round_ps(t, 8))
#define INTEGER(t) ((vi)_mm256_cvtps_epi32(t))
#elif defined(__SSE4_1__)
#define MAX(a, b) ((vf)_mm_max_ps(a, b))
#define ROUND(t) ((vf)_mm_round_ps(t, 8))
#define INTEGER(t) ((vi)_mm_cvtps_epi32(t))
#else
#define MAX(a, b) ((vf)(((vi)(a) & ((a) > (b))) | ((vi)(b) & ~((a) > (b)))))
#define ROUND(t) (((t) + 12582912.0f) - 12582912.0f) /* 1.5 2^23 */
#define INTEGER(t) __builtin_convertvector(t, vi)
#endif

/* Each returns the amount of work done by one thread. */

static double multiply_add(long rounds)
{
    vf a[CHAINS], b = (vf){0} + 1.0001f, c = (vf){0} + 0.999f;
#pragma GCC unroll 10
    for (int i = 0; i < CHAINS; i++) a[i] = (vf){0} + (float)i;
    for (long r = 0; r < rounds; r++) {
#pragma GCC unroll 10
        for (int i = 0; i < CHAINS; i++) a[i] = a[i] * b + c;
        __asm__ volatile("" : "+" REGISTER(a[0])); /* the loop stays as it is */
    }
#pragma GCC unroll 10
    for (int i = 1; i < CHAINS; i++) a[0] += a[i];
    sink = total(a[0]);
    return 2.0 * LANES * CHAINS * (double)rounds;
}

/* Computes y[i] = 2^x[i] for COUNT vectors side by side, step by step for all of them. */
enum { COUNT = 4 };
VX_INLINE void powers(const float *x, float *y)
{
    vf t[COUNT], n[COUNT], p[COUNT];
#define EACH _Pragma("GCC unroll 4") for (int i = 0; i < COUNT; i++)
    EACH t[i] = *(const vf *)(x + i * LANES);
#if !defined(__AVX512F__)
    EACH t[i] = MAX(t[i], (vf){0} - 126.0f);
#endif
    EACH n[i] = ROUND(t[i]);
    EACH t[i] -= n[i];
    EACH p[i] = t[i] * 1.32647271e-3f + 9.67151268e-3f;
    EACH p[i] = p[i] * t[i] + 5.55073374e-2f;
    EACH p[i] = p[i] * t[i] + 2.40222421e-1f;
    EACH p[i] = p[i] * t[i] + 6.93146978e-1f;
    EACH p[i] = p[i] * t[i] + 1.0f;
#if defined(__AVX512F__)
    EACH *(vf *)(y + i * LANES) = _mm512_scalef_ps(p[i], n[i]);
#else
    EACH *(vf *)(y + i * LANES) = (vf)((vi)p[i] + (INTEGER(n[i]) << 23));
#endif
#undef EACH
}

static double exponentials(long rounds)
{
    float x[L1_FLOATS] __attribute__((aligned(64))), y[L1_FLOATS] __attribute__((aligned(64)));
    for (int i = 0; i < L1_FLOATS; i++) x[i] = -30.0f * (float)i / L1_FLOATS;
    for (long r = 0; r < rounds; r++) {
        for (int i = 0; i < L1_FLOATS; i += COUNT * LANES) powers(x + i, y + i);
        __asm__ volatile("" ::: "memory");
    }
    sink = y[0];
    return (double)L1_FLOATS * (double)rounds;
}

static double comparisons(long rounds)
{
    float *x = aligned_alloc(64, 2 * L2_FLOATS * sizeof(float)), *threshold = x + L2_FLOATS;
    long passed = 0;
    for (int i = 0; i < L2_FLOATS; i++) x[i] = -1, threshold[i] = 0;
    for (long r = 0; r < rounds; r++) {
        for (int i = 0; i < L2_FLOATS; i += 64) {
            vi any = {0};
#pragma GCC unroll 16
            for (int j = i; j < i + 64; j += LANES) any |= *(const vf *)(x + j) > *(const vf *)(threshold + j);
#if defined(__AVX512F__)
            passed += _mm512_test_epi32_mask((__m512i)any, (__m512i)any) != 0;
#elif defined(__AVX2__)
            if (__builtin_expect(!_mm256_testz_si256((__m256i)any, (__m256i)any), 0)) passed++;
#elif defined(__SSE2__)
            if (__builtin_expect(_mm_movemask_ps((__m128)any), 0)) passed++;
#else
            for (int l = 0; l < LANES; l++) passed -= any[l];
#endif
        }
        __asm__ volatile("" ::: "memory");
    }
    sink = (float)passed;
    free(x);
    return (double)L2_FLOATS * (double)rounds;
}

static float *from, *to;

static double read_memory(long rounds)
{
    const int threads = omp_get_num_threads(), mine = omp_get_thread_num();
    const long first = (long)ARRAY / 64 * mine / threads * 64, end = (long)ARRAY / 64 * (mine + 1) / threads * 64;
    vf sum[4] = {{0}};
    for (long r = 0; r < rounds; r++)
        for (long i = first; i < end; i += 4 * LANES)
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) sum[j] += *(const vf *)(from + i + j * LANES);
    sink = total(sum[0] + sum[1] + sum[2] + sum[3]);
    return 4.0 * (double)(end - first) * (double)rounds;
}

static double copy_memory(long rounds)
{
    const int threads = omp_get_num_threads(), mine = omp_get_thread_num();
    const long first = (long)ARRAY / 64 * mine / threads * 64, end = (long)ARRAY / 64 * (mine + 1) / threads * 64;
    for (long r = 0; r < rounds; r++) memcpy(to + first, from + first, sizeof(float) * (size_t)(end - first));
    return 8.0 * (double)(end - first) * (double)rounds;
}

static void measure(const char *name, const char *unit, double (*work)(long), long rounds)
{
    double best = 0;
    for (int repeat = 0; repeat < REPEATS; repeat++) {
        double done = 0, start = 0;
#pragma omp parallel reduction(+ : done)
        {
            work(rounds / 20 + 1); /* wakes the threads and the clock up */
#pragma omp barrier
#pragma omp master
            start = now();
#pragma omp barrier
            done = work(rounds);
        }
        double rate = done / (now() - start);
        if (rate > best) best = rate;
    }
    printf("%s %.2f %s\n", name, best * 1e-9, unit);
}

int main(int argc, char **argv)
{
    if (argc > 1) omp_set_num_threads(atoi(argv[1]));
    from = aligned_alloc(2 << 20, sizeof(float) * (size_t)ARRAY);
    to = aligned_alloc(2 << 20, sizeof(float) * (size_t)ARRAY);
    if (!from || !to) {
        fprintf(stderr, "roof: no memory for two arrays of %zu MB\n", sizeof(float) * (size_t)ARRAY >> 20);
        return 1;
    }
    memset(from, 0, sizeof(float) * (size_t)ARRAY);
    memset(to, 0, sizeof(float) * (size_t)ARRAY);
    measure("fma", "GFLOP/s", multiply_add, 5000000);
    measure("exp2", "G/s", exponentials, 200000);
    measure("compare", "G/s", comparisons, 40000);
    measure("read", "GB/s", read_memory, 2);
    measure("copy", "GB/s", copy_memory, 1);
    return 0;
}
