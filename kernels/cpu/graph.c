/* graph.c: recorded graphs on the CPU. While one is recorded, the entries of the table note their arguments in a list
 * instead of computing; a launch makes the calls of the list. What that saves is all that Lua, the tape and the checks
 * do between the kernels of a step. Compiled once.
 *
 * A tensor is copied with its shape: graph.c of core keeps the storages under it. Three kinds of numbers are not those
 * of the recording, and are known by their names: seed and stream, adamw's lr and its step (vertex.h).
 */
#include "graph.h"

#include <stdlib.h>
#include <string.h>

/* One op to be made. The structs below begin with it. */
typedef struct call {
    struct call *next;
    int (*run)(const struct call *);
    uint64_t *seed, *stream; /* places of the numbers that a launch changes; NULL where the op has none */
    float *lr;
    int64_t *step;
    int draw;     /* place of (seed, stream) among the graph's draws */
    int autocast; /* vx_autocast's setting, which kernels ask for */
    float recorded_lr;
    int64_t recorded_step;
} call;

/* A piece of memory of a graph. */
typedef struct piece {
    struct piece *next;
    _Alignas(16) char bytes[];
} piece;

typedef struct graph {
    float rate; /* of the recording */
    call *first, **end;
    vx_draw *draws; /* as recorded */
    int draw_count;
    piece *pieces;
} graph;

static vx_backend *cpu;    /* the table in use */
static vx_backend kernels; /* its entries while none is recorded */
static graph *recording;

/* -- Noting a call ------------------------------------------------------------------------------------------------- */

/* Returns memory that lives as long as the graph being recorded, all zeros; NULL where there is none. */
static void *take(size_t bytes)
{
    piece *p = calloc(1, sizeof *p + bytes);
    if (!p) return NULL;
    p->next = recording->pieces;
    recording->pieces = p;
    return p->bytes;
}

static void *copy_bytes(const void *from, size_t bytes)
{
    void *to = take(bytes);
    if (to) memcpy(to, from, bytes);
    return to;
}

/* Copies a list of tensors, and the tensors. */
static vx_tensor *const *copy_tensors(vx_tensor *const *from, int count)
{
    vx_tensor **to = take(sizeof *to * (size_t)count);
    for (int i = 0; to && i < count; i++)
        if (!(to[i] = copy_bytes(from[i], sizeof **from))) return NULL;
    return to;
}

static void note_number(call *c, const char *name, void *number)
{
    if (!strcmp(name, "seed")) c->seed = number;
    else if (!strcmp(name, "stream")) c->stream = number;
    else if (!strcmp(name, "lr")) c->lr = number, c->recorded_lr = *c->lr;
    else if (!strcmp(name, "step")) c->step = number, c->recorded_step = *c->step;
}

/* Finds the place of a call's pair among the draws, a new one where it is not there. */
static int note_draw(call *c)
{
    graph *g = recording;
    for (c->draw = 0; c->draw < g->draw_count; c->draw++)
        if (g->draws[c->draw].seed == *c->seed && g->draws[c->draw].stream == *c->stream) return VX_OK;
    vx_draw *more = realloc(g->draws, sizeof *more * (size_t)(g->draw_count + 1));
    if (!more) return VX_ENOMEM;
    g->draws = more;
    more[g->draw_count++] = (vx_draw){*c->seed, *c->stream};
    return VX_OK;
}

/* Puts a call, all of whose parts are there, at the list's end. c is NULL where there was no memory. */
static int note(const char *op, call *c)
{
    if (!c || (c->seed && c->stream && note_draw(c))) return vx_fail(VX_ENOMEM, "%s: no memory to record it", op);
    c->autocast = vx_autocast(-1);
    *recording->end = c;
    recording->end = &c->next;
    return VX_OK;
}

/* The fields of a call's struct, how record_OP fills them in, and how run_OP hands them to the kernel. */
#define FIELD_TENSOR(name)                                                                                             \
    vx_tensor name;                                                                                                    \
    bool has_##name;
#define FIELD_NUMBER(pair) FIELD_NUMBER_ pair
#define FIELD_NUMBER_(type, name) type name;
#define FIELD_LIST(name) vx_tensor *const *name;
#define FIELD_EACH(pair) FIELD_EACH_ pair
#define FIELD_EACH_(type, name) const type *name;

#define KEEP_TENSOR(name)                                                                                              \
    if ((made->has_##name = name != NULL)) made->name = *name;
#define KEEP_NUMBER(pair) KEEP_NUMBER_ pair
#define KEEP_NUMBER_(type, name_)                                                                                      \
    made->name_ = name_;                                                                                               \
    note_number(&made->head, #name_, &made->name_);
#define KEEP_LIST(name) whole = whole && (made->name = copy_tensors(name, count));
#define KEEP_EACH(pair) KEEP_EACH_ pair
#define KEEP_EACH_(type, name) whole = whole && (made->name = copy_bytes(name, sizeof *name * (size_t)count));

#define GIVE_TENSOR(name) made->has_##name ? (vx_tensor *)&made->name : NULL
#define GIVE_FIELD(name) made->name
#define GIVE_NUMBER(pair) GIVE_NUMBER_ pair
#define GIVE_NUMBER_(type, name) made->name

#define VX_OP(op, contract, text, tensors, numbers)                                                                    \
    struct op##_call {                                                                                                 \
        call head;                                                                                                     \
        VX_EACH(FIELD_TENSOR, VX_UNWRAP tensors) VX_EACH(FIELD_NUMBER, VX_UNWRAP numbers)                              \
    };                                                                                                                 \
    static int run_##op(const call *head)                                                                              \
    {                                                                                                                  \
        const struct op##_call *made = (const struct op##_call *)head;                                                 \
        return kernels.op(VX_MAP(GIVE_TENSOR, VX_UNWRAP tensors) VX_MAP_AFTER(GIVE_NUMBER, VX_UNWRAP numbers));        \
    }                                                                                                                  \
    static int record_##op(VX_MAP(VX_DECLARE_TENSOR, VX_UNWRAP tensors)                                                \
                               VX_MAP_AFTER(VX_DECLARE_NUMBER, VX_UNWRAP numbers))                                     \
    {                                                                                                                  \
        struct op##_call *made = take(sizeof *made);                                                                   \
        if (!made) return note(#op, NULL);                                                                             \
        made->head.run = run_##op;                                                                                     \
        VX_EACH(KEEP_TENSOR, VX_UNWRAP tensors)                                                                        \
        VX_EACH(KEEP_NUMBER, VX_UNWRAP numbers)                                                                        \
        return note(#op, &made->head);                                                                                 \
    }
#define VX_LIST_OP(op, contract, text, tensors, each, numbers)                                                         \
    struct op##_call {                                                                                                 \
        call head;                                                                                                     \
        int count;                                                                                                     \
        VX_EACH(FIELD_LIST, VX_UNWRAP tensors)                                                                         \
        VX_EACH(FIELD_EACH, VX_UNWRAP each) VX_EACH(FIELD_NUMBER, VX_UNWRAP numbers)                                   \
    };                                                                                                                 \
    static int run_##op(const call *head)                                                                              \
    {                                                                                                                  \
        const struct op##_call *made = (const struct op##_call *)head;                                                 \
        return kernels.op(VX_MAP(GIVE_FIELD, VX_UNWRAP tensors), made->count VX_MAP_AFTER(GIVE_NUMBER, VX_UNWRAP each) \
                                                                     VX_MAP_AFTER(GIVE_NUMBER, VX_UNWRAP numbers));    \
    }                                                                                                                  \
    static int record_##op(VX_LIST_PARAMETERS(tensors, each, numbers))                                                 \
    {                                                                                                                  \
        struct op##_call *made = take(sizeof *made);                                                                   \
        bool whole = made != NULL;                                                                                     \
        if (!whole) return note(#op, NULL);                                                                            \
        made->head.run = run_##op;                                                                                     \
        made->count = count;                                                                                           \
        VX_EACH(KEEP_LIST, VX_UNWRAP tensors)                                                                          \
        VX_EACH(KEEP_EACH, VX_UNWRAP each)                                                                             \
        VX_EACH(KEEP_NUMBER, VX_UNWRAP numbers)                                                                        \
        return note(#op, whole ? &made->head : NULL);                                                                  \
    }
#include "core/ops.def"
#undef VX_OP

/* -- The table's members ------------------------------------------------------------------------------------------- */

static void graph_free(void *handle)
{
    graph *g = handle;
    for (piece *p = g->pieces, *next; p; p = next) {
        next = p->next;
        free(p);
    }
    free(g->draws);
    free(g);
}

static int graph_begin(int ordinal, float rate)
{
    (void)ordinal;
    const char *sync = getenv("VERTEX_SYNC");
    if (sync && !strcmp(sync, "1")) return vx_fail(VX_ENOSUP, "graph: none is recorded with VERTEX_SYNC=1");
    graph *g = calloc(1, sizeof *g);
    if (!g) return vx_fail(VX_ENOMEM, "graph: out of memory");
    g->rate = rate;
    g->end = &g->first;
    recording = g;
    kernels = *cpu;
#define VX_OP(op, contract, text, tensors, numbers) cpu->op = record_##op;
#include "core/ops.def"
#undef VX_OP
    return VX_OK;
}

static int graph_end(int ordinal, void **out)
{
    (void)ordinal;
    graph *g = recording;
    recording = NULL;
    *cpu = kernels;
    if (out) *out = g;
    else graph_free(g);
    return VX_OK;
}

static int graph_draw(void *handle, int i, vx_draw *draw)
{
    const graph *g = handle;
    if (i < 0 || i >= g->draw_count) return VX_EEND;
    *draw = g->draws[i];
    return VX_OK;
}

/* lr / rate comes first: where they are equal, lr is the launch's rate to the bit. */
static int graph_launch(void *handle, float rate, int64_t steps, const vx_draw *draws)
{
    const graph *g = handle;
    const int setting = vx_autocast(-1);
    int status = VX_OK;
    for (call *c = g->first; !status && c; c = c->next) {
        if (c->seed && c->stream) {
            const vx_draw d = (draws ? draws : g->draws)[c->draw];
            *c->seed = d.seed, *c->stream = d.stream;
        }
        if (c->lr) *c->lr = (float)((double)c->recorded_lr / g->rate * rate);
        if (c->step) *c->step = c->recorded_step + steps;
        vx_autocast(c->autocast);
        status = c->run(c);
    }
    vx_autocast(setting);
    return status;
}

void vx_cpu_add_graphs(vx_backend *table)
{
    cpu = table;
    cpu->can |= VX_CAN_GRAPHS;
    cpu->graph_begin = graph_begin;
    cpu->graph_end = graph_end;
    cpu->graph_draw = graph_draw;
    cpu->graph_launch = graph_launch;
    cpu->graph_free = graph_free;
}

int vx_cpu_refuse_recording(const char *what)
{
    return recording ? vx_fail(VX_EINVAL, "cpu: %s while a graph is being recorded", what) : VX_OK;
}
