/* What kernels do with vectors of LANES numbers, 16 of which are a `wide`; included once for each instruction set, with FN,
   LANES and OUTS (how many sums are folded at once) defined. Of wider vectors than a CPU has, compilers compare, shuffle
   and convert number by number. */

#define PARTS (16 / LANES)
#define APIECE (LANES / OUTS) /* products for a vector of outputs */

typedef float FN(vec) __attribute__((vector_size(4 * LANES)));
typedef int32_t FN(ivec) __attribute__((vector_size(4 * LANES)));
typedef uint32_t FN(uvec) __attribute__((vector_size(4 * LANES)));
typedef uint16_t FN(u16vec) __attribute__((vector_size(2 * LANES)));
typedef int16_t FN(i16vec) __attribute__((vector_size(2 * LANES)));
typedef int8_t FN(i8vec) __attribute__((vector_size(LANES)));

/* 16 lanes. */
typedef struct {
    FN(vec) part[PARTS];
} FN(wide);

/* The number of each lane. */
INLINE FN(ivec) FN(lanes)(void) {
#if LANES == 16
    return (FN(ivec)){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#elif LANES == 8
    return (FN(ivec)){0, 1, 2, 3, 4, 5, 6, 7};
#else
    return (FN(ivec)){0, 1, 2, 3};
#endif
}

INLINE FN(vec) FN(splat)(float value) { return (FN(vec)){0} + value; }

/* -- memory -------------------------------------------------------------------------------------------------------- */

/* Values (F32 or BF16) from number k on. Compilers do not make the instructions that are named of the last line. */
INLINE FN(vec) FN(load)(int64_t format, const void *x, int64_t k) {
    if (format == F32) return LOAD(FN(vec), (const float *)x + k);
#if defined(__AVX512F__)
    return (FN(vec))_mm512_slli_epi32(_mm512_cvtepu16_epi32(LOAD(__m256i, (const uint16_t *)x + k)), 16);
#elif defined(__AVX2__)
    return (FN(vec))_mm256_slli_epi32(_mm256_cvtepu16_epi32(LOAD(__m128i, (const uint16_t *)x + k)), 16);
#else
    return (FN(vec))(__builtin_convertvector(LOAD(FN(u16vec), (const uint16_t *)x + k), FN(uvec)) << 16);
#endif
}

/* To BF16, rounded to nearest even, in the lower halves. */
INLINE FN(uvec) FN(rounded)(FN(vec) v) {
    FN(uvec) bits = (FN(uvec))v, nan = (FN(uvec))(v != v);
    bits += (0x7fff + (bits >> 16 & 1)) & ~nan;
    return bits >> 16 | (nan & 0x40);
}

/* The first `count` lanes to outputs (F32 or BF16) from `at` on. */
INLINE void FN(store)(int64_t format, void *y, int64_t at, FN(vec) v, int64_t count) {
    if (format == F32) {
        memcpy((float *)y + at, &v, 4 * count);
        return;
    }
#if defined(__AVX2__) && !defined(__AVX512F__)
    const __m256i words = (__m256i)FN(rounded)(v);
    const __m128i narrow = _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
#else
    const FN(u16vec) narrow = __builtin_convertvector(FN(rounded)(v), FN(u16vec));
#endif
    memcpy((uint16_t *)y + at, &narrow, 2 * count);
}

/* -- functions ----------------------------------------------------------------------------------------------------- */

INLINE FN(vec) FN(least)(FN(vec) a, FN(vec) b) {
    const FN(ivec) more = a > b;
    return (FN(vec))(((FN(ivec))b & more) | ((FN(ivec))a & ~more));
}

INLINE FN(vec) FN(most)(FN(vec) a, FN(vec) b) { return -FN(least)(-a, -b); }

/* The largest lane, on every lane. */
INLINE FN(vec) FN(largest)(FN(vec) v) {
#if LANES == 16
    v = FN(most)(v, __builtin_shuffle(v, FN(lanes)() ^ 8));
#endif
#if LANES >= 8
    v = FN(most)(v, __builtin_shuffle(v, FN(lanes)() ^ 4));
#endif
    v = FN(most)(v, __builtin_shuffle(v, FN(lanes)() ^ 2));
    return FN(most)(v, __builtin_shuffle(v, FN(lanes)() ^ 1));
}

/* e^x to 1 unit in the last place or so for |x| <= 87; beyond it stays there. Taylor on |r| <= ln 2 / 2. */
INLINE FN(vec) FN(exponential)(FN(vec) x) {
    x = FN(most)(FN(least)(x, FN(splat)(87)), FN(splat)(-87));
    FN(vec) rounded = x * 0x1.715476p0f + 0x1.8p23f;
    FN(vec) n = rounded - 0x1.8p23f;
    FN(vec) r = x - n * 0x1.62e400p-1f - n * 0x1.7f7d1cp-20f;
    FN(vec) p = FN(splat)(1.0f / 5040);
    const float coefficients[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1, 1};
    for (int i = 0; i < 7; i++) p = p * r + coefficients[i];
    return p * (FN(vec))(((FN(ivec))rounded << 23) + 0x3f800000);
}

/* -- sums ---------------------------------------------------------------------------------------------------------- */

/* Two vectors' halves, quarters, ... added at once: what is left of both lies side by side. */
#define MERGE(a, b, low, high)                                                                                         \
    (__builtin_shuffle(a, b, (FN(ivec))LANES_OF low) + __builtin_shuffle(a, b, (FN(ivec))LANES_OF high))
#define LANES_OF(...) {__VA_ARGS__}

/* Of OUTS sums the parts, then halves, then quarters, ..., added until they share one vector, in order. */
INLINE FN(vec) FN(fold)(FN(wide) *sums) {
    FN(vec) s[OUTS];
    for (int n = 0; n < OUTS; n++) {
        for (int left = PARTS / 2; left; left /= 2)
            for (int p = 0; p < left; p++) sums[n].part[p] += sums[n].part[p + left];
        s[n] = sums[n].part[0];
    }
#if LANES == 16
    for (int i = 0; i < 2; i++)
        s[i] = MERGE(s[i], s[i + 2], (0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
                     (8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31));
    return MERGE(s[0], s[1], (0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27),
                 (4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31));
#elif LANES == 8
    return MERGE(s[0], s[1], (0, 1, 2, 3, 8, 9, 10, 11), (4, 5, 6, 7, 12, 13, 14, 15));
#else
    return MERGE(s[0], s[1], (0, 1, 4, 5), (2, 3, 6, 7));
#endif
}

/* Of APIECE folds what is left added: the sum of fold i's n-th in lane i + n * APIECE. */
INLINE FN(vec) FN(unite)(const FN(vec) *folds) {
#if LANES == 16
    FN(vec) s[2];
    for (int i = 0; i < 2; i++)
        s[i] = MERGE(folds[i], folds[i + 2], (0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29),
                     (2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31));
    return MERGE(s[0], s[1], (0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30),
                 (1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31));
#elif LANES == 8
    FN(vec) s[2];
    for (int i = 0; i < 2; i++)
        s[i] = MERGE(folds[i], folds[i + 2], (0, 1, 8, 9, 4, 5, 12, 13), (2, 3, 10, 11, 6, 7, 14, 15));
    return MERGE(s[0], s[1], (0, 8, 2, 10, 4, 12, 6, 14), (1, 9, 3, 11, 5, 13, 7, 15));
#else
    return MERGE(folds[0], folds[1], (0, 4, 2, 6), (1, 5, 3, 7));
#endif
}
