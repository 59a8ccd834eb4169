/* elementwise.c: fill, convert, binary, where, unary, unary_backward.
 *
 * Memory traffic: each operand is read once, the output written once; it bounds all but exp, log, pow and their kin.
 *
 * Idea: the dimensions of all operands are collapsed together (shared/walk.h) until mostly one or two are left: a long
 * row, or rows that share a broadcast operand. The walk is cut into tiles of about 4096 elements, whose number depends
 * on the sizes alone; threads take tiles; a tile function sees rows, columns and two strides per operand. Every element
 * goes through the same vector expression wherever it lies, in a full vector or in a tail, so that threads
 * change no bit.
 *
 * Special values follow IEEE 754: log 0 = -inf, NaN passes through everything, through max, min, ReLU and clamp too.
 * The exceptions: comparisons with NaN give 0, and conversion of NaN to an integer gives 0.
 */
#include "shared/bf16.h"
#include "shared/special.h"
#include "shared/walk.h"
#include "cpu/cpu.h"
#include "cpu/simd.h"

#define TILE 4096    /* elements */
#define SERIAL 16384 /* below this many elements a second thread costs more than it brings */
#define SQUARE 64    /* rows and columns of a tile of a transposition */

/* -- A walk cut into tiles ----------------------------------------------------------------------------------------- */

/* rows x columns elements from p[k] on; operand k advances by row[k] and column[k] bytes. */
typedef struct tile {
    int64_t rows, columns;
    char *p[WALK_OPERANDS];
    int64_t row[WALK_OPERANDS], column[WALK_OPERANDS];
} tile;

typedef void tile_function(const void *context, const tile *t);

/* Calls f on tiles of at most `columns` columns and `rows` rows until all of w is covered, in parallel. A tile's rows
 * lie along the last dimension but one; where a group of rows runs over its end, f is called again for the rest. */
static void walk_run(const walk *w, int64_t rows, int64_t columns, tile_function *f, const void *context)
{
    int last = w->ndim - 1;
    int64_t width = w->size[last], cuts = vx_ceil_div(width, columns), total = w->numel / width;
    int64_t tiles = vx_ceil_div(total, rows) * cuts;
#pragma omp parallel for schedule(static) if (w->numel >= SERIAL)
    for (int64_t i = 0; i < tiles; i++) {
        int64_t row = i / cuts * rows, end = vx_min64(row + rows, total), first = i % cuts * columns;
        while (row < end) {
            tile t = {.rows = 1, .columns = vx_min64(columns, width - first)};
            for (int k = 0; k < w->operands; k++) {
                t.column[k] = w->stride[k][last] * w->item[k];
                t.p[k] = w->data[k] + first * t.column[k];
            }
            int64_t rest = row;
            for (int d = last - 1; d >= 0; d--) {
                int64_t at = d ? rest % w->size[d] : rest;
                rest = d ? rest / w->size[d] : 0;
                for (int k = 0; k < w->operands; k++) t.p[k] += at * w->stride[k][d] * w->item[k];
                if (d == last - 1) {
                    t.rows = vx_min64(end - row, w->size[d] - at);
                    for (int k = 0; k < w->operands; k++) t.row[k] = w->stride[k][d] * w->item[k];
                }
            }
            f(context, &t);
            row += t.rows;
        }
    }
}

/* Calls f on tiles of about TILE elements, as wide as they can be. */
static void walk_run_wide(const walk *w, tile_function *f, const void *context)
{
    walk_run(w, vx_max64(1, TILE / w->size[w->ndim - 1]), TILE, f, context);
}

/* -- Elements of the four dtypes ----------------------------------------------------------------------------------- */

/* Rounds to nearest, ties to even, and saturates; NaN becomes 0. */
VX_INLINE int32_t i32_from_f32(float x)
{
    float r = rintf(x);
    int32_t y = (int32_t)(r >= -2147483648.0f && r < 2147483648.0f ? r : 0.0f);
    y = r >= 2147483648.0f ? INT32_MAX : y;
    return r < -2147483648.0f ? INT32_MIN : y;
}

VX_INLINE uint8_t u8_from_f32(float x)
{
    float r = x > 0.0f ? x : 0.0f;
    return (uint8_t)(int32_t)rintf(r < 255.0f ? r : 255.0f);
}

VX_INLINE uint8_t u8_from_i32(int32_t x) { return (uint8_t)(x < 0 ? 0 : x > 255 ? 255 : x); }

/* -- fill ---------------------------------------------------------------------------------------------------------- */

typedef struct pattern {
    int bytes;
    uint32_t bits;
} pattern;

static void fill_tile(const void *context, const tile *t)
{
    const pattern *v = context;
#define FILL(type)                                                                                                     \
    for (int64_t r = 0; r < t->rows; r++) {                                                                            \
        char *y = t->p[0] + r * t->row[0];                                                                             \
        if (t->column[0] == sizeof(type))                                                                              \
            for (int64_t i = 0; i < t->columns; i++) ((type *)y)[i] = (type)v->bits;                                   \
        else                                                                                                           \
            for (int64_t i = 0; i < t->columns; i++) *(type *)(y + i * t->column[0]) = (type)v->bits;                  \
    }
    if (v->bytes == 4) FILL(uint32_t)
    else if (v->bytes == 2) FILL(uint16_t)
    else FILL(uint8_t)
#undef FILL
}

/* Fills x with value, rounded and saturated as convert would. */
int VX_CPU(fill)(vx_tensor *x, double value)
{
    if (!x->numel) return VX_OK;
    pattern v = {(int)vx_dtype_bytes(x->dtype), 0};
    float f = (float)value;
    /* doubles hold every int32, so the limits are exact */
    double whole = value != value ? 0 : rint(fmin(fmax(value, INT32_MIN), INT32_MAX));
    if (x->dtype == VX_F32) memcpy(&v.bits, &f, sizeof f);
    else if (x->dtype == VX_BF16) v.bits = vx_to_bf16(f);
    else if (x->dtype == VX_I32) v.bits = (uint32_t)(int32_t)whole;
    else v.bits = u8_from_i32((int32_t)whole);
    walk w = walk_of(1, (const vx_tensor *const[]){x});
    walk_run_wide(&w, fill_tile, &v);
    return VX_OK;
}

/* -- convert ------------------------------------------------------------------------------------------------------- */

/* Converts n elements, y[i sy] = x[i sx]; strides in bytes. */
typedef void row_function(char *y, int64_t sy, const char *x, int64_t sx, int64_t n);

#define CONVERT_ROW(name, to, from, expression)                                                                        \
    static void name(char *y, int64_t sy, const char *x, int64_t sx, int64_t n)                                        \
    {                                                                                                                  \
        if (sy == (int64_t)sizeof(to) && sx == (int64_t)sizeof(from)) {                                                \
            to *restrict out = (to *)y;                                                                                \
            const from *restrict in = (const from *)x;                                                                 \
            for (int64_t i = 0; i < n; i++) {                                                                          \
                from v = in[i];                                                                                        \
                out[i] = expression;                                                                                   \
            }                                                                                                          \
        } else {                                                                                                       \
            for (int64_t i = 0; i < n; i++) {                                                                          \
                from v = *(const from *)(x + i * sx);                                                                  \
                *(to *)(y + i * sy) = expression;                                                                      \
            }                                                                                                          \
        }                                                                                                              \
    }

CONVERT_ROW(copy_4, uint32_t, uint32_t, v)
CONVERT_ROW(copy_2, uint16_t, uint16_t, v)
CONVERT_ROW(copy_1, uint8_t, uint8_t, v)
CONVERT_ROW(f32_bf16, float, uint16_t, vx_from_bf16(v))
CONVERT_ROW(f32_i32, float, int32_t, (float)v)
CONVERT_ROW(f32_u8, float, uint8_t, (float)v)
CONVERT_ROW(bf16_f32, uint16_t, float, vx_to_bf16(v))
CONVERT_ROW(bf16_i32, uint16_t, int32_t, vx_bf16_from_i32(v))
CONVERT_ROW(bf16_u8, uint16_t, uint8_t, vx_to_bf16((float)v))
CONVERT_ROW(i32_f32, int32_t, float, i32_from_f32(v))
CONVERT_ROW(i32_bf16, int32_t, uint16_t, i32_from_f32(vx_from_bf16(v)))
CONVERT_ROW(i32_u8, int32_t, uint8_t, v)
CONVERT_ROW(u8_f32, uint8_t, float, u8_from_f32(v))
CONVERT_ROW(u8_bf16, uint8_t, uint16_t, u8_from_f32(vx_from_bf16(v)))
CONVERT_ROW(u8_i32, uint8_t, int32_t, u8_from_i32(v))

/* [to][from], by dtype number; the diagonal moves bits. */
static row_function *const convert_rows[4][4] = {
    {copy_4, f32_bf16, f32_i32, f32_u8},
    {bf16_f32, copy_2, bf16_i32, bf16_u8},
    {i32_f32, i32_bf16, copy_4, i32_u8},
    {u8_f32, u8_bf16, u8_i32, copy_1},
};

typedef struct conversion {
    row_function *row;  /* from x's dtype to y's */
    row_function *move; /* within y's dtype */
    int64_t to, from;   /* bytes of an element */
} conversion;

static void convert_tile(const void *context, const tile *t)
{
    const conversion *c = context;
    for (int64_t r = 0; r < t->rows; r++)
        c->row(t->p[0] + r * t->row[0], t->column[0], t->p[1] + r * t->row[1], t->column[1], t->columns);
}

typedef uint32_t quad __attribute__((vector_size(16)));
typedef uint32_t quad_unaligned __attribute__((vector_size(16), aligned(4), may_alias));

/* Transposes, y[r][i] = x[i][r], elements of 4 bytes; pitches in bytes. Squares of 4 x 4 are turned in registers. */
static void transpose_4(char *y, int64_t y_pitch, const char *x, int64_t x_pitch, int64_t rows, int64_t columns)
{
    for (int64_t r = 0; r < rows; r += 4)
        for (int64_t i = 0; i < columns; i += 4) {
            const char *from = x + i * x_pitch + r * 4;
            char *to = y + r * y_pitch + i * 4;
            if (r + 4 > rows || i + 4 > columns) {
                for (int64_t a = 0; a < vx_min64(4, rows - r); a++)
                    copy_4(to + a * y_pitch, 4, from + a * 4, x_pitch, vx_min64(4, columns - i));
                continue;
            }
            quad a = *(const quad_unaligned *)from, b = *(const quad_unaligned *)(from + x_pitch);
            quad c = *(const quad_unaligned *)(from + 2 * x_pitch), d = *(const quad_unaligned *)(from + 3 * x_pitch);
            const quad low = {0, 4, 1, 5}, high = {2, 6, 3, 7}, first = {0, 1, 4, 5}, second = {2, 3, 6, 7};
            quad ab = __builtin_shuffle(a, b, low), cd = __builtin_shuffle(c, d, low);
            quad ef = __builtin_shuffle(a, b, high), gh = __builtin_shuffle(c, d, high);
            *(quad_unaligned *)to = __builtin_shuffle(ab, cd, first);
            *(quad_unaligned *)(to + y_pitch) = __builtin_shuffle(ab, cd, second);
            *(quad_unaligned *)(to + 2 * y_pitch) = __builtin_shuffle(ef, gh, first);
            *(quad_unaligned *)(to + 3 * y_pitch) = __builtin_shuffle(ef, gh, second);
        }
}

/* Converts a tile whose input is contiguous down the columns. It goes through a buffer, so that memory is only touched
 * along cache lines, however large and however round the strides. The buffer's pitch, no power of two, spreads its
 * columns over the cache's sets. */
static void transpose_tile(const void *context, const tile *t)
{
    const conversion *c = context;
    enum { PITCH = SQUARE + 4 };
    uint32_t buffer[SQUARE * PITCH];
    char *b = (char *)buffer;
    for (int64_t i = 0; i < t->columns; i++)
        c->row(b + i * PITCH * c->to, c->to, t->p[1] + i * t->column[1], t->row[1], t->rows);
    if (c->to == 4 && t->column[0] == 4) {
        transpose_4(t->p[0], t->row[0], b, PITCH * 4, t->rows, t->columns);
        return;
    }
    for (int64_t r = 0; r < t->rows; r++)
        c->move(t->p[0] + r * t->row[0], t->column[0], b + r * c->to, PITCH * c->to, t->columns);
}

/* Copies y = x between any strides and dtypes; a transposition in squares of 64 x 64. */
int VX_CPU(convert)(vx_tensor *y, vx_tensor *x)
{
    if (!y->numel) return VX_OK;
    conversion c = {convert_rows[y->dtype][x->dtype], convert_rows[y->dtype][y->dtype],
                    (int64_t)vx_dtype_bytes(y->dtype), (int64_t)vx_dtype_bytes(x->dtype)};
    walk w = walk_of(2, (const vx_tensor *const[]){y, x});
    if (walk_transpose(&w)) walk_run(&w, SQUARE, SQUARE, transpose_tile, &c);
    else walk_run_wide(&w, convert_tile, &c);
    return VX_OK;
}

/* -- binary -------------------------------------------------------------------------------------------------------- */

/* Returns a^b, a lane at a time. */
VX_INLINE vf power(vf a, vf b)
{
    vf y;
    for (int i = 0; i < VX_LANES; i++) y[i] = powf(a[i], b[i]);
    return y;
}

/* Returns a (kind) b; kind is a constant wherever this is inlined. */
VX_INLINE vf binary_vector(int kind, vf a, vf b)
{
    const vf one = vf_set1(1.0f), zero = vf_zero();
    switch (kind) {
    case VX_ADD: return a + b;
    case VX_SUB: return a - b;
    case VX_MUL: return a * b;
    case VX_DIV: return a / b;
    case VX_MAX: return vf_select(a != a, a, vf_max(a, b)); /* vf_max returns b where either is NaN */
    case VX_MIN: return vf_select(a != a, a, vf_min(a, b));
    case VX_EQ: return vf_select(a == b, one, zero);
    case VX_LT: return vf_select(a < b, one, zero);
    case VX_LE: return vf_select(a <= b, one, zero);
    default: return power(a, b);
    }
}

/* Works on one tile; a_step and b_step, constants 0 or 1, say whether the operand advances along a row. */
VX_INLINE void binary_rows(int kind, int a_step, int b_step, const tile *t)
{
    for (int64_t r = 0; r < t->rows; r++) {
        float *y = (float *)(t->p[0] + r * t->row[0]);
        const float *a = (const float *)(t->p[1] + r * t->row[1]), *b = (const float *)(t->p[2] + r * t->row[2]);
        const vf a0 = vf_set1(a_step ? 0.0f : a[0]), b0 = vf_set1(b_step ? 0.0f : b[0]);
        int64_t i = 0;
        for (; i + VX_LANES <= t->columns; i += VX_LANES)
            vf_store(y + i, binary_vector(kind, a_step ? vf_load(a + i) : a0, b_step ? vf_load(b + i) : b0));
        int n = (int)(t->columns - i);
        if (n)
            vf_store_n(y + i, binary_vector(kind, a_step ? vf_load_n(a + i, n) : a0, b_step ? vf_load_n(b + i, n) : b0),
                       n);
    }
}

/* Works on one tile whose operands are contiguous or constant along a row. */
static void binary_plain(int kind, const tile *t)
{
    bool a = t->column[1] != 0, b = t->column[2] != 0;
#define KIND(k)                                                                                                        \
    case k:                                                                                                            \
        if (a && b) binary_rows(k, 1, 1, t);                                                                           \
        else if (a) binary_rows(k, 1, 0, t);                                                                           \
        else if (b) binary_rows(k, 0, 1, t);                                                                           \
        else binary_rows(k, 0, 0, t);                                                                                  \
        break;
    switch (kind) {
        KIND(VX_ADD)
        KIND(VX_SUB)
        KIND(VX_MUL)
        KIND(VX_DIV)
        KIND(VX_MAX)
        KIND(VX_MIN)
        KIND(VX_EQ)
        KIND(VX_LT)
        KIND(VX_LE)
        KIND(VX_POW)
    }
#undef KIND
}

typedef struct binary {
    int kind;
    bool bf16[3]; /* the operands that are */
} binary;

/* Works on one tile. Operands with another stride along the row, or of bf16, are packed first, a row at a time. */
static void binary_tile(const void *context, const tile *t)
{
    const binary *c = context;
    const int64_t step = sizeof(float);
    bool odd[3];
    for (int k = 0; k < 3; k++) odd[k] = c->bf16[k] || (t->column[k] != step && t->column[k] != 0);
    if (!odd[0] && !odd[1] && !odd[2]) {
        binary_plain(c->kind, t);
        return;
    }
    float packed[3][TILE];
    for (int64_t r = 0; r < t->rows; r++) {
        tile one = *t;
        one.rows = 1;
        for (int k = 0; k < 3; k++) {
            one.p[k] = t->p[k] + r * t->row[k];
            if (!odd[k]) continue;
            char *at = (char *)packed[k];
            const int64_t count = t->column[k] ? t->columns : 1;
            if (k && c->bf16[k]) f32_bf16(at, step, one.p[k], t->column[k], count);
            else if (k) copy_4(at, step, one.p[k], t->column[k], count);
            one.p[k] = at;
            one.column[k] = t->column[k] ? step : 0;
        }
        binary_plain(c->kind, &one);
        if (odd[0]) bf16_f32(t->p[0] + r * t->row[0], t->column[0], one.p[0], step, t->columns);
    }
}

/* Computes y = a (kind) b. Bias add, per-row scale and scalars are tiles of two dimensions with a zero stride. */
int VX_CPU(binary)(vx_tensor *y, vx_tensor *a, vx_tensor *b, int kind)
{
    if (!y->numel) return VX_OK;
    const binary c = {kind, {y->dtype == VX_BF16, a->dtype == VX_BF16, b->dtype == VX_BF16}};
    walk w = walk_of(3, (const vx_tensor *const[]){y, a, b});
    walk_run_wide(&w, binary_tile, &c);
    return VX_OK;
}

/* -- where --------------------------------------------------------------------------------------------------------- */

/* Works on one tile. y is contiguous; the other operands advance by any number of bytes, 0 where they are constant
 * along a row. */
static void where_tile(const void *context, const tile *t)
{
    (void)context;
    const int64_t step = sizeof(float), cs = t->column[1], as = t->column[2], bs = t->column[3];
    for (int64_t r = 0; r < t->rows; r++) {
        float *restrict y = (float *)(t->p[0] + r * t->row[0]);
        const char *c = t->p[1] + r * t->row[1], *a = t->p[2] + r * t->row[2], *b = t->p[3] + r * t->row[3];
        if (cs == step && as == step && bs == step) {
            const float *condition = (const float *)c, *first = (const float *)a, *second = (const float *)b;
            for (int64_t i = 0; i < t->columns; i++) y[i] = condition[i] != 0.0f ? first[i] : second[i];
        } else {
            for (int64_t i = 0; i < t->columns; i++)
                y[i] = *(const float *)(*(const float *)(c + i * cs) != 0.0f ? a + i * as : b + i * bs);
        }
    }
}

/* Computes y = condition ? a : b; a condition that is NaN holds. */
int VX_CPU(where)(vx_tensor *y, vx_tensor *condition, vx_tensor *a, vx_tensor *b)
{
    if (!y->numel) return VX_OK;
    walk w = walk_of(4, (const vx_tensor *const[]){y, condition, a, b});
    walk_run_wide(&w, where_tile, 0);
    return VX_OK;
}

/* -- unary --------------------------------------------------------------------------------------------------------- */

/* Compute the gamma functions, a lane at a time in double: their recurrences cancel in float32. */
#define SPECIAL(name)                                                                                                  \
    static vf name##_vector(vf x)                                                                                      \
    {                                                                                                                  \
        for (int i = 0; i < VX_LANES; i++) x[i] = (float)special_##name(x[i]);                                         \
        return x;                                                                                                      \
    }
SPECIAL(lgamma)
SPECIAL(digamma)
SPECIAL(trigamma)
SPECIAL(tetragamma)
#undef SPECIAL

/* Returns the standard normal distribution function, the Phi of GELU(x) = x Phi(x). */
VX_INLINE vf normal_below(vf x) { return 0.5f + 0.5f * vf_erf(x * 0.70710678f); }

/* Rounds to an integer, halves to even, by the C library's function, which holds for every float; vf_round() is for
 * small ones. */
VX_INLINE vf round_vector(vf x)
{
    for (int i = 0; i < VX_LANES; i++) x[i] = rintf(x[i]);
    return x;
}
/* Rounds down to an integer. */
VX_INLINE vf floor_vector(vf x)
{
    for (int i = 0; i < VX_LANES; i++) x[i] = floorf(x[i]);
    return x;
}

/* Returns f(x); kind is a constant wherever this is inlined. */
VX_INLINE vf unary_vector(int kind, vf x, vf alpha, vf beta)
{
    const vf zero = vf_zero();
    switch (kind) {
    case VX_AFFINE: return alpha * x + beta;
    case VX_EXP: return vf_exp(x);
    case VX_LOG: return vf_log(x);
    case VX_SQRT: return vf_sqrt(x);
    case VX_ABS: return vf_abs(x);
    case VX_SQUARE: return x * x;
    case VX_RELU: return vf_max(zero, x);
    case VX_SILU: return x * vf_sigmoid(x);
    case VX_GELU: return x * normal_below(x);
    case VX_SIGMOID: return vf_sigmoid(x);
    case VX_TANH: return vf_tanh(x);
    case VX_CLAMP: return vf_min(beta, vf_max(alpha, x));
    case VX_ROUND: return round_vector(x);
    case VX_FLOOR: return floor_vector(x);
    case VX_SIGN: return vf_select(x > zero, vf_set1(1.0f), vf_select(x < zero, vf_set1(-1.0f), x));
    case VX_LGAMMA: return lgamma_vector(x);
    case VX_DIGAMMA: return digamma_vector(x);
    case VX_TRIGAMMA: return trigamma_vector(x);
    default: return power(x, alpha);
    }
}

/* Returns dx from dy and x or y = f(x), whichever of the two costs less. At a kink: ABS 0, RELU 0, CLAMP dy. */
VX_INLINE vf unary_backward_vector(int kind, vf dy, vf x, vf y, vf alpha, vf beta)
{
    const vf one = vf_set1(1.0f), zero = vf_zero();
    switch (kind) {
    case VX_AFFINE: return dy * alpha;
    case VX_EXP: return dy * y;
    case VX_LOG: return dy / x;
    case VX_SQRT: return dy * (0.5f / y);
    case VX_ABS: return dy * vf_select(x > zero, one, vf_select(x < zero, -one, x));
    case VX_SQUARE: return dy * (x + x);
    case VX_RELU: return vf_select(x > zero, dy, zero);
    case VX_SILU: {
        vf s = vf_sigmoid(x);
        return dy * (s + y * (one - s));
    }
    case VX_GELU: return dy * (normal_below(x) + x * (0.39894228f * vf_exp(-0.5f * x * x)));
    case VX_SIGMOID: return dy * (y * (one - y));
    case VX_TANH: return dy * (one - y * y);
    case VX_CLAMP: return vf_select((x >= alpha) & (x <= beta), dy, zero);
    case VX_ROUND:
    case VX_FLOOR:
    case VX_SIGN: return zero;
    case VX_LGAMMA: return dy * digamma_vector(x);
    case VX_DIGAMMA: return dy * trigamma_vector(x);
    case VX_TRIGAMMA: return dy * tetragamma_vector(x);
    default: /* of x^0, also at 0, it is 0 */
        return vf_select(alpha == zero, zero, dy * (alpha * power(x, alpha - one)));
    }
}

VX_INLINE void unary_span(int kind, float *y, const float *x, int64_t n, float alpha, float beta)
{
    const vf a = vf_set1(alpha), b = vf_set1(beta);
    int64_t i = 0;
    for (; i + VX_LANES <= n; i += VX_LANES) vf_store(y + i, unary_vector(kind, vf_load(x + i), a, b));
    int rest = (int)(n - i);
    if (rest) vf_store_n(y + i, unary_vector(kind, vf_load_n(x + i, rest), a, b), rest);
}

VX_INLINE void unary_backward_span(int kind, float *dx, const float *dy, const float *x, const float *y, int64_t n,
                                   float alpha, float beta)
{
    const vf a = vf_set1(alpha), b = vf_set1(beta);
    int64_t i = 0;
    for (; i + VX_LANES <= n; i += VX_LANES)
        vf_store(dx + i, unary_backward_vector(kind, vf_load(dy + i), vf_load(x + i), vf_load(y + i), a, b));
    int rest = (int)(n - i);
    if (rest)
        vf_store_n(
            dx + i,
            unary_backward_vector(kind, vf_load_n(dy + i, rest), vf_load_n(x + i, rest), vf_load_n(y + i, rest), a, b),
            rest);
}

/* Computes y = f(x); y may be x. */
int VX_CPU(unary)(vx_tensor *y, vx_tensor *x, int kind, float alpha, float beta)
{
    float *out = vx_f32(y);
    const float *in = vx_f32(x);
    int64_t n = y->numel;
#pragma omp parallel for schedule(static) if (n >= SERIAL)
    for (int64_t i = 0; i < n; i += TILE) {
        int64_t count = vx_min64(TILE, n - i);
        switch (kind) {
#define KIND(k)                                                                                                        \
    case VX_##k: unary_span(VX_##k, out + i, in + i, count, alpha, beta); break;
            VX_UNARY_LIST(KIND)
#undef KIND
        }
    }
    return VX_OK;
}

/* Computes dx = dy f'(x); dx may be dy, x or y. */
int VX_CPU(unary_backward)(vx_tensor *dx, vx_tensor *dy, vx_tensor *x, vx_tensor *y, int kind, float alpha, float beta)
{
    float *out = vx_f32(dx);
    const float *g = vx_f32(dy), *in = vx_f32(x), *value = vx_f32(y);
    int64_t n = dx->numel;
#pragma omp parallel for schedule(static) if (n >= SERIAL)
    for (int64_t i = 0; i < n; i += TILE) {
        int64_t count = vx_min64(TILE, n - i);
        switch (kind) {
#define KIND(k)                                                                                                        \
    case VX_##k: unary_backward_span(VX_##k, out + i, g + i, in + i, value + i, count, alpha, beta); break;
            VX_UNARY_LIST(KIND)
#undef KIND
        }
    }
    return VX_OK;
}
