/* device.cuh: what the files of the backend share, and kernels do not see: a device, the op under way, and the status
 * of calls of the CUDA runtime.
 *
 *   backend.cu     the table; opening and describing devices; memory and transfers
 *   upload.cu      host to device, so that the host need not wait
 *   op.cu          the op under way: its scratch, its launches, its first failure
 *   data_check.cu  faults in the data, which kernels find and a wait reports
 *   graph.cu       recorded graphs, and the numbers in them that change with each launch
 */
#ifndef VX_DEVICE_CUH
#define VX_DEVICE_CUH

#include "cuda.cuh"
#include "core/host.h"

#include <pthread.h>

enum { UPLOAD_SLOTS = 4, MOST_UPLOAD_SLOTS = 32 };

/* Upload buffers (upload.cu): one in pinned host memory, and once it is needed one on the device. */
typedef struct upload_slot {
    char *pinned, *device;
    size_t used;
    cudaEvent_t free; /* on the compute stream, behind the last use */
    bool in_use;      /* free was recorded and not yet waited for */
} upload_slot;

/* All work of a device is queued on `stream`; `upload` carries large data to it meanwhile. */
typedef struct device {
    bool open;
    int ordinal, number; /* of the CUDA runtime, and of tensors */
    char name[40];       /* "cuda:0" */
    vx_cuda_limits limits;
    cudaStream_t stream, upload;
    cudaEvent_t uploaded, peer;
    upload_slot slots[MOST_UPLOAD_SLOTS];
    int slot_count, filling;                /* filling: the slot that uploads go to */
    struct graph *recording;                /* NULL: none */
    unsigned long long *fault, *fault_seen; /* of a data check: in device memory, and where a wait leaves it */
    const char *first_op, *last_op;         /* queued since the last wait */
    long queued;
    cudaError_t unreported; /* met where no status could be returned */
} device;

extern device devices[VX_MAX_DEVICES]; /* by ordinal */
extern const vx_host *host;
extern bool sync_always;              /* VERTEX_SYNC=1: wait after every op */
extern pthread_mutex_t one_at_a_time; /* one op or call of the table */

/* The op under way. */
enum { MOST_SCRATCH = 32 };
typedef struct op_under_way {
    device *d;
    const char *op;
    int status; /* its first failure */
    void *scratch[MOST_SCRATCH];
    size_t held[MOST_SCRATCH]; /* bytes that the pool gave */
    int scratches;
    bool counted; /* among the device's queued ops */
    bool drew;    /* called vx_draws */
} op_under_way;
extern op_under_way current_op;

/* Makes an op of device d the one under way. Holds the mutex until leave_op, which frees its scratch and returns
 * `status`, or where that is VX_OK the op's own. */
int enter_op(const char *op, device *d);
int leave_op(int status);

/* Returns the status, with vx_error() set, of a runtime call made for `doing`. An error that an earlier kernel caused
 * is named after the ops queued since the last wait. */
int status_of(device *d, cudaError_t error, const char *doing);

/* Makes a runtime call unless `status` is a failure, and keeps its status there. Wants a device *d. */
#define TRY(call)                                                                                                      \
    do {                                                                                                               \
        if (!status) status = status_of(d, call, #call);                                                               \
    } while (0)

/* Waits for the compute stream, and says what went wrong on it: errors of kernels, and faults in the data. */
int wait_for(device *d);

/* Refuses `what` while a graph of the device is recorded: a wait would spoil the recording. */
int refuse_recording(device *d, const char *what);

/* Copies `bytes` to device memory. The host's are free again when this returns; the device's are there for all that is
 * queued from now on. */
int upload(device *d, char *dst, const char *src, size_t bytes);

/* Says what the fault word, which a wait has just copied to *d->fault_seen, stands for, and clears it. */
int report_data_fault(device *d);

/* The graph members of the backend's table (core/backend.h). */
int graph_begin(int ordinal, float rate);
int graph_end(int ordinal, void **out);
int graph_draw(void *graph, int i, vx_draw *out);
int graph_launch(void *graph, float rate, int64_t steps, const vx_draw *draws);
void graph_free(void *graph);
int refuse_undrawn(const char *numbers);

#endif
