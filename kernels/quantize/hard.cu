/* hard.cu: hard vector quantization on CUDA with an assigned code per row; the formulas are in hard.c, whose names
 * these are.
 *
 * Rows have 1 .. 32 lanes each, by D. Memory bound: z, dy, dz and the codes once, what a row reads twice coming from
 * the cache. Sums are deterministic: reg over blocks in order, a code's gradient over its rows sorted by code
 * (sort.cuh). A code outside 0 .. M-1 is reported late; its row gets NaN.
 */
#include "cuda/reduce_parts.cuh"
#include "cuda/sort.cuh"
#include "shared/constants.h"

enum { BLOCK = 256, MOST_BLOCKS = 2048 };

#define ROTATION_GUARD 1e-6f

typedef struct hard_call {
    int64_t N, G, D, M;
    int lanes;
    int metric, estimator, codebook_grad;
    float beta, scale; /* scale: of dreg, per squared difference */
    const float *z, *codebook, *dy, *dreg;
    const int32_t *codes;
    float *from_z, *from_q; /* under VX_COSINE (N,G) and (G,M): 1 over the norm */
} hard_call;

/* Returns the sum of x^2, in double, over the lanes of a row. All lanes of the warp take part. */
VX_DEVICE double row_squares(const float *x, int64_t D, int at, int lanes)
{
    double sum = 0;
    for (int64_t d = at; d < D; d += lanes) sum += (double)x[d] * x[d];
    return vx_lanes_sum(sum, lanes);
}

VX_DEVICE float guarded(double squares) { return (float)fmax(sqrt(squares), GUARD); }

/* Returns the code of row i = n G + g, or -1 where it has none; thread `at` 0 of a row reports it. */
VX_DEVICE int32_t code_at(const hard_call &c, int64_t i, bool real, vx_data_check outside, int at)
{
    if (!real) return -1;
    const int32_t code = c.codes[i];
    if (code >= 0 && code < c.M) return code;
    if (at == 0) vx_report(outside, i);
    return -1;
}

VX_KERNEL VX_HOT __launch_bounds__(BLOCK)
    hard_forward_kernel(float *y, double *partial, hard_call c, vx_data_check outside)
{
    __shared__ double shared[32];
    const int at = threadIdx.x % c.lanes, groups = BLOCK / c.lanes;
    const int64_t rows = c.N * c.G;
    double total = 0;
    for (int64_t first = (int64_t)blockIdx.x * groups; first < rows; first += (int64_t)gridDim.x * groups) {
        const int64_t i = first + threadIdx.x / c.lanes;
        const int32_t code = code_at(c, i, i < rows, outside, at);
        const int64_t D = code >= 0 ? c.D : 0;
        const float *x = c.z + i * c.D, *q = c.codebook + (i % c.G * c.M + code) * c.D;
        float from_x = 1, from_q = 1, squares = 0;
        if (c.metric == VX_COSINE) {
            from_x = 1 / guarded(row_squares(x, D, at, c.lanes));
            from_q = 1 / guarded(row_squares(q, D, at, c.lanes));
        }
        for (int64_t d = at; d < D; d += c.lanes) {
            const float on = q[d] * from_q, difference = x[d] * from_x - on;
            y[i * c.D + d] = on;
            squares += difference * difference;
        }
        if (i < rows && code < 0)
            for (int64_t d = at; d < c.D; d += c.lanes) y[i * c.D + d] = NAN;
        total += squares;
    }
    total = vx_block_sum(total, shared);
    if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

static hard_call call_of(const vx_tensor *z, const vx_tensor *codebook, const vx_tensor *codes, int metric, float beta)
{
    hard_call c = {};
    c.N = z->shape[0], c.G = z->shape[1], c.D = z->shape[2], c.M = codebook->shape[1];
    c.lanes = vx_lanes_for(c.D);
    c.metric = metric, c.beta = beta;
    c.z = vx_f32(z), c.codebook = vx_f32(codebook), c.codes = vx_i32(codes);
    return c;
}

static vx_data_check outside_of(const hard_call *c)
{
    return vx_data_check_of(VX_EINVAL, c->G, "row %%lld has a code outside 0 .. %lld (group %%lld)",
                            (long long)c->M - 1);
}

/* Returns the blocks for the rows: their number depends on the sizes alone. */
static unsigned row_blocks(const hard_call *c, int64_t rows)
{
    return (unsigned)vx_max64(1, vx_min64(vx_ceil_div(rows, BLOCK / c->lanes), MOST_BLOCKS));
}

int vx_cuda_hard_forward(vx_tensor *y, vx_tensor *reg, vx_tensor *z, vx_tensor *codebook, vx_tensor *codes, int metric,
                         float beta, int mean_reduction)
{
    const hard_call c = call_of(z, codebook, codes, metric, beta);
    const int64_t rows = c.N * c.G;
    const unsigned blocks = row_blocks(&c, rows);
    double *partial = VX_SCRATCH(double, blocks);
    VX_LAUNCH(hard_forward_kernel, blocks, BLOCK, 0, vx_f32(y), partial, c, outside_of(&c));
    vx_add_blocks(vx_f32(reg), partial, blocks, 1 + (double)beta, (double)rows * (double)(mean_reduction ? c.D : 1));
    return vx_status();
}

/* Makes from_q = 1 over the norm of each code. A warp for each. */
VX_KERNEL code_norms_kernel(float *from_q, const float *codebook, int64_t codes, int64_t D)
{
    for (int64_t m = vx_first() / 32; m < codes; m += vx_step() / 32) {
        const float norm = guarded(row_squares(codebook + m * D, D, threadIdx.x % 32, 32));
        if (threadIdx.x % 32 == 0) from_q[m] = 1 / norm;
    }
}

/* Returns what (I - u u') g is multiplied by: 1 over the norm; 0 for a single number, whose u u' is 1. */
VX_DEVICE float share_of(float divided, int64_t D) { return D == 1 && divided > (float)GUARD ? 0 : 1 / divided; }

/* Makes dz and from_z. dz holds the gradient on the sphere while a row's projection is summed: each element is read
 * again by the thread that wrote it. */
VX_KERNEL VX_HOT __launch_bounds__(BLOCK) hard_rows_kernel(float *dz, hard_call c, vx_data_check outside)
{
    const int at = threadIdx.x % c.lanes, groups = BLOCK / c.lanes;
    const int64_t rows = c.N * c.G;
    const float pull = 2 * c.beta * (*c.dreg * c.scale);
    for (int64_t first = (int64_t)blockIdx.x * groups; first < rows; first += (int64_t)gridDim.x * groups) {
        const int64_t i = first + threadIdx.x / c.lanes;
        const int32_t code = code_at(c, i, i < rows, outside, at);
        const int64_t D = code >= 0 ? c.D : 0, g = i % c.G;
        const float *z = c.z + i * c.D, *q = c.codebook + (g * c.M + code) * c.D, *dy = c.dy + i * c.D;
        float *out = dz + i * c.D;
        double z_squares = 0, q_squares = 0;
        if (c.metric == VX_COSINE || c.estimator == VX_ROTATION) z_squares = row_squares(z, D, at, c.lanes);
        if (c.estimator == VX_ROTATION) q_squares = row_squares(q, D, at, c.lanes);
        const float divided = c.metric == VX_COSINE ? guarded(z_squares) : 1, from_z = 1 / divided;
        const float from_q = c.metric == VX_COSINE && D ? c.from_q[g * c.M + code] : 1;
        if (c.metric == VX_COSINE && i < rows && at == 0) c.from_z[i] = from_z;
        float lambda = 1, norm_z = 1, norm_q = 1, of_r = 0, along_v = 0;
        if (c.estimator == VX_ROTATION) { /* lambda (dy - 2 r (r.dy) + 2 z^ (q^.dy)) */
            norm_z = fmaxf((float)sqrt(z_squares), ROTATION_GUARD);
            norm_q = fmaxf((float)sqrt(q_squares), ROTATION_GUARD);
            lambda = c.metric == VX_COSINE ? 1 : norm_q / norm_z;
            float squares = 0, along_r = 0;
            for (int64_t d = at; d < D; d += c.lanes) {
                const float v = q[d] / norm_q, r = z[d] / norm_z + v;
                squares += r * r;
                along_r += r * dy[d];
                along_v += v * dy[d];
            }
            const float norm = fmaxf(sqrtf((float)vx_lanes_sum((double)squares, c.lanes)), ROTATION_GUARD);
            of_r = 2 * (float)vx_lanes_sum((double)along_r, c.lanes) / (norm * norm);
            along_v = (float)vx_lanes_sum((double)along_v, c.lanes);
        }
        float along = 0;
        for (int64_t d = at; d < D; d += c.lanes) {
            float x = dy[d];
            if (c.estimator == VX_ROTATION) {
                const float u = z[d] / norm_z;
                x = lambda * (x - of_r * (u + q[d] / norm_q) + 2 * u * along_v);
            }
            x += pull * (z[d] * from_z - q[d] * from_q);
            along += x * z[d] / divided;
            out[d] = x;
        }
        if (c.metric == VX_COSINE) { /* (I - u u') / |z|; where the guard divides, it is a constant */
            along = (float)vx_lanes_sum((double)along, c.lanes);
            if (divided <= (float)GUARD) along = 0;
            const float share = share_of(divided, D);
            for (int64_t d = at; d < D; d += c.lanes) out[d] = (out[d] - along * (z[d] / divided)) * share;
        }
        if (i < rows && code < 0)
            for (int64_t d = at; d < c.D; d += c.lanes) out[d] = NAN;
    }
}

/* Writes the keys g M + code of the rows n G + g; G M for a code outside. */
VX_KERNEL code_keys_kernel(unsigned long long *entries, hard_call c)
{
    for (int64_t i = vx_first(); i < c.N * c.G; i += vx_step()) {
        const int32_t code = c.codes[i];
        const int64_t key = code >= 0 && code < c.M ? i % c.G * c.M + code : c.G * c.M;
        entries[i] = vx_sort_entry((uint32_t)key, (uint32_t)i);
    }
}

/* What row i adds to the gradient of its code (on the sphere). */
struct code_term {
    hard_call c;
    VX_INSIDE float operator()(uint32_t key, uint32_t i, int64_t d) const
    {
        const float from_q = c.from_q ? c.from_q[key] : 1, from_z = c.from_z ? c.from_z[i] : 1;
        const float pull = 2 * (*c.dreg * c.scale) * (c.codebook[key * c.D + d] * from_q - c.z[i * c.D + d] * from_z);
        return c.estimator == VX_STE && c.codebook_grad ? c.dy[i * c.D + d] + pull : pull;
    }
};

/* Carries the codes' gradients back through the division by their norms, in place. A warp for each code. */
VX_KERNEL hard_codes_kernel(float *dcodebook, hard_call c)
{
    const int lane = threadIdx.x % 32;
    for (int64_t m = vx_first() / 32; m < c.G * c.M; m += vx_step() / 32) {
        const float *q = c.codebook + m * c.D, divided = 1 / c.from_q[m];
        float *dq = dcodebook + m * c.D, along = 0;
        for (int64_t d = lane; d < c.D; d += 32) along += dq[d] * q[d] / divided;
        along = vx_warp_sum(along);
        if (divided <= (float)GUARD) along = 0;
        const float share = share_of(divided, c.D);
        for (int64_t d = lane; d < c.D; d += 32) dq[d] = (dq[d] - along * (q[d] / divided)) * share;
    }
}

/* Working space: 16 bytes a row, and a 32nd of z. */
int vx_cuda_hard_backward(vx_tensor *dz, vx_tensor *dcodebook, vx_tensor *dy, vx_tensor *dreg, vx_tensor *z,
                          vx_tensor *codebook, vx_tensor *codes, int estimator, int metric, float beta,
                          int mean_reduction, int codebook_grad)
{
    hard_call c = call_of(z, codebook, codes, metric, beta);
    const int64_t rows = c.N * c.G, keys = c.G * c.M;
    if (keys >= INT32_MAX)
        return vx_fail(VX_EINVAL, "hard_backward: %lld codes in all, of at most 2^31 - 2", (long long)keys);
    c.estimator = estimator, c.codebook_grad = codebook_grad;
    c.dy = vx_f32(dy), c.dreg = vx_f32(dreg);
    c.scale = (float)(1.0 / ((double)rows * (double)(mean_reduction ? c.D : 1)));
    if (metric == VX_COSINE) c.from_z = VX_SCRATCH(float, rows), c.from_q = VX_SCRATCH(float, keys);
    vx_sort s = vx_sort_of(rows, vx_sort_bits(keys + 1));
    float *partial = VX_SCRATCH(float, vx_pieces_partial(rows, c.D));
    if (metric == VX_COSINE)
        VX_LAUNCH(code_norms_kernel, vx_grid(keys * 32, BLOCK), BLOCK, 0, c.from_q, c.codebook, keys, c.D);
    VX_LAUNCH(hard_rows_kernel, vx_grid(rows, BLOCK / c.lanes), BLOCK, 0, vx_f32(dz), c, outside_of(&c));
    VX_LAUNCH(code_keys_kernel, vx_grid(rows, BLOCK), BLOCK, 0, s.entries, c);
    vx_sort_run(&s);
    VX_CUDA(cudaMemsetAsync(dcodebook->data, 0, sizeof(float) * (size_t)dcodebook->numel, vx_stream()));
    vx_sum_pieces(vx_pieces{s.entries, rows, keys, c.D, vx_f32(dcodebook), partial}, code_term{c});
    if (metric == VX_COSINE) VX_LAUNCH(hard_codes_kernel, vx_grid(keys * 32, BLOCK), BLOCK, 0, vx_f32(dcodebook), c);
    return vx_status();
}
