/* A layer's messages, sent and taken straight on channels' ends while the interpreter's lock is held, so that no other
   thread is about the same end. What is large, unusual or wrong is left as it is, to be done by unix.py. */
#include "lanes.h"

#include "lane_out.h"
#include "results.h"

static Lane *lane_at(PyObject *address) { return PyLong_AsVoidPtr(address); }

/* -- sending ------------------------------------------------------------------------------------------------------- */

static const char PLACE_USAGE[] = "place_outputs(lane, size)";

/* (position, address) of so many bytes of the ring, which are the next RESULT's from now on; None where they are not to
   be had, or few enough to go through the socket. */
PyObject *moeray_place_outputs(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)self;
    if (!wants(count == 2, PLACE_USAGE)) return NULL;
    Lane *lane = lane_at(args[0]);
    const int64_t size = aligned(number(args[1]));
    Message m;
    if (PyErr_Occurred()) return NULL;
    if (!may_send(lane) || !place(&m, lane, size) || !m.ring) Py_RETURN_NONE;
    /* Should the message never leave: the reader's next position frees the gap. */
    commit(lane, &m);
    return Py_BuildValue("LN", m.where, PyLong_FromVoidPtr(m.ring));
}

static const char OUTPUTS_USAGE[] =
    "send_outputs(lane, position, id, layer, epoch, compute_s, queue_s, dtype, y, rows, width)";

/* Send the outputs of a forward: those at the address y, or at this position of the ring, where they are already.
   Whether it went out. */
PyObject *moeray_send_outputs(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)self;
    if (!wants(count == 11 && PyFloat_Check(args[5]) && PyFloat_Check(args[6]), OUTPUTS_USAGE)) return NULL;
    const int64_t position = number(args[1]);
    const Ids ids = {number(args[2]), number(args[3]), number(args[4])};
    const Outputs outputs = {PyFloat_AS_DOUBLE(args[5]),
                             PyFloat_AS_DOUBLE(args[6]),
                             number(args[7]),
                             number(args[9]),
                             number(args[10]),
                             position == INLINE ? PyLong_AsVoidPtr(args[8]) : NULL};
    Lane *lane = lane_at(args[0]);
    if (!check_outputs(&outputs, OUTPUTS_USAGE)) return NULL;
    const int64_t size = aligned(y_bytes(&outputs));
    if (!may_send(lane)) Py_RETURN_FALSE;
    Message m = message_on(lane);
    if (position != INLINE) put_in_ring(&m, lane, position, size);
    else if (!stays_locked(size) || !place(&m, lane, size)) Py_RETURN_FALSE;
    const int64_t bytes = put_outputs_message(&m, &ids, &outputs);
    if (bytes <= 0) return bytes ? NULL : Py_NewRef(Py_False);
    if (!send_now(lane, bytes)) Py_RETURN_FALSE;
    if (position == INLINE) commit(lane, &m);
    Py_RETURN_TRUE;
}

static const char TAKE_USAGE[] = "take_result(wanted, dtype, width, row_bytes, out, out_rows, timeout_s)";

/* -- taking -------------------------------------------------------------------------------------------------------- */

/* What is wanted, as `take_result` has it; else with an exception. */
static int read_wanted(PyObject *item, int64_t out_rows, Wanted *w) {
    PyObject *to = PyTuple_Check(item) && PyTuple_GET_SIZE(item) == 3 ? PyTuple_GET_ITEM(item, 2) : NULL;
    if (!wants(to && PyBytes_Check(to), TAKE_USAGE)) return 0;
    *w = (Wanted){lane_at(PyTuple_GET_ITEM(item, 0)), number(PyTuple_GET_ITEM(item, 1)), ints_in(to),
                  (const int64_t *)PyBytes_AS_STRING(to)};
    int fits = !PyErr_Occurred();
    for (int64_t r = 0; fits && r < w->rows; r++) fits = w->to[r] >= 0 && w->to[r] < out_rows;
    return wants(fits, TAKE_USAGE);
}

/* (place, compute_s, queue_s) of the first of `wanted` that is answered, whose rows are in `out` then: each is (lane, id,
   rows), where the rows go as int64 bytes. (place, None, None) for one where something else is to be read, None where
   nothing came in time or they are more than MAX_LANES. Other threads run meanwhile. */
PyObject *moeray_take_result(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)self;
    if (!wants(count == 7 && PyList_Check(args[0]) && PyFloat_Check(args[6]), TAKE_USAGE)) return NULL;
    const Target target = {number(args[1]), number(args[2]), number(args[3]), number(args[5]), PyLong_AsVoidPtr(args[4])};
    const Py_ssize_t size = PyList_GET_SIZE(args[0]);
    Wanted wanted[MAX_LANES];
    Answer answer;
    int found;
    if (PyErr_Occurred()) return NULL;
    if (size > MAX_LANES) Py_RETURN_NONE;
    for (Py_ssize_t i = 0; i < size; i++)
        if (!read_wanted(PyList_GET_ITEM(args[0], i), target.out_rows, wanted + i)) return NULL;
    const int64_t first = take_first(wanted, size, &target, PyFloat_AS_DOUBLE(args[6]), &answer, &found);
    if (first == FAILED) return NULL;
    if (first == NONE_IN_TIME) Py_RETURN_NONE;
    if (found == OTHER) return Py_BuildValue("nOO", (Py_ssize_t)first, Py_None, Py_None);
    return Py_BuildValue("ndd", (Py_ssize_t)first, answer.compute_s, answer.queue_s);
}

/* -- a forward ----------------------------------------------------------------------------------------------------- */

enum { ID = 1, LAYER, EPOCH, META, SPANS, WHERE }; /* of a header as moeray_read_header has it */

static PyObject *item(PyObject *header, int place) { return PyTuple_GET_ITEM(header, place); }

static int64_t span(PyObject *header, int tensor, int place) {
    return number(PyTuple_GET_ITEM(PyList_GET_ITEM(item(header, SPANS), tensor), place));
}

static int64_t size_in(PyObject *header, int tensor, int dimension) {
    return number(PyList_GET_ITEM(PyTuple_GET_ITEM(PyList_GET_ITEM(item(header, SPANS), tensor), 1), dimension));
}

/* (where the tokens are, each row's token) of a forward whose payload is there, or None; see forward_memory. */
static PyObject *given_by(PyObject *header, const uint8_t *payload) {
    PyObject *experts = PyDict_GetItemString(item(header, META), "experts");
    PyObject *counts = PyDict_GetItemString(item(header, META), "counts");
    if (span(header, 1, 0) != INT64) Py_RETURN_NONE;
    const int64_t rows = size_in(header, 1, 0), *from = (const int64_t *)(payload + span(header, 1, 3));
    PyObject *index = moeray_checked_index(experts, counts, from, rows, size_in(header, 0, 0));
    if (!index || index == Py_None) return index;
    return Py_BuildValue("NN", PyLong_FromVoidPtr((void *)(payload + span(header, 0, 3))), index);
}

/* The next message if it is a FORWARD that is all there: (header, whether it lies in the ring, at which byte, given). */
static int take_forward(Lane *lane, PyObject **forward) {
    Whole w;
    const int found = find_whole(lane, &w);
    if (found != TAKEN) return found;
    PyObject *header = moeray_read_header(&w.header, w.header.end - w.header.at, w.payload);
    if (!header) return -1;
    const uint8_t *payload = NULL;
    int there = OTHER;
    if (header != Py_None && number(item(header, 0)) == FORWARD) {
        const int64_t where = number(item(header, WHERE));
        there = find_payload(lane, &w, where, &payload);
        if (there == TAKEN) {
            PyObject *given = given_by(header, payload);
            const uint8_t *base = where == INLINE ? lane->buffer : lane->in->memory;
            *forward = given ? Py_BuildValue("OOLN", header, where == INLINE ? Py_False : Py_True,
                                             (long long)(payload - base), given) : NULL;
            pass(lane, &w, where);
        }
    }
    Py_DECREF(header);
    return PyErr_Occurred() ? -1 : there;
}

static const char FORWARD_USAGE[] = "take_forward(lane)";

/* Wait for the next message. (header, whether its payload is in the ring, at which byte there or in the buffer, (address
   of the tokens, each row's token) or None where these do not fit) of a FORWARD; None where there is something else to
   read. The caller keeps others from receiving and from closing. Other threads run meanwhile. */
PyObject *moeray_take_forward(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)self;
    if (!wants(count == 1, FORWARD_USAGE)) return NULL;
    Lane *lane = lane_at(args[0]);
    if (!lane || lane->fd < 0 || lane->reading) return PyErr_Occurred() ? NULL : Py_NewRef(Py_None);
    release(lane->in);
    for (;;) {
        PyObject *forward = NULL;
        const int found = take_forward(lane, &forward);
        if (found < 0) return NULL;
        if (found == TAKEN) return forward;
        if (found == OTHER) Py_RETURN_NONE;
        if (lane->start == lane->end) lane->start = lane->end = 0;
        if (lane->end == lane->room) Py_RETURN_NONE;
        ssize_t got;
        Py_BEGIN_ALLOW_THREADS
        got = recv((int)lane->fd, lane->buffer + lane->end, (size_t)(lane->room - lane->end), 0);
        Py_END_ALLOW_THREADS
        if (got <= 0) Py_RETURN_NONE;
        lane->end += got;
    }
}
