/* comm.c: the verbs of comm.h: finds the group that a launcher started, checks what is given, and waits with a
 * deadline. What moves is the group's (group.h).
 */
#define _GNU_SOURCE
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "staged.h"

enum { SPINS = 2000, PIECE = 1 << 26 };

static struct {
    bool open;
    int rank, size;
    char name[96];
    const vx_comm_group *group; /* of the host's memory */
    const vx_comm_group *nccl;  /* of CUDA devices', once it was asked for */
    vx_comm_work *first;        /* works under way, in the order of their beginning */
    vx_comm_host host;
} comm = {.size = 1, .name = "self", .group = &vx_comm_self};

/* -- What launchers tell ------------------------------------------------------------------------------------------- */

/* Environment variables of the launchers: how many ranks there are, and which this one is. `also` must be there too. */
static const struct launcher {
    const char *by, *size, *rank, *also;
} launchers[] = {
    {"mpirun of Open MPI", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", NULL},
    {"srun --mpi=pmix", "SLURM_STEP_NUM_TASKS", "PMIX_RANK", "PMIX_NAMESPACE"},
    {"mpiexec of MPICH, or srun --mpi=pmi2", "PMI_SIZE", "PMI_RANK", NULL},
};

static int number_in(const char *variable)
{
    const char *text = getenv(variable);
    return text && *text ? atoi(text) : -1;
}

/* Finds who started this process as one of several; NULL: nobody. */
static const struct launcher *find_launcher(void)
{
    for (size_t i = 0; i < sizeof launchers / sizeof *launchers; i++) {
        const struct launcher *l = launchers + i;
        if (number_in(l->size) > 1 && number_in(l->rank) >= 0 && (!l->also || getenv(l->also))) return l;
    }
    return NULL;
}

int vx_comm_rank(void)
{
    if (comm.open) return comm.rank;
    const struct launcher *l = find_launcher();
    return l ? number_in(l->rank) : 0;
}

int vx_comm_size(void)
{
    if (comm.open) return comm.size;
    const struct launcher *l = find_launcher();
    return l ? number_in(l->size) : 1;
}

const char *vx_comm_name(void) { return comm.name; }

static int open_mpi(const struct launcher *l)
{
    const int wanted = number_in(l->size);
    void *entry = NULL;
    int status = vx_library_entry("mpi", "comm", vx_comm_signature(), &entry);
    if (status)
        return vx_fail_because(status,
                               "%s started %d ranks, which need libvertex_mpi.so (apt-get install openmpi-bin "
                               "libopenmpi-dev, then ./setup.sh)",
                               l->by, wanted);
    const vx_comm_group *(*get)(const vx_comm_host *);
    memcpy(&get, &entry, sizeof get); /* ISO C has no cast from an object's pointer to a function's */
    const vx_comm_group *group = get(&comm.host);
    int rank, size;
    char name[sizeof comm.name];
    status = group->open(&rank, &size, name, sizeof name);
    if (status) return status;
    if (size != wanted)
        return vx_fail(VX_ENOSUP,
                       "%s started %d ranks, but libvertex_mpi.so is built with %s, which knows of %d: start the ranks "
                       "by its own mpirun, or build with the other MPI (./setup.sh after choosing its mpicc)",
                       l->by, wanted, name, size);
    comm.group = group;
    comm.rank = rank;
    comm.size = size;
    snprintf(comm.name, sizeof comm.name, "%s", name);
    return VX_OK;
}

static int gather_bytes(void *all, const void *own, int64_t bytes);

int vx_comm_open(void)
{
    if (comm.open) return VX_OK;
    const char *seconds = getenv("VERTEX_RANK_TIMEOUT");
    const double patience = seconds && *seconds ? atof(seconds) : 25; /* checked by core/library.lua */
    comm.host = (vx_comm_host){.fail = vx_fail, .patience = patience, .gather = gather_bytes};
    const struct launcher *l = find_launcher();
    if (!l && number_in("SLURM_STEP_NUM_TASKS") > 1 && number_in("SLURM_PROCID") >= 0)
        return vx_fail(
            VX_ENOSUP,
            "srun started %d tasks, but none of them knows of the others: start them by srun --mpi=pmix (srun "
            "--mpi=list says what there is), or by mpirun",
            number_in("SLURM_STEP_NUM_TASKS"));
    int status = l ? open_mpi(l) : VX_OK;
    comm.open = !status;
    return status;
}

/* -- Waiting ------------------------------------------------------------------------------------------------------- */

int vx_comm_progress(void)
{
    for (vx_comm_work *w = comm.first; w; w = w->next) w->group->progress(w);
    return VX_OK;
}

static void pause_a_little(int spins)
{
    if (spins < SPINS) return;
    if (spins < 2 * SPINS) {
        sched_yield();
        return;
    }
    const struct timespec t = {0, 50000};
    nanosleep(&t, NULL);
}

/* Waits for a work, moving all; fails where nothing has come for as long as patience is. */
static int wait_for(vx_comm_work *w)
{
    double since = vx_time();
    for (int spins = 0; !w->done && !w->failed; spins += spins < 2 * SPINS) {
        int moved = 0;
        for (vx_comm_work *other = comm.first; other; other = other->next) moved += other->group->progress(other);
        if (w->done || w->failed) break;
        if (moved) {
            since = vx_time();
            spins = 0;
        } else if (vx_time() - since > comm.host.patience) {
            char ranks[128];
            w->group->missing(w, ranks, sizeof ranks);
            return vx_fail(VX_ERANK, "%s: rank %s did not come within %.0f s", w->name, ranks, comm.host.patience);
        }
        pause_a_little(spins);
    }
    return w->failed;
}

static void unlink_work(const vx_comm_work *w)
{
    vx_comm_work **at = &comm.first;
    while (*at && *at != w) at = &(*at)->next;
    if (*at) *at = w->next;
}

static int begin(vx_comm_work *w)
{
    vx_comm_work **at = &comm.first;
    while (*at) at = &(*at)->next;
    *at = w;
    w->next = NULL;
    if (!w->group) w->group = comm.group;
    int status = w->group->start(w);
    if (status) unlink_work(w);
    return status;
}

/* Waits for a work and gives back what it held; the messages of one that failed are left as they are. */
static int end(vx_comm_work *w)
{
    int status = wait_for(w);
    unlink_work(w);
    if (w->staged && !status) status = vx_unstage(w);
    return status;
}

static int run(vx_comm_work *w)
{
    int status = begin(w);
    return status ? status : end(w);
}

/* -- Tensors ------------------------------------------------------------------------------------------------------- */

static int check_tensor(const char *op, const vx_tensor *x)
{
    char a[160];
    if (!comm.open) return vx_fail(VX_EINVAL, "%s: vx_comm_open was not called", op);
    if (!x) return vx_fail(VX_EINVAL, "%s: x is a released tensor", op);
    if (!x->contiguous)
        return vx_fail(VX_EINVAL, "%s: x %s is a strided view, expected a contiguous tensor", op,
                       vx_shape_text(x, a, sizeof a));
    if (vx_recording >= 0) return vx_fail(VX_EINVAL, "%s: cannot be part of a recorded graph", op);
    return VX_OK;
}

static int check_sum(const char *op, const vx_tensor *x, double scale)
{
    int status = check_tensor(op, x);
    if (!status && x->dtype != VX_F32 && x->dtype != VX_I32)
        status = vx_fail(VX_EINVAL, "%s: x is %s, expected f32 or i32", op, vx_dtype_name(x->dtype));
    if (!status && x->dtype == VX_I32 && scale != 1)
        status = vx_fail(VX_EINVAL, "%s: scale %g of i32, expected 1", op, scale);
    return status;
}

/* Joins the ranks' GPUs, on first use. */
static int open_nccl(int device)
{
    if (comm.nccl) return VX_OK;
    void *entry = NULL;
    vx_backend_of(device, &comm.host.ordinal);
    int status = vx_library_entry("nccl", "comm", vx_comm_signature(), &entry);
    if (status) return vx_fail_because(status, "VERTEX_NCCL is set");
    const vx_comm_group *(*get)(const vx_comm_host *);
    memcpy(&get, &entry, sizeof get);
    const vx_comm_group *group = get(&comm.host);
    char name[32], both[sizeof comm.name];
    status = group->open(&comm.rank, &comm.size, name, sizeof name);
    if (status) return status;
    comm.nccl = group;
    snprintf(both, sizeof both, "%.60s, %s", comm.name, name);
    snprintf(comm.name, sizeof comm.name, "%s", both);
    return VX_OK;
}

/* Says whether NCCL is to move a device's memory: it has never run, so somebody has to ask for it. */
static bool wants_nccl(int device)
{
    const char *asked = getenv("VERTEX_NCCL");
    char name[40] = "";
    if (!asked || strcmp(asked, "1") || vx_device_name(device, name, sizeof name)) return false;
    return !strncmp(name, "cuda:", 5);
}

/* Lets w work on x in place, or on a copy on the host. */
static int attach(vx_comm_work *w, vx_tensor *x, vx_tensor *all)
{
    vx_wrote(w->name, all ? all : x);
    w->item = (int64_t)vx_dtype_bytes(x->dtype);
    w->count = x->numel;
    const bool nccl = wants_nccl(x->device);
    if (!nccl && !vx_device_has(x->device, VX_CAN_HOST)) return vx_stage(w, x, all);
    w->data = x->data;
    w->all = all ? all->data : NULL;
    if (!nccl) return VX_OK;
    int status = open_nccl(x->device);
    if (!status) status = vx_sync(x->device); /* NCCL has a stream of its own */
    w->group = comm.nccl;
    return status;
}

int vx_comm_all_reduce(vx_tensor *x, double scale)
{
    int status = check_sum("all_reduce", x, scale);
    if (status || x->numel == 0) return status;
    const int sum = x->dtype == VX_F32 ? VX_SUM_F32 : VX_SUM_I32;
    vx_comm_work w = {.verb = VX_COMM_REDUCE, .sum = sum, .scale = scale, .name = "all_reduce"};
    status = attach(&w, x, NULL);
    if (status || w.staged || w.count <= PIECE) return status ? status : run(&w);
    for (int64_t first = 0; first < x->numel && !status; first += PIECE) {
        vx_comm_work piece = w;
        piece.data = (char *)w.data + first * w.item;
        piece.count = x->numel - first < PIECE ? x->numel - first : PIECE;
        status = run(&piece);
    }
    return status;
}

int vx_comm_all_gather(vx_tensor *all, const vx_tensor *x)
{
    char a[160], b[160];
    int status = check_tensor("all_gather", x);
    if (!status) status = check_tensor("all_gather", all);
    if (status) return status;
    bool fits = all->dtype == x->dtype && all->ndim == x->ndim + 1 && all->shape[0] == comm.size;
    for (int i = 0; fits && i < x->ndim; i++) fits = all->shape[i + 1] == x->shape[i];
    if (!fits || all->device != x->device)
        return vx_fail(VX_EINVAL, "all_gather: all %s and x %s, expected one x for each of %d ranks, on one device",
                       vx_shape_text(all, a, sizeof a), vx_shape_text(x, b, sizeof b), comm.size);
    if (x->numel == 0) return VX_OK;
    vx_comm_work w = {.verb = VX_COMM_GATHER, .name = "all_gather"};
    status = attach(&w, (vx_tensor *)x, all);
    return status ? status : run(&w);
}

int vx_comm_broadcast(vx_tensor *x, int root)
{
    int status = check_tensor("broadcast", x);
    if (!status && (root < 0 || root >= comm.size))
        status = vx_fail(VX_EINVAL, "broadcast: root %d, of 0 .. %d", root, comm.size - 1);
    if (status || x->numel == 0) return status;
    vx_comm_work w = {.verb = VX_COMM_BROADCAST, .root = root, .name = "broadcast"};
    status = attach(&w, x, NULL);
    return status ? status : run(&w);
}

int vx_comm_begin(vx_comm_work **out, vx_tensor *x, double scale)
{
    *out = NULL;
    int status = check_sum("all_reduce", x, scale);
    vx_comm_work *w = status ? NULL : calloc(1, sizeof *w);
    if (!status && !w) status = vx_fail(VX_ENOMEM, "all_reduce: out of memory");
    if (status) return status;
    *w = (vx_comm_work){.verb = VX_COMM_REDUCE,
                        .sum = x->dtype == VX_F32 ? VX_SUM_F32 : VX_SUM_I32,
                        .scale = scale,
                        .name = "all_reduce"};
    status = attach(w, x, NULL);
    if (!status && w->count == 0) w->done = true;
    else if (!status) status = begin(w);
    if (status) free(w);
    else *out = w;
    return status;
}

int vx_comm_end(vx_comm_work *w)
{
    if (!w) return VX_OK;
    int status = end(w);
    if (w->done) free(w);
    return status;
}

/* -- Numbers, and the rest ----------------------------------------------------------------------------------------- */

static int check_open(const char *op)
{
    return comm.open ? VX_OK : vx_fail(VX_EINVAL, "%s: vx_comm_open was not called", op);
}

int vx_comm_sum(double *x, int64_t count)
{
    int status = check_open("sum");
    if (status || count == 0) return status;
    vx_comm_work w = {.verb = VX_COMM_REDUCE, .sum = VX_SUM_F64, .scale = 1, .name = "sum"};
    w.data = x, w.count = count, w.item = sizeof *x;
    return run(&w);
}

int vx_comm_gather(double *all, const double *x, int64_t count)
{
    int status = check_open("gather");
    if (status || count == 0) return status;
    vx_comm_work w = {.verb = VX_COMM_GATHER, .name = "gather"};
    w.data = (double *)(uintptr_t)x, w.all = all, w.count = count, w.item = sizeof *x;
    return run(&w);
}

static int gather_bytes(void *all, const void *own, int64_t bytes)
{
    vx_comm_work w = {.verb = VX_COMM_GATHER, .name = "gather"};
    w.data = (void *)(uintptr_t)own, w.all = all, w.count = bytes, w.item = 1;
    return run(&w);
}

int vx_comm_barrier(void)
{
    double nothing = 0;
    int status = check_open("barrier");
    if (status) return status;
    vx_comm_work w = {.verb = VX_COMM_REDUCE, .sum = VX_SUM_F64, .scale = 1, .name = "barrier"};
    w.data = &nothing, w.count = 1, w.item = sizeof nothing;
    return run(&w);
}

void vx_comm_abort(int code)
{
    if (comm.open) comm.group->abort(code);
}

int vx_comm_close(void)
{
    if (!comm.open) return VX_OK;
    int status = vx_comm_barrier();
    if (!status && comm.nccl) status = comm.nccl->close();
    if (!status) status = comm.group->close();
    comm.open = false;
    return status;
}

/* -- What ranks compare -------------------------------------------------------------------------------------------- */

static uint64_t mix(uint64_t h, const void *bytes, size_t count)
{
    const unsigned char *at = bytes;
    for (; count >= 8; count -= 8, at += 8) {
        uint64_t word;
        memcpy(&word, at, 8);
        h = (h ^ word) * 0x9E3779B97F4A7C15ull;
        h ^= h >> 29;
    }
    for (; count; count--, at++) h = (h ^ *at) * 0x100000001B3ull;
    return h;
}

int vx_comm_hash(uint64_t *hash, const vx_tensor *x)
{
    if (!x) return vx_fail(VX_EINVAL, "hash: a released tensor");
    const size_t bytes = (size_t)x->numel * vx_dtype_bytes(x->dtype);
    if (x->contiguous && vx_device_has(x->device, VX_CAN_HOST)) {
        *hash = mix(*hash, x->data, bytes);
        return VX_OK;
    }
    void *copy = malloc(bytes + 1);
    if (!copy) return vx_fail(VX_ENOMEM, "hash: out of memory for %zu bytes", bytes);
    int status = vx_read(x, 0, x->numel, copy);
    if (!status) *hash = mix(*hash, copy, bytes);
    free(copy);
    return status;
}

int vx_comm_place(vx_place_of_rank *place)
{
    char host[256] = "", boot[64] = "";
    cpu_set_t set;
    gethostname(host, sizeof host - 1);
    FILE *f = fopen("/proc/sys/kernel/random/boot_id", "r"); /* containers share names */
    if (f) {
        if (!fgets(boot, sizeof boot, f)) boot[0] = 0;
        fclose(f);
    }
    CPU_ZERO(&set);
    if (sched_getaffinity(0, sizeof set, &set)) return vx_fail(VX_ENOSUP, "place: the system does not tell the cores");
    const uint64_t below = (1ull << 53) - 1;
    place->host = (double)(mix(mix(1, host, strlen(host)), boot, strlen(boot)) & below);
    place->mask = (double)(mix(1, &set, sizeof set) & below);
    place->allowed = CPU_COUNT(&set);
    place->cores = (int)sysconf(_SC_NPROCESSORS_ONLN);
    return VX_OK;
}
