/* What kernels do with vectors of 16; included once for each instruction set, with FN defined. */

INLINE f32x16 FN(load)(int64_t format, const void *x, int64_t k) {
    if (format == F32) return LOAD(f32x16, (const float *)x + k);
#if defined(__AVX512F__) /* which compilers do not make of the lines below */
    return (f32x16)_mm512_slli_epi32(_mm512_cvtepu16_epi32(LOAD(__m256i, (const uint16_t *)x + k)), 16);
#endif
    return (f32x16)(__builtin_convertvector(LOAD(u16x16, (const uint16_t *)x + k), u32x16) << 16);
}

/* To BF16, rounded to nearest even, in the lower halves. */
INLINE u32x16 FN(rounded)(f32x16 v) {
    u32x16 bits = (u32x16)v, nan = (u32x16)(v != v);
    bits += (0x7fff + (bits >> 16 & 1)) & ~nan;
    return bits >> 16 | (nan & 0x40);
}

/* The first `count` lanes to outputs (F32 or BF16) from `at` on. */
INLINE void FN(store)(int64_t format, void *y, int64_t at, const f32x16 *v, int64_t count) {
    if (format == F32) {
        memcpy((float *)y + at, v, 4 * count);
        return;
    }
    u16x16 rounded = __builtin_convertvector(FN(rounded)(*v), u16x16);
    memcpy((uint16_t *)y + at, &rounded, 2 * count);
}

INLINE f32x16 FN(least)(f32x16 a, f32x16 b) {
    i32x16 more = a > b;
    return (f32x16)(((i32x16)b & more) | ((i32x16)a & ~more));
}

/* e^x to 1 unit in the last place or so for |x| <= 87; beyond it stays there. Taylor on |r| <= ln 2 / 2. */
INLINE f32x16 FN(exponential)(f32x16 x) {
    x = -FN(least)(-FN(least)(x, SPLAT(87)), SPLAT(87));
    f32x16 rounded = x * 0x1.715476p0f + 0x1.8p23f;
    f32x16 n = rounded - 0x1.8p23f;
    f32x16 r = x - n * 0x1.62e400p-1f - n * 0x1.7f7d1cp-20f;
    f32x16 p = SPLAT(1.0f / 5040);
    const float coefficients[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1, 1};
    for (int i = 0; i < 7; i++) p = p * r + coefficients[i];
    return p * (f32x16)(((i32x16)rounded << 23) + 0x3f800000);
}

/* Of 16 vectors the sums, in order: halves that belong to two vectors are added at once, then quarters, ... */
INLINE f32x16 FN(sums_of)(const f32x16 *v) {
    f32x16 s[16];
    for (int i = 0; i < 8; i++)
        s[i] = __builtin_shuffle(v[i], v[i + 8], (i32x16){0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23}) +
               __builtin_shuffle(v[i], v[i + 8], (i32x16){8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31});
    for (int i = 0; i < 4; i++)
        s[i] = __builtin_shuffle(s[i], s[i + 4], (i32x16){0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27}) +
               __builtin_shuffle(s[i], s[i + 4], (i32x16){4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31});
    for (int i = 0; i < 2; i++)
        s[i] = __builtin_shuffle(s[i], s[i + 2], (i32x16){0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29}) +
               __builtin_shuffle(s[i], s[i + 2], (i32x16){2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31});
    return __builtin_shuffle(s[0], s[1], (i32x16){0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30}) +
           __builtin_shuffle(s[0], s[1], (i32x16){1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31});
}
