/* norm.c: group normalization [1] with a fused activation, and layer normalization [2].
 *
 *   xhat = (x - mean) rstd,  z = gamma xhat + beta,  y = act(z)
 *   dz = dy act'(z);  dx = rstd (gamma dz - A - xhat D);  dgamma = sum dz xhat, dbeta = sum dz
 * mean and rstd = 1 / sqrt(variance + eps) are over the S positions and C / G channels of a group, or over the C
 * channels of a row; A and D are the means of gamma dz and of gamma dz xhat there. With lengths, the positions of an
 * image from its length on count nowhere; y and dx are 0 there. The rstd of a single number is set to 0: then dx is 0
 * as it should be, and not the rounding of gamma dz - A times 1 / sqrt(eps).
 *
 * Group norm reads x twice, its gradient x and dy twice. Of an image that fits the L2 cache the second reading, which
 * runs backwards, is free: a thread does whole images where there are enough of them. The activation costs more than
 * the rest (an exponential and a division) but no memory traffic of its own.
 *
 * Variances are exact to float32 rounding whatever the mean: a chunk of positions (32 KiB, in L1) is read twice, the
 * second time relative to its channel's mean, and the chunks' means and squares are merged in float64 by Chan's formula
 * [3]. Chunks depend on the sizes alone, and sums over chunks, channels and images run in ascending order.
 *
 * [1] Wu and He 2018, Group normalization.  [2] Ba, Kiros and Hinton 2016, Layer normalization.
 * [3] Chan, Golub and LeVeque 1983, Algorithms for computing the sample variance.
 */
#include <omp.h>

#include "cpu/norm.h"
#include "cpu/lengths.h"
#include "cpu/scratch.h"

enum {
    SERIAL_BELOW = 20000, /* elements times flops that are not worth waking a thread for */
    CHUNK_FLOATS = 8192,  /* 32 KiB */
    PARTS = 64,           /* of the rows in layer_norm_backward */
    AHEAD = 16, /* positions to prefetch: a step of C floats soon leaves the page, where the hardware's prefetch ends */
};

/* -- Group norm: chunks of positions ------------------------------------------------------------------------------- */

typedef struct group {
    int64_t B, S, C, G, chunk, chunks;
    const float *x, *dy, *gamma, *beta;
    float *mean, *rstd;     /* (B,G) */
    float *out;             /* y or dx */
    float *partial;         /* (B,chunks,2,C): mean and sum of squares about it, or the sums of dz and of dz xhat */
    double *total;          /* (B,2,C): the same over an image */
    float *channel;         /* (B,4,C): mean, scale (forward); mean, rstd and the factors s, t of dx (backward) */
    float *buffer;          /* a chunk of an x that is bf16 (group_statistics), */
    int64_t buffered;       /* and its floats */
    const int32_t *lengths; /* (B), the positions of an image that count; NULL: all S */
    int act;
    int stream; /* out bypasses the caches */
} group;

/* Describes a call on x (B,S,C) with mean (B,G). */
static group group_of(const vx_tensor *x, const vx_tensor *mean)
{
    group q = {.B = x->shape[0], .S = x->shape[1], .C = x->shape[2], .G = mean->shape[1], .x = vx_f32(x)};
    q.chunk = vx_max64(1, vx_min64(q.S, CHUNK_FLOATS / vx_max64(q.C, 1)));
    q.chunks = vx_ceil_div(q.S, q.chunk);
    return q;
}

static int64_t length_of(const group *q, int64_t b) { return q->lengths ? q->lengths[b] : q->S; }

/* Returns how many positions of chunk k of image b count. */
static int64_t counted(const group *q, int64_t b, int64_t k)
{
    return vx_max64(vx_min64(q->chunk, length_of(q, b) - k * q->chunk), 0);
}

/* Returns how many numbers the statistics of a group of image b are of; 1 where there are none. */
static double group_size(const group *q, int64_t b)
{
    return (double)vx_max64(length_of(q, b), 1) * (double)(q->C / q->G);
}

/* Writes 0 to the positions of chunk k of image b that do not count. */
static void clear_rest(const group *q, int64_t b, int64_t k)
{
    const int64_t count = counted(q, b, k), room = vx_min64(q->chunk, q->S - k * q->chunk);
    if (count < room)
        memset(q->out + (b * q->S + k * q->chunk + count) * q->C, 0, sizeof(float) * (size_t)((room - count) * q->C));
}

/* Hands out the working arrays; memory->base is NULL where that fails. */
static void group_scratch(group *q, scratch *memory)
{
    while (scratch_pass(memory)) {
        q->total = carve_f64(memory, q->B * 2 * q->C);
        q->channel = carve_f32(memory, q->B * 4 * q->C);
        q->partial = carve_f32(memory, q->B * q->chunks * 2 * q->C);
        q->buffer = carve_f32(memory, q->buffered);
    }
}

/* Computes mean, and sum of squares about it, of each channel over `count` positions: `vectors` of channels, n in each.
 * The mean is taken again from the residuals, which removes the rounding of the first sum. */
VX_INLINE void moments(int n, int vectors, float *mean, float *squares, const float *x, int64_t count, int64_t C)
{
    vf m[4], r[4], q[4];
    const vf share = vf_set1(1.0f / (float)count);
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) m[v] = r[v] = q[v] = vf_zero();
    for (int64_t i = 0; i < count; i++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            __builtin_prefetch(x + (i + AHEAD) * C + v * VX_LANES);
            m[v] += vf_load_upto(x + i * C + v * VX_LANES, n);
        }
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) m[v] *= share;
    for (int64_t i = 0; i < count; i++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            const vf d = vf_load_upto(x + i * C + v * VX_LANES, n) - m[v];
            r[v] += d;
            q[v] += d * d;
        }
#pragma GCC unroll 4
    for (int v = 0; v < vectors; v++) {
        vf_store_upto(mean + v * VX_LANES, m[v] + r[v] * share, n);
        vf_store_upto(squares + v * VX_LANES, q[v] - r[v] * (r[v] * share), n);
    }
}

/* Measures chunk k of image b, whose first element is at x, into partial. */
static void measure_at(const group *q, int64_t b, int64_t k, const float *x)
{
    const int64_t C = q->C, count = counted(q, b, k);
    float *mean = q->partial + (b * q->chunks + k) * 2 * C, *squares = mean + C;
    int64_t c = 0;
    if (!count) return;
    for (; c + 4 * VX_LANES <= C; c += 4 * VX_LANES) moments(VX_LANES, 4, mean + c, squares + c, x + c, count, C);
    for (; c + VX_LANES <= C; c += VX_LANES) moments(VX_LANES, 1, mean + c, squares + c, x + c, count, C);
    if (c < C) moments((int)(C - c), 1, mean + c, squares + c, x + c, count, C);
}

static void measure(const group *q, int64_t b, int64_t k)
{
    measure_at(q, b, k, q->x + (b * q->S + k * q->chunk) * q->C);
}

/* Merges the chunks of image b into the statistics of its groups. */
static void merge_chunks(const group *q, int64_t b, float eps)
{
    const int64_t C = q->C, D = C / q->G, chunks = vx_ceil_div(length_of(q, b), q->chunk);
    const double size = group_size(q, b);
    const float *partial = q->partial + b * q->chunks * 2 * C;
    double *sum = q->total + b * 2 * C, *squares = sum + C;
    float *mean = q->channel + b * 4 * C, *scale = mean + C;
    for (int64_t c = 0; c < C; c++) sum[c] = squares[c] = 0;
    for (int64_t k = 0; k < chunks; k++) {
        const double count = (double)counted(q, b, k);
        for (int64_t c = 0; c < C; c++) sum[c] += count * partial[2 * k * C + c];
    }
    for (int64_t g = 0; g < q->G; g++) {
        double total = 0;
        for (int64_t c = g * D; c < (g + 1) * D; c++) total += sum[c];
        for (int64_t c = g * D; c < (g + 1) * D; c++) sum[c] = total / size;
    }
    for (int64_t k = 0; k < chunks; k++) {
        const double count = (double)counted(q, b, k);
        for (int64_t c = 0; c < C; c++) {
            const double away = partial[2 * k * C + c] - sum[c];
            squares[c] += partial[(2 * k + 1) * C + c] + count * away * away;
        }
    }
    for (int64_t g = 0; g < q->G; g++) {
        double total = 0;
        for (int64_t c = g * D; c < (g + 1) * D; c++) total += squares[c];
        const float rstd = size > 1 ? (float)(1 / sqrt(total / size + eps)) : 0;
        q->mean[b * q->G + g] = (float)sum[g * D];
        q->rstd[b * q->G + g] = rstd;
        for (int64_t c = g * D; c < (g + 1) * D; c++) mean[c] = (float)sum[c], scale[c] = rstd * q->gamma[c];
    }
}

VX_INLINE void normalize_as(const group *q, int64_t b, int64_t k, int act)
{
    const int64_t C = q->C, first = b * q->S + k * q->chunk, count = counted(q, b, k);
    const float *mean = q->channel + b * 4 * C, *scale = mean + C, *beta = q->beta;
    vf slope;
    for (int64_t i = first; i < first + count; i++) {
        const float *x = q->x + i * C;
        float *y = q->out + i * C;
        int64_t c = 0;
        for (; c + VX_LANES <= C; c += VX_LANES)
            vf_put(y + c,
                   activate(act, (vf_load(x + c) - vf_load(mean + c)) * vf_load(scale + c) + vf_load(beta + c), &slope),
                   VX_LANES, q->stream);
        if (c < C) {
            const int n = (int)(C - c);
            vf_store_n(y + c,
                       activate(act,
                                (vf_load_n(x + c, n) - vf_load_n(mean + c, n)) * vf_load_n(scale + c, n) +
                                    vf_load_n(beta + c, n),
                                &slope),
                       n);
        }
    }
}

/* Normalizes chunk k of image b. */
static void normalize(const group *q, int64_t b, int64_t k)
{
    if (q->act == VX_ACT_SILU) normalize_as(q, b, k, VX_ACT_SILU);
    else if (q->act == VX_ACT_GELU) normalize_as(q, b, k, VX_ACT_GELU);
    else normalize_as(q, b, k, VX_ACT_NONE);
    clear_rest(q, b, k);
}

/* Says whether a thread does whole images; where there are too few, it does chunks. That changes who sums, never
 * what. */
static int by_image(const group *q)
{
    const int threads = omp_get_max_threads();
    return q->B % threads == 0 || q->B >= 4 * threads;
}

int VX_CPU(group_norm)(vx_tensor *y, vx_tensor *mean, vx_tensor *rstd, vx_tensor *x, vx_tensor *gamma, vx_tensor *beta,
                       vx_tensor *lengths, int act, float eps)
{
    if (check_lengths("group_norm", lengths, x->shape[1])) return VX_EINVAL;
    group q = group_of(x, mean);
    q.lengths = lengths ? vx_i32(lengths) : 0;
    q.gamma = vx_f32(gamma), q.beta = vx_f32(beta), q.out = vx_f32(y), q.mean = vx_f32(mean), q.rstd = vx_f32(rstd),
    q.act = act;
    if (!q.B || !q.C) { /* no channels: no deviation */
        memset(q.mean, 0, sizeof(float) * (size_t)mean->numel);
        memset(q.rstd, 0, sizeof(float) * (size_t)rstd->numel);
        return VX_OK;
    }
    scratch memory = {.op = "group_norm"};
    group_scratch(&q, &memory);
    if (!memory.base) return VX_ENOMEM;
    const int whole = by_image(&q);
    q.stream = vf_streams(q.out, q.B * q.S * q.C, q.C);
#pragma omp parallel if (16 * q.B * q.S * q.C > SERIAL_BELOW)
    if (whole) {
#pragma omp for schedule(static)
        for (int64_t b = 0; b < q.B; b++) {
            for (int64_t k = 0; k < q.chunks; k++) measure(&q, b, k);
            merge_chunks(&q, b, eps);
            for (int64_t k = q.chunks; k-- > 0;) normalize(&q, b, k);
            if (q.stream) vf_stream_end();
        }
    } else {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < q.B * q.chunks; i++) measure(&q, i / q.chunks, i % q.chunks);
#pragma omp for schedule(static)
        for (int64_t b = 0; b < q.B; b++) merge_chunks(&q, b, eps);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < q.B * q.chunks; i++) {
            normalize(&q, i / q.chunks, i % q.chunks);
            if (q.stream) vf_stream_end();
        }
    }
    scratch_free(&memory);
    return VX_OK;
}

/* -- Statistics of one image (norm.h) ------------------------------------------------------------------------------ */

int VX_CPU(group_statistics)(float *mean, float *rstd, body x, int64_t first, int64_t S, int64_t C, int64_t G,
                             float eps)
{
    if (!C) {
        memset(mean, 0, sizeof(float) * (size_t)G);
        memset(rstd, 0, sizeof(float) * (size_t)G);
        return VX_OK;
    }
    vx_tensor like = {.shape = {1, S, C}}, groups = {.shape = {1, G}};
    group q = group_of(&like, &groups);
    scratch memory = {.op = "group_norm"};
    q.buffered = body_floats(x, q.chunk * C);
    group_scratch(&q, &memory);
    if (!memory.base) return VX_ENOMEM;
    memset(q.channel, 0, sizeof(float) * (size_t)(4 * C));
    q.mean = mean, q.rstd = rstd, q.gamma = q.channel + 2 * C; /* its factors are not wanted here */
    for (int64_t k = 0; k < q.chunks; k++)
        measure_at(&q, 0, k, body_read(x, first + k * q.chunk * C, counted(&q, 0, k) * C, q.buffer));
    merge_chunks(&q, 0, eps);
    scratch_free(&memory);
    return VX_OK;
}

/* -- Group norm: gradient ------------------------------------------------------------------------------------------ */

/* Fills in mean and rstd of image b's channels. dx = p dz - (x - mean) s - t, where p = gamma rstd; settle() adds s and
 * t. */
static void load_statistics(const group *q, int64_t b)
{
    const int64_t C = q->C, D = C / q->G;
    float *mean = q->channel + b * 4 * C, *rstd = mean + C;
    for (int64_t c = 0; c < C; c++) mean[c] = q->mean[b * q->G + c / D], rstd[c] = q->rstd[b * q->G + c / D];
}

/* Returns dz = dy act'(z). */
VX_INLINE vf gradient_of_z(int act, vf dy, vf xhat, vf gamma, vf beta)
{
    vf slope;
    activate(act, gamma * xhat + beta, &slope);
    return act == VX_ACT_NONE ? dy : dy * slope;
}

/* Sums dz and dz xhat of n channels, from c on, over chunk k of image b into partial. */
VX_INLINE void sum_channels(const group *q, int64_t b, int64_t k, int64_t c, int n, int act)
{
    const int64_t C = q->C, first = b * q->S + k * q->chunk, count = counted(q, b, k);
    const float *x = q->x + first * C + c, *dy = q->dy + first * C + c, *channel = q->channel + b * 4 * C + c;
    const vf mean = vf_load_upto(channel, n), rstd = vf_load_upto(channel + C, n),
             gamma = vf_load_upto(q->gamma + c, n), beta = vf_load_upto(q->beta + c, n);
    vf s = vf_zero(), t = vf_zero();
    for (int64_t i = 0; i < count; i++) {
        __builtin_prefetch(x + (i + AHEAD) * C);
        __builtin_prefetch(dy + (i + AHEAD) * C);
        const vf xhat = (vf_load_upto(x + i * C, n) - mean) * rstd,
                 dz = gradient_of_z(act, vf_load_upto(dy + i * C, n), xhat, gamma, beta);
        s += dz;
        t += dz * xhat;
    }
    float *partial = q->partial + (b * q->chunks + k) * 2 * C + c;
    vf_store_upto(partial, s, n);
    vf_store_upto(partial + C, t, n);
}

VX_INLINE void sum_chunk_as(const group *q, int64_t b, int64_t k, int act)
{
    int64_t c = 0;
    for (; c + VX_LANES <= q->C; c += VX_LANES) sum_channels(q, b, k, c, VX_LANES, act);
    if (c < q->C) sum_channels(q, b, k, c, (int)(q->C - c), act);
}

/* Adds up the sums of image b, and fills in the factors s and t of its groups. */
static void settle(const group *q, int64_t b)
{
    const int64_t C = q->C, D = C / q->G;
    const float *partial = q->partial + b * q->chunks * 2 * C;
    double *total = q->total + b * 2 * C;
    float *channel = q->channel + b * 4 * C;
    for (int64_t c = 0; c < 2 * C; c++) total[c] = 0;
    for (int64_t k = 0; k < q->chunks; k++)
        for (int64_t c = 0; c < 2 * C; c++) total[c] += partial[2 * k * C + c];
    for (int64_t g = 0; g < q->G; g++) {
        double plain = 0, along = 0;
        for (int64_t c = g * D; c < (g + 1) * D; c++)
            plain += q->gamma[c] * total[c], along += q->gamma[c] * total[C + c];
        const double rstd = q->rstd[b * q->G + g], share = rstd / group_size(q, b);
        for (int64_t c = g * D; c < (g + 1) * D; c++)
            channel[2 * C + c] = (float)(along * share * rstd), channel[3 * C + c] = (float)(plain * share);
    }
}

/* Writes dx of n channels, from c on, of position i of all positions. */
VX_INLINE void write_channels(const group *q, int64_t b, int64_t i, int64_t c, int n, int act)
{
    const int64_t C = q->C, at = i * C + c;
    const float *channel = q->channel + b * 4 * C + c;
    const vf away = vf_load_upto(q->x + at, n) - vf_load_upto(channel, n), rstd = vf_load_upto(channel + C, n),
             gamma = vf_load_upto(q->gamma + c, n);
    const vf dz = gradient_of_z(act, vf_load_upto(q->dy + at, n), away * rstd, gamma, vf_load_upto(q->beta + c, n));
    vf_put(q->out + at,
           (gamma * rstd) * dz - (away * vf_load_upto(channel + 2 * C, n) + vf_load_upto(channel + 3 * C, n)), n,
           q->stream);
}

VX_INLINE void write_chunk_as(const group *q, int64_t b, int64_t k, int act)
{
    const int64_t first = b * q->S + k * q->chunk, count = counted(q, b, k);
    for (int64_t i = first; i < first + count; i++) {
        int64_t c = 0;
        for (; c + VX_LANES <= q->C; c += VX_LANES) write_channels(q, b, i, c, VX_LANES, act);
        if (c < q->C) write_channels(q, b, i, c, (int)(q->C - c), act);
    }
}

static void sum_chunk(const group *q, int64_t b, int64_t k)
{
    if (q->act == VX_ACT_SILU) sum_chunk_as(q, b, k, VX_ACT_SILU);
    else if (q->act == VX_ACT_GELU) sum_chunk_as(q, b, k, VX_ACT_GELU);
    else sum_chunk_as(q, b, k, VX_ACT_NONE);
}

static void write_chunk(const group *q, int64_t b, int64_t k)
{
    if (q->act == VX_ACT_SILU) write_chunk_as(q, b, k, VX_ACT_SILU);
    else if (q->act == VX_ACT_GELU) write_chunk_as(q, b, k, VX_ACT_GELU);
    else write_chunk_as(q, b, k, VX_ACT_NONE);
    clear_rest(q, b, k);
}

int VX_CPU(group_norm_backward)(vx_tensor *dx, vx_tensor *dgamma, vx_tensor *dbeta, vx_tensor *dy, vx_tensor *x,
                                vx_tensor *gamma, vx_tensor *beta, vx_tensor *mean, vx_tensor *rstd, vx_tensor *lengths,
                                int act)
{
    if (check_lengths("group_norm_backward", lengths, x->shape[1])) return VX_EINVAL;
    group q = group_of(x, mean);
    q.lengths = lengths ? vx_i32(lengths) : 0;
    q.dy = vx_f32(dy), q.gamma = vx_f32(gamma), q.beta = vx_f32(beta), q.out = vx_f32(dx), q.mean = vx_f32(mean);
    q.rstd = vx_f32(rstd), q.act = act;
    if (!q.C) return VX_OK;
    scratch memory = {.op = "group_norm_backward"};
    group_scratch(&q, &memory);
    if (!memory.base) return VX_ENOMEM;
    const int whole = by_image(&q);
    q.stream = vf_streams(q.out, q.B * q.S * q.C, q.C);
#pragma omp parallel if (32 * q.B * q.S * q.C > SERIAL_BELOW)
    if (whole) {
#pragma omp for schedule(static)
        for (int64_t b = 0; b < q.B; b++) {
            load_statistics(&q, b);
            for (int64_t k = 0; k < q.chunks; k++) sum_chunk(&q, b, k);
            settle(&q, b);
            for (int64_t k = q.chunks; k-- > 0;) write_chunk(&q, b, k);
            if (q.stream) vf_stream_end();
        }
    } else {
#pragma omp for schedule(static)
        for (int64_t b = 0; b < q.B; b++) load_statistics(&q, b);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < q.B * q.chunks; i++) sum_chunk(&q, i / q.chunks, i % q.chunks);
#pragma omp for schedule(static)
        for (int64_t b = 0; b < q.B; b++) settle(&q, b);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < q.B * q.chunks; i++) {
            write_chunk(&q, i / q.chunks, i % q.chunks);
            if (q.stream) vf_stream_end();
        }
    }
    for (int64_t c = 0; c < q.C; c++) {
        double plain = 0, along = 0;
        for (int64_t b = 0; b < q.B; b++) plain += q.total[2 * b * q.C + c], along += q.total[(2 * b + 1) * q.C + c];
        vx_f32(dbeta)[c] = (float)plain;
        vx_f32(dgamma)[c] = (float)along;
    }
    scratch_free(&memory);
    return VX_OK;
}

/* -- Layer norm ---------------------------------------------------------------------------------------------------- */

/* Returns a mask of the first n lanes. */
static inline vi lanes_below(int n)
{
    vi lane;
    for (int i = 0; i < VX_LANES; i++) lane[i] = i;
    return lane < n;
}

/* Returns x - mean, and 0 in the lanes past the row's end. */
VX_INLINE vf away(const float *x, vf mean, int n)
{
    return n == VX_LANES ? vf_load(x) - mean : vf_select(lanes_below(n), vf_load_n(x, n) - mean, vf_zero());
}

int VX_CPU(layer_norm)(vx_tensor *y, vx_tensor *mean, vx_tensor *rstd, vx_tensor *x, vx_tensor *gamma, vx_tensor *beta,
                       float eps)
{
    const int64_t N = x->shape[0], C = x->shape[1], full = C / VX_LANES * VX_LANES;
    const int rest = (int)(C - full);
    const float share = 1.0f / (float)C, *scale = vx_f32(gamma), *shift = vx_f32(beta);
#pragma omp parallel for schedule(static) if (8 * N * C > SERIAL_BELOW)
    for (int64_t i = 0; i < N; i++) {
        const float *row = vx_f32(x) + i * C;
        float *out = vx_f32(y) + i * C;
        vf s = vf_zero(), r = vf_zero(), q = vf_zero();
        for (int64_t c = 0; c < full; c += VX_LANES) s += vf_load(row + c);
        if (rest) s += vf_load_n(row + full, rest);
        const float rough = vf_sum(s) * share;
        for (int64_t c = 0; c < C; c += VX_LANES) {
            const vf d = away(row + c, vf_set1(rough), c < full ? VX_LANES : rest);
            r += d;
            q += d * d;
        }
        const float residual = vf_sum(r), m = rough + residual * share;
        const float variance = (vf_sum(q) - residual * (residual * share)) * share;
        const float inverse = C > 1 ? 1.0f / sqrtf((variance > 0 ? variance : variance < 0 ? 0 : variance) + eps) : 0;
        vx_f32(mean)[i] = m;
        vx_f32(rstd)[i] = inverse;
        for (int64_t c = 0; c < full; c += VX_LANES)
            vf_store(out + c, (vf_load(row + c) - m) * inverse * vf_load(scale + c) + vf_load(shift + c));
        if (rest)
            vf_store_n(out + full,
                       (vf_load_n(row + full, rest) - m) * inverse * vf_load_n(scale + full, rest) +
                           vf_load_n(shift + full, rest),
                       rest);
    }
    return VX_OK;
}

int VX_CPU(layer_norm_backward)(vx_tensor *dx, vx_tensor *dgamma, vx_tensor *dbeta, vx_tensor *dy, vx_tensor *x,
                                vx_tensor *gamma, vx_tensor *mean, vx_tensor *rstd)
{
    const int64_t N = x->shape[0], C = x->shape[1], full = C / VX_LANES * VX_LANES,
                  parts = vx_max64(vx_min64(N, PARTS), 1);
    const int rest = (int)(C - full);
    const float share = 1.0f / (float)vx_max64(C, 1), *scale = vx_f32(gamma);
    float *partial = vx_scratch("layer_norm_backward", sizeof(float) * (size_t)(parts * 2 * C));
    if (!partial) return VX_ENOMEM;
    memset(partial, 0, sizeof(float) * (size_t)(parts * 2 * C));
#pragma omp parallel for schedule(static) if (16 * N * C > SERIAL_BELOW)
    for (int64_t part = 0; part < parts; part++) {
        float *dg = partial + part * 2 * C, *db = dg + C;
        for (int64_t i = part * N / parts; i < (part + 1) * N / parts; i++) {
            const float *in = vx_f32(x) + i * C, *up = vx_f32(dy) + i * C;
            float *out = vx_f32(dx) + i * C;
            const vf m = vf_set1(vx_f32(mean)[i]), inverse = vf_set1(vx_f32(rstd)[i]);
            vf plain = vf_zero(), along = vf_zero();
            for (int64_t c = 0; c < C; c += VX_LANES) {
                const int n = c < full ? VX_LANES : rest;
                const vf g = vf_load_upto(up + c, n), xhat = away(in + c, m, n) * inverse,
                         scaled = g * vf_load_upto(scale + c, n);
                plain += scaled;
                along += scaled * xhat;
                vf_store_upto(db + c, vf_load_upto(db + c, n) + g, n);
                vf_store_upto(dg + c, vf_load_upto(dg + c, n) + g * xhat, n);
            }
            const float a = vf_sum(plain) * share, d = vf_sum(along) * share;
            for (int64_t c = 0; c < C; c += VX_LANES) {
                const int n = c < full ? VX_LANES : rest;
                const vf xhat = (vf_load_upto(in + c, n) - m) * inverse;
                vf_store_upto(out + c,
                              inverse * (vf_load_upto(up + c, n) * vf_load_upto(scale + c, n) - (xhat * d + a)), n);
            }
        }
    }
    for (int64_t part = 1; part < parts; part++)
        for (int64_t c = 0; c < 2 * C; c++) partial[c] += partial[part * 2 * C + c];
    memcpy(vx_f32(dgamma), partial, sizeof(float) * (size_t)C);
    memcpy(vx_f32(dbeta), partial + C, sizeof(float) * (size_t)C);
    vx_scratch_free(partial);
    return VX_OK;
}
