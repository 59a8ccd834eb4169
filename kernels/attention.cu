/* attention.cu: attention on CUDA; the mathematics is in attention.c, the products on tensor cores in mma_tiles.cuh.
 *
 * A warp owns 16 queries, or in backward_keys_kernel 16 keys; four warps share tiles of what these meet, in shared
 * memory. The scores stay in registers and are there the operand of the next product. The backward pass makes the
 * scores twice, once to sum over keys (dq), once over queries (dk, dv): no atomics, the same bits every time.
 *
 * Memory traffic: q and y once; k and v once for each 64 queries, mostly from L2.
 *
 * Dropout. Eight queries share a block of random numbers (core/rng.h), which one lane draws; its byte of kept queries
 * then goes to the lanes that hold their scores.
 */
#include "shared/attention.h"
#include "cuda/mma_tiles.cuh"

enum { THREADS = 128, ITEMS = 64 /* of a block: 16 a warp */, MOST_DEPTH = 128 };

typedef struct attention_call {
    attention_sizes a;
    const float *q, *k, *v;
    const int32_t *lengths; /* NULL: all keys count */
    bool dropout, fours;    /* fours: vectors may be loaded 16 bytes at a time */
    vx_random random;
    vx_data_check outside; /* a length */
} attention_call;

/* Where a block works: its head, and the first of its items. */
typedef struct place {
    int64_t head, at, first, keys; /* at: where the head begins in a (B,T,H,D) tensor */
} place;

/* A length outside 0 .. T is reported, and counts as the nearest that is not. */
VX_DEVICE place place_of(const attention_call &c)
{
    const int64_t tiles = (c.a.T + ITEMS - 1) / ITEMS;
    place p;
    p.head = blockIdx.x / tiles;
    p.first = blockIdx.x % tiles * ITEMS;
    const int64_t b = p.head / c.a.H;
    p.at = attention_head(&c.a, b, p.head % c.a.H);
    p.keys = c.a.T;
    if (c.lengths) {
        const int64_t length = c.lengths[b];
        if ((length < 0 || length > c.a.T) && threadIdx.x == 0) vx_report(c.outside, b);
        p.keys = length < 0 ? 0 : length > c.a.T ? c.a.T : length;
    }
    return p;
}

/* Loads times first .. first + count - 1 of a head; those from `end` on, and numbers from D on, are 0. Where copies are
 * asynchronous the caller commits. */
template <int KT>
VX_DEVICE void load_times(const attention_call &c, float *shared, const float *head, int64_t first, int64_t end,
                          int count)
{
    for (int i = threadIdx.x; i < count * 2 * KT; i += THREADS) {
        const int at = i / (2 * KT), d = i % (2 * KT) * 4;
        const float *from = head + (first + at) * c.a.pitch + d;
        float *to = shared + at * ITEM_PITCH(KT) + d;
        const bool there = first + at < end;
        if (c.fours) vx_copy_async(to, there && d < c.a.D ? from : head, there && d < c.a.D);
        else
            for (int e = 0; e < 4; e++) to[e] = there && d + e < c.a.D ? from[e] : 0;
    }
}

VX_DEVICE void wait_for_tiles(void)
{
    vx_copy_commit();
    vx_copy_wait(0);
    __syncthreads();
}

template <int N> VX_DEVICE void clear(float (&s)[N][4])
{
#pragma unroll
    for (int t = 0; t < N; t++) s[t][0] = s[t][1] = s[t][2] = s[t][3] = 0;
}

/* Draws for queries t .. t + 7 (t a multiple of 8) and one key: bit i says that query t + i keeps its weight. */
VX_DEVICE uint32_t draw_kept(const attention_call &c, const vx_draw &draw, int64_t head, int64_t t, int64_t key)
{
    const uint64_t block = vx_attention_block((uint64_t)head, (uint64_t)t, (uint64_t)c.a.T) + (uint64_t)key;
    const vx_philox4 r = vx_philox(draw.seed, draw.stream, block);
    uint32_t kept = 0;
#pragma unroll
    for (int w = 0; w < 4; w++)
        kept |= (uint32_t)((r.word[w] & 0xffff) < c.a.kept) << 2 * w | (uint32_t)((r.word[w] >> 16) < c.a.kept)
                                                                           << (2 * w + 1);
    return kept;
}

/* -- Forward ------------------------------------------------------------------------------------------------------- */

/* Draws what a warp's queries keep of keys first .. first + 15: lane l of queries own + l / 16 * 8 and key first + l %
 * 16. */
VX_DEVICE uint32_t draw_keys(const attention_call &c, const vx_draw &draw, int64_t head, int64_t own, int64_t first)
{
    const int lane = threadIdx.x % 32;
    return draw_kept(c, draw, head, own + lane / 16 * 8, first + lane % 16);
}

/* Says whether what draw_keys has drawn keeps the score s[t][2 i + e]. */
VX_DEVICE bool keeps_key(uint32_t drawn, int t, int i, int e)
{
    const int lane = threadIdx.x % 32;
    return __shfl_sync(VX_ALL_LANES, drawn, i * 16 + t % 2 * 8 + lane % 4 * 2 + e) >> lane / 4 & 1;
}

template <int KT, bool ROUGH>
VX_KERNEL VX_HOT __launch_bounds__(THREADS, 2) attention_kernel(attention_call c, float *y, float *lse)
{
    constexpr int TILE = ITEMS * ITEM_PITCH(KT);
    float *queries = (float *)vx_shared, *keys = queries + TILE, *values = keys + TILE;
    const int lane = threadIdx.x % 32, q = lane % 4, warp = threadIdx.x / 32;
    const place p = place_of(c);
    const vx_draw draw = vx_draw_now(c.random);
    const int64_t own = p.first + warp * 16;
    float top[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0}, o[KT][4];
    clear(o);
    load_times<KT>(c, queries, c.q + p.at, p.first, c.a.T, ITEMS);
    for (int64_t first = 0; first < p.keys; first += ITEMS) {
        float s[8][4];
        clear(s);
        load_times<KT>(c, keys, c.k + p.at, first, p.keys, ITEMS);
        load_times<KT>(c, values, c.v + p.at, first, p.keys, ITEMS);
        wait_for_tiles();
        mma_product<KT, ROUGH>(s, queries + warp * 16 * ITEM_PITCH(KT), keys);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float most = -INFINITY;
#pragma unroll
            for (int t = 0; t < 8; t++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float &score = s[t][2 * i + e];
                    score = first + 8 * t + 2 * q + e < p.keys ? score * c.a.scale2 : -INFINITY;
                    most = fmaxf(most, score);
                }
            most = fmaxf(most, __shfl_xor_sync(VX_ALL_LANES, most, 1));
            most = fmaxf(most, __shfl_xor_sync(VX_ALL_LANES, most, 2));
            if (most > top[i]) {
                const float factor = vx_fast_exp2(top[i] - most); /* 0 at first */
                top[i] = most;
                sum[i] *= factor;
#pragma unroll
                for (int k = 0; k < KT; k++) o[k][2 * i] *= factor, o[k][2 * i + 1] *= factor;
            }
#pragma unroll
            for (int t = 0; t < 8; t++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    s[t][2 * i + e] = vx_fast_exp2(s[t][2 * i + e] - top[i]);
                    sum[i] += s[t][2 * i + e];
                }
        }
        if (c.dropout)
#pragma unroll
            for (int t = 0; t < 8; t += 2) {
                const uint32_t drawn = draw_keys(c, draw, p.head, own, first + 8 * t);
#pragma unroll
                for (int k = 0; k < 8; k++)
                    if (!keeps_key(drawn, k / 4, k / 2 % 2, k % 2)) s[t + k / 4][k % 4] = 0;
            }
        mma_mix<KT, ROUGH>(o, s, values);
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int64_t t = own + lane / 4 + 8 * i;
        const float total = quad_sum(sum[i]), factor = p.keys ? c.a.kept_factor / total : 0;
        if (t >= c.a.T) continue; /* no collective follows */
        if (q == 0) {
            float *to = lse + ((p.head / c.a.H * c.a.T + t) * c.a.H + p.head % c.a.H) * 2;
            to[0] = p.keys ? top[i] : 0, to[1] = p.keys ? log2f(total) : 0;
        }
#pragma unroll
        for (int k = 0; k < KT; k++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int d = 8 * k + 2 * q + e;
                if (d < c.a.D) y[p.at + t * c.a.pitch + d] = o[k][2 * i + e] * factor;
            }
    }
}

/* -- Backward ------------------------------------------------------------------------------------------------------ */

/* Computes delta (B,T,H), the sums of dy y; a warp each. */
VX_KERNEL delta_kernel(float *delta, const float *dy, const float *y, int64_t n, int64_t D)
{
    const int lane = threadIdx.x % 32;
    for (int64_t i = (int64_t)blockIdx.x * (THREADS / 32) + threadIdx.x / 32; i < n;
         i += (int64_t)gridDim.x * (THREADS / 32)) {
        float sum = 0;
        for (int64_t d = lane; d < D; d += 32) sum += dy[i * D + d] * y[i * D + d];
        sum = vx_warp_sum(sum);
        if (lane == 0) delta[i] = sum;
    }
}

/* What the backward pass gets besides. */
typedef struct backward_in {
    const float *dy, *lse, *delta;
} backward_in;

/* Turns a score s, not yet scaled, and the slope x = <dy, v> into the weight as dropout leaves it and the gradient of
 * the scaled score. */
VX_DEVICE void harden(const attention_call &c, float *s, float *x, bool there, bool kept, float top, float sum,
                      float delta)
{
    const float power = *s * c.a.scale2 - top - sum; /* a score that is large may come out above its own largest */
    const float p = !there ? 0 : power > 0 ? 1 : vx_fast_exp2(power);
    *s = kept ? p * c.a.kept_factor : 0;
    *x = p * ((kept ? *x * c.a.kept_factor : 0) - delta);
}

/* Tiles of 8 others that pass by at a time: fewer where items are long, so that all sums stay in registers. */
#define OTHER_TILES(KT) ((KT) > 4 ? 4 : 8)

/* Stores a warp's 16 items times alpha as rows of a gradient. */
template <int KT>
VX_DEVICE void store_items(const attention_call &c, float *to, const place &p, int64_t own, const float (&o)[KT][4],
                           float alpha)
{
    const int lane = threadIdx.x % 32, q = lane % 4;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int64_t t = own + lane / 4 + 8 * i;
        if (t >= c.a.T) continue;
#pragma unroll
        for (int k = 0; k < KT; k++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int d = 8 * k + 2 * q + e;
                if (d < c.a.D) to[p.at + t * c.a.pitch + d] = o[k][2 * i + e] * alpha;
            }
    }
}

/* Computes dq: a warp owns 16 queries, keys pass by. */
template <int KT, bool ROUGH>
VX_KERNEL VX_HOT __launch_bounds__(THREADS, 2) backward_queries_kernel(attention_call c, backward_in in, float *dq)
{
    constexpr int N = OTHER_TILES(KT), OTHERS = 8 * N, TILE = ITEMS * ITEM_PITCH(KT);
    float *queries = (float *)vx_shared, *dys = queries + TILE, *keys = dys + TILE,
          *values = keys + OTHERS * ITEM_PITCH(KT);
    const int lane = threadIdx.x % 32, q = lane % 4, warp = threadIdx.x / 32;
    const place p = place_of(c);
    const vx_draw draw = vx_draw_now(c.random);
    const int64_t own = p.first + warp * 16;
    float top[2], sum[2], delta[2], o[KT][4];
    clear(o);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int64_t t = vx_min64(own + lane / 4 + 8 * i, c.a.T - 1);
        const int64_t at = (p.head / c.a.H * c.a.T + t) * c.a.H + p.head % c.a.H;
        top[i] = in.lse[2 * at], sum[i] = in.lse[2 * at + 1], delta[i] = in.delta[at];
    }
    load_times<KT>(c, queries, c.q + p.at, p.first, c.a.T, ITEMS);
    load_times<KT>(c, dys, in.dy + p.at, p.first, c.a.T, ITEMS);
    for (int64_t first = 0; first < p.keys; first += OTHERS) {
        float s[N][4], x[N][4];
        clear(s);
        clear(x);
        load_times<KT>(c, keys, c.k + p.at, first, p.keys, OTHERS);
        load_times<KT>(c, values, c.v + p.at, first, p.keys, OTHERS);
        wait_for_tiles();
        mma_product<KT, ROUGH>(s, queries + warp * 16 * ITEM_PITCH(KT), keys);
        mma_product<KT, ROUGH>(x, dys + warp * 16 * ITEM_PITCH(KT), values);
#pragma unroll
        for (int t = 0; t < N; t += 2) {
            const uint32_t drawn = c.dropout ? draw_keys(c, draw, p.head, own, first + 8 * t) : 0;
#pragma unroll
            for (int k = 0; k < 8; k++) {
                const int u = t + k / 4, i = k / 2 % 2, e = k % 2;
                const bool kept = !c.dropout || keeps_key(drawn, k / 4, i, e);
                harden(c, &s[u][k % 4], &x[u][k % 4], first + 8 * u + 2 * q + e < p.keys, kept, top[i], sum[i],
                       delta[i]);
            }
        }
        mma_mix<KT, ROUGH>(o, x, keys);
        __syncthreads();
    }
    store_items<KT>(c, dq, p, own, o, c.a.scale);
}

/* Computes dk and dv: a warp owns 16 keys, queries pass by. */
template <int KT, bool ROUGH>
VX_KERNEL VX_HOT __launch_bounds__(THREADS, 2)
    backward_keys_kernel(attention_call c, backward_in in, float *dk, float *dv)
{
    constexpr int N = OTHER_TILES(KT), OTHERS = 8 * N, TILE = ITEMS * ITEM_PITCH(KT);
    float *keys = (float *)vx_shared, *values = keys + TILE, *queries = values + TILE,
          *dys = queries + OTHERS * ITEM_PITCH(KT), *numbers = dys + OTHERS * ITEM_PITCH(KT);
    const int lane = threadIdx.x % 32, q = lane % 4, r = lane / 4, warp = threadIdx.x / 32;
    const place p = place_of(c);
    const vx_draw draw = vx_draw_now(c.random);
    const int64_t own = p.first + warp * 16;
    float to_k[KT][4], to_v[KT][4];
    clear(to_k);
    clear(to_v);
    load_times<KT>(c, keys, c.k + p.at, p.first, p.keys, ITEMS);
    load_times<KT>(c, values, c.v + p.at, p.first, p.keys, ITEMS);
    for (int64_t first = 0; p.first < p.keys && first < c.a.T; first += OTHERS) {
        float s[N][4], x[N][4];
        clear(s);
        clear(x);
        load_times<KT>(c, queries, c.q + p.at, first, c.a.T, OTHERS);
        load_times<KT>(c, dys, in.dy + p.at, first, c.a.T, OTHERS);
        for (int i = threadIdx.x; i < OTHERS; i += THREADS) {
            const int64_t t = vx_min64(first + i, c.a.T - 1);
            const int64_t at = (p.head / c.a.H * c.a.T + t) * c.a.H + p.head % c.a.H;
            numbers[i] = in.lse[2 * at], numbers[OTHERS + i] = in.lse[2 * at + 1];
            numbers[2 * OTHERS + i] = in.delta[at];
        }
        wait_for_tiles();
        mma_product<KT, ROUGH>(s, keys + warp * 16 * ITEM_PITCH(KT), queries);
        mma_product<KT, ROUGH>(x, values + warp * 16 * ITEM_PITCH(KT), dys);
#pragma unroll
        for (int t = 0; t < N; t += 2) {
            /* lane l: queries first + 8 (t + l / 16) .., key own + l % 16 */
            const uint32_t drawn =
                c.dropout ? draw_kept(c, draw, p.head, first + 8 * (t + lane / 16), own + lane % 16) : 0;
#pragma unroll
            for (int k = 0; k < 8; k++) {
                const int i = k / 2 % 2, e = k % 2, at = 8 * (t + k / 4) + 2 * q + e;
                const bool there = own + r + 8 * i < p.keys && first + at < c.a.T;
                const bool kept =
                    !c.dropout || (__shfl_sync(VX_ALL_LANES, drawn, k / 4 * 16 + r + 8 * i) >> (2 * q + e) & 1);
                harden(c, &s[t + k / 4][k % 4], &x[t + k / 4][k % 4], there, kept, numbers[at], numbers[OTHERS + at],
                       numbers[2 * OTHERS + at]);
            }
        }
        mma_mix<KT, ROUGH>(to_v, s, dys);
        mma_mix<KT, ROUGH>(to_k, x, queries);
        __syncthreads();
    }
    vx_copy_wait(0);
    store_items<KT>(c, dk, p, own, to_k, c.a.scale);
    store_items<KT>(c, dv, p, own, to_v, 1);
}

/* -- The op -------------------------------------------------------------------------------------------------------- */

/* Fills in a call; a depth that the kernels do not have is an error. */
static int call_of(attention_call *c, const vx_tensor *q, const vx_tensor *k, const vx_tensor *v,
                   const vx_tensor *lengths, float dropout, uint64_t seed, uint64_t stream)
{
    *c = {};
    c->a = attention_sizes_of(q, dropout);
    c->q = vx_f32(q), c->k = vx_f32(k), c->v = vx_f32(v), c->lengths = lengths ? vx_i32(lengths) : NULL;
    c->dropout = dropout > 0;
    c->random = vx_draws(seed, stream);
    c->fours = c->a.D % 4 == 0 && vx_aligned(q, 16) && vx_aligned(k, 16) && vx_aligned(v, 16);
    if (c->a.D > MOST_DEPTH)
        return vx_fail(VX_EINVAL, "%s: heads of D = %lld numbers, of at most %d on this device", vx_op(),
                       (long long)c->a.D, MOST_DEPTH);
    c->outside = vx_data_check_of(VX_EINVAL, 1, "length of row %%lld is outside 0 .. %lld", (long long)c->a.T);
    return VX_OK;
}

static unsigned blocks_of(const attention_call &c) { return (unsigned)(c.a.B * c.a.H * vx_ceil_div(c.a.T, ITEMS)); }

template <int KT, bool ROUGH> static void launch_forward(const attention_call &c, float *y, float *lse)
{
    VX_LAUNCH((attention_kernel<KT, ROUGH>), blocks_of(c), THREADS, sizeof(float) * 3 * ITEMS * ITEM_PITCH(KT), c, y,
              lse);
}

template <int KT, bool ROUGH>
static void launch_backward(const attention_call &c, const backward_in &in, float *dq, float *dk, float *dv)
{
    const size_t floats = (2 * ITEMS + 2 * 8 * OTHER_TILES(KT)) * ITEM_PITCH(KT);
    VX_LAUNCH((backward_queries_kernel<KT, ROUGH>), blocks_of(c), THREADS, sizeof(float) * floats, c, in, dq);
    VX_LAUNCH((backward_keys_kernel<KT, ROUGH>), blocks_of(c), THREADS,
              sizeof(float) * (floats + 3 * 8 * OTHER_TILES(KT)), c, in, dk, dv);
}

/* Runs launch<KT, ROUGH>(...) for the depth D and the precision that is asked for. */
#define BY_DEPTH(D, launch, ...)                                                                                       \
    do {                                                                                                               \
        if (vx_tf32() || vx_bf16_products()) BY_DEPTH_(D, launch, true, __VA_ARGS__);                                  \
        else BY_DEPTH_(D, launch, false, __VA_ARGS__);                                                                 \
    } while (0)
#define BY_DEPTH_(D, launch, ROUGH, ...)                                                                               \
    do {                                                                                                               \
        if (D <= 16) launch<2, ROUGH>(__VA_ARGS__);                                                                    \
        else if (D <= 32) launch<4, ROUGH>(__VA_ARGS__);                                                               \
        else if (D <= 64) launch<8, ROUGH>(__VA_ARGS__);                                                               \
        else if (D <= 96) launch<12, ROUGH>(__VA_ARGS__);                                                              \
        else launch<16, ROUGH>(__VA_ARGS__);                                                                           \
    } while (0)

/* Computes y and lse. */
int vx_cuda_attention(vx_tensor *y, vx_tensor *lse, vx_tensor *q, vx_tensor *k, vx_tensor *v, vx_tensor *lengths,
                      float dropout, uint64_t seed, uint64_t stream)
{
    attention_call c;
    if (call_of(&c, q, k, v, lengths, dropout, seed, stream)) return VX_EINVAL;
    if (!q->numel) return VX_OK;
    BY_DEPTH(c.a.D, launch_forward, c, vx_f32(y), vx_f32(lse));
    return vx_status();
}

/* Computes dq, dk, dv from dy and what attention left. */
int vx_cuda_attention_backward(vx_tensor *dq, vx_tensor *dk, vx_tensor *dv, vx_tensor *dy, vx_tensor *y, vx_tensor *lse,
                               vx_tensor *q, vx_tensor *k, vx_tensor *v, vx_tensor *lengths, float dropout,
                               uint64_t seed, uint64_t stream)
{
    attention_call c;
    if (call_of(&c, q, k, v, lengths, dropout, seed, stream)) return VX_EINVAL;
    if (!q->numel) return VX_OK;
    const int64_t rows = c.a.B * c.a.T * c.a.H;
    float *delta = VX_SCRATCH(float, rows);
    const backward_in in = {vx_f32(dy), vx_f32(lse), delta};
    c.fours = c.fours && vx_aligned(dy, 16);
    VX_LAUNCH(delta_kernel, vx_grid(rows, THREADS / 32), THREADS, 0, delta, vx_f32(dy), vx_f32(y), rows, c.a.D);
    BY_DEPTH(c.a.D, launch_backward, c, in, vx_f32(dq), vx_f32(dk), vx_f32(dv));
    return vx_status();
}
