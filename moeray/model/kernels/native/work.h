/* What a forward works on: chunks of rows, tiles of outputs, and where each of them lies in scratch. */
#pragma once
#include "layout.h"

#include <stddef.h>

/* Up to `most_rows` rows of one expert, from row `first` of the call on; from row `at` on in scratch. */
typedef struct {
    const Expert *expert;
    int64_t first, count, at;
} Chunk;

/* How many tiles of a thread's part are taken. */
typedef struct {
    int64_t tiles;
} __attribute__((aligned(64))) Taken;

/* One of a layer's two matrices, and its work: `tiles` tiles of `lanes` outputs for each chunk. */
typedef struct {
    const Matrix *m;
    const Chunk *chunks;
    Taken *taken; /* of each thread */
    int64_t is_up, gated, width, lanes, tiles, count;
} Stage;

/* Some outputs of a chunk's rows, from output `from` on; where it is gated, gates and then as many of up. */
typedef struct {
    const Chunk *chunk;
    int64_t from;
    float bias[MOST_LANES];
    Row w[MOST_LANES];
} Tile;

/* Scratch: inputs and intermediate values in the order of blocks, what each thread decodes, what is taken of both stages,
   and chunks. */
typedef struct {
    char *xs, *hs, *decoded;
    Taken *taken;
    Chunk *chunks;
} Scratch;

/* layer: in the formats that the call computes with. matrix: whether by matrix tiles (amx.h). */
typedef struct {
    Layer layer;
    Scratch scratch;
    const Call *call;
    int64_t matrix;
} Work;

/* Rows that are multiplied at once by matrix tiles: of a chunk, groups of equal size, the last one filled up. */
INLINE int64_t groups_of(int64_t count) { return (count + GROUP - 1) / GROUP; }
INLINE int64_t group_rows(int64_t count) { return (count + groups_of(count) - 1) / groups_of(count); }

/* Matrix tiles multiply pairs faster than the others whole numbers. */
INLINE int multiplies_digits(int64_t instructions) {
    return instructions == AVX512_VNNI || instructions == AVX512_BF16;
}

static int64_t computed_as(const Matrix *m, const Call *call) {
    if (m->format == INT8 && call->x_format == BF16 && multiplies_digits(call->instructions)) return INT8_DIGITS;
    const int64_t paired = forms[m->format].paired;
    const int fits = !scales_sums(paired) || forms[paired].block <= (int64_t)1 << m->in_shift;
    return call->x_format == BF16 && call->instructions >= AVX512_BF16 && fits ? paired : m->format;
}

static Work work_of(const Layer *layer, const Call *call) {
    Work w = {.layer = *layer, .call = call};
    w.layer.up.format = computed_as(&layer->up, call);
    w.layer.down.format = computed_as(&layer->down, call);
    w.matrix = call->instructions >= AMX_BF16 && in_pairs(w.layer.down.format) &&
               (!layer->up.out || in_pairs(w.layer.up.format));
    return w;
}

static int64_t lanes_of(const Work *w) { return w->matrix ? MOST_LANES : TILE; }

/* Bytes of a packed row of inputs, and from one to the next. */
static int64_t packed_bytes(const Matrix *m) { return padded(m->format, m->in) * input_bytes(m->format); }
static int64_t step_of(const Matrix *m) {
    return packed_bytes(m) + (in_digits(m->format) ? (int64_t)sizeof(Digits) : 0) + APART;
}

/* Rows of an expert that are computed at once, at most. */
static int64_t most_rows(const Work *w) {
    if (!w->matrix) return CHUNK;
    const int64_t bytes = 2 * (w->layer.up.out ? w->layer.up.in : w->layer.down.in);
    const int64_t rows = (NEAR - 3 * MOST_LANES * bytes) / bytes / GROUP * GROUP;
    return rows < CHUNK ? CHUNK : rows > MOST_ROWS ? MOST_ROWS : rows;
}

/* What a thread needs for decoded weights of either matrix, where an expert may have so many rows. */
static int64_t decoded_bytes(const Work *w, int64_t rows) {
    const Matrix *up = &w->layer.up, *down = &w->layer.down;
    int64_t for_up = w->matrix || is_decoded(up, rows) ? step_of(up) : 0;
    int64_t for_down = w->matrix || is_decoded(down, rows) ? step_of(down) : 0;
    return lanes_of(w) * (for_up > for_down ? for_up : for_down);
}

/* Lays scratch out from `at` on; the end. */
static char *lay_out(Work *w, int64_t rows, int64_t experts, char *at) {
    Scratch *s = &w->scratch;
    const Layer *layer = &w->layer;
    const int64_t most = most_rows(w), chunks = rows / most + experts;
    const int64_t held = rows + (w->matrix ? chunks * (groups_of(most) - 1) : 0);
    s->xs = at;
    s->hs = s->xs + (layer->up.out ? held * step_of(&layer->up) : 0);
    s->decoded = s->hs + held * step_of(&layer->down);
    s->taken = (Taken *)(s->decoded + w->call->threads * decoded_bytes(w, rows));
    s->chunks = (Chunk *)(s->taken + 2 * w->call->threads);
    return (char *)(s->chunks + chunks);
}

/* Each expert's rows in as few chunks as can be, of about equal size. */
static int64_t chunk_up(const Work *w, const Expert *const *experts, const int64_t *counts, int64_t count) {
    const int64_t most = most_rows(w);
    int64_t made = 0, first = 0, at = 0;
    for (int64_t e = 0; e < count; e++) {
        int64_t left = counts[e];
        for (int64_t parts = (left + most - 1) / most; parts > 0; parts--) {
            const int64_t even = ((left + parts - 1) / parts + GROUP - 1) / GROUP * GROUP, n = even < left ? even : left;
            w->scratch.chunks[made++] = (Chunk){experts[e], first, n, at};
            at += w->matrix ? groups_of(n) * group_rows(n) : n;
            first += n, left -= n;
        }
    }
    return made;
}

static Stage stage_of(const Work *w, int is_up, int64_t chunks) {
    const Layer *layer = &w->layer;
    const int64_t gated = is_up && layer->gated, lanes = gated ? lanes_of(w) / 2 : lanes_of(w);
    const int64_t width = is_up ? layer->down.in : layer->down.out, tiles = (width + lanes - 1) / lanes;
    const Matrix *m = is_up ? &layer->up : &layer->down;
    Taken *taken = memset(w->scratch.taken + (is_up ? 0 : w->call->threads), 0, w->call->threads * sizeof(Taken));
    return (Stage){m, w->scratch.chunks, taken, is_up, gated, width, lanes, tiles, chunks * tiles};
}

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
    take(s, s->is_up ? &expert->up : &expert->down, t->from, s->gated ? s->lanes : 0, t);
}

/* How many outputs of the tile there are. */
static int64_t left_of(const Stage *s, const Tile *t) {
    return s->width - t->from < s->lanes ? s->width - t->from : s->lanes;
}

/* The bytes of x that are row r of the call. */
static const char *row_of(const Work *w, int64_t r) {
    const int64_t in = w->layer.up.out ? w->layer.up.in : w->layer.down.in, from = w->call->rows ? w->call->rows[r] : r;
    return (const char *)w->call->x + bytes_of(w->call->x_format, from * in);
}
