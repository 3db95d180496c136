/* Rows as matrix tiles want them and leave them: inputs transposed, sums finished, activated and put. Part of amx.h. */

/* Lane j of vector i becomes lane i of vector j. */
static void transpose(__m512i *v) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            b[i + 2 * j] = _mm512_unpacklo_epi64(a[i + j], a[i + j + 2]);
            b[i + 2 * j + 1] = _mm512_unpackhi_epi64(a[i + j], a[i + j + 2]);
        }
    for (int j = 0; j < 4; j++) {
        const __m512i even = _mm512_shuffle_i32x4(b[j], b[4 + j], 0x88);
        const __m512i odd = _mm512_shuffle_i32x4(b[j], b[4 + j], 0xdd);
        const __m512i even_too = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0x88);
        const __m512i odd_too = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0xdd);
        v[j] = _mm512_shuffle_i32x4(even, even_too, 0x88);
        v[4 + j] = _mm512_shuffle_i32x4(odd, odd_too, 0x88);
        v[8 + j] = _mm512_shuffle_i32x4(even, even_too, 0xdd);
        v[12 + j] = _mm512_shuffle_i32x4(odd, odd_too, 0xdd);
    }
}

INLINE __mmask16 lanes(int64_t count) { return (__mmask16)((1 << count) - 1); }

/* Group g of a chunk's inputs. What will be the next product's is filled up with zeros, since it may not be filled. */
static void pack_group(const Work *w, const Chunk *chunk, int64_t g) {
    const Layer *layer = &w->layer;
    const Matrix *first = layer->up.out ? &layer->up : &layer->down;
    const int64_t rows = group_rows(chunk->count), at = chunk->at + g * rows, end = padded(first->format, first->in);
    const int64_t there = chunk->count - g * rows < rows ? chunk->count - g * rows : rows;
    char *to = w->scratch.xs + at * step_of(first);
    __m512i blocks[2][16] = {{{0}}};
    for (int64_t k = 0; k < end; k += 64) {
        for (int64_t r = 0; r < there; r++) {
            __m512i block[2];
            FN(pack_block)(first, (const uint16_t *)row_of(w, chunk->first + g * rows + r), k, block);
            blocks[0][r] = block[0], blocks[1][r] = block[1];
        }
        for (int64_t i = 0; i < 2 && k + 32 * i < end; i++, to += 64 * rows) {
            if (rows == 1) {
                memcpy(to, blocks[i], 64);
                continue;
            }
            __m512i pairs[16];
            memcpy(pairs, blocks[i], sizeof pairs);
            transpose(pairs);
            for (int p = 0; p < 16; p++) _mm512_mask_storeu_epi32(to + 4 * rows * p, lanes(rows), pairs[p]);
        }
    }
    if (!layer->up.out) return;
    const int64_t block = 2 * rows * forms[layer->down.format].block;
    char *next = w->scratch.hs + at * step_of(&layer->down);
    memset(next + 2 * rows * padded(layer->down.format, layer->down.in) - block, 0, block);
}

/* Both as BF16 on a lane. What is below 2^-126 becomes 0. */
INLINE __m512i beside(f32x16 low, f32x16 high) {
    const __m512i in_turns = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, //
                                              23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(in_turns, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
}

/* What belongs to each output of a tile, beside its sums; `plain`: nothing does. */
typedef struct {
    float scale[MOST_LANES];
    const float *term;
    int plain;
} Finish;

INLINE f32x16 finished(const Sums *sums, const Finish *f, int h, int g, int o) {
    const f32x16 sum = sums->of[h][g][o];
    return f->plain ? sum : sum * f->scale[16 * h + o] + f->term[16 * h + o];
}

/* As FN(activated), to a few digits more than the BF16 that it becomes: e^z by Taylor on |r| <= ln 2 / 2, and a
   reciprocal whose digits one step of Newton's doubles. Of two numbers that are compared NaN is the second: it stays. */
INLINE f32x16 activated(const Activation *a, int gated, f32x16 gate, f32x16 up) {
    const __m512 limit = _mm512_set1_ps(a->limit), one = _mm512_set1_ps(1), g = _mm512_min_ps(limit, (__m512)gate);
    __m512 z = g * _mm512_set1_ps(-a->alpha);
    if (a->cubic) z *= _mm512_min_ps(_mm512_set1_ps(1e30f), g * g) * _mm512_set1_ps(a->cubic) + one;
    z = _mm512_max_ps(_mm512_set1_ps(-87), _mm512_min_ps(_mm512_set1_ps(87), z));
    const __m512 n = _mm512_roundscale_ps(z * _mm512_set1_ps(0x1.715476p0f), 0);
    const __m512 r = z - n * _mm512_set1_ps(0x1.62e430p-1f);
    const float coefficients[] = {1.0f / 24, 1.0f / 6, 0.5f, 1, 1};
    __m512 p = _mm512_set1_ps(1.0f / 120);
    for (int i = 0; i < 5; i++) p = p * r + _mm512_set1_ps(coefficients[i]);
    const __m512 below = _mm512_scalef_ps(p, n) + one, near = _mm512_rcp14_ps(below);
    const __m512 y = g * (near * (_mm512_set1_ps(2) - below * near));
    if (!gated) return (f32x16)y;
    const __m512 u = _mm512_max_ps(_mm512_set1_ps(-a->limit), _mm512_min_ps(limit, (__m512)up));
    return (f32x16)(y * (u + _mm512_set1_ps(a->shift)));
}

/* Activated outputs [from, from + count) of a group of `rows` to where the next product finds them. */
static void put_pairs(int64_t format, const f32x16 *y, int64_t from, int64_t count, int64_t rows, char *group) {
    const int64_t other = format == MXFP4_PAIRS ? 4 : 1; /* place_of: so far is the one that is paired with it */
    for (int64_t n = 0; n < count; n++) {
        const int64_t place = place_of(format, from + n);
        if (place & 1) continue;
        const __m512i pair = beside(y[n], n + other < count ? y[n + other] : SPLAT(0));
        _mm512_mask_storeu_epi32(group + 2 * rows * place, lanes(rows), pair);
    }
}

/* Outputs of group g, from `from` on, activated, for the next product. */
static void put_up_tiles(const Work *w, const Stage *s, const Tile *t, const Sums *sums, const Finish *f, int g,
                         int64_t rows, char *group) {
    const int64_t left = left_of(s, t);
    const Activation *a = &w->layer.activation;
    for (int h = 0; h < (s->gated ? 1 : 2) && 16 * h < left; h++) {
        f32x16 y[16];
        for (int o = 0; o < 16; o++)
            y[o] = activated(a, (int)s->gated, finished(sums, f, h, g, o), finished(sums, f, 1, g, o));
        put_pairs(w->layer.down.format, y, t->from + 16 * h, left - 16 * h < 16 ? left - 16 * h : 16, rows, group);
    }
}

/* Outputs of group g to the `rows` rows of y that follow `to`. */
static void put_down_tiles(const Work *w, const Stage *s, const Tile *t, const Sums *sums, const Finish *f, int g,
                           int64_t rows, char *to) {
    const int64_t format = w->call->y_format, left = left_of(s, t);
    __m512i v[2][16];
    if (format == BF16) {
        for (int o = 0; o < 32; o += 2)
            v[0][o / 2] = beside(finished(sums, f, o / 16, g, o % 16), finished(sums, f, o / 16, g, o % 16 + 1));
        transpose(v[0]);
    } else {
        for (int h = 0; h < 2; h++) {
            for (int o = 0; o < 16; o++) v[h][o] = (__m512i)finished(sums, f, h, g, o);
            transpose(v[h]);
        }
    }
    for (int64_t r = 0; r < rows; r++, to += bytes_of(format, s->width)) {
        if (format == BF16)
            _mm512_mask_storeu_epi16(to, left < 32 ? ((__mmask32)1 << left) - 1 : ~(__mmask32)0, v[0][r]);
        else
            for (int h = 0; h < 2 && 16 * h < left; h++)
                _mm512_mask_storeu_epi32(to + 64 * h, lanes(left - 16 * h < 16 ? left - 16 * h : 16), v[h][r]);
    }
}
