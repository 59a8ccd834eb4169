/* synthetic_speech.c: a speech set without files: utterances of several voices, each a function of (seed, index).
 *
 * Idea. Speech is a source through a filter [1]: pulses of the glottis, or noise, through the resonances (formants) of
 * a vocal tract that keeps moving. An utterance here is
 *   a voice        pitch, length of the tract, breath, speed, an accent (its own shift of each formant)
 *   phones         a first-order Markov chain: the kind of the next phone hangs on that of the last one, and which of
 *                  the kind on the last phone itself, so that there is structure to learn beyond single phones
 *   tracks         every 5 ms the parameters go part of the way to those of the present phone (coarticulation)
 *   a synthesizer  Klatt's [2] in small: KLGLOTT88 pulses [3] and breath through a cascade of four resonators, and
 *                  noise of fricatives and bursts through a band of its own beside it
 * at a level of its own, over a faint background noise. Words it says none.
 *
 * All is in double, in one order, with own approximations of cosine and exponential, so that the wave does not hang on
 * the C library's last bit.
 *
 * [1] Fant 1960, "Acoustic theory of speech production"
 * [2] Klatt 1980, "Software for a cascade/parallel formant synthesizer"
 * [3] Klatt and Klatt 1990, "Analysis, synthesis, and perception of voice quality variations"; the formants of vowels
 *     are the men's means of Peterson and Barney 1952
 */
#include <math.h>

#include "draws.h"
#include "sound.h"

#define STREAM_VOICE (UINT64_C(0x766f6963) << 32)     /* Philox streams: voice v draws from block v << 8, */
#define STREAM_UTTERANCE (UINT64_C(0x75747472) << 32) /* utterance i from block i << 24 */

enum {
    VOICES = 24,
    HOP = VX_SPEECH_RATE / 200, /* samples between two moves of the tracks */
    FORMANTS = 4,
    SHORTEST = 2 * VX_SPEECH_RATE,
    LONGEST = 10 * VX_SPEECH_RATE,
};

#define PI 3.14159265358979323846

typedef struct voice {
    double pitch; /* Hz */
    double tract; /* factor of all formants */
    double accent[FORMANTS];
    double breath, open; /* share of noise in the pulses; of the period in which the glottis is open */
    double speed;        /* factor of durations */
} voice;

/* What a phone sounds like, and where tracks stand. Amplitudes are relative to a vowel's. */
typedef struct sounding {
    double formant[FORMANTS - 1]; /* Hz; the fourth is the voice's alone */
    double voiced, breath, noise; /* amplitudes of pulses, of noise through the formants, of noise beside them */
    double centre, width;         /* band of the latter, Hz */
} sounding;

typedef struct phone {
    sounding target;
    double ms;    /* mean duration */
    double burst; /* of a stop: amplitude of the noise in its last 15 ms; before them it is closed */
} phone;

enum { SILENCE = 0, VOWEL, NASAL, LIQUID, FRICATIVE, STOP, KINDS };
enum { BURST_HOPS = 3 };

/* clang-format off */
static const phone phones[] = {
    /*  F1   F2    F3     voiced breath noise centre width   ms  burst        */
    {{{500, 1500, 2500},  0,     0,     0,    3000,  1000}, 120, 0},   /* silence */
    {{{640, 1190, 2390},  1,     0,     0,    3000,  1000},  70, 0},   /* u(p)  */
    {{{390, 1990, 2550},  1,     0,     0,    3000,  1000},  80, 0},   /* i(t)  */
    {{{270, 2290, 3010},  1,     0,     0,    3000,  1000}, 110, 0},   /* ea(t) */
    {{{530, 1840, 2480},  1,     0,     0,    3000,  1000},  90, 0},   /* e(gg) */
    {{{730, 1090, 2440},  1,     0,     0,    3000,  1000}, 130, 0},   /* (f)a(ther) */
    {{{660, 1720, 2410},  1,     0,     0,    3000,  1000}, 130, 0},   /* a(t)  */
    {{{300,  870, 2240},  1,     0,     0,    3000,  1000}, 110, 0},   /* (b)oo(t) */
    {{{570,  840, 2410},  1,     0,     0,    3000,  1000}, 120, 0},   /* (l)aw */
    {{{490, 1350, 1690},  1,     0,     0,    3000,  1000}, 110, 0},   /* (b)ir(d) */
    {{{440, 1020, 2240},  1,     0,     0,    3000,  1000},  80, 0},   /* (p)u(t) */
    {{{250, 1450, 2500}, .45,    0,     0,    3000,  1000},  65, 0},   /* n     */
    {{{250, 1000, 2200}, .45,    0,     0,    3000,  1000},  70, 0},   /* m     */
    {{{250, 2050, 2700}, .4,     0,     0,    3000,  1000},  75, 0},   /* ng    */
    {{{310, 1060, 1380}, .7,     0,     0,    3000,  1000},  65, 0},   /* r     */
    {{{360, 1100, 2600}, .7,     0,     0,    3000,  1000},  65, 0},   /* l     */
    {{{290,  610, 2150}, .7,     0,     0,    3000,  1000},  60, 0},   /* w     */
    {{{260, 2070, 3020}, .7,     0,     0,    3000,  1000},  55, 0},   /* y     */
    {{{320, 1700, 2600},  0,     0,    .5,    6000,  2000},  95, 0},   /* s     */
    {{{320, 1700, 2600}, .35,    0,    .25,   5800,  2200},  70, 0},   /* z     */
    {{{350, 1100, 2100}, .4,     0,    .06,   5000,  5000},  60, 0},   /* v     */
    {{{320, 1400, 2500}, .4,     0,    .05,   4500,  5000},  55, 0},   /* th(e) */
    {{{340, 1100, 2080},  0,     0,    .14,   5500,  5000},  90, 0},   /* f     */
    {{{300, 1840, 2750},  0,     0,    .55,   3200,  1400}, 100, 0},   /* sh    */
    {{{500, 1500, 2500},  0,    .3,     0,    3000,  1000},  60, 0},   /* h     */
    {{{300, 1750, 2600},  0,     0,     0,    4500,  3000},  75, .6},  /* t     */
    {{{250, 1750, 2600}, .12,    0,     0,    4200,  3000},  60, .4},  /* d     */
    {{{300, 2000, 2300},  0,     0,     0,    2000,  1000},  80, .6},  /* k     */
    {{{300, 1000, 2200},  0,     0,     0,     900,  1200},  80, .35}, /* p     */
    {{{250, 1000, 2200}, .12,    0,     0,     900,  1200},  65, .25}, /* b     */
    {{{250, 2000, 2300}, .12,    0,     0,    1800,  1000},  65, .4},  /* g     */
};

static const int first_of[KINDS + 1] = {0, 1, 11, 14, 18, 25, 31}; /* of each kind, the frequent ones first */

/* Percent: the kind of the next phone, by that of the last. */
static const int next_kind[KINDS][KINDS] = {
    /*             silence vowel nasal liquid fricative stop */
    [SILENCE]   = {  0,    25,   10,   15,    25,       25},
    [VOWEL]     = {  6,     4,   20,   16,    24,       30},
    [NASAL]     = {  8,    62,    0,    3,    12,       15},
    [LIQUID]    = {  3,    85,    2,    0,     4,        6},
    [FRICATIVE] = {  8,    60,    4,   10,     2,       16},
    [STOP]      = {  5,    62,    2,   17,    12,        2},
};
/* clang-format on */

/* -- The voice and its words --------------------------------------------------------------------------------------- */

static voice draw_voice(uint64_t seed, uint64_t number)
{
    vx_draws d = {.seed = seed, .stream = STREAM_VOICE, .block = number << 8};
    double size = (double)vx_draw_unit(&d); /* from the longest tract to the shortest */
    voice v = {.pitch = (95 + 130 * size) * (double)vx_draw_between(&d, 0.85f, 1.15f),
               .tract = 0.92 + 0.24 * size,
               .breath = (double)vx_draw_between(&d, 0.01f, 0.06f),
               .open = (double)vx_draw_between(&d, 0.5f, 0.75f),
               .speed = (double)vx_draw_between(&d, 0.8f, 1.25f)};
    for (int f = 0; f < FORMANTS; f++) v.accent[f] = (double)vx_draw_between(&d, 0.95f, 1.05f);
    return v;
}

/* Draws one of n, the r-th as often as 1 / (r + 1) says, counted from `last` on in a circle. */
static int draw_of_kind(vx_draws *d, int n, int last)
{
    double sum = 0, u;
    int r = 0;
    for (int i = 0; i < n; i++) sum += 1.0 / (i + 1);
    u = (double)vx_draw_unit(d) * sum;
    while (r < n - 1 && (u -= 1.0 / (r + 1)) > 0) r++;
    return (r + last) % n;
}

static int kind_of(int number)
{
    int kind = 0;
    while (number >= first_of[kind + 1]) kind++;
    return kind;
}

static int draw_phone(vx_draws *d, int last)
{
    int percent = vx_draw_pick(d, 100), kind = 0, from = kind_of(last);
    while ((percent -= next_kind[from][kind]) >= 0) kind++;
    return first_of[kind] + draw_of_kind(d, first_of[kind + 1] - first_of[kind], last);
}

/* -- The synthesizer ----------------------------------------------------------------------------------------------- */

/* Gives cos(x) for 0 <= x <= pi, to 1e-10. */
static double cosine(double x)
{
    double sign = 1, term = 1, sum = 1;
    if (x > PI / 2) {
        x = PI - x;
        sign = -1;
    }
    for (int n = 2; n <= 16; n += 2) {
        term *= -x * x / (n * (n - 1));
        sum += term;
    }
    return sign * sum;
}

/* Gives exp(-x) for 0 <= x <= 1, to 1e-13. */
static double decay(double x)
{
    double term = 1, sum = 1;
    for (int n = 1; n <= 15; n++) {
        term *= -x / n;
        sum += term;
    }
    return sum;
}

/* y[n] = a x[n] + b y[n-1] + c y[n-2]: one resonance [2, Eq. 1]. */
typedef struct resonator {
    double a, b, c, y1, y2;
} resonator;

/* Tunes a resonator to a frequency and a bandwidth in Hz, at most 0.3 of the rate; gain 1 at 0 Hz. */
static void tune(resonator *r, double frequency, double width)
{
    double radius = decay(PI * width / VX_SPEECH_RATE);
    r->c = -radius * radius;
    r->b = 2 * radius * cosine(2 * PI * frequency / VX_SPEECH_RATE);
    r->a = 1 - r->b - r->c;
}

static inline double resonate(resonator *r, double x)
{
    double y = r->a * x + r->b * r->y1 + r->c * r->y2;
    r->y2 = r->y1;
    r->y1 = y;
    return y;
}

static inline double white(vx_draws *d) { return 2 * (double)vx_draw_unit(d) - 1; }

typedef struct speaker {
    voice v;
    vx_draws d;
    int phone, hops_left;
    double pitch, pitch_target; /* factors of the voice's */
    sounding now;
    resonator formants[FORMANTS], band;
    double phase, period_factor, tilt;
} speaker;

static void begin_phone(speaker *s, int number)
{
    const phone *p = &phones[number];
    s->phone = number;
    s->hops_left = (int)(p->ms * s->v.speed * (double)vx_draw_between(&s->d, 0.7f, 1.4f) / 5) + 1;
    s->pitch_target = (double)vx_draw_between(&s->d, 0.88f, 1.15f);
}

static void approach(double *x, double target, double part) { *x += part * (target - *x); }

/* Moves the tracks by one hop. progress: from 0 to 1, since pitch falls over an utterance. */
static void move(speaker *s, double progress)
{
    static const double widths[FORMANTS] = {70, 90, 140, 220};
    if (s->hops_left-- == 0) begin_phone(s, draw_phone(&s->d, s->phone));
    const phone *p = &phones[s->phone];
    const sounding *to = &p->target;
    sounding *now = &s->now;
    bool burst = p->burst > 0 && s->hops_left < BURST_HOPS;
    for (int f = 0; f < FORMANTS - 1; f++) {
        approach(&now->formant[f], to->formant[f], 0.25);
        tune(&s->formants[f], now->formant[f] * s->v.tract * s->v.accent[f], widths[f]);
    }
    tune(&s->formants[3], 3500 * s->v.tract * s->v.accent[3], widths[3]);
    approach(&now->voiced, to->voiced, 0.5);
    approach(&now->breath, to->breath, 0.5);
    approach(&now->noise, burst ? p->burst : to->noise, burst ? 0.9 : 0.5);
    approach(&now->centre, to->centre, 0.5);
    approach(&now->width, to->width < 4800 ? to->width : 4800, 0.5);
    tune(&s->band, now->centre, now->width);
    s->band.a = 1 + s->band.c; /* a band is as loud wherever it lies */
    approach(&s->pitch, s->pitch_target * (1.12 - 0.24 * progress), 0.08);
}

/* Makes the next sample. */
static double sample(speaker *s)
{
    double noise = white(&s->d), pulse = 0;
    s->phase += s->v.pitch * s->pitch * s->period_factor / VX_SPEECH_RATE;
    if (s->phase >= 1) {
        s->phase -= 1;
        s->period_factor = 1 + 0.01 * white(&s->d); /* jitter */
    }
    if (s->phase < s->v.open) { /* the derivative of x^2 - x^3 */
        double x = s->phase / s->v.open;
        pulse = 2 * x - 3 * x * x;
    }
    approach(&s->tilt, pulse, 0.6);
    double open = s->phase < s->v.open ? 1 : 0.4;
    double y = s->now.voiced * (s->tilt + s->v.breath * open * noise) + s->now.breath * noise;
    for (int f = 0; f < FORMANTS; f++) y = resonate(&s->formants[f], y);
    return y + s->now.noise * resonate(&s->band, noise);
}

int64_t vx_speech_count(uint64_t seed, uint64_t index)
{
    vx_draws d = {.seed = seed, .stream = STREAM_UTTERANCE, .block = index << 24};
    return SHORTEST + vx_draw_pick(&d, LONGEST - SHORTEST + 1);
}

int vx_sound_speech(vx_wave *out, uint64_t seed, uint64_t index)
{
    speaker s = {.d = {.seed = seed, .stream = STREAM_UTTERANCE, .block = index << 24}, .pitch = 1, .period_factor = 1};
    int64_t count = vx_speech_count(seed, index);
    int status = vx_wave_reserve(out, count);
    if (status) return status;
    float *x = vx_wave_data(out);
    vx_draw_word(&s.d); /* vx_speech_count()'s */
    s.v = draw_voice(seed, (index >> 32) * VOICES + (uint64_t)vx_draw_pick(&s.d, VOICES));
    double level = (double)vx_draw_between(&s.d, 0.03f, 0.1f), floor = (double)vx_draw_between(&s.d, 0.001f, 0.01f);
    double power = 0;
    s.now = phones[0].target;
    begin_phone(&s, 0);
    for (int64_t i = 0; i < count; i++) {
        if (i % HOP == 0) move(&s, (double)i / (double)count);
        double y = sample(&s);
        power += y * y;
        x[i] = (float)y;
    }
    double scale = level / sqrt(power / (double)count + 1e-12);
    for (int64_t i = 0; i < count; i++) x[i] = (float)(scale * (double)x[i] + level * floor * white(&s.d));
    return VX_OK;
}
