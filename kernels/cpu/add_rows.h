/* add_rows.h: sums of a matrix's rows, which are the gradient of a bias. */
#ifndef VX_ADD_ROWS_H
#define VX_ADD_ROWS_H

#include "cpu.h"
#include "simd.h"

/* sum (C) += the rows of x (count,C), in ascending order. */
static inline void add_rows(float *sum, const float *x, int64_t count, int64_t C)
{
    for (int64_t c = 0; c < C; c += 4 * VX_LANES) {
        vf total[4] = {{0}};
        int lanes[4];
        for (int v = 0; v < 4; v++) lanes[v] = (int)vx_max64(vx_min64(C - c - v * VX_LANES, VX_LANES), 0);
        if (lanes[3] == VX_LANES)
            for (int64_t i = 0; i < count; i++)
#pragma GCC unroll 4
                for (int v = 0; v < 4; v++) total[v] += vf_load(x + i * C + c + v * VX_LANES);
        else
            for (int64_t i = 0; i < count; i++)
                for (int v = 0; v < 4 && lanes[v]; v++) total[v] += vf_load_n(x + i * C + c + v * VX_LANES, lanes[v]);
        for (int v = 0; v < 4 && lanes[v]; v++) {
            float *to = sum + c + v * VX_LANES;
            vf_store_n(to, vf_load_n(to, lanes[v]) + total[v], lanes[v]);
        }
    }
}

enum { SUM_ROWS_PARTS = 64 };

/* sum (C) = the rows of x (rows,C), in parts by their number, by all threads. partial: (SUM_ROWS_PARTS,C). */
static inline void sum_rows(float *sum, const float *x, float *partial, int64_t rows, int64_t C)
{
    enum { PART_ROWS = 64, SERIAL_BELOW_FLOATS = 20000 };
    const int64_t parts = vx_max64(vx_min64(rows / PART_ROWS, SUM_ROWS_PARTS), 1);
    memset(partial, 0, sizeof(float) * (size_t)(parts * C));
#pragma omp parallel for schedule(static) if (rows * C > SERIAL_BELOW_FLOATS)
    for (int64_t part = 0; part < parts; part++) {
        const int64_t first = part * rows / parts, end = (part + 1) * rows / parts;
        add_rows(partial + part * C, x + first * C, end - first, C);
    }
    for (int64_t part = 1; part < parts; part++)
        for (int64_t c = 0; c < C; c++) partial[c] += partial[part * C + c];
    memcpy(sum, partial, sizeof(float) * (size_t)C);
}

#endif
