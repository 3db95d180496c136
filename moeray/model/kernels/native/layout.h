/* What Python passes in (mirrored by kernels/native.py), and the vectors that every kernel computes with. */
#pragma once
#include <stdint.h>
#include <string.h>

#define NOINLINE __attribute__((noinline))
#define INLINE static inline __attribute__((always_inline))

enum { F32, F16, BF16, INT8, FP8, MXFP4 };
#define FORMATS(EACH) EACH(F32) EACH(F16) EACH(BF16) EACH(INT8) EACH(FP8) EACH(MXFP4)
enum { PORTABLE, AVX2, AVX512, AVX512_BF16 };

/* Formats inside a call alone, for CPUs that multiply pairs of BF16: weights that are BF16, or INT8 (-127 to 127) and
   so exact as BF16, whose inputs stay BF16, two in 4 bytes. */
enum { PAIRS = MXFP4 + 1, INT8_PAIRS };
INLINE int in_pairs(int64_t format) { return format == PAIRS || format == INT8_PAIRS; }

/* A weight matrix [out, in] in its stored form, one output's weights after another.

   row_bytes: from one output's weights to the next's; scale_bytes: from one row of scales to the next.
   FP8: a float for every block of 1 << out_shift outputs and 1 << in_shift inputs. MXFP4: an E8M0 byte for every 32
   inputs of an output. INT8: a float for every output. (Both shifts are 0 for these.) */
typedef struct {
    int64_t format, in, out, row_bytes, scale_bytes, out_shift, in_shift;
} Matrix;

/* Every `step`th output of a matrix, from `first` on. bias: a float for every output of the matrix, or NULL. */
typedef struct {
    const uint8_t *data, *scale;
    const float *bias;
    int64_t first, step;
} Outputs;

/* y = g' sigmoid(alpha (g' + cubic g'^3)) (u' + shift), where g' <= limit and |u'| <= limit; without a gate no u. */
typedef struct {
    float alpha, cubic, limit, shift;
} Activation;

/* act(x Up^T) Down^T, where `gated` up holds gates too; without `up` (up.out 0) x Down^T alone. */
typedef struct {
    Matrix up, down;
    Activation activation;
    int64_t gated;
} Layer;

typedef struct {
    Outputs gate, up, down;
} Expert;

/* rows: the row of x that each one is, or NULL where they lie one after the other. x_format, y_format: F32 or BF16.
   scratch: as many bytes as moeray_scratch says, aligned to 64. */
typedef struct {
    const void *x;
    const int64_t *rows;
    void *y;
    char *scratch;
    int64_t x_format, y_format, threads, instructions;
} Call;

int64_t moeray_scratch(const Layer *layer, int64_t rows, int64_t experts, const Call *call);
void moeray_forward(const Layer *layer, const Expert *const *experts, const int64_t *counts, int64_t count,
                    const Call *call);

/* q [sequences, heads, k_size], y [sequences, heads, v_size] contiguous; k and v [slots, groups, size]. `format` (F32
   or BF16) is that of all four. q_row, q_head, k_slot, k_head, v_slot, v_head: bytes to the next one. Where v is k, a
   value is the beginning of its key. A sequence sees its keys [first, end); key i lies in block tables[i / block].
   sinks: a score for every head, or NULL. softcap: 0 for none. */
typedef struct {
    const void *q, *k, *v;
    void *y;
    char *scratch;
    const int64_t *tables, *first, *end;
    const float *sinks;
    int64_t format, sequences, heads, groups, k_size, v_size, q_row, q_head, k_slot, k_head, v_slot, v_head;
    int64_t table_width, block, threads, instructions;
    float scale, softcap;
} Attention;

int64_t moeray_attention_scratch(const Attention *call);
void moeray_attention(const Attention *call);

void moeray_combine(int64_t format, const void *rows, const float *weights, int64_t tokens, int64_t top_k, int64_t size,
                    void *out, int64_t threads);
void moeray_norm(int64_t format, const void *x, const float *weight, int64_t rows, int64_t size, float eps,
                 int64_t early, void *y, int64_t threads);
void moeray_rotate(int64_t format, const void *x, int64_t token, int64_t head, int64_t tokens, int64_t heads,
                   int64_t size, const void *cosine, const void *sine, void *y, int64_t threads);

/* One output's weights, or what is left of them, and their scales. */
typedef struct {
    const uint8_t *data, *scale;
} Row;

/* Weight rows that will be read next, for fetching them from memory meanwhile: `bytes` of each, at the pace of so many
   for 16 inputs. */
typedef struct {
    const Row *rows;
    int64_t count, bytes, pace;
} Ahead;

enum {
    RUN = 8,         /* inputs that stay together in INT8_PAIRS */
    TILE = 16,       /* outputs computed at once: 16, or 8 of the gate beside their 8 of up */
    CHUNK = 128,     /* rows computed at once, so that they stay in a near cache while the weights pass by */
    APART = 64,      /* bytes between rows, lest all of them want the same places of a cache */
    READ = 32768,    /* bytes that four streams read at a time */
    FILLER = 64 + 4, /* bytes of the largest block and its scales */
};

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef int16_t i16x16 __attribute__((vector_size(32)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef int8_t i8x16 __attribute__((vector_size(16)));

#define LOAD(type, from) ({ type loaded_; memcpy(&loaded_, (from), sizeof loaded_); loaded_; })
#define SPLAT(value) ((f32x16){0} + (value))

/* A block of inputs is `stride` vectors of 16; vector j holds its inputs j, j + stride, j + 2 stride, ..., the order in
   which decoding yields weights. */
INLINE int64_t stride_of(int64_t format) { return format == BF16 ? 2 : format == MXFP4 ? 8 : 1; }

/* Inputs whose weights are decoded at once. */
INLINE int64_t block_of(int64_t format) {
    return format == PAIRS ? 32 : format == INT8_PAIRS ? 64 : 16 * stride_of(format);
}

INLINE int64_t padded(int64_t format, int64_t inputs) {
    int64_t block = block_of(format);
    return (inputs + block - 1) / block * block;
}

/* Where input k of a row lies in that order. INT8_PAIRS: even runs of a block before odd ones, as bytes are unpacked. */
INLINE int64_t place_of(int64_t format, int64_t k) {
    const int64_t within = k % block_of(format), stride = stride_of(format), first = k - within;
    if (format == PAIRS) return k;
    if (format == INT8_PAIRS) return first + within / RUN % 2 * 32 + within / (2 * RUN) * RUN + within % RUN;
    return first + within % stride * 16 + within / stride;
}

INLINE int64_t bytes_of(int64_t format, int64_t inputs) {
    if (format == F32) return 4 * inputs;
    if (format == F16 || format == BF16 || format == PAIRS) return 2 * inputs;
    return format == MXFP4 ? inputs / 2 : inputs;
}

/* An input in scratch. */
INLINE int64_t input_bytes(int64_t format) { return in_pairs(format) ? 2 : 4; }

/* More rows than that want weights decoded once, not anew for each few rows. */
INLINE int64_t many_for(int64_t format) {
    if (format == F32 || format == PAIRS) return INT64_MAX;
    if (format == INT8_PAIRS) return 8;
    return format == FP8 || format == MXFP4 ? 12 : 48;
}
