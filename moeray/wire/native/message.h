/* How FORWARD and RESULT are written: the bytes are those of frame.py. */
#pragma once
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "msgpack.h"

enum { VERSION = 2, FORWARD = 4, RESULT = 5, PREFIX = 8, ALIGN = 64, INLINE = -1 };
enum { UNLOCKED_FROM = 1 << 18 };
enum { INT64 = 6, BOOL = 8 }; /* codes of dtypes */
static const int8_t SIZES[] = {4, 2, 2, 1, 2, 4, 8, 1, 1, 1};

static inline int64_t aligned(int64_t size) { return (size + ALIGN - 1) & -ALIGN; }

static inline int64_t number(PyObject *value) { return PyLong_AsLongLong(value); }

static inline int wants(int holds, const char *usage) {
    if (!holds && !PyErr_Occurred()) PyErr_SetString(PyExc_TypeError, usage);
    return holds;
}

/* So long a copy lets other threads run. */
static inline PyThreadState *unlock(int64_t bytes) { return bytes >= UNLOCKED_FROM ? PyEval_SaveThread() : NULL; }

static inline void lock(PyThreadState *unlocked) {
    if (unlocked) PyEval_RestoreThread(unlocked);
}

/* A message that is being written: its beginning goes to `memory`, its payload behind that or to `ring`. */
typedef struct {
    uint8_t *memory;
    int64_t room;
    uint8_t *ring;
    int64_t ring_bytes, where, most;
    Out head;
} Message;

/* What both messages begin with. */
typedef struct {
    int64_t id, layer, epoch;
} Ids;

/* Rows for an expert actor: of x [x_rows, width], the `used` tokens, and of these each row's. */
typedef struct {
    const int64_t *experts, *counts, *tokens, *token_of_row;
    int64_t expert_count, used, rows, dtype, x_rows, width;
    const char *x;
} Rows;

/* Outputs [rows, width] at y; NULL where they lie in the ring. */
typedef struct {
    double compute_s, queue_s;
    int64_t dtype, rows, width;
    const void *y;
} Outputs;

static inline void begin(Message *m, int op, const Ids *ids) {
    m->head = (Out){m->memory + PREFIX, m->memory + m->room};
    put_array(&m->head, 9);
    put_int(&m->head, VERSION);
    put_int(&m->head, op);
    put_int(&m->head, ids->id);
    put_int(&m->head, ids->layer);
    put_int(&m->head, ids->epoch);
}

static inline void put_ints(Out *o, const int64_t *values, int64_t count) {
    put_array(o, count);
    for (int64_t i = 0; i < count; i++) put_int(o, values[i]);
}

/* Finish the header; where the payload of `size` bytes goes, NULL where the message is too large for its place. */
static inline uint8_t *close_head(Message *m, int64_t size) {
    put_int(&m->head, m->where);
    const int64_t header = m->head.at - m->memory - PREFIX, body = aligned(PREFIX + header);
    if (header > m->most || size > UINT32_MAX) return NULL;
    if (m->ring ? m->ring_bytes != size : body + size > m->room) return NULL;
    if (body > m->room) return NULL;
    const uint32_t prefix[2] = {(uint32_t)header, (uint32_t)size};
    memcpy(m->memory, prefix, sizeof prefix);
    memset(m->head.at, 0, body - PREFIX - header);
    m->head.at = m->memory + body;
    return m->ring ? m->ring : m->head.at;
}

/* The bytes of `memory` that make the message. */
static inline int64_t message_bytes(const Message *m, int64_t size) { return m->head.at - m->memory + (m->ring ? 0 : size); }

static inline uint8_t *pad(uint8_t *to, int64_t size) {
    memset(to + size, 0, aligned(size) - size);
    return to + aligned(size);
}

static inline int64_t ints_in(PyObject *bytes) { return PyBytes_GET_SIZE(bytes) / (Py_ssize_t)sizeof(int64_t); }

static inline int64_t x_bytes(const Rows *r) { return r->used * r->width * SIZES[r->dtype]; }

static inline int64_t rows_payload(const Rows *r) { return aligned(x_bytes(r)) + aligned(r->rows * 8); }

/* How many bytes of `memory` the message takes; 0 where it does not fit. */
static inline int64_t put_rows_message(Message *m, const Ids *ids, const Rows *r) {
    const int64_t size = rows_payload(r), row = r->width * SIZES[r->dtype];
    begin(m, FORWARD, ids);
    put_map(&m->head, 2);
    put_text(&m->head, "experts");
    put_ints(&m->head, r->experts, r->expert_count);
    put_text(&m->head, "counts");
    put_ints(&m->head, r->counts, r->expert_count);
    put_array(&m->head, 2);
    put_array(&m->head, 2);
    put_int(&m->head, r->used);
    put_int(&m->head, r->width);
    put_array(&m->head, 1);
    put_int(&m->head, r->rows);
    put_array(&m->head, 2);
    put_int(&m->head, r->dtype);
    put_int(&m->head, INT64);
    uint8_t *to = close_head(m, size);
    if (!to) return 0;
    PyThreadState *unlocked = unlock(size);
    for (int64_t u = 0; u < r->used; u++) memcpy(to + u * row, r->x + r->tokens[u] * row, row);
    lock(unlocked);
    to = pad(to, r->used * row);
    memcpy(to, r->token_of_row, r->rows * 8);
    pad(to, r->rows * 8);
    return message_bytes(m, size);
}

static inline int64_t y_bytes(const Outputs *o) { return o->rows * o->width * SIZES[o->dtype]; }

static inline int check_outputs(const Outputs *o, const char *usage) {
    return !PyErr_Occurred() && wants(o->dtype >= 0 && o->dtype < (int64_t)sizeof SIZES && o->rows >= 0 && o->width >= 0,
                                      usage);
}

/* As `put_rows_message`. */
static inline int64_t put_outputs_message(Message *m, const Ids *ids, const Outputs *o) {
    begin(m, RESULT, ids);
    put_map(&m->head, 2);
    put_text(&m->head, "compute_s");
    put_double(&m->head, o->compute_s);
    put_text(&m->head, "queue_s");
    put_double(&m->head, o->queue_s);
    put_array(&m->head, 1);
    put_array(&m->head, 2);
    put_int(&m->head, o->rows);
    put_int(&m->head, o->width);
    put_array(&m->head, 1);
    put_int(&m->head, o->dtype);
    const int64_t size = aligned(y_bytes(o));
    uint8_t *to = close_head(m, size);
    if (!to) return 0;
    if (o->y) {
        PyThreadState *unlocked = unlock(size);
        memcpy(to, o->y, y_bytes(o));
        lock(unlocked);
    }
    pad(to, y_bytes(o));
    return message_bytes(m, size);
}
