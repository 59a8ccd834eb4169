/* assign.c: index of the nearest code, for every row of z and every group, without an N x M array.
 *
 *     VX_EUCLID  argmin_m |z - q_m|^2 = argmax_m <z, q_m> - |q_m|^2 / 2
 *     VX_COSINE  argmax_m <z, q_m> / (|z| |q_m|)
 *
 * Both are one product whose columns start from an offset, and an argmax that stays in registers: tiles of 64 codes (4
 * vectors of 16 lanes) against 6 rows, 24 rows per visit of a tile. The codes are laid out once as (tiles, D, 64), so
 * that a tile's column is a vector load. Ties, including two equal codes, go to the lower index: lanes keep the first
 * of equals, and the lowest of equal lanes wins.
 *
 * Cost: 2 N M D flops and 3 operations per score. Memory traffic: z once, the codes once per thread as long as a tile's
 * rows fit the L2 cache. Working space: M (D + 1) floats, shared. Bound by the FMA units for D >= 16, by the argmax for
 * D = 3.
 *
 * Accuracy: a score is a float32 sum, so of two codes whose distances differ by less than about D 2^-23 (|z| |q| +
 * |q|^2 / 2) either may be named; with small integers every score is exact. A row or code with NaN or Inf is an error
 * and nothing is written.
 */
#include <omp.h>

#include "cpu/row_norms.h"
#include "cpu/row_tile.h"
#include "cpu/scratch.h"

#if VX_LANES == 16
enum { TILE_ROWS = 6, VECTORS = 4 };
#else
enum { TILE_ROWS = 6, VECTORS = 2 };
#endif
enum {
    TILE_CODES = VECTORS * VX_LANES,
    BLOCK_ROWS = 4 * TILE_ROWS /* rows that pass a tile while it is in the L1 cache */
};

typedef struct assign_call {
    int64_t N, G, D, M, tiles;
    int metric;
    const float *z, *codebook;
    const float *norms; /* (N,G) |z| */
    float *columns;     /* (tiles, D, TILE_CODES) */
    float *offset;      /* (tiles, TILE_CODES) what a code's score starts from */
    int32_t *codes;
} assign_call;

/* Lays out group g's codes. All threads of a parallel region call it together. */
static void fill_columns(const assign_call *c, int64_t g)
{
#pragma omp for schedule(static)
    for (int64_t m = 0; m < c->tiles * TILE_CODES; m++) {
        const float *q = c->codebook + (g * c->M + m) * c->D;
        float *column = c->columns + m / TILE_CODES * TILE_CODES * c->D + m % TILE_CODES;
        int real = m < c->M;
        double norm = real ? row_norm(q, c->D) : 0;
        double divided = c->metric == VX_COSINE ? fmax(norm, GUARD) : 1; /* so that q and 2q are equal on the sphere */
        for (int64_t d = 0; d < c->D; d++) column[d * TILE_CODES] = real ? (float)(q[d] / divided) : 0;
        c->offset[m] = !real ? -INFINITY : c->metric == VX_COSINE ? 0 : (float)(-0.5 * norm * norm);
    }
}

/* The best score of each row so far, lane by lane, and its code. */
typedef struct assign_best {
    vf score[BLOCK_ROWS];
    vi code[BLOCK_ROWS];
} assign_best;

/* Lets rows i .. i + TILE_ROWS - 1 of a (BLOCK_ROWS, D) meet a tile. */
static void meet_tile(const assign_call *c, const float *a, assign_best *best, int i, int64_t tile)
{
    const float *offset = c->offset + tile * TILE_CODES;
    vf score[12][4];
    vi lane;
    for (int l = 0; l < VX_LANES; l++) lane[l] = l;
    lane += (int32_t)(tile * TILE_CODES);
#pragma GCC unroll 6
    for (int r = 0; r < TILE_ROWS; r++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) score[r][v] = vf_load(offset + v * VX_LANES);
    tile_product(TILE_ROWS, VECTORS, score, a + i * c->D, c->D, 1, c->columns + tile * TILE_CODES * c->D, TILE_CODES,
                 c->D);
#pragma GCC unroll 6
    for (int r = 0; r < TILE_ROWS; r++) {
        vf most = best->score[i + r];
        vi code = best->code[i + r];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) {
            code = vi_where_greater(score[r][v], most, lane + v * VX_LANES, code);
            most = vf_max(score[r][v], most);
        }
        best->score[i + r] = most;
        best->code[i + r] = code;
    }
}

/* Returns the lowest code among the lanes with the largest score. */
static inline int32_t best_code(const assign_best *best, int i)
{
    float score[VX_LANES];
    int32_t code[VX_LANES];
    memcpy(score, &best->score[i], sizeof score);
    memcpy(code, &best->code[i], sizeof code);
    int at = 0;
    for (int l = 1; l < VX_LANES; l++)
        if (score[l] > score[at] || (score[l] == score[at] && code[l] < code[at])) at = l;
    return code[at];
}

/* Finds the codes of BLOCK_ROWS rows from row `first` on; a: working space (BLOCK_ROWS, D). */
static void assign_block(const assign_call *c, int64_t g, int64_t first, float *a)
{
    const int rows = (int)vx_min64(BLOCK_ROWS, c->N - first);
    assign_best best;
    for (int i = 0; i < BLOCK_ROWS; i++) {
        int64_t row = (first + (i < rows ? i : 0)) * c->G + g;
        float divided = c->metric == VX_COSINE ? c->norms[row] : 1;
        for (int64_t d = 0; d < c->D; d++) a[i * c->D + d] = c->z[row * c->D + d] / divided;
        best.score[i] = vf_set1(-INFINITY);
        best.code[i] = (vi){0};
    }
    for (int64_t tile = 0; tile < c->tiles; tile++)
        for (int i = 0; i < rows; i += TILE_ROWS) meet_tile(c, a, &best, i, tile);
    for (int i = 0; i < rows; i++) c->codes[(first + i) * c->G + g] = best_code(&best, i);
}

/* Finds codes (N,G), the nearest of codebook (G,M,D) for each row of z (N,G,D). */
int VX_CPU(assign)(vx_tensor *codes, vx_tensor *z, vx_tensor *codebook, int metric)
{
    assign_call c = {
        .N = z->shape[0],
        .G = z->shape[1],
        .D = z->shape[2],
        .M = codebook->shape[1],
        .metric = metric,
        .z = vx_f32(z),
        .codebook = vx_f32(codebook),
        .codes = vx_i32(codes),
    };
    c.tiles = vx_ceil_div(c.M, TILE_CODES);
    const int64_t rows = c.N * c.G, block = BLOCK_ROWS * c.D;
    float *norms = 0, *blocks = 0;
    scratch memory = {.op = "assign"};
    while (scratch_pass(&memory)) {
        c.columns = carve_f32(&memory, c.tiles * TILE_CODES * c.D);
        c.offset = carve_f32(&memory, c.tiles * TILE_CODES);
        norms = carve_f32(&memory, rows);
        blocks = carve_f32(&memory, block * omp_get_max_threads());
    }
    if (!memory.base) return VX_ENOMEM;
    c.norms = norms;

    int64_t bad = first_nonfinite(c.codebook, c.G * c.M, c.D, 0), bad_row = first_nonfinite(c.z, rows, c.D, norms);
    if (bad >= 0 || bad_row >= 0) {
        scratch_free(&memory);
        if (bad >= 0)
            return vx_fail(VX_ENONFINITE, "assign: code %lld of group %lld of the codebook holds a NaN or Inf",
                           (long long)(bad % c.M), (long long)(bad / c.M));
        return vx_fail(VX_ENONFINITE, "assign: row %lld of z holds a NaN or Inf (group %lld)",
                       (long long)(bad_row / c.G), (long long)(bad_row % c.G));
    }
    for (int64_t g = 0; g < c.G; g++) {
#pragma omp parallel
        {
            fill_columns(&c, g);
#pragma omp for schedule(static)
            for (int64_t first = 0; first < c.N; first += BLOCK_ROWS)
                assign_block(&c, g, first, blocks + block * omp_get_thread_num());
        }
    }
    scratch_free(&memory);
    return VX_OK;
}
