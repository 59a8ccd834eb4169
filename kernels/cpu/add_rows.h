/* add_rows.h: the sum of a matrix's rows, which is the gradient of a bias. */
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

#endif
