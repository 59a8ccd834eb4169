/* count_codes.cu: how often each code of each group was used, on CUDA. codes is read once. Counts are integers, whose
 * atomics give the same result in every order. A code of -1 counts nowhere; another one
 * outside 0 .. M-1 is reported late besides.
 */
#include "cuda/cuda.cuh"

enum { BLOCK = 256 };

VX_KERNEL count_codes_kernel(int32_t *count, const int32_t *codes, int64_t n, int64_t groups, int64_t size,
                             vx_data_check outside)
{
    for (int64_t i = vx_first(); i < n * groups; i += vx_step()) {
        const int32_t code = codes[i];
        if (code >= 0 && code < size) atomicAdd(&count[i % groups * size + code], 1);
        else if (code != -1) vx_report(outside, i);
    }
}

/* Adds count[g][codes[n][g]] += 1; a code of -1 counts nowhere. */
int vx_cuda_count_codes(vx_tensor *count, vx_tensor *codes)
{
    const int64_t n = codes->shape[0], groups = codes->shape[1], size = count->shape[1];
    if (!codes->numel) return VX_OK;
    const vx_data_check outside = vx_data_check_of(
        VX_EINVAL, groups, "the index at row %%lld, column %%lld is outside 0 .. %lld", (long long)size - 1);
    VX_LAUNCH(count_codes_kernel, vx_grid(n * groups, BLOCK), BLOCK, 0, vx_i32(count), vx_i32(codes), n, groups, size,
              outside);
    return vx_status();
}
