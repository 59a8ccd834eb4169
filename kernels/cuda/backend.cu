/* cuda.cu: the CUDA backend's table, and everything around its kernels: devices, memory, transfers, errors.
 *
 * Streams. Each device has one compute stream, on which every kernel runs, and one for uploads. Pool memory is touched
 * on the compute stream alone: that is why a freed block may be handed out again at once (memory.c), and why an upload
 * needs no knowledge of who uses its target. Large data goes
 *     host memory → pinned buffer (memcpy) → device buffer (upload stream) → target (compute stream, after the upload's
 *     event)
 * so that the transfer over the bus runs beside whatever is computed meanwhile; the last leg costs a thousandth of the
 * first two. Small data goes from the pinned buffer to the target on the compute stream. The buffers are slots of a
 * ring, filled one after the other; an event on the compute stream says when a slot is free again, so the host runs
 * ahead by as much as the ring holds. Where a large upload meets a slot in use the ring grows, so that a whole batch
 * can cross the bus while the step before it is computed. A slot's device buffer is pool memory that the upload stream
 * touches: that stream first waits for what the block was used for before. Downloads wait.
 *
 * Errors. What a launch reports at once belongs to the op. What a kernel does wrong shows up in a later call: it is
 * named after the ops queued since the device was last waited for, of which there is one with VERTEX_SYNC=1. Faults in
 * the data are a word in device memory that kernels write (vx_raise) and every wait reads.
 *
 * Graphs. While one is recorded the compute stream captures. Nothing may wait for it then, and whatever would is
 * refused before CUDA can notice, since that would spoil the recording. Numbers that change between launches lie in a
 * block of device memory that belongs to the graph (vx_anew, vx_draws) and that a launch uploads before the ops.
 */
#include "cuda.cuh"
#include "core/host.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <vector>

#ifndef VX_ARCHITECTURES
#define VX_ARCHITECTURES "any"
#endif

static const size_t SLOT_BYTES = 4 << 20, SMALL = 256 << 10;
enum {
    SLOTS = 4,
    MAX_SLOTS = 32,
    MAX_SCRATCH = 32,
    MAX_ALARMS = 4096,
    PLAIN_SHARED = 48 << 10,
    NAME = 40,
    BLOCK_BYTES = 64 << 10
};

typedef struct slot {
    char *pinned, *device;
    size_t used;
    cudaEvent_t free;
    bool recorded;
} slot;

/* A piece of a graph's block: refresh fills it, from `given`; without refresh it is a vx_draw, and `given` that of the
 * recording. */
typedef struct anew {
    vx_refresh *refresh;
    size_t at, given_bytes;
    char given[64];
} anew;

typedef struct graph {
    struct device *d;
    cudaGraphExec_t executable;
    float rate;  /* of the recording */
    char *block; /* in device memory */
    size_t held; /* what the pool gave for it */
    std::vector<anew> pieces;
    std::vector<char> bytes; /* of the block */
} graph;

typedef struct device {
    bool open;
    int ordinal, number;
    char name[NAME];
    vx_cuda_limits limits;
    cudaStream_t stream, upload;
    cudaEvent_t uploaded, peer;
    slot slots[MAX_SLOTS];
    int slot_count, filling; /* filling: the slot that uploads go to */
    graph *recording;
    unsigned long long *fault, *fault_seen; /* in device memory, and where a wait leaves it */
    const char *first_op, *last_op;         /* queued since the last wait */
    long queued;
    cudaError_t unreported; /* met where no status can be returned */
} device;

/* The op under way. */
static struct {
    device *d;
    const char *op;
    int status;
    void *scratch[MAX_SCRATCH];
    size_t held[MAX_SCRATCH];
    int scratches;
    bool counted; /* among the device's queued ops */
    bool drew;    /* called vx_draws */
} now;

/* The faults that ops have asked for. Once the table is full the oldest go: nothing queued so long ago is still
 * unreported. */
static struct {
    const char *op;
    int status;
    int64_t columns;
    bool recorded; /* in a graph, which may raise it at any launch */
    char format[160];
} alarms[MAX_ALARMS];
static int alarm_count, alarm_next;

static const vx_host *host;
static device devices[VX_MAX_DEVICES];    /* by ordinal */
static device *by_number[VX_MAX_DEVICES]; /* by device number */
static bool sync_always;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER; /* one op or call at a time */

/* -- What kernels call as they would on the CPU -------------------------------------------------------------------- */

int vx_fail(int status, const char *format, ...)
{
    char text[1024];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    return host->fail(status, "%s", text);
}

char *vx_shape_text(const vx_tensor *x, char *text, size_t size) { return host->shape_text(x, text, size); }

/* -- Errors -------------------------------------------------------------------------------------------------------- */

/* An error that some earlier kernel caused. */
static int late_failure(device *d, cudaError_t error)
{
    cudaGetLastError();
    const char *text = cudaGetErrorString(error);
    long queued = d->queued;
    d->queued = 0;
    if (queued == 0) return vx_fail(VX_EDEVICE, "%s: %s", d->name, text);
    if (queued == 1) return vx_fail(VX_EDEVICE, "%s on %s: %s", d->last_op, d->name, text);
    return vx_fail(VX_EDEVICE, "%s: %s; in one of the last %ld ops, from %s to %s (VERTEX_SYNC=1 finds out which)",
                   d->name, text, queued, d->first_op, d->last_op);
}

/* The status of a call made for `doing`. */
static int check(device *d, cudaError_t error, const char *doing)
{
    if (error == cudaSuccess) return VX_OK;
    if (error >= cudaErrorIllegalAddress && error != cudaErrorLaunchOutOfResources && error < 800)
        return late_failure(d, error);
    cudaGetLastError();
    if (error == cudaErrorMemoryAllocation)
        return vx_fail(VX_ENOMEM, "%s on %s: %s", doing, d->name, cudaGetErrorString(error));
    return vx_fail(VX_EDEVICE, "%s on %s: %s", doing, d->name, cudaGetErrorString(error));
}

/* Tries `call` where nothing has failed so far. */
#define TRY(call)                                                                                                      \
    do {                                                                                                               \
        if (!status) status = check(d, call, #call);                                                                   \
    } while (0)

static int report_fault(device *d)
{
    const unsigned long long seen = *d->fault_seen;
    if (seen == ~0ull) return VX_OK;
    int status = VX_OK;
    TRY(cudaMemsetAsync(d->fault, 0xff, sizeof *d->fault, d->stream));
    *d->fault_seen = ~0ull;
    if (status) return status;
    const unsigned long long code = seen >> 48;
    const int64_t index = (int64_t)(seen & 0xffffffffffffull), columns = alarms[code].columns;
    char text[512];
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
    snprintf(text, sizeof text, alarms[code].format, (long long)(index / columns), (long long)(index % columns));
#pragma GCC diagnostic pop
    return vx_fail(alarms[code].status, "%s: %s", alarms[code].op, text);
}

/* What cannot be done while a graph is recorded is refused. */
static int refuse_recorded(device *d, const char *what)
{
    return d->recording ? vx_fail(VX_EINVAL, "%s: %s while a graph is being recorded", d->name, what) : VX_OK;
}

/* Waits for the compute stream, and says what went wrong on it. */
static int wait_for(device *d)
{
    int status = refuse_recorded(d, "results cannot be read (item, totable, a copy to the host) nor waited for");
    if (status) return status;
    const cudaError_t before = d->unreported;
    d->unreported = cudaSuccess;
    TRY(before);
    TRY(cudaMemcpyAsync(d->fault_seen, d->fault, sizeof *d->fault, cudaMemcpyDeviceToHost, d->stream));
    TRY(cudaStreamSynchronize(d->stream));
    if (status) return status;
    d->queued = 0;
    return report_fault(d);
}

/* -- The op under way ---------------------------------------------------------------------------------------------- */

cudaStream_t vx_stream(void) { return now.d->stream; }
const vx_cuda_limits *vx_limits(void) { return &now.d->limits; }
const char *vx_op(void) { return now.op; }
bool vx_tf32(void) { return *host->tf32 != 0; }
bool vx_bf16_products(void) { return *host->autocast == VX_BF16; }
bool vx_ok(void) { return now.status == VX_OK; }
int vx_status(void) { return now.status; }

void vx_fail_op(int status)
{
    if (!now.status) now.status = status;
}

void *vx_device_scratch(size_t bytes)
{
    if (!vx_ok()) return 0;
    void *p = 0;
    char text[512];
    if (now.scratches == MAX_SCRATCH) {
        now.status = vx_fail(VX_EINVAL, "%s: more than %d pieces of scratch", now.op, MAX_SCRATCH);
        return 0;
    }
    now.status = host->pool_alloc(now.d->number, &bytes, &p);
    if (now.status) {
        snprintf(text, sizeof text, "%s", host->error());
        vx_fail(now.status, "%s: %s", now.op, text);
        return 0;
    }
    now.scratch[now.scratches] = p;
    now.held[now.scratches++] = bytes;
    return p;
}

void *vx_device_memory(size_t bytes)
{
    void *p = 0;
    if (vx_ok()) now.status = host->pool_alloc(now.d->number, &bytes, &p);
    return p;
}

void vx_called(cudaError_t error, const char *call)
{
    device *d = now.d;
    if (!now.counted) {
        now.counted = true;
        if (d->queued++ == 0) d->first_op = now.op;
        d->last_op = now.op;
    }
    if (!error && sync_always) error = cudaStreamSynchronize(d->stream);
    if (!error || !vx_ok()) return;
    char doing[200];
    snprintf(doing, sizeof doing, "%s: %.100s", now.op, call);
    now.status = check(now.d, error, doing);
}

cudaLaunchConfig_t vx_launch_config(const void *kernel, dim3 grid, dim3 block, size_t shared)
{
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared;
    config.stream = now.d->stream;
    if (shared <= PLAIN_SHARED) return config;
    if (shared > (size_t)now.d->limits.shared_bytes)
        now.status = vx_fail(VX_ENOSUP, "%s: needs %zu bytes of shared memory, %s has %d", now.op, shared, now.d->name,
                             now.d->limits.shared_bytes);
    else
        vx_called(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared),
                  "shared memory");
    return config;
}

void vx_launched(cudaError_t error, const char *kernel, const cudaLaunchConfig_t *config)
{
    char call[160];
    snprintf(call, sizeof call, "%.60s, grid (%u,%u,%u), block (%u,%u,%u), %zu bytes shared", kernel, config->gridDim.x,
             config->gridDim.y, config->gridDim.z, config->blockDim.x, config->blockDim.y, config->blockDim.z,
             config->dynamicSmemBytes);
    vx_called(error, call);
}

vx_alarm vx_alarm_of(int status, int64_t columns, const char *format, ...)
{
    char text[sizeof alarms[0].format];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    int i = 0;
    while (i < alarm_count && (alarms[i].op != now.op || alarms[i].status != status || alarms[i].columns != columns ||
                               strcmp(alarms[i].format, text)))
        i++;
    if (i == alarm_count) {
        for (int tries = 0; tries < MAX_ALARMS && alarms[alarm_next].recorded; tries++)
            alarm_next = (alarm_next + 1) % MAX_ALARMS;
        i = alarm_next;
        alarm_next = (alarm_next + 1) % MAX_ALARMS;
        if (alarm_count < MAX_ALARMS) alarm_count++;
        alarms[i].op = now.op, alarms[i].status = status, alarms[i].columns = vx_max64(1, columns);
        snprintf(alarms[i].format, sizeof alarms[i].format, "%s", text);
    }
    if (now.d->recording) alarms[i].recorded = true;
    return {now.d->fault, (unsigned long long)i};
}

/* -- Numbers that change between the launches of a graph ----------------------------------------------------------- */

/* The place in device memory of a piece of the graph being recorded; equal ones share it. */
static const void *piece(vx_refresh *refresh, const void *given, size_t given_bytes, size_t bytes)
{
    graph *g = now.d->recording;
    if (!g || !vx_ok()) return 0;
    for (const anew &a : g->pieces)
        if (a.refresh == refresh && a.given_bytes == given_bytes && !memcmp(a.given, given, given_bytes))
            return g->block + a.at;
    anew a = {refresh, (g->bytes.size() + 15) / 16 * 16, given_bytes, {}};
    if (given_bytes > sizeof a.given || a.at + bytes > BLOCK_BYTES) {
        now.status = vx_fail(VX_EINVAL, "%s: no room in the graph for more numbers that change", now.op);
        return 0;
    }
    memcpy(a.given, given, given_bytes);
    g->bytes.resize(a.at + bytes);
    g->pieces.push_back(a);
    return g->block + a.at;
}

const void *vx_anew(vx_refresh *refresh, const void *given, size_t given_bytes, size_t bytes)
{
    return piece(refresh, given, given_bytes, bytes);
}

vx_random vx_draws(uint64_t seed, uint64_t stream)
{
    const vx_draw given = {seed, stream};
    now.drew = true;
    return {given, (const vx_draw *)piece(0, &given, sizeof given, sizeof given)};
}

/* Holds the mutex until leave(). */
static int enter(const char *op, int number)
{
    pthread_mutex_lock(&mutex);
    device *d = by_number[number];
    now.d = d, now.op = op, now.status = VX_OK, now.scratches = 0, now.counted = false, now.drew = false;
    now.status = check(d, cudaSetDevice(d->ordinal), op);
    return now.status;
}

static int leave(int status)
{
    if (!status) status = now.status;
    for (int i = 0; i < now.scratches; i++) host->pool_free(now.d->number, now.scratch[i], now.held[i]);
    now.scratches = 0;
    if (!status && sync_always) status = wait_for(now.d);
    pthread_mutex_unlock(&mutex);
    return status;
}

/* A kernel that takes its stream as a plain number would draw the same ones at every launch. */
static int check_draws(const char *numbers)
{
    if (!now.d->recording || now.drew || !strstr(numbers, "stream)")) return VX_OK;
    return vx_fail(VX_ENOSUP, "%s: cannot be recorded on %s", now.op, now.d->name);
}

#define VX_OP(op, contract, text, tensors, numbers)                                                                    \
    static int enter_##op(VX_MAP(VX_DECLARE_TENSOR, VX_UNWRAP tensors)                                                 \
                              VX_MAP_AFTER(VX_DECLARE_NUMBER, VX_UNWRAP numbers))                                      \
    {                                                                                                                  \
        vx_tensor *const all[] = {VX_MAP(VX_NAME_TENSOR, VX_UNWRAP tensors)};                                          \
        int status = enter(#op, all[0]->device);                                                                       \
        if (!status)                                                                                                   \
            status = vx_cuda_##op(VX_MAP(VX_NAME_TENSOR, VX_UNWRAP tensors)                                            \
                                      VX_MAP_AFTER(VX_NAME_NUMBER, VX_UNWRAP numbers));                                \
        if (!status) status = check_draws(#numbers);                                                                   \
        return leave(status);                                                                                          \
    }
#define VX_LIST_OP(op, contract, text, tensors, each, numbers)                                                         \
    static int enter_##op(VX_LIST_PARAMETERS(tensors, each, numbers))                                                  \
    {                                                                                                                  \
        vx_tensor *const *const lists[] = {VX_MAP(VX_NAME_TENSOR, VX_UNWRAP tensors)};                                 \
        int status = enter(#op, lists[0][0]->device);                                                                  \
        if (!status) status = vx_cuda_##op(VX_LIST_ARGUMENTS(tensors, each, numbers));                                 \
        if (!status) status = check_draws(#each #numbers);                                                             \
        return leave(status);                                                                                          \
    }
#include "core/ops.def"
#undef VX_OP

/* -- Devices ------------------------------------------------------------------------------------------------------- */

VX_KERNEL probe_kernel(int *p)
{
    if (p) *p = 1;
}

static int count_devices(int *count)
{
    *count = 0;
    cudaError_t error = cudaGetDeviceCount(count);
    if (!error && *count > 0) {
        if (*count > VX_MAX_DEVICES) *count = VX_MAX_DEVICES;
        return VX_OK;
    }
    cudaGetLastError();
    *count = 0;
    if (error != cudaErrorInsufficientDriver)
        return vx_fail(VX_ENOSUP, "no CUDA device: %s", cudaGetErrorString(error ? error : cudaErrorNoDevice));
    int driver = 0, runtime = 0;
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    if (!driver) return vx_fail(VX_ENOSUP, "no CUDA device: %s (there is no NVIDIA driver)", cudaGetErrorString(error));
    return vx_fail(VX_ENOSUP, "no CUDA device: %s (the driver is for CUDA %d.%d, this library needs %d.%d)",
                   cudaGetErrorString(error), driver / 1000, driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
}

static int attribute(device *d, cudaDeviceAttr which, int *status)
{
    int value = 0;
    if (!*status) *status = check(d, cudaDeviceGetAttribute(&value, which, d->ordinal), "device attributes");
    return value;
}

static int open_device_locked(device *d)
{
    cudaFuncAttributes probe;
    cudaDeviceProp properties;
    int status = VX_OK;
    TRY(cudaSetDevice(d->ordinal));
    TRY(cudaGetDeviceProperties(&properties, d->ordinal));
    d->limits.ordinal = d->ordinal;
    d->limits.capability = 10 * attribute(d, cudaDevAttrComputeCapabilityMajor, &status) +
                           attribute(d, cudaDevAttrComputeCapabilityMinor, &status);
    d->limits.multiprocessors = attribute(d, cudaDevAttrMultiProcessorCount, &status);
    d->limits.shared_bytes = attribute(d, cudaDevAttrMaxSharedMemoryPerBlockOptin, &status);
    if (status) return status;
    cudaError_t error = cudaFuncGetAttributes(&probe, (const void *)probe_kernel);
    if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
        cudaGetLastError();
        return vx_fail(VX_ENOSUP,
                       "device %s: %s has compute capability %d.%d; this library holds code for %s: build it with "
                       "-DCMAKE_CUDA_ARCHITECTURES=%d-real",
                       d->name, properties.name, d->limits.capability / 10, d->limits.capability % 10, VX_ARCHITECTURES,
                       d->limits.capability);
    }
    TRY(error);
    TRY(cudaStreamCreateWithFlags(&d->stream, cudaStreamNonBlocking));
    TRY(cudaStreamCreateWithFlags(&d->upload, cudaStreamNonBlocking));
    TRY(cudaEventCreateWithFlags(&d->uploaded, cudaEventDisableTiming));
    TRY(cudaEventCreateWithFlags(&d->peer, cudaEventDisableTiming));
    TRY(cudaMalloc(&d->fault, sizeof *d->fault));
    TRY(cudaMallocHost(&d->fault_seen, sizeof *d->fault_seen));
    TRY(cudaMemsetAsync(d->fault, 0xff, sizeof *d->fault, d->stream));
    TRY(cudaStreamSynchronize(d->stream));
    d->open = status == VX_OK;
    return status;
}

static int open_device(int ordinal, int number, const char *name)
{
    pthread_mutex_lock(&mutex);
    const char *wish = getenv("VERTEX_SYNC");
    sync_always = wish && strcmp(wish, "0");
    device *d = &devices[ordinal];
    d->ordinal = ordinal, d->number = number, d->slot_count = SLOTS;
    snprintf(d->name, sizeof d->name, "%s", name);
    int status = open_device_locked(d);
    if (!status) by_number[number] = d;
    pthread_mutex_unlock(&mutex);
    return status;
}

static int describe(int ordinal, char *text, size_t size)
{
    device *d = &devices[ordinal];
    cudaDeviceProp properties;
    int status = VX_OK, driver = 0;
    TRY(cudaGetDeviceProperties(&properties, ordinal));
    TRY(cudaDriverGetVersion(&driver));
    if (!status)
        snprintf(text, size, "%s, compute capability %d.%d, %d multiprocessors, %.0f GB, driver for CUDA %d.%d",
                 properties.name, d->limits.capability / 10, d->limits.capability % 10, d->limits.multiprocessors,
                 (double)properties.totalGlobalMem / 1e9, driver / 1000, driver % 1000 / 10);
    return status;
}

/* -- Memory and transfers ------------------------------------------------------------------------------------------ */

/* The pool calls these with or without the mutex held (scratch is taken inside an op), so they do not take it. */

static int alloc(int ordinal, size_t bytes, void **out)
{
    device *d = &devices[ordinal];
    int status = VX_OK;
    *out = 0;
    TRY(cudaSetDevice(ordinal));
    TRY(cudaMalloc(out, bytes ? bytes : 1));
    return status;
}

static void release(int ordinal, void *data, size_t bytes)
{
    (void)bytes;
    device *d = &devices[ordinal];
    cudaError_t error = cudaSetDevice(ordinal);
    if (!error && !d->recording)
        error = cudaStreamSynchronize(d->stream); /* a recording began with a wait, and keeps its own */
    cudaError_t freed = cudaFree(data);
    if (!error) error = freed;
    cudaGetLastError();
    if (error && !d->unreported) d->unreported = error;
}

static int memory(int ordinal, int64_t *total, int64_t *available)
{
    device *d = &devices[ordinal];
    size_t all = 0, unused = 0;
    int status = VX_OK;
    TRY(cudaSetDevice(ordinal));
    TRY(cudaMemGetInfo(&unused, &all));
    *total = (int64_t)all, *available = (int64_t)unused;
    return status;
}

/* Makes what a slot consists of, as far as it is not there; with a device buffer where `staged`. */
static int complete_slot(device *d, slot *s, bool staged)
{
    int status = VX_OK;
    if (!s->free) TRY(cudaEventCreateWithFlags(&s->free, cudaEventDisableTiming));
    if (!s->pinned) TRY(cudaMallocHost(&s->pinned, SLOT_BYTES));
    if (!status && !s->device && staged) {
        size_t held = SLOT_BYTES;
        status = host->pool_alloc(d->number, &held, (void **)&s->device);
        TRY(cudaEventRecord(s->free, d->stream)); /* what the block was used for may still be queued */
        TRY(cudaStreamWaitEvent(d->upload, s->free, 0));
    }
    return status;
}

/* A new slot in the ring at `place`, which the others from there on make room for; false where there is no memory for
 * it. */
static bool insert_slot(device *d, int place)
{
    slot fresh = {};
    if (complete_slot(d, &fresh, true)) {
        if (fresh.pinned) cudaFreeHost(fresh.pinned);
        if (fresh.free) cudaEventDestroy(fresh.free);
        cudaGetLastError();
        return false;
    }
    memmove(d->slots + place + 1, d->slots + place, sizeof(slot) * (size_t)(d->slot_count - place));
    d->slots[place] = fresh;
    d->slot_count++;
    return true;
}

/* A slot of the ring with room for bytes; with a device buffer where they are many. */
static int find_room(device *d, size_t bytes, slot **out)
{
    int status = VX_OK;
    slot *s = &d->slots[d->filling];
    const bool large = bytes > SMALL;
    if (s->pinned && s->used + bytes > SLOT_BYTES) {
        TRY(cudaEventRecord(s->free, d->stream));
        s->recorded = status == VX_OK;
        int next = (d->filling + 1) % d->slot_count;
        if (large && d->slots[next].recorded && d->slot_count < MAX_SLOTS &&
            cudaEventQuery(d->slots[next].free) == cudaErrorNotReady) {
            cudaGetLastError();
            if (insert_slot(d, d->filling + 1)) next = d->filling + 1;
        }
        d->filling = next;
        s = &d->slots[next];
        if (s->recorded) TRY(cudaEventSynchronize(s->free));
        s->recorded = false;
        s->used = 0;
    }
    if (!status) status = complete_slot(d, s, large);
    *out = s;
    return status;
}

static int upload(device *d, char *dst, const char *src, size_t bytes)
{
    int status = refuse_recorded(d, "numbers of the host cannot be uploaded");
    for (size_t done = 0; !status && done < bytes;) {
        const size_t n = bytes - done < SLOT_BYTES ? bytes - done : SLOT_BYTES;
        slot *s = 0;
        status = find_room(d, n, &s);
        if (status) break;
        char *pinned = s->pinned + s->used, *staged = s->device + s->used;
        memcpy(pinned, src + done, n);
        s->used += (n + 255) / 256 * 256;
        if (n <= SMALL) {
            TRY(cudaMemcpyAsync(dst + done, pinned, n, cudaMemcpyHostToDevice, d->stream));
        } else {
            TRY(cudaMemcpyAsync(staged, pinned, n, cudaMemcpyHostToDevice, d->upload));
            TRY(cudaEventRecord(d->uploaded, d->upload));
            TRY(cudaStreamWaitEvent(d->stream, d->uploaded, 0));
            TRY(cudaMemcpyAsync(dst + done, staged, n, cudaMemcpyDeviceToDevice, d->stream));
        }
        done += n;
    }
    return status;
}

static int transfer(int ordinal, void *dst, const void *src, size_t bytes, int direction)
{
    device *d = &devices[ordinal];
    int status = VX_OK;
    pthread_mutex_lock(&mutex);
    TRY(cudaSetDevice(ordinal));
    if (!status && direction == VX_TO_DEVICE) {
        status = upload(d, (char *)dst, (const char *)src, bytes);
    } else {
        if (!status && d->recording) status = wait_for(d); /* which refuses */
        TRY(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDeviceToHost, d->stream));
        if (!status) status = wait_for(d);
    }
    pthread_mutex_unlock(&mutex);
    return status;
}

/* On the target's stream, between the work before on both devices and what comes after. */
static int peer(int dst_ordinal, void *dst, int src_ordinal, const void *src, size_t bytes)
{
    device *d = &devices[dst_ordinal], *from = &devices[src_ordinal];
    pthread_mutex_lock(&mutex);
    int status = refuse_recorded(d->recording ? d : from, "tensors cannot be copied to or from another device");
    TRY(cudaSetDevice(src_ordinal));
    TRY(cudaEventRecord(from->peer, from->stream));
    TRY(cudaSetDevice(dst_ordinal));
    TRY(cudaStreamWaitEvent(d->stream, from->peer, 0));
    TRY(cudaMemcpyPeerAsync(dst, dst_ordinal, src, src_ordinal, bytes, d->stream));
    TRY(cudaEventRecord(d->peer, d->stream));
    TRY(cudaSetDevice(src_ordinal));
    TRY(cudaStreamWaitEvent(from->stream, d->peer, 0));
    pthread_mutex_unlock(&mutex);
    return status;
}

/* Inside an op the mutex is held already: the pool flushes while scratch is taken. */
static int sync_device(int ordinal)
{
    device *d = &devices[ordinal];
    int status = VX_OK;
    TRY(cudaSetDevice(ordinal));
    return status ? status : wait_for(d);
}

/* -- Graphs -------------------------------------------------------------------------------------------------------- */

static void drop_graph(graph *g)
{
    if (g->executable) cudaGraphExecDestroy(g->executable);
    if (g->block) host->pool_free(g->d->number, g->block, g->held);
    delete g;
}

static int graph_begin(int ordinal, float rate)
{
    device *d = &devices[ordinal];
    int status = VX_OK;
    if (sync_always) return vx_fail(VX_ENOSUP, "graph: none is recorded with VERTEX_SYNC=1");
    pthread_mutex_lock(&mutex);
    graph *g = new graph{};
    g->d = d, g->rate = rate, g->held = BLOCK_BYTES;
    TRY(cudaSetDevice(ordinal));
    if (!status) status = wait_for(d);
    if (!status) status = host->pool_alloc(d->number, &g->held, (void **)&g->block);
    TRY(cudaStreamBeginCapture(d->stream, cudaStreamCaptureModeRelaxed)); /* relaxed: memory may be allocated */
    if (status) drop_graph(g);
    else d->recording = g;
    pthread_mutex_unlock(&mutex);
    return status;
}

static int graph_end(int ordinal, void **out)
{
    device *d = &devices[ordinal];
    graph *g = d->recording;
    cudaGraph_t captured = 0;
    int status = VX_OK;
    pthread_mutex_lock(&mutex);
    d->recording = 0;
    d->queued = 0;
    TRY(cudaSetDevice(ordinal));
    TRY(cudaStreamEndCapture(d->stream, &captured));
    if (out) TRY(cudaGraphInstantiate(&g->executable, captured, 0));
    if (captured) cudaGraphDestroy(captured);
    if (out && !status) *out = g;
    else drop_graph(g);
    pthread_mutex_unlock(&mutex);
    return status;
}

static int graph_draw(void *handle, int i, vx_draw *out)
{
    for (const anew &a : ((graph *)handle)->pieces)
        if (!a.refresh && i-- == 0) {
            memcpy(out, a.given, sizeof *out);
            return VX_OK;
        }
    return VX_EEND;
}

static int graph_launch(void *handle, float rate, int64_t steps, const vx_draw *draws)
{
    graph *g = (graph *)handle;
    const vx_launch launch = {g->rate, rate, steps};
    int status = enter("graph", g->d->number);
    for (const anew &a : g->pieces) {
        char *to = g->bytes.data() + a.at;
        if (a.refresh) a.refresh(to, a.given, &launch);
        else memcpy(to, draws ? (const void *)draws++ : a.given, sizeof *draws);
    }
    if (!status && !g->bytes.empty()) status = upload(g->d, g->block, g->bytes.data(), g->bytes.size());
    if (!status) VX_CUDA(cudaGraphLaunch(g->executable, vx_stream()));
    return leave(status);
}

static void graph_free(void *handle)
{
    graph *g = (graph *)handle;
    pthread_mutex_lock(&mutex);
    cudaSetDevice(g->d->ordinal);
    drop_graph(g);
    pthread_mutex_unlock(&mutex);
}

/* -- The table ----------------------------------------------------------------------------------------------------- */

const vx_backend *vx_backend_entry(const vx_host *given)
{
    static vx_backend table;
    host = given;
    table.name = "cuda";
    table.can = VX_CAN_BF16 | VX_CAN_GRAPHS | VX_CAN_PEERS;
    table.count = count_devices;
    table.open = open_device;
    table.describe = describe;
    table.alloc = alloc;
    table.release = release;
    table.memory = memory;
    table.transfer = transfer;
    table.peer = peer;
    table.sync = sync_device;
    table.graph_begin = graph_begin;
    table.graph_end = graph_end;
    table.graph_draw = graph_draw;
    table.graph_launch = graph_launch;
    table.graph_free = graph_free;
#define VX_OP(op, contract, text, tensors, numbers) table.op = vx_cuda_##op ? enter_##op : 0;
#include "core/ops.def"
#undef VX_OP
    return &table;
}
