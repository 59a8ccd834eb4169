/* random.cu: uniform, normal, dirichlet, permutation on CUDA: the numbers of random.c, which says how they are made.
 * Permutations are the same, the others to float32's rounding.
 *
 * Memory traffic: 4 bytes written per number. A thread makes the four numbers of one Philox block.
 */
#include "cuda/sort.cuh"

enum { BLOCK = 256 };

/* -- uniform, normal ----------------------------------------------------------------------------------------------- */

typedef struct distribution {
    int normal;
    float base, scale, least, most;
} distribution;

VX_DEVICE float uniform_of(const distribution &s, uint32_t word)
{
    return fminf(fmaxf(s.base + s.scale * vx_unit(word), s.least), s.most);
}

/* Makes two normal numbers of two words (Box-Muller). */
VX_DEVICE float2 two_normals(const distribution &s, uint32_t first, uint32_t second)
{
    float sine, cosine;
    sincospif(2.0f * vx_unit(second), &sine, &cosine);
    const float radius = s.scale * sqrtf(-2.0f * logf(vx_unit(first)));
    return make_float2(s.base + radius * cosine, s.base + radius * sine);
}

VX_KERNEL generate_kernel(float *x, int64_t n, bool fours, vx_random random, distribution s)
{
    const vx_draw draw = vx_draw_now(random);
    for (int64_t i = vx_first(); i < (n + 3) / 4; i += vx_step()) {
        const vx_philox4 r = vx_philox(draw.seed, draw.stream, (uint64_t)i);
        float4 value;
        if (s.normal) {
            const float2 a = two_normals(s, r.word[0], r.word[1]), b = two_normals(s, r.word[2], r.word[3]);
            value = make_float4(a.x, a.y, b.x, b.y);
        } else {
            value = make_float4(uniform_of(s, r.word[0]), uniform_of(s, r.word[1]), uniform_of(s, r.word[2]),
                                uniform_of(s, r.word[3]));
        }
        if (fours && 4 * i + 4 <= n) {
            ((float4 *)x)[i] = value;
        } else {
            x[4 * i] = value.x;
            if (4 * i + 1 < n) x[4 * i + 1] = value.y;
            if (4 * i + 2 < n) x[4 * i + 2] = value.z;
            if (4 * i + 3 < n) x[4 * i + 3] = value.w;
        }
    }
}

static int generate(vx_tensor *x, uint64_t seed, uint64_t stream, const distribution &s)
{
    const vx_random random = vx_draws(seed, stream);
    if (!x->numel) return VX_OK;
    VX_LAUNCH(generate_kernel, vx_grid(x->numel, 4 * BLOCK), BLOCK, 0, vx_f32(x), x->numel, vx_aligned(x, 16), random,
              s);
    return vx_status();
}

/* Fills x with uniform numbers of the open interval (low, high). */
int vx_cuda_uniform(vx_tensor *x, uint64_t seed, uint64_t stream, float low, float high)
{
    const float a = nextafterf(low, high), b = nextafterf(high, low);
    return generate(x, seed, stream, {0, low, high - low, fminf(a, b), fmaxf(a, b)});
}

/* Fills x with normal numbers. */
int vx_cuda_normal(vx_tensor *x, uint64_t seed, uint64_t stream, float mean, float deviation)
{
    return generate(x, seed, stream, {1, mean, deviation, 0, 0});
}

/* -- dirichlet ----------------------------------------------------------------------------------------------------- */

/* Returns the centre of one of 2^32 equal cells of (0, 1). */
VX_DEVICE double fine_unit(uint32_t word) { return (word + 0.5) * 0x1p-32; }

/* Returns ln of a gamma variable of shape alpha; see random.c. */
VX_DEVICE double log_gamma_variable(uint64_t seed, uint64_t stream, uint64_t element, double alpha)
{
    const double d = (alpha < 1 ? alpha + 1 : alpha) - 1. / 3, c = 1 / sqrt(9 * d);
    double boost = 0;
    for (uint64_t attempt = 0;; attempt++) {
        const vx_philox4 r = vx_philox(seed, stream, attempt << 40 | element);
        if (attempt == 0 && alpha < 1) boost = log(fine_unit(r.word[3])) / alpha;
        const double x = sqrt(-2 * log(fine_unit(r.word[0]))) * cos(2 * M_PI * fine_unit(r.word[1])), root = 1 + c * x;
        if (root <= 0) continue;
        const double log_v = 3 * log(root);
        if (log(fine_unit(r.word[2])) < 0.5 * x * x + d * (1 - root * root * root + log_v))
            return log(d) + log_v + boost;
    }
}

/* Draws g (N,M), logarithms of gamma variables. A concentration that is none counts as 1. */
VX_KERNEL gamma_kernel(double *g, const float *alpha, int64_t row, int64_t column, int64_t N, int64_t M,
                       vx_random random, vx_data_check bad)
{
    const vx_draw draw = vx_draw_now(random);
    for (int64_t i = vx_first(); i < N * M; i += vx_step()) {
        const int64_t n = i / M, m = i - n * M;
        float a = alpha[n * row + m * column];
        if (!(a > 0 && a < INFINITY)) {
            vx_report(bad, i);
            a = 1;
        }
        g[i] = log_gamma_variable(draw.seed, draw.stream, (uint64_t)i, a);
    }
}

/* Divides gamma variables by their sum, in logarithms until the end. A warp for each row. */
VX_KERNEL share_kernel(float *p, const double *g, int64_t N, int64_t M, int log_wanted)
{
    const int lane = threadIdx.x % 32;
    for (int64_t n = vx_first() / 32; n < N; n += vx_step() / 32) {
        const double *of = g + n * M;
        double most = -INFINITY, sum = 0;
        for (int64_t m = lane; m < M; m += 32) most = fmax(most, of[m]);
        for (int i = 16; i > 0; i >>= 1) most = fmax(most, __shfl_xor_sync(VX_ALL_LANES, most, i));
        for (int64_t m = lane; m < M; m += 32) sum += exp(of[m] - most);
        const double total = most + log(vx_warp_sum(sum));
        for (int64_t m = lane; m < M; m += 32) p[n * M + m] = (float)(log_wanted ? of[m] - total : exp(of[m] - total));
    }
}

/* Draws p[n] from Dirichlet(alpha[n]), or its logarithm. Working space: 8 N M bytes. */
int vx_cuda_dirichlet(vx_tensor *p, vx_tensor *alpha, uint64_t seed, uint64_t stream, int log_wanted)
{
    const int64_t N = p->shape[0], M = p->shape[1];
    const vx_random random = vx_draws(seed, stream);
    if (!N) return VX_OK;
    const vx_data_check bad =
        vx_data_check_of(VX_EINVAL, M, "row %%lld, concentration %%lld: expected a positive finite number");
    double *g = VX_SCRATCH(double, N *M);
    VX_LAUNCH(gamma_kernel, vx_grid(N * M, BLOCK), BLOCK, 0, g, vx_f32(alpha), alpha->stride[0], alpha->stride[1], N, M,
              random, bad);
    VX_LAUNCH(share_kernel, vx_grid(N * 32, BLOCK), BLOCK, 0, vx_f32(p), g, N, M, log_wanted);
    return vx_status();
}

/* -- permutation --------------------------------------------------------------------------------------------------- */

VX_KERNEL permutation_keys_kernel(unsigned long long *entries, int64_t n, vx_random random)
{
    const vx_draw draw = vx_draw_now(random);
    for (int64_t i = vx_first(); i < n; i += vx_step())
        entries[i] = vx_sort_entry(vx_philox(draw.seed, draw.stream, (uint64_t)i / 4).word[i % 4], (uint32_t)i);
}

VX_KERNEL permutation_kernel(int32_t *x, const unsigned long long *entries, int64_t n)
{
    for (int64_t i = vx_first(); i < n; i += vx_step()) x[i] = (int32_t)vx_sort_index(entries[i]);
}

/* Fills x with a random order of 0 .. N-1. Working space: 16 N bytes. */
int vx_cuda_permutation(vx_tensor *x, uint64_t seed, uint64_t stream)
{
    const int64_t n = x->numel;
    const vx_random random = vx_draws(seed, stream);
    if (!n) return VX_OK;
    vx_sort s = vx_sort_of(n, 32);
    VX_LAUNCH(permutation_keys_kernel, vx_grid(n, BLOCK), BLOCK, 0, s.entries, n, random);
    vx_sort_run(&s);
    VX_LAUNCH(permutation_kernel, vx_grid(n, BLOCK), BLOCK, 0, vx_i32(x), s.entries, n);
    return vx_status();
}
