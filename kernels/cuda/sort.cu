/* sort.cu: the stable radix sort of sort.cuh, 8 bits a pass.
 *
 * A warp has a range of entries. Each pass counts the digits of every range, makes the counts places by an exclusive
 * sum in the order (digit, range), and lets each warp go through its range again in order, 32 entries at a time: an
 * entry's place is its digit's, plus the number of lower lanes with the same digit.
 */
#include "sort.cuh"

enum { BLOCK = 256, WARPS = BLOCK / 32, DIGITS = 256, SCAN = 1024, LEAST_RANGE = 256, MOST_RANGES = 4096 };

VX_DEVICE int digit_of(unsigned long long entry, int shift) { return (int)(entry >> (32 + shift) & (DIGITS - 1)); }

VX_KERNEL sort_count_kernel(uint32_t *count, const unsigned long long *entries, int64_t n, int64_t range,
                            int64_t ranges, int shift)
{
    __shared__ uint32_t mine[WARPS][DIGITS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t r = (int64_t)blockIdx.x * WARPS + warp, end = min((long long)n, (long long)(r + 1) * range);
    for (int i = lane; i < DIGITS; i += 32) mine[warp][i] = 0;
    __syncwarp();
    for (int64_t i = r * range + lane; i < end; i += 32) atomicAdd(&mine[warp][digit_of(entries[i], shift)], 1u);
    __syncwarp();
    for (int i = lane; i < DIGITS && r < ranges; i += 32) count[i * ranges + r] = mine[warp][i];
}

/* Makes count (4 fours) its exclusive sum. One block; a thread has a stretch of it. */
VX_KERNEL sort_scan_kernel(uint4 *count, int64_t fours)
{
    __shared__ uint32_t sum[SCAN];
    const int64_t each = (fours + SCAN - 1) / SCAN, first = min((long long)fours, (long long)threadIdx.x * each),
                  end = min((long long)fours, (long long)first + each);
    uint32_t total = 0;
#pragma unroll 4
    for (int64_t i = first; i < end; i++) {
        const uint4 here = count[i];
        total += here.x + here.y + here.z + here.w;
    }
    sum[threadIdx.x] = total;
    __syncthreads();
    for (int step = 1; step < SCAN; step *= 2) {
        const uint32_t before = (int)threadIdx.x >= step ? sum[threadIdx.x - step] : 0;
        __syncthreads();
        sum[threadIdx.x] += before;
        __syncthreads();
    }
    uint32_t place = sum[threadIdx.x] - total;
#pragma unroll 4
    for (int64_t i = first; i < end; i++) {
        const uint4 here = count[i];
        const uint4 at = make_uint4(place, place + here.x, place + here.x + here.y, place + here.x + here.y + here.z);
        count[i] = at;
        place = at.w + here.w;
    }
}

VX_KERNEL sort_place_kernel(unsigned long long *to, const unsigned long long *entries, const uint32_t *place, int64_t n,
                            int64_t range, int64_t ranges, int shift)
{
    __shared__ uint32_t mine[WARPS][DIGITS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t r = (int64_t)blockIdx.x * WARPS + warp, end = min((long long)n, (long long)(r + 1) * range);
    for (int i = lane; i < DIGITS && r < ranges; i += 32) mine[warp][i] = place[i * ranges + r];
    __syncwarp();
    for (int64_t first = r * range; first < end; first += 32) {
        const bool real = first + lane < end;
        const unsigned long long entry = real ? entries[first + lane] : 0;
        const int digit = real ? digit_of(entry, shift) : DIGITS; /* lanes past the end keep to themselves */
        const unsigned same = __match_any_sync(VX_ALL_LANES, digit);
        const int before = __popc(same & ((1u << lane) - 1));
        const uint32_t at = real ? mine[warp][digit] : 0;
        __syncwarp();
        if (real && before == 0) mine[warp][digit] = at + (uint32_t)__popc(same);
        __syncwarp();
        if (real) to[at + (uint32_t)before] = entry;
    }
}

VX_KERNEL sort_keys_kernel(unsigned long long *entries, const int32_t *keys, int64_t n, int64_t limit,
                           vx_data_check outside)
{
    for (int64_t i = vx_first(); i < n; i += vx_step()) {
        const int32_t key = keys[i];
        const bool good = key >= 0 && key < limit;
        if (!good) vx_report(outside, i);
        entries[i] = vx_sort_entry(good ? (uint32_t)key : (uint32_t)limit, (uint32_t)i);
    }
}

void vx_sort_keys(vx_sort *s, const int32_t *keys, int64_t limit, vx_data_check outside)
{
    VX_LAUNCH(sort_keys_kernel, vx_grid(s->n, BLOCK), BLOCK, 0, s->entries, keys, s->n, limit, outside);
}

vx_sort vx_sort_of(int64_t n, int bits)
{
    vx_sort s = {};
    s.n = n, s.bits = bits;
    s.range = vx_max64(LEAST_RANGE, vx_ceil_div(vx_ceil_div(n, MOST_RANGES), 32) * 32);
    s.ranges = vx_ceil_div(n, s.range);
    if (n >= INT64_C(1) << 32)
        vx_fail_op(vx_fail(VX_EINVAL, "%s: %lld rows, of at most 2^32 - 1", vx_op(), (long long)n));
    s.entries = VX_SCRATCH(unsigned long long, n);
    s.other = VX_SCRATCH(unsigned long long, n);
    s.count = VX_SCRATCH(uint32_t, DIGITS * s.ranges);
    return s;
}

void vx_sort_run(vx_sort *s)
{
    if (!s->n) return;
    const unsigned grid = (unsigned)vx_ceil_div(s->ranges, WARPS);
    for (int shift = 0; shift < s->bits; shift += 8) {
        VX_LAUNCH(sort_count_kernel, grid, BLOCK, 0, s->count, s->entries, s->n, s->range, s->ranges, shift);
        VX_LAUNCH(sort_scan_kernel, 1, SCAN, 0, (uint4 *)s->count, DIGITS / 4 * s->ranges);
        VX_LAUNCH(sort_place_kernel, grid, BLOCK, 0, s->other, s->entries, s->count, s->n, s->range, s->ranges, shift);
        unsigned long long *swap = s->entries;
        s->entries = s->other, s->other = swap;
    }
}
