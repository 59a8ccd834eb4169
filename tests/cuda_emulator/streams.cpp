/* streams.cpp: streams are queues, whose work runs when the host waits for it; graphs are lists of it. */
#include <stdio.h>
#include <time.h>

#include <algorithm>
#include <deque>
#include <map>
#include <set>
#include <vector>

#include "emulator.h"

enum { FREE_SHARED = 48 << 10 }; /* bytes of dynamic shared memory that a kernel may have without asking */

/* -- Streams, events, graphs --------------------------------------------------------------------------------------- */

struct work {
    std::function<void()> run; /* or: */
    emu_event *record = 0, *wait = 0;
    long version = 0;
};

struct emu_graph {
    std::vector<std::function<void()>> steps;
    cudaStreamCaptureMode mode;
    bool invalid = false;
    std::set<cudaStream_t> forked; /* streams whose work the origin has not waited for */
};

struct emu_stream {
    int device;
    std::deque<work> queue;
    emu_graph *capture = 0;
    bool origin = false;
};

struct emu_event {
    long recorded = 0, done = 0;
    emu_graph *captured = 0;
    cudaStream_t from = 0;
    timespec time = {};
};

static std::set<cudaStream_t> streams;
/* Runs queued work until `finished`, streams in random order; then the emu_failure of a kernel, if there was one, is
 * reported. */
template <class F> static cudaError_t drain(F finished)
{
    emu_open_memory();
    while (!emu_failure && !finished()) {
        std::vector<cudaStream_t> able;
        for (cudaStream_t s : streams)
            if (!s->queue.empty() &&
                (!s->queue.front().wait || s->queue.front().wait->done >= s->queue.front().version))
                able.push_back(s);
        if (able.empty()) {
            emu_kernel_name = "(none)";
            emu_note_failure(cudaErrorUnknown, "streams wait for each other's events");
            break;
        }
        cudaStream_t s = able[emu_random() % able.size()];
        work w = std::move(s->queue.front());
        s->queue.pop_front();
        if (w.record) {
            w.record->done = std::max(w.record->done, w.version);
            clock_gettime(CLOCK_MONOTONIC, &w.record->time);
        } else if (w.run) {
            w.run();
        }
    }
    emu_close_memory();
    if (!emu_failure) return cudaSuccess;
    for (cudaStream_t s : streams) {
        for (const work &w : s->queue)
            if (w.record) w.record->done = std::max(w.record->done, w.version);
        s->queue.clear();
    }
    return emu_result(emu_take_failure());
}

cudaError_t emu_drain_all(void)
{
    return drain([] {
        for (cudaStream_t s : streams)
            if (!s->queue.empty()) return false;
        return true;
    });
}

cudaError_t emu_forbidden_in_capture(bool relaxed_allows)
{
    for (cudaStream_t s : streams)
        if (s->capture && !(relaxed_allows && s->capture->mode == cudaStreamCaptureModeRelaxed)) {
            s->capture->invalid = true;
            return emu_result(cudaErrorStreamCaptureUnsupported);
        }
    return cudaSuccess;
}

bool emu_is_capturing(cudaStream_t stream) { return stream && stream->capture; }

static cudaStream_t default_stream(void)
{
    static emu_stream s = {0, {}, 0, false};
    streams.insert(&s);
    return &s;
}

cudaError_t emu_queue(cudaStream_t stream, std::function<void()> run)
{
    if (!stream) { /* the legacy default stream waits for all others and is waited for */
        cudaError_t e = emu_drain_all();
        if (e) return e;
        work w;
        w.run = std::move(run);
        default_stream()->queue.push_back(std::move(w));
        return emu_drain_all();
    }
    if (stream->capture) {
        if (stream->origin == false) stream->capture->forked.insert(stream);
        stream->capture->steps.push_back(std::move(run));
    } else {
        work w;
        w.run = std::move(run);
        stream->queue.push_back(std::move(w));
    }
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned)
{
    EMU_INJECT("cudaStreamCreateWithFlags");
    *stream = new emu_stream{emu_current_device, {}, 0, false};
    streams.insert(*stream);
    return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream)
{
    cudaError_t e = emu_drain_all();
    streams.erase(stream);
    delete stream;
    return e;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream)
{
    EMU_INJECT("cudaStreamSynchronize");
    cudaError_t e = emu_forbidden_in_capture(false);
    if (e) return e;
    if (!stream) return emu_drain_all();
    return drain([stream] { return stream->queue.empty(); });
}

cudaError_t cudaDeviceSynchronize(void)
{
    EMU_INJECT("cudaDeviceSynchronize");
    cudaError_t e = emu_forbidden_in_capture(false);
    return e ? e : emu_drain_all();
}

cudaError_t cudaStreamQuery(cudaStream_t stream) { return stream->queue.empty() ? cudaSuccess : cudaErrorNotReady; }

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned)
{
    EMU_INJECT("cudaStreamWaitEvent");
    if (event->captured) {
        if (stream->capture && stream->capture != event->captured) return emu_result(cudaErrorStreamCaptureUnsupported);
        stream->capture = event->captured;
        if (stream->origin) stream->capture->forked.erase(event->from);
        else stream->capture->forked.insert(stream);
        return cudaSuccess;
    }
    if (stream->capture) return emu_result(cudaErrorStreamCaptureUnsupported); /* an event from outside the graph */
    work w;
    w.wait = event;
    w.version = event->recorded;
    stream->queue.push_back(std::move(w));
    return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned)
{
    EMU_INJECT("cudaEventCreateWithFlags");
    *event = new emu_event;
    return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }

cudaError_t cudaEventDestroy(cudaEvent_t event)
{
    cudaError_t e = emu_drain_all();
    delete event;
    return e;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream)
{
    EMU_INJECT("cudaEventRecord");
    if (!stream) stream = default_stream();
    event->captured = stream->capture;
    event->from = stream;
    if (stream->capture) return cudaSuccess;
    work w;
    w.record = event;
    w.version = ++event->recorded;
    stream->queue.push_back(std::move(w));
    return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event)
{
    EMU_INJECT("cudaEventSynchronize");
    cudaError_t e = emu_forbidden_in_capture(false);
    if (e) return e;
    long version = event->recorded;
    return drain([event, version] { return event->done >= version; });
}
cudaError_t cudaEventQuery(cudaEvent_t event)
{
    return event->done >= event->recorded ? cudaSuccess : cudaErrorNotReady;
}
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t a, cudaEvent_t b)
{
    *milliseconds =
        (float)((double)(b->time.tv_sec - a->time.tv_sec) * 1e3 + (double)(b->time.tv_nsec - a->time.tv_nsec) * 1e-6);
    return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode)
{
    EMU_INJECT("cudaStreamBeginCapture");
    if (!stream || stream->capture) return emu_result(cudaErrorStreamCaptureUnsupported);
    stream->capture = new emu_graph;
    stream->capture->mode = mode;
    stream->origin = true;
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph)
{
    *graph = 0;
    if (!stream || !stream->capture || !stream->origin) return emu_result(cudaErrorInvalidValue);
    emu_graph *g = stream->capture;
    for (cudaStream_t s : streams)
        if (s->capture == g) s->capture = 0;
    stream->origin = false;
    if (g->invalid || !g->forked.empty()) {
        cudaError_t e = g->invalid ? cudaErrorStreamCaptureInvalidated : cudaErrorStreamCaptureUnjoined;
        delete g;
        return emu_result(e);
    }
    *graph = g;
    return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus *status)
{
    *status = !stream || !stream->capture ? cudaStreamCaptureStatusNone
              : stream->capture->invalid  ? cudaStreamCaptureStatusInvalidated
                                          : cudaStreamCaptureStatusActive;
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t *executable, cudaGraph_t graph, unsigned long long)
{
    EMU_INJECT("cudaGraphInstantiate");
    *executable = new emu_graph(*graph);
    return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream)
{
    EMU_INJECT("cudaGraphLaunch");
    for (const auto &step : executable->steps) {
        cudaError_t e = emu_queue(stream, step);
        if (e) return e;
    }
    return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable)
{
    cudaError_t e = emu_drain_all();
    delete executable;
    return e;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph)
{
    delete graph;
    return cudaSuccess;
}

/* -- Launches ------------------------------------------------------------------------------------------------------ */

static std::map<const void *, int> allowed_shared;

cudaError_t emu_launch(const char *name, const void *kernel, const cudaLaunchConfig_t *config,
                       std::function<void()> thread)
{
    EMU_INJECT("cudaLaunchKernelEx");
    const dim3 g = config->gridDim, b = config->blockDim;
    const uint64_t threads = (uint64_t)b.x * b.y * b.z;
    const size_t shared = config->dynamicSmemBytes;
    auto allowed = allowed_shared.find(kernel);
    if (threads < 1 || threads > 1024 || b.z > 64 || g.x < 1 || g.x > 0x7fffffffu || g.y < 1 || g.y > 65535 ||
        g.z < 1 || g.z > 65535)
        return emu_result(cudaErrorInvalidConfiguration);
    if (shared > (allowed == allowed_shared.end() ? (size_t)FREE_SHARED : (size_t)allowed->second))
        return emu_result(cudaErrorInvalidValue);
    return emu_result(emu_queue(config->stream, [=] { emu_run_kernel(name, g, b, shared, thread); }));
}

cudaError_t cudaFuncSetAttribute(const void *kernel, cudaFuncAttribute attribute, int value)
{
    EMU_INJECT("cudaFuncSetAttribute");
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    if (value > EMU_MAX_SHARED) return emu_result(cudaErrorInvalidValue);
    allowed_shared[kernel] = value;
    return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *attributes, const void *)
{
    EMU_INJECT("cudaFuncGetAttributes");
    *attributes = {1024, 80};
    return cudaSuccess;
}
