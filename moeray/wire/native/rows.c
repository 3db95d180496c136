/* The two frames of which a step sends thousands, FORWARD and RESULT: written whole, and their headers read. The bytes
   are those of frame.py, which reads whatever is not exactly so, and says what is wrong with it. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <stdlib.h>

#include "msgpack.h"

enum { VERSION = 1, FORWARD = 4, RESULT = 5, PREFIX = 8, ALIGN = 64, INLINE = -1 };
enum { UNLOCKED_FROM = 1 << 18 };
enum { INT64 = 6, BOOL = 8 }; /* codes of dtypes */
static const int8_t SIZES[] = {4, 2, 2, 1, 2, 4, 8, 1, 1, 1};

static int64_t aligned(int64_t size) { return (size + ALIGN - 1) & -ALIGN; }

/* -- arguments ----------------------------------------------------------------------------------------------------- */

static int64_t number(PyObject *value) { return PyLong_AsLongLong(value); }

/* So long a copy lets other threads run. */
static PyThreadState *unlock(int64_t bytes) { return bytes >= UNLOCKED_FROM ? PyEval_SaveThread() : NULL; }

static void lock(PyThreadState *unlocked) {
    if (unlocked) PyEval_RestoreThread(unlocked);
}

static int wants(int holds, const char *usage) {
    if (!holds) PyErr_SetString(PyExc_TypeError, usage);
    return holds;
}

/* -1 with an exception for a list that holds anything but numbers. */
static int put_list(Out *o, PyObject *list) {
    put_array(o, PyList_GET_SIZE(list));
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); i++) {
        const int64_t value = number(PyList_GET_ITEM(list, i));
        if (value == -1 && PyErr_Occurred()) return -1;
        put_int(o, value);
    }
    return 0;
}

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

/* -- writing ------------------------------------------------------------------------------------------------------- */

/* A message that is being written: its beginning goes to `out`, its payload behind that or into the ring. */
typedef struct {
    PyObject *out;
    Py_buffer ring;
    Out head;
    int64_t where, most;
} Message;

/* out: bytearray, ring: None or a writable buffer of the payload's size, where, the longest header. */
static int begin(Message *m, PyObject *const *args, int op, PyObject *const *ids) {
    if (!wants(PyByteArray_Check(args[0]), "out is a bytearray")) return -1;
    m->ring.buf = NULL;
    if (args[1] != Py_None && PyObject_GetBuffer(args[1], &m->ring, PyBUF_WRITABLE)) return -1;
    uint8_t *memory = (uint8_t *)PyByteArray_AS_STRING(args[0]);
    m->out = args[0];
    m->head = (Out){memory + PREFIX, memory + PyByteArray_GET_SIZE(args[0])};
    m->where = number(args[2]);
    m->most = number(args[3]);
    put_array(&m->head, 9);
    put_int(&m->head, VERSION);
    put_int(&m->head, op);
    for (int i = 0; i < 3; i++) put_int(&m->head, number(ids[i]));
    return 0;
}

static void end(Message *m) {
    if (m->ring.buf) PyBuffer_Release(&m->ring);
}

/* Finish the header; where the payload of `size` bytes goes, NULL where the message is too large for its place. */
static uint8_t *close_head(Message *m, int64_t size) {
    put_int(&m->head, m->where);
    uint8_t *memory = (uint8_t *)PyByteArray_AS_STRING(m->out);
    const int64_t header = m->head.at - memory - PREFIX, body = aligned(PREFIX + header);
    if (header > m->most || size > UINT32_MAX) return NULL;
    if (m->ring.buf ? m->ring.len != size : body + size > PyByteArray_GET_SIZE(m->out)) return NULL;
    if (body > PyByteArray_GET_SIZE(m->out)) return NULL;
    const uint32_t prefix[2] = {(uint32_t)header, (uint32_t)size};
    memcpy(memory, prefix, sizeof prefix);
    memset(m->head.at, 0, body - PREFIX - header);
    m->head.at = memory + body;
    return m->ring.buf ? m->ring.buf : m->head.at;
}

/* The bytes of `out` that make the message. */
static PyObject *message_size(const Message *m, int64_t size) {
    return PyLong_FromLongLong(m->head.at - (uint8_t *)PyByteArray_AS_STRING(m->out) + (m->ring.buf ? 0 : size));
}

static uint8_t *pad(uint8_t *to, int64_t size) {
    memset(to + size, 0, aligned(size) - size);
    return to + aligned(size);
}

static const char FORWARD_USAGE[] =
    "write_forward(out, ring, where, most, id, layer, epoch, experts, counts, dtype, x, x_rows, width, "
    "tokens, token_of_row)";

/* Rows for an expert actor. x: address of [x_rows, width] of the dtype with that code; tokens, token_of_row: int64 as
   bytes. The size of the message in `out`, or None where it does not fit. */
static PyObject *write_forward(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)self;
    if (!wants(count == 15 && PyList_Check(args[7]) && PyList_Check(args[8]) && PyBytes_Check(args[13]) &&
                   PyBytes_Check(args[14]), FORWARD_USAGE))
        return NULL;
    const int64_t dtype = number(args[9]), x_rows = number(args[11]), width = number(args[12]);
    const char *x = PyLong_AsVoidPtr(args[10]);
    if (PyErr_Occurred() || !wants(dtype >= 0 && dtype < (int64_t)sizeof SIZES && width >= 0, FORWARD_USAGE)) return NULL;
    const int64_t *tokens = (const int64_t *)PyBytes_AS_STRING(args[13]), row = width * SIZES[dtype];
    const int64_t used = PyBytes_GET_SIZE(args[13]) / 8, rows = PyBytes_GET_SIZE(args[14]) / 8;
    const int64_t x_bytes = used * row, size = aligned(x_bytes) + aligned(rows * 8);
    for (int64_t u = 0; u < used; u++)
        if (!wants(tokens[u] >= 0 && tokens[u] < x_rows, "a token is outside x")) return NULL;
    Message m;
    if (begin(&m, args, FORWARD, args + 4)) return NULL;
    PyObject *written = NULL;
    put_map(&m.head, 2);
    put_text(&m.head, "experts");
    if (put_list(&m.head, args[7])) goto done;
    put_text(&m.head, "counts");
    if (put_list(&m.head, args[8])) goto done;
    put_array(&m.head, 2);
    put_array(&m.head, 2);
    put_int(&m.head, used);
    put_int(&m.head, width);
    put_array(&m.head, 1);
    put_int(&m.head, rows);
    put_array(&m.head, 2);
    put_int(&m.head, dtype);
    put_int(&m.head, INT64);
    if (PyErr_Occurred()) goto done;
    uint8_t *to = close_head(&m, size);
    if (!to) {
        written = Py_NewRef(Py_None);
        goto done;
    }
    PyThreadState *unlocked = unlock(size);
    for (int64_t u = 0; u < used; u++) memcpy(to + u * row, x + tokens[u] * row, row);
    lock(unlocked);
    to = pad(to, x_bytes);
    memcpy(to, PyBytes_AS_STRING(args[14]), rows * 8);
    pad(to, rows * 8);
    written = message_size(&m, size);
done:
    end(&m);
    return written;
}

static const char RESULT_USAGE[] =
    "write_result(out, ring, where, most, id, layer, epoch, compute_s, queue_s, dtype, y, rows, width)";

/* The outputs of a forward. y: address of [rows, width] of the dtype with that code. As `write_forward`. */
static PyObject *write_result(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)self;
    if (!wants(count == 13 && PyFloat_Check(args[7]) && PyFloat_Check(args[8]), RESULT_USAGE)) return NULL;
    const int64_t dtype = number(args[9]), rows = number(args[11]), width = number(args[12]);
    const void *y = PyLong_AsVoidPtr(args[10]);
    if (PyErr_Occurred() ||
        !wants(dtype >= 0 && dtype < (int64_t)sizeof SIZES && rows >= 0 && width >= 0, RESULT_USAGE))
        return NULL;
    const int64_t y_bytes = rows * width * SIZES[dtype], size = aligned(y_bytes);
    Message m;
    if (begin(&m, args, RESULT, args + 4)) return NULL;
    put_map(&m.head, 2);
    put_text(&m.head, "compute_s");
    put_double(&m.head, PyFloat_AS_DOUBLE(args[7]));
    put_text(&m.head, "queue_s");
    put_double(&m.head, PyFloat_AS_DOUBLE(args[8]));
    put_array(&m.head, 1);
    put_array(&m.head, 2);
    put_int(&m.head, rows);
    put_int(&m.head, width);
    put_array(&m.head, 1);
    put_int(&m.head, dtype);
    PyObject *written = NULL;
    uint8_t *to = PyErr_Occurred() ? NULL : close_head(&m, size);
    if (to) {
        PyThreadState *unlocked = unlock(size);
        memcpy(to, y, y_bytes);
        lock(unlocked);
        pad(to, y_bytes);
        written = message_size(&m, size);
    } else if (!PyErr_Occurred()) {
        written = Py_NewRef(Py_None);
    }
    end(&m);
    return written;
}

/* -- reading ------------------------------------------------------------------------------------------------------- */

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
        PyObject *index = PyBytes_FromStringAndSize(rows ? (const char *)memory.buf + at : NULL, rows * 8);
        int fit = index && lists_fit(args[0], args[1], rows);
        for (int64_t r = 0; fit && r < rows; r++) {
            const int64_t token = ((const int64_t *)PyBytes_AS_STRING(index))[r];
            fit = token >= 0 && token < tokens;
        }
        if (fit) found = Py_BuildValue("NO", PyLong_FromVoidPtr(memory.buf), index);
        else if (index) found = Py_NewRef(Py_None);
        Py_XDECREF(index);
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
    {NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, .m_name = "moeray.wire._native", .m_methods = methods};

PyMODINIT_FUNC PyInit__native(void) { return PyModule_Create(&module); }
