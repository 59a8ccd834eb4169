/* blas.cuh: cuBLAS, opened at the first product and not before: loading it takes 0.1 s (6 s from a cold disk), which a
 * process that multiplies nothing should not pay. Where the symbols are linked in already, those are used. */
#ifndef VX_BLAS_CUH
#define VX_BLAS_CUH

#include <cublas_v2.h>

#include "cuda.cuh"

/* The type of cublasGemmStridedBatchedEx: c = alpha op(a) op(b) + beta c, column-major, the scalars float32 on the
 * host. CUBLAS_COMPUTE_32F on float32 matrices is float32 throughout, no TF32. */
typedef cublasStatus_t vx_blas_gemm(cublasHandle_t handle, cublasOperation_t ta, cublasOperation_t tb, int m, int n,
                                    int k, const void *alpha, const void *a, cudaDataType a_type, int lda,
                                    long long stride_a, const void *b, cudaDataType b_type, int ldb, long long stride_b,
                                    const void *beta, void *c, cudaDataType c_type, int ldc, long long stride_c,
                                    int batch, cublasComputeType_t compute, cublasGemmAlgo_t algorithm);

typedef struct vx_blas {
    cublasHandle_t handle; /* of the op's device: on its compute stream, with a workspace of its own */
    vx_blas_gemm *gemm;
} vx_blas;

/* Opens cuBLAS for the op's device. Returns NULL where there is none, which vx_status() then says. */
const vx_blas *vx_blas_open(void);

/* Makes a call of cuBLAS unless the op has failed: VX_BLAS(blas->gemm(blas->handle, ...)). */
void vx_blas_called(cublasStatus_t status, const char *call);
#define VX_BLAS(call)                                                                                                  \
    do {                                                                                                               \
        if (vx_ok()) vx_blas_called(call, #call);                                                                      \
    } while (0)

#endif
