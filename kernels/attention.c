/* attention.c: softmax(q k' / sqrt(D)) v for each head, forward and backward, in tiles: never a T x T array.
 *
 * Forward: 64 queries meet 64 keys at a time, S = q k'. The softmax is online [1, 2]: a query keeps the largest score m
 * so far and the sum l of 2^(s - m); where a tile raises m, l and the output so far shrink by 2^(old m - new m). Kept
 * for the backward pass: m and log2 l, two numbers a query. Scores are to the base 2: log2(e) is in their scale.
 *
 * Backward, with P = 2^(s - m) / l made again, the mask K of dropout (0 or its factor) drawn again, and delta = dy . y:
 *   dv = (P K)' dy      dS = P (K (dy v') - delta)      dk = dS' q / sqrt(D)      dq = dS k / sqrt(D)
 * delta is the sum over keys of P K (dy v'), since y = (P K) v.
 *
 * All products are those of gemm_tile.h. A task is one head, or in the forward pass CHUNK queries of it; its sums run
 * over keys, or queries, in order, so that no bit depends on the number of threads.
 *
 * [1] Milakov and Gimelshein 2018, Online normalizer calculation for softmax.
 * [2] Dao, Fu, Ermon, Rudra, Re 2022, FlashAttention.
 */
#include <omp.h>

#include "shared/attention.h"
#include "cpu/gemm_tile.h"
#include "cpu/lengths.h"
#include "cpu/scratch.h"

enum {
    QUERIES = 64,        /* of a tile, a multiple of ATTENTION_DRAWS */
    KEYS = 64,           /* of a tile, a multiple of GEMM_COLUMNS */
    CHUNK = 8 * QUERIES, /* queries of a forward task, which share packed keys and values */
};

typedef struct attention_call {
    attention_sizes a;
    const float *q, *k, *v;
    const int32_t *lengths; /* NULL: all keys count */
    bool dropout;
    uint64_t seed, stream;
} attention_call;

static attention_call call_of(const vx_tensor *q, const vx_tensor *k, const vx_tensor *v, const vx_tensor *lengths,
                              float dropout, uint64_t seed, uint64_t stream)
{
    return (attention_call){attention_sizes_of(q, dropout), vx_f32(q),   vx_f32(k), vx_f32(v),
                            lengths ? vx_i32(lengths) : 0,  dropout > 0, seed,      stream};
}

/* -- Products ------------------------------------------------------------------------------------------------------ */

/* Returns n, rounded up to whole vectors. */
static inline int64_t whole(int64_t n) { return vx_ceil_div(n, VX_LANES) * VX_LANES; }

/* Copies rows of a head, c->a.pitch apart, side by side: to (rows,whole(D)), filled up with zeros. As they lie, with H
 * D a power of two, few rows fit into the L1 cache together. */
static void copy_rows(const attention_call *c, float *to, const float *from, int64_t rows)
{
    const int64_t D = c->a.D, width = whole(D), full = D / VX_LANES * VX_LANES;
    const int rest = (int)(D - full);
    for (int64_t i = 0; i < rows; i++, to += width, from += c->a.pitch) {
        for (int64_t j = 0; j < full; j += VX_LANES) vf_store(to + j, vf_load(from + j));
        if (rest) vf_store(to + full, vf_load_n(from + full, rest));
    }
}

/* Packs the transpose of rows (n,whole(D)) for multiply(): D whole(n) floats, b_stride 0. */
static void pack_columns(const attention_call *c, float *packed, const float *rows, int64_t n)
{
    const int64_t D = c->a.D, width = whole(D);
    for (int64_t j = 0; j < n; j += GEMM_COLUMNS)
        VX_CPU(gemm_pack)(packed + j * D, rows + j * width, D, (int)vx_min64(GEMM_COLUMNS, n - j), 1, width);
}

/* Computes c (m,n) = alpha a (m,k) b (k,n) + beta c. Rows of b are b_stride apart and readable to whole(n); 0: b is as
 * pack_columns() leaves it. */
static void multiply(int64_t m, int64_t n, int64_t k, float alpha, const float *a, int64_t row_stride, int64_t k_stride,
                     const float *b, int64_t b_stride, float beta, float *c, int64_t c_stride)
{
    for (int64_t j = 0; j < n; j += GEMM_COLUMNS) {
        const int columns = (int)vx_min64(GEMM_COLUMNS, n - j);
        const gemm_product q = {.segments = 1,
                                .k = k,
                                .a = {a},
                                .row_stride = row_stride,
                                .k_stride = k_stride,
                                .b = {b + j * (b_stride ? 1 : k)},
                                .b_stride = b_stride ? b_stride : gemm_vectors(columns) * VX_LANES,
                                .c = c + j,
                                .c_stride = c_stride,
                                .alpha = alpha,
                                .beta = beta,
                                .in_l2 = 1};
        VX_CPU(gemm_multiply)(&q, m, columns);
    }
}

/* Computes a tile of products of rows a (rows,whole(D)) and `keys` packed columns: tile (rows,KEYS). Keys up to the
 * next whole vector get `beyond`, rows up to a multiple of ATTENTION_DRAWS get 0. */
static void tile_of(const attention_call *c, float *tile, int64_t rows, int64_t keys, float alpha, const float *a,
                    const float *packed, float beyond)
{
    multiply(rows, keys, c->a.D, alpha, a, whole(c->a.D), 1, packed, 0, 0, tile, KEYS);
    for (int64_t i = 0; keys % VX_LANES && i < rows; i++)
        for (int64_t j = keys; j < whole(keys); j++) tile[i * KEYS + j] = beyond;
    for (int64_t i = rows; i % ATTENTION_DRAWS; i++) memset(tile + i * KEYS, 0, sizeof(float) * KEYS);
}

/* -- Dropout ------------------------------------------------------------------------------------------------------- */

/* Draws, for VX_LANES keys from the block's on, masks of the probabilities that eight queries keep: 0 or -1 a lane. */
VX_INLINE void draw_kept(const attention_call *c, uint64_t block, vi kept[ATTENTION_DRAWS])
{
    vu word[4];
    const vi below = (vi)((vu){0} + c->a.kept);
    vu_philox(c->seed, c->stream, block, word);
#pragma GCC unroll 4
    for (int w = 0; w < 4; w++) {
        kept[2 * w] = (vi)(word[w] & 0xffff) < below;
        kept[2 * w + 1] = (vi)(word[w] >> 16) < below;
    }
}

VX_INLINE vf kept_only(vi kept, vf x) { return (vf)((vi)x & kept); }

/* -- Forward ------------------------------------------------------------------------------------------------------- */

/* What a thread works in: rows of keys and their columns, rows of values, a tile of scores; of a chunk: rows of
 * queries, their largest scores, the sums of their powers by lane, the output. */
typedef struct forward_space {
    float *key_rows, *keys, *values, *tile, *queries, *top, *sum, *out;
} forward_space;

/* Turns the scores (8,KEYS) of eight queries into powers 2^(score - top). Raises top to the tile's largest score first,
 * and shrinks sum (8,VX_LANES) and out (8,width) to it. Adds the powers to sum, then clears those that dropout drops.
 */
VX_INLINE void soften(const int dropout, const attention_call *c, uint64_t block, int64_t keys, float *tile, float *top,
                      float *sum, float *out, int64_t width)
{
    enum { N = ATTENTION_DRAWS };
    vf m[N], total[N];
    for (int i = 0; i < N; i++) {
        vf most = vf_load(tile + i * KEYS);
        for (int64_t j = VX_LANES; j < keys; j += VX_LANES) most = vf_max(most, vf_load(tile + i * KEYS + j));
        const float old = top[i], now = vf_maximum(most);
        total[i] = vf_load(sum + i * VX_LANES);
        if (now > old) {
            const vf factor = vf_exp2(vf_set1(old - now)); /* 0 for the first tile, where old is -inf */
            top[i] = now;
            total[i] *= factor;
            if (old > -INFINITY)
                for (int64_t j = 0; j < width; j += VX_LANES)
                    vf_store(out + i * width + j, vf_load(out + i * width + j) * factor);
        }
        m[i] = vf_set1(top[i]);
    }
    for (int64_t j = 0; j < keys; j += VX_LANES) {
        vf p[N];
        vi kept[N];
#pragma GCC unroll 8
        for (int i = 0; i < N; i++) p[i] = vf_load(tile + i * KEYS + j) - m[i];
        vf_exp2_many(N, p);
        if (dropout) draw_kept(c, block + (uint64_t)j, kept);
#pragma GCC unroll 8
        for (int i = 0; i < N; i++) {
            total[i] += p[i];
            vf_store(tile + i * KEYS + j, dropout ? kept_only(kept[i], p[i]) : p[i]);
        }
    }
    for (int i = 0; i < N; i++) vf_store(sum + i * VX_LANES, total[i]);
}

/* Computes y and lse of `rows` queries of one head; pointers are to the first of them, those of keys to key 0. */
static void forward_chunk(const attention_call *c, const forward_space *w, uint64_t block, int64_t rows, int64_t keys,
                          const float *q, const float *k, const float *v, float *y, float *lse)
{
    const int64_t D = c->a.D, pitch = c->a.pitch, width = whole(D);
    for (int64_t i = 0; i < CHUNK; i++) w->top[i] = -INFINITY;
    memset(w->sum, 0, sizeof(float) * CHUNK * VX_LANES);
    copy_rows(c, w->queries, q, rows);
    for (int64_t s = 0; s < keys; s += KEYS) {
        const int64_t n = vx_min64(KEYS, keys - s);
        copy_rows(c, w->key_rows, k + s * pitch, n);
        pack_columns(c, w->keys, w->key_rows, n);
        copy_rows(c, w->values, v + s * pitch, n);
        for (int64_t first = 0; first < rows; first += QUERIES) {
            const int64_t m = vx_min64(QUERIES, rows - first);
            tile_of(c, w->tile, m, n, c->a.scale2, w->queries + first * width, w->keys, -INFINITY);
            for (int64_t i = first; i < first + m; i += ATTENTION_DRAWS) {
                float *tile = w->tile + (i - first) * KEYS;
                const uint64_t at = block + (uint64_t)(i / ATTENTION_DRAWS * c->a.T + s);
                if (c->dropout) soften(1, c, at, n, tile, w->top + i, w->sum + i * VX_LANES, w->out + i * width, width);
                else soften(0, c, at, n, tile, w->top + i, w->sum + i * VX_LANES, w->out + i * width, width);
            }
            multiply(m, D, n, 1, w->tile, KEYS, 1, w->values, width, s > 0, w->out + first * width, width);
        }
    }
    for (int64_t i = 0; i < rows; i++) {
        const float sum = vf_sum(vf_load(w->sum + i * VX_LANES));
        const vf factor = vf_set1(c->dropout ? c->a.kept_factor / sum : 1 / sum);
        for (int64_t j = 0; j < D; j += VX_LANES) {
            const int n = (int)vx_min64(VX_LANES, D - j);
            vf_store_n(y + i * pitch + j, keys ? vf_load(w->out + i * width + j) * factor : vf_zero(), n);
        }
        lse[i * 2 * c->a.H] = keys ? w->top[i] : 0;
        lse[i * 2 * c->a.H + 1] = keys ? log2f(sum) : 0;
    }
}

/* Computes y and lse. */
int VX_CPU(attention)(vx_tensor *y, vx_tensor *lse, vx_tensor *q, vx_tensor *k, vx_tensor *v, vx_tensor *lengths,
                      float dropout, uint64_t seed, uint64_t stream)
{
    const attention_call c = call_of(q, k, v, lengths, dropout, seed, stream);
    const attention_sizes a = c.a;
    const int64_t threads = omp_get_max_threads(), width = whole(a.D), chunks = vx_ceil_div(a.T, CHUNK);
    if (check_lengths("attention", lengths, a.T)) return VX_EINVAL;
    if (!q->numel) return VX_OK;
    forward_space w = {0};
    scratch memory = {.op = "attention"};
    while (scratch_pass(&memory)) {
        w.key_rows = carve_f32(&memory, threads * KEYS * width);
        w.keys = carve_f32(&memory, threads * KEYS * a.D);
        w.values = carve_f32(&memory, threads * KEYS * width);
        w.queries = carve_f32(&memory, threads * CHUNK * width);
        w.tile = carve_f32(&memory, threads * QUERIES * KEYS);
        w.top = carve_f32(&memory, threads * CHUNK);
        w.sum = carve_f32(&memory, threads * CHUNK * VX_LANES);
        w.out = carve_f32(&memory, threads * CHUNK * width);
    }
    if (!memory.base) return VX_ENOMEM;
#pragma omp parallel
    {
        const int64_t me = omp_get_thread_num();
        const forward_space mine = {.key_rows = w.key_rows + me * KEYS * width,
                                    .keys = w.keys + me * KEYS * a.D,
                                    .values = w.values + me * KEYS * width,
                                    .tile = w.tile + me * QUERIES * KEYS,
                                    .queries = w.queries + me * CHUNK * width,
                                    .top = w.top + me * CHUNK,
                                    .sum = w.sum + me * CHUNK * VX_LANES,
                                    .out = w.out + me * CHUNK * width};
        const unsigned before = vx_denormals_off();
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < a.B * a.H * chunks; task++) {
            const int64_t head = task / chunks, b = head / a.H, h = head % a.H, first = task % chunks * CHUNK;
            const int64_t keys = attention_head(&a, b, h), at = keys + first * a.pitch;
            forward_chunk(&c, &mine, vx_attention_block((uint64_t)head, (uint64_t)first, (uint64_t)a.T),
                          vx_min64(CHUNK, a.T - first), c.lengths ? c.lengths[b] : a.T, c.q + at, c.k + keys,
                          c.v + keys, vx_f32(y) + at, vx_f32(lse) + ((b * a.T + first) * a.H + h) * 2);
        }
        vx_denormals_restore(before);
    }
    scratch_free(&memory);
    return VX_OK;
}

/* -- Backward ------------------------------------------------------------------------------------------------------ */

/* What a thread works in. Of a tile of keys: k and v as rows and as columns, and their gradients. Of all queries: q and
 * dy as rows, the gradient of q, and delta. */
typedef struct backward_space {
    float *keys, *values, *key_rows, *value_rows, *dkeys, *dvalues;
    float *scores, *slopes;
    float *queries, *dys, *dqueries, *delta;
} backward_space;

/* Turns scores (8,KEYS) into probabilities as dropout leaves them, and slopes, which are dy v', into the gradients of
 * the scores. lse has its queries 2 H floats apart. */
VX_INLINE void harden(const int dropout, const attention_call *c, uint64_t block, int64_t rows, int64_t keys,
                      float *scores, float *slopes, const float *lse, const float *delta)
{
    enum { N = ATTENTION_DRAWS };
    vf m[N], l[N], d[N];
    for (int i = 0; i < N; i++) {
        const bool there = i < rows;
        m[i] = vf_set1(there ? lse[i * 2 * c->a.H] : 0), l[i] = vf_set1(there ? lse[i * 2 * c->a.H + 1] : 0);
        d[i] = vf_set1(there ? delta[i] : 0);
    }
    const vf factor = vf_set1(c->a.kept_factor);
    for (int64_t j = 0; j < keys; j += VX_LANES) {
        vf p[N];
        vi kept[N];
#pragma GCC unroll 8
        for (int i = 0; i < N; i++) p[i] = (vf_load(scores + i * KEYS + j) - m[i]) - l[i];
        vf_exp2_many(N, p);
        if (dropout) draw_kept(c, block + (uint64_t)j, kept);
#pragma GCC unroll 8
        for (int i = 0; i < N; i++) {
            const vf s = vf_load(slopes + i * KEYS + j);
            vf_store(scores + i * KEYS + j, dropout ? kept_only(kept[i], p[i] * factor) : p[i]);
            vf_store(slopes + i * KEYS + j, p[i] * ((dropout ? kept_only(kept[i], s * factor) : s) - d[i]));
        }
    }
}

/* Stores rows of a gradient times alpha; from (rows,width), to rows of D a.pitch apart. */
static void store_rows(const attention_call *c, float *to, const float *from, int64_t rows, float alpha)
{
    const int64_t D = c->a.D, width = whole(D);
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < D; j += VX_LANES)
            vf_store_n(to + i * c->a.pitch + j, vf_load(from + i * width + j) * alpha, (int)vx_min64(VX_LANES, D - j));
}

/* Computes the gradients of one head with `keys` keys. `at`: where it begins in the tensors. */
static void backward_head(const attention_call *c, const backward_space *w, uint64_t block, int64_t keys, int64_t at,
                          const float *dy, const float *y, const float *lse, float *dq, float *dk, float *dv)
{
    const int64_t T = c->a.T, D = c->a.D, pitch = c->a.pitch, width = whole(D);
    const float *q = c->q + at, *k = c->k + at, *v = c->v + at;
    dy += at, y += at, dq += at, dk += at, dv += at;
    for (int64_t t = 0; t < T; t++) {
        vf sum = vf_zero();
        for (int64_t j = 0; j < D; j += VX_LANES) {
            const int n = (int)vx_min64(VX_LANES, D - j);
            sum += vf_load_n(dy + t * pitch + j, n) * vf_load_n(y + t * pitch + j, n);
        }
        w->delta[t] = vf_sum(sum);
    }
    copy_rows(c, w->queries, q, T);
    copy_rows(c, w->dys, dy, T);
    memset(w->dqueries, 0, sizeof(float) * (size_t)(T * width));
    for (int64_t s = 0; s < T; s += KEYS) {
        const int64_t here = vx_min64(KEYS, T - s), n = vx_max64(0, vx_min64(here, keys - s));
        if (n) {
            copy_rows(c, w->key_rows, k + s * pitch, n);
            copy_rows(c, w->value_rows, v + s * pitch, n);
            pack_columns(c, w->keys, w->key_rows, n);
            pack_columns(c, w->values, w->value_rows, n);
        }
        memset(w->dkeys, 0, sizeof(float) * (size_t)(KEYS * width));
        memset(w->dvalues, 0, sizeof(float) * (size_t)(KEYS * width));
        for (int64_t t = 0; n && t < T; t += QUERIES) {
            const int64_t m = vx_min64(QUERIES, T - t);
            tile_of(c, w->scores, m, n, c->a.scale2, w->queries + t * width, w->keys, -INFINITY);
            tile_of(c, w->slopes, m, n, 1, w->dys + t * width, w->values, 0);
            for (int64_t i = 0; i < m; i += ATTENTION_DRAWS) {
                float *scores = w->scores + i * KEYS, *slopes = w->slopes + i * KEYS;
                const uint64_t b = block + (uint64_t)((t + i) / ATTENTION_DRAWS * T + s);
                const float *l = lse + (t + i) * 2 * c->a.H, *d = w->delta + t + i;
                if (c->dropout) harden(1, c, b, m - i, n, scores, slopes, l, d);
                else harden(0, c, b, m - i, n, scores, slopes, l, d);
            }
            multiply(n, D, m, 1, w->scores, 1, KEYS, w->dys + t * width, width, 1, w->dvalues, width);
            multiply(n, D, m, 1, w->slopes, 1, KEYS, w->queries + t * width, width, 1, w->dkeys, width);
            multiply(m, D, n, 1, w->slopes, KEYS, 1, w->key_rows, width, 1, w->dqueries + t * width, width);
        }
        store_rows(c, dk + s * pitch, w->dkeys, here, c->a.scale);
        store_rows(c, dv + s * pitch, w->dvalues, here, 1);
    }
    store_rows(c, dq, w->dqueries, T, c->a.scale);
}

/* Computes dq, dk, dv from dy and what attention left. */
int VX_CPU(attention_backward)(vx_tensor *dq, vx_tensor *dk, vx_tensor *dv, vx_tensor *dy, vx_tensor *y, vx_tensor *lse,
                               vx_tensor *q, vx_tensor *k, vx_tensor *v, vx_tensor *lengths, float dropout,
                               uint64_t seed, uint64_t stream)
{
    const attention_call c = call_of(q, k, v, lengths, dropout, seed, stream);
    const attention_sizes a = c.a;
    const int64_t threads = omp_get_max_threads(), width = whole(a.D);
    if (check_lengths("attention_backward", lengths, a.T)) return VX_EINVAL;
    if (!q->numel) return VX_OK;
    backward_space w = {0};
    scratch memory = {.op = "attention_backward"};
    while (scratch_pass(&memory)) {
        w.keys = carve_f32(&memory, threads * KEYS * a.D);
        w.values = carve_f32(&memory, threads * KEYS * a.D);
        w.key_rows = carve_f32(&memory, threads * KEYS * width);
        w.value_rows = carve_f32(&memory, threads * KEYS * width);
        w.dkeys = carve_f32(&memory, threads * KEYS * width);
        w.dvalues = carve_f32(&memory, threads * KEYS * width);
        w.scores = carve_f32(&memory, threads * QUERIES * KEYS);
        w.slopes = carve_f32(&memory, threads * QUERIES * KEYS);
        w.queries = carve_f32(&memory, threads * a.T * width);
        w.dys = carve_f32(&memory, threads * a.T * width);
        w.dqueries = carve_f32(&memory, threads * a.T * width);
        w.delta = carve_f32(&memory, threads * a.T);
    }
    if (!memory.base) return VX_ENOMEM;
#pragma omp parallel
    {
        const int64_t me = omp_get_thread_num(), all = me * a.T * width;
        const backward_space mine = {.keys = w.keys + me * KEYS * a.D,
                                     .values = w.values + me * KEYS * a.D,
                                     .key_rows = w.key_rows + me * KEYS * width,
                                     .value_rows = w.value_rows + me * KEYS * width,
                                     .dkeys = w.dkeys + me * KEYS * width,
                                     .dvalues = w.dvalues + me * KEYS * width,
                                     .scores = w.scores + me * QUERIES * KEYS,
                                     .slopes = w.slopes + me * QUERIES * KEYS,
                                     .queries = w.queries + all,
                                     .dys = w.dys + all,
                                     .dqueries = w.dqueries + all,
                                     .delta = w.delta + me * a.T};
        const unsigned before = vx_denormals_off();
#pragma omp for schedule(dynamic)
        for (int64_t head = 0; head < a.B * a.H; head++) {
            const int64_t b = head / a.H, h = head % a.H;
            backward_head(&c, &mine, vx_attention_block((uint64_t)head, 0, (uint64_t)a.T),
                          c.lengths ? c.lengths[b] : a.T, attention_head(&a, b, h), vx_f32(dy), vx_f32(y),
                          vx_f32(lse) + (b * a.T * a.H + h) * 2, vx_f32(dq), vx_f32(dk), vx_f32(dv));
        }
        vx_denormals_restore(before);
    }
    scratch_free(&memory);
    return VX_OK;
}
