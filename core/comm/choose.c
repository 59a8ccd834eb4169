/* choose.c: which of all ranks' candidates are the best, as each rank finds out for itself from all their keys. */
#include "group.h"
#include "internal.h"

enum { MOST_RANKS = 1024 };

int vx_comm_choose(vx_tensor *near, vx_tensor *best, const vx_tensor *keys, int rank)
{
    int status =
        VX_CHECK_HOST("choose", "near:i32(L,K) best(L,K) <- keys(R,L,K) : R >= 1; R <= 1024; rank >= 0; rank < R",
                      (near, best, keys), (("rank", rank)));
    if (status) return status;
    const int64_t R = keys->shape[0], L = keys->shape[1], K = keys->shape[2];
    const float *key = vx_f32(keys);
    for (int64_t l = 0; l < L; l++) {
        int32_t *mine = vx_i32(near) + l * K;
        float *out = vx_f32(best) + l * K;
        int64_t taken[MOST_RANKS] = {0};
        for (int64_t k = 0; k < K; k++) {
            int64_t from = -1;
            float most = 0;
            for (int64_t r = 0; r < R; r++) {
                if (taken[r] == K) continue;
                const float x = key[(r * L + l) * K + taken[r]];
                if (from < 0 || x > most) from = r, most = x; /* ties to the lower rank */
            }
            taken[from]++;
            out[k] = most;
        }
        for (int64_t k = taken[rank]; k < K; k++) mine[k] = -1;
    }
    return VX_OK;
}
