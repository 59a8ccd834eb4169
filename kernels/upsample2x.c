/* upsample2x.c: nearest-neighbour enlargement by 2: each pixel becomes four equal ones. The gradient adds the four.
 *
 * Memory traffic: input and output once; both directions are bound by it.
 */
#include "cpu/cpu.h"
#include "cpu/simd.h"

#define SERIAL 20000 /* below this many outputs a second thread costs more than it brings */

/* Copies each pixel of x (B,H,W,C) to four of y (B,2H,2W,C). */
int VX_CPU(upsample2x)(vx_tensor *y, vx_tensor *x)
{
    const int64_t rows = x->shape[0] * x->shape[1], W = x->shape[2], C = x->shape[3];
    const int stream = vf_streams(vx_f32(y), y->numel, C);
#pragma omp parallel for schedule(static) if (4 * rows * W * C > SERIAL)
    for (int64_t r = 0; r < rows; r++) {
        const float *from = vx_f32(x) + r * W * C;
        float *to = vx_f32(y) + 4 * r * W * C;
        for (int64_t w = 0; w < W; w++, from += C, to += 2 * C) {
            int64_t c = 0;
            for (; c + VX_LANES <= C; c += VX_LANES) {
                const vf v = vf_load(from + c);
                float *corner[4] = {to + c, to + C + c, to + 2 * W * C + c, to + (2 * W + 1) * C + c};
                for (int i = 0; i < 4; i++) {
                    if (stream) vf_stream(corner[i], v);
                    else vf_store(corner[i], v);
                }
            }
            for (; c < C; c++) to[c] = to[C + c] = to[2 * W * C + c] = to[(2 * W + 1) * C + c] = from[c];
        }
        if (stream) vf_stream_end();
    }
    return VX_OK;
}

/* Adds the four pixels of dy (B,2H,2W,C) over each of dx (B,H,W,C). */
int VX_CPU(upsample2x_backward)(vx_tensor *dx, vx_tensor *dy)
{
    const int64_t rows = dx->shape[0] * dx->shape[1], W = dx->shape[2], C = dx->shape[3];
#pragma omp parallel for schedule(static) if (4 * rows * W * C > SERIAL)
    for (int64_t r = 0; r < rows; r++) {
        float *to = vx_f32(dx) + r * W * C;
        const float *a = vx_f32(dy) + 4 * r * W * C, *b = a + 2 * W * C;
        for (int64_t w = 0; w < W; w++, to += C, a += 2 * C, b += 2 * C) {
            int64_t c = 0;
            for (; c + VX_LANES <= C; c += VX_LANES)
                vf_store(to + c, (vf_load(a + c) + vf_load(a + C + c)) + (vf_load(b + c) + vf_load(b + C + c)));
            for (; c < C; c++) to[c] = (a[c] + a[C + c]) + (b[c] + b[C + c]);
        }
    }
    return VX_OK;
}
