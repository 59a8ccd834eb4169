/* audio.h: audio in, the synthetic speech set, and streams of crops. Part of vertex.h, which includes it (its
 * conventions hold here); no #include of its own, so that its text can be read by LuaJIT as it is.
 *
 * A wave is an f32 tensor (L) on the CPU: one channel, full scale at 1. Files of several channels are mixed to their
 * mean. Integer samples are divided by 2^(bits - 1), exactly; values beyond 1, which float files and lossy codecs have,
 * are kept. What a file is is judged by its first bytes, never by its name; what libsndfile reads is read.
 *
 * Another rate than asked for is converted by libsamplerate, without delay: n samples at rate r become
 * ceil(n new / r). The quality is "best" (flat to 0.97 of half the lower rate) or "medium" (0.9, three times as fast).
 */
#ifndef VX_AUDIO_H
#define VX_AUDIO_H

/* What is known of a file that was decoded from end to end. */
typedef struct vx_audio_info {
    int64_t bytes, modified; /* the file's size, and when it was written, microseconds since 1970 */
    int64_t frames;          /* samples of each channel; counted, since headers may be wrong */
    int64_t rate, channels;
    bool exact_seek;  /* a decoder that starts at any sample gives what one that starts at the first gives there */
    char reason[240]; /* why the file cannot be used: damaged, cut short, no audio, a NaN; else "" */
} vx_audio_info;

/* Tells what the first bytes of a file say it is: "FLAC", "WAV", "Ogg", ... or "none". *readable: a format that
 * libsndfile has a reader for. */
VX_API int vx_audio_kind(const char *path, const char **kind, bool *readable);

/* Tells a file's size, and when it was written, as vx_audio_info has them. VX_EIO. */
VX_API int vx_audio_stamp(const char *path, int64_t *bytes, int64_t *modified);

/* Decodes a file to a wave at `rate`, or at its own where rate is 0. info: what vx_audio_scan() says of it. VX_EIO with
 * the reason. */
VX_API int vx_audio_open(vx_tensor **out, const char *path, int64_t rate, const char *quality, vx_audio_info *info);

/* Decodes count files from end to end and tells of each what there is; on several threads. VX_EINTR where
 * vx_interrupted() became true: then files not looked at have 0 channels and no reason. */
VX_API int vx_audio_scan(const char *const *paths, int64_t count, vx_audio_info *out);

/* Resamples a wave from one rate to another, in samples a second. */
VX_API int vx_audio_resample(vx_tensor **out, const vx_tensor *x, int64_t rate, int64_t new_rate, const char *quality);

/* Makes utterance `index` of the synthetic set `seed`: a wave at 16,000 samples a second, 2 to 10 seconds long. It is a
 * function of (seed, index). Indices 2^32 apart have other voices. */
VX_API int vx_synthetic_speech(vx_tensor **out, int64_t seed, int64_t index);

/* -- Streams of crops ---------------------------------------------------------------------------------------------- */

typedef struct vx_audio_options {
    int64_t crop;        /* samples of a row; what is shorter is followed by zeros */
    int64_t rate;        /* samples a second */
    const char *quality; /* of another rate's conversion */
    const char *place;   /* "random": a crop a file and epoch; "start": the first samples; "all": every file in crops
                          * one after the other, each an item of its own */
    int64_t shortest;    /* samples: what "all" would leave of a file below this is dropped; at least 1 */
    bool normalize;      /* (x - mean) / sqrt(variance + eps) over the samples of each crop */
    double eps;
    int64_t cache_bytes; /* waves that are decoded whole are kept in memory up to here */
} vx_audio_options;

/* Starts a stream of audio files, all of them without a reason against them and not empty. Its outputs are waves, f32
 * (batch, crop), and lengths, i32 (batch): samples of each row that are of the file. paths, infos: count of each,
 * copied. Where a codec seeks exactly and the rate is the file's own, a crop is read by itself; else the file is
 * decoded whole. */
VX_API int vx_audio_stream(vx_data_stream **out, const char *const *paths, const vx_audio_info *infos, int64_t count,
                           const vx_data_stream_options *stream, const vx_audio_options *options);

/* Starts a stream of utterances first .. first + count - 1 of the synthetic set speech_seed, whose rate is 16,000;
 * outputs and options as for files. */
VX_API int vx_speech_stream(vx_data_stream **out, int64_t speech_seed, int64_t first, int64_t count,
                            const vx_data_stream_options *stream, const vx_audio_options *options);

#endif
