/* As much of msgpack as a header of rows takes: whole numbers, doubles, short texts, arrays and maps. */
#pragma once
#include <stdint.h>
#include <string.h>

/* Where the next byte goes; `at` runs on past `end`, where nothing is written. */
typedef struct {
    uint8_t *at, *end;
} Out;

/* Bytes to be read. `bad`: they were not what was asked for; from then on all are 0. */
typedef struct {
    const uint8_t *at, *end;
    int bad;
} In;

/* -- writing: each value in its shortest form ---------------------------------------------------------------------- */

static inline void put(Out *o, const void *bytes, int64_t size) {
    if (o->end - o->at >= size) memcpy(o->at, bytes, size);
    o->at += size;
}

static inline void put_byte(Out *o, int byte) {
    const uint8_t value = (uint8_t)byte;
    put(o, &value, 1);
}

static inline void put_number(Out *o, int mark, uint64_t value, int size) {
    put_byte(o, mark);
    for (int i = size - 1; i >= 0; i--) put_byte(o, (int)(value >> 8 * i));
}

static inline void put_int(Out *o, int64_t value) {
    if (value >= -32 && value < 128) return put_byte(o, (int)value);
    int size = 0;
    if (value >= 0) {
        while (size < 3 && value >> (8 << size)) size++;
        return put_number(o, 0xcc + size, (uint64_t)value, 1 << size);
    }
    while (size < 3 && value < -(INT64_C(1) << ((8 << size) - 1))) size++;
    put_number(o, 0xd0 + size, (uint64_t)value, 1 << size);
}

static inline void put_double(Out *o, double value) {
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    put_number(o, 0xcb, bits, 8);
}

static inline void put_array(Out *o, int64_t size) {
    if (size < 16) return put_byte(o, 0x90 | (int)size);
    size < 65536 ? put_number(o, 0xdc, (uint64_t)size, 2) : put_number(o, 0xdd, (uint64_t)size, 4);
}

static inline void put_map(Out *o, int size) { put_byte(o, 0x80 | size); }

static inline void put_text(Out *o, const char *text) {
    put_byte(o, 0xa0 | (int)strlen(text));
    put(o, text, (int64_t)strlen(text));
}

/* -- reading ------------------------------------------------------------------------------------------------------- */

static inline uint64_t get_number(In *in, int size) {
    if (in->end - in->at < size) in->bad = 1;
    uint64_t value = 0;
    for (int i = 0; i < size && !in->bad; i++) value = value << 8 | *in->at++;
    return value;
}

/* A whole number that 64 bits hold, with a sign. */
static inline int64_t get_int(In *in) {
    const int mark = (int)get_number(in, 1);
    if (mark < 0x80) return mark;
    if (mark >= 0xe0) return mark - 0x100;
    if (mark >= 0xcc && mark <= 0xcf) {
        const uint64_t value = get_number(in, 1 << (mark - 0xcc));
        in->bad |= value > INT64_MAX;
        return (int64_t)value;
    }
    if (mark >= 0xd0 && mark <= 0xd3) {
        const int size = 1 << (mark - 0xd0), unused = 64 - 8 * size;
        return (int64_t)(get_number(in, size) << unused) >> unused;
    }
    in->bad = 1;
    return 0;
}

static inline double get_double(In *in) {
    in->bad |= get_number(in, 1) != 0xcb;
    const uint64_t bits = get_number(in, 8);
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* An array's size, of which each member takes at least a byte. */
static inline int64_t get_array(In *in) {
    const int mark = (int)get_number(in, 1);
    int64_t size = mark & 15;
    if (mark == 0xdc || mark == 0xdd)
        size = (int64_t)get_number(in, mark == 0xdc ? 2 : 4);
    else
        in->bad |= (mark & 0xf0) != 0x90;
    in->bad |= size > in->end - in->at;
    return in->bad ? 0 : size;
}

static inline void want_array(In *in, int64_t size) { in->bad |= get_array(in) != size; }

static inline void want_map(In *in, int size) { in->bad |= get_number(in, 1) != (uint64_t)(0x80 | size); }

static inline void want_text(In *in, const char *text) {
    const int64_t size = (int64_t)strlen(text);
    in->bad |= get_number(in, 1) != (uint64_t)(0xa0 | size) || in->end - in->at < size || memcmp(in->at, text, size);
    if (!in->bad) in->at += size;
}
