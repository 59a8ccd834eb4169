/* reduce_parts.cuh: long sums on CUDA. Who sums over pixels, rows or elements cuts them into parts by the sizes alone,
 * lets a block write the sum of each part, and has the parts added up here: in ascending order, or by a fixed tree, in
 * float64. So the bits do not depend on the device, and no atomics are needed.
 */
#ifndef VX_REDUCE_PARTS_CUH
#define VX_REDUCE_PARTS_CUH

#include "cuda.cuh"

/* Adds up parts: sum[i] = the sum over p < parts, in ascending order, of partial[p pitch + i]; i < count. */
void vx_add_parts(float *sum, const float *partial, int64_t count, int64_t parts, int64_t pitch);

/* Adds up parts as a tree: *y = factor / divisor times the sum of partial (parts). */
void vx_add_blocks(float *y, const double *partial, int64_t parts, double factor, double divisor);

/* Adds up the rows of x, f32 or bf16, read as (rows,C): sum (C). Takes its scratch. */
void vx_add_rows(float *sum, const vx_tensor *x, int64_t rows, int64_t C);

#endif
