/* Tables for CPUs that multiply pairs of BF16, in bytes or words that an instruction finds by their number: stored
   numbers as BF16, and the order of inputs. */
#pragma once
#include "layout.h"

/* Of numbers of 7 bits the lower and the higher byte. */
typedef struct {
    uint8_t low[128], high[128];
} __attribute__((aligned(64))) Bf16Bytes;

static Bf16Bytes bf16_of_int8, bf16_of_e4m3;

/* By E8M0 scale and E2M1 code. */
static uint16_t bf16_of_e2m1[256][16] __attribute__((aligned(64)));

/* By format, which of 64 inputs lies at each place. */
static uint16_t input_at[MXFP4_PAIRS + 1][64] __attribute__((aligned(64)));

static uint16_t exact_bf16(float value) { return (uint16_t)(LOAD(uint32_t, &value) >> 16); }

/* 2^exponent. */
static float power(int exponent) {
    const uint32_t bits = exponent < -126 ? 1u << (exponent + 149) : (uint32_t)(exponent + 127) << 23;
    return LOAD(float, &bits);
}

static float of_e4m3(int number) {
    const int exponent = number >> 3, digits = number & 7;
    if (number == 127) return __builtin_nanf("");
    return exponent ? (float)(8 + digits) * power(exponent - 10) : (float)digits * power(-9);
}

static void put(Bf16Bytes *table, int number, float value) {
    table->low[number] = exact_bf16(value) & 0xff;
    table->high[number] = exact_bf16(value) >> 8;
}

__attribute__((constructor)) static void fill_tables(void) {
    static const float e2m1[16] = {0, .5, 1, 1.5, 2, 3, 4, 6, -0.0, -.5, -1, -1.5, -2, -3, -4, -6};
    for (int number = 0; number < 128; number++) {
        put(&bf16_of_int8, number, (float)number);
        put(&bf16_of_e4m3, number, of_e4m3(number));
    }
    for (int format = PAIRS; format <= MXFP4_PAIRS; format++)
        for (int k = 0; k < 64; k++) input_at[format][place_of(format, k)] = (uint16_t)k;
    for (int scale = 0; scale < 256; scale++)
        for (int code = 0; code < 16; code++)
            bf16_of_e2m1[scale][code] = exact_bf16(e2m1[code] * (scale < 255 ? power(scale - 127) : __builtin_nanf("")));
}
