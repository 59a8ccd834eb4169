/* staged.c: a device's memory by way of the host: a copy there before a verb, and back after it. It needs nothing
 * of the device but transfers, so it works wherever tensors can be read, also for several ranks on one device. */
#include <stdlib.h>

#include "staged.h"

int vx_stage(vx_comm_work *w, vx_tensor *x, vx_tensor *all)
{
    const size_t bytes = (size_t)(w->count * w->item);
    w->tensor = all ? all : x;
    w->data = malloc(bytes + 1);
    if (all) w->all = malloc((size_t)all->numel * (size_t)w->item + 1);
    if (!w->data || (all && !w->all)) {
        free(w->data);
        return vx_fail(VX_ENOMEM, "%s: out of host memory for %zu bytes", w->name, bytes);
    }
    w->staged = true;
    return vx_read(x, 0, w->count, w->data);
}

int vx_unstage(vx_comm_work *w)
{
    if (!w->done) return VX_OK; /* messages may still be written there */
    const int status = vx_write(w->tensor, 0, w->tensor->numel, w->all ? w->all : w->data);
    free(w->data);
    free(w->all);
    return status;
}
