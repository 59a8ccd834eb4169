/* count_codes.c: how often each code of each group was chosen. Threads share the groups. */
#include "cpu/indices.h"

#define SERIAL 16384 /* below this many codes a second thread costs more than it brings */

/* Adds 1 to count[g][codes[n][g]] for every n and g; a code of -1 counts nowhere. */
int VX_CPU(count_codes)(vx_tensor *count, vx_tensor *codes)
{
    int64_t n = codes->shape[0], groups = codes->shape[1], size = count->shape[1];
    const int32_t *code = vx_i32(codes);
    int32_t *sum = vx_i32(count);
    int status = check_range("count_codes", "code", code, n, groups, -1, size);
    if (status) return status;
#pragma omp parallel for schedule(static) if (n * groups >= SERIAL)
    for (int64_t g = 0; g < groups; g++)
        for (int64_t i = 0; i < n; i++)
            if (code[i * groups + g] >= 0) sum[g * size + code[i * groups + g]]++;
    return VX_OK;
}
