/* gather_along.cu: gather_along, scatter_add_along on CUDA; what they compute is said in gather_along.c. An index
 * outside its range is reported late; meanwhile gather_along writes NaN there, and scatter_add_along leaves that term
 * out.
 *
 * scatter_add_along needs no atomics: a thread has a column (b, c) and adds its T terms in ascending order. That is
 * quick where there are many columns, and slow where one long column is all there is; scatter_add is the op for that.
 */
#include "cuda/cuda.cuh"

enum { BLOCK = 256 };

VX_KERNEL gather_along_kernel(float *y, const float *x, const int32_t *index, int64_t count, int64_t S, int64_t T,
                              int64_t C, vx_data_check outside)
{
    for (int64_t i = vx_first(); i < count; i += vx_step()) {
        const int32_t at = index[i];
        const bool good = at >= 0 && at < S;
        y[i] = good ? x[(i / (T * C) * S + at) * C + i % C] : NAN;
        if (!good) vx_report(outside, i);
    }
}

VX_KERNEL scatter_add_along_kernel(float *y, const float *x, const int32_t *index, int64_t columns, int64_t S,
                                   int64_t T, int64_t C, vx_data_check outside)
{
    for (int64_t i = vx_first(); i < columns; i += vx_step()) {
        const int64_t b = i / C, c = i % C;
        for (int64_t t = 0; t < T; t++) {
            const int64_t here = (b * T + t) * C + c;
            const int32_t at = index[here];
            if (at >= 0 && at < S) y[(b * S + at) * C + c] += x[here];
            else vx_report(outside, here);
        }
    }
}

static vx_data_check outside_of(int64_t S, int64_t C)
{
    const long long most = S - 1;
    return C == 1 ? vx_data_check_of(VX_EINVAL, 1, "the index at row %%lld is outside 0 .. %lld", most)
                  : vx_data_check_of(VX_EINVAL, C, "the index at row %%lld, column %%lld is outside 0 .. %lld", most);
}

/* y[b][t][c] = x[b][index[b][t][c]][c] */
int vx_cuda_gather_along(vx_tensor *y, vx_tensor *x, vx_tensor *index)
{
    const int64_t S = x->shape[1], T = y->shape[1], C = x->shape[2];
    if (!y->numel) return VX_OK;
    VX_LAUNCH(gather_along_kernel, vx_grid(y->numel, BLOCK), BLOCK, 0, vx_f32(y), vx_f32(x), vx_i32(index), y->numel, S,
              T, C, outside_of(S, C));
    return vx_status();
}

/* y[b][index[b][t][c]][c] += x[b][t][c] */
int vx_cuda_scatter_add_along(vx_tensor *y, vx_tensor *x, vx_tensor *index)
{
    const int64_t S = y->shape[1], T = x->shape[1], C = x->shape[2], columns = x->shape[0] * C;
    if (!x->numel) return VX_OK;
    VX_LAUNCH(scatter_add_along_kernel, vx_grid(columns, BLOCK), BLOCK, 0, vx_f32(y), vx_f32(x), vx_i32(index), columns,
              S, T, C, outside_of(S, C));
    return vx_status();
}
