/* cublas.cpp: what our kernels use of cuBLAS, as plain loops; a product is queued on the handle's stream. */
#include <cublas_v2.h>
#include <ptx.cuh>

#include <algorithm>
#include <vector>

struct cublasContext {
    cudaStream_t stream;
};

cublasStatus_t cublasCreate_v2(cublasHandle_t *handle)
{
    *handle = new cublasContext{0};
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasDestroy_v2(cublasHandle_t handle)
{
    delete handle;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasSetStream_v2(cublasHandle_t handle, cudaStream_t stream)
{
    handle->stream = stream;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasSetWorkspace_v2(cublasHandle_t, void *, size_t) { return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasSetMathMode(cublasHandle_t, cublasMath_t) { return CUBLAS_STATUS_SUCCESS; }
const char *cublasGetStatusString(cublasStatus_t status)
{
    return status ? "CUBLAS_STATUS of the emulator" : "CUBLAS_STATUS_SUCCESS";
}

static float element(const void *p, cudaDataType type, int64_t i)
{
    return type == CUDA_R_32F ? ((const float *)p)[i] : emu_from_bf16(((const uint16_t *)p)[i]);
}

/* One product, summed in double. */
static void multiply(bool ta, bool tb, int m, int n, int k, float alpha, const void *a, cudaDataType a_type,
                     int64_t lda, const void *b, cudaDataType b_type, int64_t ldb, float beta, void *c,
                     cudaDataType c_type, int64_t ldc)
{
    std::vector<double> column((size_t)m);
    for (int j = 0; j < n; j++) {
        std::fill(column.begin(), column.end(), 0.0);
        for (int l = 0; l < k; l++) {
            const double y = element(b, b_type, tb ? j + l * ldb : l + j * ldb);
            for (int i = 0; i < m; i++) column[(size_t)i] += element(a, a_type, ta ? l + i * lda : i + l * lda) * y;
        }
        for (int i = 0; i < m; i++) {
            float v = (float)(alpha * column[(size_t)i]);
            if (beta != 0.0f) v += beta * element(c, c_type, i + j * ldc);
            if (c_type == CUDA_R_32F) {
                ((float *)c)[i + j * ldc] = v;
            } else {
                ((uint16_t *)c)[i + j * ldc] = (uint16_t)emu_round_bf16(v);
            }
        }
    }
}

cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t handle, cublasOperation_t ta, cublasOperation_t tb, int m,
                                          int n, int k, const void *alpha, const void *a, cudaDataType a_type, int lda,
                                          long long stride_a, const void *b, cudaDataType b_type, int ldb,
                                          long long stride_b, const void *beta, void *c, cudaDataType c_type, int ldc,
                                          long long stride_c, int batch, cublasComputeType_t, cublasGemmAlgo_t)
{
    if (m < 0 || n < 0 || k < 0 || batch < 0 || lda < std::max(1, ta ? k : m) || ldb < std::max(1, tb ? n : k) ||
        ldc < std::max(1, m))
        return CUBLAS_STATUS_INVALID_VALUE;
    const float x = *(const float *)alpha, y = *(const float *)beta;
    const int64_t sa = stride_a * (a_type == CUDA_R_32F ? 4 : 2), sb = stride_b * (b_type == CUDA_R_32F ? 4 : 2),
                  sc = stride_c * (c_type == CUDA_R_32F ? 4 : 2);
    cudaError_t e = emu_queue(handle->stream, [=] {
        for (int i = 0; i < batch; i++)
            multiply(ta, tb, m, n, k, x, (const char *)a + i * sa, a_type, lda, (const char *)b + i * sb, b_type, ldb,
                     y, (char *)c + i * sc, c_type, ldc);
    });
    return e ? CUBLAS_STATUS_NOT_INITIALIZED : CUBLAS_STATUS_SUCCESS;
}
