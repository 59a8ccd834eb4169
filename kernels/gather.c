/* gather.c: gather, scatter_add, count_codes: rows of a table by index.
 *
 * Memory traffic: gather reads and writes N D floats once; scatter_add reads N D floats, and the table once each way.
 * Indices are checked before anything is written.
 *
 * scatter_add in parallel without atomics: a stable counting sort of the row numbers by index gives each table row the
 * list of its own rows in ascending order. Table rows are then independent of each other, and each is summed in the
 * order a plain loop over n would use: the bits are those of that loop, with any number of threads.
 */
#include "cpu/cpu.h"
#include "cpu/simd.h"

#define SERIAL 16384 /* below this many elements a second thread costs more than it brings */

/* VX_EINVAL, naming the first offender, unless all n indices lie in 0 .. rows-1. per_row: indices a row. */
static int check_indices(const char *op, const int32_t *index, int64_t n, int64_t per_row, int64_t rows)
{
    uint32_t limit = (uint32_t)vx_min64(rows, (int64_t)INT32_MAX + 1), bad = 0;
    for (int64_t i = 0; i < n; i++) bad |= (uint32_t)index[i] >= limit; /* a negative one is a large one */
    if (!bad) return VX_OK;
    int64_t i = 0;
    while ((uint32_t)index[i] < limit) i++;
    if (per_row > 1)
        return vx_fail(VX_EINVAL, "%s: index %d at row %lld, column %lld is outside 0 .. %lld", op, (int)index[i],
                       (long long)(i / per_row), (long long)(i % per_row), (long long)rows - 1);
    return vx_fail(VX_EINVAL, "%s: index %d at row %lld is outside 0 .. %lld", op, (int)index[i], (long long)i,
                   (long long)rows - 1);
}

/* y[n] = table[index[n]] */
int VX_CPU(gather)(vx_tensor *y, vx_tensor *table, vx_tensor *index)
{
    int64_t n = y->shape[0], width = y->shape[1];
    const int32_t *at = vx_i32(index);
    const float *from = vx_f32(table);
    float *to = vx_f32(y);
    int status = check_indices("gather", at, n, 1, table->shape[0]);
    if (status) return status;
#pragma omp parallel for schedule(static) if (n * width >= SERIAL)
    for (int64_t i = 0; i < n; i++) memcpy(to + i * width, from + at[i] * width, sizeof(float) * (size_t)width);
    return VX_OK;
}

/* sum += rows x[order[0]], x[order[1]], ... of `width` floats. Columns in panels that stay in registers. */
static void add_rows(float *sum, const float *x, const int64_t *order, int64_t count, int64_t width)
{
    int64_t c = 0;
    for (; c + 4 * VX_LANES <= width; c += 4 * VX_LANES) {
        vf s[4];
        for (int k = 0; k < 4; k++) s[k] = vf_load(sum + c + k * VX_LANES);
        for (int64_t i = 0; i < count; i++) {
            const float *row = x + order[i] * width + c;
            for (int k = 0; k < 4; k++) s[k] += vf_load(row + k * VX_LANES);
        }
        for (int k = 0; k < 4; k++) vf_store(sum + c + k * VX_LANES, s[k]);
    }
    for (; c < width; c += VX_LANES) {
        int n = (int)vx_min64(VX_LANES, width - c);
        vf s = vf_load_n(sum + c, n);
        for (int64_t i = 0; i < count; i++) s += vf_load_n(x + order[i] * width + c, n);
        vf_store_n(sum + c, s, n);
    }
}

/* table[index[n]] += x[n]. Working space: 8 (N + M) bytes, none for small inputs. */
int VX_CPU(scatter_add)(vx_tensor *table, vx_tensor *x, vx_tensor *index)
{
    int64_t n = x->shape[0], width = x->shape[1], rows = table->shape[0];
    const int32_t *at = vx_i32(index);
    const float *from = vx_f32(x);
    float *to = vx_f32(table);
    int status = check_indices("scatter_add", at, n, 1, rows);
    if (status) return status;
    if (n * width < SERIAL) {
        for (int64_t i = 0; i < n; i++)
            for (int64_t c = 0; c < width; c++) to[at[i] * width + c] += from[i * width + c];
        return VX_OK;
    }

    int64_t *order = vx_scratch("scatter_add", sizeof(int64_t) * (size_t)(n + rows + 1));
    if (!order) return VX_ENOMEM;
    int64_t *end =
        order + n; /* one more than rows: end[m] is where the list of table row m ends, end[m - 1] where it begins */
    memset(end, 0, sizeof(int64_t) * (size_t)(rows + 1));
    for (int64_t i = 0; i < n; i++) end[at[i] + 1]++;
    for (int64_t m = 0; m < rows; m++) end[m + 1] += end[m];
    for (int64_t i = 0; i < n; i++) order[end[at[i]]++] = i;

        /* lists differ in length, so rows are handed out as threads come free; who sums a row does not change its
         * sum */
#pragma omp parallel for schedule(dynamic, 16)
    for (int64_t m = 0; m < rows; m++) {
        int64_t begin = m ? end[m - 1] : 0;
        if (end[m] > begin) add_rows(to + m * width, from, order + begin, end[m] - begin, width);
    }
    vx_scratch_free(order);
    return VX_OK;
}

/* count[g][codes[n][g]] += 1 */
int VX_CPU(count_codes)(vx_tensor *count, vx_tensor *codes)
{
    int64_t n = codes->shape[0], groups = codes->shape[1], size = count->shape[1];
    const int32_t *code = vx_i32(codes);
    int32_t *sum = vx_i32(count);
    int status = check_indices("count_codes", code, n * groups, groups, size);
    if (status) return status;
#pragma omp parallel for schedule(static) if (n * groups >= SERIAL)
    for (int64_t g = 0; g < groups; g++)
        for (int64_t i = 0; i < n; i++) sum[g * size + code[i * groups + g]]++;
    return VX_OK;
}
