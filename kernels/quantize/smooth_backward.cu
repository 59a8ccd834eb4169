/* smooth_backward.cu: gradients of the smoothed quantizer on CUDA; the mathematics is in smooth_backward.c, whose x,
 * weights and sparse pairs these are.
 *
 * Two passes over the logits, each with p and x of a tile made again from z, the codes and dy; no N x M array:
 *   rows     a block owns 64 rows, meets all panels, and sums x q^: dL/dz^;
 *   columns  a block owns a panel, meets a range of rows, and sums x z^ and w dy: the gradients of q^ and of the
 *   mixture.
 * Ranges are added up in order. Under hard Gumbel w is the one-hot code. Under ppl a scan before them finds each row's
 * sum of b pi.
 *
 * The S K sparse pairs of a KNN regularizer are added up per row in 64-bit integers, units of 2^-40: integer addition
 * is associative, so the atomics' order does not matter, and the rounding is below float32's. (At most 2^22 pairs of a
 * row keep the sum in range.)
 *
 * Cost: 14 N M D flops in float32, 2 N M powers. Memory: N (4 depth + 9) floats (under KNN N depth more of 8 bytes), M
 * (4 depth + 1), and a few ranges of 2 M depth.
 */
#include "smooth.cuh"

static const int RT = 4, ROWS = 16 * RT, TILE_PITCH = PANEL + 4;

#define UNIT (1099511627776.0) /* 2^40 */

typedef struct backward_in {
    const float *dy;                                                 /* (N,depth) rows of the group */
    const float *raw_panel;                                          /* (panels,depth,64) codes as stored */
    const float *start, *mix_offset, *noisy, *pi_factor, *pi_offset; /* (N), as in smooth_backward.c */
    const float *ppl;                                                /* (64 panels) b by code, or NULL */
    const int32_t *codes;                                            /* (N,G) */
} backward_in;

/* -- p and x of one tile ------------------------------------------------------------------------------------------- */

/* From logits (base 2, in w) and <dy, q> (in x) of one pair to its weight and its x. */
VX_DEVICE void weigh(const smooth_call &c, float *w, float *x, float noise, float ppl, float mix_offset, float noisy,
                     float pi_factor, float pi_offset)
{
    const float log_pi = *w, pi = vx_fast_exp2(log_pi);
    float weight = pi;
    if (c.noise_kind == NOISE_RATES) weight = pi * noise * noisy;
    if (c.noise_kind == NOISE_LOGS)
        weight = log_pi > PADDING / 2 ? vx_fast_exp2((log_pi + noise) * c.cooling + noisy) : 0;
    *x = weight * ((*x + mix_offset) * c.cooling) + pi * (pi_factor * pi + pi_offset + ppl);
    *w = weight;
}

/* What belongs to a thread's rows. */
typedef struct row_numbers {
    float start[RT], mix_offset[RT], noisy[RT], pi_factor[RT], pi_offset[RT];
} row_numbers;

VX_DEVICE void load_numbers(const smooth_call &c, const backward_in &in, row_numbers &n, int64_t first, int64_t end)
{
#pragma unroll
    for (int i = 0; i < RT; i++) {
        const int64_t row = first + tile_y() + 16 * i;
        const bool real = row < end;
        n.start[i] = real ? in.start[row] : PADDING; /* p is 0 */
        n.mix_offset[i] = real ? in.mix_offset[row] : 0;
        n.noisy[i] = real && c.noise_kind != NOISE_NONE ? in.noisy[row] : 0;
        n.pi_factor[i] = real ? in.pi_factor[row] : 0;
        n.pi_offset[i] = real ? in.pi_offset[row] : 0;
    }
}

/* w: weights of the mixture; x = dL/dlogit, dense terms. Each in shared memory has one product for rows and codes
 * (first TILE_FLOATS) and one for dy and codes. */
VX_DEVICE void make_x(const smooth_call &c, const backward_in &in, const row_numbers &n, float (&w)[RT][4],
                      float (&x)[RT][4], int64_t first, int64_t panel, bool fresh_rows, bool fresh_panel, float *shared)
{
    const int tx = tile_x(), ty = tile_y();
    tile_logits<RT>(c, w, n.start, first, panel, fresh_rows, fresh_panel, shared);
#pragma unroll
    for (int i = 0; i < RT; i++) x[i][0] = x[i][1] = x[i][2] = x[i][3] = 0;
    tile_product<RT>(x, in.dy, first, c.N, fresh_rows, in.raw_panel + panel * PANEL * c.depth, fresh_panel, c.depth,
                     shared + TILE_FLOATS(RT));
    float ppl[4] = {0, 0, 0, 0};
    if (in.ppl)
#pragma unroll
        for (int j = 0; j < 4; j++) ppl[j] = in.ppl[panel * PANEL + tx + 16 * j];
#pragma unroll
    for (int i = 0; i < RT; i++) {
        float noise[4] = {1, 1, 1, 1};
        if (c.noise_kind != NOISE_NONE) noise_of(c, first + ty + 16 * i, panel, tx, noise);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            weigh(c, &w[i][j], &x[i][j], noise[j], ppl[j], n.mix_offset[i], n.noisy[i], n.pi_factor[i], n.pi_offset[i]);
        }
    }
}

/* -- Rows: dL/dz^ -------------------------------------------------------------------------------------------------- */

/* Shared: two products, then x (64 positions, 64 rows) and codes (64, 64). */
template <int NS, int DT> static size_t rows_shared(void)
{
    return sizeof(float) * (size_t)(2 * TILE_FLOATS(RT) + (NS ? PANEL * TILE_PITCH + PANEL * PANEL : PANEL * DT));
}

/* dhat (N,depth): sum of x times the normalized code; x_sum (N): sum of x. */
template <int NS, int DT>
VX_KERNEL VX_HOT __launch_bounds__(TILE_THREADS, NS > 1 || DT > 4 ? 1 : 2)
    backward_rows_kernel(smooth_call c, backward_in in, float *dhat, float *x_sum)
{
    float *shared = (float *)vx_shared, *t = shared + 2 * TILE_FLOATS(RT), *v = NS ? t + PANEL * TILE_PITCH : t;
    const int64_t first = (int64_t)blockIdx.x * ROWS, first_slice = (int64_t)blockIdx.y * NS;
    const int tx = tile_x(), ty = tile_y();
    row_numbers n;
    load_numbers(c, in, n, first, c.N);
    float wide[NS ? NS : 1][RT][4], thin[RT][DT ? DT : 1], sum[RT];
#pragma unroll
    for (int i = 0; i < RT; i++) {
        sum[i] = 0;
#pragma unroll
        for (int s = 0; s < NS; s++) wide[s][i][0] = wide[s][i][1] = wide[s][i][2] = wide[s][i][3] = 0;
#pragma unroll
        for (int d = 0; d < DT; d++) thin[i][d] = 0;
    }
    for (int64_t panel = 0; panel < c.panels; panel++) {
        float w[RT][4], x[RT][4];
        make_x(c, in, n, w, x, first, panel, panel == 0, true, shared);
#pragma unroll
        for (int i = 0; i < RT; i++) sum[i] += x[i][0] + x[i][1] + x[i][2] + x[i][3];
        const float *codes = c.row + panel * PANEL * c.depth;
        if constexpr (NS == 0) {
            for (int i = threadIdx.x; i < PANEL * DT; i += TILE_THREADS) v[i] = codes[i];
            __syncthreads();
#pragma unroll
            for (int j = 0; j < 4; j++)
#pragma unroll
                for (int d = 0; d < DT; d++) {
                    const float q = v[(4 * tx + j) * DT + d];
#pragma unroll
                    for (int i = 0; i < RT; i++) thin[i][d] += x[i][j] * q;
                }
        } else {
#pragma unroll
            for (int j = 0; j < 4; j++)
#pragma unroll
                for (int i = 0; i < RT; i++) t[(4 * tx + j) * TILE_PITCH + ty + 16 * i] = x[i][j];
#pragma unroll
            for (int s = 0; s < NS; s++) {
                const int64_t from = (first_slice + s) * PANEL;
                if (from >= c.depth) break;
                __syncthreads();
                for (int i = threadIdx.x; i < PANEL * PANEL / 4; i += TILE_THREADS) {
                    const int k = i / (PANEL / 4), d = i % (PANEL / 4) * 4;
                    float4 q = make_float4(0, 0, 0, 0);
                    if (from + d < c.depth) q = *(const float4 *)(codes + k * c.depth + from + d);
                    *(float4 *)(v + 4 * i) = q;
                }
                __syncthreads();
                for (int k = 0; k < PANEL; k++) {
                    const float4 q = *(const float4 *)(v + k * PANEL + 4 * tx),
                                 p = *(const float4 *)(t + k * TILE_PITCH + 4 * ty);
#pragma unroll
                    for (int i = 0; i < RT; i++) {
                        const float a = i == 0 ? p.x : i == 1 ? p.y : i == 2 ? p.z : p.w;
                        wide[s][i][0] += a * q.x;
                        wide[s][i][1] += a * q.y;
                        wide[s][i][2] += a * q.z;
                        wide[s][i][3] += a * q.w;
                    }
                }
            }
        }
    }
    const int r = threadIdx.x;
    const bool mine = r < ROWS && first + r < c.N;
    const float total = reduce_rows<RT>(sum, REDUCE_SUM, shared);
    if (mine && blockIdx.y == 0) x_sum[first + r] = total;
#pragma unroll
    for (int s = 0; s < NS; s++)
#pragma unroll
        for (int i = 0; i < RT; i++) {
            const int64_t row = first + 4 * ty + i, d = (first_slice + s) * PANEL + 4 * tx;
            if (row < c.N && d < c.depth)
                *(float4 *)(dhat + row * c.depth + d) =
                    make_float4(wide[s][i][0], wide[s][i][1], wide[s][i][2], wide[s][i][3]);
        }
    for (int d = 0; d < DT; d++) {
        float x[RT];
#pragma unroll
        for (int i = 0; i < RT; i++) {
            x[i] = 0;
#pragma unroll
            for (int e = 0; e < DT; e++)
                if (e == d) x[i] = thin[i][e];
        }
        const float y = reduce_rows<RT>(x, REDUCE_SUM, shared);
        if (mine) dhat[(first + r) * c.depth + d] = y;
    }
}

/* -- Columns: dL/dq^ and the mixture's gradient -------------------------------------------------------------------- */

/* Shared: two products, then x and w (64 rows, 64 positions), and slices of rows and of dy (64, 64). */
template <int NS> static size_t columns_shared(void)
{
    return sizeof(float) * (size_t)(2 * TILE_FLOATS(RT) + (NS ? 2 * ROWS * TILE_PITCH + 2 * ROWS * PANEL : 0));
}

/* Sums of 16 threads' values, of equal tx, in order of ty: thread tx, ty = 0 has them. */
VX_DEVICE float reduce_columns(float x, float *shared)
{
    const int tx = tile_x(), ty = tile_y();
    __syncthreads();
    shared[ty * 16 + tx] = x;
    __syncthreads();
    float y = 0;
    for (int t = 0; t < 16 && ty == 0; t++) y += shared[t * 16 + tx];
    return y;
}

/* partial (ranges, 2, 64 panels, depth) by position: sum of x times the scaled row; sum of w times dy. */
template <int NS, int DT>
VX_KERNEL VX_HOT __launch_bounds__(TILE_THREADS, 1)
    backward_columns_kernel(smooth_call c, backward_in in, float *partial, int64_t ranges)
{
    float *shared = (float *)vx_shared, *t = shared + 2 * TILE_FLOATS(RT), *tw = t + ROWS * TILE_PITCH,
          *z = tw + ROWS * TILE_PITCH, *g = z + ROWS * PANEL;
    const int64_t panel = blockIdx.x, range = blockIdx.y, first_slice = (int64_t)blockIdx.z * NS;
    const int64_t begin = range * c.N / ranges, end = (range + 1) * c.N / ranges;
    const int tx = tile_x(), ty = tile_y();
    float dq[NS ? NS : 1][4][4], dv[NS ? NS : 1][4][4], thin_q[4][DT ? DT : 1], thin_v[4][DT ? DT : 1];
#pragma unroll
    for (int j = 0; j < 4; j++) {
#pragma unroll
        for (int s = 0; s < NS; s++)
#pragma unroll
            for (int k = 0; k < 4; k++) dq[s][j][k] = dv[s][j][k] = 0;
#pragma unroll
        for (int d = 0; d < DT; d++) thin_q[j][d] = thin_v[j][d] = 0;
    }
    for (int64_t first = begin; first < end; first += ROWS) {
        row_numbers n;
        float w[RT][4], x[RT][4];
        load_numbers(c, in, n, first, end);
        make_x(c, in, n, w, x, first, panel, true, first == begin, shared);
        if (c.sampler == VX_HARD_GUMBEL)
#pragma unroll
            for (int i = 0; i < RT; i++) {
                const int64_t row = first + ty + 16 * i;
                const int64_t code = row < end ? in.codes[row * c.G + c.g] : -1;
#pragma unroll
                for (int j = 0; j < 4; j++) w[i][j] = code == panel * PANEL + tx + 16 * j;
            }
        if constexpr (NS == 0) { /* all of a row is in the products' shared memory */
            const float *a = shared, *b = shared + TILE_FLOATS(RT);
#pragma unroll
            for (int i = 0; i < RT; i++)
#pragma unroll
                for (int d = 0; d < DT; d++) {
                    const float zd = a[(ty + 16 * i) * ROW_PITCH + d], gd = b[(ty + 16 * i) * ROW_PITCH + d];
#pragma unroll
                    for (int j = 0; j < 4; j++) thin_q[j][d] += x[i][j] * zd, thin_v[j][d] += w[i][j] * gd;
                }
        } else {
#pragma unroll
            for (int i = 0; i < RT; i++) {
                *(float4 *)(t + (ty + 16 * i) * TILE_PITCH + 4 * tx) = make_float4(x[i][0], x[i][1], x[i][2], x[i][3]);
                *(float4 *)(tw + (ty + 16 * i) * TILE_PITCH + 4 * tx) = make_float4(w[i][0], w[i][1], w[i][2], w[i][3]);
            }
#pragma unroll
            for (int s = 0; s < NS; s++) {
                const int64_t from = (first_slice + s) * PANEL;
                if (from >= c.depth) break;
                __syncthreads();
                for (int i = threadIdx.x; i < ROWS * PANEL / 4; i += TILE_THREADS) {
                    const int r = i / (PANEL / 4), d = i % (PANEL / 4) * 4;
                    float4 u = make_float4(0, 0, 0, 0), v = u;
                    if (first + r < end && from + d < c.depth) {
                        u = *(const float4 *)(c.rows + (first + r) * c.depth + from + d);
                        v = *(const float4 *)(in.dy + (first + r) * c.depth + from + d);
                    }
                    *(float4 *)(z + 4 * i) = u;
                    *(float4 *)(g + 4 * i) = v;
                }
                __syncthreads();
                /* codes 4 ty + j, numbers 4 tx + k */
                for (int r = 0; r < ROWS; r++) {
                    const float4 a = *(const float4 *)(t + r * TILE_PITCH + 4 * ty),
                                 b = *(const float4 *)(tw + r * TILE_PITCH + 4 * ty);
                    const float4 u = *(const float4 *)(z + r * PANEL + 4 * tx),
                                 v = *(const float4 *)(g + r * PANEL + 4 * tx);
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        const float p = j == 0   ? a.x
                                        : j == 1 ? a.y
                                        : j == 2 ? a.z
                                                 : a.w,
                                    q = j == 0   ? b.x
                                        : j == 1 ? b.y
                                        : j == 2 ? b.z
                                                 : b.w;
                        dq[s][j][0] += p * u.x, dv[s][j][0] += q * v.x;
                        dq[s][j][1] += p * u.y, dv[s][j][1] += q * v.y;
                        dq[s][j][2] += p * u.z, dv[s][j][2] += q * v.z;
                        dq[s][j][3] += p * u.w, dv[s][j][3] += q * v.w;
                    }
                }
            }
        }
    }
    float *to_q = partial + (range * 2 * c.panels + panel) * PANEL * c.depth, *to_v = to_q + c.panels * PANEL * c.depth;
#pragma unroll
    for (int s = 0; s < NS; s++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int64_t d = (first_slice + s) * PANEL + 4 * tx, at = (4 * ty + j) * c.depth + d;
            if (d >= c.depth) continue;
            *(float4 *)(to_q + at) = make_float4(dq[s][j][0], dq[s][j][1], dq[s][j][2], dq[s][j][3]);
            *(float4 *)(to_v + at) = make_float4(dv[s][j][0], dv[s][j][1], dv[s][j][2], dv[s][j][3]);
        }
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
        for (int d = 0; d < DT; d++) {
            const float q = reduce_columns(thin_q[j][d], shared), v = reduce_columns(thin_v[j][d], shared);
            if (ty == 0) to_q[(4 * tx + j) * c.depth + d] = q, to_v[(4 * tx + j) * c.depth + d] = v;
        }
}

/* -- On tensor cores ----------------------------------------------------------------------------------------------- */

static const int TENSOR_ROWS = TILE_THREADS / 32 * 16, TENSOR_COLUMNS_THREADS = 128;

template <int KT> static size_t rows_tensor_shared(void)
{
    return sizeof(float) * (size_t)((2 * TENSOR_ROWS + 4 * PANEL) * ITEM_PITCH(KT));
}

/* As backward_rows_kernel: a warp owns 16 rows, panels pass by, normalized and as stored. */
template <int KT>
VX_KERNEL VX_HOT __launch_bounds__(TILE_THREADS, 1)
    backward_rows_tensor_kernel(smooth_call c, backward_in in, float *dhat, float *x_sum)
{
    float *rows = (float *)vx_shared, *grads = rows + TENSOR_ROWS * ITEM_PITCH(KT),
          *books = grads + TENSOR_ROWS * ITEM_PITCH(KT);
    const int book = PANEL * ITEM_PITCH(KT), lane = threadIdx.x % 32, own = threadIdx.x / 32 * 16 * ITEM_PITCH(KT),
              q = lane % 4;
    const int64_t first = (int64_t)blockIdx.x * TENSOR_ROWS, mine = first + threadIdx.x / 32 * 16 + lane / 4,
                  padded = c.panels * PANEL;
    float start[2], mix_offset[2], noisy[2], pi_factor[2], pi_offset[2], sum[2] = {0, 0}, o[KT][4];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const bool real = mine + 8 * i < c.N;
        const int64_t row = real ? mine + 8 * i : c.N - 1;
        start[i] = real ? in.start[row] : PADDING;
        mix_offset[i] = in.mix_offset[row], noisy[i] = c.noise_kind != NOISE_NONE ? in.noisy[row] : 0;
        pi_factor[i] = in.pi_factor[row], pi_offset[i] = in.pi_offset[row];
    }
#pragma unroll
    for (int k = 0; k < KT; k++) o[k][0] = o[k][1] = o[k][2] = o[k][3] = 0;
    load_items<KT>(rows, c.rows, first, c.N, TENSOR_ROWS, threadIdx.x, TILE_THREADS);
    load_items<KT>(grads, in.dy, first, c.N, TENSOR_ROWS, threadIdx.x, TILE_THREADS);
    load_items<KT>(books, c.row, 0, padded, PANEL, threadIdx.x, TILE_THREADS);
    load_items<KT>(books + book, c.raw_row, 0, padded, PANEL, threadIdx.x, TILE_THREADS);
    vx_copy_commit();
    for (int64_t panel = 0; panel < c.panels; panel++) {
        float *hat = books + panel % 2 * 2 * book, *next = books + (panel + 1) % 2 * 2 * book, w[8][4], x[8][4];
        if (panel + 1 < c.panels) {
            load_items<KT>(next, c.row, (panel + 1) * PANEL, padded, PANEL, threadIdx.x, TILE_THREADS);
            load_items<KT>(next + book, c.raw_row, (panel + 1) * PANEL, padded, PANEL, threadIdx.x, TILE_THREADS);
        }
        vx_copy_commit();
        vx_copy_wait(1);
        __syncthreads();
        tensor_logits<KT>(c, w, start, panel, rows + own, hat);
#pragma unroll
        for (int t = 0; t < 8; t++) x[t][0] = x[t][1] = x[t][2] = x[t][3] = 0;
        tensor_product<KT>(x, grads + own, hat + book);
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int h = 0; h < 2; h++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float noise[4] = {1, 1, 1, 1};
                    const int u = 4 * q + 2 * h + e;
                    if (c.noise_kind != NOISE_NONE) noise_of(c, mine + 8 * i, panel, u, noise);
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        const float ppl = in.ppl ? in.ppl[panel * PANEL + u + 16 * j] : 0;
                        weigh(c, &w[4 * h + j][2 * i + e], &x[4 * h + j][2 * i + e], noise[j], ppl, mix_offset[i],
                              noisy[i], pi_factor[i], pi_offset[i]);
                        sum[i] += x[4 * h + j][2 * i + e];
                    }
                }
        tensor_mix<KT>(o, x, hat);
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const float total = quad_sum(sum[i]);
        if (mine + 8 * i >= c.N) continue; /* no collective follows */
        if (q == 0) x_sum[mine + 8 * i] = total;
#pragma unroll
        for (int k = 0; k < KT; k++)
            *(float2 *)(dhat + (mine + 8 * i) * c.depth + 8 * k + 2 * q) = make_float2(o[k][2 * i], o[k][2 * i + 1]);
    }
}

template <int KT> static size_t columns_tensor_shared(void)
{
    return sizeof(float) * (size_t)(6 * PANEL * ITEM_PITCH(KT) + 2 * 6 * ROWS);
}

/* As backward_columns_kernel: a warp owns 16 codes, rows pass by, 64 at a time. */
template <int KT>
VX_KERNEL VX_HOT __launch_bounds__(TENSOR_COLUMNS_THREADS)
    backward_columns_tensor_kernel(smooth_call c, backward_in in, float *partial, int64_t ranges)
{
    const int tile = PANEL * ITEM_PITCH(KT), lane = threadIdx.x % 32, own = threadIdx.x / 32 * 16, q = lane % 4;
    float *hat = (float *)vx_shared, *raw = hat + tile, *stages = raw + tile, *numbers = stages + 4 * tile;
    const int64_t panel = blockIdx.x, range = blockIdx.y, padded = c.panels * PANEL;
    const int64_t begin = range * c.N / ranges, end = (range + 1) * c.N / ranges;
    const bool noise_wanted = c.noise_kind != NOISE_NONE, hard = c.sampler == VX_HARD_GUMBEL;
    int64_t code[2];
    float ppl[2], dq[KT][4], dv[KT][4];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        code[i] = panel * PANEL + tensor_code(own + lane / 4 + 8 * i);
        ppl[i] = in.ppl ? in.ppl[code[i]] : 0;
    }
#pragma unroll
    for (int k = 0; k < KT; k++)
        dq[k][0] = dq[k][1] = dq[k][2] = dq[k][3] = dv[k][0] = dv[k][1] = dv[k][2] = dv[k][3] = 0;
    load_items<KT>(hat, c.row, panel * PANEL, padded, PANEL, threadIdx.x, TENSOR_COLUMNS_THREADS);
    load_items<KT>(raw, c.raw_row, panel * PANEL, padded, PANEL, threadIdx.x, TENSOR_COLUMNS_THREADS);
    load_items<KT>(stages, c.rows, begin, end, ROWS, threadIdx.x, TENSOR_COLUMNS_THREADS);
    load_items<KT>(stages + tile, in.dy, begin, end, ROWS, threadIdx.x, TENSOR_COLUMNS_THREADS);
    vx_copy_commit();
    for (int64_t first = begin, step = 0; first < end; first += ROWS, step++) {
        float *rows = stages + step % 2 * 2 * tile, *next = stages + (step + 1) % 2 * 2 * tile,
              *number = numbers + step % 2 * 6 * ROWS;
        float w[8][4], x[8][4];
        if (first + ROWS < end) {
            load_items<KT>(next, c.rows, first + ROWS, end, ROWS, threadIdx.x, TENSOR_COLUMNS_THREADS);
            load_items<KT>(next + tile, in.dy, first + ROWS, end, ROWS, threadIdx.x, TENSOR_COLUMNS_THREADS);
        }
        vx_copy_commit();
        for (int i = threadIdx.x; i < ROWS; i += TENSOR_COLUMNS_THREADS) {
            const bool there = first + i < end;
            const int64_t row = there ? first + i : end - 1;
            number[i] = there ? in.start[row] : PADDING;
            number[ROWS + i] = in.mix_offset[row];
            number[2 * ROWS + i] = noise_wanted ? in.noisy[row] : 0;
            number[3 * ROWS + i] = in.pi_factor[row];
            number[4 * ROWS + i] = in.pi_offset[row];
            ((int32_t *)number)[5 * ROWS + i] = hard && there ? in.codes[row * c.G + c.g] : -1;
        }
        vx_copy_wait(1);
        __syncthreads();
#pragma unroll
        for (int t = 0; t < 8; t++) {
            w[t][0] = w[t][2] = number[8 * t + 2 * q], w[t][1] = w[t][3] = number[8 * t + 2 * q + 1];
            x[t][0] = x[t][1] = x[t][2] = x[t][3] = 0;
        }
        tensor_product<KT>(w, hat + own * ITEM_PITCH(KT), rows);
        tensor_product<KT>(x, raw + own * ITEM_PITCH(KT), rows + tile);
#pragma unroll
        for (int t = 0; t < 8; t++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int at = 8 * t + 2 * q + e;
                float noise[4] = {1, 1, 1, 1};
                /* the two codes of a thread are 16 apart: numbers j and j + 1 of one Philox block */
                if (noise_wanted) noise_of(c, first + at, panel, (int)(code[0] % 16), noise);
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    if (code[i] >= c.M) w[t][2 * i + e] = PADDING;
                    const int64_t j = code[i] % PANEL / 16;
                    weigh(c, &w[t][2 * i + e], &x[t][2 * i + e],
                          j == 0   ? noise[0]
                          : j == 1 ? noise[1]
                          : j == 2 ? noise[2]
                                   : noise[3],
                          ppl[i], number[ROWS + at], number[2 * ROWS + at], number[3 * ROWS + at],
                          number[4 * ROWS + at]);
                    if (hard) w[t][2 * i + e] = ((int32_t *)number)[5 * ROWS + at] == code[i];
                }
            }
        tensor_mix<KT>(dq, x, rows);
        tensor_mix<KT>(dv, w, rows + tile);
        __syncthreads(); /* rows may be overwritten */
    }
    vx_copy_wait(0);
    float *to_q = partial + (range * 2 * c.panels + panel) * PANEL * c.depth, *to_v = to_q + padded * c.depth;
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int k = 0; k < KT; k++) {
            const int64_t at = (own + lane / 4 + 8 * i) * c.depth + 8 * k + 2 * q;
            *(float2 *)(to_q + at) = make_float2(dq[k][2 * i], dq[k][2 * i + 1]);
            *(float2 *)(to_v + at) = make_float2(dv[k][2 * i], dv[k][2 * i + 1]);
        }
}

/* -- Sparse pairs -------------------------------------------------------------------------------------------------- */

typedef struct pairs {
    int64_t S, K;
    const int32_t *near;     /* (S,K) of the group */
    const int32_t *vertices; /* (S) of the group, or NULL */
    const int32_t *slot;     /* (M) the vertex that looks at a code, or -1 */
    float *weight;           /* (S,K) 1 (knn-ce) or pi (knn-l2): the pair's term in x is this times -c, or -2c */
    int32_t *count;          /* (N) pairs of a row */
    unsigned long long *probability; /* (N) sum of weight over a row's pairs, in UNITs */
    unsigned long long *sum;         /* (N,depth) sum of weight times the normalized code, in UNITs */
} pairs;

VX_DEVICE unsigned long long to_units(float x) { return (unsigned long long)(long long)rint((double)x * UNIT); }
VX_DEVICE float from_units(unsigned long long x) { return (float)((double)(long long)x / UNIT); }

VX_KERNEL slot_kernel(int32_t *slot, const int32_t *vertices, int64_t M, int64_t S)
{
    for (int64_t i = vx_first(); i < S; i += vx_step()) {
        const int64_t code = vertices ? vertices[i] : i;
        if (code >= 0 && code < M) slot[code] = (int32_t)i;
    }
}

/* A warp for each pair. lse (N,G,2). */
VX_KERNEL pairs_kernel(smooth_call c, pairs q, const float *row, const float *lse, vx_data_check outside)
{
    const int lane = threadIdx.x % 32;
    for (int64_t j = vx_first() / 32; j < q.S * q.K; j += vx_step() / 32) {
        const int64_t i = q.near[j];
        int64_t code = q.vertices ? q.vertices[j / q.K] : j / q.K;
        if (i < 0 || i >= c.N) {
            if (lane == 0) vx_report(outside, j), q.weight[j] = 0;
            continue;
        }
        if (code < 0 || code >= c.M) code = 0;
        const float *hat = row + row_position(c, code) * c.depth, *z = c.rows + i * c.depth;
        float weight = 1;
        if (c.regularizer == VX_REG_KNN_L2) {
            float dot = 0;
            for (int64_t d = lane; d < c.depth; d += 32) dot += z[d] * hat[d];
            weight = exp2f(vx_warp_sum(dot) - lse[(i * c.G + c.g) * 2] * (float)LOG2E);
        }
        if (lane == 0) {
            q.weight[j] = weight;
            atomicAdd(&q.count[i], 1);
            atomicAdd(&q.probability[i], to_units(weight));
        }
        for (int64_t d = lane; d < c.depth; d += 32) atomicAdd(&q.sum[i * c.depth + d], to_units(weight * hat[d]));
    }
}

/* -- Row and code numbers ------------------------------------------------------------------------------------------ */

/* c of smooth_backward.c's banner. */
VX_DEVICE float knn_factor(const smooth_call &c, const pairs &q, const float *dreg)
{
    return q.K ? dreg[0] / ((float)c.G * (float)q.S * (float)q.K) : 0;
}

/* A warp for each row. mixed (N,G,D): sum of p times code. */
VX_KERNEL numbers_kernel(smooth_call c, pairs q, float *start, float *mix_offset, float *noisy, float *pi_factor,
                         float *pi_offset, const float *dy, const float *mixed, const float *lse, const float *sumsq,
                         const float *dreg, const int32_t *codes, vx_data_check outside)
{
    const float knn = knn_factor(c, q, dreg);
    for (int64_t i = vx_first() / 32; i < c.N; i += vx_step() / 32) {
        const int64_t at = i * c.G + c.g;
        float dot = 0;
        for (int64_t d = threadIdx.x % 32; d < c.D; d += 32) dot += dy[at * c.D + d] * mixed[at * c.D + d];
        dot = vx_warp_sum(dot);
        if (threadIdx.x % 32) continue;
        if (codes[at] < 0 || codes[at] >= c.M) vx_report(outside, at);
        const double l = lse[at * 2] * LOG2E, m = lse[at * 2 + 1] * LOG2E;
        start[i] = (float)-l;
        mix_offset[i] = -dot;
        if (noisy) noisy[i] = (float)(c.noise_kind == NOISE_RATES ? exp2(l - m) : l * c.cooling - m);
        const float count = q.K ? (float)q.count[i] : 0;
        pi_factor[i] = c.regularizer == VX_REG_KNN_L2 ? 2 * knn * count : 0;
        pi_offset[i] = c.regularizer == VX_REG_KNN_CE   ? knn * count
                       : c.regularizer == VX_REG_KNN_L2 ? 2 * knn * (from_units(q.probability[i]) - count * sumsq[at])
                                                        : 0;
    }
}

/* One block: b (64 panels) of the ppl regularizer by code. */
VX_KERNEL ppl_kernel(float *b, const float *mean_pi, const float *dreg, int64_t M, int64_t padded, double groups,
                     double rows)
{
    __shared__ double shared[32];
    double entropy = 0;
    for (int64_t m = threadIdx.x; m < M; m += blockDim.x)
        entropy -= mean_pi[m] > 0 ? mean_pi[m] * log((double)mean_pi[m]) : 0;
    entropy = vx_block_sum(entropy, shared);
    const double factor = dreg[0] / groups * exp(entropy) / (rows * (double)M);
    for (int64_t m = threadIdx.x; m < padded; m += blockDim.x)
        b[m] = m < M && mean_pi[m] > 0 ? (float)(factor * (log((double)mean_pi[m]) + 1)) : 0;
}

VX_KERNEL subtract_kernel(float *y, const float *x, int64_t n)
{
    for (int64_t i = vx_first(); i < n; i += vx_step()) y[i] -= x[i];
}

/* dz of the rows, a warp each, and their parts of dlog_tau (N). */
VX_KERNEL finish_rows_kernel(smooth_call c, pairs q, float *dz, double *dlog_tau, const float *dhat, const float *x_sum,
                             const float *lse, const float *dreg)
{
    const int lane = threadIdx.x % 32;
    const float scale = c.scale[0], tau = c.scale[1];
    const float pair = (c.regularizer == VX_REG_KNN_L2 ? -2 : -1) * knn_factor(c, q, dreg);
    for (int64_t i = vx_first() / 32; i < c.N; i += vx_step() / 32) {
        const float *z = c.rows + i * c.depth;
        float along = 0;
        for (int64_t d = lane; d < c.D; d += 32) {
            const float x = dhat[i * c.depth + d] + (q.K ? pair * from_units(q.sum[i * c.depth + d]) : 0);
            along += x * z[d];
        }
        along = vx_warp_sum(along) / scale;
        const float norm = c.norms[i], projection = norm > (float)GUARD ? along / scale : 0, factor = 1 / (norm * tau);
        for (int64_t d = lane; d < c.D; d += 32) {
            const float x = dhat[i * c.depth + d] + (q.K ? pair * from_units(q.sum[i * c.depth + d]) : 0);
            dz[(i * c.G + c.g) * c.D + d] = (x - projection * z[d]) * factor;
        }
        if (lane == 0) {
            const float pairs_sum =
                q.K ? pair * (c.regularizer == VX_REG_KNN_L2 ? from_units(q.probability[i]) : (float)q.count[i]) : 0;
            dlog_tau[i] = -((double)along / tau - (double)lse[(i * c.G + c.g) * 2] * (x_sum[i] + pairs_sum));
        }
    }
}

/* dcodebook of the group's codes, a warp each. */
VX_KERNEL finish_codes_kernel(smooth_call c, pairs q, float *dcodebook, const float *partial, int64_t ranges,
                              const float *row, const float *code_norms, const float *dreg)
{
    const int lane = threadIdx.x % 32;
    const int64_t padded = c.panels * PANEL;
    const float pair = (c.regularizer == VX_REG_KNN_L2 ? -2 : -1) * knn_factor(c, q, dreg);
    for (int64_t m = vx_first() / 32; m < c.M; m += vx_step() / 32) {
        const int64_t at = row_position(c, m), slot = q.K ? q.slot[m] : -1;
        const float *hat = row + at * c.depth;
        float *out = dcodebook + (c.g * c.M + m) * c.D;
        float projection = 0;
        for (int64_t d = lane; d < c.D; d += 32) {
            float x = 0;
            for (int64_t r = 0; r < ranges; r++) x += partial[(2 * r * padded + at) * c.depth + d];
            for (int64_t k = 0; slot >= 0 && k < q.K; k++) {
                const int64_t i = q.near[slot * q.K + k];
                if (i >= 0 && i < c.N) x += pair * q.weight[slot * q.K + k] * c.rows[i * c.depth + d];
            }
            projection += x * hat[d];
            out[d] = x; /* read again below, by the same thread */
        }
        projection = vx_warp_sum(projection);
        if (!(code_norms[m] > (float)GUARD)) projection = 0; /* under the guard, |q| is a constant */
        const float factor = (float)LN2 / code_norms[m];
        for (int64_t d = lane; d < c.D; d += 32) {
            float mix = 0;
            for (int64_t r = 0; r < ranges; r++) mix += partial[((2 * r + 1) * padded + at) * c.depth + d];
            out[d] = (out[d] - projection * hat[d]) * factor + mix;
        }
    }
}

/* One block: the sum of x (n), added to total unless fresh; and its float. */
VX_KERNEL log_tau_kernel(float *dlog_tau, double *total, const double *x, int64_t n, int fresh)
{
    __shared__ double shared[32];
    double sum = 0;
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) sum += x[i];
    sum = vx_block_sum(sum, shared);
    if (threadIdx.x == 0) {
        *total = sum + (fresh ? 0 : *total);
        *dlog_tau = (float)*total;
    }
}

#define LAUNCH_ROWS(NS, DT, slices)                                                                                    \
    VX_LAUNCH((backward_rows_kernel<NS, DT>), dim3((unsigned)vx_ceil_div(c.N, ROWS), (unsigned)(slices)),              \
              TILE_THREADS, (rows_shared<NS, DT>()), c, in, dhat, x_sum)
#define LAUNCH_COLUMNS(NS, DT, slices)                                                                                 \
    VX_LAUNCH((backward_columns_kernel<NS, DT>), dim3((unsigned)c.panels, (unsigned)ranges, (unsigned)(slices)),       \
              TILE_THREADS, (columns_shared<NS>()), c, in, partial, ranges)

#define LAUNCH_ROWS_TENSOR(KT)                                                                                         \
    VX_LAUNCH((backward_rows_tensor_kernel<KT>), (unsigned)vx_ceil_div(c.N, TENSOR_ROWS), TILE_THREADS,                \
              rows_tensor_shared<KT>(), c, in, dhat, x_sum)
#define LAUNCH_COLUMNS_TENSOR(KT)                                                                                      \
    VX_LAUNCH((backward_columns_tensor_kernel<KT>), dim3((unsigned)c.panels, (unsigned)ranges),                        \
              TENSOR_COLUMNS_THREADS, columns_tensor_shared<KT>(), c, in, partial, ranges)

int vx_cuda_smooth_backward(vx_tensor *dz, vx_tensor *dcodebook, vx_tensor *dlog_tau, vx_tensor *dy, vx_tensor *dreg,
                            vx_tensor *y, vx_tensor *codes, vx_tensor *lse, vx_tensor *sumsq, vx_tensor *soft,
                            vx_tensor *near, vx_tensor *mean_pi, vx_tensor *z, vx_tensor *codebook, vx_tensor *log_tau,
                            vx_tensor *noise, vx_tensor *vertices, int sampler, int regularizer, float gumbel_tau,
                            int shards, int precision, uint64_t seed, uint64_t stream)
{
    (void)precision;
    if (sampler == VX_HARD_GUMBEL && !soft)
        return vx_fail(VX_EINVAL, "smooth: the hard Gumbel sampler's gradient needs soft (N,G,D)");
    if (check_smooth(z, codebook, vertices, near, mean_pi, regularizer, shards)) return VX_EINVAL;
    smooth_call c = call_of(z, codebook, noise, sampler, regularizer, gumbel_tau);
    const vx_random random = vx_draws(seed, stream);
    const bool knn = regularizer == VX_REG_KNN_CE || regularizer == VX_REG_KNN_L2, ppl = regularizer == VX_REG_PPL;
    const int64_t padded = c.panels * PANEL, ranges = cut_ranges(c.N, c.panels, 2 * padded * c.depth * 4);
    pairs q = {};
    backward_in in = {};
    q.S = knn ? near->shape[1] : 0, q.K = knn ? near->shape[2] : 0;

    vx_draw *draw = VX_SCRATCH(vx_draw, 1);
    float *scale = VX_SCRATCH(float, 2), *rows = VX_SCRATCH(float, c.N *c.depth), *norms = VX_SCRATCH(float, c.N);
    float *grad = VX_SCRATCH(float, c.N *c.depth), *dhat = VX_SCRATCH(float, c.N *c.depth),
          *x_sum = VX_SCRATCH(float, c.N);
    /* what the kernels of this width read, see code_layout */
    float *panel = c.tensor && !ppl ? NULL : VX_SCRATCH(float, padded *c.depth);
    float *raw_panel = c.tensor ? NULL : VX_SCRATCH(float, padded *c.depth),
          *raw_row = c.tensor ? VX_SCRATCH(float, padded *c.depth) : NULL;
    float *row = VX_SCRATCH(float, padded *c.depth), *code_norms = VX_SCRATCH(float, padded);
    float *start = VX_SCRATCH(float, c.N), *mix_offset = VX_SCRATCH(float, c.N), *noisy = VX_SCRATCH(float, c.N);
    float *pi_factor = VX_SCRATCH(float, c.N), *pi_offset = VX_SCRATCH(float, c.N);
    float *weights = ppl ? VX_SCRATCH(float, padded) : NULL,
          *partial = VX_SCRATCH(float, ranges * 2 * padded * c.depth);
    double *log_tau_rows = VX_SCRATCH(double, c.N), *total = VX_SCRATCH(double, 1);
    int32_t *slot = NULL;
    if (knn) {
        slot = VX_SCRATCH(int32_t, c.M);
        q.weight = VX_SCRATCH(float, q.S *q.K), q.count = VX_SCRATCH(int32_t, c.N);
        q.probability = VX_SCRATCH(unsigned long long, c.N), q.sum = VX_SCRATCH(unsigned long long, c.N *c.depth);
        q.slot = slot;
    }
    const smooth_checks check = checks_of(&c);
    const vx_data_check bad_code =
        vx_data_check_of(VX_EINVAL, c.G, "row %%lld has a code outside 0 .. %lld (group %%lld)", (long long)c.M - 1);
    const vx_data_check bad_row =
        vx_data_check_of(VX_EINVAL, vx_max64(q.K, 1),
                         "near names a row outside 0 .. %lld, at vertex %%lld, neighbour %%lld", (long long)c.N - 1);

    VX_LAUNCH(tau_kernel, 1, 1, 0, scale, draw, vx_f32(log_tau), random, check.tau);
    c.draw = draw, c.scale = scale, c.rows = rows, c.norms = norms, c.panel = panel, c.row = row, c.raw_row = raw_row;
    in.dy = grad, in.raw_panel = raw_panel, in.start = start, in.mix_offset = mix_offset, in.noisy = noisy;
    in.pi_factor = pi_factor, in.pi_offset = pi_offset, in.ppl = weights, in.codes = vx_i32(codes);
    const float *mixed = vx_f32(sampler == VX_HARD_GUMBEL ? soft : y);
    for (c.g = 0; c.g < c.G; c.g++) {
        code_layout to = {};
        to.panel = panel, to.raw_panel = raw_panel, to.row = row, to.raw_row = raw_row, to.tensor = c.tensor;
        to.norm = code_norms, to.count = c.M;
        const unsigned by_row = vx_grid(c.N * 32, 256);
        VX_LAUNCH(rows_kernel, by_row, 256, 0, rows, norms, vx_f32(z), scale, 1, c.N, c.G, c.g, c.D, c.depth,
                  check.row);
        VX_LAUNCH(rows_kernel, by_row, 256, 0, grad, (float *)NULL, vx_f32(dy), (const float *)NULL, 0, c.N, c.G, c.g,
                  c.D, c.depth, check.row);
        VX_LAUNCH(codes_kernel, vx_grid(padded * 32, 256), 256, 0, to, vx_f32(codebook), c.M, c.g, c.D, c.depth,
                  check.code, check.vertex);
        if (knn) {
            q.near = vx_i32(near) + c.g * q.S * q.K, q.vertices = vertices ? vx_i32(vertices) + c.g * q.S : NULL;
            VX_CUDA(cudaMemsetAsync(q.count, 0, sizeof(int32_t) * (size_t)c.N, vx_stream()));
            VX_CUDA(cudaMemsetAsync(q.probability, 0, 8 * (size_t)c.N, vx_stream()));
            VX_CUDA(cudaMemsetAsync(q.sum, 0, 8 * (size_t)(c.N * c.depth), vx_stream()));
            VX_CUDA(cudaMemsetAsync(slot, 0xff, sizeof(int32_t) * (size_t)c.M, vx_stream()));
            VX_LAUNCH(slot_kernel, vx_grid(q.S, 256), 256, 0, slot, q.vertices, c.M, q.S);
            VX_LAUNCH(pairs_kernel, vx_grid(q.S * q.K * 32, 256), 256, 0, c, q, row, vx_f32(lse), bad_row);
        }
        VX_LAUNCH(numbers_kernel, by_row, 256, 0, c, q, start, mix_offset, noisy, pi_factor, pi_offset, vx_f32(dy),
                  mixed, vx_f32(lse), vx_f32(sumsq), vx_f32(dreg), vx_i32(codes), bad_code);
        if (ppl) {
            VX_LAUNCH(ppl_kernel, 1, 1024, 0, weights, vx_f32(mean_pi) + c.g * c.M, vx_f32(dreg), c.M, padded,
                      (double)c.G, (double)c.N);
            scan(&c, SCAN_PPL, x_sum, start, weights); /* x_sum is written later */
            VX_LAUNCH(subtract_kernel, vx_grid(c.N, 256), 256, 0, pi_offset, x_sum, c.N);
        }
        if (c.depth == 4) LAUNCH_ROWS(0, 4, 1);
        else if (c.depth == 8) LAUNCH_ROWS(0, 8, 1);
        else if (c.depth == 16) LAUNCH_ROWS_TENSOR(2);
        else if (c.depth == 32) LAUNCH_ROWS_TENSOR(4);
        else if (c.depth == 64) LAUNCH_ROWS_TENSOR(8);
        else LAUNCH_ROWS(4, 0, vx_ceil_div(c.depth, 256));
        VX_LAUNCH(finish_rows_kernel, by_row, 256, 0, c, q, vx_f32(dz), log_tau_rows, dhat, x_sum, vx_f32(lse),
                  vx_f32(dreg));
        VX_LAUNCH(log_tau_kernel, 1, 1024, 0, vx_f32(dlog_tau), total, log_tau_rows, c.N, c.g == 0);
        if (c.depth == 4) LAUNCH_COLUMNS(0, 4, 1);
        else if (c.depth == 8) LAUNCH_COLUMNS(0, 8, 1);
        else if (c.depth == 16) LAUNCH_COLUMNS_TENSOR(2);
        else if (c.depth == 32) LAUNCH_COLUMNS_TENSOR(4);
        else if (c.depth == 64) LAUNCH_COLUMNS_TENSOR(8);
        else LAUNCH_COLUMNS(2, 0, vx_ceil_div(c.depth, 128));
        VX_LAUNCH(finish_codes_kernel, vx_grid(c.M * 32, 256), 256, 0, c, q, vx_f32(dcodebook), partial, ranges, row,
                  code_norms, vx_f32(dreg));
    }
    return vx_status();
}
