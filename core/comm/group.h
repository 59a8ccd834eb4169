/* group.h: what joins the ranks: a group is a table of functions that move memory. self.c is the group of one rank.
 * libvertex_mpi.so brings another (mpi.c), for the host's memory, and libvertex_nccl.so (nccl.c) one for that of CUDA
 * devices. Both link nothing of this library, are handed what they need as a vx_comm_host, and export the two functions
 * at the end.
 */
#ifndef VX_GROUP_H
#define VX_GROUP_H

#include "vertex.h"

#include "comm.h"

enum { VX_COMM_REDUCE, VX_COMM_GATHER, VX_COMM_BROADCAST };
enum { VX_SUM_F32, VX_SUM_I32, VX_SUM_F64 }; /* what a reduction adds up */

/* A verb under way. comm.c fills in what comes first; `done`, `failed` and `state` are the group's. */
struct vx_comm_work {
    int verb;
    int sum;      /* reduce: VX_SUM_ */
    double scale; /* reduce */
    int root;     /* broadcast */
    void *data;   /* (count) elements of `item` bytes: reduced or broadcast in place; gather reads its own block */
    void *all;    /* gather: (size, count) */
    int64_t count, item;
    const char *name; /* of the verb, for messages */
    bool done;
    int failed; /* a status: it will never be done */
    void *state;
    /* comm.c's */
    const struct vx_comm_group *group;
    vx_tensor *tensor; /* staged: where the result goes */
    bool staged;
    struct vx_comm_work *next;
};

/* What a group needs of this library. */
typedef struct vx_comm_host {
    int (*fail)(int status, const char *format, ...) __attribute__((format(printf, 2, 3))); /* vx_fail */
    double patience; /* seconds that a wait may last */
    /* For a group of devices: gathers `bytes` of each rank's host memory, and the device's number among its kind. */
    int (*gather)(void *all, const void *own, int64_t bytes);
    int ordinal;
} vx_comm_host;

/* Every int result is a status, with vx_error() set, unless its line says otherwise. */
typedef struct vx_comm_group {
    /* Joins. The host's group tells rank and size, one of devices is told. */
    int (*open)(int *rank, int *size, char *name, size_t name_size);
    int (*start)(vx_comm_work *work);
    /* Moves what can be moved without waiting. Returns how many pieces have arrived since it was asked last. */
    int (*progress)(vx_comm_work *work);
    /* Writes the ranks that a work waits for, "1, 3", into text. */
    void (*missing)(const vx_comm_work *work, char *text, size_t size);
    void (*abort)(int code);
    int (*close)(void);
} vx_comm_group;

extern const vx_comm_group vx_comm_self;

/* The declarations that two libraries must agree on, as vx_backend_signature in host.h. */
VX_API const char *vx_comm_signature(void);
/* Keeps host, which lives as long as the process, and returns the group. */
VX_API const vx_comm_group *vx_comm_entry(const vx_comm_host *host);

#endif
