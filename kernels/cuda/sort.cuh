/* sort.cuh: sorting row numbers by an integer key, and sums over the rows of each key, for ops that add rows up by
 * index. Both are deterministic without float atomics: the sort is stable, and a sum's order depends on the sorted list
 * alone.
 *
 * A use, with all scratch taken before the first launch:
 *
 *     vx_sort s = vx_sort_of(n, bits);                  scratch for n keys of that many bits
 *     fill s.entries with vx_sort_entry(key, index)     a kernel of the caller's
 *     vx_sort_run(&s);                                  s.entries is in ascending order of (key, index)
 */
#ifndef VX_SORT_CUH
#define VX_SORT_CUH

#include "cuda.cuh"

typedef struct vx_sort {
    int64_t n;
    int bits;
    unsigned long long *entries, *other; /* (n) each: key << 32 | index */
    uint32_t *count;                     /* (digits, ranges) */
    int64_t range, ranges;               /* entries that a warp takes, and how many such ranges there are */
} vx_sort;

/* Returns the bits of the keys 0 .. keys - 1. */
static inline int vx_sort_bits(int64_t keys)
{
    int bits = 1;
    while (bits < 32 && INT64_C(1) << bits < keys) bits++;
    return bits;
}

/* Prepares a sort of n < 2^32 keys, and sorts: radix sort, least digit of 8 bits first, O(n bits / 8). Working space:
 * 16 n bytes, and at most 1 MB per 1024 ranges. */
vx_sort vx_sort_of(int64_t n, int bits);
void vx_sort_run(vx_sort *s);

/* Fills s.entries: index i with keys[i]. A key outside 0 .. limit - 1 becomes `limit`, which ends up behind all others,
 * and is reported. */
void vx_sort_keys(vx_sort *s, const int32_t *keys, int64_t limit, vx_data_check outside);

VX_DEVICE unsigned long long vx_sort_entry(uint32_t key, uint32_t index)
{
    return (unsigned long long)key << 32 | index;
}
VX_DEVICE uint32_t vx_sort_key(unsigned long long entry) { return (uint32_t)(entry >> 32); }
VX_DEVICE uint32_t vx_sort_index(unsigned long long entry) { return (uint32_t)entry; }

/* -- Sums over the rows of each key -------------------------------------------------------------------------------- */

/* Adds to[key width + d] += the sum of term(key, index, d) over the entries of each key < keys, d < width. The sorted
 * list is cut into pieces of 64 entries. A warp, whose lanes have neighbouring d, sums a piece in float32 in ascending
 * order; a key's pieces are then added up in order, in float64. So no key, however many rows it has, is left to one
 * warp. */
enum { VX_PIECE = 64 };

typedef struct vx_pieces {
    const unsigned long long *entries;
    int64_t n, keys, width;
    float *to;
    /* (pieces, 2, width): the sum of the key a piece begins with, if that began before it; and of the one it ends with,
     * if that goes on */
    float *partial;
} vx_pieces;

static inline int64_t vx_pieces_partial(int64_t n, int64_t width) { return vx_ceil_div(n, VX_PIECE) * 2 * width; }

/* Says whether entry i - 1 has the same key as entry i. */
VX_DEVICE bool vx_continues(const vx_pieces &p, int64_t i)
{
    return i > 0 && i < p.n && vx_sort_key(p.entries[i - 1]) == vx_sort_key(p.entries[i]);
}

template <class T> VX_KERNEL sum_pieces_kernel(vx_pieces p, T term)
{
    enum { BATCH = 8 };
    const int lane = threadIdx.x % 32;
    const int64_t pieces = (p.n + VX_PIECE - 1) / VX_PIECE;
    for (int64_t piece = vx_first() / 32; piece < pieces; piece += vx_step() / 32) {
        const int64_t first = piece * VX_PIECE;
        const int count = (int)min((long long)VX_PIECE, (long long)(p.n - first));
        const bool begins = !vx_continues(p, first), ends = !vx_continues(p, first + count);
        for (int64_t d = lane; d < p.width; d += 32) {
            float sum = 0;
            bool whole = begins; /* this key's run began in this piece */
            uint32_t key = vx_sort_key(p.entries[first]);
            for (int batch = 0; batch < count; batch += BATCH) {
                uint32_t next[BATCH];
                float value[BATCH];
#pragma unroll
                for (int j = 0; j < BATCH; j++) { /* loads before stores, so that they are under way together */
                    const unsigned long long entry = p.entries[first + min(batch + j, count - 1)];
                    next[j] = vx_sort_key(entry);
                    value[j] = next[j] < p.keys ? term(next[j], vx_sort_index(entry), d) : 0;
                }
#pragma unroll
                for (int j = 0; j < BATCH; j++) {
                    if (batch + j >= count) break;
                    if (next[j] != key) {
                        if (whole) p.to[key * p.width + d] += sum;
                        else p.partial[2 * piece * p.width + d] = sum;
                        whole = true, key = next[j], sum = 0;
                    }
                    sum += value[j];
                }
            }
            if (key >= p.keys) continue;
            if (whole && ends) p.to[key * p.width + d] += sum;
            else p.partial[(2 * piece + (whole ? 1 : 0)) * p.width + d] = sum;
        }
    }
}

/* Adds up the key that begins in a piece and goes on in others. A warp for each piece. */
VX_KERNEL join_pieces_kernel(vx_pieces p)
{
    const int64_t pieces = (p.n + VX_PIECE - 1) / VX_PIECE;
    for (int64_t piece = vx_first() / 32; piece < pieces; piece += vx_step() / 32) {
        const int64_t end = (piece + 1) * VX_PIECE;
        if (!vx_continues(p, end)) continue;
        const uint32_t key = vx_sort_key(p.entries[end]);
        if (key >= p.keys || (vx_sort_key(p.entries[piece * VX_PIECE]) == key && vx_continues(p, piece * VX_PIECE)))
            continue;
        int64_t last = piece + 1; /* the last piece that begins with the key */
        while ((last + 1) * VX_PIECE < p.n && vx_sort_key(p.entries[(last + 1) * VX_PIECE]) == key) last++;
        for (int64_t d = threadIdx.x % 32; d < p.width; d += 32) {
            double sum = p.partial[(2 * piece + 1) * p.width + d];
#pragma unroll 4
            for (int64_t i = piece + 1; i <= last; i++) sum += p.partial[2 * i * p.width + d];
            p.to[key * p.width + d] += (float)sum;
        }
    }
}

template <class T> static void vx_sum_pieces(const vx_pieces &p, T term)
{
    if (!p.n || !p.width) return;
    const unsigned grid = vx_grid(vx_ceil_div(p.n, VX_PIECE) * 32, 256);
    VX_LAUNCH((sum_pieces_kernel<T>), grid, 256, 0, p, term);
    VX_LAUNCH(join_pieces_kernel, grid, 256, 0, p);
}

#endif
