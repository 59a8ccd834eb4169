/* gather.c: gather, scatter_add: rows of a table by index.
 *
 * Memory traffic: gather reads and writes N D floats once; scatter_add reads N D floats, and the table once each way.
 * Indices are checked before anything is written.
 *
 * scatter_add in parallel without atomics: a stable counting sort of the row numbers by index gives each table row the
 * list of its own rows in ascending order. Table rows are then independent of each other, and each is summed in the
 * order a plain loop over n would use: the bits are those of that loop, with any number of threads.
 */
#include "cpu/indices.h"
#include "cpu/scratch.h"
#include "cpu/simd.h"

#define SERIAL 16384 /* below this many elements a second thread costs more than it brings */

/* Copies y[n] = table[index[n]]. */
int VX_CPU(gather)(vx_tensor *y, vx_tensor *table, vx_tensor *index)
{
    int64_t n = y->shape[0], width = y->shape[1];
    const int32_t *at = vx_i32(index);
    const float *from = vx_f32(table);
    float *to = vx_f32(y);
    int status = check_indices("gather", "index", at, n, 1, table->shape[0]);
    if (status) return status;
#pragma omp parallel for schedule(static) if (n * width >= SERIAL)
    for (int64_t i = 0; i < n; i++) memcpy(to + i * width, from + at[i] * width, sizeof(float) * (size_t)width);
    return VX_OK;
}

/* Adds rows x[order[0]], x[order[1]], ... to sum (width). A few columns at a time stay in registers. */
static void add_rows(float *sum, const float *x, const int32_t *order, int64_t count, int64_t width)
{
    int64_t c = 0;
    for (; c + 4 * VX_LANES <= width; c += 4 * VX_LANES) {
        vf s[4];
        for (int k = 0; k < 4; k++) s[k] = vf_load(sum + c + k * VX_LANES);
        for (int64_t i = 0; i < count; i++) {
            const float *row = x + (int64_t)order[i] * width + c;
            for (int k = 0; k < 4; k++) s[k] += vf_load(row + k * VX_LANES);
        }
        for (int k = 0; k < 4; k++) vf_store(sum + c + k * VX_LANES, s[k]);
    }
    for (; c < width; c += VX_LANES) {
        int n = (int)vx_min64(VX_LANES, width - c);
        vf s = vf_load_n(sum + c, n);
        for (int64_t i = 0; i < count; i++) s += vf_load_n(x + (int64_t)order[i] * width + c, n);
        vf_store_n(sum + c, s, n);
    }
}

/* Adds x[n] to table[index[n]]. Working space: 4 (N + M) bytes, none for small inputs. One thread adds more than 2^31 -
 * 1 rows. */
int VX_CPU(scatter_add)(vx_tensor *table, vx_tensor *x, vx_tensor *index)
{
    int64_t n = x->shape[0], width = x->shape[1], rows = table->shape[0];
    const int32_t *at = vx_i32(index);
    const float *from = vx_f32(x);
    float *to = vx_f32(table);
    int status = check_indices("scatter_add", "index", at, n, 1, rows);
    if (status) return status;
    if (n * width < SERIAL || n > INT32_MAX) {
        for (int64_t i = 0; i < n; i++)
            for (int64_t c = 0; c < width; c++) to[at[i] * width + c] += from[i * width + c];
        return VX_OK;
    }

    int32_t *order = 0, *start = 0;
    scratch memory = {.op = "scatter_add"};
    while (scratch_pass(&memory)) {
        order = carve_i32(&memory, n);
        start = carve_i32(&memory, rows + 1);
    }
    if (!memory.base) return VX_ENOMEM;
    counting_sort(at, 1, n, rows, order, start);

    /* Lists differ in length, so rows are handed out as threads come free; who sums a row does not change its sum. */
#pragma omp parallel for schedule(dynamic, 16)
    for (int64_t m = 0; m < rows; m++)
        if (start[m + 1] > start[m]) add_rows(to + m * width, from, order + start[m], start[m + 1] - start[m], width);
    scratch_free(&memory);
    return VX_OK;
}
