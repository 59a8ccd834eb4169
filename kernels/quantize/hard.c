/* hard.c: hard vector quantization with an assigned code per row: output, losses, and the two gradient estimators
 * of [1].
 *
 * On the sphere (VX_COSINE) z and q stand for z/|z| and q/|q| throughout, and gradients return through that division.
 *     y_i = q_code(i)
 *     reg = 1/(N G) sum_i beta |z_i - sg(q)|^2 + |sg(z_i) - q|^2        (Eq. 10; over D as well under mean_reduction)
 *     VX_STE       dz = dy, and dq_code += dy where codebook_grad is 1   (Eq. 1, 2)
 *     VX_ROTATION  dz = lambda R' dy = lambda (dy - 2 r (r.dy) + 2 z^ (q^.dy)), with r = (q^ + z^)/|q^ + z^| and
 *                  lambda = |q|/|z|; lambda and R are constant (Eq. 3, 4); q gets nothing of dy
 * R is never formed. Norms under the rotation are at least 1e-6, so that an antipodal pair (q^ = -z^) gives a finite
 * result.
 *
 * Memory bound: z, dy, dz and the codes once. Sums are deterministic: reg over 64 ranges of rows in order, a code's
 * gradient over its rows in order (rows are sorted by code first).
 */
#include "cpu/indices.h"
#include "cpu/row_norms.h"
#include "cpu/scratch.h"

enum { RANGES = 64 };
#define ROTATION_GUARD 1e-6f

typedef struct hard_call {
    int64_t N, G, D, M;
    int metric, estimator, codebook_grad;
    float beta, dreg; /* dreg: of one squared difference, over 2 */
    const float *z, *codebook, *dy;
    const int32_t *codes;
} hard_call;

/* Returns what the row is divided by to come onto the sphere; 1 in the plane. */
static inline float divisor(const hard_call *c, const float *x)
{
    return c->metric == VX_COSINE ? (float)fmax(row_norm(x, c->D), GUARD) : 1;
}

/* Returns the code of row i (= n G + g). */
static inline const float *code_of(const hard_call *c, int64_t i)
{
    return c->codebook + (i % c->G * c->M + c->codes[i]) * c->D;
}

/* Computes y (N,G,D) and reg (1) from z (N,G,D), codebook (G,M,D) and codes (N,G). */
int VX_CPU(hard_forward)(vx_tensor *y, vx_tensor *reg, vx_tensor *z, vx_tensor *codebook, vx_tensor *codes, int metric,
                         float beta, int mean_reduction)
{
    hard_call c = {
        .N = z->shape[0],
        .G = z->shape[1],
        .D = z->shape[2],
        .M = codebook->shape[1],
        .metric = metric,
        .z = vx_f32(z),
        .codebook = vx_f32(codebook),
        .codes = vx_i32(codes),
    };
    int status = check_indices("hard_forward", "code", c.codes, c.N, c.G, c.M);
    if (status) return status;
    const int64_t rows = c.N * c.G;
    double partial[RANGES], sum = 0;
#pragma omp parallel for schedule(static)
    for (int r = 0; r < RANGES; r++) {
        partial[r] = 0;
        for (int64_t i = rows * r / RANGES; i < rows * (r + 1) / RANGES; i++) {
            const float *x = c.z + i * c.D, *q = code_of(&c, i);
            float *out = vx_f32(y) + i * c.D, from_x = 1 / divisor(&c, x), from_q = 1 / divisor(&c, q), squares = 0;
            for (int64_t d = 0; d < c.D; d++) {
                float code = q[d] * from_q, difference = x[d] * from_x - code;
                out[d] = code;
                squares += difference * difference;
            }
            partial[r] += squares;
        }
    }
    for (int r = 0; r < RANGES; r++) sum += partial[r];
    vx_f32(reg)[0] = (float)((1 + (double)beta) * sum / (double)rows / (double)(mean_reduction ? c.D : 1));
    return VX_OK;
}

/* Computes g = lambda R' dy for unit vectors u = z^, v = q^. */
static void rotate_back(float *g, const float *dy, const float *u, const float *v, float lambda, int64_t D)
{
    float squares = 0, along_r = 0, along_v = 0;
    for (int64_t d = 0; d < D; d++) {
        float r = u[d] + v[d];
        squares += r * r;
        along_r += r * dy[d];
        along_v += v[d] * dy[d];
    }
    float norm = fmaxf(sqrtf(squares), ROTATION_GUARD);
    float of_r = 2 * along_r / (norm * norm);
    for (int64_t d = 0; d < D; d++) g[d] = lambda * (dy[d] - of_r * (u[d] + v[d]) + 2 * u[d] * along_v);
}

/* Takes g back through the division by the norm, in place: (I - u u') g / divided, u = x / divided. Of a single number,
 * which is 1 or -1 there, nothing is left: not the rounding of g - u u g over a small norm. */
static void leave_sphere(float *g, const float *x, float divided, int64_t D)
{
    float along = 0;
    for (int64_t d = 0; d < D; d++) along += g[d] * x[d] / divided;
    if (divided <= (float)GUARD) along = 0; /* the guard is a constant */
    const float share = D == 1 && divided > (float)GUARD ? 0 : 1 / divided;
    for (int64_t d = 0; d < D; d++) g[d] = (g[d] - along * (x[d] / divided)) * share;
}

/* Computes dz of row i (= n G + g); u, v: working space of D elements. */
static void row_backward(const hard_call *c, int64_t i, float *dz, float *u, float *v)
{
    const int64_t D = c->D;
    const float *z = c->z + i * D, *q = code_of(c, i), *dy = c->dy + i * D;
    float from_z = 1 / divisor(c, z), from_q = 1 / divisor(c, q);
    if (c->estimator == VX_ROTATION) {
        float norm_z = fmaxf((float)row_norm(z, D), ROTATION_GUARD),
              norm_q = fmaxf((float)row_norm(q, D), ROTATION_GUARD);
        for (int64_t d = 0; d < D; d++) u[d] = z[d] / norm_z, v[d] = q[d] / norm_q;
        rotate_back(dz, dy, u, v, c->metric == VX_COSINE ? 1 : norm_q / norm_z, D);
    } else memcpy(dz, dy, sizeof(float) * (size_t)D);
    for (int64_t d = 0; d < D; d++) dz[d] += 2 * c->beta * c->dreg * (z[d] * from_z - q[d] * from_q);
    if (c->metric == VX_COSINE) leave_sphere(dz, z, 1 / from_z, D);
}

/* Computes dq of one code from its rows, order[0] .. order[count - 1]. */
static void code_backward(const hard_call *c, int64_t g, const float *q, const int32_t *order, int32_t count, float *dq)
{
    const int64_t D = c->D;
    float from_q = 1 / divisor(c, q);
    memset(dq, 0, sizeof(float) * (size_t)D);
    for (int32_t j = 0; j < count; j++) {
        int64_t i = (int64_t)order[j] * c->G + g;
        const float *z = c->z + i * D, *dy = c->dy + i * D;
        float from_z = 1 / divisor(c, z), through = c->estimator == VX_STE && c->codebook_grad ? 1 : 0;
        for (int64_t d = 0; d < D; d++) dq[d] += through * dy[d] + 2 * c->dreg * (q[d] * from_q - z[d] * from_z);
    }
    if (c->metric == VX_COSINE) leave_sphere(dq, q, 1 / from_q, D);
}

/* Computes dz (N,G,D) and dcodebook (G,M,D). */
int VX_CPU(hard_backward)(vx_tensor *dz, vx_tensor *dcodebook, vx_tensor *dy, vx_tensor *dreg, vx_tensor *z,
                          vx_tensor *codebook, vx_tensor *codes, int estimator, int metric, float beta,
                          int mean_reduction, int codebook_grad)
{
    hard_call c = {
        .N = z->shape[0],
        .G = z->shape[1],
        .D = z->shape[2],
        .M = codebook->shape[1],
        .metric = metric,
        .estimator = estimator,
        .codebook_grad = codebook_grad,
        .beta = beta,
        .z = vx_f32(z),
        .codebook = vx_f32(codebook),
        .dy = vx_f32(dy),
        .codes = vx_i32(codes),
    };
    c.dreg = vx_f32(dreg)[0] / (float)(c.N * c.G) / (float)(mean_reduction ? c.D : 1);
    int status = check_indices("hard_backward", "code", c.codes, c.N, c.G, c.M);
    if (status) return status;
    int32_t *order = 0, *start = 0;
    scratch memory = {.op = "hard_backward"};
    while (scratch_pass(&memory)) {
        order = carve_i32(&memory, c.N);
        start = carve_i32(&memory, c.M + 1);
    }
    if (!memory.base) return VX_ENOMEM;
    for (int64_t g = 0; g < c.G; g++) {
        counting_sort(c.codes + g, c.G, c.N, c.M, order, start);
#pragma omp parallel
        {
            float u[c.D + 1], v[c.D + 1]; /* D may be 0, an array's size may not */
#pragma omp for schedule(static)
            for (int64_t n = 0; n < c.N; n++) row_backward(&c, n * c.G + g, vx_f32(dz) + (n * c.G + g) * c.D, u, v);
#pragma omp for schedule(dynamic, 16)
            for (int64_t m = 0; m < c.M; m++)
                code_backward(&c, g, c.codebook + (g * c.M + m) * c.D, order + start[m], start[m + 1] - start[m],
                              vx_f32(dcodebook) + (g * c.M + m) * c.D);
        }
    }
    scratch_free(&memory);
    return VX_OK;
}
