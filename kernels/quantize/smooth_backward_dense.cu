/* smooth_backward_dense.cu: the two passes over the logits that make the gradients' dense terms, each with p and x of a
 * tile made again from z, the codes and dy; no N x M array:
 *   rows      a block owns 64 rows, meets all panels, and sums x q^: dL/dz^;
 *   columns   a block owns a panel, meets a range of rows, and sums x z^ and w dy: the gradients of q^ and of the
 *             mixture. The ranges are added up in order by who asks for them. Under hard Gumbel w is the one-hot code.
 * x and the weights are those of smooth_backward.c.
 */
#include "smooth_backward.cuh"

/* -- p and x of one tile ------------------------------------------------------------------------------------------- */

/* Makes of one row and code, from the logit (base 2, in *w) and <dy, q> (in *x), the weight and x. */
VX_DEVICE void weigh(const group_call &c, float *w, float *x, float noise, float ppl, float mix_offset, float noisy,
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

/* Returns x[j], without an index into registers. */
VX_DEVICE float pick(const float (&x)[4], int j) { return j == 0 ? x[0] : j == 1 ? x[1] : j == 2 ? x[2] : x[3]; }

/* The numbers of a thread's rows, as backward_in has them. */
typedef struct row_numbers {
    float start[RT], mix_offset[RT], noisy[RT], pi_factor[RT], pi_offset[RT];
} row_numbers;

VX_DEVICE void load_numbers(const group_call &c, const backward_in &in, row_numbers &n, int64_t first, int64_t end)
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

/* Makes w, the weights of the mixture, and x = dL/dlogit, its dense terms, of a tile. shared: a product for rows and
 * codes (TILE_FLOATS), and behind it one for dy and codes. */
VX_DEVICE void make_x(const group_call &c, const backward_in &in, const row_numbers &n, float (&w)[RT][4],
                      float (&x)[RT][4], int64_t first, int64_t panel, bool fresh_rows, bool fresh_panel, float *shared)
{
    const int tx = tile_x(), ty = tile_y();
    tile_logits(c, w, n.start, first, panel, fresh_rows, fresh_panel, shared);
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

/* Shared: two products, and what a mixture needs. */
template <int NS, int DT> static size_t rows_shared(void)
{
    return sizeof(float) * (size_t)(2 * TILE_FLOATS(RT) + (NS ? MIX_FLOATS : PANEL * DT));
}

/* Makes dhat (N,depth), the sum of x times the normalized code, and x_sum (N), the sum of x. NS: slices of 64 numbers
 * of a wide row that a block has; 0 for a narrow row, of at most DT numbers. */
template <int NS, int DT>
VX_KERNEL VX_HOT __launch_bounds__(TILE_THREADS, NS > 1 || DT > 4 ? 1 : 2)
    backward_rows_kernel(group_call c, backward_in in, float *dhat, float *x_sum)
{
    float *shared = (float *)vx_shared, *mix = shared + 2 * TILE_FLOATS(RT);
    const int64_t first = (int64_t)blockIdx.x * ROWS, first_slice = (int64_t)blockIdx.y * NS;
    const int tx = tile_x(), ty = tile_y();
    row_numbers n;
    load_numbers(c, in, n, first, c.N);
    float wide[NS ? NS : 1][RT][4], narrow[RT][DT ? DT : 1], sum[RT];
#pragma unroll
    for (int i = 0; i < RT; i++) {
        sum[i] = 0;
#pragma unroll
        for (int s = 0; s < NS; s++) wide[s][i][0] = wide[s][i][1] = wide[s][i][2] = wide[s][i][3] = 0;
#pragma unroll
        for (int d = 0; d < DT; d++) narrow[i][d] = 0;
    }
    for (int64_t panel = 0; panel < c.panels; panel++) {
        float w[RT][4], x[RT][4];
        make_x(c, in, n, w, x, first, panel, panel == 0, true, shared);
#pragma unroll
        for (int i = 0; i < RT; i++) sum[i] += x[i][0] + x[i][1] + x[i][2] + x[i][3];
        const float *codes = c.row + panel * PANEL * c.depth;
        if constexpr (NS == 0) {
            for (int i = threadIdx.x; i < PANEL * DT; i += TILE_THREADS) mix[i] = codes[i];
            __syncthreads();
            mix_narrow<DT>(narrow, x, mix);
        } else mix_wide<NS>(wide, x, codes, c.depth, first_slice, mix);
    }
    const int r = threadIdx.x;
    const bool mine = r < ROWS && first + r < c.N;
    const float total = reduce_rows(sum, REDUCE_SUM, shared);
    if (mine && blockIdx.y == 0) x_sum[first + r] = total;
#pragma unroll
    for (int s = 0; s < NS; s++)
#pragma unroll
        for (int i = 0; i < RT; i++) {
            const int64_t row = first + 4 * ty + i, d = (first_slice + s) * 64 + 4 * tx;
            if (row < c.N && d < c.depth)
                *(float4 *)(dhat + row * c.depth + d) =
                    make_float4(wide[s][i][0], wide[s][i][1], wide[s][i][2], wide[s][i][3]);
        }
    for (int d = 0; d < DT; d++) {
        const float y = reduce_column(narrow, d, shared);
        if (mine) dhat[(first + r) * c.depth + d] = y;
    }
}

/* -- Columns: dL/dq^ and the mixture's gradient -------------------------------------------------------------------- */

constexpr int TILE_PITCH = PANEL + 4; /* of x and w in shared memory, rows apart */

/* Shared: two products, then x and w (64 rows, 64 positions), and slices of rows and of dy (64,64). */
template <int NS> static size_t columns_shared(void)
{
    return sizeof(float) * (size_t)(2 * TILE_FLOATS(RT) + (NS ? 2 * ROWS * TILE_PITCH + 2 * ROWS * 64 : 0));
}

/* Adds up the values of the 16 threads of equal tx, in order of ty; the thread of ty = 0 gets the sum. */
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

/* Makes partial (ranges,2,Mp,depth) by position: the sum of x times the scaled row; the sum of w times dy. */
template <int NS, int DT>
VX_KERNEL VX_HOT __launch_bounds__(TILE_THREADS, 1)
    backward_columns_kernel(group_call c, backward_in in, float *partial, int64_t ranges)
{
    float *shared = (float *)vx_shared, *t = shared + 2 * TILE_FLOATS(RT), *tw = t + ROWS * TILE_PITCH,
          *z = tw + ROWS * TILE_PITCH, *g = z + ROWS * 64;
    const int64_t panel = blockIdx.x, range = blockIdx.y, first_slice = (int64_t)blockIdx.z * NS;
    const int64_t begin = range * c.N / ranges, end = (range + 1) * c.N / ranges;
    const int tx = tile_x(), ty = tile_y();
    float dq[NS ? NS : 1][4][4], dv[NS ? NS : 1][4][4], narrow_q[4][DT ? DT : 1], narrow_v[4][DT ? DT : 1];
#pragma unroll
    for (int j = 0; j < 4; j++) {
#pragma unroll
        for (int s = 0; s < NS; s++)
#pragma unroll
            for (int k = 0; k < 4; k++) dq[s][j][k] = dv[s][j][k] = 0;
#pragma unroll
        for (int d = 0; d < DT; d++) narrow_q[j][d] = narrow_v[j][d] = 0;
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
                    for (int j = 0; j < 4; j++) narrow_q[j][d] += x[i][j] * zd, narrow_v[j][d] += w[i][j] * gd;
                }
        } else {
#pragma unroll
            for (int i = 0; i < RT; i++) {
                *(float4 *)(t + (ty + 16 * i) * TILE_PITCH + 4 * tx) = make_float4(x[i][0], x[i][1], x[i][2], x[i][3]);
                *(float4 *)(tw + (ty + 16 * i) * TILE_PITCH + 4 * tx) = make_float4(w[i][0], w[i][1], w[i][2], w[i][3]);
            }
#pragma unroll
            for (int s = 0; s < NS; s++) {
                const int64_t from = (first_slice + s) * 64;
                if (from >= c.depth) break;
                __syncthreads();
                load_slice(z, c.rows, first, end, from, c.depth);
                load_slice(g, in.dy, first, end, from, c.depth);
                __syncthreads();
                for (int r = 0; r < ROWS; r++) { /* codes 4 ty + j, numbers 4 tx + k */
                    const float *own = t + r * TILE_PITCH + 4 * ty;
                    add_outer(dq[s], *(const float4 *)own, *(const float4 *)(z + r * 64 + 4 * tx));
                    add_outer(dv[s], *(const float4 *)(own + ROWS * TILE_PITCH),
                              *(const float4 *)(g + r * 64 + 4 * tx));
                }
            }
        }
    }
    float *to_q = partial + (range * 2 * c.panels + panel) * PANEL * c.depth, *to_v = to_q + c.Mp * c.depth;
#pragma unroll
    for (int s = 0; s < NS; s++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int64_t d = (first_slice + s) * 64 + 4 * tx, at = (4 * ty + j) * c.depth + d;
            if (d >= c.depth) continue;
            *(float4 *)(to_q + at) = make_float4(dq[s][j][0], dq[s][j][1], dq[s][j][2], dq[s][j][3]);
            *(float4 *)(to_v + at) = make_float4(dv[s][j][0], dv[s][j][1], dv[s][j][2], dv[s][j][3]);
        }
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
        for (int d = 0; d < DT; d++) {
            const float q = reduce_columns(narrow_q[j][d], shared), v = reduce_columns(narrow_v[j][d], shared);
            if (ty == 0) to_q[(4 * tx + j) * c.depth + d] = q, to_v[(4 * tx + j) * c.depth + d] = v;
        }
}

/* -- On tensor cores ----------------------------------------------------------------------------------------------- */

constexpr int MMA_COLUMNS_THREADS = 128;

template <int KT> static size_t rows_mma_shared(void)
{
    return sizeof(float) * (size_t)((2 * MMA_ROWS + 4 * PANEL) * ITEM_PITCH(KT));
}

/* Makes what backward_rows_kernel makes: a warp owns 16 rows, panels pass by, normalized and as stored. */
template <int KT>
VX_KERNEL VX_HOT __launch_bounds__(TILE_THREADS, 1)
    backward_rows_mma_kernel(group_call c, backward_in in, float *dhat, float *x_sum)
{
    constexpr int CODES = PANEL * ITEM_PITCH(KT); /* floats of a panel */
    float *rows = (float *)vx_shared, *grads = rows + MMA_ROWS * ITEM_PITCH(KT),
          *panels = grads + MMA_ROWS * ITEM_PITCH(KT);
    const int lane = threadIdx.x % 32, own = threadIdx.x / 32 * 16 * ITEM_PITCH(KT), q = lane % 4;
    const int64_t first = (int64_t)blockIdx.x * MMA_ROWS, mine = first + threadIdx.x / 32 * 16 + lane / 4;
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
    load_items<KT>(rows, c.rows, first, c.N, MMA_ROWS, threadIdx.x, TILE_THREADS);
    load_items<KT>(grads, in.dy, first, c.N, MMA_ROWS, threadIdx.x, TILE_THREADS);
    load_codes<KT>(panels, c, 0, TILE_THREADS);
    vx_copy_commit();
    for (int64_t panel = 0; panel < c.panels; panel++) {
        float *hat = panels + panel % 2 * 2 * CODES, *next = panels + (panel + 1) % 2 * 2 * CODES;
        float w[8][4], x[8][4];
        if (panel + 1 < c.panels) load_codes<KT>(next, c, panel + 1, TILE_THREADS);
        vx_copy_commit();
        vx_copy_wait(1);
        __syncthreads();
        mma_logits<KT>(c, w, start, panel, rows + own, hat);
#pragma unroll
        for (int t = 0; t < 8; t++) x[t][0] = x[t][1] = x[t][2] = x[t][3] = 0;
        mma_product<KT>(x, grads + own, hat + CODES);
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
        mma_mix<KT>(o, x, hat);
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

template <int KT> static size_t columns_mma_shared(void)
{
    return sizeof(float) * (size_t)(6 * PANEL * ITEM_PITCH(KT) + 2 * 6 * ROWS);
}

/* Makes what backward_columns_kernel makes: a warp owns 16 codes, rows pass by, 64 at a time. */
template <int KT>
VX_KERNEL VX_HOT __launch_bounds__(MMA_COLUMNS_THREADS)
    backward_columns_mma_kernel(group_call c, backward_in in, float *partial, int64_t ranges)
{
    const int tile = PANEL * ITEM_PITCH(KT), lane = threadIdx.x % 32, own = threadIdx.x / 32 * 16, q = lane % 4;
    float *hat = (float *)vx_shared, *raw = hat + tile, *stages = raw + tile, *numbers = stages + 4 * tile;
    const int64_t panel = blockIdx.x, range = blockIdx.y;
    const int64_t begin = range * c.N / ranges, end = (range + 1) * c.N / ranges;
    const bool noise_wanted = c.noise_kind != NOISE_NONE, hard = c.sampler == VX_HARD_GUMBEL;
    int64_t code[2];
    float ppl[2], dq[KT][4], dv[KT][4];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        code[i] = panel * PANEL + mma_code(own + lane / 4 + 8 * i);
        ppl[i] = in.ppl ? in.ppl[code[i]] : 0;
    }
#pragma unroll
    for (int k = 0; k < KT; k++)
        dq[k][0] = dq[k][1] = dq[k][2] = dq[k][3] = dv[k][0] = dv[k][1] = dv[k][2] = dv[k][3] = 0;
    load_codes<KT>(hat, c, panel, MMA_COLUMNS_THREADS);
    load_items<KT>(stages, c.rows, begin, end, ROWS, threadIdx.x, MMA_COLUMNS_THREADS);
    load_items<KT>(stages + tile, in.dy, begin, end, ROWS, threadIdx.x, MMA_COLUMNS_THREADS);
    vx_copy_commit();
    for (int64_t first = begin, step = 0; first < end; first += ROWS, step++) {
        float *rows = stages + step % 2 * 2 * tile, *next = stages + (step + 1) % 2 * 2 * tile,
              *number = numbers + step % 2 * 6 * ROWS;
        float w[8][4], x[8][4];
        if (first + ROWS < end) {
            load_items<KT>(next, c.rows, first + ROWS, end, ROWS, threadIdx.x, MMA_COLUMNS_THREADS);
            load_items<KT>(next + tile, in.dy, first + ROWS, end, ROWS, threadIdx.x, MMA_COLUMNS_THREADS);
        }
        vx_copy_commit();
        for (int i = threadIdx.x; i < ROWS; i += MMA_COLUMNS_THREADS) {
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
        mma_product<KT>(w, hat + own * ITEM_PITCH(KT), rows);
        mma_product<KT>(x, raw + own * ITEM_PITCH(KT), rows + tile);
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
                    weigh(c, &w[t][2 * i + e], &x[t][2 * i + e], pick(noise, (int)j), ppl[i], number[ROWS + at],
                          number[2 * ROWS + at], number[3 * ROWS + at], number[4 * ROWS + at]);
                    if (hard) w[t][2 * i + e] = ((int32_t *)number)[5 * ROWS + at] == code[i];
                }
            }
        mma_mix<KT>(dq, x, rows);
        mma_mix<KT>(dv, w, rows + tile);
        __syncthreads(); /* rows may be overwritten */
    }
    vx_copy_wait(0);
    float *to_q = partial + (range * 2 * c.panels + panel) * PANEL * c.depth, *to_v = to_q + c.Mp * c.depth;
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int k = 0; k < KT; k++) {
            const int64_t at = (own + lane / 4 + 8 * i) * c.depth + 8 * k + 2 * q;
            *(float2 *)(to_q + at) = make_float2(dq[k][2 * i], dq[k][2 * i + 1]);
            *(float2 *)(to_v + at) = make_float2(dv[k][2 * i], dv[k][2 * i + 1]);
        }
}

/* -- Launches ------------------------------------------------------------------------------------------------------ */

template <int NS, int DT> static void launch_rows(const group_call &c, const backward_in &in, float *dhat, float *x_sum)
{
    const int64_t slices = NS ? vx_ceil_div(c.depth, 64 * (NS ? NS : 1)) : 1;
    VX_LAUNCH((backward_rows_kernel<NS, DT>), dim3((unsigned)vx_ceil_div(c.N, ROWS), (unsigned)slices), TILE_THREADS,
              (rows_shared<NS, DT>()), c, in, dhat, x_sum);
}

template <int KT> static void launch_rows_mma(const group_call &c, const backward_in &in, float *dhat, float *x_sum)
{
    VX_LAUNCH((backward_rows_mma_kernel<KT>), (unsigned)vx_ceil_div(c.N, MMA_ROWS), TILE_THREADS, rows_mma_shared<KT>(),
              c, in, dhat, x_sum);
}

void backward_rows(const group_call &c, const backward_in &in, float *dhat, float *x_sum)
{
    if (c.depth == 4) launch_rows<0, 4>(c, in, dhat, x_sum);
    else if (c.depth == 8) launch_rows<0, 8>(c, in, dhat, x_sum);
    else if (c.depth == 16) launch_rows_mma<2>(c, in, dhat, x_sum);
    else if (c.depth == 32) launch_rows_mma<4>(c, in, dhat, x_sum);
    else if (c.depth == 64) launch_rows_mma<8>(c, in, dhat, x_sum);
    else launch_rows<4, 0>(c, in, dhat, x_sum);
}

template <int NS, int DT>
static void launch_columns(const group_call &c, const backward_in &in, float *partial, int64_t ranges)
{
    const int64_t slices = NS ? vx_ceil_div(c.depth, 64 * (NS ? NS : 1)) : 1;
    VX_LAUNCH((backward_columns_kernel<NS, DT>), dim3((unsigned)c.panels, (unsigned)ranges, (unsigned)slices),
              TILE_THREADS, (columns_shared<NS>()), c, in, partial, ranges);
}

template <int KT>
static void launch_columns_mma(const group_call &c, const backward_in &in, float *partial, int64_t ranges)
{
    VX_LAUNCH((backward_columns_mma_kernel<KT>), dim3((unsigned)c.panels, (unsigned)ranges), MMA_COLUMNS_THREADS,
              columns_mma_shared<KT>(), c, in, partial, ranges);
}

void backward_columns(const group_call &c, const backward_in &in, float *partial, int64_t ranges)
{
    if (c.depth == 4) launch_columns<0, 4>(c, in, partial, ranges);
    else if (c.depth == 8) launch_columns<0, 8>(c, in, partial, ranges);
    else if (c.depth == 16) launch_columns_mma<2>(c, in, partial, ranges);
    else if (c.depth == 32) launch_columns_mma<4>(c, in, partial, ranges);
    else if (c.depth == 64) launch_columns_mma<8>(c, in, partial, ranges);
    else launch_columns<2, 0>(c, in, partial, ranges);
}
