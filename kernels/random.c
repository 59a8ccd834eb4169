/* random.c: uniform, normal, dirichlet, permutation. Every number is a function of (seed, stream, index) (core/rng.h).
 *
 * Memory traffic: 4 bytes written per number; Philox's 10 rounds of two multiplications per four numbers dominate.
 *
 *   element e of a flat tensor      word w = e % 4 of Philox block e / 4
 *   uniform                         low + (high - low) u(word), kept off low and high where rounding would reach them
 *   normal, of words (0,1) or (2,3) radius sqrt(-2 ln u(first)), angle 2 pi u(second): cosine to the first of the two
 *                                   elements, sine to the second (Box-Muller)
 *   dirichlet                       words of the blocks that begin at 2^40 attempt, one block per element and attempt
 *   permutation                     0 .. N-1 in ascending order of (key, index), the key of index e being its word
 *
 * Equal keys are ordered by index, so element 0 comes before element 1 with probability 1/2 + 2^-33: nothing to
 * correct.
 */
#include <omp.h>

#include "cpu/scratch.h"
#include "cpu/simd.h"

#define GROUP (4 * VX_LANES) /* elements of the VX_LANES blocks that one vu_philox() computes */
#define CHUNK (64 * GROUP)   /* elements a thread takes at once: whole blocks, so the cut changes nothing */
#define SERIAL 4096          /* below this many elements a second thread costs more than it brings */

typedef struct shape {
    vf base, scale, least, most;
} shape;

/* Turns words into the values of one group, a vector per word. */
typedef void transform(const shape *s, const vu word[4], vf value[4]);

/* Stores lane l of value[w] in x[4 l + w], the first n of them. */
static void store_group(float *x, const vf value[4], int64_t n)
{
    float whole[GROUP];
    float *to = n >= GROUP ? x : whole;
    vi low, high, quad_low, quad_high;
    for (int i = 0; i < VX_LANES; i++) {
        low[i] = i / 2 + (i % 2) * VX_LANES;
        high[i] = low[i] + VX_LANES / 2;
        quad_low[i] = i / 4 * 2 + i % 2 + (i / 2 % 2) * VX_LANES;
        quad_high[i] = quad_low[i] + VX_LANES / 2;
    }
    for (int half = 0; half < 2; half++) {
        vf a = __builtin_shuffle(value[0], value[1], half ? high : low);
        vf b = __builtin_shuffle(value[2], value[3], half ? high : low);
        vf_store(to + (2 * half) * VX_LANES, __builtin_shuffle(a, b, quad_low));
        vf_store(to + (2 * half + 1) * VX_LANES, __builtin_shuffle(a, b, quad_high));
    }
    if (n < GROUP) memcpy(x, whole, sizeof(float) * (size_t)n);
}

/* Fills x with what f makes of the random words. */
VX_INLINE void generate(vx_tensor *x, uint64_t seed, uint64_t stream, const shape *s, transform *f)
{
    float *out = vx_f32(x);
    int64_t n = x->numel;
#pragma omp parallel for schedule(static) if (n >= SERIAL)
    for (int64_t first = 0; first < n; first += CHUNK)
        for (int64_t i = first; i < vx_min64(first + CHUNK, n); i += GROUP) {
            vu word[4];
            vf value[4];
            vu_philox(seed, stream, (uint64_t)i / 4, word);
            f(s, word, value);
            store_group(out + i, value, n - i);
        }
}

/* -- uniform ------------------------------------------------------------------------------------------------------- */

static inline void to_uniform(const shape *s, const vu word[4], vf value[4])
{
    for (int w = 0; w < 4; w++) value[w] = vf_min(vf_max(s->base + s->scale * vf_unit(word[w]), s->least), s->most);
}

/* Fills x with numbers uniform in the open interval (low, high). */
int VX_CPU(uniform)(vx_tensor *x, uint64_t seed, uint64_t stream, float low, float high)
{
    float a = nextafterf(low, high), b = nextafterf(high, low);
    const shape s = {vf_set1(low), vf_set1(high - low), vf_set1(fminf(a, b)), vf_set1(fmaxf(a, b))};
    generate(x, seed, stream, &s, to_uniform);
    return VX_OK;
}

/* -- normal -------------------------------------------------------------------------------------------------------- */

/* Computes sine and cosine of 2 pi u, 0 < u < 1, within 1 ulp: u is exact to 2^-24, so the distance to the nearest
 * quarter turn is too. */
static inline void sine_cosine_turn(vf u, vf *sine, vf *cosine)
{
    vi quarter = __builtin_convertvector(4.0f * u + 0.5f, vi);
    vf t = (4.0f * u - __builtin_convertvector(quarter, vf)) * 1.57079633f, z = t * t;
    vf s = vf_set1(-1.9515295891e-4f);
    s = s * z + 8.3321608736e-3f;
    s = s * z - 1.6666654611e-1f;
    s = (s * z) * t + t;
    vf c = vf_set1(2.443315711809948e-5f);
    c = c * z - 1.388731625493765e-3f;
    c = c * z + 4.166664568298827e-2f;
    c = (c * z) * z - 0.5f * z + 1.0f;
    vi odd = -(quarter & 1);
    /* the sine changes sign after two quarters, the cosine after one and three */
    *sine = (vf)((vi)vf_select(odd, c, s) ^ ((quarter & 2) << 30));
    *cosine = (vf)((vi)vf_select(odd, s, c) ^ (((quarter + 1) & 2) << 30));
}

static inline void to_normal(const shape *s, const vu word[4], vf value[4])
{
    for (int w = 0; w < 4; w += 2) {
        vf sine, cosine, radius = s->scale * vf_sqrt(-2.0f * vf_log(vf_unit(word[w])));
        sine_cosine_turn(vf_unit(word[w + 1]), &sine, &cosine);
        value[w] = s->base + radius * cosine;
        value[w + 1] = s->base + radius * sine;
    }
}

/* Fills x with normal numbers. The largest magnitude that 23 bits can give is 5.77 deviations. */
int VX_CPU(normal)(vx_tensor *x, uint64_t seed, uint64_t stream, float mean, float deviation)
{
    const shape s = {.base = vf_set1(mean), .scale = vf_set1(deviation)};
    generate(x, seed, stream, &s, to_normal);
    return VX_OK;
}

/* -- dirichlet ----------------------------------------------------------------------------------------------------- */

/* Returns the centre of one of 2^32 equal cells of (0, 1). */
static inline double fine_unit(uint32_t word) { return (word + 0.5) * 0x1p-32; }

/* Draws ln of a gamma variable of shape alpha [Marsaglia and Tsang 2000, "A simple method for generating gamma
 * variables"]. Below 1 it is a variable of shape alpha + 1 times u^(1 / alpha), which in floating point would be 0 for
 * most u where alpha is small: only its logarithm is formed. */
static double log_gamma_variable(uint64_t seed, uint64_t stream, uint64_t element, double alpha)
{
    const double d = (alpha < 1 ? alpha + 1 : alpha) - 1. / 3, c = 1 / sqrt(9 * d);
    double boost = 0;
    for (uint64_t attempt = 0;; attempt++) {
        vx_philox4 r = vx_philox(seed, stream, attempt << 40 | element);
        if (attempt == 0 && alpha < 1) boost = log(fine_unit(r.word[3])) / alpha;
        double x = sqrt(-2 * log(fine_unit(r.word[0]))) * cos(2 * M_PI * fine_unit(r.word[1]));
        double root = 1 + c * x;
        if (root <= 0) continue;
        double log_v = 3 * log(root);
        if (log(fine_unit(r.word[2])) < 0.5 * x * x + d * (1 - root * root * root + log_v))
            return log(d) + log_v + boost;
    }
}

/* Draws p[n] from Dirichlet(alpha[n]), or its logarithm: gamma variables over their sum, in logarithms until the end,
 * so that a row sums to 1 however small alpha is. */
int VX_CPU(dirichlet)(vx_tensor *p, vx_tensor *alpha, uint64_t seed, uint64_t stream, int log_wanted)
{
    const int64_t N = p->shape[0], M = p->shape[1], row = alpha->stride[0], column = alpha->stride[1];
    const float *a = vx_f32(alpha);
    for (int64_t n = 0; n < (row ? N : vx_min64(N, 1)); n++)
        for (int64_t m = 0; m < M; m++) {
            float v = a[n * row + m * column];
            if (!(v > 0 && v < INFINITY))
                return vx_fail(VX_EINVAL,
                               "dirichlet: concentration %lld of row %lld is %g, expected a positive finite number",
                               (long long)m, (long long)n, (double)v);
        }
    double *rows = vx_scratch("dirichlet", sizeof(double) * (size_t)(M * omp_get_max_threads()));
    if (!rows) return VX_ENOMEM;
    float *out = vx_f32(p);
#pragma omp parallel for schedule(static) if (N * M >= SERIAL / 8)
    for (int64_t n = 0; n < N; n++) {
        double *g = rows + M * omp_get_thread_num(), most = -INFINITY, sum = 0;
        for (int64_t m = 0; m < M; m++) {
            g[m] = log_gamma_variable(seed, stream, (uint64_t)(n * M + m), a[n * row + m * column]);
            most = fmax(most, g[m]);
        }
        for (int64_t m = 0; m < M; m++) sum += exp(g[m] - most);
        double total = most + log(sum);
        for (int64_t m = 0; m < M; m++) out[n * M + m] = (float)(log_wanted ? g[m] - total : exp(g[m] - total));
    }
    vx_scratch_free(rows);
    return VX_OK;
}

/* -- permutation --------------------------------------------------------------------------------------------------- */

/* Fills x with 0 .. N-1 in a random order. Three stable passes of a radix sort, 11 bits each, over (key, index) packed
 * in 64 bits: O(N), 16 N bytes of working space. */
int VX_CPU(permutation)(vx_tensor *x, uint64_t seed, uint64_t stream)
{
    enum { BITS = 11, BUCKETS = 1 << BITS, PASSES = 3 };
    int64_t n = x->numel;
    int32_t *out = vx_i32(x);
    if (n < 2) {
        if (n) out[0] = 0;
        return VX_OK;
    }
    uint64_t *from = 0, *to = 0, *place = 0;
    scratch memory = {.op = "permutation"};
    while (scratch_pass(&memory)) {
        from = carve_u64(&memory, n);
        to = carve_u64(&memory, n);
        place = carve_u64(&memory, PASSES * BUCKETS);
    }
    if (!memory.base) return VX_ENOMEM;
    memset(place, 0, PASSES * BUCKETS * sizeof(uint64_t));
    for (int64_t i = 0; i < n; i += GROUP) {
        union {
            vu word[4];
            uint32_t of[4][VX_LANES];
        } key;
        vu_philox(seed, stream, (uint64_t)i / 4, key.word);
        for (int64_t j = 0; j < vx_min64(GROUP, n - i); j++) {
            uint32_t k = key.of[j % 4][j / 4];
            from[i + j] = (uint64_t)k << 32 | (uint64_t)(i + j);
            for (int p = 0; p < PASSES; p++) place[p * BUCKETS + (k >> (p * BITS) & (BUCKETS - 1))]++;
        }
    }
    for (int p = 0; p < PASSES; p++) {
        uint64_t *at = place + p * BUCKETS, sum = 0;
        for (int b = 0; b < BUCKETS; b++) {
            uint64_t count = at[b];
            at[b] = sum;
            sum += count;
        }
        for (int64_t i = 0; i < n; i++) {
            uint64_t where = at[from[i] >> (32 + p * BITS) & (BUCKETS - 1)]++;
            if (p < PASSES - 1) to[where] = from[i];
            else out[where] = (int32_t)from[i];
        }
        uint64_t *swap = from;
        from = to;
        to = swap;
    }
    scratch_free(&memory);
    return VX_OK;
}
