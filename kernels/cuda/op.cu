/* op.cu: the op under way: what kernels' host code calls (cuda.cuh), around every op of the table.
 *
 * Errors. What a launch reports at once belongs to the op. What a kernel does wrong shows up in a later call: it is
 * named after the ops queued since the device was last waited for, of which there is one with VERTEX_SYNC=1.
 */
#include "device.cuh"

#include <stdarg.h>
#include <stdio.h>

enum { PLAIN_SHARED = 48 << 10 }; /* bytes of dynamic shared memory that need no permission */

op_under_way current_op;
pthread_mutex_t one_at_a_time = PTHREAD_MUTEX_INITIALIZER;

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

/* -- The status of runtime calls ----------------------------------------------------------------------------------- */

/* Names the ops that may have caused an error of an earlier kernel. */
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

int status_of(device *d, cudaError_t error, const char *doing)
{
    if (error == cudaSuccess) return VX_OK;
    if (error >= cudaErrorIllegalAddress && error != cudaErrorLaunchOutOfResources && error < 800)
        return late_failure(d, error);
    cudaGetLastError();
    return vx_fail(error == cudaErrorMemoryAllocation ? VX_ENOMEM : VX_EDEVICE, "%s on %s: %s", doing, d->name,
                   cudaGetErrorString(error));
}

int refuse_recording(device *d, const char *what)
{
    return d->recording ? vx_fail(VX_EINVAL, "%s: %s while a graph is being recorded", d->name, what) : VX_OK;
}

int wait_for(device *d)
{
    int status = refuse_recording(d, "results cannot be read (item, totable, a copy to the host) nor waited for");
    if (status) return status;
    const cudaError_t before = d->unreported;
    d->unreported = cudaSuccess;
    TRY(before);
    TRY(cudaMemcpyAsync(d->fault_seen, d->fault, sizeof *d->fault, cudaMemcpyDeviceToHost, d->stream));
    TRY(cudaStreamSynchronize(d->stream));
    if (status) return status;
    d->queued = 0;
    return report_data_fault(d);
}

/* -- The op under way ---------------------------------------------------------------------------------------------- */

int enter_op(const char *op, device *d)
{
    pthread_mutex_lock(&one_at_a_time);
    current_op.d = d, current_op.op = op, current_op.status = VX_OK, current_op.scratches = 0;
    current_op.counted = current_op.drew = false;
    current_op.status = status_of(d, cudaSetDevice(d->ordinal), op);
    return current_op.status;
}

int leave_op(int status)
{
    device *d = current_op.d;
    if (!status) status = current_op.status;
    for (int i = 0; i < current_op.scratches; i++)
        host->pool_free(d->number, current_op.scratch[i], current_op.held[i]);
    current_op.scratches = 0;
    if (!status && sync_always) status = wait_for(d);
    pthread_mutex_unlock(&one_at_a_time);
    return status;
}

cudaStream_t vx_stream(void) { return current_op.d->stream; }
const vx_cuda_limits *vx_limits(void) { return &current_op.d->limits; }
const char *vx_op(void) { return current_op.op; }
bool vx_tf32(void) { return *host->tf32 != 0; }
bool vx_bf16_products(void) { return *host->autocast == VX_BF16; }
bool vx_ok(void) { return current_op.status == VX_OK; }
int vx_status(void) { return current_op.status; }

void vx_fail_op(int status)
{
    if (!current_op.status) current_op.status = status;
}

void *vx_device_scratch(size_t bytes)
{
    void *p = 0;
    char text[512];
    if (!vx_ok()) return 0;
    if (current_op.scratches == MOST_SCRATCH) {
        vx_fail_op(vx_fail(VX_EINVAL, "%s: more than %d pieces of scratch", vx_op(), MOST_SCRATCH));
        return 0;
    }
    current_op.status = host->pool_alloc(current_op.d->number, &bytes, &p);
    if (!vx_ok()) {
        snprintf(text, sizeof text, "%s", host->error());
        vx_fail(vx_status(), "%s: %s", vx_op(), text);
        return 0;
    }
    current_op.scratch[current_op.scratches] = p;
    current_op.held[current_op.scratches++] = bytes;
    return p;
}

void *vx_device_memory(size_t bytes)
{
    void *p = 0;
    if (vx_ok()) current_op.status = host->pool_alloc(current_op.d->number, &bytes, &p);
    return p;
}

void vx_called(cudaError_t error, const char *call)
{
    device *d = current_op.d;
    if (!current_op.counted) {
        current_op.counted = true;
        if (d->queued++ == 0) d->first_op = vx_op();
        d->last_op = vx_op();
    }
    if (!error && sync_always) error = cudaStreamSynchronize(d->stream);
    if (!error || !vx_ok()) return;
    char doing[200];
    snprintf(doing, sizeof doing, "%s: %.100s", vx_op(), call);
    current_op.status = status_of(d, error, doing);
}

cudaLaunchConfig_t vx_launch_config(const void *kernel, dim3 grid, dim3 block, size_t shared)
{
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared;
    config.stream = vx_stream();
    if (shared <= PLAIN_SHARED) return config;
    if (shared > (size_t)vx_limits()->shared_bytes)
        vx_fail_op(vx_fail(VX_ENOSUP, "%s: needs %zu bytes of shared memory, %s has %d", vx_op(), shared,
                           current_op.d->name, vx_limits()->shared_bytes));
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
