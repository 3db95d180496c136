/* Products of rows of inputs with a tile of weight rows, what comes next being fetched meanwhile; part of body.h. */

/* Of a tile the first of the OUTS rows that are multiplied together, in turn i. */
INLINE const Row *FN(turn)(const Row *w, int64_t i) { return w + i / APIECE * LANES + i % APIECE; }

/* What is fetched during turn i: a part of the next tile; or the rows of the next turn, which is far enough where memory
   is what turns wait for, and near enough for the nearest cache. */
INLINE Ahead FN(soon)(const Row *w, int64_t i, Ahead ahead) {
    enum { TURNS = TILE / OUTS };
    if (!ahead.near) return FN(share)(ahead, i, TURNS);
    const int last = i + 1 == TURNS;
    const Row *next = last ? ahead.rows : FN(turn)(w, i + 1);
    return (Ahead){next, last && !ahead.count ? 0 : OUTS, APIECE, ahead.bytes, ahead.pace, 1};
}

/* While outputs are finished, memory would have nothing to do: the first of what comes after the next tile's first turn. */
INLINE void FN(fetch_meanwhile)(Ahead ahead) {
    const Row *w = FN(turn)(ahead.rows, 1);
    for (int64_t byte = 0; byte < MEANWHILE && byte < ahead.bytes; byte += 64)
        for (int n = 0; n < OUTS; n++) __builtin_prefetch(w[n * APIECE].data + byte, 0, FETCH_TO);
}

/* TILE weight rows times `rows` rows of inputs: TILE / OUTS folds for each row. SPAN inputs at a time, so that those of
   all rows stay in the nearest cache while the weights pass by, unless one pass over the weights does. */
INLINE void FN(dot)(const int format, const int rows, const Matrix *m, const Row *w, const char *x, int64_t x_step,
                    Ahead ahead, FN(vec) *folds) {
    enum { TURNS = TILE / OUTS };
#if HAS_PAIRS
    if (scales_sums(format)) {
        for (int i = 0; i < TURNS; i++)
            FN(dot_scaled)(format, rows, m, FN(turn)(w, i), x, x_step, FN(soon)(w, i, ahead), folds + i);
        return;
    }
#endif
#if HAS_DIGITS
    if (in_digits(format)) {
        for (int i = 0; i < TURNS; i++)
            FN(dot_digits)(rows, m, FN(turn)(w, i), x, x_step, FN(soon)(w, i, ahead), folds + i);
        return;
    }
#endif
    FN(wide) sums[LANES == 8 ? TURNS : 1][MOST * OUTS];
    const int64_t in = m->in, span = FN(in_halves)(rows) ? SPAN : in;
    for (int64_t from = 0; from < in; from += span) {
        const int64_t to = from + span < in ? from + span : in;
        for (int i = 0; i < TURNS; i++) {
            FN(wide) *mine = sums[LANES == 8 ? i : 0];
            FN(sum_up)(format, rows, m, FN(turn)(w, i), x, x_step, from, to, from > 0, FN(soon)(w, i, ahead), mine);
            for (int r = 0; to == in && r < rows; r++) folds[r * TURNS + i] = FN(fold)(mine + r * OUTS);
        }
    }
}

/* A function for each format and number of rows, so that each has all registers. */
typedef void (*FN(Dot))(const Matrix *m, const Row *w, const char *x, int64_t x_step, Ahead ahead, FN(vec) *folds);
#define DOT(format, rows)                                                                                              \
    static NOINLINE void FN(dot_##format##_##rows)(const Matrix *m, const Row *w, const char *x, int64_t x_step,       \
                                                   Ahead ahead, FN(vec) *folds) {                                      \
        FN(dot)(format, rows, m, w, x, x_step, ahead, folds);                                                          \
    }
#define DOTS(format) UP_TO_MOST(DOT, format)
MULTIPLIED(DOTS)
#define DOT_NAME(format, rows) FN(dot_##format##_##rows),
#define DOT_NAMES(format) [format] = {UP_TO_MOST(DOT_NAME, format)},
static const FN(Dot) FN(dot_of)[][MOST] = {MULTIPLIED(DOT_NAMES)};

#include "stream.h"

/* A row's weights of inputs [from, to), decoded; `from` begins a block. */
typedef void (*FN(Unpack))(const Matrix *m, Row w, int64_t from, int64_t to, char *decoded);
#define UNPACK(format)                                                                                                 \
    static void FN(unpack_##format)(const Matrix *m, Row w, int64_t from, int64_t to, char *decoded) {                 \
        const int64_t block = forms[format].block;                                                                     \
        for (int64_t k = from; k < to; k += block, decoded += block * input_bytes(format)) {                           \
            uint8_t filler[FILLER];                                                                                    \
            Row at = k + block <= m->in ? FN(at)(format, m, w, k) : FN(filled)(format, m, w, k, filler);               \
            FN(decode_block)(format, at, decoded);                                                                     \
        }                                                                                                              \
    }
COMPUTED(UNPACK)
#define UNPACK_NAME(format) FN(unpack_##format),
static const FN(Unpack) FN(unpack_of)[] = {COMPUTED(UNPACK_NAME)};

/* In how many groups so many rows are multiplied. A few wait for memory most of the time, and less of it where a product
   goes over its weights once, all parts together, while more of them are on the way. */
INLINE int64_t FN(groups_for)(int64_t count) {
    if (LANES == 8 && count <= 8) return count / 3 + 1;
    return (count + MOST - 1) / MOST;
}

/* Up to CHUNK rows of inputs, in the order of the format's blocks and x_step bytes apart, times TILE weight rows. */
static void FN(tile)(const Matrix *m, const Row *w, const float *bias, const char *x, int64_t x_step, int64_t count,
                     Ahead ahead, f32x16 *out, char *decoded) {
    const Matrix dense = {.format = forms[m->format].decoded, .in = padded(m->format, m->in), .in_shift = m->in_shift};
    f32x16 scale = SPLAT(1), term = LOAD(f32x16, bias);
    FN(vec) folds[STREAMED * (TILE / OUTS)];
    Row rows[TILE];
    if (in_int8(m->format))
        for (int n = 0; n < TILE; n++) scale[n] = LOAD(float, w[n].scale);
    if (is_decoded(m, count)) {
        for (int n = 0; n < TILE; n++) {
            char *row = decoded + n * (dense.in * input_bytes(m->format) + APART);
            FN(unpack_of)[m->format](m, w[n], 0, m->in, row);
            rows[n] = (Row){(const uint8_t *)row, w[n].scale};
        }
        m = &dense, w = rows;
    }
    const int streamed = streams(m, count);
    const int64_t groups = streamed ? 1 : FN(groups_for)(count);
    const FN(Dot) *dots = streamed ? FN(streamed)[m->format] : FN(dot_of)[m->format];
    ahead.near = LANES == 16 && groups == 1 && m != &dense;
    for (int64_t g = 0; g < groups; g++) {
        int64_t few = (count + groups - g - 1) / (groups - g);
        dots[few - 1](m, w, x, x_step, FN(share)(ahead, g, groups), folds);
        if (ahead.near && ahead.count && !streamed) FN(fetch_meanwhile)(ahead);
        for (int64_t r = 0; r < few; r++) {
            FN(vec) sums[PARTS];
            for (int p = 0; p < PARTS; p++) sums[p] = FN(unite)(folds + r * (TILE / OUTS) + p * APIECE);
            out[r] = LOAD(f32x16, sums) * scale + term;
        }
        count -= few, x += few * x_step, out += few;
    }
}
