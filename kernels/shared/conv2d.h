/* conv2d.h: the sizes of a convolution and of pooling over windows of images, for C and CUDA alike. Window (p, q)
 * begins at pixel (p stride - padding, q stride - padding) of its image.
 */
#ifndef VX_CONV2D_H
#define VX_CONV2D_H

#include "core/backend.h"
#include "shared/common.h"

typedef struct window_sizes {
    int64_t B, H, W, C; /* x (B,H,W,C) */
    int64_t P, Q;       /* windows of an image: y (B,P,Q,...) */
    int64_t K, L;       /* a window's rows and columns of pixels */
    int64_t stride_h, stride_w, padding_h, padding_w;
} window_sizes;

/* Returns the sizes of windows (K,L) over x (B,H,W,C), of which y (B,P,Q,...) has a result each. */
static inline window_sizes window_sizes_of(const vx_tensor *x, const vx_tensor *y, int64_t K, int64_t L, int stride_h,
                                           int stride_w, int padding_h, int padding_w)
{
    window_sizes s;
    s.B = x->shape[0], s.H = x->shape[1], s.W = x->shape[2], s.C = x->shape[3];
    s.P = y->shape[1], s.Q = y->shape[2], s.K = K, s.L = L;
    s.stride_h = stride_h, s.stride_w = stride_w, s.padding_h = padding_h, s.padding_w = padding_w;
    return s;
}

/* Checks that an image has pixels where its output has some: padding alone has no largest. */
static inline int check_pixels(const char *op, const vx_tensor *x, const vx_tensor *y)
{
    if (!y->numel || x->numel) return VX_OK;
    char a[128];
    return vx_fail(VX_EINVAL, "%s: x %s has no pixels, only padding", op, vx_shape_text(x, a, sizeof a));
}

#endif
