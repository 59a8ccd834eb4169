/* backend.cu: the CUDA backend: its table, its devices, their memory, and what is copied between them and the host.
 *
 * Streams. Each device has one compute stream, on which every kernel runs, and one for uploads (upload.cu). Pool memory
 * is touched on the compute stream alone: that is why a freed block may be handed out again at once (core/memory.c).
 * Downloads wait. device.cuh lists the backend's other files.
 */
#include "device.cuh"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifndef VX_ARCHITECTURES
#define VX_ARCHITECTURES "any"
#endif

const vx_host *host;
device devices[VX_MAX_DEVICES];
bool sync_always;
static device *by_number[VX_MAX_DEVICES]; /* by device number */

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
    if (!*status) *status = status_of(d, cudaDeviceGetAttribute(&value, which, d->ordinal), "device attributes");
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
    pthread_mutex_lock(&one_at_a_time);
    const char *wish = getenv("VERTEX_SYNC");
    sync_always = wish && !strcmp(wish, "1");
    device *d = &devices[ordinal];
    d->ordinal = ordinal, d->number = number, d->slot_count = UPLOAD_SLOTS;
    snprintf(d->name, sizeof d->name, "%s", name);
    int status = open_device_locked(d);
    if (!status) by_number[number] = d;
    pthread_mutex_unlock(&one_at_a_time);
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

static int transfer(int ordinal, void *dst, const void *src, size_t bytes, int direction)
{
    device *d = &devices[ordinal];
    int status = VX_OK;
    pthread_mutex_lock(&one_at_a_time);
    TRY(cudaSetDevice(ordinal));
    if (!status && direction == VX_TO_DEVICE) {
        status = upload(d, (char *)dst, (const char *)src, bytes);
    } else {
        if (!status && d->recording) status = wait_for(d); /* which refuses */
        TRY(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDeviceToHost, d->stream));
        if (!status) status = wait_for(d);
    }
    pthread_mutex_unlock(&one_at_a_time);
    return status;
}

/* Copies on the target's stream, between the work before on both devices and what comes after. */
static int peer(int dst_ordinal, void *dst, int src_ordinal, const void *src, size_t bytes)
{
    device *d = &devices[dst_ordinal], *from = &devices[src_ordinal];
    pthread_mutex_lock(&one_at_a_time);
    int status = refuse_recording(d->recording ? d : from, "tensors cannot be copied to or from another device");
    TRY(cudaSetDevice(src_ordinal));
    TRY(cudaEventRecord(from->peer, from->stream));
    TRY(cudaSetDevice(dst_ordinal));
    TRY(cudaStreamWaitEvent(d->stream, from->peer, 0));
    TRY(cudaMemcpyPeerAsync(dst, dst_ordinal, src, src_ordinal, bytes, d->stream));
    TRY(cudaEventRecord(d->peer, d->stream));
    TRY(cudaSetDevice(src_ordinal));
    TRY(cudaStreamWaitEvent(from->stream, d->peer, 0));
    pthread_mutex_unlock(&one_at_a_time);
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

/* -- The ops' entries ---------------------------------------------------------------------------------------------- */

#define VX_OP(op, contract, text, tensors, numbers)                                                                    \
    static int enter_##op(VX_MAP(VX_DECLARE_TENSOR, VX_UNWRAP tensors)                                                 \
                              VX_MAP_AFTER(VX_DECLARE_NUMBER, VX_UNWRAP numbers))                                      \
    {                                                                                                                  \
        vx_tensor *const all[] = {VX_MAP(VX_NAME_TENSOR, VX_UNWRAP tensors)};                                          \
        int status = enter_op(#op, by_number[all[0]->device]);                                                         \
        if (!status)                                                                                                   \
            status = vx_cuda_##op(VX_MAP(VX_NAME_TENSOR, VX_UNWRAP tensors)                                            \
                                      VX_MAP_AFTER(VX_NAME_NUMBER, VX_UNWRAP numbers));                                \
        if (!status) status = refuse_undrawn(#numbers);                                                                \
        return leave_op(status);                                                                                       \
    }
#define VX_LIST_OP(op, contract, text, tensors, each, numbers)                                                         \
    static int enter_##op(VX_LIST_PARAMETERS(tensors, each, numbers))                                                  \
    {                                                                                                                  \
        vx_tensor *const *const lists[] = {VX_MAP(VX_NAME_TENSOR, VX_UNWRAP tensors)};                                 \
        int status = enter_op(#op, by_number[lists[0][0]->device]);                                                    \
        if (!status) status = vx_cuda_##op(VX_LIST_ARGUMENTS(tensors, each, numbers));                                 \
        if (!status) status = refuse_undrawn(#each #numbers);                                                          \
        return leave_op(status);                                                                                       \
    }
#include "core/ops.def"
#undef VX_OP

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
