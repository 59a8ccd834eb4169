/* audio_format.c: audio formats by their first bytes, and what headers say of a file's length that libsndfile does not
 * tell: the frames of an MP3 file, the sizes in those of IFF, AU and NIST SPHERE. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "audio_format.h"
#include "bytes.h"
#include "core/internal.h"

enum { SIZE_SLACK = 64 }; /* bytes that a size may be wrong by */

static const uint32_t NO_SIZE = 0x7fff0000; /* sizes from here on mean "unknown" */

/* -- MP3 ----------------------------------------------------------------------------------------------------------- */

typedef struct mp3_frame {
    int bytes, samples; /* of the whole frame, of each channel */
    int tag;            /* where a Xing or Info header would be */
} mp3_frame;

/* Reads the header of a frame of MPEG audio, layer II or III. [ISO 11172-3, 2.4.2.3; 13818-3 for halved rates] */
static bool read_mp3_frame(const uint8_t *h, mp3_frame *out)
{
    static const short rates[3] = {441, 480, 320}; /* hundreds of samples a second, MPEG 1 */
    static const short kbits[3][15] = {
        {0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384}, /* MPEG 1, layer II */
        {0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320},  /* MPEG 1, layer III */
        {0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160},      /* MPEG 2 and 2.5, both */
    };
    int version = h[1] >> 3 & 3, layer = 4 - (h[1] >> 1 & 3); /* version: 3 MPEG 1, 2 MPEG 2, 0 MPEG 2.5 */
    int bit_rate = h[2] >> 4, rate = h[2] >> 2 & 3, padding = h[2] >> 1 & 1;
    if (h[0] != 0xff || h[1] < 0xe0 || version == 1 || (layer != 2 && layer != 3) || bit_rate == 0 || bit_rate == 15 ||
        rate == 3)
        return false;
    int hundreds = rates[rate] >> (version == 3 ? 0 : version == 2 ? 1 : 2);
    if (version != 3 && rate == 0) hundreds = 0; /* 22,050 and 11,025 are no hundreds */
    double hertz = hundreds ? 100.0 * hundreds : version == 2 ? 22050 : 11025;
    bool half = version != 3 && layer == 3, mono = h[3] >> 6 == 3;
    out->samples = half ? 576 : 1152;
    out->bytes = (int)(out->samples / 8 * 1000.0 * kbits[version == 3 ? layer - 2 : 2][bit_rate] / hertz) + padding;
    out->tag = 4 + (version == 3 ? (mono ? 17 : 32) : (mono ? 9 : 17));
    return true;
}

/* Finds the first frame of an MP3 file, behind an ID3 tag. */
static size_t mp3_start(const uint8_t *bytes, size_t count)
{
    size_t at = 0;
    while (count - at >= 10 && !memcmp(bytes + at, "ID3", 3)) {
        const uint8_t *size = bytes + at + 6;
        size_t tag = 10 + ((size_t)(size[0] & 127) << 21 | (size_t)(size[1] & 127) << 14 |
                           (size_t)(size[2] & 127) << 7 | (size[3] & 127));
        at += tag < count - at ? tag : count - at;
    }
    mp3_frame frame;
    while (count - at >= 4 && !read_mp3_frame(bytes + at, &frame)) at++;
    return at;
}

int64_t vx_count_mp3(const uint8_t *bytes, size_t count)
{
    int64_t samples = 0;
    mp3_frame frame;
    for (size_t at = mp3_start(bytes, count); count - at >= 4 && read_mp3_frame(bytes + at, &frame);
         at += (size_t)frame.bytes, samples += frame.samples) {
        const uint8_t *tag = bytes + at + frame.tag, *vbri = bytes + at + 36;
        if ((size_t)frame.bytes > count - at) break;
        if (samples == 0 && frame.bytes >= 40 &&
            (!memcmp(tag, "Xing", 4) || !memcmp(tag, "Info", 4) || !memcmp(vbri, "VBRI", 4)))
            return 0;
    }
    return samples;
}

/* -- Sizes in headers ---------------------------------------------------------------------------------------------- */

static uint32_t read_u32(const uint8_t *h, bool little)
{
    return little ? (uint32_t)h[3] << 24 | (uint32_t)h[2] << 16 | (uint32_t)h[1] << 8 | h[0]
                  : (uint32_t)h[0] << 24 | (uint32_t)h[1] << 16 | (uint32_t)h[2] << 8 | h[3];
}

int vx_check_size(const uint8_t *h, int64_t size)
{
    bool riff = !memcmp(h, "RIFF", 4), dns = !memcmp(h, "dns.", 4);
    uint32_t before, data;
    if (riff || !memcmp(h, "RIFX", 4) || !memcmp(h, "FORM", 4)) {
        before = 8;
        data = read_u32(h + 4, riff);
    } else if (dns || !memcmp(h, ".snd", 4)) {
        before = read_u32(h + 4, dns);
        data = read_u32(h + 8, dns);
    } else {
        return VX_OK;
    }
    /* from a pipe comes none, or one near 2^31 or 2^32; small errors are common and cost no sample */
    if (data >= NO_SIZE || (int64_t)before + data <= size + SIZE_SLACK) return VX_OK;
    return vx_fail(VX_EIO, "cut short: %lld bytes of %lld", (long long)size, (long long)before + data);
}

int64_t vx_nist_count(const uint8_t *head)
{
    char text[VX_AUDIO_HEAD + 1];
    memcpy(text, head, VX_AUDIO_HEAD);
    text[VX_AUDIO_HEAD] = 0;
    const char *line = strstr(text, "\nsample_count -i ");
    return line ? strtoll(line + strlen("\nsample_count -i "), NULL, 10) : -1;
}

/* -- What a file is ------------------------------------------------------------------------------------------------ */

static const vx_audio_format formats[] = {
    {"FLAC", 0, 4, "fLaC", true},
    {"WAV", 8, 4, "WAVE", true}, /* after RIFF, RIFX, RF64 and a size */
    {"W64", 0, 12, "riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb", true},
    {"Ogg", 0, 4, "OggS", true},
    {"AIFF", 8, 3, "AIF", true},
    {"8SVX", 8, 4, "8SVX", true},
    {"AU", 0, 4, ".snd", true},
    {"AU", 0, 4, "dns.", true},
    {"CAF", 0, 4, "caff", true},
    {"NIST SPHERE", 0, 7, "NIST_1A", true},
    {"VOC", 0, 19, "Creative Voice File", true},
    {"PAF", 0, 4, " paf", true},
    {"PAF", 0, 4, "fap ", true},
    {"PVF", 0, 4, "PVF1", true},
    {"XI", 0, 21, "Extended Instrument: ", true},
    {"WVE", 0, 13, "ALawSoundFile", true},
    {"AVR", 0, 4, "2BIT", true},
    {"IRCAM", 0, 2, "\x64\xa3", true},
    {"audio behind an ID3 tag", 0, 3, "ID3", true},
    {"MPEG-4 audio", 4, 4, "ftyp", false},
    {"WMA", 0, 4, "\x30\x26\xb2\x75", false},
    {"AMR", 0, 5, "#!AMR", false},
    {"Matroska", 0, 4, "\x1a\x45\xdf\xa3", false},
    {"WavPack", 0, 4, "wvpk", false},
    {"Monkey's Audio", 0, 4, "MAC ", false},
    {"AAC", 0, 2, "\xff\xf1", false},
    {"AAC", 0, 2, "\xff\xf9", false},
};

static const vx_audio_format mpeg = {"MP3", 0, 0, NULL, true};

const vx_audio_format *vx_audio_sniff(const uint8_t *head, size_t count)
{
    mp3_frame frame;
    for (size_t i = 0; i < sizeof formats / sizeof *formats; i++) {
        const vx_audio_format *f = &formats[i];
        if (count >= (size_t)(f->offset + f->length) && !memcmp(head + f->offset, f->magic, (size_t)f->length))
            return f;
    }
    return count >= 4 && read_mp3_frame(head, &frame) ? &mpeg : NULL;
}

int vx_audio_kind(const char *path, const char **kind, bool *readable)
{
    uint8_t head[VX_AUDIO_HEAD];
    struct stat about;
    if (!path) return vx_fail(VX_EINVAL, "audio_kind: no path");
    int fd, status = vx_open_regular(path, &fd, &about);
    if (status) return vx_fail_because(status, "%s", path);
    int64_t got = vx_read_all(fd, head, VX_AUDIO_HEAD);
    if (got < 0) status = vx_fail(VX_EIO, "%s: %s", path, strerror(errno));
    close(fd);
    if (status) return status;
    const vx_audio_format *f = vx_audio_sniff(head, (size_t)got);
    *kind = f ? f->name : "none";
    *readable = f && f->readable;
    return VX_OK;
}
