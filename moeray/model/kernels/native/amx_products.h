/* Products by matrix tiles: the weights' side, decoded where it must be, times the inputs'. Part of amx.h. */

/* Tiles: of sums (2 times 16 outputs, 2 groups), of weights, and of inputs. Instructions take their numbers as such. */
#define SUMS_00 0
#define SUMS_01 1
#define SUMS_10 2
#define SUMS_11 3
#define WEIGHTS_0 4
#define WEIGHTS_1 5
#define INPUTS_0 6
#define INPUTS_1 7

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
                __builtin_prefetch(ahead.rows[i * ahead.step].data + byte, 0, 2);
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
    Sums part;
    if (scaled) {
        memset(&part, 0, sizeof part); /* also of rows that are not there */
        memset(sums, 0, sizeof *sums);
    }
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

/* Whether 16 outputs' weights can be read where they lie: BF16, equally far apart, and filling their last tile. Rows that
   straddle lines of the cache are read slower, so for many groups they are copied too. */
static int lie_well(const Matrix *m, const Row *w, int64_t groups) {
    return m->format == PAIRS && m->in % 32 == 0 && w[15].data - w[0].data == 15 * (w[1].data - w[0].data) &&
           (groups < PANEL_ROWS / GROUP || (uintptr_t)w[0].data % 64 == 0);
}

/* The weights of a tile for so many groups of rows. What must be decoded is for one pass by spans, which stay in the
   nearest cache; for more at once. */
static Weights weights_of(const Matrix *m, const Tile *t, int64_t groups, char *decoded) {
    enum { SPAN = 256 };
    Weights l = {.m = m, .w = t->w, .decoded = decoded};
    if (lie_well(m, t->w, groups) && lie_well(m, t->w + 16, groups))
        for (int h = 0; h < 2; h++)
            l.sides[h] = (Side){(const char *)t->w[16 * h].data, t->w[16 * h + 1].data - t->w[16 * h].data};
    else if (groups <= 2)
        l.spans = SPAN;
    else
        decode_span(&l, 0, padded(m->format, m->in));
    return l;
}
