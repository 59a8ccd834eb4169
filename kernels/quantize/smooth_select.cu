/* smooth_select.cu: the second pass of the smoothed quantizer's forward: a block owns a panel of codes, meets a range
 * of rows, and finds the K nearest rows of each code and the sums of pi.
 *
 * Keys that pass a code's threshold (its K-th key so far) are appended to the code's list in shared memory, in any
 * order; a full list is cut back to its K largest. Keys are packed as in neighbours.h, all different, so what remains
 * does not depend on the order of arrival. The lists of ranges are joined at the end.
 */
#include "shared/neighbours.h"
#include "smooth_select.cuh"

constexpr int SLACK = 2 * ROWS, HELD = (MOST_NEIGHBOURS + SLACK) / 32; /* HELD: entries of a full list per lane */

/* Cuts the lists whose count passed `full` back to their `keep` largest, in descending order. A warp takes a list; an
 * entry's place is the number of larger ones. A list has room for keep + SLACK entries. */
VX_DEVICE void cut_lists(unsigned long long *lists, int *count, float *threshold, int keep, int full)
{
    const int lane = threadIdx.x % 32, room = keep + SLACK;
    for (int at = threadIdx.x / 32; at < PANEL; at += blockDim.x / 32) {
        const int n = count[at];
        unsigned long long *list = lists + at * room, mine[HELD];
        if (n <= full) continue; /* the same for the whole warp */
#pragma unroll
        for (int k = 0; k < HELD; k++) mine[k] = lane + 32 * k < n ? list[lane + 32 * k] : 0;
        int place[HELD] = {};
        for (int t = 0; t < n; t++) {
            const unsigned long long other = list[t];
#pragma unroll
            for (int k = 0; k < HELD; k++) place[k] += other > mine[k];
        }
        __syncwarp();
#pragma unroll
        for (int k = 0; k < HELD; k++)
            if (lane + 32 * k < n && place[k] < keep) list[place[k]] = mine[k];
        __syncwarp();
        if (lane == 0) {
            count[at] = n < keep ? n : keep;
            threshold[at] = n < keep ? -INFINITY : neighbour_key(list[keep - 1]);
        }
    }
}

/* Returns where a part's rows begin (next 0) or end (next 1): it is one of the ranges of one of the shards. */
VX_DEVICE int64_t part_start(const group_call &c, const columns_out &out, int64_t part, int next)
{
    const int64_t shard = part / out.ranges, first = shard_start(c.N, out.shards, shard),
                  rows = shard_start(c.N, out.shards, shard + 1) - first;
    return first + (part % out.ranges + next) * rows / out.ranges;
}

/* -- In float32: a thread has 4 rows by 4 codes -------------------------------------------------------------------- */

/* Three blocks a multiprocessor: left alone, the compiler aims at four and spills. */
VX_KERNEL VX_HOT __launch_bounds__(TILE_THREADS, 3) columns_kernel(group_call c, columns_out out)
{
    float *shared = (float *)vx_shared;
    unsigned long long *lists = (unsigned long long *)(shared + TILE_FLOATS(RT));
    __shared__ float threshold[PANEL];
    __shared__ int count[PANEL];
    const int64_t panel = blockIdx.x, part = blockIdx.y, begin = part_start(c, out, part, 0),
                  end = part_start(c, out, part, 1);
    const int tx = tile_x(), ty = tile_y(), keep = (int)out.each, room = keep + SLACK;
    float mean[4] = {0, 0, 0, 0};
    for (int i = threadIdx.x; i < PANEL; i += TILE_THREADS) {
        const int64_t code = panel * PANEL + tile_code(i);
        threshold[i] = code < c.M ? -INFINITY : INFINITY;
        count[i] = 0;
    }
    for (int64_t first = begin; first < end; first += ROWS) {
        float start[RT], s[RT][4];
#pragma unroll
        for (int i = 0; i < RT; i++) start[i] = first + ty + 16 * i < end ? out.start[first + ty + 16 * i] : 0;
        tile_logits(c, s, start, first, panel, true, first == begin, shared);
        const float4 least = *(const float4 *)(threshold + 4 * tx);
#pragma unroll
        for (int i = 0; i < RT; i++) {
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
            const int crowded = threadIdx.x < PANEL && count[threadIdx.x] > keep + SLACK - ROWS;
            if (__syncthreads_or(crowded)) cut_lists(lists, count, threshold, keep, keep + SLACK - ROWS);
        }
    }
    __syncthreads();
    if (out.lists) {
        cut_lists(lists, count, threshold, keep, -1);
        __syncthreads();
        for (int i = threadIdx.x; i < PANEL * keep; i += TILE_THREADS) {
            const int at = i / keep, k = i % keep;
            const int64_t code = panel * PANEL + tile_code(at);
            out.lists[(part * c.Mp + code) * keep + k] = k < count[at] ? lists[at * room + k] : 0;
        }
    }
    if (out.mean) {
#pragma unroll
        for (int j = 0; j < 4; j++) shared[ty * PANEL + 4 * tx + j] = mean[j];
        __syncthreads();
        for (int i = threadIdx.x; i < PANEL; i += TILE_THREADS) {
            float total = 0;
            for (int t = 0; t < 16; t++) total += shared[t * PANEL + i];
            out.mean[part * c.Mp + panel * PANEL + tile_code(i)] = total;
        }
    }
}

/* -- On tensor cores: a warp owns 16 codes ------------------------------------------------------------------------- */

constexpr int SELECT_THREADS = 128;

template <int KT> static size_t columns_mma_shared(void)
{
    return sizeof(float) * (size_t)(3 * PANEL * ITEM_PITCH(KT) + 6 * ROWS);
}

/* Makes what columns_kernel makes: codes stay, rows pass by, 64 at a time. */
template <int KT> VX_KERNEL VX_HOT __launch_bounds__(SELECT_THREADS) columns_mma_kernel(group_call c, columns_out out)
{
    float *codes = (float *)vx_shared, *rows = codes + PANEL * ITEM_PITCH(KT),
          *numbers = rows + 2 * PANEL * ITEM_PITCH(KT);
    unsigned long long *lists = (unsigned long long *)(numbers + 6 * ROWS);
    __shared__ float threshold[PANEL];
    __shared__ int count[PANEL];
    const int64_t panel = blockIdx.x, part = blockIdx.y, begin = part_start(c, out, part, 0),
                  end = part_start(c, out, part, 1);
    const int lane = threadIdx.x % 32, q = lane % 4,
              mine = threadIdx.x / 32 * 16 + lane / 4; /* positions of codes: mine, mine + 8 */
    const int keep = (int)out.each, room = keep + SLACK;
    const bool l2 = c.regularizer == VX_REG_KNN_L2, powers = out.mean || l2;
    float mean[2] = {0, 0};
    for (int i = threadIdx.x; i < PANEL; i += SELECT_THREADS) {
        threshold[i] = panel * PANEL + mma_code(i) < c.M ? -INFINITY : INFINITY;
        count[i] = 0;
    }
    load_items<KT>(codes, c.row, panel * PANEL, c.Mp, PANEL, threadIdx.x, SELECT_THREADS);
    load_items<KT>(rows, c.rows, begin, end, ROWS, threadIdx.x, SELECT_THREADS);
    vx_copy_commit();
    for (int64_t first = begin, step = 0; first < end; first += ROWS, step++) {
        float *here = rows + step % 2 * PANEL * ITEM_PITCH(KT), *next = rows + (step + 1) % 2 * PANEL * ITEM_PITCH(KT),
              s[8][4];
        float *number = numbers + step % 2 * 3 * ROWS;
        if (first + ROWS < end) load_items<KT>(next, c.rows, first + ROWS, end, ROWS, threadIdx.x, SELECT_THREADS);
        vx_copy_commit();
        for (int i = threadIdx.x; i < ROWS; i += SELECT_THREADS) {
            const bool there = first + i < end;
            number[i] = there ? out.start[first + i] : 0;
            number[ROWS + i] = there ? out.factor[first + i] : 0;
            number[2 * ROWS + i] = there ? out.offset[first + i] : -INFINITY; /* passes no threshold */
        }
        vx_copy_wait(1);
        __syncthreads();
#pragma unroll
        for (int t = 0; t < 8; t++)
            s[t][0] = s[t][2] = number[8 * t + 2 * q], s[t][1] = s[t][3] = number[8 * t + 2 * q + 1];
        mma_product<KT>(s, codes + threadIdx.x / 32 * 16 * ITEM_PITCH(KT), here);
        const float least[2] = {threshold[mine], threshold[mine + 8]};
#pragma unroll
        for (int t = 0; t < 8; t++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int at = 8 * t + 2 * q + e;
                const float factor = number[ROWS + at], offset = number[2 * ROWS + at];
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
            const int crowded = threadIdx.x < PANEL && count[threadIdx.x] > keep + SLACK - ROWS;
            if (__syncthreads_or(crowded)) cut_lists(lists, count, threshold, keep, keep + SLACK - ROWS);
        }
        __syncthreads(); /* rows may be overwritten */
    }
    vx_copy_wait(0);
    if (out.lists) {
        cut_lists(lists, count, threshold, keep, -1);
        __syncthreads();
        for (int i = threadIdx.x; i < PANEL * keep; i += SELECT_THREADS) {
            const int at = i / keep, k = i % keep;
            const int64_t code = panel * PANEL + mma_code(at);
            out.lists[(part * c.Mp + code) * keep + k] = k < count[at] ? lists[at * room + k] : 0;
        }
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const float total = quad_sum(mean[i]);
        if (out.mean && q == 0) out.mean[part * c.Mp + panel * PANEL + mma_code(mine + 8 * i)] = total;
    }
}

template <int KT> static void launch_columns_mma(const group_call &v, const columns_out &out, dim3 grid, size_t lists)
{
    VX_LAUNCH((columns_mma_kernel<KT>), grid, SELECT_THREADS, columns_mma_shared<KT>() + lists, v, out);
}

void select_columns(const group_call &v, const columns_out &out)
{
    const dim3 grid((unsigned)v.panels, (unsigned)(out.shards * out.ranges));
    const size_t lists = out.lists ? (size_t)(PANEL * (out.each + SLACK)) * 8 : 0;
    if (v.depth == 16) launch_columns_mma<2>(v, out, grid, lists);
    else if (v.depth == 32) launch_columns_mma<4>(v, out, grid, lists);
    else if (v.depth == 64) launch_columns_mma<8>(v, out, grid, lists);
    else VX_LAUNCH(columns_kernel, grid, TILE_THREADS, sizeof(float) * (size_t)TILE_FLOATS(RT) + lists, v, out);
}

/* -- Joining the ranges -------------------------------------------------------------------------------------------- */

/* Joins each vertex's lists of a shard: the `each` largest entries of its ranges go to near (S,K) of the group, the sum
 * of their divergences to loss (shards,S). A warp for each vertex and shard. */
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

void merge_lists(const group_call &c, const columns_out &out, int32_t *near, double *loss)
{
    VX_LAUNCH(merge_kernel, vx_grid(c.S * c.shards * 32, 256), 256, 0, near, loss, out.lists, c.S, c.K,
              vx_ceil_div(c.S, PANEL) * PANEL, out.each, out.ranges, c.shards, c.regularizer == VX_REG_KNN_L2);
}
