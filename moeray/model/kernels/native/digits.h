/* Products of INT8 weights in whole numbers, for CPUs that multiply bytes four at a time (AVX512-VNNI); included by
   body.h, with FN defined.

   A row of inputs becomes whole multiples of a unit of its own, a power of two, that fit two digits of a signed byte
   each: x = unit (256 high + low), the largest of at least 2^14 - 64 units. So a BF16 input is exact unless it is smaller
   than 2^-7 of the row's largest, and then off by 2^-15 of that at most, where the weights themselves are off by 2^-8; or
   where that unit would be below 2^-126, which is the smallest. Sums are whole numbers, in any order the same, and nothing
   is decoded.

   The instruction wants one side without a sign: weights + 128. What that adds to a sum is known from the row alone, and
   taken off between its digits. A sum may have any 32 bits meanwhile; in the end it fits them. */

/* 32 inputs of a row of BF16, from k on. */
INLINE __m512i FN(inputs)(const Matrix *m, const uint16_t *x, int64_t k) {
    const int64_t left = m->in - k;
    return _mm512_maskz_loadu_epi16(left < 32 ? ((__mmask32)1 << (left > 0 ? left : 0)) - 1 : ~(__mmask32)0, x + k);
}

/* 16 BF16 in units, to nearest. */
INLINE __m512i FN(in_units)(__m256i x, __m512 per_unit) {
    return _mm512_cvtps_epi32((__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16) * per_unit);
}

/* The exponent, as a float stores it, of a row's unit: its largest magnitude is 2^15 - 256 of them at most, and less where
   a part of a sum takes more than FIT / 16 products. -1 where it has numbers that are not finite. */
INLINE int64_t FN(unit_of)(const Matrix *m, const uint16_t *x) {
    __m512i most = _mm512_setzero_si512();
    for (int64_t k = 0; k < m->in; k += 32)
        most = _mm512_max_epu16(most, _mm512_and_si512(FN(inputs)(m, x, k), _mm512_set1_epi16(0x7fff)));
    const __m256i half = _mm256_max_epu16(_mm512_castsi512_si256(most), _mm512_extracti64x4_epi64(most, 1));
    const int64_t largest = (int64_t)_mm512_reduce_max_epu32(_mm512_cvtepu16_epi32(half));
    int64_t exponent = ((largest + 1) >> 7) - 14; /* that of all digits 1 is the next one, lest it take 3 bytes */
    for (int64_t fit = FIT; fit < m->in; fit *= 2) exponent++;
    return largest >= 0x7f80 ? -1 : exponent < 1 ? 1 : exponent;
}

/* A row of BF16 -> for each 64 inputs their high digits, then their low ones, filled up with zeros; then its Digits. Both
   may be the same memory. */
static void FN(pack_digits)(const Matrix *m, const uint16_t *x, char *packed) {
    const int64_t unit = FN(unit_of)(m, x), finite = unit > 0;
    const uint32_t unit_bits = finite ? (uint32_t)unit << 23 : 0x7fc00000, per_unit_bits = (uint32_t)(254 - unit) << 23;
    const __m512 per_unit = _mm512_set1_ps(finite ? LOAD(float, &per_unit_bits) : 0);
    Digits *digits = (Digits *)(packed + 2 * padded(m->format, m->in));
    __m512i high_sum = _mm512_setzero_si512(), low_sum = high_sum;
    for (int64_t k = 0; k < m->in; k += DIGITS, packed += 2 * DIGITS) {
        const __m512i x_of[2] = {FN(inputs)(m, x, k), FN(inputs)(m, x, k + 32)};
        __m128i high[4], low[4];
        for (int i = 0; i < 4; i++) {
            const __m512i n = FN(in_units)(LOAD(__m256i, (const char *)x_of + 32 * i), per_unit);
            low[i] = _mm512_cvtepi32_epi8(n);
            high[i] = _mm512_cvtepi32_epi8(_mm512_srai_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(128)), 8));
        }
        memcpy(packed, high, DIGITS);
        memcpy(packed + DIGITS, low, DIGITS);
        high_sum = _mm512_dpbusd_epi32(high_sum, _mm512_set1_epi8(-128), LOAD(__m512i, packed));
        low_sum = _mm512_dpbusd_epi32(low_sum, _mm512_set1_epi8(-128), LOAD(__m512i, packed + DIGITS));
    }
    const u32x16 excess = -(((u32x16)high_sum << 8) + (u32x16)low_sum);
    memcpy(digits->excess, &excess, sizeof excess);
    digits->unit = LOAD(float, &unit_bits);
}

/* A digit of `rows` rows of inputs times OUTS weight rows, to sums of 16 parts each. Of half as many rows at most that are
   ahead, a line is fetched for each line that is multiplied. */
INLINE void FN(add_digit)(const int rows, const Matrix *m, const Row *w, const char *x, int64_t x_step, Ahead ahead,
                          u32x16 *sums) {
    const int64_t whole = m->in / DIGITS * DIGITS;
    uint8_t fillers[OUTS][FILLER];
    const uint8_t *weights[OUTS], *next[OUTS / 2];
    for (int n = 0; n < OUTS; n++) weights[n] = w[n * APIECE].data;
    for (int n = 0; n < OUTS / 2; n++) next[n] = n < ahead.count ? ahead.rows[n * ahead.step].data : weights[n];
    if (whole < m->in)
        for (int n = 0; n < OUTS; n++) FN(filled)(INT8_DIGITS, m, w[n * APIECE], whole, fillers[n]);
    for (int64_t k = 0; k < m->in;) {
        const int64_t end = k < whole ? whole : m->in;
        for (int n = 0; n < OUTS && k == whole; n++) weights[n] = fillers[n] - k;
        for (; k < end; k += DIGITS, x += 2 * DIGITS) {
            __m512i v[OUTS];
#pragma GCC unroll 4
            for (int n = 0; n < OUTS; n++)
                v[n] = _mm512_xor_si512(LOAD(__m512i, weights[n] + k), _mm512_set1_epi8(-128));
#pragma GCC unroll 4
            for (int n = 0; n < OUTS / 2; n++) __builtin_prefetch(next[n] + k, 0, FETCH_TO);
#pragma GCC unroll 6
            for (int r = 0; r < rows; r++) {
                const __m512i in = LOAD(__m512i, x + r * x_step);
#pragma GCC unroll 4
                for (int n = 0; n < OUTS; n++) /* compilers keep what the intrinsic makes in memory, too */
                    __asm__("vpdpbusd %2, %1, %0" : "+v"(sums[r * OUTS + n]) : "v"(v[n]), "v"(in));
            }
        }
    }
}

/* As FN(dot_scaled), of OUTS weight rows, APIECE apart: a fold for each row, TILE / OUTS folds apart. The second digit
   finds the weights in the nearest cache. */
INLINE void FN(dot_digits)(const int rows, const Matrix *m, const Row *w, const char *x, int64_t x_step, Ahead ahead,
                           FN(vec) *folds) {
    const char *ends = x + 2 * padded(INT8_DIGITS, m->in);
    u32x16 s[MOST * OUTS];
#pragma GCC unroll 24
    for (int i = 0; i < rows * OUTS; i++) s[i] = (u32x16){0};
    FN(add_digit)(rows, m, w, x, x_step, FN(share)(ahead, 0, 2), s);
#pragma GCC unroll 24
    for (int i = 0; i < rows * OUTS; i++)
        s[i] = (s[i] << 8) + LOAD(u32x16, ends + i / OUTS * x_step + offsetof(Digits, excess));
    FN(add_digit)(rows, m, w, x + DIGITS, x_step, FN(share)(ahead, 1, 2), s);
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++) {
        FN(wide) sums[OUTS];
#pragma GCC unroll 4
        for (int n = 0; n < OUTS; n++) sums[n].part[0] = __builtin_convertvector((i32x16)s[r * OUTS + n], f32x16);
        folds[r * (TILE / OUTS)] = FN(fold)(sums) * LOAD(float, ends + r * x_step + offsetof(Digits, unit));
    }
}
