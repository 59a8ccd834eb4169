/* checks.h: what the contracts of ops.def cannot say about an op's arguments, for its C and its CUDA kernel alike. Each
 * check returns VX_OK, or a status with its text. */
#ifndef VX_CHECKS_H
#define VX_CHECKS_H

#include "core/backend.h"

static inline int check_reduce(const vx_tensor *y, const vx_tensor *x, int kind)
{
    static const char *const names[] = {"sum", "mean", "max", "min"};
    bool fits = y->ndim == x->ndim;
    for (int d = 0; fits && d < x->ndim; d++) fits = y->shape[d] == 1 || y->shape[d] == x->shape[d];
    if (!fits) {
        char a[128], b[128];
        return vx_fail(VX_EINVAL, "reduce: y %s must have the sizes of x %s, or 1", vx_shape_text(y, a, sizeof a),
                       vx_shape_text(x, b, sizeof b));
    }
    if (y->numel && !x->numel && kind != VX_REDUCE_SUM)
        return vx_fail(VX_EINVAL, "reduce: %s of no elements", names[kind]);
    return VX_OK;
}

/* Checks that row numbers fit 32 bits. */
static inline int check_rows(const char *op, long long rows)
{
    return rows > INT32_MAX ? vx_fail(VX_EINVAL, "%s: %lld rows, of at most 2^31 - 1", op, rows) : VX_OK;
}

static inline int check_gemm(const vx_tensor *c, const vx_tensor *a, const vx_tensor *b)
{
    const vx_tensor *operands[] = {a, b};
    for (int i = 0; i < 2; i++) {
        const vx_tensor *x = operands[i];
        if (x->shape[1] > 1 && x->shape[2] > 1 && x->stride[1] != 1 && x->stride[2] != 1)
            return vx_fail(VX_EINVAL, "gemm: %c has strides (%lld,%lld,%lld), expected 1 in one of the last two",
                           i ? 'b' : 'a', (long long)x->stride[0], (long long)x->stride[1], (long long)x->stride[2]);
    }
    if (c->shape[2] > 1 && c->stride[2] != 1)
        return vx_fail(VX_EINVAL, "gemm: c has last stride %lld, expected 1", (long long)c->stride[2]);
    return VX_OK;
}

/* Checks that two operands marked `body` have one dtype. */
static inline int check_one_dtype(const char *op, const char *name, const vx_tensor *x, const char *other_name,
                                  const vx_tensor *other)
{
    if (x->dtype == other->dtype) return VX_OK;
    return vx_fail(VX_EINVAL, "%s: %s is %s and %s %s, expected one dtype", op, name,
                   x->dtype == VX_BF16 ? "bf16" : "f32", other_name, other->dtype == VX_BF16 ? "bf16" : "f32");
}

static inline int check_sepconv2d(const char *op, const vx_tensor *gamma, const vx_tensor *beta, const vx_tensor *mean,
                                  const vx_tensor *rstd)
{
    const int given = (gamma != 0) + (beta != 0) + (mean != 0) + (rstd != 0);
    if (given != 0 && given != 4)
        return vx_fail(VX_EINVAL, "%s: gamma, beta, mean and rstd must all be there or none", op);
    return VX_OK;
}

#endif
