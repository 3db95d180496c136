/* A layer's messages, sent and taken straight on channels' ends while the interpreter's lock is held, so that no other
   thread is about the same end. What is large, unusual or wrong is left as it is, to be done by sender.py and receiver.py. */
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
    const int64_t first = find_first(wanted, size, &target, PyFloat_AS_DOUBLE(args[6]), 0, &answer, &found);
    if (first == FAILED) return NULL;
    if (first == NONE_IN_TIME) Py_RETURN_NONE;
    if (found == OTHER) return Py_BuildValue("nOO", (Py_ssize_t)first, Py_None, Py_None);
    take(wanted + first, &target, &answer);
    return Py_BuildValue("ndd", (Py_ssize_t)first, answer.compute_s, answer.queue_s);
}
