/* mpi.c: ranks over MPI: libvertex_mpi.so.
 *
 * Only point-to-point messages are used, all of them non-blocking and polled. MPI's own collectives have no deadline,
 * add in an order that depends on the message's length, and move only while somebody is inside MPI.
 *
 * A reduction has two phases: each rank owns a slice of the elements, gets that slice of all others, adds it up, and
 * sends the sum to all. So 2 (R - 1) / R of the bytes pass each rank each way, which is the least there is. A message
 * of at most SMALL bytes goes whole to everybody in one phase: one latency.
 *
 * A message's tag is the number of its work, counted alike on all ranks, and its phase. So works may overtake one
 * another, and a rank that does something else is noticed: the message has another size.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <mpi.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "group.h"

enum { SMALL = 4096, BLOCK = 512, MOST_TAGS = 16000, START_SECONDS = 25 };

static const vx_comm_host *host;
static int rank, size;
static int64_t works; /* begun so far */

typedef struct state {
    int phase, tag;
    int64_t first, end; /* elements of this rank's slice */
    char *inbox;        /* what arrives to be added: (size, slice) */
    int request_count, arrived;
    int *from;      /* a request's peer where it receives, else -1 */
    int64_t *bytes; /* that it should bring */
    MPI_Request *requests;
    MPI_Status *statuses;
} state;

/* -- Calls that MPI may not come back from ------------------------------------------------------------------------- */

static struct {
    pthread_mutex_t lock;
    pthread_cond_t over;
    pthread_t thread;
    const char *what;
} guard = {.lock = PTHREAD_MUTEX_INITIALIZER};

/* Ends the process where what is guarded is not over in time: the main thread is inside MPI and cannot. */
static void *watch(void *unused)
{
    (void)unused;
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    const double seconds = host->patience > START_SECONDS ? host->patience : START_SECONDS;
    until.tv_sec += (time_t)seconds;
    pthread_mutex_lock(&guard.lock);
    int late = 0;
    while (guard.what && late != ETIMEDOUT) late = pthread_cond_timedwait(&guard.over, &guard.lock, &until);
    if (guard.what) {
        char text[160];
        int n = snprintf(text, sizeof text, "rank %d: %s did not end within %.0f s; are all ranks there?\n", rank,
                         guard.what, seconds);
        if (write(2, text, (size_t)n) < 0) _exit(76);
        _exit(75);
    }
    pthread_mutex_unlock(&guard.lock);
    return NULL;
}

static void begin_guard(const char *what)
{
    pthread_condattr_t clock;
    pthread_condattr_init(&clock);
    pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
    pthread_cond_init(&guard.over, &clock);
    pthread_condattr_destroy(&clock);
    guard.what = what;
    if (pthread_create(&guard.thread, NULL, watch, NULL)) guard.what = NULL;
}

static void end_guard(void)
{
    pthread_mutex_lock(&guard.lock);
    const bool running = guard.what;
    guard.what = NULL;
    pthread_cond_signal(&guard.over);
    pthread_mutex_unlock(&guard.lock);
    if (running) pthread_join(guard.thread, NULL);
    pthread_cond_destroy(&guard.over);
}

/* -- Joining and leaving ------------------------------------------------------------------------------------------- */

static int fail_mpi(const char *what, int error)
{
    char text[MPI_MAX_ERROR_STRING] = "";
    int length;
    MPI_Error_string(error, text, &length);
    return host->fail(VX_ERANK, "%s: MPI says: %s", what, text);
}

static int open_mpi(int *my_rank, int *my_size, char *name, size_t name_size)
{
    int provided, length, error;
    char version[MPI_MAX_LIBRARY_VERSION_STRING] = "";
    begin_guard("MPI_Init");
    error = MPI_Init_thread(NULL, NULL, MPI_THREAD_FUNNELED, &provided);
    end_guard();
    if (error) return host->fail(VX_ERANK, "MPI_Init failed with %d", error);
    MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    MPI_Get_library_version(version, &length);
    version[strcspn(version, ",\n")] = 0; /* "Open MPI v4.1.4, package: ..." */
    if (!strncmp(version, "MPICH", 5)) {  /* "MPICH Version:\t4.0.2" */
        char *number = strpbrk(version, "0123456789");
        char short_version[64];
        snprintf(short_version, sizeof short_version, "MPICH %s", number ? number : "");
        snprintf(version, sizeof version, "%s", short_version);
    }
    snprintf(name, name_size, "mpi (%s)", version);
    *my_rank = rank;
    *my_size = size;
    return VX_OK;
}

static int close_mpi(void)
{
    begin_guard("MPI_Finalize");
    MPI_Finalize();
    end_guard();
    return VX_OK;
}

static void abort_mpi(int code)
{
    MPI_Abort(MPI_COMM_WORLD, code < 1 || code > 255 ? 1 : code);
    _exit(code < 1 || code > 255 ? 1 : code);
}

/* -- Messages ------------------------------------------------------------------------------------------------------ */

static void forget(vx_comm_work *w)
{
    state *s = w->state;
    if (!s) return;
    free(s->inbox);
    free(s->from);
    free(s->bytes);
    free(s->requests);
    free(s->statuses);
    free(s);
    w->state = NULL;
}

/* The state of a work that failed stays: MPI may still write there. */
static int broken(vx_comm_work *w, int status)
{
    w->failed = status;
    return status;
}

static int add_request(vx_comm_work *w, int error, int from, int64_t bytes)
{
    state *s = w->state;
    if (error) return broken(w, fail_mpi(w->name, error));
    s->from[s->request_count] = from;
    s->bytes[s->request_count++] = bytes;
    return VX_OK;
}

static int receive(vx_comm_work *w, void *to, int64_t bytes, int peer)
{
    state *s = w->state;
    return add_request(
        w, MPI_Irecv(to, (int)bytes, MPI_BYTE, peer, s->tag + s->phase, MPI_COMM_WORLD, &s->requests[s->request_count]),
        peer, bytes);
}

static int send(vx_comm_work *w, const void *from, int64_t bytes, int peer)
{
    state *s = w->state;
    return add_request(
        w,
        MPI_Isend(from, (int)bytes, MPI_BYTE, peer, s->tag + s->phase, MPI_COMM_WORLD, &s->requests[s->request_count]),
        -1, bytes);
}

static int64_t slice(int64_t count, int owner) { return count / size * owner + count % size * owner / size; }

/* -- Sums ---------------------------------------------------------------------------------------------------------- */

/* Returns rank r's numbers of this rank's slice. */
static const char *part_of(const vx_comm_work *w, int r)
{
    const state *s = w->state;
    if (r == rank) return (const char *)w->data + s->first * w->item;
    return s->inbox + (s->end - s->first) * w->item * r;
}

/* Adds up this rank's slice, in the order of the ranks, and writes it to its place. */
static int add_slices(vx_comm_work *w)
{
    const state *s = w->state;
    const int64_t count = s->end - s->first;
    char *out = (char *)w->data + s->first * w->item;
    for (int64_t at = 0; at < count; at += BLOCK) {
        const int n = (int)(count - at < BLOCK ? count - at : BLOCK);
        double sum[BLOCK];
        int64_t whole[BLOCK];
        for (int r = 0; r < size; r++) {
            const char *part = part_of(w, r) + at * w->item;
            if (w->sum == VX_SUM_F32) {
                const float *x = (const float *)part;
                for (int i = 0; i < n; i++) sum[i] = r ? sum[i] + x[i] : x[i];
            } else if (w->sum == VX_SUM_F64) {
                const double *x = (const double *)part;
                for (int i = 0; i < n; i++) sum[i] = r ? sum[i] + x[i] : x[i];
            } else {
                const int32_t *x = (const int32_t *)part;
                for (int i = 0; i < n; i++) whole[i] = r ? whole[i] + x[i] : x[i];
            }
        }
        if (w->sum == VX_SUM_F32) {
            float *y = (float *)out + at;
            for (int i = 0; i < n; i++) y[i] = (float)(sum[i] * w->scale);
        } else if (w->sum == VX_SUM_F64) {
            double *y = (double *)out + at;
            for (int i = 0; i < n; i++) y[i] = sum[i] * w->scale;
        } else {
            int32_t *y = (int32_t *)out + at;
            for (int i = 0; i < n; i++) {
                if (whole[i] != (int32_t)whole[i])
                    return broken(
                        w, host->fail(VX_ERANK, "%s: a sum is %lld, beyond int32", w->name, (long long)whole[i]));
                y[i] = (int32_t)whole[i];
            }
        }
    }
    return VX_OK;
}

/* -- Verbs --------------------------------------------------------------------------------------------------------- */

/* Each rank's whole vector goes to all others. */
static int start_small(vx_comm_work *w)
{
    state *s = w->state;
    const int64_t bytes = w->count * w->item;
    s->first = 0;
    s->end = w->count;
    for (int p = 0; p < size; p++)
        if (p != rank && receive(w, s->inbox + bytes * p, bytes, p)) return w->failed;
    /* what is sent is a copy in the inbox, since the sum overwrites the data while it may still be on its way */
    memcpy(s->inbox + bytes * rank, w->data, (size_t)bytes);
    for (int p = 0; p < size; p++)
        if (p != rank && send(w, s->inbox + bytes * rank, bytes, p)) return w->failed;
    return VX_OK;
}

static int start_reduce(vx_comm_work *w)
{
    state *s = w->state;
    s->first = slice(w->count, rank);
    s->end = slice(w->count, rank + 1);
    const int64_t mine = (s->end - s->first) * w->item;
    for (int p = 0; p < size; p++)
        if (p != rank && receive(w, s->inbox + mine * p, mine, p)) return w->failed;
    for (int p = 0; p < size; p++) {
        const int64_t first = slice(w->count, p), end = slice(w->count, p + 1);
        if (p != rank && send(w, (char *)w->data + first * w->item, (end - first) * w->item, p)) return w->failed;
    }
    return VX_OK;
}

/* Hands this rank's sums out and takes those of the others. */
static int start_sharing(vx_comm_work *w)
{
    state *s = w->state;
    s->phase = 1;
    s->request_count = 0;
    for (int p = 0; p < size; p++) {
        const int64_t first = slice(w->count, p), end = slice(w->count, p + 1);
        if (p != rank && receive(w, (char *)w->data + first * w->item, (end - first) * w->item, p)) return w->failed;
    }
    for (int p = 0; p < size; p++)
        if (p != rank && send(w, (char *)w->data + s->first * w->item, (s->end - s->first) * w->item, p))
            return w->failed;
    return VX_OK;
}

static int start_gather(vx_comm_work *w)
{
    const int64_t bytes = w->count * w->item;
    for (int p = 0; p < size; p++)
        if (p != rank && receive(w, (char *)w->all + bytes * p, bytes, p)) return w->failed;
    memcpy((char *)w->all + bytes * rank, w->data, (size_t)bytes);
    for (int p = 0; p < size; p++)
        if (p != rank && send(w, w->data, bytes, p)) return w->failed;
    return VX_OK;
}

static int start_broadcast(vx_comm_work *w)
{
    const int64_t bytes = w->count * w->item;
    if (rank != w->root) return receive(w, w->data, bytes, w->root);
    for (int p = 0; p < size; p++)
        if (p != rank && send(w, w->data, bytes, p)) return w->failed;
    return VX_OK;
}

static bool is_small(const vx_comm_work *w) { return w->count * w->item <= SMALL; }

static int start(vx_comm_work *w)
{
    if (w->count * w->item > 0x7fffffff)
        return host->fail(VX_EINVAL, "%s: %lld bytes, expected at most 2^31 - 1", w->name,
                          (long long)(w->count * w->item));
    const size_t requests = 2 * (size_t)size;
    state *s = calloc(1, sizeof *s);
    w->state = s;
    if (s) {
        s->tag = (int)(works++ % MOST_TAGS) * 2;
        s->from = malloc(sizeof *s->from * requests);
        s->bytes = malloc(sizeof *s->bytes * requests);
        s->requests = malloc(sizeof *s->requests * requests);
        s->statuses = malloc(sizeof *s->statuses * requests);
        const size_t each = is_small(w) ? (size_t)w->count : (size_t)(w->count / size + 1);
        if (w->verb == VX_COMM_REDUCE) s->inbox = malloc(each * (size_t)w->item * (size_t)size + 1);
    }
    if (!s || !s->from || !s->bytes || !s->requests || !s->statuses || (w->verb == VX_COMM_REDUCE && !s->inbox)) {
        forget(w);
        return host->fail(VX_ENOMEM, "%s: out of memory for messages", w->name);
    }
    if (w->verb == VX_COMM_GATHER) return start_gather(w);
    if (w->verb == VX_COMM_BROADCAST) return start_broadcast(w);
    return is_small(w) ? start_small(w) : start_reduce(w);
}

static int other_size(vx_comm_work *w, int from, int64_t expected, int64_t came)
{
    char told[48] = "more";
    if (came >= 0) snprintf(told, sizeof told, "%lld", (long long)came);
    return broken(w, host->fail(VX_ERANK,
                                "%s: rank %d sent %s bytes where rank %d expects %lld: the ranks do not do the same",
                                w->name, from, told, rank, (long long)expected));
}

/* Checks the messages of a phase that is over. */
static int check_messages(vx_comm_work *w, int error)
{
    const state *s = w->state;
    for (int i = 0; i < s->request_count; i++) {
        const int e = error == MPI_ERR_IN_STATUS ? s->statuses[i].MPI_ERROR : error;
        int class = MPI_SUCCESS, came = 0;
        if (e == MPI_ERR_PENDING) continue;
        if (e) MPI_Error_class(e, &class);
        if (class == MPI_ERR_TRUNCATE && s->from[i] >= 0) return other_size(w, s->from[i], s->bytes[i], -1);
        if (e) return broken(w, fail_mpi(w->name, e));
        if (s->from[i] < 0) continue;
        MPI_Get_count(&s->statuses[i], MPI_BYTE, &came);
        if (came != s->bytes[i]) return other_size(w, s->from[i], s->bytes[i], came);
    }
    return VX_OK;
}

static int progress(vx_comm_work *w)
{
    state *s = w->state;
    if (w->done || w->failed || !s) return 0;
    int all = 0, error = MPI_Testall(s->request_count, s->requests, &all, s->statuses);
    if (!error && !all) { /* a slow transfer is no dead rank: pieces that came count as progress */
        int arrived = 0;
        for (int i = 0; i < s->request_count; i++) {
            int one = 0;
            if (s->from[i] >= 0) MPI_Request_get_status(s->requests[i], &one, MPI_STATUS_IGNORE);
            arrived += one;
        }
        const int more = arrived - s->arrived;
        s->arrived = arrived;
        return more;
    }
    if (check_messages(w, error)) return 0;
    if (w->verb == VX_COMM_REDUCE && s->phase == 0) {
        if (add_slices(w)) return 0;
        if (!is_small(w)) {
            s->arrived = 0;
            start_sharing(w);
            return 1;
        }
    }
    w->done = true;
    forget(w);
    return 1;
}

static void missing(const vx_comm_work *w, char *text, size_t text_size)
{
    const state *s = w->state;
    size_t used = 0;
    text[0] = 0;
    for (int i = 0; s && i < s->request_count && used < text_size; i++) {
        int here = 0;
        if (s->from[i] < 0) continue;
        MPI_Request_get_status(s->requests[i], &here, MPI_STATUS_IGNORE);
        if (!here) used += (size_t)snprintf(text + used, text_size - used, "%s%d", used ? ", " : "", s->from[i]);
    }
}

static const vx_comm_group group = {open_mpi, start, progress, missing, abort_mpi, close_mpi};

const vx_comm_group *vx_comm_entry(const vx_comm_host *given)
{
    host = given;
    return &group;
}
