/* Stored weights as vectors; included once for each instruction set, with FN and the LANES of its vectors defined. */

#if defined(__AVX512BF16__)
#define HAS_PAIRS 1
#define COMPUTED(EACH) FORMATS(EACH) PAIR_FORMATS(EACH)
#else
#define HAS_PAIRS 0
#define COMPUTED FORMATS
#endif
#if defined(__AVX512VNNI__)
#define HAS_DIGITS 1
#define MULTIPLIED(EACH) COMPUTED(EACH) EACH(INT8_DIGITS)
#else
#define HAS_DIGITS 0
#define MULTIPLIED COMPUTED
#endif

/* The compiler converts elements one by one where it is not told the instruction. */
INLINE FN(vec) FN(half)(FN(u16vec) bits) {
#if defined(__AVX512F__)
    return (FN(vec))_mm512_cvtph_ps((__m256i)bits);
#elif defined(__F16C__)
    return (FN(vec))_mm256_cvtph_ps((__m128i)bits);
#else
    FN(uvec) wide = __builtin_convertvector(bits, FN(uvec));
    return (FN(vec))((wide & 0x8000) << 16 | (wide & 0x7fff) << 13) * 0x1p112f;
#endif
}

INLINE FN(ivec) FN(widen)(const void *bytes) {
#if defined(__AVX512F__)
    return (FN(ivec))_mm512_cvtepi8_epi32(_mm_loadu_si128(bytes));
#elif defined(__AVX2__)
    return (FN(ivec))_mm256_cvtepi8_epi32(_mm_loadl_epi64(bytes));
#else
    return __builtin_convertvector(LOAD(FN(i8vec), bytes), FN(ivec));
#endif
}

/* E4M3 is FP16 with another bias and fewer digits: read as FP16 it is too small by 2^8, subnormals too. */
INLINE FN(vec) FN(e4m3)(const uint8_t *bytes) {
#if defined(__AVX512F__)
    FN(i16vec) wide = (FN(i16vec))_mm256_cvtepi8_epi16(_mm_loadu_si128((const void *)bytes));
#elif defined(__AVX2__)
    FN(i16vec) wide = (FN(i16vec))_mm_cvtepi8_epi16(_mm_loadl_epi64((const void *)bytes));
#else
    FN(i16vec) wide = __builtin_convertvector(LOAD(FN(i8vec), bytes), FN(i16vec));
#endif
    return FN(half)((FN(u16vec))(wide << 7 & (int16_t)0xbfff));
}

/* E2M1 values by their codes, the low 4 bits of each lane. */
INLINE FN(vec) FN(e2m1)(FN(ivec) codes) {
#if LANES == 16
    const FN(vec) values = {0, .5, 1, 1.5, 2, 3, 4, 6, -0.0, -.5, -1, -1.5, -2, -3, -4, -6};
    return __builtin_shuffle(values, codes & 15);
#elif LANES == 8
    const FN(vec) values = {0, .5, 1, 1.5, 2, 3, 4, 6};
    return (FN(vec))((FN(uvec))__builtin_shuffle(values, codes & 7) | (FN(uvec))(codes & 8) << 28);
#else
    static const float values[] = {0, .5, 1, 1.5, 2, 3, 4, 6, -0.0, -.5, -1, -1.5, -2, -3, -4, -6};
    FN(vec) v;
    for (int i = 0; i < LANES; i++) v[i] = values[codes[i] & 15];
    return v;
#endif
}

/* Part p of 4 E8M0 bytes on 4 lanes each. A byte is the exponent of a float; the byte 0 is the subnormal 2^-127. */
INLINE FN(vec) FN(e8m0)(const uint8_t *scale, int p) {
#if defined(__AVX2__)
    __m128i lanes = _mm_add_epi8(_mm_setr_epi8(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3),
                                 _mm_set1_epi8((char)(p * LANES / 4)));
    __m128i spread = _mm_shuffle_epi8(_mm_cvtsi32_si128(LOAD(int32_t, scale)), lanes);
#else
    int8_t spread[LANES];
    for (int i = 0; i < LANES; i++) spread[i] = (int8_t)scale[(p * LANES + i) / 4];
#endif
    FN(uvec) exponents = (FN(uvec))FN(widen)(&spread) << 23 & 0x7f800000;
    return (FN(vec))(exponents | ((FN(uvec))(exponents == 0) & 0x400000));
}

/* Part p of vector j of the block of weights at `w`. INT8 is scaled when its sum is complete. */
INLINE FN(vec) FN(decode)(const int format, Row w, const int j, const int p) {
    const int lane = p * LANES;
    switch (format) {
        case F32: return LOAD(FN(vec), w.data + 4 * lane);
        case F16: return FN(half)(LOAD(FN(u16vec), w.data + 2 * lane));
        case BF16: {
            if (j) __asm__("" : "+r"(w.data)); /* loading anew costs less than registers for what was loaded */
            FN(uvec) pairs = LOAD(FN(uvec), w.data + 4 * lane);
            return (FN(vec))(j ? pairs & 0xffff0000 : pairs << 16);
        }
        case INT8: return __builtin_convertvector(FN(widen)(w.data + lane), FN(vec));
        case FP8: return FN(e4m3)(w.data + lane) * (256.0f * LOAD(float, w.scale));
        default: return FN(e2m1)(LOAD(FN(ivec), w.data + 4 * lane) >> (4 * j)) * FN(e8m0)(w.scale, p);
    }
}

INLINE Row FN(at)(const int format, const Matrix *m, Row w, int64_t k) {
    const int64_t scale = in_fp8(format) ? (k >> m->in_shift) * 4 : in_fp4(format) ? k / 32 : 0;
    return (Row){w.data + bytes_of(format, k), w.scale + scale};
}

/* The last block of a row where weights do not fill it, with zeros for the missing ones. */
INLINE Row FN(filled)(const int format, const Matrix *m, Row w, int64_t k, uint8_t filler[FILLER]) {
    Row from = FN(at)(format, m, w, k);
    memset(filler, 0, FILLER);
    memcpy(filler, from.data, bytes_of(format, m->in - k));
    if (!in_fp4(format)) return (Row){filler, from.scale};
    memcpy(filler + 64, from.scale, (m->in - k) / 32);
    return (Row){filler, filler + 64};
}

#if HAS_PAIRS
/* 64 numbers, each by its lower 7 bits, and their signs, as two vectors of BF16. */
INLINE void FN(bytes_to_pairs)(const Bf16Bytes *bf16, __m512i numbers, __m512i signs, __m512i *v) {
    const __m512i low = _mm512_permutex2var_epi8(LOAD(__m512i, bf16->low), numbers, LOAD(__m512i, bf16->low + 64));
    const __m512i high = _mm512_permutex2var_epi8(LOAD(__m512i, bf16->high), numbers, LOAD(__m512i, bf16->high + 64));
    const __m512i with_sign = _mm512_ternarylogic_epi32(high, signs, _mm512_set1_epi8(-128), 0xf8); /* a | b & c */
    v[0] = _mm512_unpacklo_epi8(low, with_sign);
    v[1] = _mm512_unpackhi_epi8(low, with_sign);
}

/* 32 codes of 4 bits, 4 in each of 8 words, whose scale says what BF16 they are. */
INLINE __m512i FN(codes_to_pairs)(Row w) {
    const __m512i shifts = _mm512_setr_epi64(0, 0, 0x0004000400040004, 0x0004000400040004, 0x0008000800080008,
                                             0x0008000800080008, 0x000c000c000c000c, 0x000c000c000c000c);
    const __m512i codes = _mm512_srlv_epi16(_mm512_broadcast_i32x4(LOAD(__m128i, w.data)), shifts);
    const __m512i values = _mm512_broadcast_i64x4(LOAD(__m256i, bf16_of_e2m1[*w.scale]));
    return _mm512_permutexvar_epi16(codes, values); /* by 5 bits, of which the highest does not matter */
}

/* A block of weights as BF16. */
INLINE void FN(decode_pairs)(const int format, Row w, __m512i *v) {
    const __m512i stored = format == MXFP4_PAIRS ? _mm512_setzero_si512() : LOAD(__m512i, w.data);
    switch (format) {
        case INT8_PAIRS: return FN(bytes_to_pairs)(&bf16_of_int8, _mm512_abs_epi8(stored), stored, v);
        case FP8_PAIRS: return FN(bytes_to_pairs)(&bf16_of_e4m3, stored, stored, v);
        case MXFP4_PAIRS:
            for (int j = 0; j < 2; j++) v[j] = FN(codes_to_pairs)((Row){w.data + 16 * j, w.scale + j});
            return;
        default: *v = stored;
    }
}
#endif

INLINE void FN(decode_block)(const int format, Row w, char *decoded) {
#if HAS_PAIRS
    if (in_pairs(format)) return FN(decode_pairs)(format, w, (__m512i *)decoded);
#endif
    for (int j = 0; j < (int)vectors_of(format); j++)
        for (int p = 0; p < PARTS; p++) ((FN(vec) *)decoded)[j * PARTS + p] = FN(decode)(format, w, j, p);
}
