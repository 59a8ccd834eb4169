/* gemm.cuh: a product of row-major matrices for kernels that need one inside (separable.cu). */
#ifndef VX_GEMM_CUH
#define VX_GEMM_CUH

#include "cuda.cuh"

/* Element (i, j) of index b is data[b batch_stride + i row_stride + j column_stride]. */
typedef struct matrix {
    const float *data;
    int64_t batch_stride, row_stride, column_stride;
} matrix;

/* c (batch,m,n) = alpha a (batch,m,k) b (batch,k,n) + beta c + bias, in float32; c's rows are c_stride apart, its columns side by side. By
 * cuBLAS where it can take the strides, else by a kernel of our own. c is not read where beta is 0. */
void vx_gemm(int64_t batch, int64_t m, int64_t n, int64_t k, float alpha, matrix a, matrix b, float beta, float *c, int64_t c_batch_stride,
             int64_t c_stride, const float *bias);

#endif
