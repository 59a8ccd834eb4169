/* graph.cu: recorded graphs: a step's kernels, captured once and launched many times by one call.
 *
 * While a graph is recorded the compute stream captures. Nothing may wait for it then, and whatever would is refused
 * before CUDA can notice, since that would spoil the recording (refuse_recording).
 *
 * Parameters. A kernel's arguments are those of the recording. Numbers that change between launches are parameters of
 * the graph: they lie side by side in device memory that belongs to it, kernels hold their addresses (vx_graph_param,
 * vx_draws), and a launch uploads them anew before the ops.
 */
#include "device.cuh"

#include <string.h>

#include <vector>

enum { PARAM_BYTES = 64 << 10 }; /* of all of a graph's parameters */

/* One parameter, `at` bytes into the graph's. Before a launch refresh(to, given) makes it; where refresh is NULL it
 * is a (seed, stream) pair that the launch passes in, and `given` is that of the recording. */
typedef struct graph_param {
    vx_refresh *refresh;
    size_t at, given_bytes;
    char given[64];
} graph_param;

typedef struct graph {
    struct device *d;
    cudaGraphExec_t executable;
    float rate;   /* of the recording */
    char *memory; /* the parameters, on the device */
    size_t held;  /* bytes that the pool gave for them */
    std::vector<graph_param> params;
    std::vector<char> bytes; /* the parameters, on the host */
} graph;

/* -- Parameters, while an op is recorded --------------------------------------------------------------------------- */

const void *vx_graph_param(vx_refresh *refresh, const void *given, size_t given_bytes, size_t bytes)
{
    graph *g = current_op.d->recording;
    if (!g || !vx_ok()) return 0;
    for (const graph_param &p : g->params)
        if (p.refresh == refresh && p.given_bytes == given_bytes && !memcmp(p.given, given, given_bytes))
            return g->memory + p.at;
    graph_param p = {refresh, (g->bytes.size() + 15) / 16 * 16, given_bytes, {}};
    if (given_bytes > sizeof p.given || p.at + bytes > PARAM_BYTES) {
        vx_fail_op(vx_fail(VX_EINVAL, "%s: no room in the graph for more numbers that change", vx_op()));
        return 0;
    }
    memcpy(p.given, given, given_bytes);
    g->bytes.resize(p.at + bytes);
    g->params.push_back(p);
    return g->memory + p.at;
}

vx_random vx_draws(uint64_t seed, uint64_t stream)
{
    const vx_draw given = {seed, stream};
    current_op.drew = true;
    return {given, (const vx_draw *)vx_graph_param(0, &given, sizeof given, sizeof given)};
}

/* An op whose numbers hold a stream, but that did not call vx_draws, would draw the same numbers at every launch. */
int refuse_undrawn(const char *numbers)
{
    if (!current_op.d->recording || current_op.drew || !strstr(numbers, "stream)")) return VX_OK;
    return vx_fail(VX_ENOSUP, "%s: cannot be recorded on %s", vx_op(), current_op.d->name);
}

/* -- The table's members ------------------------------------------------------------------------------------------- */

static void drop(graph *g)
{
    if (g->executable) cudaGraphExecDestroy(g->executable);
    if (g->memory) host->pool_free(g->d->number, g->memory, g->held);
    delete g;
}

int graph_begin(int ordinal, float rate)
{
    device *d = &devices[ordinal];
    int status = VX_OK;
    if (sync_always) return vx_fail(VX_ENOSUP, "graph: none is recorded with VERTEX_SYNC=1");
    pthread_mutex_lock(&one_at_a_time);
    graph *g = new graph{};
    g->d = d, g->rate = rate, g->held = PARAM_BYTES;
    TRY(cudaSetDevice(ordinal));
    if (!status) status = wait_for(d);
    if (!status) status = host->pool_alloc(d->number, &g->held, (void **)&g->memory);
    TRY(cudaStreamBeginCapture(d->stream, cudaStreamCaptureModeRelaxed)); /* relaxed: memory may be allocated */
    if (status) drop(g);
    else d->recording = g;
    pthread_mutex_unlock(&one_at_a_time);
    return status;
}

int graph_end(int ordinal, void **out)
{
    device *d = &devices[ordinal];
    graph *g = d->recording;
    cudaGraph_t captured = 0;
    int status = VX_OK;
    pthread_mutex_lock(&one_at_a_time);
    d->recording = 0;
    d->queued = 0;
    TRY(cudaSetDevice(ordinal));
    TRY(cudaStreamEndCapture(d->stream, &captured));
    if (out) TRY(cudaGraphInstantiate(&g->executable, captured, 0));
    if (captured) cudaGraphDestroy(captured);
    if (out && !status) *out = g;
    else drop(g);
    pthread_mutex_unlock(&one_at_a_time);
    return status;
}

int graph_draw(void *handle, int i, vx_draw *out)
{
    for (const graph_param &p : ((graph *)handle)->params)
        if (!p.refresh && i-- == 0) {
            memcpy(out, p.given, sizeof *out);
            return VX_OK;
        }
    return VX_EEND;
}

int graph_launch(void *handle, float rate, int64_t steps, const vx_draw *draws)
{
    graph *g = (graph *)handle;
    const vx_launch launch = {g->rate, rate, steps};
    int status = enter_op("graph", g->d);
    for (const graph_param &p : g->params) {
        char *to = g->bytes.data() + p.at;
        if (p.refresh) p.refresh(to, p.given, &launch);
        else memcpy(to, draws ? (const void *)draws++ : p.given, sizeof *draws);
    }
    if (!status && !g->bytes.empty()) status = upload(g->d, g->memory, g->bytes.data(), g->bytes.size());
    if (!status) VX_CUDA(cudaGraphLaunch(g->executable, vx_stream()));
    return leave_op(status);
}

void graph_free(void *handle)
{
    graph *g = (graph *)handle;
    pthread_mutex_lock(&one_at_a_time);
    cudaSetDevice(g->d->ordinal);
    drop(g);
    pthread_mutex_unlock(&one_at_a_time);
}
