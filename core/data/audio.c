/* audio.c: audio files to waves, through libsndfile.
 *
 * What headers say of the length may be wrong both ways: a FLAC file that was cut still promises all its samples, one
 * that came through a pipe promises 2^63 - 1, an MP3 file without a Xing, Info or VBRI header gets a guess. So nothing
 * is allocated from it: blocks are read until there are no more, and the count is compared with the promise where that
 * is one. libsndfile's error codes alone do not tell: a complete file with a tag behind it sets one, a cut file may
 * not. Of cut WAV, AIFF, AU and NIST files it takes what is left for all; there audio_format.c asks the header.
 *
 * libFLAC makes up silence for frames that it finds damaged, so the count stays right. The error code tells then, as
 * long as nothing is asked for beyond the last sample, where a tag would set it too.
 *
 * Of an MP3 file without such a header libsndfile reads no more than it guesses, so the end of one whose bit rate
 * varies may be missing without a sign; here the frame headers are counted as well, and such a file is refused.
 *
 * A decoder that starts in the middle gives the same samples as one that starts at the beginning for PCM, FLAC and
 * ADPCM, not for Vorbis, Opus and MP3. Formats not known to are decoded whole.
 */
#include <errno.h>
#include <math.h>
#include <pthread.h>
#include <sndfile.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "audio_format.h"
#include "sound.h"

enum {
    BLOCK = 4096,         /* frames read at a time */
    MAX_MP3 = 1 << 30,    /* bytes of an MP3 file whose frames are counted */
    MP3_SLACK = 3 * 1152, /* samples that a decoder may leave out at the ends of an MP3 file */
};

static const int64_t NO_PROMISE = INT64_C(1) << 40; /* frames in a header from which on they mean "unknown" */

/* -- Stamps -------------------------------------------------------------------------------------------------------- */

static int64_t microseconds(const struct stat *about)
{
    return about->st_mtim.tv_sec * INT64_C(1000000) + about->st_mtim.tv_nsec / 1000;
}

int vx_audio_stamp(const char *path, int64_t *bytes, int64_t *modified)
{
    struct stat about;
    if (!path) return vx_fail(VX_EINVAL, "audio_stamp: no path");
    if (stat(path, &about)) return vx_fail(VX_EIO, "%s: %s", path, strerror(errno));
    *bytes = about.st_size;
    *modified = microseconds(&about);
    return VX_OK;
}

/* -- Opening ------------------------------------------------------------------------------------------------------- */

typedef struct sound {
    const vx_audio_format *format;
    struct stat about;
    uint8_t head[VX_AUDIO_HEAD]; /* the first bytes of the file */
    int fd;
    int64_t at; /* byte at which libsndfile reads on */
    SNDFILE *file;
    SF_INFO info;
    bool exact_seek;
    bool error_tells; /* an error code within the promised frames means that the file is damaged */
    int64_t promised; /* frames; -1 where the file does not say */
} sound;

/* libsndfile reads through these. Given a descriptor, it closes that of a file that it cannot open, asked to or not. */

static sf_count_t tell_size(void *user) { return ((const sound *)user)->about.st_size; }

static sf_count_t seek_byte(sf_count_t offset, int whence, void *user)
{
    sound *s = user;
    int64_t from = whence == SEEK_SET ? 0 : whence == SEEK_CUR ? s->at : s->about.st_size;
    if (offset < -from || offset > INT64_MAX - from) return -1;
    return s->at = from + offset;
}

static sf_count_t read_bytes(void *to, sf_count_t count, void *user)
{
    sound *s = user;
    int64_t done = 0;
    while (done < count) {
        ssize_t got = pread(s->fd, (char *)to + done, (size_t)(count - done), s->at + done);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) break;
        done += got;
    }
    s->at += done;
    return done;
}

static sf_count_t write_bytes(const void *from, sf_count_t count, void *user)
{
    (void)from, (void)count, (void)user;
    return 0;
}

static sf_count_t tell_byte(void *user) { return ((const sound *)user)->at; }

/* libsndfile keeps the reason of a failed open in a global variable. Opening holds this lock to read; a failed one is
 * tried again alone, so that no other thread's failure gets in between. */
static pthread_rwlock_t opening = PTHREAD_RWLOCK_INITIALIZER;

static SNDFILE *try_open(sound *s)
{
    SF_VIRTUAL_IO io = {tell_size, seek_byte, read_bytes, write_bytes, tell_byte};
    s->info = (SF_INFO){0};
    s->at = 0;
    return sf_open_virtual(&io, SFM_READ, &s->info, s);
}

static int open_decoder(sound *s)
{
    pthread_rwlock_rdlock(&opening);
    s->file = try_open(s);
    pthread_rwlock_unlock(&opening);
    if (s->file) return VX_OK;
    int status = VX_OK;
    pthread_rwlock_wrlock(&opening);
    s->file = try_open(s);
    if (!s->file)
        status =
            vx_fail(VX_EIO, "%s, but libsndfile cannot read it: %s To convert: ffmpeg -i FILE -ar 16000 -ac 1 X.flac",
                    s->format->name, sf_strerror(NULL));
    pthread_rwlock_unlock(&opening);
    return status;
}

/* Counts the samples of an MP3 file without a header; 0 with one. */
static int scan_mp3(const char *path, int64_t *samples)
{
    vx_bytes file = {0};
    struct stat about;
    int fd;
    int status = vx_open_regular(path, &fd, &about);
    if (status) return status;
    int64_t size = about.st_size;
    if (size > MAX_MP3) status = vx_fail(VX_EIO, "%lld bytes of MP3, at most %d are read", (long long)size, MAX_MP3);
    if (!status) status = vx_bytes_reserve(&file, (size_t)size);
    if (!status) {
        size = vx_read_all(fd, file.data, size);
        if (size < 0) status = vx_fail(VX_EIO, "%s", strerror(errno));
        else *samples = vx_count_mp3(file.data, (size_t)size);
    }
    vx_bytes_release(&file);
    close(fd);
    return status;
}

/* Says whether a decoder of the format that starts anywhere gives the samples of one that starts at the first. */
static bool seeks_exactly(const SF_INFO *info)
{
    if (!info->seekable || info->frames >= NO_PROMISE) return false;
    switch (info->format & SF_FORMAT_TYPEMASK) {
    case SF_FORMAT_FLAC: return true;
    case SF_FORMAT_WAV:
    case SF_FORMAT_WAVEX:
    case SF_FORMAT_RF64:
    case SF_FORMAT_W64:
    case SF_FORMAT_AIFF:
    case SF_FORMAT_AU:
    case SF_FORMAT_CAF:
    case SF_FORMAT_NIST: break;
    default: return false;
    }
    switch (info->format & SF_FORMAT_SUBMASK) {
    case SF_FORMAT_PCM_S8:
    case SF_FORMAT_PCM_U8:
    case SF_FORMAT_PCM_16:
    case SF_FORMAT_PCM_24:
    case SF_FORMAT_PCM_32:
    case SF_FORMAT_FLOAT:
    case SF_FORMAT_DOUBLE:
    case SF_FORMAT_ULAW:
    case SF_FORMAT_ALAW:
    case SF_FORMAT_IMA_ADPCM:
    case SF_FORMAT_MS_ADPCM: return true;
    }
    return false;
}

/* Decides how many frames an opened file promises. */
static int read_promise(const char *path, sound *s)
{
    int64_t samples = 0;
    int status = VX_OK;
    s->promised = s->info.frames < NO_PROMISE ? s->info.frames : -1;
    switch (s->info.format & SF_FORMAT_TYPEMASK) {
    case SF_FORMAT_OGG: s->promised = -1; break; /* counted by the last page, which a cut file lacks */
    case SF_FORMAT_NIST: s->promised = vx_nist_count(s->head); break;
    case SF_FORMAT_MPEG:
        status = scan_mp3(path, &samples);
        if (!status && samples > 0) s->promised = samples > MP3_SLACK ? samples - MP3_SLACK : 0;
    }
    return status ? status : vx_check_size(s->head, s->about.st_size);
}

static void close_sound(sound *s)
{
    if (s->file) sf_close(s->file);
    close(s->fd);
}

static int open_sound(const char *path, sound *s)
{
    *s = (sound){0};
    int status = vx_open_regular(path, &s->fd, &s->about);
    if (status) return status;
    int64_t got = vx_read_all(s->fd, s->head, VX_AUDIO_HEAD);
    if (got < 0) status = vx_fail(VX_EIO, "%s", strerror(errno));
    else if (got == 0) status = vx_fail(VX_EIO, "an empty file");
    if (!status) s->format = vx_audio_sniff(s->head, (size_t)got);
    if (!status && !s->format) status = vx_fail(VX_EIO, "no audio by its content");
    if (!status) status = open_decoder(s);
    if (!status && (s->info.samplerate < 1 || s->info.samplerate > VX_SOUND_MAX_RATE))
        status = vx_fail(VX_EIO, "%d samples a second, expected 1 to %d", s->info.samplerate, VX_SOUND_MAX_RATE);
    if (!status) s->exact_seek = seeks_exactly(&s->info);
    s->error_tells = (s->info.format & SF_FORMAT_TYPEMASK) == SF_FORMAT_FLAC;
    if (status) close_sound(s);
    return status;
}

/* -- Reading ------------------------------------------------------------------------------------------------------- */

int vx_wave_reserve(vx_wave *w, int64_t count)
{
    int status = vx_bytes_reserve(&w->bytes, sizeof(float) * (size_t)count);
    if (!status) w->count = count;
    return status;
}

/* Writes the mean of each frame's channels, and says at which sample a NaN or Inf is; -1 where there is none. */
static int64_t mix(float *to, const float *from, int64_t frames, int channels)
{
    for (int64_t i = 0; i < frames; i++, from += channels) {
        double sum = 0;
        for (int c = 0; c < channels; c++) sum += (double)from[c];
        to[i] = channels == 1 ? from[0] : (float)(sum / channels);
        if (!isfinite(sum)) return i;
    }
    return -1;
}

/* Reads up to count frames from where the file stands, which is frame `at`. *done: how many there were. */
static int read_frames(sound *s, int64_t at, float *to, int64_t count, int64_t *done, vx_bytes *work)
{
    int channels = s->info.channels, status = vx_bytes_reserve(work, sizeof(float) * BLOCK * (size_t)channels);
    float *block = (float *)work->data;
    *done = 0;
    while (!status && *done < count) {
        int64_t want = count - *done < BLOCK ? count - *done : BLOCK, got = sf_readf_float(s->file, block, want);
        if (got <= 0) break;
        if (s->error_tells && at + *done + got <= s->promised && sf_error(s->file))
            return vx_fail(VX_EIO, "cut short or damaged: sample %lld of %lld or a later one: %s",
                           (long long)(at + *done), (long long)s->promised, sf_strerror(s->file));
        int64_t bad = mix(to + *done, block, got, channels);
        if (bad >= 0) status = vx_fail(VX_EIO, "sample %lld (0-based) is NaN or Inf", (long long)(at + *done + bad));
        *done += got;
    }
    return status;
}

/* Reads an opened file to its end. */
static int read_whole(const char *path, sound *s, vx_wave *out, vx_bytes *work)
{
    int64_t total = 0, got = 1, room = 1 << 16;
    int status = read_promise(path, s);
    /* the size of the file bounds what a first guess may be; what it is worth shows while reading */
    if (s->promised > room && s->promised <= 16 * s->about.st_size) room = s->promised + 1;
    if (!status) status = vx_bytes_reserve(&out->bytes, sizeof(float) * (size_t)room);
    while (!status && got > 0) {
        if (total == room) {
            room *= 2;
            status = vx_bytes_extend(&out->bytes, sizeof(float) * (size_t)room);
        }
        int64_t want = total < s->promised && s->promised < room ? s->promised - total : room - total;
        if (!status) status = read_frames(s, total, (float *)out->bytes.data + total, want, &got, work);
        total += got;
        if (!status && total > VX_SOUND_MOST) status = vx_fail(VX_EIO, "more than %d samples", VX_SOUND_MOST);
    }
    if (!status && total < s->promised)
        status =
            vx_fail(VX_EIO, "cut short or damaged: %lld samples of %lld", (long long)total, (long long)s->promised);
    if (!status && total == 0) status = vx_fail(VX_EIO, "no samples in it");
    out->count = total;
    return status;
}

int vx_sound_whole(const char *path, vx_wave *out, vx_bytes *work, vx_audio_info *info)
{
    sound s;
    *info = (vx_audio_info){0};
    int status = open_sound(path, &s);
    if (status) return status;
    status = read_whole(path, &s, out, work);
    if (!status)
        *info = (vx_audio_info){.bytes = s.about.st_size,
                                .modified = microseconds(&s.about),
                                .frames = out->count,
                                .rate = s.info.samplerate,
                                .channels = s.info.channels,
                                .exact_seek = s.exact_seek};
    close_sound(&s);
    return status;
}

static int changed(const vx_audio_info *info)
{
    return vx_fail(VX_EIO, "no longer the file of %lld samples that it was when its length was taken",
                   (long long)info->frames);
}

int vx_sound_window(const char *path, const vx_audio_info *info, int64_t first, int64_t count, float *to,
                    vx_bytes *work)
{
    sound s;
    int64_t got;
    int status = open_sound(path, &s);
    if (status) return status;
    if (s.info.samplerate != info->rate || !s.exact_seek) status = changed(info);
    s.promised = info->frames;
    if (!status && first > 0 && sf_seek(s.file, first, SEEK_SET) != first) status = changed(info);
    if (!status) status = read_frames(&s, first, to, count, &got, work);
    if (!status && got < count) status = changed(info);
    close_sound(&s);
    return status;
}

/* -- With tensors -------------------------------------------------------------------------------------------------- */

static int to_tensor(vx_tensor **out, const float *x, int64_t count)
{
    int status = vx_new(out, 0, VX_F32, 1, &count);
    if (!status && (status = vx_write(*out, 0, count, x))) {
        vx_free(*out);
        *out = NULL;
    }
    return status;
}

int vx_audio_open(vx_tensor **out, const char *path, int64_t rate, const char *quality, vx_audio_info *info)
{
    vx_wave file = {0}, resampled = {0}, *wave = &file;
    vx_bytes work = {0};
    int q;
    *out = NULL;
    if (!path) return vx_fail(VX_EINVAL, "audio_open: no path");
    int status =
        VX_CHECK_HOST("audio_open", ": rate >= 0 && rate <= most", (), (("rate", rate), ("most", VX_SOUND_MAX_RATE)));
    if (!status) status = vx_check_choice("audio_open", "quality", quality, vx_qualities, &q);
    if (status) return status;
    status = vx_sound_whole(path, &file, &work, info);
    if (!status && rate && rate != info->rate) {
        wave = &resampled;
        status = vx_sound_resample(wave, vx_wave_data(&file), file.count, info->rate, rate, q);
    }
    if (status) vx_fail_because(status, "%s", path);
    else status = to_tensor(out, vx_wave_data(wave), wave->count);
    vx_bytes_release(&work);
    vx_bytes_release(&file.bytes);
    vx_bytes_release(&resampled.bytes);
    return status;
}

int vx_audio_scan(const char *const *paths, int64_t count, vx_audio_info *out)
{
    for (int64_t i = 0; i < count; i++)
        if (!paths || !paths[i]) return vx_fail(VX_EINVAL, "audio_scan: no path %lld", (long long)i);
    int fatal = VX_OK;
    char text[256] = "";
#pragma omp parallel
    {
        vx_wave wave = {0};
        vx_bytes work = {0};
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < count; i++) {
            out[i] = (vx_audio_info){0};
            if (vx_interrupted()) continue;
            int status = vx_sound_whole(paths[i], &wave, &work, &out[i]);
            if (status == VX_EIO) {
                snprintf(out[i].reason, sizeof out[i].reason, "%s", vx_error());
                vx_audio_stamp(paths[i], &out[i].bytes, &out[i].modified); /* 0 for a file that is not there */
            } else if (status) {
#pragma omp critical
                {
                    fatal = status;
                    snprintf(text, sizeof text, "%s: %s", paths[i], vx_error());
                }
            }
        }
        vx_bytes_release(&wave.bytes);
        vx_bytes_release(&work);
    }
    if (fatal) return vx_fail(fatal, "%s", text);
    return vx_interrupted() ? vx_fail(VX_EINTR, "audio_scan: interrupted") : VX_OK;
}

int vx_audio_resample(vx_tensor **out, const vx_tensor *x, int64_t rate, int64_t new_rate, const char *quality)
{
    vx_wave wave = {0};
    int q;
    *out = NULL;
    int status = VX_CHECK_HOST(
        "audio_resample", "x(L) <- : L <= samples; rate >= 1 && rate <= most; new_rate >= 1 && new_rate <= most", (x),
        (("samples", VX_SOUND_MOST), ("rate", rate), ("new_rate", new_rate), ("most", VX_SOUND_MAX_RATE)));
    if (!status) status = vx_check_choice("audio_resample", "quality", quality, vx_qualities, &q);
    if (status) return status;
    status = vx_sound_resample(&wave, vx_f32(x), x->shape[0], rate, new_rate, q);
    if (status) vx_fail_because(status, "audio_resample");
    else status = to_tensor(out, vx_wave_data(&wave), wave.count);
    vx_bytes_release(&wave.bytes);
    return status;
}

int vx_synthetic_speech(vx_tensor **out, int64_t seed, int64_t index)
{
    vx_wave wave = {0};
    *out = NULL;
    int status = vx_sound_speech(&wave, (uint64_t)seed, (uint64_t)index);
    if (status) vx_fail_because(status, "synthetic_speech");
    else status = to_tensor(out, vx_wave_data(&wave), wave.count);
    vx_bytes_release(&wave.bytes);
    return status;
}
