/* gather.cu: gather and scatter_add on CUDA. An index outside its range is reported late; meanwhile gather writes NaN
 * into that row, and scatter_add leaves it out.
 *
 * Memory traffic: gather reads and writes N D floats once. scatter_add sorts the row numbers by index (sort.cuh) and
 * reads N D floats.
 */
#include "cuda/sort.cuh"

enum { BLOCK = 256 };

/* Gathers rows; a thread takes a T, a float or four. width: T's a row. */
template <class T>
VX_KERNEL gather_kernel(T *y, const T *table, const int32_t *index, int64_t n, int64_t width, int64_t rows, T nan,
                        vx_data_check outside)
{
    for (int64_t i = vx_first(); i < n * width; i += vx_step()) {
        const int64_t row = i / width, column = i - row * width;
        const int32_t at = index[row];
        const bool good = at >= 0 && at < rows;
        y[i] = good ? table[at * width + column] : nan;
        if (!good && column == 0) vx_report(outside, row);
    }
}

/* Copies y[n] = table[index[n]]. */
int vx_cuda_gather(vx_tensor *y, vx_tensor *table, vx_tensor *index)
{
    const int64_t n = y->shape[0], width = y->shape[1], rows = table->shape[0];
    if (!y->numel) return VX_OK;
    const vx_data_check outside =
        vx_data_check_of(VX_EINVAL, 1, "the index at row %%lld is outside 0 .. %lld", (long long)rows - 1);
    if (width % 4 == 0 && vx_aligned(y, 16) && vx_aligned(table, 16))
        VX_LAUNCH(gather_kernel<float4>, vx_grid(n * width / 4, BLOCK), BLOCK, 0, (float4 *)y->data,
                  (const float4 *)table->data, vx_i32(index), n, width / 4, rows, make_float4(NAN, NAN, NAN, NAN),
                  outside);
    else
        VX_LAUNCH(gather_kernel<float>, vx_grid(n * width, BLOCK), BLOCK, 0, vx_f32(y), vx_f32(table), vx_i32(index), n,
                  width, rows, NAN, outside);
    return vx_status();
}

struct row_of {
    const float *x;
    int64_t width;
    VX_INSIDE float operator()(uint32_t, uint32_t row, int64_t d) const { return x[row * width + d]; }
};

/* Adds table[index[n]] += x[n], the sum over n first (sort.cuh has its order). Working space: 16 bytes a row of x, and
 * a 32nd of x. */
int vx_cuda_scatter_add(vx_tensor *table, vx_tensor *x, vx_tensor *index)
{
    const int64_t n = x->shape[0], width = x->shape[1], rows = table->shape[0];
    if (!n) return VX_OK;
    const vx_data_check outside =
        vx_data_check_of(VX_EINVAL, 1, "the index at row %%lld is outside 0 .. %lld", (long long)rows - 1);
    vx_sort s = vx_sort_of(n, vx_sort_bits(rows + 1));
    float *partial = VX_SCRATCH(float, vx_pieces_partial(n, width));
    vx_sort_keys(&s, vx_i32(index), rows, outside);
    vx_sort_run(&s);
    vx_sum_pieces(vx_pieces{s.entries, n, rows, width, vx_f32(table), partial}, row_of{vx_f32(x), width});
    return vx_status();
}
