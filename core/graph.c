/* graph.c: recorded graphs; vertex.h says what they are. The backend records what is queued; here is what does not
 * depend on it: whose turn it is to record, and what a graph keeps alive.
 *
 * A graph keeps (1) the storage of every tensor that a recorded op was given and that was there before, by a reference,
 * and (2) all memory that was taken and given back during the recording, its arena (memory.c). Within one recording the
 * arena's blocks serve one op after the other, as they would in a step that runs.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

#include "internal.h"

struct vx_graph {
    int device;
    const vx_backend *backend;
    void *captured; /* the backend's graph */
    vx_arena *arena;
    struct kept {
        vx_storage *storage;
        bool written; /* by a recorded op, and so by every launch */
    } * kept;
    int count, room;
};

int vx_recording = -1;
static vx_graph *open_graph; /* being recorded */

static const char *name_of(int device, char *text, size_t size)
{
    vx_device_name(device, text, size);
    return text;
}

int vx_graph_begin(int device, float rate)
{
    char name[64];
    int status = vx_device_check("graph", device), ordinal;
    if (status) return status;
    if (open_graph)
        return vx_fail(VX_EINVAL, "graph: one is being recorded on %s", name_of(vx_recording, name, sizeof name));
    if (!(rate > 0) || isinf(rate))
        return vx_fail(VX_EINVAL, "graph: rate %g, expected a finite number above 0", (double)rate);
    const vx_backend *backend = vx_backend_of(device, &ordinal);
    if (!(backend->can & VX_CAN_GRAPHS))
        return vx_fail(VX_ENOSUP, "graph: %s records none", name_of(device, name, sizeof name));
    vx_graph *g = calloc(1, sizeof *g);
    if (!g) return vx_fail(VX_ENOMEM, "graph: out of memory");
    g->device = device;
    g->backend = backend;
    status = backend->graph_begin(ordinal, rate);
    if (!status) {
        g->arena = vx_arena_begin(device);
        if (!g->arena) {
            backend->graph_end(ordinal, NULL);
            status = vx_fail(VX_ENOMEM, "graph: out of memory");
        }
    }
    if (status) {
        free(g);
        return status;
    }
    open_graph = g;
    vx_recording = device;
    return VX_OK;
}

int vx_graph_end(int device, vx_graph **out)
{
    vx_graph *g = open_graph;
    int ordinal;
    if (out) *out = NULL;
    if (!g || g->device != device) return vx_fail(VX_EINVAL, "graph: none is being recorded on device %d", device);
    vx_backend_of(device, &ordinal);
    open_graph = NULL;
    vx_recording = -1;
    vx_arena_end(g->arena);
    int status = g->backend->graph_end(ordinal, out ? &g->captured : NULL);
    if (out && !status) *out = g;
    else vx_graph_free(g);
    return status;
}

int vx_record_op(const char *op, vx_tensor *const *tensors, int count, bool written)
{
    vx_graph *g = open_graph;
    char here[64], there[64];
    for (int i = 0; i < count; i++) {
        const vx_tensor *x = tensors[i];
        if (!x) continue;
        if (x->device != vx_recording)
            return vx_fail(
                VX_EINVAL,
                "%s: on %s, while a graph of %s is being recorded, which has room for that device's work alone", op,
                name_of(x->device, here, sizeof here), name_of(vx_recording, there, sizeof there));
        vx_storage *s = x->storage;
        if (s->arena == g->arena) continue;
        if (s->kept == g) {
            g->kept[s->kept_at].written |= written;
            continue;
        }
        if (g->count == g->room) {
            int room = g->room ? 2 * g->room : 64;
            struct kept *more = realloc(g->kept, sizeof *more * (size_t)room);
            if (!more) return vx_fail(VX_ENOMEM, "%s: no memory to record it", op);
            g->kept = more;
            g->room = room;
        }
        atomic_fetch_add_explicit(&s->refs, 1, memory_order_relaxed);
        s->kept = g;
        s->kept_at = g->count;
        g->kept[g->count++] = (struct kept){s, written};
    }
    return VX_OK;
}

int vx_graph_draw(const vx_graph *g, int i, vx_draw *draw)
{
    if (!g) return vx_fail(VX_EINVAL, "graph: a freed one");
    return g->backend->graph_draw(g->captured, i, draw);
}

int vx_graph_launch(vx_graph *g, float rate, int64_t steps, const vx_draw *draws)
{
    char name[64];
    if (!g) return vx_fail(VX_EINVAL, "graph: a freed one");
    if (open_graph)
        return vx_fail(VX_EINVAL, "graph: launched while one is being recorded on %s",
                       name_of(vx_recording, name, sizeof name));
    if (!(rate >= 0) || isinf(rate))
        return vx_fail(VX_EINVAL, "graph: rate %g, expected a finite number of 0 or more", (double)rate);
    if (steps < 0)
        return vx_fail(VX_EINVAL, "graph: %lld steps after the recording, expected 0 or more", (long long)steps);
    for (int i = 0; i < g->count; i++)
        if (g->kept[i].written) g->kept[i].storage->writes++, g->kept[i].storage->writer = "a graph's launch";
    vx_arena_launched(g->arena);
    return g->backend->graph_launch(g->captured, rate, steps, draws);
}

void vx_graph_free(vx_graph *g)
{
    if (!g) return;
    if (g->captured) g->backend->graph_free(g->captured);
    vx_arena_free(g->arena);
    for (int i = 0; i < g->count; i++) {
        vx_storage *s = g->kept[i].storage;
        if (s->kept == g) s->kept = NULL; /* another graph may come to lie at this address */
        vx_storage_drop(s);
    }
    free(g->kept);
    free(g);
}
