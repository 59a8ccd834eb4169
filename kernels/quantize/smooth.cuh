/* smooth.cuh: what the files of the smoothed quantizer share on CUDA: the call, noise, logits of a tile, and small
 * reductions. The mathematics is in smooth.c and smooth_backward.c, the layout of rows and codes in codebook_tiles.cuh.
 *
 *   smooth.cu                  forward: the op, and pass 1, which meets all codes of each row
 *   smooth_select.cu           forward, pass 2: the nearest rows and the mean of each code
 *   smooth_backward.cu         backward: the op, the numbers of rows and codes, the KNN regularizer's sparse terms
 *   smooth_backward_dense.cu   backward: two passes over the logits, for the gradients' dense terms
 *   smooth_group.cu            what all of them are given: the checked call, tau, and a scan of a row's logits
 *
 * Logarithms are to base 2 inside: log2(e) / tau is folded into the rows of z. tau is known to the device alone:
 * nothing here waits for it, so what depends on it is decided by the kernels.
 */
#ifndef VX_SMOOTH_CUH
#define VX_SMOOTH_CUH

#include "codebook_tiles.cuh"
#include "cuda/mma_tiles.cuh"
#include "gumbel.cuh"

static_assert(PANEL == MMA_OTHERS, "a panel is what a warp's items meet at a time");

/* One call for one group, as kernels see it. */
typedef struct group_call : smooth_call {
    int64_t g;                  /* the group, 0-based */
    int64_t depth;              /* numbers of a row with its padding */
    bool mma;                   /* D is 9 .. 64: tensor cores, and rows of codes in their order */
    float cooling;              /* 1 / gumbel_tau */
    const vx_draw *draw;        /* seed and stream */
    const float *scale;         /* scale[0] = log2(e) / tau, scale[1] = tau */
    const float *rows;          /* (N,depth) z / |z| scale */
    const float *norms;         /* (N) |z| */
    const float *panel;         /* (panels,depth,64) normalized codes */
    const float *row, *raw_row; /* (Mp,depth) codes, normalized and as stored */
} group_call;

/* The checks of data that both directions make. */
typedef struct smooth_checks {
    vx_data_check tau, row, code, noise, vertex;
} smooth_checks;

/* -- Host (smooth_group.cu) ---------------------------------------------------------------------------------------- */

/* Checks a call, and fills c but for what is laid out on the device; the arguments are smooth_call_check's. */
int group_call_check(group_call *c, const vx_tensor *z, const vx_tensor *codebook, const vx_tensor *noise,
                     const vx_tensor *vertices, const vx_tensor *near, const vx_tensor *mean_pi, int sampler,
                     int regularizer, float gumbel_tau, int shards, uint64_t seed, uint64_t stream);

smooth_checks smooth_checks_of(const group_call &c);

/* Fills scale (2) from log_tau (1), as group_call has it, and copies (seed, stream) to *draw, so that kernels hold one
 * pointer instead of vx_random's two. A tau out of range is reported late, and is 1 meanwhile. */
void prepare_tau(float *scale, vx_draw *draw, const float *log_tau, const vx_random &random, vx_data_check outside);

/* One number for each row from all of its logits. */
enum {
    SCAN_START = 0, /* minus the largest logit, rounded up: what the row's relative logits begin from (requirement R2 of
                     * smooth.c); 0 where |logit| <= scale is small enough anyway */
    SCAN_NOISY,     /* the largest (relative logit + noise) / gumbel_tau, rounded up */
    SCAN_PPL,       /* the sum of weight times 2^logit */
};

/* Makes out (N), the number that `mode` says. start (N): what logits begin from, or NULL: 0. weight (Mp) by code. */
void scan_logits(const group_call &c, int mode, float *out, const float *start, const float *weight);

/* Returns into how many ranges to cut the rows of a pass in which a block owns a panel of codes: few enough for their
 * partial results to stay small, enough to fill a large device. It depends on the sizes alone. bytes: of one range's
 * results for all panels. */
int64_t cut_ranges(int64_t rows, int64_t panels, int64_t bytes);

/* -- Device: logits of a tile -------------------------------------------------------------------------------------- */

constexpr int RT = 4, ROWS = 16 * RT;            /* rows of a thread, and of a tile in float32 */
constexpr int MMA_ROWS = TILE_THREADS / 32 * 16; /* rows of a block on tensor cores: 16 a warp */

/* Returns where c.row and c.raw_row have a code. */
VX_DEVICE int64_t row_position(const group_call &c, int64_t code)
{
    return c.mma ? mma_position(code) : tile_position(code);
}

/* Draws or loads the noise, rates (1/E) or logarithms (g log2 e) as noise_kind says, of row i's codes u, u + 16, u +
 * 32, u + 48 of a panel. */
VX_DEVICE void noise_of(const group_call &c, int64_t i, int64_t panel, int u, float out[4])
{
    const int64_t row = (i < c.N ? i : c.N - 1) * c.G + c.g;
    if (c.noise) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int64_t code = panel * PANEL + u + 16 * j;
            out[j] = code < c.M ? c.noise[row * c.M + code] * (float)LOG2E : 0;
        }
        return;
    }
    gumbel_rates(*c.draw, row, c.panels, panel, u, out);
    if (c.noise_kind == NOISE_LOGS)
#pragma unroll
        for (int j = 0; j < 4; j++) out[j] = log2f(out[j]);
}

/* Makes s, the logits of a tile: rows first .. of c, one panel, of codes that are not there PADDING. start: what each
 * row's begin from. fresh_ and shared as in tile_product. */
VX_DEVICE void tile_logits(const group_call &c, float (&s)[RT][4], const float (&start)[RT], int64_t first,
                           int64_t panel, bool fresh_rows, bool fresh_panel, float *shared)
{
#pragma unroll
    for (int i = 0; i < RT; i++) s[i][0] = s[i][1] = s[i][2] = s[i][3] = start[i];
    tile_product<RT>(s, c.rows, first, c.N, fresh_rows, c.panel + panel * PANEL * c.depth, fresh_panel, c.depth,
                     shared);
    if ((panel + 1) * PANEL > c.M)
#pragma unroll
        for (int j = 0; j < 4; j++)
            if (panel * PANEL + tile_x() + 16 * j >= c.M)
#pragma unroll
                for (int i = 0; i < RT; i++) s[i][j] = PADDING;
}

/* Makes the logits on tensor cores, for a warp's 16 rows (a) and a panel (b), both in shared memory. start: what the
 * logits of the thread's two rows begin from. */
template <int KT>
VX_DEVICE void mma_logits(const group_call &c, float (&s)[8][4], const float (&start)[2], int64_t panel, const float *a,
                          const float *b)
{
#pragma unroll
    for (int t = 0; t < 8; t++) s[t][0] = s[t][1] = start[0], s[t][2] = s[t][3] = start[1];
    mma_product<KT>(s, a, b);
    if ((panel + 1) * PANEL > c.M)
#pragma unroll
        for (int t = 0; t < 8; t++)
#pragma unroll
            for (int e = 0; e < 2; e++)
                if (panel * PANEL + mma_code(8 * t + threadIdx.x % 4 * 2 + e) >= c.M) s[t][e] = s[t][2 + e] = PADDING;
}

/* -- Device: what comes before and after a product ----------------------------------------------------------------- */

/* Loads a panel's codes, normalized and behind them as stored, for the tensor cores. The caller commits. */
template <int KT> VX_DEVICE void load_codes(float *shared, const group_call &c, int64_t panel, int threads)
{
    load_items<KT>(shared, c.row, panel * PANEL, c.Mp, PANEL, threadIdx.x, threads);
    load_items<KT>(shared + PANEL * ITEM_PITCH(KT), c.raw_row, panel * PANEL, c.Mp, PANEL, threadIdx.x, threads);
}

/* Loads numbers from .. from + 63 of items first .. first + 63 of (end,depth) as (64,64), zeros where there are
 * none. */
VX_DEVICE void load_slice(float *shared, const float *items, int64_t first, int64_t end, int64_t from, int64_t depth)
{
    for (int i = threadIdx.x; i < 64 * 64 / 4; i += TILE_THREADS) {
        const int at = i / (64 / 4), d = i % (64 / 4) * 4;
        float4 x = make_float4(0, 0, 0, 0);
        if (first + at < end && from + d < depth) x = *(const float4 *)(items + (first + at) * depth + from + d);
        *(float4 *)(shared + 4 * i) = x;
    }
}

/* Mixes a panel's codes, for rows too wide for registers: o[slice][i][k], row 4 ty + i and number 64 (first_slice +
 * slice) + 4 tx + k, += the sum of weight times code. w[i][j] is the weight of row ty + 16 i and position 4 tx + j,
 * codes (64,depth). shared: MIX_FLOATS; whoever read it last must be past a barrier. */
constexpr int WEIGHT_PITCH = ROWS + 4, MIX_FLOATS = PANEL * WEIGHT_PITCH + PANEL * 64;
template <int NS>
VX_DEVICE void mix_wide(float (&o)[NS][RT][4], const float (&w)[RT][4], const float *codes, int64_t depth,
                        int64_t first_slice, float *shared)
{
    const int tx = tile_x(), ty = tile_y();
    float *v = shared + PANEL * WEIGHT_PITCH;
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
        for (int i = 0; i < RT; i++) shared[(4 * tx + j) * WEIGHT_PITCH + ty + 16 * i] = w[i][j];
#pragma unroll
    for (int slice = 0; slice < NS; slice++) {
        const int64_t from = (first_slice + slice) * 64;
        if (from >= depth) break; /* the same for all threads */
        __syncthreads();
        load_slice(v, codes, 0, PANEL, from, depth);
        __syncthreads();
        for (int k = 0; k < PANEL; k++)
            add_outer(o[slice], *(const float4 *)(shared + k * WEIGHT_PITCH + 4 * ty),
                      *(const float4 *)(v + k * 64 + 4 * tx));
    }
}

/* Mixes a panel's codes, for rows of at most 8 numbers: o[i][d] is this thread's part, of its four positions, of row ty
 * + 16 i. codes (64,DT) in shared memory. */
template <int DT> VX_DEVICE void mix_narrow(float (&o)[RT][DT], const float (&w)[RT][4], const float *codes)
{
#pragma unroll
    for (int j = 0; j < 4; j++) {
        float q[DT];
#pragma unroll
        for (int d = 0; d < DT; d++) q[d] = codes[(4 * tile_x() + j) * DT + d];
#pragma unroll
        for (int i = 0; i < RT; i++)
#pragma unroll
            for (int d = 0; d < DT; d++) o[i][d] += w[i][j] * q[d];
    }
}

/* Reduces x, RT values of this thread's rows, over the 16 threads of each row, in order; thread r < ROWS gets row r's.
 * shared: 16 ROWS. */
enum { REDUCE_SUM = 0, REDUCE_MAX };
VX_DEVICE float reduce_rows(const float (&x)[RT], int how, float *shared)
{
    const int tx = tile_x(), ty = tile_y(), r = threadIdx.x;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < RT; i++) shared[tx * ROWS + ty + 16 * i] = x[i];
    __syncthreads();
    float y = r < ROWS ? shared[r] : 0;
    for (int t = 1; t < 16 && r < ROWS; t++) {
        const float other = shared[t * ROWS + r];
        y = how == REDUCE_SUM ? y + other : fmaxf(y, other);
    }
    return y;
}

/* Adds up column d of x in the same way; a loop over d leaves x in registers. */
template <int DT> VX_DEVICE float reduce_column(const float (&x)[RT][DT], int d, float *shared)
{
    float column[RT];
#pragma unroll
    for (int i = 0; i < RT; i++) {
        column[i] = 0;
#pragma unroll
        for (int e = 0; e < DT; e++)
            if (e == d) column[i] = x[i][e];
    }
    return reduce_rows(column, REDUCE_SUM, shared);
}

#endif
