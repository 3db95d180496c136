/* Expert FFNs and linear layers over stored weights, for CPUs. One parallel region a call; see body.h for the sums.

   Nothing is allocated, and nothing is kept between calls. Threads are those of the OpenMP runtime that the process
   already has (torch's): this object is linked to none. */
#include "bf16.h"
#include "work.h"

#include <omp.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__x86_64__) && defined(__linux__) && __GNUC__ >= 11
#define HAS_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

/* Vectors go by pointer: how they go by value depends on the instruction set. */
typedef struct {
    void (*tile)(const Matrix *, const Row *, const float *bias, const char *x, int64_t x_step, int64_t count,
                 Ahead ahead, f32x16 *out, char *decoded);
    void (*activate)(const Activation *, int gated, f32x16 *rows, int64_t count);
    void (*pack)(int64_t format, const void *x, const Matrix *m, char *packed);
    void (*store)(int64_t format, char *y, int64_t step, const f32x16 *rows, int64_t lanes, int64_t count);
    void (*read)(const char *data, int64_t size);
    int64_t (*multiply)(int64_t times);
} Kernels;

#define UP_TO_2(EACH, format) EACH(format, 1) EACH(format, 2)
#define UP_TO_6(EACH, format) UP_TO_2(EACH, format) EACH(format, 3) EACH(format, 4) EACH(format, 5) EACH(format, 6)

/* -- one set of kernels for each instruction set ------------------------------------------------------------------- */

#define FN(name) name##_portable
#define LANES 4
#define MOST 2
#define UP_TO_MOST UP_TO_2
#define OUTS 2
#include "body.h"

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define FN(name) name##_avx2
#define LANES 8
#define MOST 6
#define UP_TO_MOST UP_TO_6
#define OUTS 2
#include "body.h"
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma")
#define FN(name) name##_avx512
#define LANES 16
#define MOST 6
#define UP_TO_MOST UP_TO_6
#define OUTS 4
#include "body.h"
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma")
#define FN(name) name##_avx512_vnni
#define LANES 16
#define MOST 6
#define UP_TO_MOST UP_TO_6
#define OUTS 4
#include "body.h"
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vbmi,avx512vnni,fma")
#define FN(name) name##_avx512_bf16
#define LANES 16
#define MOST 6
#define UP_TO_MOST UP_TO_6
#define OUTS 4
#include "body.h"
#pragma GCC pop_options

#if defined(HAS_AMX)
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vbmi,avx512vnni,fma,amx-tile,amx-bf16")
#include "amx.h"
#pragma GCC pop_options
#endif
#endif

/* The most capable instruction set that this CPU has, and this process may use. */
int64_t moeray_instructions(void) {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
        if (!__builtin_cpu_supports("avx512vnni")) return AVX512;
        if (!__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512vbmi")) return AVX512_VNNI;
#if defined(HAS_AMX)
        if (tiles_are_there) return AMX_BF16;
#endif
        return AVX512_BF16;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return AVX2;
#endif
    return PORTABLE;
}

static const Kernels *kernels_of(int64_t instructions) {
#if defined(__x86_64__)
    if (instructions >= AVX512_BF16) return &kernels_avx512_bf16;
    if (instructions == AVX512_VNNI) return &kernels_avx512_vnni;
    if (instructions == AVX512) return &kernels_avx512;
    if (instructions == AVX2) return &kernels_avx2;
#endif
    (void)instructions;
    return &kernels_portable;
}

/* -- the work of a thread ------------------------------------------------------------------------------------------ */

/* Activated outputs of `up` to where `down` finds them. */
static void put_up(const Kernels *k, const Work *w, const Tile *t, int64_t lanes, const f32x16 *out) {
    const int64_t format = w->layer.down.format, step = step_of(&w->layer.down), count = t->chunk->count;
    char *to = w->scratch.hs + t->chunk->at * step;
    if (in_order(format)) return k->store(BF16, to + 2 * t->from, step, out, lanes, count);
    uint16_t rounded[CHUNK][TILE];
    int64_t place[TILE];
    for (int64_t n = 0; n < lanes; n++) place[n] = place_of(format, t->from + n);
    if (input_bytes(format) == 2) k->store(BF16, (char *)rounded, sizeof rounded[0], out, TILE, count);
    for (int64_t r = 0; r < count; r++, to += step) {
        if (input_bytes(format) == 2)
            for (int64_t n = 0; n < lanes; n++) ((uint16_t *)to)[place[n]] = rounded[r][n];
        else
            for (int64_t n = 0; n < lanes; n++) ((float *)to)[place[n]] = ((const float *)(out + r))[n];
    }
}

static void put_down(const Kernels *k, const Work *w, const Stage *s, const Tile *t, const f32x16 *out) {
    const int64_t size = bytes_of(w->call->y_format, 1), at = t->chunk->first * s->width + t->from;
    k->store(w->call->y_format, (char *)w->call->y + at * size, s->width * size, out, left_of(s, t), t->chunk->count);
}

static void compute_tile(const Kernels *k, const Work *w, const Stage *s, const Tile *t, Ahead ahead, char *decoded) {
    const int64_t step = step_of(s->m);
    f32x16 out[CHUNK];
    const char *in = (s->is_up ? w->scratch.xs : w->scratch.hs) + t->chunk->at * step;
    k->tile(s->m, t->w, t->bias, in, step, t->chunk->count, ahead, out, decoded);
    if (!s->is_up) return put_down(k, w, s, t, out);
    k->activate(&w->layer.activation, (int)s->gated, out, t->chunk->count);
    put_up(k, w, t, left_of(s, t), out);
}

/* One of the stage's tiles that nobody has, or its `count`. Each thread has a part of its own, whose weights follow one
   another in memory: what CPUs fetch ahead by themselves is then of use. Who is done helps the next ones. */
static int64_t claim(const Work *w, const Stage *s, int64_t me) {
    const int64_t threads = w->call->threads;
    for (int64_t i = 0; i < threads; i++) {
        const int64_t owner = (me + i) % threads, end = s->count * (owner + 1) / threads;
        const int64_t item = s->count * owner / threads + __atomic_fetch_add(&s->taken[owner].tiles, 1, __ATOMIC_RELAXED);
        if (item < end) return item;
    }
    return s->count;
}

/* Tiles until all of the stage's are taken. The next one is claimed before one is computed, so that its weights can be
   fetched meanwhile. */
static void compute_stage(const Kernels *k, const Work *w, const Stage *s, int64_t me, char *decoded) {
    Tile tiles[2];
    int64_t item = claim(w, s, me), shaped = 0;
    if (item < s->count) find_tile(s, item, tiles);
    for (int now = 0; item < s->count; now = !now) {
        Ahead ahead = {tiles[!now].w, lanes_of(w), 1, s->m->row_bytes, bytes_of(s->m->format, 16), 0};
        item = claim(w, s, me);
        if (item < s->count)
            find_tile(s, item, tiles + !now);
        else
            ahead.count = 0;
#if defined(HAS_AMX)
        if (w->matrix) {
            compute_tiles(w, s, tiles + now, ahead, decoded, &shaped);
            continue;
        }
#endif
        compute_tile(k, w, s, tiles + now, ahead, decoded);
    }
#if defined(HAS_AMX)
    if (shaped) release_tiles();
#endif
}

static void pack_row(const Kernels *k, const Work *w, int64_t r) {
    const Layer *layer = &w->layer;
    const Matrix *first = layer->up.out ? &layer->up : &layer->down;
    k->pack(w->call->x_format, row_of(w, r), first, w->scratch.xs + r * step_of(first));
    if (!layer->up.out) return;
    const int64_t block = 64 * vectors_of(layer->down.format); /* may not be filled */
    memset(w->scratch.hs + r * step_of(&layer->down) + packed_bytes(&layer->down) - block, 0, block);
}

/* This thread's part of the inputs. */
static void pack(const Kernels *k, const Work *w, int64_t rows, int64_t chunks) {
#if defined(HAS_AMX)
    if (w->matrix) {
        const int64_t most = groups_of(most_rows(w));
#pragma omp for schedule(static)
        for (int64_t i = 0; i < chunks * most; i++) {
            const Chunk *chunk = w->scratch.chunks + i / most;
            if (i % most < groups_of(chunk->count)) pack_group(w, chunk, i % most);
        }
        return;
    }
#endif
    (void)chunks;
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; r++) pack_row(k, w, r);
}

/* This thread's part of the intermediate values, whose units are known once all of a row are there. */
static void into_digits(const Kernels *k, const Work *w, int64_t rows) {
    const Matrix *down = &w->layer.down;
#pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        char *row = w->scratch.hs + r * step_of(down);
        k->pack(BF16, row, down, row);
    }
}

/* -- what Python calls --------------------------------------------------------------------------------------------- */

int64_t moeray_scratch(const Layer *layer, int64_t rows, int64_t experts, const Call *call) {
    Work w = work_of(layer, call);
    return lay_out(&w, rows, experts, NULL) - (char *)NULL;
}

/* `count` experts, each with the next counts[i] rows, to the same rows of y. */
void moeray_forward(const Layer *layer, const Expert *const *experts, const int64_t *counts, int64_t count,
                    const Call *call) {
    const Kernels *k = kernels_of(call->instructions);
    Work w = work_of(layer, call);
    int64_t rows = 0;
    for (int64_t e = 0; e < count; e++) rows += counts[e];
    lay_out(&w, rows, count, call->scratch);
    const int64_t chunks = chunk_up(&w, experts, counts, count);
    const Stage up = stage_of(&w, 1, chunks), down = stage_of(&w, 0, chunks);
#pragma omp parallel num_threads(call->threads) if (call->threads > 1)
    {
        const int64_t me = omp_get_thread_num();
        char *decoded = w.scratch.decoded + me * decoded_bytes(&w, rows);
        pack(k, &w, rows, chunks);
        if (layer->up.out) compute_stage(k, &w, &up, me, decoded);
#pragma omp barrier
        if (layer->up.out && in_digits(w.layer.down.format)) into_digits(k, &w, rows);
        compute_stage(k, &w, &down, me, decoded);
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
    int64_t (*multiply)(int64_t) = kernels_of(instructions)->multiply;
#if defined(HAS_AMX)
    if (instructions >= AMX_BF16) multiply = multiply_zeros;
#endif
    int64_t operations = 0;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(+ : operations)
    operations += multiply(times);
    return operations;
}
