/* upload.cu: host to device, so that the host need not wait.
 *
 * Large data goes over the bus beside whatever is computed meanwhile:
 *     host memory → pinned buffer        memcpy, by the host
 *                 → device buffer        on the upload stream
 *                 → target               on the compute stream, behind the upload's event
 * The last leg costs a thousandth of the first two. With it the target, like all pool memory, is touched on the compute
 * stream alone, and an upload needs no knowledge of who else uses it. Small data goes from the pinned buffer to the
 * target on the compute stream.
 *
 * The buffers are slots of a ring, filled one after the other. An event on the compute stream says when a slot is free
 * again, so the host runs ahead by as much as the ring holds. Where a large upload meets a slot in use the ring grows,
 * so that a whole batch can cross the bus while the step before it is computed. A slot's device buffer is pool memory
 * that the upload stream touches: that stream first waits for what the memory was used for before.
 */
#include "device.cuh"

#include <string.h>

static const size_t SLOT_BYTES = 4 << 20, SMALL = 256 << 10;

/* Makes what a slot consists of, as far as it is not there; with a device buffer where `staged`. */
static int complete_slot(device *d, upload_slot *s, bool staged)
{
    int status = VX_OK;
    if (!s->free) TRY(cudaEventCreateWithFlags(&s->free, cudaEventDisableTiming));
    if (!s->pinned) TRY(cudaMallocHost(&s->pinned, SLOT_BYTES));
    if (!status && !s->device && staged) {
        size_t held = SLOT_BYTES;
        status = host->pool_alloc(d->number, &held, (void **)&s->device);
        TRY(cudaEventRecord(s->free, d->stream)); /* what the memory was used for may still be queued */
        TRY(cudaStreamWaitEvent(d->upload, s->free, 0));
    }
    return status;
}

/* Puts a new slot into the ring at `place`, moving the others from there on; false where there is no memory for it. */
static bool insert_slot(device *d, int place)
{
    upload_slot fresh = {};
    if (complete_slot(d, &fresh, true)) {
        if (fresh.pinned) cudaFreeHost(fresh.pinned);
        if (fresh.free) cudaEventDestroy(fresh.free);
        cudaGetLastError();
        return false;
    }
    memmove(d->slots + place + 1, d->slots + place, sizeof(upload_slot) * (size_t)(d->slot_count - place));
    d->slots[place] = fresh;
    d->slot_count++;
    return true;
}

/* Finds a slot of the ring with room for bytes; with a device buffer where they are many. */
static int find_room(device *d, size_t bytes, upload_slot **out)
{
    int status = VX_OK;
    upload_slot *s = &d->slots[d->filling];
    const bool large = bytes > SMALL;
    if (s->pinned && s->used + bytes > SLOT_BYTES) {
        TRY(cudaEventRecord(s->free, d->stream));
        s->in_use = status == VX_OK;
        int next = (d->filling + 1) % d->slot_count;
        if (large && d->slots[next].in_use && d->slot_count < MOST_UPLOAD_SLOTS &&
            cudaEventQuery(d->slots[next].free) == cudaErrorNotReady) {
            cudaGetLastError();
            if (insert_slot(d, d->filling + 1)) next = d->filling + 1;
        }
        d->filling = next;
        s = &d->slots[next];
        if (s->in_use) TRY(cudaEventSynchronize(s->free));
        s->in_use = false;
        s->used = 0;
    }
    if (!status) status = complete_slot(d, s, large);
    *out = s;
    return status;
}

int upload(device *d, char *dst, const char *src, size_t bytes)
{
    int status = refuse_recording(d, "numbers of the host cannot be uploaded");
    for (size_t done = 0; !status && done < bytes;) {
        const size_t n = bytes - done < SLOT_BYTES ? bytes - done : SLOT_BYTES;
        upload_slot *s = 0;
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
