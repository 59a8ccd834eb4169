/* audio_format.h: what the bytes of an audio file say before anything is decoded. */
#ifndef VX_AUDIO_FORMAT_H
#define VX_AUDIO_FORMAT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { VX_AUDIO_HEAD = 1024 }; /* bytes that tell the formats apart, and hold the header of NIST SPHERE */

typedef struct vx_audio_format {
    const char *name;
    int offset, length;
    const char *magic;
    bool readable; /* libsndfile has a reader */
} vx_audio_format;

/* Tells the format by the first bytes of a file, up to VX_AUDIO_HEAD of them; NULL where they are of none. */
const vx_audio_format *vx_audio_sniff(const uint8_t *head, size_t count);

/* Counts the samples that the frames of an MP3 file hold; 0 where a Xing, Info or VBRI header says their number. */
int64_t vx_count_mp3(const uint8_t *bytes, size_t count);

/* Checks the size that an IFF (RIFF, RIFX, FORM) or AU file says it has, by its first bytes: libsndfile takes what is
 * left of a cut one for the whole. VX_EIO. */
int vx_check_size(const uint8_t *head, int64_t size);

/* Reads how many samples of each channel the header of a NIST SPHERE file promises, for the same reason; -1 where it
 * does not say. head: VX_AUDIO_HEAD bytes. */
int64_t vx_nist_count(const uint8_t *head);

#endif
