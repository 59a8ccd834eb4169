/* assign.c: index of the nearest code, for every row of z and every group, without an N x M array.
 *
 *     VX_EUCLID  argmin_m |z - q_m|^2 = argmax_m <z, q_m> - |q_m|^2 / 2
 *     VX_COSINE  argmax_m <z, q_m> / (|z| |q_m|)
 *
 * Both are one product whose columns start from an offset. There are two ways through the codes, of which a look at a
 * few rows chooses; both compute a score by the same operations in the same order, so that they give the same codes.
 * (Where scores are products of AMX tiles, which round otherwise, all codes are met: cpu/amx.h.)
 *
 * All codes. An argmax that stays in registers: tiles of 64 codes (4 vectors of 16 lanes) against 6 rows, 24 rows per
 * visit of a tile. The codes are laid out once as (tiles, D, 64), so that a tile's column is a vector load. Ties,
 * including two equal codes, go to the lower index: lanes keep the first of equals, and the lowest of equal lanes wins.
 *
 * Near cells (cells.h). A row meets the cell whose box is nearest, and then only those that may hold as large a score
 * as it has found.
 *
 * Whose score is within rounding of the largest (2 E below) is compared in double, by differences under VX_EUCLID; of
 * equals the lower index wins. Among all codes a row keeps its second largest score too, and where that is as near, it
 * meets all codes again to find them; by cells they are looked at when they are met.
 *
 * The bound. With offset o_m, row a and column q_m as they are in float32, the score s_m = o_m + <a, q_m> in exact
 * arithmetic is (|a|^2 + 2 o_m + |q_m|^2 - |a - q_m|^2) / 2. Let B be the largest 2 o_m + |q_m|^2 of all codes, which
 * is about 0 for VX_EUCLID and 1 for VX_COSINE, and C the largest |q_m|. A computed score takes at most 2 D roundings
 * of partial sums that are at most |a| C + C^2 / 2 (2^-24 of that each; under VX_COSINE |a| C), and the numbers of a
 * and q are rounded to the frame, so it is within E = 3 (D + 4) 2^-24 (|a| C + C^2 / 2) + 2^-23 (|a| + C)^2 of s_m;
 * likewise |a|^2, within 2 (D + 4) 2^-24 |a|^2. So no code that is farther from a than R, R^2 = |a|^2 (1 + 2 (D + 4)
 * 2^-24) + B + 2 E - 2 least, has a computed score as large as `least`, 2 E below what the row has found already.
 * Products that vanish are in the 2^-100 of limit_of(). Scores must not overflow: where rows or codes are longer than
 * LARGEST, all codes are met.
 *
 * Cost: all codes, 2 N M D flops and 3 operations per score, bound by the FMA units for D >= 16, by the argmax for D =
 * 3; memory traffic: z once, the codes once per thread as long as a tile's rows fit the L2 cache. Near cells: about
 * what some hundred codes a row take, and M log2(M / 64) steps for the cells. Working space: M (D + 1) floats, shared,
 * and 2 M (D + 3) more where cells are tried.
 *
 * Accuracy: under VX_EUCLID rows and codes are moved to the middle of the codes and scaled first (frame.h), and what is
 * said above of q and a is said of them there. The code is the nearest in double, also of codes in clusters, at any
 * distance from the others. Where a look at a few codes tells that most are crowded so, all scores are -|z - q|^2 of
 * differences, as in knn.c, at twice the operations. A row or code with NaN or Inf is an error and nothing is written.
 */
#include <float.h>
#include <omp.h>

#include "cells.h"
#include "frame.h"
#include "cpu/amx.h"
#include "cpu/row_tile.h"

#if VX_LANES == 16
enum { TILE_ROWS = 6, VECTORS = 4 };
#else
enum { TILE_ROWS = 6, VECTORS = 2 };
#endif
enum {
    TILE_CODES = VECTORS * VX_LANES,
    /* rows that pass a tile while it is in the L1 cache, and that a trial takes; whole AMX tiles */
    BLOCK_ROWS = VX_AMX ? 48 : 4 * TILE_ROWS,
    PANEL = 64, /* codes that meet rows in AMX tiles */
    FEW = 8,    /* dimensions in which cells are small in any case */
    LOOKS = 3,  /* codes whose nearest neighbours are looked for */
};

#define LARGEST 1e15 /* norm of rows and codes whose scores are surely finite */

typedef struct assign_call {
    int64_t N, G, D, M, tiles;
    int metric;
    const float *z, *codebook;
    const float *norms; /* (N,G) |z| */
    float *columns;     /* (tiles, D, TILE_CODES), or by cells (cells, D, CELL) */
    float *offset;      /* (tiles, TILE_CODES) what a code's score starts from, or (cells, CELL) */
    float *low, *high;  /* (D) the least and the largest of each coordinate, working space of the frame */
    double *centre;     /* (D) of the frame of the group's codes, and */
    double scale;       /* its scale, under VX_EUCLID */
    double length;      /* C of the banner */
    int64_t amx_steps;  /* of D, where all codes are met in AMX tiles; else 0; then: */
    uint32_t *terms;    /* (tiles) columns for AMX tiles */
    int direct;         /* scores are -|z - q|^2 */
    int32_t *codes;
    /* near cells */
    code_cells cells;
    float *points; /* (M,D) the columns, one after the other */
    double excess; /* B of the banner */
} assign_call;

/* Finds the frame of group g's codes. */
static void find_frame(assign_call *c, int64_t g)
{
    const float *q = c->codebook + g * c->M * c->D;
    double radius = 0;
    memcpy(c->low, q, sizeof(float) * (size_t)c->D);
    memcpy(c->high, q, sizeof(float) * (size_t)c->D);
    for (int64_t m = 1; m < c->M; m++)
        for (int64_t d = 0; d < c->D; d++) {
            const float x = q[m * c->D + d];
            c->low[d] = x < c->low[d] ? x : c->low[d];
            c->high[d] = x > c->high[d] ? x : c->high[d];
        }
    for (int64_t d = 0; d < c->D; d++) radius = fmax(radius, ((double)c->high[d] - c->low[d]) / 2);
    const double grid = frame_grid(radius);
    for (int64_t d = 0; d < c->D; d++) c->centre[d] = frame_centre(c->low[d], c->high[d], grid);
    c->scale = 1 / grid;
}

/* Returns C of the banner for group g. */
static double code_length(const assign_call *c, int64_t g)
{
    const float *q = c->codebook + g * c->M * c->D;
    double most = 0;
    if (c->metric == VX_COSINE) return 1 + 0x1p-20;
    for (int64_t m = 0; m < c->M; m++) {
        double squares = 0;
        for (int64_t d = 0; d < c->D; d++) {
            const double x = (q[m * c->D + d] - c->centre[d]) * c->scale;
            squares += x * x;
        }
        most = fmax(most, squares);
    }
    return sqrt(most) * (1 + 0x1p-20);
}

/* Says whether most codes of group g have a neighbour so near, next to the size of the whole, that products would lose
 * the difference. Equal codes are no neighbours. */
static int is_crowded(const assign_call *c, int64_t g)
{
    const float *q = c->codebook + g * c->M * c->D;
    double nearest[LOOKS], size = 0;
    int crowded = 0;
    for (int i = 0; i < LOOKS; i++) nearest[i] = INFINITY;
#pragma omp parallel for schedule(static) reduction(min : nearest[:LOOKS]) if (c->M * c->D > 1 << 18)
    for (int64_t m = 0; m < c->M; m++)
        for (int i = 0; i < LOOKS; i++) {
            const float *other = q + i * c->M / LOOKS * c->D;
            double squares = 0;
            for (int64_t d = 0; d < c->D; d++) {
                const double x = ((double)q[m * c->D + d] - other[d]) * c->scale;
                squares += x * x;
            }
            if (squares > 0 && squares < nearest[i]) nearest[i] = squares;
        }
    for (int64_t d = 0; d < c->D; d++) {
        const double x = ((double)c->high[d] - c->low[d]) / 2 * c->scale;
        size += x * x;
    }
    for (int i = 0; i < LOOKS; i++) crowded += nearest[i] < 200 * 0x1p-23 * size;
    return 2 * crowded > LOOKS;
}

/* Writes code m of group g as a column: its numbers `step` apart. Returns what its score starts from. */
static inline float fill_column(const assign_call *c, int64_t g, int64_t m, float *column, int64_t step)
{
    const float *q = c->codebook + (g * c->M + m) * c->D;
    if (m >= c->M) {
        for (int64_t d = 0; d < c->D; d++) column[d * step] = 0;
        return -INFINITY;
    }
    if (c->metric == VX_COSINE) {
        const double divided = fmax(row_norm(q, c->D), GUARD); /* q and 2q are equal on the sphere */
        for (int64_t d = 0; d < c->D; d++) column[d * step] = (float)(q[d] / divided);
        return 0;
    }
    float x[c->D];
    for (int64_t d = 0; d < c->D; d++) column[d * step] = x[d] = frame_of(q[d], c->centre[d], c->scale);
    const double norm = row_norm(x, c->D);
    return c->direct ? 0 : (float)(-0.5 * norm * norm);
}

/* Lays out group g's codes. All threads of a parallel region call it together. */
static void fill_columns(const assign_call *c, int64_t g)
{
#pragma omp for schedule(static)
    for (int64_t m = 0; m < c->tiles * TILE_CODES; m++)
        c->offset[m] =
            fill_column(c, g, m, c->columns + m / TILE_CODES * TILE_CODES * c->D + m % TILE_CODES, TILE_CODES);
    if (!VX_AMX || !c->amx_steps) return;
#pragma omp for schedule(static)
    for (int64_t tile = 0; tile < c->tiles; tile++)
        amx_split_columns(c->terms + tile * amx_words(TILE_CODES, c->amx_steps), c->columns + tile * TILE_CODES * c->D,
                          TILE_CODES, TILE_CODES, c->D);
}

/* Loads the row of z with number `row` into a (D). */
static inline void load_row(const assign_call *c, int64_t row, float *a)
{
    const float *z = c->z + row * c->D;
    if (c->metric == VX_COSINE) {
        const float length = fminf(c->norms[row], FLT_MAX);
        for (int64_t d = 0; d < c->D; d++) a[d] = z[d] / length;
    } else
        for (int64_t d = 0; d < c->D; d++) a[d] = frame_of(z[d], c->centre[d], c->scale);
}

/* -- Comparisons in double ----------------------------------------------------------------------------------------- */

/* The code found so far by comparisons in double: -1 before the first; and its cosine times |z|. */
typedef struct exact_top {
    int32_t code;
    double cosine;
} exact_top;

/* Returns q's cosine with z, times |z|. */
static double cosine_of(const float *z, const float *q, int64_t D)
{
    double product = 0, squares = 0;
    for (int64_t d = 0; d < D; d++) product += (double)z[d] * q[d], squares += (double)q[d] * q[d];
    return product / fmax(sqrt(squares), GUARD);
}

/* Returns |z - p|^2 - |z - q|^2, which loses nothing where z, or another code, is very far. */
static double nearer_by(const float *z, const float *p, const float *q, int64_t D)
{
    double sum = 0;
    for (int64_t d = 0; d < D; d++) sum += ((double)q[d] - p[d]) * (((double)z[d] - p[d]) + ((double)z[d] - q[d]));
    return sum;
}

/* Compares code m of group g with the best so far of row z. Codes equal to it are passed over quickly: there may be
 * thousands. */
static void compare(const assign_call *c, int64_t g, const float *z, int32_t m, exact_top *top)
{
    const float *q = c->codebook + (g * c->M + m) * c->D, *best = c->codebook + (g * c->M + top->code) * c->D;
    double cosine = 0, gain = 1;
    if (top->code >= 0 && m > top->code && !memcmp(q, best, sizeof(float) * (size_t)c->D)) return;
    if (c->metric == VX_COSINE) {
        cosine = cosine_of(z, q, c->D);
        if (top->code >= 0) gain = cosine - top->cosine;
    } else if (top->code >= 0) gain = nearer_by(z, best, q, c->D);
    if (gain > 0 || (gain == 0 && m < top->code)) *top = (exact_top){m, cosine};
}

/* Returns the code nearest to a row that is far outside of the frame. */
static int32_t far_code(const assign_call *c, int64_t g, const float *z)
{
    exact_top top = {.code = -1};
    for (int64_t m = 0; m < c->M; m++) compare(c, g, z, (int32_t)m, &top);
    return top.code;
}

/* Returns 2 E of the banner for a row with squared norm `square`. */
static inline float margin_of(const assign_call *c, float square)
{
    const double a = sqrt(square), C = c->length, D = (double)c->D;
    if (c->metric == VX_COSINE) return (float)(2 * (3 * (D + 4) * 0x1p-24 + 4 * 0x1p-23) * a * C);
    return (float)(2 * (3 * (D + 4) * 0x1p-24 * (a * C + C * C / 2) + 0x1p-23 * (a + C) * (a + C)) + 0x1p-100);
}

/* -- All codes ----------------------------------------------------------------------------------------------------- */

/* The best score of each row so far, lane by lane, and its code. */
typedef struct assign_best {
    vf score[BLOCK_ROWS], second[BLOCK_ROWS]; /* second: the next largest */
    vi code[BLOCK_ROWS];
} assign_best;

/* Takes a vector of scores into the best of a row. */
VX_INLINE void take_scores(vf score, vi codes, vf *most, vf *second, vi *code)
{
    *second = vf_max(*second, vf_min(score, *most));
    *code = vi_where_greater(score, *most, codes, *code);
    *most = vf_max(score, *most);
}

/* Takes the squared differences of TILE_ROWS rows of a and a tile off their scores. */
static void tile_differences(vf score[12][4], const float *a, const float *column, int64_t D)
{
    for (int64_t d = 0; d < D; d++, column += TILE_CODES)
#pragma GCC unroll 6
        for (int r = 0; r < TILE_ROWS; r++) {
            const vf x = vf_set1(a[r * D + d]);
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) {
                const vf difference = x - vf_load(column + v * VX_LANES);
                score[r][v] -= difference * difference;
            }
        }
}

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
    const float *column = c->columns + tile * TILE_CODES * c->D;
    if (c->direct) tile_differences(score, a + i * c->D, column, c->D);
    else tile_product(TILE_ROWS, VECTORS, score, a + i * c->D, c->D, 1, column, TILE_CODES, c->D);
#pragma GCC unroll 6
    for (int r = 0; r < TILE_ROWS; r++) {
        vf most = best->score[i + r], second = best->second[i + r];
        vi code = best->code[i + r];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) take_scores(score[r][v], lane + v * VX_LANES, &most, &second, &code);
        best->score[i + r] = most, best->second[i + r] = second;
        best->code[i + r] = code;
    }
}

/* Lets BLOCK_ROWS rows, as terms, meet PANEL codes from tile `tile` on in AMX tiles; scores (BLOCK_ROWS, PANEL):
 * working space. */
static void meet_panel(const assign_call *c, const uint32_t *a, float *scores, assign_best *best, int rows,
                       int64_t tile)
{
    const float *offset = c->offset + tile * TILE_CODES;
    vi lane;
    for (int l = 0; l < VX_LANES; l++) lane[l] = l;
    lane += (int32_t)(tile * TILE_CODES);
    amx_product(0, scores, PANEL, BLOCK_ROWS, PANEL, a, c->terms + tile * amx_words(TILE_CODES, c->amx_steps),
                c->amx_steps);
    for (int i = 0; i < rows; i++) {
        vf most = best->score[i], second = best->second[i];
        vi code = best->code[i];
#pragma GCC unroll 16
        for (int v = 0; v < PANEL; v += VX_LANES)
            take_scores(vf_load(scores + i * PANEL + v) + vf_load(offset + v), lane + v, &most, &second, &code);
        best->score[i] = most, best->second[i] = second;
        best->code[i] = code;
    }
}

/* Returns the code of row i of a block, a (D), which is row z of the input. */
static int32_t best_code(const assign_call *c, int64_t g, const float *z, const float *a, const assign_best *best,
                         int i)
{
    float score[VX_LANES], second = vf_maximum(best->second[i]);
    int32_t code[VX_LANES];
    memcpy(score, &best->score[i], sizeof score);
    memcpy(code, &best->code[i], sizeof code);
    int at = 0;
    for (int l = 1; l < VX_LANES; l++)
        if (score[l] > score[at] || (score[l] == score[at] && code[l] < code[at])) at = l;
    for (int l = 0; l < VX_LANES; l++)
        if (l != at && score[l] > second) second = score[l];
    const float margin =
        c->direct ? -score[at] * (float)(c->D + 4) * 0x1p-21f + 0x1p-100f : margin_of(c, dot(a, a, c->D));
    if (!(score[at] - second < margin)) return code[at];
    const float least = score[at] - margin;
    exact_top top = {.code = -1};
    for (int64_t m = 0; m < c->M; m += VX_LANES) {
        const float *column = c->columns + m / TILE_CODES * TILE_CODES * c->D + m % TILE_CODES;
        vf sum = vf_load(c->offset + m);
        for (int64_t d = 0; d < c->D; d++) {
            const vf x = vf_set1(a[d]), q = vf_load(column + d * TILE_CODES);
            sum = c->direct ? sum - (x - q) * (x - q) : sum + x * q;
        }
        const uint32_t all = (uint32_t)((1ull << VX_LANES) - 1);
        for (uint32_t bits = ~vf_greater_bits(vf_set1(least), sum) & all; bits; bits &= bits - 1)
            compare(c, g, z, (int32_t)m + __builtin_ctz(bits), &top);
    }
    return top.code;
}

/* Returns the floats of a thread's working space for BLOCK_ROWS rows: the rows, and for AMX tiles their terms and
 * scores. */
static int64_t block_floats(const assign_call *c)
{
    return BLOCK_ROWS * c->D + (c->amx_steps ? amx_words(BLOCK_ROWS, c->amx_steps) + BLOCK_ROWS * PANEL : 0);
}

/* Finds the codes of BLOCK_ROWS rows, every `step`-th from row `first` on; a: working space (block_floats()). */
static void assign_block(const assign_call *c, int64_t g, int64_t first, int64_t step, float *a)
{
    const int rows = (int)vx_min64(BLOCK_ROWS, vx_ceil_div(c->N - first, step));
    assign_best best;
    uint64_t far = 0; /* a bit for each row */
    for (int i = 0; i < BLOCK_ROWS; i++) {
        load_row(c, (first + (i < rows ? i * step : 0)) * c->G + g, a + i * c->D);
        if (largest_of(a + i * c->D, c->D) > FRAME_REACH) far |= UINT64_C(1) << i;
        best.score[i] = best.second[i] = vf_set1(-INFINITY);
        best.code[i] = (vi){0};
    }
    if (VX_AMX && c->amx_steps && !c->direct) {
        uint32_t *terms = (uint32_t *)(a + BLOCK_ROWS * c->D);
        float *scores = a + block_floats(c) - BLOCK_ROWS * PANEL;
        amx_split_rows(terms, a, c->D, BLOCK_ROWS, c->D);
        amx_begin();
        for (int64_t tile = 0; tile < c->tiles; tile += PANEL / TILE_CODES)
            meet_panel(c, terms, scores, &best, rows, tile);
        amx_end();
    } else
        for (int64_t tile = 0; tile < c->tiles; tile++)
            for (int i = 0; i < rows; i += TILE_ROWS) meet_tile(c, a, &best, i, tile);
    for (int i = 0; i < rows; i++) {
        const int64_t row = (first + i * step) * c->G + g;
        const float *z = c->z + row * c->D;
        c->codes[row] = far >> i & 1 ? far_code(c, g, z) : best_code(c, g, z, a + i * c->D, &best, i);
    }
}

/* -- Near cells ---------------------------------------------------------------------------------------------------- */

/* A row of the input, the largest score that it has met, and the best code in double of those within `margin` of it. */
typedef struct assign_top {
    const float *z;
    int64_t g;
    float score, margin;
    exact_top exact;
} assign_top;

/* Lets row a (D) meet a cell. */
VX_INLINE void meet_cell(const int64_t D, const assign_call *c, const float *a, int64_t cell, assign_top *top)
{
    enum { SIDE = CELL_VECTORS < 8 ? CELL_VECTORS : 8 }; /* sums that registers hold */
    for (int from = 0; from < CELL; from += SIDE * VX_LANES) {
        const float *offset = c->offset + cell * CELL + from, *column = c->columns + cell * CELL * D + from;
        vf score[SIDE];
#pragma GCC unroll 8
        for (int v = 0; v < SIDE; v++) score[v] = vf_load(offset + v * VX_LANES);
#pragma GCC unroll 4
        for (int64_t d = 0; d < D; d++) {
            const vf x = vf_set1(a[d]);
#pragma GCC unroll 8
            for (int v = 0; v < SIDE; v++) score[v] += x * vf_load(column + d * CELL + v * VX_LANES);
        }
        vf most = score[0];
#pragma GCC unroll 8
        for (int v = 1; v < SIDE; v++) most = vf_max(most, score[v]);
        const uint32_t all = (uint32_t)((1ull << VX_LANES) - 1);
        if (vf_greater_bits(vf_set1(top->score - top->margin), most) == all) continue;
        top->score = fmaxf(top->score, vf_maximum(most));
        const vf least = vf_set1(top->score - top->margin);
        for (int v = 0; v < SIDE; v++)
            for (uint32_t bits = ~vf_greater_bits(least, score[v]) & all; bits; bits &= bits - 1)
                compare(c, top->g, top->z, c->cells.code[cell * CELL + from + v * VX_LANES + __builtin_ctz(bits)],
                        &top->exact);
    }
}

/* Returns the limit of squared distances: R^2 of the banner, for a row with squared norm `square`, of which 2 E is
 * `margin`. */
static inline float limit_for(const assign_call *c, float square, float best, float margin)
{
    const double rounding = (double)(c->D + 4) * 0x1p-24;
    return limit_of(square * (1 + 2 * rounding) + c->excess + 3 * (double)margin - 2 * (double)best, c->D);
}

/* Returns the code of row a (D), which is row z of group g; far (padded groups): working space. Adds the number of
 * cells it met to *met. */
VX_INLINE int32_t near_row(const int64_t D, const assign_call *c, int64_t g, const float *z, const float *a, float *far,
                           int64_t *met)
{
    const code_cells *cells = &c->cells;
    const float square = dot(a, a, D);
    const int64_t home = nearest_box(D, &cells->group, 0, cells->group.padded, a, far);
    float squares[GROUP];
    const int64_t nearest = nearest_box(D, &cells->cell, home * GROUP, GROUP, a, squares);
    assign_top top = {z, g, -INFINITY, margin_of(c, square), {.code = -1}};
    meet_cell(D, c, a, nearest, &top);
    ++*met;
    float limit = limit_for(c, square, top.score, top.margin);
    uint32_t within = boxes_within(squares, GROUP, limit) & ~(1u << (nearest - home * GROUP));
    for (int64_t group = home, i = -VX_LANES, groups = 0;;) {
        for (; within; within &= within - 1) {
            meet_cell(D, c, a, group * GROUP + __builtin_ctz(within), &top);
            ++*met;
            limit = limit_for(c, square, top.score, top.margin);
        }
        while (!groups && (i += VX_LANES) < cells->group.padded) {
            groups = boxes_within(far + i, VX_LANES, limit);
            if (home - i >= 0 && home - i < VX_LANES) groups &= ~((int64_t)1 << (home - i));
        }
        if (!groups) return top.exact.code;
        group = i + __builtin_ctzll((uint64_t)groups);
        groups &= groups - 1;
        for (int l = 0; l < GROUP; l += VX_LANES)
            vf_store(squares + l, box_distances(D, &cells->cell, group * GROUP + l, a));
        within = boxes_within(squares, GROUP, limit);
    }
}

/* Finds the codes of `rows` rows of group g, every `step`-th from row `first` on, by cells. Returns how many cells they
 * met. */
static int64_t near_rows(const assign_call *c, int64_t g, int64_t first, int64_t rows, int64_t step, float *a,
                         float *far)
{
    int64_t met = 0;
    for (int64_t n = first; n < first + rows * step; n += step) {
        load_row(c, n * c->G + g, a);
        int32_t *code = c->codes + n * c->G + g;
        const float *z = c->z + (n * c->G + g) * c->D;
        switch (c->D) {
        case 2: *code = near_row(2, c, g, z, a, far, &met); break;
        case 3: *code = near_row(3, c, g, z, a, far, &met); break;
        case 4: *code = near_row(4, c, g, z, a, far, &met); break;
        default: *code = near_row(c->D, c, g, z, a, far, &met);
        }
    }
    return met;
}

/* Says whether cells are worth a trial: there must be work that they could save, a hundred times what they take. */
static int cells_may_pay(const assign_call *c)
{
    return !c->amx_steps && c->M >= 8 * CELL && c->N >= (c->D > FEW ? 8192 : 2048);
}

/* Lays out group g's codes by cells. All threads of a parallel region call it together. */
static void fill_near_columns(const assign_call *c, int64_t g)
{
#pragma omp for schedule(static)
    for (int64_t i = 0; i < c->cells.cell.count * CELL; i++)
        c->offset[i] =
            fill_column(c, g, i < c->M ? c->cells.code[i] : c->M, c->columns + i / CELL * CELL * c->D + i % CELL, CELL);
}

/* Fills points and excess. Returns 0 where scores might overflow. */
static int fill_points(assign_call *c, int64_t g)
{
    double excess = -INFINITY;
    float longest = 0;
#pragma omp parallel for schedule(static) reduction(max : excess)
    for (int64_t m = 0; m < c->M; m++) {
        float *point = c->points + m * c->D;
        const double offset = fill_column(c, g, m, point, 1);
        double square = 0;
        for (int64_t d = 0; d < c->D; d++) square += (double)point[d] * point[d];
        excess = fmax(excess, 2 * offset + square);
    }
    c->excess = excess;
    if (c->metric == VX_COSINE) return 1;
    for (int64_t n = 0; n < c->N; n++) longest = fmaxf(longest, c->norms[n * c->G + g]);
    double moved = 0;
    for (int64_t d = 0; d < c->D; d++) moved += c->centre[d] * c->centre[d];
    return c->length < LARGEST && (longest + sqrt(moved)) * c->scale < LARGEST;
}

/* Says whether a cell can be so far from a row that it need not be looked at, going by one cell and a block of rows,
 * whose codes are found among all. Codes that fill a space of many dimensions have no such cells. */
static int one_cell_is_far(const assign_call *c, int64_t g, float *a)
{
    const int64_t step = c->N / BLOCK_ROWS;
    int far = 0;
#pragma omp parallel
    fill_columns(c, g);
    fill_one_cell(&c->cells, c->points);
    assign_block(c, g, 0, step, a);
    for (int i = 0; i < BLOCK_ROWS; i++) {
        const float *row = a + i * c->D, *code = c->points + c->codes[i * step * c->G + g] * c->D;
        const float square = dot(row, row, c->D), start = c->metric == VX_COSINE ? 0 : -0.5f * dot(code, code, c->D);
        far += box_distances(c->D, &c->cells.cell, 0, row)[0] >
               limit_for(c, square, start + dot(row, code, c->D), margin_of(c, square));
    }
    return far > BLOCK_ROWS / 4;
}

/* Finds group g's codes by cells. Returns 0, with some codes found or none, where that is more work than all codes. */
static int assign_near(assign_call *c, int64_t g, float *rows, float *far)
{
    enum { ROWS = 64 /* at a time */ };
    const int64_t D = c->D, N = c->N;
    if (!fill_points(c, g) || (D > FEW && !one_cell_is_far(c, g, rows))) return 0;
    fill_cells(&c->cells, c->points);
#pragma omp parallel
    fill_near_columns(c, g);

    /* in vectors of operations a row: what stays the same, what a cell takes, what all codes take */
    const double fixed = (double)(c->cells.group.padded / VX_LANES) * (double)(5 * D + 8) + 100,
                 cell = CELL_VECTORS * (double)(D + 1) + 20, all = (double)(c->M / VX_LANES) * (double)(D + 3);
    const int64_t met = near_rows(c, g, 0, BLOCK_ROWS, N / BLOCK_ROWS, rows, far);
    if (fixed + (double)met / BLOCK_ROWS * cell > 0.9 * all) return 0;
#pragma omp parallel for schedule(dynamic, 4)
    for (int64_t first = 0; first < N; first += ROWS) {
        const int thread = omp_get_thread_num();
        near_rows(c, g, first, vx_min64(ROWS, N - first), 1, rows + thread * block_floats(c),
                  far + thread * c->cells.group.padded);
    }
    return 1;
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
    c.amx_steps = amx_steps(c.D);
    c.tiles = c.amx_steps ? vx_ceil_div(c.M, PANEL) * PANEL / TILE_CODES : vx_ceil_div(c.M, TILE_CODES);
    const int64_t rows = c.N * c.G, block = block_floats(&c);
    float *norms = 0, *blocks = 0, *far = 0;
    scratch memory = {.op = "assign"};
    while (scratch_pass(&memory)) {
        c.columns = carve_f32(&memory, vx_ceil_div(c.M, CELL) * CELL * c.D);
        c.offset = carve_f32(&memory, vx_ceil_div(c.M, CELL) * CELL);
        c.terms = c.amx_steps ? carve_u32(&memory, amx_words(c.tiles * TILE_CODES, c.amx_steps)) : 0;
        norms = carve_f32(&memory, rows);
        c.low = carve_f32(&memory, c.D);
        c.high = carve_f32(&memory, c.D);
        c.centre = carve_f64(&memory, c.D);
        blocks = carve_f32(&memory, block * omp_get_max_threads());
        if (!cells_may_pay(&c)) continue;
        carve_cells(&memory, &c.cells, c.M, c.D);
        c.points = carve_f32(&memory, c.M * c.D);
        far = carve_f32(&memory, c.cells.group.padded * omp_get_max_threads());
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
        if (metric == VX_EUCLID) find_frame(&c, g);
        c.length = code_length(&c, g);
        c.direct = metric == VX_EUCLID && is_crowded(&c, g);
        if (c.direct) memset(c.centre, 0, sizeof(double) * (size_t)c.D); /* differences lose nothing where they are */
        if (!c.direct && cells_may_pay(&c) && assign_near(&c, g, blocks, far)) continue;
#pragma omp parallel
        {
            fill_columns(&c, g);
#pragma omp for schedule(static)
            for (int64_t first = 0; first < c.N; first += BLOCK_ROWS)
                assign_block(&c, g, first, 1, blocks + block * omp_get_thread_num());
        }
    }
    scratch_free(&memory);
    return VX_OK;
}
