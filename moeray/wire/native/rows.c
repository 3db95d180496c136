/* The two frames of which a step sends thousands, FORWARD and RESULT: written whole, and their headers read. The bytes
   are those of frame.py, which reads whatever is not exactly so, and says what is wrong with it. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdlib.h>

#include "lanes.h"
#include "message.h"

/* The list's numbers, to be freed; NULL where it holds something else. */
static int64_t *numbers(PyObject *list) {
    const Py_ssize_t size = PyList_GET_SIZE(list);
    int64_t *values = PyMem_New(int64_t, size + 1);
    for (Py_ssize_t i = 0; values && i < size; i++) {
        PyObject *item = PyList_GET_ITEM(list, i);
        int unfit = !PyLong_CheckExact(item);
        values[i] = unfit ? 0 : PyLong_AsLongLongAndOverflow(item, &unfit);
        if (!unfit) continue;
        PyMem_Free(values);
        return NULL;
    }
    return values;
}

/* -- writing ------------------------------------------------------------------------------------------------------- */

/* args: out, a bytearray; ring, None or a writable buffer of the payload's size; where; the longest header. */
static int open_message(Message *m, Py_buffer *ring, PyObject *const *args) {
    if (!wants(PyByteArray_Check(args[0]), "out is a bytearray")) return 0;
    ring->buf = NULL;
    if (args[1] != Py_None && PyObject_GetBuffer(args[1], ring, PyBUF_WRITABLE)) return 0;
    *m = (Message){.memory = (uint8_t *)PyByteArray_AS_STRING(args[0]),
                   .room = PyByteArray_GET_SIZE(args[0]),
                   .ring = ring->buf,
                   .ring_bytes = ring->buf ? ring->len : 0,
                   .where = number(args[2]),
                   .most = number(args[3])};
    return 1;
}

/* The size of a message in `out`, or None where it does not fit. */
static PyObject *close_message(Py_buffer *ring, int64_t size) {
    if (ring->buf) PyBuffer_Release(ring);
    if (PyErr_Occurred()) return NULL;
    if (!size) Py_RETURN_NONE;
    return PyLong_FromLongLong(size);
}

static const char FORWARD_USAGE[] =
    "write_forward(out, ring, where, most, id, layer, epoch, experts, counts, dtype, x, x_rows, width, "
    "tokens, token_of_row)";

/* Whether they may be written, else with an exception. */
static int check_rows(const Rows *r) {
    if (!wants(r->dtype >= 0 && r->dtype < (int64_t)sizeof SIZES && r->width >= 0, FORWARD_USAGE)) return 0;
    for (int64_t u = 0; u < r->used; u++)
        if (!wants(r->tokens[u] >= 0 && r->tokens[u] < r->x_rows, "a token is outside x")) return 0;
    return 1;
}

/* Rows for an expert actor. x: address of [x_rows, width] of the dtype with that code; tokens, token_of_row: int64 as
   bytes. The size of the message in `out`, or None where it does not fit. */
static PyObject *write_forward(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)self;
    if (!wants(count == 15 && PyList_Check(args[7]) && PyList_Check(args[8]) &&
                   PyList_GET_SIZE(args[7]) == PyList_GET_SIZE(args[8]) && PyBytes_Check(args[13]) &&
                   PyBytes_Check(args[14]), FORWARD_USAGE))
        return NULL;
    const Ids ids = {number(args[4]), number(args[5]), number(args[6])};
    int64_t *experts = numbers(args[7]), *counts = numbers(args[8]), size = 0;
    const Rows rows = {.experts = experts,
                       .counts = counts,
                       .tokens = (const int64_t *)PyBytes_AS_STRING(args[13]),
                       .token_of_row = (const int64_t *)PyBytes_AS_STRING(args[14]),
                       .expert_count = PyList_GET_SIZE(args[7]),
                       .used = ints_in(args[13]),
                       .rows = ints_in(args[14]),
                       .dtype = number(args[9]),
                       .x_rows = number(args[11]),
                       .width = number(args[12]),
                       .x = PyLong_AsVoidPtr(args[10])};
    Message m;
    Py_buffer ring = {0};
    if (wants(experts && counts && !PyErr_Occurred(), FORWARD_USAGE) && check_rows(&rows) && open_message(&m, &ring, args))
        size = put_rows_message(&m, &ids, &rows);
    PyMem_Free(experts);
    PyMem_Free(counts);
    return close_message(&ring, size);
}

static const char RESULT_USAGE[] =
    "write_result(out, ring, where, most, id, layer, epoch, compute_s, queue_s, dtype, y, rows, width)";

/* The outputs of a forward. y: address of [rows, width] of the dtype with that code. As `write_forward`. */
static PyObject *write_result(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)self;
    if (!wants(count == 13 && PyFloat_Check(args[7]) && PyFloat_Check(args[8]), RESULT_USAGE)) return NULL;
    const Ids ids = {number(args[4]), number(args[5]), number(args[6])};
    const Outputs outputs = {PyFloat_AS_DOUBLE(args[7]), PyFloat_AS_DOUBLE(args[8]), number(args[9]),
                             number(args[11]),           number(args[12]),           PyLong_AsVoidPtr(args[10])};
    Message m;
    Py_buffer ring;
    if (!check_outputs(&outputs, RESULT_USAGE) || !open_message(&m, &ring, args)) return NULL;
    return close_message(&ring, put_outputs_message(&m, &ids, &outputs));
}

/* -- reading ------------------------------------------------------------------------------------------------------- */

static PyObject *get_list(In *in) {
    const int64_t size = get_array(in);
    PyObject *list = PyList_New(size);
    for (int64_t i = 0; list && i < size; i++) {
        PyObject *value = PyLong_FromLongLong(get_int(in));
        if (!value) Py_CLEAR(list);
        else PyList_SET_ITEM(list, i, value);
    }
    return list;
}

/* A tensor of a frame. */
typedef struct {
    int64_t dtype, rank, shape[2], elements;
} Span;

static void get_shape(In *in, Span *s, int64_t rank) {
    want_array(in, rank);
    s->rank = rank;
    s->elements = 1;
    for (int64_t i = 0; i < rank; i++) {
        s->shape[i] = get_int(in);
        in->bad |= s->shape[i] < 0 || s->shape[i] > INT32_MAX;
        s->elements *= in->bad ? 0 : s->shape[i];
    }
}

static void get_dtype(In *in, Span *s) {
    s->dtype = get_int(in);
    in->bad |= s->dtype < 0 || s->dtype >= (int64_t)sizeof SIZES || s->dtype == BOOL || s->elements >> 48;
}

static int64_t bytes_of(const Span *s) { return aligned(s->elements * SIZES[s->dtype]); }

static PyObject *span_tuple(const Span *s, int64_t offset) {
    return s->rank == 1 ? Py_BuildValue("L[L]LL", s->dtype, s->shape[0], s->elements, offset)
                        : Py_BuildValue("L[LL]LL", s->dtype, s->shape[0], s->shape[1], s->elements, offset);
}

/* `count` tensors' shapes, then their dtypes; their bytes. */
static int64_t get_spans(In *in, Span *spans, int count) {
    want_array(in, count);
    for (int i = 0; i < count; i++) get_shape(in, spans + i, i ? 1 : 2);
    want_array(in, count);
    int64_t size = 0;
    for (int i = 0; i < count; i++) {
        get_dtype(in, spans + i);
        if (in->bad) return 0;
        size += bytes_of(spans + i);
    }
    return size;
}

static PyObject *get_meta(In *in, int op) {
    want_map(in, 2);
    if (op == FORWARD) {
        want_text(in, "experts");
        PyObject *experts = get_list(in);
        want_text(in, "counts");
        PyObject *counts = experts ? get_list(in) : NULL;
        PyObject *meta = counts ? Py_BuildValue("{sOsO}", "experts", experts, "counts", counts) : NULL;
        Py_XDECREF(experts);
        Py_XDECREF(counts);
        return meta;
    }
    want_text(in, "compute_s");
    const double compute_s = get_double(in);
    want_text(in, "queue_s");
    return Py_BuildValue("{sdsd}", "compute_s", compute_s, "queue_s", get_double(in));
}

/* The header behind a prefix that announces `payload` bytes, or None. */
static PyObject *read_header(In *in, int64_t header, int64_t payload) {
    want_array(in, 9);
    in->bad |= get_int(in) != VERSION;
    const int64_t asked = get_int(in);
    in->bad |= asked != FORWARD && asked != RESULT;
    const int op = (int)asked, tensors = op == FORWARD ? 2 : 1;
    int64_t ids[3];
    for (int i = 0; i < 3; i++) ids[i] = get_int(in);
    if (in->bad) Py_RETURN_NONE;
    PyObject *meta = get_meta(in, op), *first = NULL, *second = NULL, *found = NULL;
    Span spans[2];
    const int64_t size = get_spans(in, spans, tensors), where = get_int(in);
    if (!meta || in->bad || in->at != in->end || size != payload) goto done;
    if (!(first = span_tuple(spans, 0))) goto done;
    if (tensors == 2 && !(second = span_tuple(spans + 1, bytes_of(spans)))) goto done;
    PyObject *list = second ? Py_BuildValue("[OO]", first, second) : Py_BuildValue("[O]", first);
    if (list)
        found = Py_BuildValue("iLLLONLLL", op, ids[0], ids[1], ids[2], meta, list, where, aligned(PREFIX + header), payload);
done:
    Py_XDECREF(meta);
    Py_XDECREF(first);
    Py_XDECREF(second);
    if (found || PyErr_Occurred()) return found;
    Py_RETURN_NONE;
}

static const char READ_USAGE[] = "read_rows(memory, start, end, most_header, most_payload)";

/* What frame.Header holds, of a FORWARD or RESULT whose header lies whole in bytes [start, end) of the memory; None for
   whatever else is there. */
static PyObject *read_rows(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)self;
    if (!wants(count == 5, READ_USAGE)) return NULL;
    const int64_t start = number(args[1]), stop = number(args[2]), most[2] = {number(args[3]), number(args[4])};
    Py_buffer memory;
    if (PyErr_Occurred() || PyObject_GetBuffer(args[0], &memory, PyBUF_SIMPLE)) return NULL;
    PyObject *found = NULL;
    if (wants(0 <= start && start <= stop && stop <= memory.len, READ_USAGE)) {
        const uint8_t *from = (const uint8_t *)memory.buf + start;
        uint32_t prefix[2] = {0, 0};
        if (stop - start >= PREFIX) memcpy(prefix, from, PREFIX);
        const int64_t header = prefix[0], payload = prefix[1];
        if (!header || header > most[0] || payload > most[1] || aligned(PREFIX + header) > stop - start) {
            found = Py_NewRef(Py_None);
        } else {
            In in = {from + PREFIX, from + PREFIX + header, 0};
            found = read_header(&in, header, payload);
        }
    }
    PyBuffer_Release(&memory);
    return found;
}

/* -- rows in memory ------------------------------------------------------------------------------------------------ */

static int in_order(const int64_t *a, const int64_t *b) { return *a < *b ? -1 : *a > *b; }

/* Those of a plan are in order; a peer's, which may be any and many, are put in order here. */
static int distinct(int64_t *values, Py_ssize_t count) {
    Py_ssize_t ordered = 1;
    while (ordered < count && values[ordered] > values[ordered - 1]) ordered++;
    if (ordered >= count) return 1;
    qsort(values, count, sizeof *values, (int (*)(const void *, const void *))in_order);
    for (Py_ssize_t i = 1; i < count; i++)
        if (values[i] == values[i - 1]) return 0;
    return 1;
}

/* All above 0, with that sum. */
static int sum_to(const int64_t *counts, Py_ssize_t size, int64_t rows) {
    for (Py_ssize_t i = 0; i < size; i++) {
        if (counts[i] <= 0 || counts[i] > rows) return 0;
        rows -= counts[i];
    }
    return rows == 0;
}

static int lists_fit(PyObject *experts, PyObject *counts, int64_t rows) {
    const Py_ssize_t size = PyList_GET_SIZE(experts);
    if (size != PyList_GET_SIZE(counts)) return 0;
    int64_t *names = numbers(experts), *sizes = numbers(counts);
    const int fit = names && sizes && distinct(names, size) && sum_to(sizes, size, rows);
    PyMem_Free(names);
    PyMem_Free(sizes);
    return fit;
}

/* A copy of the row index, if experts and counts go with it, and it with so many tokens; else None. */
static PyObject *checked_index(PyObject *experts, PyObject *counts, const int64_t *from, int64_t rows, int64_t tokens) {
    PyObject *index = PyBytes_FromStringAndSize((const char *)from, rows * 8);
    int fit = index && lists_fit(experts, counts, rows);
    for (int64_t r = 0; fit && r < rows; r++) {
        const int64_t token = ((const int64_t *)PyBytes_AS_STRING(index))[r];
        fit = token >= 0 && token < tokens;
    }
    if (fit || !index) return index;
    Py_DECREF(index);
    return Py_NewRef(Py_None);
}

static const char FORWARD_MEMORY_USAGE[] = "forward_memory(experts, counts, memory, at, rows, tokens)";

/* (where the memory is, the row index), if experts and counts of a FORWARD go with its row index, int64 [rows] at byte
   `at`, and that with its number of tokens; else None. The index is a copy: its sender may still write to the memory,
   and what was found good must stay so. */
static PyObject *forward_memory(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)self;
    if (!wants(count == 6 && PyList_Check(args[0]) && PyList_Check(args[1]), FORWARD_MEMORY_USAGE)) return NULL;
    const int64_t at = number(args[3]), rows = number(args[4]), tokens = number(args[5]);
    Py_buffer memory;
    if (PyErr_Occurred() || PyObject_GetBuffer(args[2], &memory, PyBUF_SIMPLE)) return NULL;
    PyObject *found = NULL;
    /* An empty index lies nowhere, and its place may be behind the memory's end. */
    if (wants(at >= 0 && rows >= 0 && (!rows || rows <= (memory.len - at) / 8), FORWARD_MEMORY_USAGE)) {
        PyObject *index = checked_index(args[0], args[1], rows ? (const int64_t *)((const char *)memory.buf + at) : NULL, rows, tokens);
        if (index == Py_None) found = index;
        else if (index) found = Py_BuildValue("NN", PyLong_FromVoidPtr(memory.buf), index);
    }
    PyBuffer_Release(&memory);
    return found;
}

static const char PUT_USAGE[] = "put_rows(memory, at, rows, out, out_rows, row_bytes)";

/* Copy what lies in the memory from byte `at` on, a row for each of `rows` (int64 as bytes), to those rows of what lies
   at the address `out`. */
static PyObject *put_rows(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)self;
    if (!wants(count == 6 && PyBytes_Check(args[2]), PUT_USAGE)) return NULL;
    const int64_t at = number(args[1]), out_rows = number(args[4]), row = number(args[5]);
    const int64_t *rows = (const int64_t *)PyBytes_AS_STRING(args[2]), size = PyBytes_GET_SIZE(args[2]) / 8;
    char *out = PyLong_AsVoidPtr(args[3]);
    Py_buffer memory;
    if (PyErr_Occurred() || PyObject_GetBuffer(args[0], &memory, PyBUF_SIMPLE)) return NULL;
    int fits = at >= 0 && at <= memory.len && row >= 0 && (!row || size <= (memory.len - at) / row);
    for (int64_t r = 0; r < size; r++) fits = fits && rows[r] >= 0 && rows[r] < out_rows;
    if (wants(fits, PUT_USAGE)) {
        PyThreadState *unlocked = unlock(size * row);
        for (int64_t r = 0; r < size; r++) memcpy(out + rows[r] * row, (const char *)memory.buf + at + r * row, row);
        lock(unlocked);
    }
    PyBuffer_Release(&memory);
    if (PyErr_Occurred()) return NULL;
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"write_forward", (PyCFunction)(void (*)(void))write_forward, METH_FASTCALL, FORWARD_USAGE},
    {"write_result", (PyCFunction)(void (*)(void))write_result, METH_FASTCALL, RESULT_USAGE},
    {"read_rows", (PyCFunction)(void (*)(void))read_rows, METH_FASTCALL, READ_USAGE},
    {"forward_memory", (PyCFunction)(void (*)(void))forward_memory, METH_FASTCALL, FORWARD_MEMORY_USAGE},
    {"put_rows", (PyCFunction)(void (*)(void))put_rows, METH_FASTCALL, PUT_USAGE},
    {"place_outputs", (PyCFunction)(void (*)(void))moeray_place_outputs, METH_FASTCALL, NULL},
    {"send_outputs", (PyCFunction)(void (*)(void))moeray_send_outputs, METH_FASTCALL, NULL},
    {"take_result", (PyCFunction)(void (*)(void))moeray_take_result, METH_FASTCALL, NULL},
    {NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, .m_name = "moeray.wire._native", .m_methods = methods};

PyMODINIT_FUNC PyInit__native(void) { return PyModule_Create(&module); }
