/* Products by matrix tiles (Intel AMX), of weights that have a format in pairs; see body.h for the others.

   A product's left side are 16 outputs' weights as they are stored, or decoded beside one another. Its right side is a
   group of up to 16 rows of inputs, transposed: the first pair of inputs of one row after another, then the next pair.
   So the result has an output's sums of all rows in a line. Two such lines, activated and put side by side as BF16, are
   again what the next product wants on its right.

   A sum adds 32 products at a time in the CPU's own way, in the order of the inputs, whatever stands beside its row. */

#define FN(name) name##_avx512_bf16

#include "amx_products.h"
#include "amx_rows.h"

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
