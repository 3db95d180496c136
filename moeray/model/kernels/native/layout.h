/* What Python passes in (mirrored by kernels/native.py), and the vectors that every kernel computes with. */
#pragma once
#include <stdint.h>
#include <string.h>

#include "call.h"

#define NOINLINE __attribute__((noinline))
#define INLINE static inline __attribute__((always_inline))

enum { F32, F16, BF16, INT8, FP8, MXFP4 };
#define FORMATS(EACH) EACH(F32) EACH(F16) EACH(BF16) EACH(INT8) EACH(FP8) EACH(MXFP4)
enum { PORTABLE, AVX2, AVX512, AVX512_VNNI, AVX512_BF16, AMX_BF16 };

/* Formats inside a call alone, for CPUs that multiply pairs of BF16: stored as the name says (PAIRS: as BF16), exact as
   BF16 (FP8 but for its scales), and multiplied with inputs that stay BF16, two in 4 bytes. SCALED_PAIRS: FP8 decoded
   to BF16, its scales apart. INT8_PAIRS: -128, which no rounding gives, counts as 0. INT8_DIGITS: INT8, multiplied with
   inputs in whole numbers (digits.h). What is below 2^-126 counts as 0 there. */
enum { PAIRS = MXFP4 + 1, SCALED_PAIRS, INT8_PAIRS, FP8_PAIRS, MXFP4_PAIRS, INT8_DIGITS };
#define PAIR_FORMATS(EACH) EACH(PAIRS) EACH(SCALED_PAIRS) EACH(INT8_PAIRS) EACH(FP8_PAIRS) EACH(MXFP4_PAIRS)

/* bits: of a weight. block: inputs whose weights are decoded at once. few: up to so many rows weights are decoded anew
   for each few of them; for more once, to the format `decoded`. paired: the format for CPUs that multiply pairs.
   streamed: up to so many rows are multiplied in the order of memory (stream.h). */
typedef struct {
    int64_t bits, block, few, decoded, paired, streamed;
} Form;

static const Form forms[] = {
    [F32] = {32, 16, INT64_MAX, F32, F32},
    [F16] = {16, 16, 48, F32, F16, 2},
    [BF16] = {16, 32, INT64_MAX, BF16, PAIRS, 2},
    [INT8] = {8, 16, INT64_MAX, INT8, INT8_PAIRS},
    [FP8] = {8, 16, 4, F32, FP8_PAIRS},
    [MXFP4] = {4, 128, 4, F32, MXFP4_PAIRS},
    [PAIRS] = {16, 32, INT64_MAX, PAIRS, PAIRS, 4},
    [SCALED_PAIRS] = {16, 32, INT64_MAX, SCALED_PAIRS, SCALED_PAIRS},
    [INT8_PAIRS] = {8, 64, 10, PAIRS, INT8_PAIRS},
    [FP8_PAIRS] = {8, 64, 10, SCALED_PAIRS, FP8_PAIRS, 8},
    [MXFP4_PAIRS] = {4, 64, 12, PAIRS, MXFP4_PAIRS},
    [INT8_DIGITS] = {8, 64, INT64_MAX, INT8_DIGITS, INT8_DIGITS, 4},
};

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
struct Layer {
    Matrix up, down;
    Activation activation;
    int64_t gated;
};

struct Expert {
    Outputs gate, up, down;
};

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

void moeray_keep(const char *x, int64_t token, int64_t head, int64_t tokens, int64_t heads, int64_t bytes,
                 const int64_t *slots, char *cache);
void moeray_norm(int64_t format, const void *x, const float *weight, int64_t rows, int64_t size, float eps,
                 int64_t early, void *y, int64_t threads);
void moeray_rotate(int64_t format, const void *x, int64_t token, int64_t head, int64_t tokens, int64_t heads,
                   int64_t size, const void *cosine, const void *sine, void *y, int64_t threads);

/* One output's weights, or what is left of them, and their scales. */
typedef struct {
    const uint8_t *data, *scale;
} Row;

/* Every `step`th weight row of those that will be read next, for fetching them from memory meanwhile: `bytes` of each, at
   the pace of so many for 16 inputs. near: turn by turn, instead of a tile ahead. */
typedef struct {
    const Row *rows;
    int64_t count, step, bytes, pace, near;
} Ahead;

enum {
    TILE = 16,       /* outputs computed at once: 16, or 8 of the gate beside their 8 of up */
    SPAN = 512,      /* inputs of the rows that are multiplied at once that stay in the nearest cache */
    MOST_LANES = 32, /* where matrix tiles multiply: 32, or 16 beside 16 */
    GROUP = 16,      /* rows that a matrix tile holds */
    CHUNK = 128,     /* rows computed at once, so that they stay in a near cache while the weights pass by */
    MOST_ROWS = 512, /* ... by matrix tiles, where so many fit it */
    NEAR = 5 << 18,  /* bytes of such a cache that they and the weights of three tiles may take */
    PANEL_ROWS = 256, /* for so many at least weights are copied to where tiles read them fastest */
    APART = 64,      /* bytes between rows, lest all of them want the same places of a cache */
    STREAMED = 8,    /* rows of inputs at most that are multiplied in the order of memory, */
    INPUTS = 16384,  /* their bytes, which stay in the nearest cache beside the weights that pass by, */
    DISTANCE = 8192, /* and bytes from what is multiplied to what is fetched */
    MEANWHILE = 512, /* bytes of a weight row that are fetched while outputs are finished */
    READ = 32768,    /* bytes that four streams read at a time */
    FILLER = 64 + 4, /* bytes of the largest block and its scales */
    DIGITS = 64,     /* bytes of weights, and of each digit of inputs, that a loop over digits takes at a time */
    FIT = 8192,      /* products of digits that add up to 16 parts of 32 bits in all cases */
};

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef int16_t i16x16 __attribute__((vector_size(32)));
typedef int8_t i8x16 __attribute__((vector_size(16)));

#define LOAD(type, from) ({ type loaded_; memcpy(&loaded_, (from), sizeof loaded_); loaded_; })
#define SPLAT(value) ((f32x16){0} + (value))

/* What follows a row of inputs in digits. excess: what 16 parts of a sum have too much, negated. unit: what is counted. */
typedef struct {
    int32_t excess[16];
    float unit;
} __attribute__((aligned(64))) Digits;

INLINE int in_pairs(int64_t format) { return format >= PAIRS && format <= MXFP4_PAIRS; }

INLINE int in_digits(int64_t format) { return format == INT8_DIGITS; }

/* Whether sums are to be multiplied by their output's scale. */
INLINE int in_int8(int64_t format) { return format == INT8 || format == INT8_PAIRS || format == INT8_DIGITS; }

/* Whether each sum over the inputs of a block of FP8 is scaled, not each weight. */
INLINE int scales_sums(int64_t format) { return format == FP8_PAIRS || format == SCALED_PAIRS; }

INLINE int in_fp8(int64_t format) { return format == FP8 || scales_sums(format); }

INLINE int in_fp4(int64_t format) { return format == MXFP4 || format == MXFP4_PAIRS; }

/* Whole bytes are multiplied without a shift back, so that they can be part of an address. */
INLINE int64_t bytes_of(int64_t format, int64_t inputs) {
    const int64_t bits = forms[format].bits;
    return bits < 8 ? inputs * bits >> 3 : inputs * (bits >> 3);
}

/* An input in scratch. */
INLINE int64_t input_bytes(int64_t format) { return in_pairs(format) || in_digits(format) ? 2 : 4; }

/* Whether so many rows of inputs are multiplied with weights in the order in which these lie in memory (stream.h). */
INLINE int streams(const Matrix *m, int64_t rows) {
    return rows <= forms[m->format].streamed && (scales_sums(m->format) || rows * input_bytes(m->format) * m->in <= INPUTS);
}

/* Vectors that hold the inputs of a block. */
INLINE int64_t vectors_of(int64_t format) { return forms[format].block * input_bytes(format) / 64; }

/* Inputs that are multiplied in one turn of a loop: whole blocks, and weights that fill lines of the cache. */
INLINE int64_t stretch_of(int64_t format) { return forms[format].bits < 8 ? 128 : 64; }

INLINE int64_t padded(int64_t format, int64_t inputs) {
    const int64_t block = forms[format].block;
    return (inputs + block - 1) / block * block;
}

/* Whether inputs lie in scratch as they come, two bytes each. */
INLINE int in_order(int64_t format) { return format == PAIRS || format == SCALED_PAIRS || in_digits(format); }

/* Where input k lies among a row's, which is the order in which decoding yields weights. Of n vectors, number j holds a
   block's inputs j, j + n, j + 2n, ...; in pairs, bytes are unpacked in runs of 8, even ones before odd ones, and of 8
   words with 4 numbers each come all words' first ones, then all second ones, ... */
INLINE int64_t place_of(int64_t format, int64_t k) {
    if (in_order(format)) return k;
    if (format == MXFP4_PAIRS) return (k & ~31) | (k & 3) << 3 | (k & 28) >> 2;
    if (in_pairs(format)) return (k & ~63) | (k & 8) << 2 | (k & 48) >> 1 | (k & 7);
    const int64_t n = vectors_of(format), within = k % forms[format].block;
    return k - within + within % n * 16 + within / n;
}

/* Whether the weights are decoded once for so many rows, or in pairs, so that they fill their last block. */
INLINE int is_decoded(const Matrix *m, int64_t rows) {
    const Form form = forms[m->format];
    return rows > form.few || (in_pairs(m->format) && m->in % form.block);
}
