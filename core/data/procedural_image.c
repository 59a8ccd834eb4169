/* procedural_image.c: an image set without files: scenes of occluding, textured, shaded shapes, each a function of
 * (seed, index).
 *
 * Idea. Most of the statistics of photographs (edges at all scales, heavy-tailed gradients, a power spectrum near
 * 1/f^2) come from opaque things in front of one another whose sizes follow a power law: the dead leaves model [1];
 * networks trained on such pictures learn features that carry over to photographs [2]. A scene here is
 *   a background   a landscape with a horizon and a ground in perspective, a wall, or a smooth backdrop
 *   leaves         ellipses, polygons, blobs, strokes, arcs; in size from r^-3; each with a texture (stripes, waves,
 *                  checks, dots, value noise), shading by one light, a soft shadow on what lies behind, sometimes out
 *                  of focus
 *   a palette      four neighbouring colours of a natural kind (forest, sea, dusk, ...), jittered
 *
 * Rendering is front to back, one sample per pixel, antialiased analytically: an edge is as wide as a pixel or its own
 * blur by the signed distance, a texture fades out as its period nears two pixels. That costs a fraction of
 * supersampling and leaves no grain. The scene is drawn in units of the short side, before any pixel is looked at:
 * sizes differ in detail, not in content.
 *
 * [1] Lee, Mumford, Huang 2001, "Occlusion models for natural images: a statistical study of a scale-invariant dead
 *     leaves model"
 * [2] Baradad et al. 2021, "Learning to see by looking at noise"
 */
#include <math.h>

#include "draws.h"
#include "pixels.h"
#include "core/internal.h"

#define STREAM_SCENE (UINT64_C(0x7363656e) << 32) /* Philox stream; the blocks of image i start at i << 16 */

enum { MAX_LEAVES = 40, MAX_SIDES = 7 };
enum { ELLIPSE = 0, POLYGON, BLOB, STROKE, ARC };
enum { PLAIN = 0, RAMP, STRIPES, WAVES, NOISE, CHECKS, DOTS, TEXTURES };

typedef struct color {
    float r, g, b;
} color;

typedef struct texture {
    int kind;
    float frequency; /* cycles per short side */
    float c, s;      /* its direction */
    float hardness;  /* of the stripes' edges */
    float phase, warp;
    uint32_t salt;
    color from, to;
} texture;

typedef struct leaf {
    int kind, sides;
    float x, y, c, s; /* centre, rotation */
    float rx, ry;     /* radii; of a stroke: half its length and half its width */
    float reach;      /* nothing of it, nor of its shadow, is further from the centre */
    float nx[MAX_SIDES], ny[MAX_SIDES], edge[MAX_SIDES]; /* polygon: n . p < edge */
    float lobe2, lobe3;                                  /* blob: radius 1 + lobe2 cos 2a + lobe3 cos 3a */
    float blur, opacity;
    float shade, gloss, rim;
    float shadow, shadow_x, shadow_y, shadow_blur;
    texture skin;
} leaf;

typedef struct scene {
    float lx, ly, lz; /* light, a unit vector towards it; y grows downwards */
    int backdrop;
    float horizon, tilt, glow_x, glow_y, glow;
    texture sky, ground;
    float vignette, contrast;
    int count;
    leaf leaves[MAX_LEAVES]; /* the front one first */
} scene;

/* -- Small functions of the picture -------------------------------------------------------------------------------- */

/* Own approximations, so that the picture does not hang on the C library's last bit. */

static inline float clamp01(float x) { return x < 0 ? 0 : x > 1 ? 1 : x; }

static inline int lower(float x) /* floor, for |x| < 2^15 */ { return (int)(x + 32768.0f) - 32768; }

/* sin(2 pi x) to 1e-3 */
static inline float wave(float x)
{
    x -= (float)lower(x + 0.5f);
    float y = x * (8.0f - 16.0f * fabsf(x));
    return y * (0.775f + 0.225f * fabsf(y));
}

static inline float lattice(int x, int y, uint32_t salt)
{
    uint32_t h = (uint32_t)x * 0x9E3779B1u ^ (uint32_t)y * 0x85EBCA77u ^ salt;
    h = (h ^ h >> 15) * 0x2C1B3C6Du;
    h ^= h >> 13;
    return (float)(h >> 8 & 0xffff) * (1.0f / 65535.0f);
}

/* Gives value noise in [0, 1], one cell per unit. */
static inline float noise(float x, float y, uint32_t salt)
{
    int ix = lower(x), iy = lower(y);
    float u = x - (float)ix, v = y - (float)iy;
    u = u * u * (3 - 2 * u);
    v = v * v * (3 - 2 * v);
    float a = lattice(ix, iy, salt), b = lattice(ix + 1, iy, salt);
    float c = lattice(ix, iy + 1, salt), d = lattice(ix + 1, iy + 1, salt);
    a += (b - a) * u;
    c += (d - c) * u;
    return a + (c - a) * v;
}

/* Gives what is left of a contrast whose period is 1 / cycles pixels: all above four pixels, nothing at two. */
static inline float visible(float cycles) { return clamp01(2.0f - 4.0f * cycles); }

static inline color blend(color a, color b, float t)
{
    return (color){a.r + (b.r - a.r) * t, a.g + (b.g - a.g) * t, a.b + (b.b - a.b) * t};
}

/* Gives the mixing weight of the two colours at (x, y). pixel: side of a pixel in the texture's units; extent: size of
 * the shape in them. */
static float weave(const texture *t, float x, float y, float pixel, float extent)
{
    float f = t->frequency, u = (x * t->c + y * t->s), v = (y * t->c - x * t->s), keep = visible(f * pixel), hard;
    switch (t->kind) {
    case RAMP: return clamp01(0.5f + 0.5f * u / extent);
    case STRIPES:
        u += t->warp * wave(v * f * 0.3f + t->phase) / f;
        /* hardening adds harmonics: not more than fit */
        hard = t->hardness < 0.3f / (f * pixel) ? t->hardness : 0.3f / (f * pixel);
        hard = hard < 1 ? 1 : hard;
        u = hard * wave(u * f + t->phase);
        return 0.5f + 0.5f * keep * (u > 1 ? 1 : u < -1 ? -1 : u);
    case WAVES:
        return 0.5f + keep * (0.25f * wave(u * f + t->phase) + 0.15f * wave(v * f * 0.73f + t->phase * 3) +
                              0.1f * wave((u + v) * f * 0.41f + 0.7f * wave(v * f * 0.2f)));
    case NOISE: {
        float sum = 0.5f, weight = 0.5f;
        for (int octave = 0; octave < 5; octave++, f *= 2.03f, weight *= 0.7f) {
            keep = visible(f * pixel * 0.7f);
            if (keep <= 0) break;
            /* the first number stretches the grain, as in wood, grass, water */
            sum += 1.6f * weight * keep *
                   (noise(u * f * t->hardness, v * f, t->salt + (uint32_t)octave * 0x61C88647u) - 0.5f);
        }
        return clamp01(sum);
    }
    case CHECKS:
        hard = clamp01(0.25f / (f * pixel)) * 6;
        u = hard * wave(u * f) * (hard > 1 ? hard : 1) * wave(v * f);
        return 0.5f + 0.5f * keep * (u > 1 ? 1 : u < -1 ? -1 : u);
    case DOTS: {
        u *= f;
        v *= f;
        int iu = lower(u), iv = lower(v);
        float du = u - (float)iu - 0.3f - 0.4f * lattice(iu, iv, t->salt),
              dv = v - (float)iv - 0.3f - 0.4f * lattice(iv, iu, ~t->salt);
        float radius = 0.15f + 0.15f * lattice(iu, iv, t->salt * 3), d = sqrtf(du * du + dv * dv);
        return clamp01(0.5f + (radius - d) / (f * pixel + 0.05f)) * clamp01(1.6f - 2 * f * pixel);
    }
    }
    return 0;
}

static inline color surface(const texture *t, float x, float y, float pixel, float extent)
{
    return blend(t->from, t->to, weave(t, x, y, pixel, extent));
}

/* -- Drawing a scene ----------------------------------------------------------------------------------------------- */

static const uint8_t palettes[][5][3] = {
    {{38, 54, 28}, {86, 112, 48}, {150, 160, 84}, {96, 74, 48}, {206, 214, 190}},       /* forest */
    {{14, 44, 74}, {38, 98, 134}, {112, 168, 184}, {226, 222, 204}, {196, 168, 122}},   /* sea and sand */
    {{70, 40, 54}, {160, 72, 62}, {226, 138, 82}, {246, 206, 140}, {62, 66, 104}},      /* dusk */
    {{112, 78, 50}, {176, 128, 82}, {216, 180, 132}, {128, 152, 172}, {238, 228, 208}}, /* desert */
    {{96, 112, 126}, {168, 182, 194}, {232, 238, 242}, {54, 64, 70}, {132, 116, 100}},  /* snow and rock */
    {{52, 54, 58}, {112, 110, 108}, {170, 164, 154}, {178, 70, 52}, {212, 206, 192}},   /* town */
    {{88, 36, 22}, {166, 76, 28}, {214, 142, 44}, {118, 104, 44}, {236, 212, 152}},     /* autumn */
    {{18, 20, 30}, {44, 50, 72}, {92, 90, 110}, {196, 170, 110}, {120, 60, 60}},        /* night */
    {{72, 120, 52}, {150, 188, 80}, {220, 92, 84}, {244, 206, 84}, {166, 198, 222}},    /* meadow */
    {{154, 104, 82}, {204, 156, 130}, {238, 206, 184}, {84, 54, 46}, {104, 116, 132}},  /* skin and cloth */
    {{136, 30, 38}, {222, 88, 46}, {240, 184, 66}, {94, 132, 56}, {246, 238, 222}},     /* fruit */
    {{28, 62, 66}, {66, 128, 122}, {158, 190, 164}, {216, 196, 164}, {150, 84, 72}},    /* copper and moss */
};

typedef struct paint {
    const uint8_t (*row)[3];
    float bright, gray, warm;
} paint;

static color mixed(vx_draws *d, const paint *p)
{
    const uint8_t *a = p->row[vx_draw_pick(d, 5)], *b = p->row[vx_draw_pick(d, 5)];
    float t = vx_draw_unit(d) * 0.6f, light = p->bright * vx_draw_between(d, 0.8f, 1.2f);
    float c[3], mean = 0;
    for (int i = 0; i < 3; i++) {
        c[i] = ((float)a[i] + ((float)b[i] - (float)a[i]) * t) * (1.0f / 255.0f) * light +
               vx_draw_between(d, -0.03f, 0.03f);
        mean += c[i] * (1.0f / 3.0f);
    }
    for (int i = 0; i < 3; i++) c[i] = clamp01(c[i] + (mean - c[i]) * p->gray);
    return (color){clamp01(c[0] + p->warm), c[1], clamp01(c[2] - p->warm)};
}

static void direction(vx_draws *d, float *c, float *s)
{
    float turn = vx_draw_unit(d);
    *c = wave(turn + 0.25f);
    *s = wave(turn);
}

static texture draw_texture(vx_draws *d, const paint *p, float extent, int kind)
{
    texture t = {.kind = kind, .salt = vx_draw_word(d)};
    direction(d, &t.c, &t.s);
    /* a few periods across the shape, log-uniform */
    t.frequency = 1.0f / extent;
    for (float octaves = vx_draw_between(d, -0.5f, 3.0f); octaves > 0; octaves -= 0.5f)
        t.frequency *= octaves >= 0.5f ? 1.41421f : 1 + 0.41421f * octaves * 2;
    t.hardness =
        kind == NOISE ? (vx_draw_pick(d, 3) ? 1.0f : vx_draw_between(d, 0.12f, 0.5f)) : vx_draw_between(d, 1, 8);
    t.phase = vx_draw_unit(d);
    t.warp = vx_draw_pick(d, 2) ? vx_draw_between(d, 0.1f, 0.8f) : 0;
    t.from = mixed(d, p);
    t.to = mixed(d, p);
    /* most surfaces are quiet: bring the two colours nearer */
    t.to = blend(t.from, t.to, kind == RAMP ? vx_draw_between(d, 0.3f, 1.0f) : vx_draw_between(d, 0.2f, 1.0f));
    return t;
}

static leaf draw_leaf(vx_draws *d, const paint *p, const scene *s, float aspect_x, float aspect_y, float radius,
                      float haze)
{
    static const uint8_t kinds[] = {ELLIPSE, ELLIPSE, ELLIPSE, POLYGON, POLYGON, POLYGON,
                                    BLOB,    BLOB,    STROKE,  STROKE,  ARC};
    static const uint8_t skins[] = {PLAIN, RAMP, RAMP, STRIPES, WAVES, NOISE, NOISE, NOISE, NOISE, CHECKS, DOTS};
    leaf l = {.kind = kinds[vx_draw_pick(d, sizeof kinds)]};
    l.x = vx_draw_between(d, -0.1f, 1.1f) * aspect_x;
    l.y = vx_draw_between(d, -0.1f, 1.1f) * aspect_y;
    direction(d, &l.c, &l.s);
    l.rx = radius;
    l.ry = radius * vx_draw_between(d, 0.45f, 1.0f);
    float outer = radius;
    switch (l.kind) {
    case POLYGON:
        l.sides = 3 + vx_draw_pick(d, MAX_SIDES - 2);
        if (vx_draw_pick(d, 2)) { /* boxes are what people build */
            l.sides = 4;
            for (int i = 0; i < 4; i++) {
                l.nx[i] = i == 0 ? 1.0f : i == 2 ? -1.0f : 0.0f;
                l.ny[i] = i == 1 ? 1.0f : i == 3 ? -1.0f : 0.0f;
                l.edge[i] = i & 1 ? l.ry : l.rx;
            }
            outer *= 1.42f;
        } else {
            float turn = vx_draw_unit(d);
            for (int i = 0; i < l.sides; i++) {
                float a = turn + ((float)i + vx_draw_between(d, -0.25f, 0.25f)) / (float)l.sides;
                l.nx[i] = wave(a + 0.25f);
                l.ny[i] = wave(a);
                l.edge[i] = radius * vx_draw_between(d, 0.5f, 0.8f);
            }
            outer *= 2.2f; /* of a triangle the corners are far out; cut there */
        }
        break;
    case BLOB:
        l.lobe2 = vx_draw_between(d, -0.2f, 0.2f);
        l.lobe3 = vx_draw_between(d, -0.2f, 0.2f);
        outer *= 1.4f;
        break;
    case STROKE:
        l.rx = radius * vx_draw_between(d, 1.0f, 3.0f);
        l.ry = radius * vx_draw_between(d, 0.06f, 0.25f);
        outer = l.rx + l.ry;
        break;
    case ARC:
        l.ry = radius * vx_draw_between(d, 0.06f, 0.2f);
        outer = l.rx + l.ry;
        break;
    }
    l.skin = draw_texture(d, p, radius, skins[vx_draw_pick(d, sizeof skins)]);
    l.shade = vx_draw_between(d, 0.1f, 0.7f);
    l.gloss = vx_draw_pick(d, 4) ? 0 : vx_draw_between(d, 0.1f, 0.5f);
    l.rim = vx_draw_pick(d, 3) ? 0 : vx_draw_between(d, 0.1f, 0.5f);
    l.opacity = vx_draw_pick(d, 10) ? 1.0f : vx_draw_between(d, 0.4f, 0.8f);
    l.blur = haze * vx_draw_between(d, 0.5f, 1.0f);
    if (vx_draw_pick(d, 4)) {
        float height = radius * vx_draw_between(d, 0.08f, 0.35f);
        l.shadow = vx_draw_between(d, 0.2f, 0.65f) * l.opacity;
        l.shadow_x = -s->lx * height;
        l.shadow_y = -s->ly * height;
        l.shadow_blur = height * vx_draw_between(d, 0.6f, 2.0f) + l.blur;
    }
    l.reach = outer + fabsf(l.shadow_x) + fabsf(l.shadow_y) + (l.shadow_blur > l.blur ? l.shadow_blur : l.blur);
    return l;
}

static void draw_scene(scene *s, uint64_t seed, uint64_t index, float aspect_x, float aspect_y)
{
    vx_draws d = {.seed = seed, .stream = STREAM_SCENE, .block = index << 16};
    paint p = {palettes[vx_draw_pick(&d, sizeof palettes / sizeof *palettes)], vx_draw_between(&d, 0.6f, 1.1f), 0,
               vx_draw_between(&d, -0.04f, 0.04f)};
    p.gray = vx_draw_pick(&d, 4) ? vx_draw_between(&d, 0, 0.3f) : vx_draw_between(&d, -0.4f, 0.9f);
    direction(&d, &s->lx, &s->ly);
    s->ly = -fabsf(s->ly); /* light falls from above, as it mostly does */
    s->lz = vx_draw_between(&d, 0.4f, 0.9f);
    float flat = sqrtf(1 - s->lz * s->lz);
    s->lx *= flat;
    s->ly *= flat;

    static const uint8_t walls[] = {RAMP, RAMP, STRIPES, WAVES, NOISE, NOISE, NOISE, CHECKS, DOTS};
    s->backdrop = vx_draw_pick(&d, 3);
    s->horizon = vx_draw_between(&d, 0.25f, 0.75f) * aspect_y;
    s->tilt = vx_draw_between(&d, -0.15f, 0.15f);
    s->sky = draw_texture(&d, &p, 0.7f,
                          s->backdrop == 0   ? NOISE
                          : s->backdrop == 1 ? walls[vx_draw_pick(&d, sizeof walls)]
                                             : RAMP);
    s->ground = draw_texture(&d, &p, 0.5f, walls[2 + vx_draw_pick(&d, sizeof walls - 2)]);
    s->glow_x = vx_draw_between(&d, 0, aspect_x);
    s->glow_y = vx_draw_between(&d, 0, aspect_y);
    s->glow = vx_draw_between(&d, -0.1f, 0.25f);
    s->vignette = vx_draw_between(&d, 0, 0.35f);
    s->contrast = vx_draw_between(&d, 1.1f, 1.7f); /* photographs spread over the whole range */

    /* Three ways to fill it: a few things, a crowd, a crowd behind a few things out of its focus or in it. */
    int mode = vx_draw_pick(&d, 4), many = mode == 0   ? 2 + vx_draw_pick(&d, 4)
                                           : mode == 1 ? 8 + vx_draw_pick(&d, 12)
                                                       : 14 + vx_draw_pick(&d, MAX_LEAVES - 14 - 3);
    int few = mode == 3 ? 1 + vx_draw_pick(&d, 3) : 0;
    float haze = vx_draw_pick(&d, 3) ? 0 : vx_draw_between(&d, 0.005f, 0.05f);
    s->count = few + many;
    for (int i = 0; i < s->count; i++) {
        /* power law r^-3 between 0.05 and 0.5: the inverse of its distribution */
        float u = vx_draw_unit(&d), small = mode == 0 ? 0.15f : 0.05f, large = 0.5f;
        float radius = 1.0f / sqrtf(1 / (large * large) + u * (1 / (small * small) - 1 / (large * large)));
        if (i < few) radius = vx_draw_between(&d, 0.2f, 0.4f);
        s->leaves[i] = draw_leaf(&d, &p, s, aspect_x, aspect_y, radius, i < few ? 0 : haze);
        if (i < few || mode == 0) { /* the subject is in the picture */
            s->leaves[i].x = 0.5f * (s->leaves[i].x + 0.5f * aspect_x);
            s->leaves[i].y = 0.5f * (s->leaves[i].y + 0.5f * aspect_y);
        }
    }
}

/* -- Rendering ----------------------------------------------------------------------------------------------------- */

/* Gives the signed distance from the outline, negative inside, of a point in the leaf's own frame. It is exact or a
 * close bound near the outline, which is where it is used. */
static float distance(const leaf *l, float x, float y)
{
    switch (l->kind) {
    case ELLIPSE: {
        float u = x / l->rx, v = y / l->ry, k = sqrtf(u * u + v * v),
              slope = sqrtf(u * u / (l->rx * l->rx) + v * v / (l->ry * l->ry));
        return slope > 1e-6f ? k * (k - 1) / slope : -l->ry;
    }
    case POLYGON: {
        /* the cut at twice the radius rounds off a sharp triangle */
        float d = sqrtf(x * x + y * y) - 2.2f * l->rx;
        for (int i = 0; i < l->sides; i++) {
            float e = l->nx[i] * x + l->ny[i] * y - l->edge[i];
            d = e > d ? e : d;
        }
        return d;
    }
    case BLOB: {
        float r = sqrtf(x * x + y * y) + 1e-9f, c = x / r, c2 = 2 * c * c - 1, c3 = (2 * c2 - 1) * c;
        return r - l->rx * (1 + l->lobe2 * c2 + l->lobe3 * c3);
    }
    case STROKE: {
        float along = x > l->rx ? x - l->rx : x < -l->rx ? x + l->rx : 0;
        return sqrtf(along * along + y * y) - l->ry * (1 - 0.4f * x / l->rx);
    }
    }
    /* ARC: three quarters of a ring */
    float ring = fabsf(sqrtf(x * x + y * y) - l->rx) - l->ry, gap = x < y ? x : y;
    return ring > gap - l->ry ? ring : gap - l->ry;
}

static color lit(const leaf *l, const scene *s, float x, float y, float inside, float pixel)
{
    color c = surface(&l->skin, x, y, pixel, l->rx);
    float lx = s->lx * l->c + s->ly * l->s, ly = s->ly * l->c - s->lx * l->s, shade, gloss = 0;
    if (l->kind == ELLIPSE || l->kind == BLOB) { /* a ball */
        float u = x / l->rx, v = y / l->ry, z = 1 - u * u - v * v, facing;
        if (l->kind == BLOB) v = y / l->rx, z = 1 - 0.6f * (u * u + v * v);
        z = z > 0 ? sqrtf(z) : 0;
        facing = u * lx + v * ly + z * s->lz;
        shade = 1 + l->shade * (1.2f * (facing > 0 ? facing : 0) - 0.9f);
        if (l->gloss > 0 && facing > 0) {
            gloss = facing * facing;
            gloss *= gloss;
            gloss *= gloss;
            gloss *= gloss * l->gloss;
        }
    } else {
        shade = 1 + 0.5f * l->shade * (x * lx + y * ly) / l->rx;
    }
    if (l->rim > 0) shade *= 1 - l->rim * clamp01(1 - inside / (0.12f * l->rx));
    return (color){c.r * shade + gloss, c.g * shade + gloss, c.b * shade + gloss};
}

static color background(const scene *s, float x, float y, float pixel)
{
    float dx = x - s->glow_x, dy = y - s->glow_y, glow = 1 + s->glow * (1 - 1.2f * (dx * dx + dy * dy));
    color c;
    if (s->backdrop == 0) {
        float below = y - s->horizon - s->tilt * (x - 0.5f), depth = below > 0 ? 0.15f / (below + 0.08f) : 1;
        float edge = clamp01(0.5f + below / pixel);
        c = surface(&s->sky, x, y * 2, pixel * 2, 1);
        c = blend(c, s->sky.from, clamp01(-below)); /* calmer overhead */
        if (edge > 0) { /* the ground's texture shrinks towards the horizon and fades into the sky's colour */
            color g = surface(&s->ground, (x - 0.5f) * depth * 3, depth * 3, pixel * 3 * depth * (1 + depth), 1);
            g = blend(g, s->sky.to, 0.5f * clamp01(0.4f * depth - 0.2f));
            c = blend(c, g, edge);
        }
    } else {
        c = surface(&s->sky, x - 0.5f, y - 0.5f, pixel, 0.7f);
    }
    return (color){c.r * glow, c.g * glow, c.b * glow};
}

static inline uint8_t byte(float x) { return (uint8_t)(clamp01(x) * 255.0f + 0.5f); }

void vx_pixels_procedural(uint8_t *dst, int64_t height, int64_t width, uint64_t seed, uint64_t index)
{
    float pixel = 1.0f / (float)(height < width ? height : width);
    float aspect_x = (float)width * pixel, aspect_y = (float)height * pixel;
    scene s;
    const leaf *row[MAX_LEAVES];
    draw_scene(&s, seed, index, aspect_x, aspect_y);
    for (int64_t iy = 0; iy < height; iy++) {
        float y = ((float)iy + 0.5f) * pixel;
        int count = 0;
        for (int i = 0; i < s.count; i++)
            if (fabsf(y - s.leaves[i].y) < s.leaves[i].reach + pixel) row[count++] = &s.leaves[i];
        for (int64_t ix = 0; ix < width; ix++, dst += 3) {
            float x = ((float)ix + 0.5f) * pixel, left = 1, light = 1;
            color sum = {0, 0, 0};
            for (int i = 0; i < count && left > 0.004f; i++) {
                const leaf *l = row[i];
                float dx = x - l->x, dy = y - l->y, reach = l->reach + pixel;
                if (dx * dx + dy * dy > reach * reach) continue;
                float u = dx * l->c + dy * l->s, v = dy * l->c - dx * l->s, edge = l->blur > pixel ? l->blur : pixel;
                float d = distance(l, u, v), cover = clamp01(0.5f - d / edge) * l->opacity;
                if (cover > 0) {
                    color c = lit(l, &s, u, v, -d, pixel);
                    float weight = left * cover * light;
                    sum.r += weight * c.r;
                    sum.g += weight * c.g;
                    sum.b += weight * c.b;
                    left *= 1 - cover;
                }
                if (l->shadow > 0) {
                    dx -= l->shadow_x;
                    dy -= l->shadow_y;
                    d = distance(l, dx * l->c + dy * l->s, dy * l->c - dx * l->s);
                    light *= 1 - l->shadow * clamp01(0.5f - d / l->shadow_blur);
                }
            }
            if (left > 0.004f) {
                color c = background(&s, x, y, pixel);
                float weight = left * light;
                sum.r += weight * c.r;
                sum.g += weight * c.g;
                sum.b += weight * c.b;
            }
            float cx = x - 0.5f * aspect_x, cy = y - 0.5f * aspect_y, dark = 1 - s.vignette * (cx * cx + cy * cy);
            dst[0] = byte(s.contrast * (sum.r * dark - 0.43f) + 0.47f);
            dst[1] = byte(s.contrast * (sum.g * dark - 0.43f) + 0.47f);
            dst[2] = byte(s.contrast * (sum.b * dark - 0.43f) + 0.47f);
        }
    }
}

int vx_procedural_image(vx_tensor *x, int64_t seed, int64_t index)
{
    int status = VX_CHECK_HOST("procedural_image", "x:u8(H,W,3) <- : H * W > 0", (x), ());
    if (status) return status;
    vx_pixels_procedural((uint8_t *)x->data, x->shape[0], x->shape[1], (uint64_t)seed, (uint64_t)index);
    return VX_OK;
}
