/* Expert FFNs and linear layers over stored weights, for CPUs. One parallel region a call; see body.h for the sums.

   Nothing is allocated, and nothing is kept between calls. Threads are those of the OpenMP runtime that the process
   already has (torch's): this object is linked to none. */
#include "layout.h"

#include <omp.h>
#include <stddef.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

/* Vectors go by pointer: how they go by value depends on the instruction set. */
typedef struct {
    void (*tile)(const Matrix *, const Row *, const f32x16 *bias, const float *x, int64_t x_step, int64_t count,
                 f32x16 *out, f32x16 *partial, float *decoded);
    void (*activate)(const Activation *, int gated, f32x16 *rows, int64_t count);
    void (*pack)(int64_t format, const void *x, int64_t count, int64_t stride, float *packed);
    void (*store)(int64_t format, void *y, int64_t at, const f32x16 *v, int64_t count);
} Kernels;

/* -- one set of kernels for each instruction set ------------------------------------------------------------------- */

#define FN(name) name##_portable
#define ROWS 2
#define OUTS 2
#include "body.h"
#undef FN
#undef ROWS
#undef OUTS

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define FN(name) name##_avx2
#define ROWS 2
#define OUTS 2
#include "body.h"
#undef FN
#undef ROWS
#undef OUTS
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma")
#define FN(name) name##_avx512
#define ROWS 4
#define OUTS 4
#include "body.h"
#undef FN
#undef ROWS
#undef OUTS
#pragma GCC pop_options
#endif

/* The most capable instruction set that this CPU has. */
int64_t moeray_instructions(void) {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        return AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return AVX2;
#endif
    return PORTABLE;
}

static const Kernels *kernels_of(int64_t instructions) {
#if defined(__x86_64__)
    if (instructions == AVX512) return &kernels_avx512;
    if (instructions == AVX2) return &kernels_avx2;
#endif
    (void)instructions;
    return &kernels_portable;
}

/* -- what a call works on ------------------------------------------------------------------------------------------ */

/* gated: `up` holds gates too. */
typedef struct {
    Matrix up, down;
    Activation activation;
    int64_t gated;
} Layer;

/* Without gates `gate` is not looked at. */
typedef struct {
    Outputs gate, up, down;
} Expert;

/* format: of x and y, F32 or BF16. scratch: as many bytes as moeray_scratch says, aligned to 64. */
typedef struct {
    const void *x;
    void *y;
    char *scratch;
    int64_t format, threads, instructions;
} Call;

/* Up to CHUNK rows of one expert. */
typedef struct {
    const Expert *expert;
    int64_t first, count;
} Chunk;

/* What a thread writes. */
typedef struct {
    f32x16 partial[CHUNK * TILE], out[CHUNK];
    float decoded[TILE * DEPTH];
} Local;

static int64_t rounded(int64_t bytes) { return (bytes + 63) / 64 * 64; }

static int64_t packed_bytes(const Matrix *m, int64_t rows) { return rows * padded(m->format, m->in) * 4; }

static int64_t chunks_bytes(int64_t rows, int64_t experts) {
    return rounded((rows / CHUNK + experts) * (int64_t)sizeof(Chunk));
}

static Row row_of(const Matrix *m, const Outputs *o, int64_t i) {
    int64_t j = o->first + i * o->step;
    return (Row){o->data + j * m->row_bytes, o->scale + j / m->scale_rows * m->scale_bytes};
}

/* Outputs from `from` on, into lanes from `lane` on; the last one again where there are no more. */
static void take(const Matrix *m, const Outputs *o, int64_t of, int64_t from, int lane, int count, Row *w, f32x16 *bias) {
    for (int n = 0; n < count; n++) {
        int64_t i = from + n < of ? from + n : of - 1;
        w[lane + n] = row_of(m, o, i);
        (*bias)[lane + n] = o->bias ? o->bias[o->first + i * o->step] : 0;
    }
}

/* -- the work of a thread ------------------------------------------------------------------------------------------ */

/* Some intermediate values of a chunk's rows, from x to h, both packed. */
static void up_tile(const Kernels *k, const Layer *layer, const Chunk *chunk, int64_t from, const float *xs, float *hs,
                    Local *local) {
    const int64_t width = layer->down.in, in = padded(layer->up.format, layer->up.in);
    const int64_t step = padded(layer->down.format, width), stride = stride_of(layer->down.format);
    const int lanes = layer->gated ? TILE / 2 : TILE;
    Row w[TILE];
    f32x16 bias;
    if (layer->gated) take(&layer->up, &chunk->expert->gate, width, from, 0, lanes, w, &bias);
    take(&layer->up, &chunk->expert->up, width, from, TILE - lanes, lanes, w, &bias);
    k->tile(&layer->up, w, &bias, xs + chunk->first * in, in, chunk->count, local->out, local->partial, local->decoded);
    k->activate(&layer->activation, (int)layer->gated, local->out, chunk->count);
    for (int64_t n = 0; n < lanes && from + n < width; n++) {
        float *to = hs + chunk->first * step + place_of(stride, from + n);
        for (int64_t r = 0; r < chunk->count; r++) to[r * step] = local->out[r][n];
    }
}

/* Some outputs of a chunk's rows, from packed inputs. */
static void down_tile(const Kernels *k, const Matrix *m, const Outputs *o, int64_t first, int64_t count, int64_t from,
                      const float *hs, const Call *call, Local *local) {
    const int64_t in = padded(m->format, m->in), lanes = m->out - from < TILE ? m->out - from : TILE;
    Row w[TILE];
    f32x16 bias;
    take(m, o, m->out, from, 0, TILE, w, &bias);
    k->tile(m, w, &bias, hs + first * in, in, count, local->out, local->partial, local->decoded);
    for (int64_t r = 0; r < count; r++)
        k->store(call->format, call->y, (first + r) * m->out + from, local->out + r, lanes);
}

static const void *input_row(const Call *call, int64_t r, int64_t in) {
    return (const char *)call->x + bytes_of(call->format, r * in);
}

/* -- what Python calls --------------------------------------------------------------------------------------------- */

int64_t moeray_ffn_scratch(const Layer *layer, int64_t rows, int64_t experts, int64_t threads) {
    return packed_bytes(&layer->up, rows) + packed_bytes(&layer->down, rows) + chunks_bytes(rows, experts) +
           threads * (int64_t)sizeof(Local);
}

/* `count` experts, each with the next counts[i] rows of x: act(x Up^T) Down^T -> the same rows of y. */
void moeray_ffn(const Layer *layer, const Expert *const *experts, const int64_t *counts, int64_t count,
                const Call *call) {
    const Kernels *k = kernels_of(call->instructions);
    int64_t rows = 0, chunk_count = 0;
    for (int64_t e = 0; e < count; e++) rows += counts[e];
    float *xs = (float *)call->scratch, *hs = (float *)(call->scratch + packed_bytes(&layer->up, rows));
    Chunk *chunks = (Chunk *)((char *)hs + packed_bytes(&layer->down, rows));
    Local *locals = (Local *)((char *)chunks + chunks_bytes(rows, count));
    for (int64_t e = 0, first = 0; e < count; first += counts[e++])
        for (int64_t r = 0; r < counts[e]; r += CHUNK)
            chunks[chunk_count++] = (Chunk){experts[e], first + r, counts[e] - r < CHUNK ? counts[e] - r : CHUNK};
    const int64_t in = padded(layer->up.format, layer->up.in), width = padded(layer->down.format, layer->down.in);
    const int64_t lanes = layer->gated ? TILE / 2 : TILE;
    const int64_t up_tiles = (layer->down.in + lanes - 1) / lanes, down_tiles = (layer->down.out + TILE - 1) / TILE;
    const int64_t last = width - 16 * stride_of(layer->down.format);
#pragma omp parallel num_threads(call->threads) if (call->threads > 1)
    {
        Local *local = locals + omp_get_thread_num();
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) {
            const void *x = input_row(call, r, layer->up.in);
            k->pack(call->format, x, layer->up.in, stride_of(layer->up.format), xs + r * in);
            memset(hs + r * width + last, 0, (width - last) * 4);
        }
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < chunk_count * up_tiles; i++)
            up_tile(k, layer, chunks + i / up_tiles, i % up_tiles * lanes, xs, hs, local);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < chunk_count * down_tiles; i++) {
            const Chunk *chunk = chunks + i / down_tiles;
            down_tile(k, &layer->down, &chunk->expert->down, chunk->first, chunk->count, i % down_tiles * TILE, hs, call,
                      local);
        }
    }
}

int64_t moeray_linear_scratch(const Matrix *m, int64_t rows, int64_t threads) {
    return packed_bytes(m, rows) + threads * (int64_t)sizeof(Local);
}

/* y [rows, out] = x [rows, in] W^T + b */
void moeray_linear(const Matrix *m, const Outputs *outputs, int64_t rows, const Call *call) {
    const Kernels *k = kernels_of(call->instructions);
    float *xs = (float *)call->scratch;
    Local *locals = (Local *)(call->scratch + packed_bytes(m, rows));
    const int64_t in = padded(m->format, m->in), tiles = (m->out + TILE - 1) / TILE;
#pragma omp parallel num_threads(call->threads) if (call->threads > 1)
    {
        Local *local = locals + omp_get_thread_num();
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++)
            k->pack(call->format, input_row(call, r, m->in), m->in, stride_of(m->format), xs + r * in);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < (rows + CHUNK - 1) / CHUNK * tiles; i++) {
            int64_t first = i / tiles * CHUNK, count = rows - first < CHUNK ? rows - first : CHUNK;
            down_tile(k, m, outputs, first, count, i % tiles * TILE, xs, call, local);
        }
    }
}
