/* elementwise.cu: fill, convert, binary, where, unary, unary_backward on CUDA; what they compute, special values
 * included, is said in elementwise.c.
 *
 * Memory traffic: each operand is read once, the output written once. That is the bound: the kind of an operation is a
 * number that all threads of a launch share, and switching on it per element costs nothing beside the memory.
 *
 * Idea: the dimensions of all operands are collapsed together (struct walk, as in elementwise.c). A thread takes 4
 * neighbours of the last dimension where every operand allows that (contiguous along it and aligned, or constant), else
 * one element, and finds its place by dividing: once per 4 elements, and in 32 bits unless the tensor is larger. A
 * transposition goes through shared memory.
 */
#include "cuda/vec4.cuh"
#include "shared/special.h"
#include "shared/walk.h"

enum { BLOCK = 256, SQUARE = 32 };

/* -- Walking several strided operands at once ---------------------------------------------------------------------- */

/* A walk, and how many neighbours of the last dimension a thread takes: 4 or 1. */
typedef struct grouped_walk : walk {
    int group;
} grouped_walk;

/* Groups four neighbours where every operand allows it. `constant` says whether operands other than the output may be
 * constant along the last dimension. */
static grouped_walk group_neighbours(const walk &w, bool constant)
{
    const int last = w.ndim - 1;
    bool four = w.size[last] % 4 == 0;
    for (int k = 0; four && k < w.operands; k++) {
        if (constant && k > 0 && w.stride[k][last] == 0) continue;
        four = w.stride[k][last] == 1 && (uintptr_t)w.data[k] % (uintptr_t)(4 * w.item[k]) == 0;
        for (int d = 0; four && d < last; d++) four = w.stride[k][d] % 4 == 0;
    }
    return {w, four ? 4 : 1};
}

/* Finds the element of each operand k where group i begins. */
template <class I, int operands> VX_DEVICE void place(const grouped_walk &w, int64_t i, int64_t *at)
{
    const int last = w.ndim - 1;
    I rest = (I)i;
    const I width = (I)(w.size[last] / w.group);
    I x = rest % width;
    rest /= width;
    for (int k = 0; k < operands; k++) at[k] = (int64_t)x * w.group * w.stride[k][last];
    for (int d = last - 1; d >= 0; d--) {
        const I size = (I)w.size[d];
        x = d ? rest % size : rest;
        rest = d ? rest / size : 0;
        for (int k = 0; k < operands; k++) at[k] += (int64_t)x * w.stride[k][d];
    }
}

/* Launches kernel<uint32_t> or kernel<int64_t>, whichever can count the groups. */
#define LAUNCH_WALK(kernel, w, ...)                                                                                    \
    do {                                                                                                               \
        const int64_t groups_ = (w).numel / (w).group;                                                                 \
        if (groups_ < INT64_C(1) << 32)                                                                                \
            VX_LAUNCH((kernel<uint32_t>), vx_grid(groups_, BLOCK), BLOCK, 0, w, groups_ __VA_OPT__(, ) __VA_ARGS__);   \
        else VX_LAUNCH((kernel<int64_t>), vx_grid(groups_, BLOCK), BLOCK, 0, w, groups_ __VA_OPT__(, ) __VA_ARGS__);   \
    } while (0)

/* -- fill ---------------------------------------------------------------------------------------------------------- */

VX_DEVICE void store_bits(char *data, int item, int64_t at, uint32_t bits)
{
    if (item == 4) ((uint32_t *)data)[at] = bits;
    else if (item == 2) ((uint16_t *)data)[at] = (uint16_t)bits;
    else ((uint8_t *)data)[at] = (uint8_t)bits;
}

template <class I> VX_KERNEL fill_kernel(grouped_walk w, int64_t groups, uint32_t bits)
{
    for (int64_t i = vx_first(); i < groups; i += vx_step()) {
        int64_t at[1];
        place<I, 1>(w, i, at);
        if (w.group == 1) store_bits(w.data[0], w.item[0], at[0], bits);
        else if (w.item[0] == 4) *(uint4 *)((uint32_t *)w.data[0] + at[0]) = make_uint4(bits, bits, bits, bits);
        else if (w.item[0] == 2)
            *(uint2 *)((uint16_t *)w.data[0] + at[0]) = make_uint2(bits * 0x10001u, bits * 0x10001u);
        else *(uint32_t *)((uint8_t *)w.data[0] + at[0]) = bits * 0x1010101u;
    }
}

/* Sets x = value, rounded and saturated as convert would. */
int vx_cuda_fill(vx_tensor *x, double value)
{
    if (!x->numel) return VX_OK;
    const float f = (float)value;
    /* doubles hold every int32, so the limits are exact */
    const double whole = value != value ? 0 : rint(fmin(fmax(value, INT32_MIN), INT32_MAX));
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    if (x->dtype == VX_BF16) bits = vx_to_bf16(f);
    else if (x->dtype == VX_I32) bits = (uint32_t)(int32_t)whole;
    else if (x->dtype == VX_U8) bits = (uint32_t)fmin(fmax(whole, 0), 255);
    const vx_tensor *const all[] = {x};
    const grouped_walk w = group_neighbours(walk_of(1, all), false);
    LAUNCH_WALK(fill_kernel, w, bits);
    return vx_status();
}

/* -- convert ------------------------------------------------------------------------------------------------------- */

/* Rounds to nearest, ties to even, saturating, NaN to 0. */
VX_DEVICE int32_t i32_from_f32(float x)
{
    const float r = rintf(x);
    if (r != r) return 0;
    return r >= 2147483648.0f ? INT32_MAX : r < -2147483648.0f ? INT32_MIN : (int32_t)r;
}

VX_DEVICE uint32_t u8_from_f32(float x)
{
    const float r = x > 0.0f ? x : 0.0f;
    return (uint32_t)rintf(r < 255.0f ? r : 255.0f);
}

/* Returns the bits of an element of dtype `from` as those of dtype `to`. */
VX_DEVICE uint32_t converted(int to, int from, uint32_t bits)
{
    if (to == from) return bits;
    if (from == VX_I32 || from == VX_U8) {
        const int32_t x = (int32_t)bits;
        if (to == VX_F32) return __float_as_uint((float)x);
        if (to == VX_BF16) return vx_bf16_from_i32(x);
        if (to == VX_I32) return bits;
        return (uint32_t)(x < 0 ? 0 : x > 255 ? 255 : x);
    }
    const float x = from == VX_BF16 ? vx_from_bf16((vx_bf16)bits) : __uint_as_float(bits);
    if (to == VX_F32) return __float_as_uint(x);
    if (to == VX_BF16) return vx_to_bf16(x);
    if (to == VX_I32) return (uint32_t)i32_from_f32(x);
    return u8_from_f32(x);
}

VX_DEVICE uint32_t load_bits(const char *data, int item, int64_t at)
{
    return item == 4   ? ((const uint32_t *)data)[at]
           : item == 2 ? ((const uint16_t *)data)[at]
                       : ((const uint8_t *)data)[at];
}

VX_DEVICE uint4 load_four(const char *data, int item, int64_t at)
{
    if (item == 4) return *(const uint4 *)((const uint32_t *)data + at);
    if (item == 2) {
        const uint2 x = *(const uint2 *)((const uint16_t *)data + at);
        return make_uint4(x.x & 0xffffu, x.x >> 16, x.y & 0xffffu, x.y >> 16);
    }
    const uint32_t x = *(const uint32_t *)((const uint8_t *)data + at);
    return make_uint4(x & 255u, x >> 8 & 255u, x >> 16 & 255u, x >> 24);
}

VX_DEVICE void store_four(char *data, int item, int64_t at, uint4 x)
{
    if (item == 4) *(uint4 *)((uint32_t *)data + at) = x;
    else if (item == 2) *(uint2 *)((uint16_t *)data + at) = make_uint2(x.x | x.y << 16, x.z | x.w << 16);
    else *(uint32_t *)((uint8_t *)data + at) = x.x | x.y << 8 | x.z << 16 | x.w << 24;
}

template <class I> VX_KERNEL convert_kernel(grouped_walk w, int64_t groups, int to, int from)
{
    for (int64_t i = vx_first(); i < groups; i += vx_step()) {
        int64_t at[2];
        place<I, 2>(w, i, at);
        if (w.group == 1) {
            store_bits(w.data[0], w.item[0], at[0], converted(to, from, load_bits(w.data[1], w.item[1], at[1])));
        } else {
            const uint4 x = load_four(w.data[1], w.item[1], at[1]);
            store_four(w.data[0], w.item[0], at[0],
                       make_uint4(converted(to, from, x.x), converted(to, from, x.y), converted(to, from, x.z),
                                  converted(to, from, x.w)));
        }
    }
}

/* Transposes the last two dimensions of w: rows, in which x is contiguous, and columns, in which y is. A block takes
 * squares of 32 x 32; the odd pitch spreads a column over the banks. */
VX_KERNEL transpose_kernel(walk w, int64_t squares, int to, int from)
{
    __shared__ uint32_t square[SQUARE][SQUARE + 1];
    const int last = w.ndim - 1;
    const int64_t rows = w.size[last - 1], columns = w.size[last];
    const int64_t across = (columns + SQUARE - 1) / SQUARE, down = (rows + SQUARE - 1) / SQUARE;
    for (int64_t s = blockIdx.x; s < squares; s += gridDim.x) {
        int64_t rest = s / across / down, y = 0, x = 0;
        for (int d = last - 2; d >= 0; d--) {
            const int64_t at = d ? rest % w.size[d] : rest;
            rest = d ? rest / w.size[d] : 0;
            y += at * w.stride[0][d], x += at * w.stride[1][d];
        }
        const int64_t column = s % across * SQUARE, row = s / across % down * SQUARE;
        for (int i = threadIdx.x / SQUARE; i < SQUARE; i += BLOCK / SQUARE) {
            const int64_t c = column + i, r = row + threadIdx.x % SQUARE;
            if (c < columns && r < rows)
                square[i][threadIdx.x % SQUARE] = converted(
                    to, from, load_bits(w.data[1], w.item[1], x + c * w.stride[1][last] + r * w.stride[1][last - 1]));
        }
        __syncthreads();
        for (int i = threadIdx.x / SQUARE; i < SQUARE; i += BLOCK / SQUARE) {
            const int64_t r = row + i, c = column + threadIdx.x % SQUARE;
            if (c < columns && r < rows)
                store_bits(w.data[0], w.item[0], y + c * w.stride[0][last] + r * w.stride[0][last - 1],
                           square[threadIdx.x % SQUARE][i]);
        }
        __syncthreads();
    }
}

/* Copies y = x between any strides and dtypes. */
int vx_cuda_convert(vx_tensor *y, vx_tensor *x)
{
    if (!y->numel) return VX_OK;
    const vx_tensor *const all[] = {y, x};
    walk w = walk_of(2, all);
    if (!walk_transpose(&w)) {
        const grouped_walk grouped = group_neighbours(w, false);
        LAUNCH_WALK(convert_kernel, grouped, y->dtype, x->dtype);
        return vx_status();
    }
    const int64_t rows = w.size[w.ndim - 2], columns = w.size[w.ndim - 1];
    const int64_t squares = vx_ceil_div(columns, SQUARE) * vx_ceil_div(rows, SQUARE) * (w.numel / (columns * rows));
    VX_LAUNCH(transpose_kernel, vx_grid(squares, 1), BLOCK, 0, w, squares, y->dtype, x->dtype);
    return vx_status();
}

/* -- binary -------------------------------------------------------------------------------------------------------- */

VX_DEVICE float binary(int kind, float a, float b)
{
    switch (kind) {
    case VX_ADD: return a + b;
    case VX_SUB: return a - b;
    case VX_MUL: return a * b;
    case VX_DIV: return a / b;
    case VX_MAX: return a != a ? a : a > b ? a : b; /* b where b is NaN */
    case VX_MIN: return a != a ? a : a < b ? a : b;
    case VX_EQ: return a == b ? 1.0f : 0.0f;
    case VX_LT: return a < b ? 1.0f : 0.0f;
    case VX_LE: return a <= b ? 1.0f : 0.0f;
    default: return powf(a, b);
    }
}

/* Loads an element of operand k, f32 or bf16. */
VX_DEVICE float one_of(const grouped_walk &w, int k, int64_t at)
{
    return w.item[k] == 4 ? ((const float *)w.data[k])[at] : vx_from_bf16(((const vx_bf16 *)w.data[k])[at]);
}

/* Loads four elements of operand k, or the one it has, four times. */
VX_DEVICE vec<4> four_of(const grouped_walk &w, int k, int64_t at)
{
    if (!w.stride[k][w.ndim - 1]) {
        const float x = one_of(w, k, at);
        return {{x, x, x, x}};
    }
    return w.item[k] == 4 ? load<4>((const float *)w.data[k] + at) : load<4>((const vx_bf16 *)w.data[k] + at);
}

template <int V> VX_DEVICE void store_result(const grouped_walk &w, int64_t at, const vec<V> &y)
{
    if (w.item[0] == 4) store<V>((float *)w.data[0] + at, y);
    else store<V>((vx_bf16 *)w.data[0] + at, y);
}

template <class I> VX_KERNEL binary_kernel(grouped_walk w, int64_t groups, int kind)
{
    for (int64_t i = vx_first(); i < groups; i += vx_step()) {
        int64_t at[3];
        place<I, 3>(w, i, at);
        if (w.group == 1) {
            store_result<1>(w, at[0], {{binary(kind, one_of(w, 1, at[1]), one_of(w, 2, at[2]))}});
            continue;
        }
        vec<4> a = four_of(w, 1, at[1]);
        const vec<4> b = four_of(w, 2, at[2]);
#pragma unroll
        for (int v = 0; v < 4; v++) a.x[v] = binary(kind, a.x[v], b.x[v]);
        store_result<4>(w, at[0], a);
    }
}

/* Computes y = a (kind) b. */
int vx_cuda_binary(vx_tensor *y, vx_tensor *a, vx_tensor *b, int kind)
{
    if (!y->numel) return VX_OK;
    const vx_tensor *const all[] = {y, a, b};
    const grouped_walk w = group_neighbours(walk_of(3, all), true);
    LAUNCH_WALK(binary_kernel, w, kind);
    return vx_status();
}

/* -- where --------------------------------------------------------------------------------------------------------- */

template <class I> VX_KERNEL where_kernel(grouped_walk w, int64_t groups)
{
    for (int64_t i = vx_first(); i < groups; i += vx_step()) {
        int64_t at[4];
        place<I, 4>(w, i, at);
        if (w.group == 1) {
            ((float *)w.data[0])[at[0]] = one_of(w, 1, at[1]) != 0.0f ? one_of(w, 2, at[2]) : one_of(w, 3, at[3]);
            continue;
        }
        const vec<4> condition = four_of(w, 1, at[1]), b = four_of(w, 3, at[3]);
        vec<4> a = four_of(w, 2, at[2]);
#pragma unroll
        for (int v = 0; v < 4; v++) a.x[v] = condition.x[v] != 0.0f ? a.x[v] : b.x[v];
        store_result<4>(w, at[0], a);
    }
}

/* y = condition ? a : b; a condition that is NaN holds. */
int vx_cuda_where(vx_tensor *y, vx_tensor *condition, vx_tensor *a, vx_tensor *b)
{
    if (!y->numel) return VX_OK;
    const vx_tensor *const all[] = {y, condition, a, b};
    const grouped_walk w = group_neighbours(walk_of(4, all), true);
    LAUNCH_WALK(where_kernel, w);
    return vx_status();
}

/* -- unary --------------------------------------------------------------------------------------------------------- */

VX_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
/* Returns Phi(x), the standard normal distribution function, of GELU(x) = x Phi(x). */
VX_DEVICE float normal_below(float x) { return 0.5f + 0.5f * erff(x * 0.70710678f); }

/* Returns f(x). The gamma function's family is computed in double and has kernels of its own (gamma true): its
 * registers would cost the others. */
template <bool gamma> VX_DEVICE float unary(int kind, float x, float alpha, float beta)
{
    if (gamma)
        return (float)(kind == VX_LGAMMA    ? special_lgamma(x)
                       : kind == VX_DIGAMMA ? special_digamma(x)
                                            : special_trigamma(x));
    switch (kind) {
    case VX_AFFINE: return alpha * x + beta;
    case VX_EXP: return expf(x);
    case VX_LOG: return logf(x);
    case VX_SQRT: return sqrtf(x);
    case VX_ABS: return fabsf(x);
    case VX_SQUARE: return x * x;
    case VX_RELU: return x > 0.0f || x != x ? x : 0.0f;
    case VX_SILU: return x * sigmoid(x);
    case VX_GELU: return x * normal_below(x);
    case VX_SIGMOID: return sigmoid(x);
    case VX_TANH: return tanhf(x);
    case VX_CLAMP: return x != x ? x : x < alpha ? alpha : x > beta ? beta : x;
    case VX_ROUND: return rintf(x);
    case VX_FLOOR: return floorf(x);
    case VX_SIGN: return x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : x;
    default: return powf(x, alpha);
    }
}

/* Returns dx from dy, and from x or y = f(x), whichever costs less. At a kink: ABS 0, RELU 0, CLAMP dy. */
template <bool gamma> VX_DEVICE float unary_backward(int kind, float dy, float x, float y, float alpha, float beta)
{
    if (gamma)
        return dy * (float)(kind == VX_LGAMMA    ? special_digamma(x)
                            : kind == VX_DIGAMMA ? special_trigamma(x)
                                                 : special_tetragamma(x));
    switch (kind) {
    case VX_AFFINE: return dy * alpha;
    case VX_EXP: return dy * y;
    case VX_LOG: return dy / x;
    case VX_SQRT: return dy * (0.5f / y);
    case VX_ABS: return dy * (x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : x);
    case VX_SQUARE: return dy * (x + x);
    case VX_RELU: return x > 0.0f ? dy : 0.0f;
    case VX_SILU: {
        const float s = sigmoid(x);
        return dy * (s + y * (1.0f - s));
    }
    case VX_GELU: return dy * (normal_below(x) + x * (0.39894228f * expf(-0.5f * x * x)));
    case VX_SIGMOID: return dy * (y * (1.0f - y));
    case VX_TANH: return dy * (1.0f - y * y);
    case VX_CLAMP: return x >= alpha && x <= beta ? dy : 0.0f;
    case VX_ROUND:
    case VX_FLOOR:
    case VX_SIGN: return 0.0f;
    default: /* of x^0, also at 0, it is 0 */ return alpha == 0.0f ? 0.0f : dy * (alpha * powf(x, alpha - 1.0f));
    }
}

/* Maps `fours` groups of 4, then what is left singly. */
template <bool gamma>
VX_KERNEL unary_kernel(float *y, const float *x, int64_t n, int64_t fours, int kind, float alpha, float beta)
{
    for (int64_t i = vx_first(); i < fours; i += vx_step()) {
        const float4 v = ((const float4 *)x)[i];
        ((float4 *)y)[i] = make_float4(unary<gamma>(kind, v.x, alpha, beta), unary<gamma>(kind, v.y, alpha, beta),
                                       unary<gamma>(kind, v.z, alpha, beta), unary<gamma>(kind, v.w, alpha, beta));
    }
    for (int64_t i = 4 * fours + vx_first(); i < n; i += vx_step()) y[i] = unary<gamma>(kind, x[i], alpha, beta);
}

template <bool gamma>
VX_KERNEL unary_backward_kernel(float *dx, const float *dy, const float *x, const float *y, int64_t n, int64_t fours,
                                int kind, float alpha, float beta)
{
    for (int64_t i = vx_first(); i < fours; i += vx_step()) {
        const float4 g = ((const float4 *)dy)[i], v = ((const float4 *)x)[i], r = ((const float4 *)y)[i];
        ((float4 *)dx)[i] = make_float4(unary_backward<gamma>(kind, g.x, v.x, r.x, alpha, beta),
                                        unary_backward<gamma>(kind, g.y, v.y, r.y, alpha, beta),
                                        unary_backward<gamma>(kind, g.z, v.z, r.z, alpha, beta),
                                        unary_backward<gamma>(kind, g.w, v.w, r.w, alpha, beta));
    }
    for (int64_t i = 4 * fours + vx_first(); i < n; i += vx_step())
        dx[i] = unary_backward<gamma>(kind, dy[i], x[i], y[i], alpha, beta);
}

/* Computes y = f(x); y may be x. */
int vx_cuda_unary(vx_tensor *y, vx_tensor *x, int kind, float alpha, float beta)
{
    if (!y->numel) return VX_OK;
    const int64_t n = y->numel, fours = vx_aligned(y, 16) && vx_aligned(x, 16) ? n / 4 : 0;
    if (kind >= VX_LGAMMA)
        VX_LAUNCH(unary_kernel<true>, vx_grid(fours ? fours : n, BLOCK), BLOCK, 0, vx_f32(y), vx_f32(x), n, fours, kind,
                  alpha, beta);
    else
        VX_LAUNCH(unary_kernel<false>, vx_grid(fours ? fours : n, BLOCK), BLOCK, 0, vx_f32(y), vx_f32(x), n, fours,
                  kind, alpha, beta);
    return vx_status();
}

/* Computes dx = dy f'(x); dx may be dy, x or y. */
int vx_cuda_unary_backward(vx_tensor *dx, vx_tensor *dy, vx_tensor *x, vx_tensor *y, int kind, float alpha, float beta)
{
    if (!dx->numel) return VX_OK;
    const int64_t n = dx->numel;
    const int64_t fours =
        vx_aligned(dx, 16) && vx_aligned(dy, 16) && vx_aligned(x, 16) && vx_aligned(y, 16) ? n / 4 : 0;
    if (kind >= VX_LGAMMA)
        VX_LAUNCH(unary_backward_kernel<true>, vx_grid(fours ? fours : n, BLOCK), BLOCK, 0, vx_f32(dx), vx_f32(dy),
                  vx_f32(x), vx_f32(y), n, fours, kind, alpha, beta);
    else
        VX_LAUNCH(unary_backward_kernel<false>, vx_grid(fours ? fours : n, BLOCK), BLOCK, 0, vx_f32(dx), vx_f32(dy),
                  vx_f32(x), vx_f32(y), n, fours, kind, alpha, beta);
    return vx_status();
}
