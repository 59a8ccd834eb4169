/* sound.h: decoding, resampling and synthesis below the tensors: plain buffers that grow and are used again, for a
 * stream's workers. Failures set the calling thread's vx_error() to the reason alone; who knows the file's name adds
 * it. */
#ifndef VX_SOUND_H
#define VX_SOUND_H

#include "bytes.h"
#include "core/internal.h"

enum {
    VX_SPEECH_RATE = 16000,     /* of the synthetic set */
    VX_SOUND_MOST = 1 << 30,    /* samples of a wave; what is longer is refused */
    VX_SOUND_MAX_RATE = 768000, /* samples a second */
};

/* A wave in memory: `count` floats at bytes.data. Zero-initialized is empty. */
typedef struct vx_wave {
    int64_t count;
    vx_bytes bytes;
} vx_wave;

static inline float *vx_wave_data(const vx_wave *w) { return (float *)w->bytes.data; }

/* Makes room for count samples, their content undefined, and sets w->count. VX_ENOMEM. */
int vx_wave_reserve(vx_wave *w, int64_t count);

/* Decodes a file whole, mixed to one channel, at its own rate; *info is filled in. work: scratch of the caller. */
int vx_sound_whole(const char *path, vx_wave *out, vx_bytes *work, vx_audio_info *info);

/* Decodes samples first .. first + count - 1 of a file whose info says exact_seek. VX_EIO also where the file is no
 * longer what the info says. */
int vx_sound_window(const char *path, const vx_audio_info *info, int64_t first, int64_t count, float *to,
                    vx_bytes *work);

/* The names of the qualities, ended by NULL; a quality's number is its place. */
extern const char *const vx_qualities[];

/* Gives ceil(count new_rate / rate), how many samples vx_sound_resample() makes. */
int64_t vx_resampled_count(int64_t count, int64_t rate, int64_t new_rate);

/* Resamples a wave. VX_EIO for a pair of rates beyond what libsamplerate converts. */
int vx_sound_resample(vx_wave *out, const float *x, int64_t count, int64_t rate, int64_t new_rate, int quality);

/* Makes utterance `index` of the synthetic set `seed`. VX_ENOMEM. */
int vx_sound_speech(vx_wave *out, uint64_t seed, uint64_t index);

/* Gives the number of samples of that utterance. */
int64_t vx_speech_count(uint64_t seed, uint64_t index);

#endif
