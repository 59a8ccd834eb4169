/* nccl.c: verbs on CUDA memory over NCCL: libvertex_nccl.so. It has been compiled and linked, and has never run on a
 * GPU; so it is used only where VERTEX_NCCL=1 asks for it. Else a device's memory goes by way of the host (staged.c).
 *
 * The id of the communicator goes from rank 0 to the others by way of the host's memory. Every call is non-blocking:
 * what is under way is asked for, so that the waits of comm.c, with their deadline, hold here too. Work runs on a
 * stream of its own; comm.c has waited for the device's before.
 *
 * NCCL adds up in an order of its own: bits are the same on all ranks, and twice on the same machines, but not those of
 * mpi.c. A result other than success or "in progress" is a failure, also one of a later version that this does not
 * know.
 */
#define _GNU_SOURCE
#include <cuda_runtime.h>
#include <nccl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "group.h"

static const vx_comm_host *host;
static ncclComm_t communicator; /* NULL until it is made */
static cudaStream_t stream;
static int ranks;

static int fail_nccl(const char *what, ncclResult_t result)
{
    return host->fail(VX_ERANK, "%s: NCCL says: %s", what, ncclGetErrorString(result));
}

static int fail_cuda(const char *what, cudaError_t error)
{
    return host->fail(VX_EDEVICE, "%s: CUDA says: %s", what, cudaGetErrorString(error));
}

static double seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Waits until NCCL has taken a call in. */
static int settle(const char *what, ncclResult_t result)
{
    const double until = seconds() + host->patience;
    while (result == ncclInProgress || result == ncclSuccess) {
        ncclResult_t now = ncclSuccess;
        const ncclResult_t asked = ncclCommGetAsyncError(communicator, &now);
        if (asked != ncclSuccess) return fail_nccl(what, asked);
        if (now == ncclSuccess) return VX_OK;
        if (now != ncclInProgress) return fail_nccl(what, now);
        if (seconds() > until)
            return host->fail(VX_ERANK, "%s: not all ranks came to NCCL within %.0f s", what, host->patience);
    }
    return fail_nccl(what, result);
}

/* What ranks tell each other first. */
typedef struct introduction {
    char place[160]; /* machine and GPU */
    ncclUniqueId id; /* rank 0's */
} introduction;

static int open_nccl(int *rank, int *size, char *name, size_t name_size)
{
    int count = 0, version = 0;
    cudaError_t error = cudaGetDeviceCount(&count); /* first: what NCCL says without a driver is of no use */
    if (error) return fail_cuda("nccl", error);
    if (count < 1) return host->fail(VX_ENOSUP, "nccl: there is no GPU");
    ncclResult_t result = ncclGetVersion(&version);
    if (result) return fail_nccl("nccl", result);
    if (version / 100 != NCCL_VERSION_CODE / 100)
        return host->fail(VX_ENOSUP, "nccl: libvertex_nccl.so was built with version %d, the library is %d",
                          NCCL_VERSION_CODE, version);
    if ((error = cudaSetDevice(host->ordinal))) return fail_cuda("nccl", error);
    introduction own, *all = calloc((size_t)*size, sizeof *all);
    if (!all) return host->fail(VX_ENOMEM, "nccl: out of memory for %d ranks", *size);
    memset(&own, 0, sizeof own);
    gethostname(own.place, sizeof own.place / 2);
    error = cudaDeviceGetPCIBusId(own.place + strlen(own.place), 32, host->ordinal);
    if (*rank == 0 && !error) result = ncclGetUniqueId(&own.id); /* once, and where it will be used */
    int status = host->gather(all, &own, sizeof own);
    if (!status && error) status = fail_cuda("nccl", error);
    if (!status && result) status = fail_nccl("nccl id", result);
    for (int r = 0; r < *size && !status; r++)
        if (r != *rank && !strcmp(own.place, all[r].place))
            status = host->fail(
                VX_EINVAL,
                "nccl: ranks %d and %d share the GPU at %s, which NCCL does not do (before 2.30, and then by "
                "NCCL_MULTI_RANK_GPU_ENABLE=1); without VERTEX_NCCL they may",
                *rank, r, own.place);
    const ncclUniqueId id = all[0].id;
    free(all);
    if (status) return status;
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    communicator = NULL;
    result = ncclCommInitRankConfig(&communicator, *size, id, *rank, &config);
    if (!communicator) return fail_nccl("nccl init", result);
    status = settle("nccl init", result);
    if (status) return status;
    error = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    if (error) return fail_cuda("nccl", error);
    ranks = *size;
    snprintf(name, name_size, "nccl %d.%d.%d", version / 10000, version / 100 % 100, version % 100);
    return VX_OK;
}

static int start(vx_comm_work *w)
{
    if (w->verb == VX_COMM_GATHER)
        return settle(w->name,
                      ncclAllGather(w->data, w->all, (size_t)(w->count * w->item), ncclChar, communicator, stream));
    if (w->verb == VX_COMM_BROADCAST)
        return settle(w->name, ncclBroadcast(w->data, w->data, (size_t)(w->count * w->item), ncclChar, w->root,
                                             communicator, stream));
    const ncclDataType_t type = w->sum == VX_SUM_I32 ? ncclInt32 : ncclFloat32;
    if (w->scale == 1)
        return settle(w->name, ncclAllReduce(w->data, w->data, (size_t)w->count, type, ncclSum, communicator, stream));
    ncclRedOp_t scaled;
    float factor = (float)w->scale;
    ncclResult_t result = ncclRedOpCreatePreMulSum(&scaled, &factor, type, ncclScalarHostImmediate, communicator);
    if (result && result != ncclInProgress) return fail_nccl(w->name, result);
    int status = settle(w->name, ncclAllReduce(w->data, w->data, (size_t)w->count, type, scaled, communicator, stream));
    ncclRedOpDestroy(scaled, communicator);
    return status;
}

static int progress(vx_comm_work *w)
{
    ncclResult_t now = ncclSuccess;
    if (w->done || w->failed) return 0;
    const ncclResult_t asked = ncclCommGetAsyncError(communicator, &now);
    if (asked != ncclSuccess || (now != ncclSuccess && now != ncclInProgress)) {
        w->failed = fail_nccl(w->name, asked ? asked : now);
        return 0;
    }
    const cudaError_t error = cudaStreamQuery(stream);
    if (error == cudaErrorNotReady) return 0;
    if (error) w->failed = fail_cuda(w->name, error);
    else w->done = true;
    return 1;
}

static void missing(const vx_comm_work *w, char *text, size_t size)
{
    (void)w;
    snprintf(text, size, "of %d", ranks); /* NCCL does not tell which */
}

static void abort_nccl(int code) { (void)code; /* MPI ends the job; ncclCommAbort may hang */ }

static int close_nccl(void)
{
    if (!communicator) return VX_OK;
    const ncclResult_t result = ncclCommFinalize(communicator);
    int status = settle("nccl close", result);
    if (!status) ncclCommDestroy(communicator);
    communicator = NULL;
    return status;
}

static const vx_comm_group group = {open_nccl, start, progress, missing, abort_nccl, close_nccl};

const vx_comm_group *vx_comm_entry(const vx_comm_host *given)
{
    host = given;
    return &group;
}
