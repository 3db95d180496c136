/* Products by matrix tiles (Intel AMX), of weights that have a format in pairs; see body.h for the others.

   A product's left side are 16 outputs' weights as they are stored, or decoded beside one another. Its right side is a
   group of up to 16 rows of inputs, transposed: the first pair of inputs of one row after another, then the next pair.
   So the result has an output's sums of all rows in a line. Two such lines, activated and put side by side as BF16, are
   again what the next product wants on its right.

   A sum adds 32 products at a time in the CPU's own way, in the order of the inputs, whatever stands beside its row. */

#define FN(name) name##_avx512_bf16

/* Tiles: of sums (2 times 16 outputs, 2 groups), of weights, and of inputs. Instructions take their numbers as such. */
#define SUMS_00 0
#define SUMS_01 1
#define SUMS_10 2
#define SUMS_11 3
#define WEIGHTS_0 4
#define WEIGHTS_1 5
#define INPUTS_0 6
#define INPUTS_1 7

/* The shapes of tiles, as the CPU reads them. */
typedef struct {
    uint8_t palette, start, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} __attribute__((packed)) Shapes;

/* For groups of so many rows. */
static void shape_tiles(int64_t rows) {
    Shapes shapes = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        shapes.rows[i] = 16;
        shapes.row_bytes[i] = i == WEIGHTS_0 || i == WEIGHTS_1 ? 64 : 4 * rows;
    }
    __asm__ volatile("ldtilecfg %0" : : "m"(shapes)); /* the intrinsic names but the first of these bytes */
}

/* Gives the thread's tiles back, so that they need not be kept for it when it leaves the core. */
static void release_tiles(void) { _tile_release(); }

/* Whether this CPU has them, and Linux lets this process use them, for which it wants to be asked once. */
static int tiles_are_there;

__attribute__((constructor)) static void ask_for_tiles(void) {
    enum { ASK = 0x1023, TILE_DATA = 18 }; /* ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA */
    uint32_t eax, ebx, ecx, edx;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || !(edx >> 22 & 1) || !(edx >> 24 & 1)) return;
    tiles_are_there = syscall(SYS_arch_prctl, ASK, TILE_DATA) == 0;
}

/* 16 outputs' weights as BF16, `step` bytes apart; data: those of input 0. */
typedef struct {
    const char *data;
    int64_t step;
} Side;

/* Twice 16 outputs' weights, and where they are decoded: all, or by `spans` of so many inputs as they are multiplied. */
typedef struct {
    const Matrix *m;
    const Row *w;
    char *decoded;
    int64_t spans;
    Side sides[2];
} Weights;

/* Sums of 2 times 16 outputs and 2 groups of rows. */
typedef struct {
    f32x16 of[2][2][16];
} Sums;

/* -- products ------------------------------------------------------------------------------------------------------ */

INLINE void begin_sums(const int groups) {
    _tile_zero(SUMS_00);
    _tile_zero(SUMS_10);
    if (groups == 1) return;
    _tile_zero(SUMS_01);
    _tile_zero(SUMS_11);
}

INLINE void end_sums(const int groups, Sums *sums) {
    _tile_stored(SUMS_00, sums->of[0][0], 64);
    _tile_stored(SUMS_10, sums->of[1][0], 64);
    if (groups == 1) return;
    _tile_stored(SUMS_01, sums->of[0][1], 64);
    _tile_stored(SUMS_11, sums->of[1][1], 64);
}

/* The products of inputs [from, to), of one group or of two. b: their inputs; pair: bytes of one pair of all rows. */
INLINE void add_products(const int groups, const Side *a, const char *const *b, int64_t pair, int64_t from, int64_t to,
                         Ahead ahead) {
    for (int64_t k = from; k < to; k += 32) {
        _tile_loadd(WEIGHTS_0, a[0].data + 2 * k, a[0].step);
        _tile_loadd(INPUTS_0, b[0] + k / 2 * pair, pair);
        _tile_dpbf16ps(SUMS_00, WEIGHTS_0, INPUTS_0);
        _tile_loadd(WEIGHTS_1, a[1].data + 2 * k, a[1].step);
        _tile_dpbf16ps(SUMS_10, WEIGHTS_1, INPUTS_0);
        if (groups == 2) {
            _tile_loadd(INPUTS_1, b[1] + k / 2 * pair, pair);
            _tile_dpbf16ps(SUMS_01, WEIGHTS_0, INPUTS_1);
            _tile_dpbf16ps(SUMS_11, WEIGHTS_1, INPUTS_1);
        }
        const int64_t byte = (k >> 4) * ahead.pace;
        if (byte % 64 == 0 && byte < ahead.bytes)
            _Pragma("GCC unroll 4") for (int64_t i = 0; i < ahead.count; i++)
                __builtin_prefetch(ahead.rows[i].data + byte, 0, 2);
    }
}

static void decode_span(Weights *l, int64_t from, int64_t to) {
    const int64_t step = 2 * (to - from) + APART;
    for (int o = 0; o < MOST_LANES; o++) FN(unpack_of)[l->m->format](l->m, l->w[o], from, to, l->decoded + o * step);
    for (int h = 0; h < 2; h++) l->sides[h] = (Side){l->decoded + 16 * h * step - 2 * from, step};
    __asm__ volatile("" : : : "memory"); /* loads of tiles do not say what they read */
}

/* Scaled, and added to the others. */
INLINE void add_scaled(const int groups, const Weights *l, int64_t k, const Sums *part, Sums *sums) {
    for (int h = 0; h < 2; h++)
        for (int o = 0; o < 16; o++) {
            const float scale = LOAD(float, FN(at)(l->m->format, l->m, l->w[16 * h + o], k).scale);
            for (int g = 0; g < groups; g++) sums->of[h][g][o] += part->of[h][g][o] * scale;
        }
}

/* Over all inputs; those that share scales by themselves. */
INLINE void multiply(const int groups, Weights *l, const char *const *b, int64_t pair, Ahead ahead, Sums *sums) {
    const int64_t end = padded(l->m->format, l->m->in), scaled = scales_sums(l->m->format);
    const int64_t span = scaled ? (int64_t)1 << l->m->in_shift : l->spans ? l->spans : end;
    Sums part = {0};
    if (scaled) memset(sums, 0, sizeof *sums);
    for (int64_t k = 0; k < end; k += span) {
        const int64_t to = k + span < end ? k + span : end;
        if (l->spans) decode_span(l, k, to);
        if (k == 0 || scaled) begin_sums(groups);
        add_products(groups, l->sides, b, pair, k, to, ahead);
        if (!scaled) continue;
        end_sums(groups, &part);
        add_scaled(groups, l, k, &part, sums);
    }
    if (!scaled) end_sums(groups, sums);
}

/* Whether 16 outputs' weights can be read where they lie: BF16, equally far apart, and filling their last tile. */
static int lie_well(const Matrix *m, const Row *w) {
    return m->format == PAIRS && m->in % 32 == 0 && w[15].data - w[0].data == 15 * (w[1].data - w[0].data);
}

/* The weights of a tile for so many groups of rows. What must be decoded is for one pass by spans, which stay in the
   nearest cache; for more at once. */
static Weights weights_of(const Matrix *m, const Tile *t, int64_t groups, char *decoded) {
    enum { SPAN = 256 };
    Weights l = {.m = m, .w = t->w, .decoded = decoded};
    if (lie_well(m, t->w) && lie_well(m, t->w + 16))
        for (int h = 0; h < 2; h++)
            l.sides[h] = (Side){(const char *)t->w[16 * h].data, t->w[16 * h + 1].data - t->w[16 * h].data};
    else if (groups <= 2)
        l.spans = SPAN;
    else
        decode_span(&l, 0, padded(m->format, m->in));
    return l;
}

/* -- inputs and outputs -------------------------------------------------------------------------------------------- */

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

/* -- a tile of a layer --------------------------------------------------------------------------------------------- */

/* `shaped`: the rows of a group that this thread's tiles are shaped for. */
static void compute_tiles(const Work *w, const Stage *s, const Tile *t, Ahead ahead, char *decoded, int64_t *shaped) {
    const Matrix *m = s->m;
    const Chunk *chunk = t->chunk;
    const int64_t groups = groups_of(chunk->count), rows = group_rows(chunk->count), turns = (groups + 1) / 2;
    const int64_t step = step_of(m), next_step = step_of(&w->layer.down);
    const int64_t y_step = bytes_of(w->call->y_format, s->width);
    const char *in = (s->is_up ? w->scratch.xs : w->scratch.hs) + chunk->at * step;
    char *y = (char *)w->call->y + chunk->first * y_step + bytes_of(w->call->y_format, t->from);
    Weights weights = weights_of(m, t, groups, decoded);
    const Expert *e = chunk->expert;
    const int biased = s->is_up ? e->up.bias || e->gate.bias : e->down.bias != NULL;
    Finish finish = {.term = t->bias, .plain = m->format != INT8_PAIRS && !biased};
    for (int o = 0; o < MOST_LANES; o++) finish.scale[o] = m->format == INT8_PAIRS ? LOAD(float, t->w[o].scale) : 1;
    if (*shaped != rows) shape_tiles(*shaped = rows);
    Sums sums = {0}; /* also of rows that are not there */
    for (int64_t g = 0; g < groups; g += 2) {
        const char *b[2] = {in + g * rows * step, in + (g + 1) * rows * step};
        const Ahead share = FN(share)(ahead, g / 2, turns);
        if (g + 1 < groups)
            multiply(2, &weights, b, 4 * rows, share, &sums);
        else
            multiply(1, &weights, b, 4 * rows, share, &sums);
        for (int64_t i = g; i < g + 2 && i < groups; i++) {
            const int64_t there = chunk->count - i * rows < rows ? chunk->count - i * rows : rows;
            if (s->is_up)
                put_up_tiles(w, s, t, &sums, &finish, i & 1, rows, w->scratch.hs + (chunk->at + i * rows) * next_step);
            else
                put_down_tiles(w, s, t, &sums, &finish, i & 1, there, y + i * rows * y_step);
        }
    }
}

/* As FN(multiply): the operations of so many products of four sums each. */
static int64_t multiply_zeros(int64_t times) {
    shape_tiles(GROUP);
    _tile_zero(WEIGHTS_0);
    _tile_zero(WEIGHTS_1);
    _tile_zero(INPUTS_0);
    _tile_zero(INPUTS_1);
    for (int64_t t = 0; t < times; t++) {
        _tile_dpbf16ps(SUMS_00, WEIGHTS_0, INPUTS_0);
        _tile_dpbf16ps(SUMS_01, WEIGHTS_0, INPUTS_1);
        _tile_dpbf16ps(SUMS_10, WEIGHTS_1, INPUTS_0);
        _tile_dpbf16ps(SUMS_11, WEIGHTS_1, INPUTS_1);
    }
    _tile_release();
    return times * 4 * 16 * 16 * 32 * 2;
}

#undef FN
