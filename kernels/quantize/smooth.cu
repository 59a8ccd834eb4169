/* smooth.cu: the smoothed quantizer and its regularizers on CUDA, forward; the mathematics, what is left for the
 * backward pass, and the requirements are in smooth.c.
 *
 * Two passes over the logits, and no N x M array:
 *   1. a block owns 64 rows and meets all panels: logits, powers, sums, the mixture with the codes, the code;
 *   2. a block owns a panel and meets a range of rows: the K nearest rows of each of its codes, and the sums of pi. A
 *      row's
 * key needs the row's sum, hence the second pass. Keys that pass a code's threshold (its K-th key so far) are appended
 * to the code's list in shared memory, in any order; a full list is cut back to its K largest. Keys are packed as in
 * neighbours.h, all different, so what remains does not depend on the order of arrival. Ranges' lists are merged at the
 * end. Before them, where tau is small or noise comes as logarithms, a scan finds each row's largest logit.
 *
 * Cost: 6 N M D flops in float32 (4 without pass 2), 1 to 2 N M powers. D <= 8 keeps its mixture in registers; D <= 64
 * goes through the tensor cores (mma_tiles.cuh); what is wider, through shared memory as a second product of float32.
 * Memory: N (depth + 5) floats, M (3 depth + 2), and ranges of M K entries of 8 bytes.
 */
#include "smooth.cuh"

VX_KERNEL noise_check_kernel(const float *noise, int64_t rows, int64_t M, vx_data_check nonfinite)
{
    for (int64_t i = vx_first(); i < rows * M; i += vx_step())
        if (!(fabsf(noise[i]) < INFINITY)) vx_report(nonfinite, i / M);
}

/* -- Pass 1: rows -------------------------------------------------------------------------------------------------- */

typedef struct forward_out {
    float *y, *soft, *lse, *sumsq; /* as the op's; soft NULL unless hard Gumbel */
    int32_t *codes;
    const float *start;           /* (N) minus the row's reference */
    const float *noisy_reference; /* (N); NULL: 0 */
    float *inverse;               /* (N) 1 / sum of powers */
    float *factor, *offset;       /* (N) key = factor x + offset, x the logit (knn-ce) or the power (knn-l2) */
    double *max_p;                /* (blocks) sums of the rows' largest p */
    const float *codebook;        /* (G,M,D) */
} forward_out;

#define MIX_PITCH(RT) (16 * (RT) + 4) /* of a panel's weights, codes apart */

/* Shared memory of pass 1: a product, and the weights and codes of a mixture. NS: slices of 64 numbers of a wide row
 * that a block mixes; 0 for a narrow row, of at most DT numbers. */
template <int RT, int NS, int DT> static size_t forward_shared(void)
{
    const int mix = NS ? PANEL * MIX_PITCH(RT) + PANEL * PANEL : PANEL * DT;
    const int floats = TILE_FLOATS(RT) + mix, reduction = 2 * 16 * 16 * RT;
    return sizeof(float) * (size_t)(floats > reduction ? floats : reduction);
}

/* Adds a panel's weights times its codes to o: rows ty RT + i, numbers 64 slice + 4 tx + k. w holds the weights (64
 * positions, rows). */
template <int RT, int NS>
VX_DEVICE void mix_wide(float (&o)[NS][RT][4], const float *w, float *v, const float *codes, int64_t depth,
                        int64_t first_slice)
{
    const int tx = tile_x(), ty = tile_y();
#pragma unroll
    for (int slice = 0; slice < NS; slice++) {
        const int64_t from = (first_slice + slice) * PANEL;
        if (from >= depth) break; /* the same for all threads */
        __syncthreads();
        for (int i = threadIdx.x; i < PANEL * PANEL / 4; i += TILE_THREADS) {
            const int k = i / (PANEL / 4), d = i % (PANEL / 4) * 4;
            float4 q = make_float4(0, 0, 0, 0);
            if (from + d < depth) q = *(const float4 *)(codes + k * depth + from + d);
            *(float4 *)(v + 4 * i) = q;
        }
        __syncthreads();
        for (int k = 0; k < PANEL; k++) {
            const float4 q = *(const float4 *)(v + k * PANEL + 4 * tx);
#pragma unroll
            for (int i = 0; i < RT; i += 4) {
                const float4 p = *(const float4 *)(w + k * MIX_PITCH(RT) + ty * RT + i);
#pragma unroll
                for (int r = 0; r < 4; r++) {
                    const float x = r == 0 ? p.x : r == 1 ? p.y : r == 2 ? p.z : p.w;
                    o[slice][i + r][0] += x * q.x;
                    o[slice][i + r][1] += x * q.y;
                    o[slice][i + r][2] += x * q.z;
                    o[slice][i + r][3] += x * q.w;
                }
            }
        }
    }
}

/* What a thread knows of its rows at the end of pass 1: row r's 16 threads' best codes, the largest value and then the
 * lowest code. Thread r < 16 RT gets row r's. */
template <int RT>
VX_DEVICE int32_t best_of_rows(const float (&best)[RT], const int32_t (&code)[RT], float *value, float *shared)
{
    const int tx = tile_x(), ty = tile_y(), r = threadIdx.x, rows = 16 * RT;
    int32_t *candidate = (int32_t *)(shared + 16 * rows);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < RT; i++)
        shared[tx * rows + ty + 16 * i] = best[i], candidate[tx * rows + ty + 16 * i] = code[i];
    __syncthreads();
    float most = r < rows ? shared[r] : 0;
    int32_t lowest = r < rows ? candidate[r] : 0;
    for (int t = 1; t < 16 && r < rows; t++) {
        const float x = shared[t * rows + r];
        const int32_t at = candidate[t * rows + r];
        if (x > most || (x == most && at < lowest)) most = x, lowest = at;
    }
    *value = most;
    return lowest;
}

/* What pass 1 knows of a row at its end: the sums of powers, of their squares and of the noisy weights; the best logit
 * or weight and its code. Returns the row's largest p. */
VX_DEVICE double write_row(const smooth_call &c, const forward_out &out, int64_t row, float total, float square,
                           float noisy_total, float best, int32_t code)
{
    const float weights = c.noise_kind == NOISE_NONE ? total : noisy_total;
    const double reference = -(double)out.start[row], cooled = out.noisy_reference ? out.noisy_reference[row] : 0;
    const double lse = LN2 * (reference + log2((double)total));
    double noisy_lse = lse;
    if (c.noise_kind == NOISE_RATES) noisy_lse = LN2 * (reference + log2((double)weights));
    if (c.noise_kind == NOISE_LOGS) noisy_lse = LN2 * (reference * c.cooling + cooled + log2((double)weights));
    const int64_t at = row * c.G + c.g;
    const float norm2 = square / total / total;
    out.lse[at * 2] = (float)lse;
    out.lse[at * 2 + 1] = (float)noisy_lse;
    out.sumsq[at] = c.regularizer == VX_REG_KNN_L2 ? norm2 : 0;
    out.codes[at] = code;
    out.inverse[row] = 1 / total;
    out.factor[row] = c.regularizer == VX_REG_KNN_L2 ? 2 / total : 1;
    out.offset[row] = c.regularizer == VX_REG_KNN_L2 ? -norm2 : -log2f(total);
    return (c.noise_kind == NOISE_RATES ? best : exp2f(best - (float)cooled)) / weights;
}

template <int RT, int NS, int DT>
VX_KERNEL VX_HOT __launch_bounds__(TILE_THREADS, NS > 1 || DT > 4 ? 1 : 2)
    forward_kernel(smooth_call c, forward_out out)
{
    float *shared = (float *)vx_shared, *w = shared + TILE_FLOATS(RT), *v = NS ? w + PANEL * MIX_PITCH(RT) : w;
    const int64_t first = (int64_t)blockIdx.x * 16 * RT, first_slice = (int64_t)blockIdx.y * NS;
    const int tx = tile_x(), ty = tile_y(), rows = 16 * RT;
    const bool noisy = c.noise_kind != NOISE_NONE;
    float start[RT], noisy_reference[RT], sum[RT], squares[RT], noisy_sum[RT], best[RT];
    int32_t code[RT];
    float wide[NS ? NS : 1][RT][4], thin[RT][DT ? DT : 1];
#pragma unroll
    for (int i = 0; i < RT; i++) {
        const int64_t row = first + ty + 16 * i;
        start[i] = row < c.N ? out.start[row] : 0;
        noisy_reference[i] = out.noisy_reference && row < c.N ? out.noisy_reference[row] : 0;
        sum[i] = squares[i] = noisy_sum[i] = 0;
        best[i] = -INFINITY;
        code[i] = 0;
#pragma unroll
        for (int s = 0; s < NS; s++) wide[s][i][0] = wide[s][i][1] = wide[s][i][2] = wide[s][i][3] = 0;
#pragma unroll
        for (int d = 0; d < DT; d++) thin[i][d] = 0;
    }
    for (int64_t panel = 0; panel < c.panels; panel++) {
        float s[RT][4];
        tile_logits<RT>(c, s, start, first, panel, panel == 0, true, shared);
        if (!NS) /* the panel's codes, for the mixture; the last panel's use ended before the product's barriers */
            for (int i = threadIdx.x; i < PANEL * DT; i += TILE_THREADS) v[i] = c.raw_row[panel * PANEL * DT + i];
#pragma unroll
        for (int i = 0; i < RT; i++) {
            float noise[4] = {1, 1, 1, 1};
            if (noisy) noise_of(c, first + ty + 16 * i, panel, tx, noise);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float power = vx_fast_exp2(s[i][j]);
                sum[i] += power;
                squares[i] += power * power;
                float x = power, ranked = s[i][j];
                if (c.noise_kind == NOISE_RATES) ranked = x = power * noise[j];
                if (c.noise_kind == NOISE_LOGS) {
                    ranked = s[i][j] > PADDING / 2 ? (s[i][j] + noise[j]) * c.cooling : PADDING;
                    x = vx_fast_exp2(ranked - noisy_reference[i]);
                }
                noisy_sum[i] += x;
                if (ranked > best[i]) best[i] = ranked, code[i] = (int32_t)(panel * PANEL) + tx + 16 * j;
                s[i][j] = x;
            }
        }
        if (NS) {
            /* readers of the last panel's weights are past the product's barriers */
#pragma unroll
            for (int j = 0; j < 4; j++)
#pragma unroll
                for (int i = 0; i < RT; i++) w[(4 * tx + j) * MIX_PITCH(RT) + ty + 16 * i] = s[i][j];
            mix_wide<RT, NS ? NS : 1>(wide, w, v, c.raw_row + panel * PANEL * c.depth, c.depth, first_slice);
        } else {
            __syncthreads();
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float q[DT ? DT : 1];
#pragma unroll
                for (int d = 0; d < DT; d++) q[d] = v[(4 * tx + j) * DT + d];
#pragma unroll
                for (int i = 0; i < RT; i++)
#pragma unroll
                    for (int d = 0; d < DT; d++) thin[i][d] += s[i][j] * q[d];
            }
        }
    }

    /* thread r has row r's numbers from here on */
    const int r = threadIdx.x;
    const int64_t row = first + r;
    const bool mine = r < rows && row < c.N, writes = mine && blockIdx.y == 0;
    float value;
    const float total = reduce_rows<RT>(sum, REDUCE_SUM, shared), square = reduce_rows<RT>(squares, REDUCE_SUM, shared);
    const float noisy_total = reduce_rows<RT>(noisy_sum, REDUCE_SUM, shared);
    const int32_t found = best_of_rows<RT>(best, code, &value, shared);
    const float weights = noisy ? noisy_total : total;
    double largest = 0;
    if (writes) largest = write_row(c, out, row, total, square, noisy_total, value, found);
    __syncthreads();
    float *inverse = shared;
    int32_t *chosen = (int32_t *)(shared + rows);
    double *block = (double *)(shared + 2 * rows);
    if (r < rows) inverse[r] = mine ? 1 / weights : 0, chosen[r] = found;
    const double all = vx_block_sum(largest, block);
    if (threadIdx.x == 0 && blockIdx.y == 0) out.max_p[blockIdx.x] = all;
    __syncthreads();

    const bool hard = c.sampler == VX_HARD_GUMBEL;
    const float *book = out.codebook + c.g * c.M * c.D;
#pragma unroll
    for (int s = 0; s < NS; s++)
#pragma unroll
        for (int i = 0; i < RT; i++)
#pragma unroll
            for (int k = 0; k < 4; k++) {
                const int at = ty * RT + i;
                const int64_t d = (first_slice + s) * PANEL + 4 * tx + k, to = ((first + at) * c.G + c.g) * c.D + d;
                if (first + at >= c.N || d >= c.D) continue;
                const float mixed = wide[s][i][k] * inverse[at];
                out.y[to] = hard ? book[chosen[at] * c.D + d] : mixed;
                if (out.soft) out.soft[to] = mixed;
            }
    float *sums = shared + 4 * rows; /* the two arrays above stay; reduce_rows needs 16 rows */
    for (int d = 0; d < DT; d++) {
        float x[RT];
#pragma unroll
        for (int i = 0; i < RT; i++) {
            x[i] = 0;
#pragma unroll
            for (int e = 0; e < DT; e++)
                if (e == d) x[i] = thin[i][e];
        }
        const float mixed = reduce_rows<RT>(x, REDUCE_SUM, sums) * (r < rows ? inverse[r] : 0);
        if (!mine || d >= c.D) continue;
        const int64_t to = (row * c.G + c.g) * c.D + d;
        out.y[to] = hard ? book[chosen[r] * c.D + d] : mixed;
        if (out.soft) out.soft[to] = mixed;
    }
}

/* -- Pass 1 on tensor cores: a warp owns 16 rows ------------------------------------------------------------------- */

enum { TENSOR_ROWS = TILE_THREADS / 32 * 16 };

/* Shared: a block's rows, and two panels of codes, normalized and as stored, of which one is on its way while the other
 * is used. */
template <int KT> static size_t forward_tensor_shared(void)
{
    return sizeof(float) * (size_t)((TENSOR_ROWS + 4 * PANEL) * ITEM_PITCH(KT));
}

/* The better of two candidates; of equals the lower code. */
VX_DEVICE void keep_best(float *best, int32_t *code, float x, int32_t at)
{
    if (x > *best || (x == *best && at < *code)) *best = x, *code = at;
}

template <int KT, bool NOISY>
VX_KERNEL VX_HOT __launch_bounds__(TILE_THREADS, KT > (NOISY ? 2 : 4) ? 1 : 2)
    forward_tensor_kernel(smooth_call c, forward_out out)
{
    float *rows = (float *)vx_shared, *books = rows + TENSOR_ROWS * ITEM_PITCH(KT);
    const int book = PANEL * ITEM_PITCH(KT), lane = threadIdx.x % 32, warp = threadIdx.x / 32, q = lane % 4;
    const int64_t first = (int64_t)blockIdx.x * TENSOR_ROWS, mine = first + warp * 16 + lane / 4; /* and mine + 8 */
    float start[2], noisy_reference[2], sum[2] = {0, 0}, squares[2] = {0, 0}, noisy_sum[2] = {0, 0},
                                        best[2] = {-INFINITY, -INFINITY};
    int32_t code[2] = {INT32_MAX, INT32_MAX};
    float o[KT][4];
#pragma unroll
    for (int k = 0; k < KT; k++) o[k][0] = o[k][1] = o[k][2] = o[k][3] = 0;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        start[i] = mine + 8 * i < c.N ? out.start[mine + 8 * i] : 0;
        noisy_reference[i] = NOISY && out.noisy_reference && mine + 8 * i < c.N ? out.noisy_reference[mine + 8 * i] : 0;
    }
    load_items<KT>(rows, c.rows, first, c.N, TENSOR_ROWS, threadIdx.x, TILE_THREADS);
    load_items<KT>(books, c.row, 0, c.panels * PANEL, PANEL, threadIdx.x, TILE_THREADS);
    load_items<KT>(books + book, c.raw_row, 0, c.panels * PANEL, PANEL, threadIdx.x, TILE_THREADS);
    vx_copy_commit();
    for (int64_t panel = 0; panel < c.panels; panel++) {
        float *hat = books + panel % 2 * 2 * book, *next = books + (panel + 1) % 2 * 2 * book, s[8][4];
        if (panel + 1 < c.panels) {
            load_items<KT>(next, c.row, (panel + 1) * PANEL, c.panels * PANEL, PANEL, threadIdx.x, TILE_THREADS);
            load_items<KT>(next + book, c.raw_row, (panel + 1) * PANEL, c.panels * PANEL, PANEL, threadIdx.x,
                           TILE_THREADS);
        }
        vx_copy_commit();
        vx_copy_wait(1);
        __syncthreads();
        tensor_logits<KT>(c, s, start, panel, rows + warp * 16 * ITEM_PITCH(KT), hat);
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int h = 0; h < 2; h++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    float noise[4] = {1, 1, 1, 1};
                    const int u = 4 * q + 2 * h + e;
                    if (NOISY) noise_of(c, mine + 8 * i, panel, u, noise);
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        float &logit = s[4 * h + j][2 * i + e];
                        const float power = vx_fast_exp2(logit);
                        sum[i] += power;
                        squares[i] += power * power;
                        float x = power, ranked = logit;
                        if (NOISY && c.noise_kind == NOISE_RATES) ranked = x = power * noise[j];
                        if (NOISY && c.noise_kind == NOISE_LOGS) {
                            ranked = logit > PADDING / 2 ? (logit + noise[j]) * c.cooling : PADDING;
                            x = vx_fast_exp2(ranked - noisy_reference[i]);
                        }
                        if (NOISY) noisy_sum[i] += x;
                        keep_best(&best[i], &code[i], ranked, (int32_t)(panel * PANEL) + u + 16 * j);
                        logit = x;
                    }
                }
        tensor_mix<KT>(o, s, hat + book);
        __syncthreads();
    }
    double largest = 0;
    float inverse[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const float total = quad_sum(sum[i]), square = quad_sum(squares[i]), noisy_total = quad_sum(noisy_sum[i]);
        for (int step = 1; step < 4; step *= 2) {
            const float other = __shfl_xor_sync(VX_ALL_LANES, best[i], step);
            const int32_t at = __shfl_xor_sync(VX_ALL_LANES, code[i], step);
            keep_best(&best[i], &code[i], other, at);
        }
        inverse[i] = 1 / (NOISY ? noisy_total : total);
        if (q == 0 && mine + 8 * i < c.N)
            largest += write_row(c, out, mine + 8 * i, total, square, noisy_total, best[i], code[i]);
    }
    __syncthreads();
    const double all = vx_block_sum(largest, (double *)rows);
    if (threadIdx.x == 0) out.max_p[blockIdx.x] = all;
    const bool hard = c.sampler == VX_HARD_GUMBEL;
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int k = 0; k < KT; k++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int64_t d = 8 * k + 2 * q + e, to = ((mine + 8 * i) * c.G + c.g) * c.D + d;
                if (mine + 8 * i >= c.N || d >= c.D) continue;
                const float mixed = o[k][2 * i + e] * inverse[i];
                out.y[to] = hard ? out.codebook[(c.g * c.M + code[i]) * c.D + d] : mixed;
                if (out.soft) out.soft[to] = mixed;
            }
}

/* -- Pass 2: columns ----------------------------------------------------------------------------------------------- */

enum { SELECT_RT = 4, SELECT_ROWS = 16 * SELECT_RT, SLACK = 2 * SELECT_ROWS };

typedef struct columns_out {
    int64_t each, ranges, shards; /* neighbours of a shard; ranges of a shard's rows */
    unsigned long long *lists;    /* (shards ranges, 64 panels, each) descending; NULL: no neighbours are wanted */
    float *mean;                  /* (shards ranges, 64 panels) sums of pi by code; NULL: not wanted */
    const float *start, *inverse, *factor, *offset;
} columns_out;

/* Cuts the lists whose count passed `full` back to their `keep` largest, in descending order. A warp takes a list; an
 * entry's place is the number of larger ones. Room for keep + SLACK entries a list, of which keep <= 64. */
VX_DEVICE void cut_lists(unsigned long long *lists, int *count, float *threshold, int keep, int full)
{
    const int lane = threadIdx.x % 32, room = keep + SLACK;
    for (int at = threadIdx.x / 32; at < PANEL; at += blockDim.x / 32) {
        const int n = count[at];
        unsigned long long *list = lists + at * room, mine[(64 + SLACK) / 32];
        if (n <= full) continue; /* the same for the whole warp */
#pragma unroll
        for (int k = 0; k < (64 + SLACK) / 32; k++) mine[k] = lane + 32 * k < n ? list[lane + 32 * k] : 0;
        int place[(64 + SLACK) / 32] = {};
        for (int t = 0; t < n; t++) {
            const unsigned long long other = list[t];
#pragma unroll
            for (int k = 0; k < (64 + SLACK) / 32; k++) place[k] += other > mine[k];
        }
        __syncwarp();
#pragma unroll
        for (int k = 0; k < (64 + SLACK) / 32; k++)
            if (lane + 32 * k < n && place[k] < keep) list[place[k]] = mine[k];
        __syncwarp();
        if (lane == 0) {
            count[at] = n < keep ? n : keep;
            threshold[at] = n < keep ? -INFINITY : neighbour_key(list[keep - 1]);
        }
    }
}

VX_KERNEL VX_HOT __launch_bounds__(TILE_THREADS) columns_kernel(smooth_call c, columns_out out)
{
    float *shared = (float *)vx_shared;
    unsigned long long *lists = (unsigned long long *)(shared + TILE_FLOATS(SELECT_RT));
    __shared__ float threshold[PANEL];
    __shared__ int count[PANEL];
    const int64_t panel = blockIdx.x, part = blockIdx.y, shard = part / out.ranges, range = part % out.ranges;
    const int64_t shard_first = shard * c.N / out.shards, shard_rows = (shard + 1) * c.N / out.shards - shard_first;
    const int64_t begin = shard_first + range * shard_rows / out.ranges,
                  end = shard_first + (range + 1) * shard_rows / out.ranges;
    const int tx = tile_x(), ty = tile_y(), keep = (int)out.each, room = keep + SLACK;
    float mean[4] = {0, 0, 0, 0};
    for (int i = threadIdx.x; i < PANEL; i += TILE_THREADS) {
        const int64_t code = panel * PANEL + i % 4 * 16 + i / 4; /* at position i */
        threshold[i] = code < c.M ? -INFINITY : INFINITY;
        count[i] = 0;
    }
    for (int64_t first = begin; first < end; first += SELECT_ROWS) {
        float start[SELECT_RT], s[SELECT_RT][4];
#pragma unroll
        for (int i = 0; i < SELECT_RT; i++) start[i] = first + ty + 16 * i < end ? out.start[first + ty + 16 * i] : 0;
        tile_logits<SELECT_RT>(c, s, start, first, panel, true, first == begin, shared);
        const float4 least = *(const float4 *)(threshold + 4 * tx);
#pragma unroll
        for (int i = 0; i < SELECT_RT; i++) {
            const int64_t row = first + ty + 16 * i;
            if (row >= end) continue;
            const float factor = out.factor[row], offset = out.offset[row], inverse = out.mean ? out.inverse[row] : 0;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float power = 0;
                if (out.mean || c.regularizer == VX_REG_KNN_L2) power = vx_fast_exp2(s[i][j]);
                mean[j] += power * inverse;
                if (!out.lists) continue;
                const float key = (c.regularizer == VX_REG_KNN_L2 ? power : s[i][j]) * factor + offset;
                if (key > (j == 0 ? least.x : j == 1 ? least.y : j == 2 ? least.z : least.w))
                    lists[(4 * tx + j) * room + atomicAdd(&count[4 * tx + j], 1)] = neighbour_pack(key, row);
            }
        }
        if (out.lists) {
            /* a list that has no room for a whole tile is cut back; most tiles find none */
            __syncthreads();
            const int crowded = threadIdx.x < PANEL && count[threadIdx.x] > keep + SLACK - SELECT_ROWS;
            if (__syncthreads_or(crowded)) cut_lists(lists, count, threshold, keep, keep + SLACK - SELECT_ROWS);
        }
    }
    __syncthreads();
    if (out.lists) {
        cut_lists(lists, count, threshold, keep, -1);
        __syncthreads();
        for (int i = threadIdx.x; i < PANEL * keep; i += TILE_THREADS) {
            const int at = i / keep, k = i % keep;
            const int64_t code = panel * PANEL + at % 4 * 16 + at / 4;
            out.lists[(part * c.panels * PANEL + code) * keep + k] = k < count[at] ? lists[at * room + k] : 0;
        }
    }
    if (out.mean) {
#pragma unroll
        for (int j = 0; j < 4; j++) shared[ty * PANEL + 4 * tx + j] = mean[j];
        __syncthreads();
        for (int i = threadIdx.x; i < PANEL; i += TILE_THREADS) {
            float total = 0;
            for (int t = 0; t < 16; t++) total += shared[t * PANEL + i];
            out.mean[part * c.panels * PANEL + panel * PANEL + i % 4 * 16 + i / 4] = total;
        }
    }
}

/* -- Pass 2 on tensor cores: a warp owns 16 codes ------------------------------------------------------------------ */

enum { SELECT_THREADS = 128 };

template <int KT> static size_t columns_tensor_shared(void)
{
    return sizeof(float) * (size_t)(3 * PANEL * ITEM_PITCH(KT) + 6 * SELECT_ROWS);
}

/* As columns_kernel. Codes stay, rows pass by, 64 at a time. */
template <int KT>
VX_KERNEL VX_HOT __launch_bounds__(SELECT_THREADS) columns_tensor_kernel(smooth_call c, columns_out out)
{
    float *codes = (float *)vx_shared, *rows = codes + PANEL * ITEM_PITCH(KT),
          *numbers = rows + 2 * PANEL * ITEM_PITCH(KT);
    unsigned long long *lists = (unsigned long long *)(numbers + 6 * SELECT_ROWS);
    __shared__ float threshold[PANEL];
    __shared__ int count[PANEL];
    const int64_t panel = blockIdx.x, part = blockIdx.y, shard = part / out.ranges, range = part % out.ranges;
    const int64_t shard_first = shard * c.N / out.shards, shard_rows = (shard + 1) * c.N / out.shards - shard_first;
    const int64_t begin = shard_first + range * shard_rows / out.ranges,
                  end = shard_first + (range + 1) * shard_rows / out.ranges;
    const int lane = threadIdx.x % 32, q = lane % 4,
              mine = threadIdx.x / 32 * 16 + lane / 4; /* positions of codes: mine, mine + 8 */
    const int keep = (int)out.each, room = keep + SLACK;
    const bool l2 = c.regularizer == VX_REG_KNN_L2, powers = out.mean || l2;
    float mean[2] = {0, 0};
    for (int i = threadIdx.x; i < PANEL; i += SELECT_THREADS) {
        threshold[i] = panel * PANEL + tensor_code(i) < c.M ? -INFINITY : INFINITY;
        count[i] = 0;
    }
    load_items<KT>(codes, c.row, panel * PANEL, c.panels * PANEL, PANEL, threadIdx.x, SELECT_THREADS);
    load_items<KT>(rows, c.rows, begin, end, SELECT_ROWS, threadIdx.x, SELECT_THREADS);
    vx_copy_commit();
    for (int64_t first = begin, step = 0; first < end; first += SELECT_ROWS, step++) {
        float *here = rows + step % 2 * PANEL * ITEM_PITCH(KT), *next = rows + (step + 1) % 2 * PANEL * ITEM_PITCH(KT),
              s[8][4];
        float *number = numbers + step % 2 * 3 * SELECT_ROWS;
        if (first + SELECT_ROWS < end)
            load_items<KT>(next, c.rows, first + SELECT_ROWS, end, SELECT_ROWS, threadIdx.x, SELECT_THREADS);
        vx_copy_commit();
        for (int i = threadIdx.x; i < SELECT_ROWS; i += SELECT_THREADS) {
            const bool there = first + i < end;
            number[i] = there ? out.start[first + i] : 0;
            number[SELECT_ROWS + i] = there ? out.factor[first + i] : 0;
            number[2 * SELECT_ROWS + i] = there ? out.offset[first + i] : -INFINITY; /* passes no threshold */
        }
        vx_copy_wait(1);
        __syncthreads();
#pragma unroll
        for (int t = 0; t < 8; t++)
            s[t][0] = s[t][2] = number[8 * t + 2 * q], s[t][1] = s[t][3] = number[8 * t + 2 * q + 1];
        tensor_product<KT>(s, codes + threadIdx.x / 32 * 16 * ITEM_PITCH(KT), here);
        const float least[2] = {threshold[mine], threshold[mine + 8]};
#pragma unroll
        for (int t = 0; t < 8; t++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int at = 8 * t + 2 * q + e;
                const float factor = number[SELECT_ROWS + at], offset = number[2 * SELECT_ROWS + at];
                const float inverse = out.mean && first + at < end ? out.inverse[first + at] : 0;
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    float x = s[t][2 * i + e];
                    const float power = powers ? vx_fast_exp2(x) : 0;
                    mean[i] += power * inverse;
                    if (l2) x = power;
                    const float key = x * factor + offset;
                    if (out.lists && key > least[i])
                        lists[(mine + 8 * i) * room + atomicAdd(&count[mine + 8 * i], 1)] =
                            neighbour_pack(key, first + at);
                }
            }
        if (out.lists) {
            __syncthreads();
            const int crowded = threadIdx.x < PANEL && count[threadIdx.x] > keep + SLACK - SELECT_ROWS;
            if (__syncthreads_or(crowded)) cut_lists(lists, count, threshold, keep, keep + SLACK - SELECT_ROWS);
        }
        __syncthreads(); /* rows may be overwritten */
    }
    vx_copy_wait(0);
    if (out.lists) {
        cut_lists(lists, count, threshold, keep, -1);
        __syncthreads();
        for (int i = threadIdx.x; i < PANEL * keep; i += SELECT_THREADS) {
            const int at = i / keep, k = i % keep;
            const int64_t code = panel * PANEL + tensor_code(at);
            out.lists[(part * c.panels * PANEL + code) * keep + k] = k < count[at] ? lists[at * room + k] : 0;
        }
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const float total = quad_sum(mean[i]);
        if (out.mean && q == 0) out.mean[part * c.panels * PANEL + panel * PANEL + tensor_code(mine + 8 * i)] = total;
    }
}

/* -- Results ------------------------------------------------------------------------------------------------------- */

/* A warp for each vertex and shard: the each largest of the ranges' lists into near (S,K) of the group, and their
 * divergences' sum. */
VX_KERNEL merge_kernel(int32_t *near, double *loss, const unsigned long long *lists, int64_t S, int64_t K,
                       int64_t padded, int64_t each, int64_t ranges, int64_t shards, int l2)
{
    const int lane = threadIdx.x % 32;
    for (int64_t at = vx_first() / 32; at < S * shards; at += vx_step() / 32) {
        const int64_t s = at % S, shard = at / S, entries = ranges * each;
        double sum = 0;
        for (int64_t i = lane; i < entries; i += 32) {
            const unsigned long long mine = lists[((shard * ranges + i / each) * padded + s) * each + i % each];
            int64_t place = 0;
            for (int64_t range = 0; range < ranges; range++) { /* lists are sorted: count the larger ones of each */
                const unsigned long long *list = lists + ((shard * ranges + range) * padded + s) * each;
                int64_t low = 0, high = each;
                while (low < high) {
                    const int64_t middle = (low + high) / 2;
                    if (list[middle] > mine) low = middle + 1;
                    else high = middle;
                }
                place += low;
            }
            if (place >= each || !mine) continue; /* an empty entry is 0 */
            near[s * K + shard * each + place] = neighbour_row(mine);
            const double key = neighbour_key(mine);
            sum += l2 ? 1 - key : -LN2 * key;
        }
        sum = vx_warp_sum(sum);
        if (lane == 0) loss[at] = sum;
    }
}

/* mean_pi (M) of the group from the parts, and each code's part of the entropy. */
VX_KERNEL mean_pi_kernel(float *mean_pi, double *entropy, const float *mean, int64_t M, int64_t padded, int64_t parts,
                         double N)
{
    for (int64_t m = vx_first(); m < M; m += vx_step()) {
        double sum = 0;
        for (int64_t p = 0; p < parts; p++) sum += mean[p * padded + m];
        sum /= N;
        mean_pi[m] = (float)sum;
        entropy[m] = sum > 0 ? -sum * log(sum) : 0;
    }
}

enum { TOTAL_BLOCK = 1024 };

/* One block: total += sum of x (n); under `ppl`, of 1 - exp(that) / n. */
VX_KERNEL total_kernel(double *total, const double *x, int64_t n, double factor, int ppl, int fresh)
{
    __shared__ double shared[32];
    double sum = 0;
    for (int64_t i = threadIdx.x; i < n; i += TOTAL_BLOCK) sum += x[i];
    sum = vx_block_sum(sum, shared);
    if (threadIdx.x == 0) *total = (fresh ? 0 : *total) + (ppl ? 1 - exp(sum) / (double)n : sum * factor);
}

VX_KERNEL forward_scalars_kernel(float *reg, float *max_p, const double *total, double groups, double rows,
                                 int regularized)
{
    *reg = regularized ? (float)(total[0] / groups) : 0;
    *max_p = (float)(total[1] / rows);
}

#define LAUNCH_FORWARD(RT, NS, DT, slices)                                                                             \
    VX_LAUNCH((forward_kernel<RT, NS, DT>), dim3((unsigned)vx_ceil_div(c.N, 16 * RT), (unsigned)(slices)),             \
              TILE_THREADS, (forward_shared<RT, NS, DT>()), c, out)
#define LAUNCH_FORWARD_NOISE(KT, NOISY)                                                                                \
    VX_LAUNCH((forward_tensor_kernel<KT, NOISY>), (unsigned)vx_ceil_div(c.N, TENSOR_ROWS), TILE_THREADS,               \
              forward_tensor_shared<KT>(), c, out)
#define LAUNCH_FORWARD_TENSOR(KT)                                                                                      \
    do {                                                                                                               \
        if (c.noise_kind == NOISE_NONE) LAUNCH_FORWARD_NOISE(KT, false);                                               \
        else LAUNCH_FORWARD_NOISE(KT, true);                                                                           \
    } while (0)
#define LAUNCH_COLUMNS_TENSOR(KT)                                                                                      \
    VX_LAUNCH((columns_tensor_kernel<KT>), grid, SELECT_THREADS, columns_tensor_shared<KT>() + lists, c, columns)

/* Pass 2 over the columns of c, of which there are parts (shards times ranges). */
static void walk_columns(const smooth_call &c, const columns_out &columns, int64_t parts)
{
    const dim3 grid((unsigned)c.panels, (unsigned)parts);
    const size_t lists = columns.lists ? (size_t)(PANEL * (columns.each + SLACK)) * 8 : 0;
    if (!c.tensor)
        VX_LAUNCH(columns_kernel, grid, TILE_THREADS, sizeof(float) * (size_t)TILE_FLOATS(SELECT_RT) + lists, c,
                  columns);
    else if (c.depth == 16) LAUNCH_COLUMNS_TENSOR(2);
    else if (c.depth == 32) LAUNCH_COLUMNS_TENSOR(4);
    else LAUNCH_COLUMNS_TENSOR(8);
}

int vx_cuda_smooth_forward(vx_tensor *y, vx_tensor *codes, vx_tensor *lse, vx_tensor *sumsq, vx_tensor *soft,
                           vx_tensor *near, vx_tensor *mean_pi, vx_tensor *reg, vx_tensor *max_p, vx_tensor *z,
                           vx_tensor *codebook, vx_tensor *log_tau, vx_tensor *noise, vx_tensor *vertices, int sampler,
                           int regularizer, float gumbel_tau, int shards, int precision, uint64_t seed, uint64_t stream)
{
    (void)precision; /* bf16 asks for less than the float32 that there is */
    if (check_smooth(z, codebook, vertices, near, mean_pi, regularizer, shards)) return VX_EINVAL;
    smooth_call c = call_of(z, codebook, noise, sampler, regularizer, gumbel_tau);
    const vx_random random = vx_draws(seed, stream);
    const bool knn = regularizer == VX_REG_KNN_CE || regularizer == VX_REG_KNN_L2, l2 = regularizer == VX_REG_KNN_L2;
    const int64_t S = knn ? near->shape[1] : 0, K = knn ? near->shape[2] : 0, each = knn ? K / shards : 0,
                  shard_count = knn ? shards : 1;
    const int64_t padded = c.panels * PANEL, vertex_panels = vx_ceil_div(S, PANEL),
                  vertex_padded = vertex_panels * PANEL;
    const int64_t row_blocks = vx_ceil_div(c.N, c.tensor ? TENSOR_ROWS : 64);
    if (each > 64)
        return vx_fail(VX_EINVAL, "smooth: K = %lld neighbours of a shard, of at most 64 on this device",
                       (long long)each);
    /* one walk over the columns serves neighbours and means where they are the same columns */
    const bool together = knn && mean_pi && !vertices;
    const int64_t select_ranges = knn ? cut_ranges(c.N / shards, vertex_panels, shards * vertex_padded * each * 8) : 1;
    const int64_t mean_ranges = cut_ranges(c.N, c.panels, padded * 4),
                  mean_parts = together ? shards * select_ranges : mean_ranges;

    vx_draw *draw = VX_SCRATCH(vx_draw, 1);
    float *scale = VX_SCRATCH(float, 2), *start = VX_SCRATCH(float, c.N), *norms = VX_SCRATCH(float, c.N);
    float *rows = VX_SCRATCH(float, c.N *c.depth), *panel = VX_SCRATCH(float, padded *c.depth);
    float *row = c.tensor ? VX_SCRATCH(float, padded *c.depth) : NULL, *raw_row = VX_SCRATCH(float, padded *c.depth);
    float *noisy_reference = c.noise_kind == NOISE_LOGS ? VX_SCRATCH(float, c.N) : NULL;
    float *vertex_codes = vertices && knn ? VX_SCRATCH(float, vertex_padded *c.depth) : NULL;
    forward_out out = {};
    out.start = start, out.noisy_reference = noisy_reference, out.inverse = VX_SCRATCH(float, c.N),
    out.factor = VX_SCRATCH(float, c.N);
    out.offset = VX_SCRATCH(float, c.N), out.max_p = VX_SCRATCH(double, row_blocks), out.codebook = vx_f32(codebook);
    out.y = vx_f32(y), out.lse = vx_f32(lse), out.sumsq = vx_f32(sumsq), out.soft = vx_f32(soft),
    out.codes = vx_i32(codes);
    columns_out columns = {};
    columns.start = start, columns.inverse = out.inverse, columns.factor = out.factor, columns.offset = out.offset;
    unsigned long long *lists = knn ? VX_SCRATCH(unsigned long long, shards *select_ranges *vertex_padded *each) : NULL;
    double *loss = knn ? VX_SCRATCH(double, S *shards) : NULL, *entropy = mean_pi ? VX_SCRATCH(double, c.M) : NULL;
    float *mean = mean_pi ? VX_SCRATCH(float, mean_parts *padded) : NULL;
    double *total = VX_SCRATCH(double, 2);
    const smooth_checks check = checks_of(&c);

    VX_LAUNCH(tau_kernel, 1, 1, 0, scale, draw, vx_f32(log_tau), random, check.tau);
    if (c.noise)
        VX_LAUNCH(noise_check_kernel, vx_grid(c.N * c.G * c.M, 256), 256, 0, c.noise, c.N * c.G, c.M, check.noise);
    c.draw = draw, c.scale = scale, c.rows = rows, c.norms = norms, c.panel = panel, c.row = row, c.raw_row = raw_row;
    for (c.g = 0; c.g < c.G; c.g++) {
        code_layout to = {};
        to.panel = panel, to.row = row, to.raw_row = raw_row, to.tensor = c.tensor, to.count = c.M;
        VX_LAUNCH(rows_kernel, vx_grid(c.N * 32, 256), 256, 0, rows, norms, vx_f32(z), scale, 1, c.N, c.G, c.g, c.D,
                  c.depth, check.row);
        VX_LAUNCH(codes_kernel, vx_grid(padded * 32, 256), 256, 0, to, vx_f32(codebook), c.M, c.g, c.D, c.depth,
                  check.code, check.vertex);
        scan(&c, SCAN_START, start, NULL, NULL);
        if (noisy_reference) scan(&c, SCAN_NOISY, noisy_reference, start, NULL);
        if (c.depth == 4) LAUNCH_FORWARD(4, 0, 4, 1);
        else if (c.depth == 8) LAUNCH_FORWARD(4, 0, 8, 1);
        else if (c.depth == 16) LAUNCH_FORWARD_TENSOR(2);
        else if (c.depth == 32) LAUNCH_FORWARD_TENSOR(4);
        else if (c.depth == 64) LAUNCH_FORWARD_TENSOR(8);
        else LAUNCH_FORWARD(4, 4, 0, vx_ceil_div(c.depth, 256));
        VX_LAUNCH(total_kernel, 1, TOTAL_BLOCK, 0, total + 1, out.max_p, row_blocks, 1.0, 0, c.g == 0);

        if (knn) {
            smooth_call v = c;
            if (vertices) {
                code_layout chosen = {};
                *(c.tensor ? &chosen.row : &chosen.panel) = vertex_codes;
                chosen.tensor = c.tensor, chosen.which = vx_i32(vertices) + c.g * S, chosen.count = S;
                VX_LAUNCH(codes_kernel, vx_grid(vertex_padded * 32, 256), 256, 0, chosen, vx_f32(codebook), c.M, c.g,
                          c.D, c.depth, check.code, check.vertex);
                v.panel = v.row = vertex_codes, v.M = S, v.panels = vertex_panels;
            }
            columns.each = each, columns.ranges = select_ranges, columns.shards = shards, columns.lists = lists;
            columns.mean = together ? mean : NULL;
            walk_columns(v, columns, shards * select_ranges);
            VX_LAUNCH(merge_kernel, vx_grid(S * shards * 32, 256), 256, 0, vx_i32(near) + c.g * S * K, loss, lists, S,
                      K, vertex_padded, each, select_ranges, shard_count, l2);
            VX_LAUNCH(total_kernel, 1, TOTAL_BLOCK, 0, total, loss, S * shards, 1 / (double)(S * K), 0, c.g == 0);
        }
        if (mean_pi) {
            if (!together) {
                columns.each = 0, columns.ranges = mean_ranges, columns.shards = 1, columns.lists = NULL,
                columns.mean = mean;
                walk_columns(c, columns, mean_ranges);
            }
            VX_LAUNCH(mean_pi_kernel, vx_grid(c.M, 256), 256, 0, vx_f32(mean_pi) + c.g * c.M, entropy, mean, c.M,
                      padded, mean_parts, (double)c.N);
            if (regularizer == VX_REG_PPL)
                VX_LAUNCH(total_kernel, 1, TOTAL_BLOCK, 0, total, entropy, c.M, 1.0, 1, c.g == 0);
        }
    }
    VX_LAUNCH(forward_scalars_kernel, 1, 1, 0, vx_f32(reg), vx_f32(max_p), total, (double)c.G, (double)(c.N * c.G),
              regularizer != VX_REG_NONE);
    return vx_status();
}
