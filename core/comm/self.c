/* self.c: the group of one rank: what it sends it has. */
#include <string.h>

#include "group.h"

static int open_self(int *rank, int *size, char *name, size_t name_size)
{
    *rank = 0;
    *size = 1;
    if (name_size) strncpy(name, "self", name_size);
    return VX_OK;
}

static int start(vx_comm_work *w)
{
    if (w->verb == VX_COMM_GATHER) memcpy(w->all, w->data, (size_t)(w->count * w->item));
    if (w->verb == VX_COMM_REDUCE && w->scale != 1) {
        float *f = w->data;
        double *d = w->data;
        for (int64_t i = 0; i < w->count && w->sum == VX_SUM_F32; i++) f[i] = (float)(f[i] * w->scale);
        for (int64_t i = 0; i < w->count && w->sum == VX_SUM_F64; i++) d[i] *= w->scale;
    }
    w->done = true;
    return VX_OK;
}

static int progress(vx_comm_work *w)
{
    (void)w;
    return 0;
}

static void missing(const vx_comm_work *w, char *text, size_t size)
{
    (void)w;
    if (size) text[0] = 0;
}

static void abort_self(int code) { (void)code; }

static int close_self(void) { return VX_OK; }

const vx_comm_group vx_comm_self = {open_self, start, progress, missing, abort_self, close_self};
