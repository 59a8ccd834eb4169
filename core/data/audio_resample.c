/* audio_resample.c: another sampling rate, through libsamplerate's band-limited sinc interpolation [Smith and Gossett
 * 1984, "A flexible sampling-rate conversion method"].
 *
 * libsamplerate itself makes one sample too few for many exact ratios (15,999 of 44,100 at "medium"), and drops what is
 * still in its filter at the end. So the wave is followed by zeros, as many as the filter is long, and the output is
 * taken up to ceil(n new / old), which is also how many torchaudio makes. There is no delay. The first and last
 * samples, half a filter's length, see the silence around the wave.
 *
 * The pass band ends at 0.97 (best) and 0.9 (medium) of half the lower rate, stop bands lie 144 and 121 dB down.
 * torchaudio's default filter is another: its output is 1.8 dB lower at 7 of 8 kHz and aliases from 8.1 kHz by -7 dB.
 */
#include <samplerate.h>
#include <string.h>

#include "sound.h"

enum { PIECE = 1 << 20, TAPS = 512 }; /* TAPS: zeros that empty the longest filter, in samples of the lower rate */

const char *const vx_qualities[] = {"best", "medium", NULL};

int64_t vx_resampled_count(int64_t count, int64_t rate, int64_t new_rate)
{
    return (count * new_rate + rate - 1) / rate; /* below 2^30 2^20 */
}

/* Feeds the wave, then zeros, until `out` is full or nothing comes any more. */
static int convert(SRC_STATE *state, vx_wave *out, const float *x, int64_t count, double ratio)
{
    static const float zeros[1024];
    int64_t made = 0, used = 0, end = count + (int64_t)(TAPS * (ratio < 1 ? 1 / ratio : 1));
    for (;;) {
        bool tail = used >= count;
        int64_t left = tail ? end - used : count - used, most = tail ? 1024 : PIECE, fed = left < most ? left : most;
        SRC_DATA d = {.data_in = tail ? zeros : x + used,
                      .input_frames = (long)fed,
                      .data_out = vx_wave_data(out) + made,
                      .output_frames = (long)(out->count - made),
                      .end_of_input = used + fed == end,
                      .src_ratio = ratio};
        int error = src_process(state, &d);
        if (error) return vx_fail(VX_EIO, "libsamplerate: %s", src_strerror(error));
        used += d.input_frames_used;
        made += d.output_frames_gen;
        if (made == out->count) return VX_OK;
        if (used == end && d.output_frames_gen == 0) break;
    }
    memset(vx_wave_data(out) + made, 0, sizeof(float) * (size_t)(out->count - made));
    return VX_OK;
}

int vx_sound_resample(vx_wave *out, const float *x, int64_t count, int64_t rate, int64_t new_rate, int quality)
{
    static const int converters[] = {SRC_SINC_BEST_QUALITY, SRC_SINC_MEDIUM_QUALITY};
    double ratio = (double)new_rate / (double)rate;
    int error;
    if (!src_is_valid_ratio(ratio))
        return vx_fail(VX_EIO, "%lld samples a second cannot become %lld, at most 256 times more or less are possible",
                       (long long)rate, (long long)new_rate);
    int64_t wanted = vx_resampled_count(count, rate, new_rate);
    if (wanted > VX_SOUND_MOST)
        return vx_fail(VX_EIO, "%lld samples after resampling, at most %d", (long long)wanted, VX_SOUND_MOST);
    int status = vx_wave_reserve(out, wanted);
    if (status || wanted == 0) return status;
    SRC_STATE *state = src_new(converters[quality], 1, &error);
    if (!state) return vx_fail(VX_ENOMEM, "libsamplerate: %s", src_strerror(error));
    status = convert(state, out, x, count, ratio);
    src_delete(state);
    return status;
}
