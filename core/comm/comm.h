/* comm.h: several processes that train together, the ranks of one job. Part of the surface that LuaJIT reads
 * (surface.h); the conventions of vertex.h hold here. No #include of its own.
 *
 * A launcher (mpirun, srun) starts the processes and tells each by environment variables which rank it is. Without such
 * variables a process is rank 0 of 1, and every verb does at once what it does for one rank. With them the ranks talk
 * through libvertex_mpi.so, which is opened at run time (group.h).
 *
 * Verbs are collective: every rank calls the same ones, in the same order and with the same shapes. Where one does not
 * come within VERTEX_RANK_TIMEOUT seconds (25), or comes with another shape, the others get VX_ERANK with a text that
 * names it; then the only way on is vx_comm_abort. Nothing blocks inside MPI: waits poll, so that every wait ends.
 *
 * Sums have the same bits on all ranks and in every run with as many ranks: each element is added up in the order of
 * the ranks, in double (i32: exactly), scaled, and rounded once. They do not depend on how elements are packed.
 *
 * Memory of a device (vx_device_can "host" is 0) travels by way of the host (staged.c).
 */
#ifndef VX_COMM_H
#define VX_COMM_H

enum { VX_ERANK = 9 }; /* another status: a rank did not come, or does something else */

/* Joins the job that a launcher started, if one did; called again it does nothing. VX_ENOSUP where this is not
 * possible, and says what is missing or mixed up. All functions below need it, except where they say otherwise. */
VX_API int vx_comm_open(void);

/* Questions that cannot fail. Before vx_comm_open, and where it failed: what the launcher's variables say. */
VX_API int vx_comm_rank(void);
VX_API int vx_comm_size(void);
VX_API const char *vx_comm_name(void); /* "self", "mpi (Open MPI v4.1.4)" */

/* x becomes the sum over the ranks, times scale: f32; or i32, where scale is 1 and a sum beyond int32 is an error. */
VX_API int vx_comm_all_reduce(vx_tensor *x, double scale);
/* all (size, ...x) becomes the x of all ranks, in their order; any dtype. */
VX_API int vx_comm_all_gather(vx_tensor *all, const vx_tensor *x);
/* x becomes that of rank root. */
VX_API int vx_comm_broadcast(vx_tensor *x, int root);
VX_API int vx_comm_barrier(void);
/* Ends all ranks: within about two seconds, also those that hang. Prints nothing. Returns only for a single rank. */
VX_API void vx_comm_abort(int code);

/* all_reduce of numbers; all_gather of `count` of them each, all (size, count). */
VX_API int vx_comm_sum(double *x, int64_t count);
VX_API int vx_comm_gather(double *all, const double *x, int64_t count);

/* An all_reduce that goes on while the caller computes: between begin and end, x is not to be touched, and
 * vx_comm_progress is to be called now and then: without it nothing moves. Any number may be under way, begun in the
 * same order on all ranks. end waits, and frees the work, also where it fails. */
typedef struct vx_comm_work vx_comm_work;
VX_API int vx_comm_begin(vx_comm_work **out, vx_tensor *x, double scale);
VX_API int vx_comm_progress(void);
VX_API int vx_comm_end(vx_comm_work *work);

/* Chooses the best of all ranks' candidates, of which each rank has K for each of L places, in descending order of
 * their keys f32 (size, L, K). near i32 (L, K) are those of rank `rank`: what is not among the K best of all ranks
 * becomes -1. best f32 (L, K) receives the keys of the K best, in descending order. Ties go to the lower rank. Nothing
 * is sent; all on the CPU. */
VX_API int vx_comm_choose(vx_tensor *near, vx_tensor *best, const vx_tensor *keys, int rank);

/* Leaves the job, which ends well when all ranks have: to be called once, last, and never after an error. */
VX_API int vx_comm_close(void);

/* Ranks have to see an interrupt at the same step. While it is held back (1), vx_interrupted() tells what was agreed
 * on: 0, and 1 from vx_interrupt_agree() on. vx_interrupt_raised() tells whether this process itself got a signal:
 * SIGINT, SIGTERM, SIGHUP, or SIGUSR1, which launchers hand on as it is; vx_interrupt_catch(1) catches them alike. */
VX_API int vx_interrupt_hold(int on);
VX_API int vx_interrupt_raised(void);
VX_API void vx_interrupt_agree(void);

/* Mixes the bytes of a tensor into *hash (to begin with, any number). */
VX_API int vx_comm_hash(uint64_t *hash, const vx_tensor *x);

/* Where a process runs, so that ranks of one machine can share it. */
typedef struct vx_place_of_rank {
    double host; /* a number for this machine, below 2^53 */
    double mask; /* a number for the set of cores that this process may run on, below 2^53 */
    int allowed; /* how many those are */
    int cores;   /* of the machine */
} vx_place_of_rank;
VX_API int vx_comm_place(vx_place_of_rank *place);

#endif
