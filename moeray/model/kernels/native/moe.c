/* Expert FFNs and linear layers over stored weights, for CPUs. One parallel region a call; see body.h for the sums.

   Nothing is allocated, and nothing is kept between calls. Threads are those of the OpenMP runtime that the process
   already has (torch's): this object is linked to none. */
#include "bf16.h"
#include "layout.h"

#include <omp.h>
#include <stddef.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

/* Vectors go by pointer: how they go by value depends on the instruction set. */
typedef struct {
    void (*tile)(const Matrix *, const Row *, const float *bias, const char *x, int64_t x_step, int64_t count,
                 Ahead ahead, f32x16 *out, char *decoded);
    void (*activate)(const Activation *, int gated, f32x16 *rows, int64_t count);
    void (*pack)(int64_t format, const void *x, const Matrix *m, char *packed);
    void (*store)(int64_t format, void *y, int64_t at, const f32x16 *v, int64_t count);
    void (*read)(const char *data, int64_t size);
    int64_t (*multiply)(int64_t times);
} Kernels;

/* -- one set of kernels for each instruction set ------------------------------------------------------------------- */

#define FN(name) name##_portable
#define LANES 4
#define MOST 2
#define UP_TO_MOST(EACH, format) EACH(format, 1) EACH(format, 2)
#define OUTS 2
#include "body.h"

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define FN(name) name##_avx2
#define LANES 8
#define MOST 2
#define UP_TO_MOST(EACH, format) EACH(format, 1) EACH(format, 2)
#define OUTS 2
#include "body.h"
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma")
#define FN(name) name##_avx512
#define LANES 16
#define MOST 6
#define UP_TO_MOST(EACH, format) \
    EACH(format, 1) EACH(format, 2) EACH(format, 3) EACH(format, 4) EACH(format, 5) EACH(format, 6)
#define OUTS 4
#include "body.h"
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vbmi,fma")
#define FN(name) name##_avx512_bf16
#define LANES 16
#define MOST 6
#define UP_TO_MOST(EACH, format) \
    EACH(format, 1) EACH(format, 2) EACH(format, 3) EACH(format, 4) EACH(format, 5) EACH(format, 6)
#define OUTS 4
#include "body.h"
#pragma GCC pop_options
#endif

/* The most capable instruction set that this CPU has. */
int64_t moeray_instructions(void) {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi") ? AVX512_BF16 : AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return AVX2;
#endif
    return PORTABLE;
}

static const Kernels *kernels_of(int64_t instructions) {
#if defined(__x86_64__)
    if (instructions == AVX512_BF16) return &kernels_avx512_bf16;
    if (instructions == AVX512) return &kernels_avx512;
    if (instructions == AVX2) return &kernels_avx2;
#endif
    (void)instructions;
    return &kernels_portable;
}

/* -- what a call works on ------------------------------------------------------------------------------------------ */

/* Up to CHUNK rows of one expert. */
typedef struct {
    const Expert *expert;
    int64_t first, count;
} Chunk;

/* One of a layer's two matrices, and its work: `tiles` tiles of `lanes` outputs for each chunk. */
typedef struct {
    const Matrix *m;
    const Chunk *chunks;
    int64_t is_up, gated, width, lanes, tiles, count;
} Stage;

/* Some outputs of a chunk's rows, from output `from` on. */
typedef struct {
    const Chunk *chunk;
    int64_t from;
    float bias[TILE];
    Row w[TILE];
} Tile;

/* Scratch: inputs and intermediate values in the order of blocks, chunks, and what each thread decodes. */
typedef struct {
    char *xs, *hs, *decoded;
    Chunk *chunks;
} Scratch;

static int64_t computed_as(const Matrix *m, const Call *call) {
    const int64_t paired = forms[m->format].paired;
    const int fits = !scales_sums(paired) || forms[paired].block <= (int64_t)1 << m->in_shift;
    return call->x_format == BF16 && call->instructions == AVX512_BF16 && fits ? paired : m->format;
}

/* The layer in the formats that the call computes with. */
static Layer computed(const Layer *layer, const Call *call) {
    Layer own = *layer;
    own.up.format = computed_as(&own.up, call);
    own.down.format = computed_as(&own.down, call);
    return own;
}

/* Bytes from one packed row of inputs to the next. */
static int64_t step_of(const Matrix *m) { return padded(m->format, m->in) * input_bytes(m->format) + APART; }

/* What a thread needs for decoded weights of either matrix, where an expert may have so many rows. */
static int64_t decoded_bytes(const Layer *layer, int64_t rows) {
    int64_t up = is_decoded(&layer->up, rows) ? step_of(&layer->up) : 0;
    int64_t down = is_decoded(&layer->down, rows) ? step_of(&layer->down) : 0;
    return TILE * (up > down ? up : down);
}

/* Lays `s` out from `at` on; the end. */
static char *lay_out(const Layer *layer, int64_t rows, int64_t experts, int64_t threads, char *at, Scratch *s) {
    s->xs = at;
    s->hs = s->xs + (layer->up.out ? rows * step_of(&layer->up) : 0);
    s->decoded = s->hs + rows * step_of(&layer->down);
    s->chunks = (Chunk *)(s->decoded + threads * decoded_bytes(layer, rows));
    return (char *)(s->chunks + rows / CHUNK + experts);
}

static int64_t chunk_up(const Expert *const *experts, const int64_t *counts, int64_t count, Chunk *chunks) {
    int64_t made = 0, first = 0;
    for (int64_t e = 0; e < count; first += counts[e++])
        for (int64_t r = 0; r < counts[e]; r += CHUNK)
            chunks[made++] = (Chunk){experts[e], first + r, counts[e] - r < CHUNK ? counts[e] - r : CHUNK};
    return made;
}

static Stage stage_of(const Layer *layer, int is_up, const Chunk *chunks, int64_t chunk_count) {
    const int64_t gated = is_up && layer->gated, lanes = gated ? TILE / 2 : TILE;
    const int64_t width = is_up ? layer->down.in : layer->down.out, tiles = (width + lanes - 1) / lanes;
    return (Stage){is_up ? &layer->up : &layer->down, chunks, is_up, gated, width, lanes, tiles, chunk_count * tiles};
}

/* -- the work of a thread ------------------------------------------------------------------------------------------ */

/* Outputs from `from` on into lanes from `lane` on; where there are no more, the last one again. */
static void take(const Stage *s, const Outputs *o, int64_t from, int64_t lane, Tile *t) {
    for (int64_t n = 0; n < s->lanes; n++) {
        int64_t i = from + n < s->width ? from + n : s->width - 1, j = o->first + i * o->step;
        t->w[lane + n].data = o->data + j * s->m->row_bytes;
        t->w[lane + n].scale = o->scale + (j >> s->m->out_shift) * s->m->scale_bytes;
        t->bias[lane + n] = o->bias ? o->bias[j] : 0;
    }
}

static void find_tile(const Stage *s, int64_t item, Tile *t) {
    t->chunk = s->chunks + item / s->tiles;
    t->from = item % s->tiles * s->lanes;
    const Expert *expert = t->chunk->expert;
    if (s->gated) take(s, &expert->gate, t->from, 0, t);
    take(s, s->is_up ? &expert->up : &expert->down, t->from, TILE - s->lanes, t);
}

/* Activated outputs of `up` to where `down` finds them. */
static void put_up(const Kernels *k, const Layer *layer, const Stage *s, const Tile *t, const f32x16 *out, char *hs) {
    const int64_t format = layer->down.format, step = step_of(&layer->down);
    const int64_t left = s->width - t->from, lanes = left < s->lanes ? left : s->lanes;
    int64_t place[TILE];
    for (int64_t n = 0; n < lanes; n++) place[n] = place_of(format, t->from + n);
    for (int64_t r = 0; r < t->chunk->count; r++) {
        char *to = hs + (t->chunk->first + r) * step;
        if (in_pairs(format)) {
            uint16_t rounded[TILE];
            k->store(BF16, rounded, 0, out + r, TILE);
            for (int64_t n = 0; n < lanes; n++) ((uint16_t *)to)[place[n]] = rounded[n];
        } else {
            for (int64_t n = 0; n < lanes; n++) ((float *)to)[place[n]] = ((const float *)(out + r))[n];
        }
    }
}

static void put_down(const Kernels *k, const Stage *s, const Tile *t, const f32x16 *out, const Call *call) {
    const int64_t left = s->width - t->from, lanes = left < TILE ? left : TILE;
    for (int64_t r = 0; r < t->chunk->count; r++)
        k->store(call->y_format, call->y, (t->chunk->first + r) * s->width + t->from, out + r, lanes);
}

static void compute_tile(const Kernels *k, const Layer *layer, const Stage *s, const Tile *t, Ahead ahead,
                         const Scratch *scratch, const Call *call, char *decoded) {
    const int64_t step = step_of(s->m);
    f32x16 out[CHUNK];
    const char *in = (s->is_up ? scratch->xs : scratch->hs) + t->chunk->first * step;
    k->tile(s->m, t->w, t->bias, in, step, t->chunk->count, ahead, out, decoded);
    if (!s->is_up) return put_down(k, s, t, out, call);
    k->activate(&layer->activation, (int)s->gated, out, t->chunk->count);
    put_up(k, layer, s, t, out, scratch->hs);
}

static int64_t claim(int64_t *taken) { return __atomic_fetch_add(taken, 1, __ATOMIC_RELAXED); }

/* Tiles until all of the stage's are taken. The next one is claimed before one is computed, so that its weights can be
   fetched meanwhile. */
static void compute_stage(const Kernels *k, const Layer *layer, const Stage *s, int64_t *taken, const Scratch *scratch,
                          const Call *call, char *decoded) {
    Tile tiles[2];
    int64_t item = claim(taken);
    if (item < s->count) find_tile(s, item, tiles);
    for (int now = 0; item < s->count; now = !now) {
        Ahead ahead = {tiles[!now].w, TILE, s->m->row_bytes, bytes_of(s->m->format, 16)};
        item = claim(taken);
        if (item < s->count)
            find_tile(s, item, tiles + !now);
        else
            ahead.count = 0;
        compute_tile(k, layer, s, tiles + now, ahead, scratch, call, decoded);
    }
}

static void pack_row(const Kernels *k, const Layer *layer, const Scratch *s, const Call *call, int64_t r) {
    const Matrix *first = layer->up.out ? &layer->up : &layer->down;
    const int64_t from = call->rows ? call->rows[r] : r;
    const void *x = (const char *)call->x + bytes_of(call->x_format, from * first->in);
    char *packed = s->xs + r * step_of(first);
    k->pack(call->x_format, x, first, packed);
    if (!layer->up.out) return;
    const int64_t block = 64 * vectors_of(layer->down.format); /* may not be filled */
    memset(s->hs + (r + 1) * step_of(&layer->down) - APART - block, 0, block);
}

/* -- what Python calls --------------------------------------------------------------------------------------------- */

int64_t moeray_scratch(const Layer *layer, int64_t rows, int64_t experts, const Call *call) {
    const Layer own = computed(layer, call);
    Scratch s;
    return lay_out(&own, rows, experts, call->threads, NULL, &s) - (char *)NULL;
}

/* `count` experts, each with the next counts[i] rows, to the same rows of y. */
void moeray_forward(const Layer *stored, const Expert *const *experts, const int64_t *counts, int64_t count,
                    const Call *call) {
    const Kernels *k = kernels_of(call->instructions);
    const Layer own = computed(stored, call), *layer = &own;
    int64_t rows = 0, taken[2] = {0, 0};
    for (int64_t e = 0; e < count; e++) rows += counts[e];
    Scratch s;
    lay_out(layer, rows, count, call->threads, call->scratch, &s);
    const int64_t chunk_count = chunk_up(experts, counts, count, s.chunks);
    const Stage up = stage_of(layer, 1, s.chunks, chunk_count), down = stage_of(layer, 0, s.chunks, chunk_count);
#pragma omp parallel num_threads(call->threads) if (call->threads > 1)
    {
        char *decoded = s.decoded + omp_get_thread_num() * decoded_bytes(layer, rows);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) pack_row(k, layer, &s, call, r);
        if (layer->up.out) compute_stage(k, layer, &up, taken, &s, call, decoded);
#pragma omp barrier
        compute_stage(k, layer, &down, taken + 1, &s, call, decoded);
    }
}

/* What this machine can do at most, for benchmarks: read `size` bytes, each thread a part; a multiple of READ each. */
void moeray_read(const char *data, int64_t size, int64_t threads, int64_t instructions) {
    const int64_t part = size / threads / READ * READ;
#pragma omp parallel num_threads(threads) if (threads > 1)
    kernels_of(instructions)->read(data + omp_get_thread_num() * part, part);
}

/* ... and multiply and add; the floating-point operations of all threads. */
int64_t moeray_multiply(int64_t times, int64_t threads, int64_t instructions) {
    int64_t operations = 0;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(+ : operations)
    operations += kernels_of(instructions)->multiply(times);
    return operations;
}
