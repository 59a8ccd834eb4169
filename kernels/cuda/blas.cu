/* blas.cu: opens cuBLAS; see blas.cuh. */
#include "blas.cuh"

#include <dlfcn.h>

#define QUOTE_(x) #x
#define QUOTE(x) QUOTE_(x)
#define LIBRARY "libcublas.so." QUOTE(CUBLAS_VER_MAJOR)

/* The functions that are used, under names of our own: weak, so that this library loads without cuBLAS. Two of them
 * have overloads in the header. */
typedef cublasStatus_t create_function(cublasHandle_t *);
typedef cublasStatus_t set_stream_function(cublasHandle_t, cudaStream_t);
typedef cublasStatus_t set_workspace_function(cublasHandle_t, void *, size_t);
typedef const char *status_text_function(cublasStatus_t);
/* clang-format off */
#define FUNCTIONS(f)                                                  \
    f(create_function, create, "cublasCreate_v2")                     \
    f(set_stream_function, set_stream, "cublasSetStream_v2")          \
    f(set_workspace_function, set_workspace, "cublasSetWorkspace_v2") \
    f(status_text_function, status_text, "cublasGetStatusString")     \
    f(vx_blas_gemm, gemm, "cublasGemmStridedBatchedEx")
/* clang-format on */
#define DECLARE(type, name, symbol)                                                                                    \
    extern "C" type linked_##name __asm__(symbol) __attribute__((weak));                                               \
    static type *name;
FUNCTIONS(DECLARE)
#undef DECLARE

enum { WORKSPACE = 32 << 20 }; /* what NVIDIA recommends for Hopper */

static bool loaded;
static vx_blas by_ordinal[VX_MAX_DEVICES];

static int load(void)
{
    if (loaded) return VX_OK;
    void *handle = 0;
    if (!linked_create) {
        handle = dlopen(LIBRARY, RTLD_NOW | RTLD_LOCAL);
        if (!handle) return vx_fail(VX_ENOSUP, "matrix products need cuBLAS: %s", dlerror());
    }
#define FIND(type, name, symbol)                                                                                       \
    name = handle ? (type *)dlsym(handle, symbol) : linked_##name;                                                     \
    if (!name) return vx_fail(VX_ENOSUP, "matrix products need cuBLAS: %s has no %s", LIBRARY, symbol);
    FUNCTIONS(FIND)
#undef FIND
    loaded = true;
    return VX_OK;
}

const vx_blas *vx_blas_open(void)
{
    vx_blas *blas = &by_ordinal[vx_limits()->ordinal];
    if (blas->handle || !vx_ok()) return vx_ok() ? blas : 0;
    cublasHandle_t handle = 0;
    int status = load();
    if (status) {
        vx_fail_op(status);
        return 0;
    }
    void *workspace = vx_device_memory(WORKSPACE);
    VX_BLAS(create(&handle));
    VX_BLAS(set_stream(handle, vx_stream()));
    VX_BLAS(set_workspace(handle, workspace, WORKSPACE));
    if (!vx_ok()) return 0;
    blas->gemm = gemm;
    blas->handle = handle;
    return blas;
}

void vx_blas_called(cublasStatus_t status, const char *call)
{
    if (status == CUBLAS_STATUS_SUCCESS) {
        vx_called(cudaSuccess, call);
        return;
    }
    vx_fail_op(vx_fail(VX_EDEVICE, "%s: %.60s: %s", vx_op(), call, status_text(status)));
}
