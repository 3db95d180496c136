/* An expert actor's answers, from a forward's arrival to its outputs' departure, without a line of Python between: what
   is touched there is cold, for weights have pushed it out of the caches. What is unusual, wrong, or not to be had at
   once is left as it is, to be done by rows.py. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "../../model/kernels/native/call.h"
#include "../../wire/native/lane_in.h"
#include "../../wire/native/lane_out.h"

enum { MOST_EXPERTS = 1024, MANY = 64, DTYPES = sizeof SIZES };

/* What does not change from one forward to the next; answering.py describes the fields and has the same structure. */
typedef struct {
    int64_t (*scratch)(const Layer *, int64_t rows, int64_t experts, const Call *);
    void (*forward)(const Layer *, const Expert *const *, const int64_t *counts, int64_t count, const Call *);
    int64_t formats[DTYPES], instructions, threads, closed, active;
} Answering;

/* A FORWARD: `count` experts with their rows. */
typedef struct {
    Ids ids;
    int64_t count, tokens, width, rows, dtype, where;
    int64_t experts[MOST_EXPERTS], counts[MOST_EXPERTS];
} Asked;

/* A layer's experts that are hosted here, by their numbers; an expert that is not has the address 0. */
typedef struct {
    const Layer *layer;
    int64_t width, size;
    const int64_t *addresses;
} Hosted;

/* The memory of one forward, in this order. */
typedef struct {
    char *kernels, *y;
    int64_t *token_of_row;
    const Expert **experts;
} Memory;

/* -- what is asked for --------------------------------------------------------------------------------------------- */

static int64_t get_ints(In *in, int64_t *values) {
    const int64_t size = get_array(in);
    in->bad |= size > MOST_EXPERTS;
    for (int64_t i = 0; !in->bad && i < size; i++) values[i] = get_int(in);
    return size;
}

static int64_t payload_of(const Asked *a) {
    return aligned(a->tokens * a->width * SIZES[a->dtype]) + aligned(a->rows * (int64_t)sizeof(int64_t));
}

/* Whether it is a FORWARD that message.h would write, of distinct experts in order, with all of its rows. */
static int read_forward(In in, int64_t payload, Asked *a) {
    want_array(&in, 9);
    int fits = get_int(&in) == VERSION;
    fits &= get_int(&in) == FORWARD;
    if (!fits) return 0;
    a->ids.id = get_int(&in);
    a->ids.layer = get_int(&in);
    a->ids.epoch = get_int(&in);
    want_map(&in, 2);
    want_text(&in, "experts");
    a->count = get_ints(&in, a->experts);
    want_text(&in, "counts");
    fits &= get_ints(&in, a->counts) == a->count;
    want_array(&in, 2);
    want_array(&in, 2);
    a->tokens = get_int(&in);
    a->width = get_int(&in);
    want_array(&in, 1);
    a->rows = get_int(&in);
    want_array(&in, 2);
    a->dtype = get_int(&in);
    fits &= get_int(&in) == INT64;
    a->where = get_int(&in);
    if (!fits || in.bad || in.at != in.end || a->count < 1 || a->dtype < 0 || a->dtype >= DTYPES) return 0;
    if (a->tokens < 0 || a->tokens > INT32_MAX || a->width < 0 || a->width > INT32_MAX) return 0;
    if (a->rows < 1 || a->rows > INT32_MAX || a->tokens * a->width > INT64_MAX >> 8 || payload_of(a) != payload) return 0;
    int64_t rows = a->rows;
    for (int64_t i = 0; i < a->count; i++) {
        if (a->experts[i] <= (i ? a->experts[i - 1] : -1) || a->counts[i] < 1 || a->counts[i] > rows) return 0;
        rows -= a->counts[i];
    }
    return rows == 0;
}

/* A new reference to what holds the layer's weights, or NULL: it is not hosted, or computed otherwise. */
static PyObject *find_hosted(PyObject *tables, const Asked *a, Hosted *h) {
    PyObject *layer = PyLong_FromLongLong(a->ids.layer), *table = layer ? PyDict_GetItemWithError(tables, layer) : NULL;
    Py_XDECREF(layer);
    if (!table) return NULL;
    h->layer = PyLong_AsVoidPtr(PyTuple_GET_ITEM(table, 0));
    h->width = number(PyTuple_GET_ITEM(table, 1));
    h->addresses = (const int64_t *)PyBytes_AS_STRING(PyTuple_GET_ITEM(table, 2));
    h->size = ints_in(PyTuple_GET_ITEM(table, 2));
    for (int64_t i = 0; i < a->count; i++)
        if (a->experts[i] >= h->size || !h->addresses[a->experts[i]]) return NULL;
    return a->width == h->width ? Py_NewRef(table) : NULL;
}

/* A copy of the payload's index: its sender can still write to the memory, and what was found good must stay so. */
static int copy_index(const Asked *a, const uint8_t *payload, int64_t *token_of_row) {
    memcpy(token_of_row, payload + aligned(a->tokens * a->width * SIZES[a->dtype]), a->rows * sizeof(int64_t));
    for (int64_t r = 0; r < a->rows; r++)
        if (token_of_row[r] < 0 || token_of_row[r] >= a->tokens) return 0;
    return 1;
}

/* -- the answer ---------------------------------------------------------------------------------------------------- */

static char *lay_out(Memory *m, char *at, int64_t kernels, const Asked *a) {
    m->kernels = at;
    m->y = at + aligned(kernels);
    m->token_of_row = (int64_t *)(m->y + aligned(a->rows * a->width * SIZES[a->dtype]));
    m->experts = (const Expert **)(m->token_of_row + a->rows);
    return (char *)(m->experts + a->count);
}

/* Names of methods, made once. */
static PyObject *acquire_name, *release_name, *append_name;

static int try_lock(PyObject *lock) {
    PyObject *taken = PyObject_CallMethodOneArg(lock, acquire_name, Py_False);
    const int did = taken == Py_True;
    Py_XDECREF(taken);
    return did;
}

/* Keeps what came of the lock's release, or an exception that there already is. */
static void let_go(PyObject *lock) {
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    Py_XDECREF(PyObject_CallMethodNoArgs(lock, release_name));
    if (type) PyErr_Restore(type, value, trace);
}

/* What a forward was and took, for answering.py to count. */
static int note(PyObject *served, const Asked *a, double waited, double took) {
    PyObject *what = Py_BuildValue("Ly#y#ddd", a->ids.layer, (const char *)a->experts, a->count * sizeof(int64_t),
                                   (const char *)a->counts, a->count * sizeof(int64_t), waited, took, seconds());
    PyObject *done = what ? PyObject_CallMethodOneArg(served, append_name, what) : NULL;
    Py_XDECREF(what);
    Py_XDECREF(done);
    return done != NULL;
}

/* Outputs that could not go out at once, for the channel to send: see `answer`. */
static PyObject *unsent(const Asked *a, const Outputs *o, const Message *m, const Memory *at) {
    const void *y = m->ring ? m->ring : (const uint8_t *)at->y;
    return Py_BuildValue("LLLddLLNLL", a->ids.id, a->ids.layer, a->ids.epoch, o->compute_s, o->queue_s, a->dtype, m->where,
                         PyLong_FromVoidPtr((void *)y), a->rows, a->width);
}

/* Compute and send. None where it went out whole, else what is left to be sent; NULL with an exception. */
static PyObject *compute(Answering *s, Lane *lane, const Asked *a, const Hosted *h, const uint8_t *payload, Memory *at,
                         Message *m, PyObject *served, double arrived) {
    for (int64_t i = 0; i < a->count; i++) at->experts[i] = (const Expert *)h->addresses[a->experts[i]];
    const Call call = {payload,          at->token_of_row,      m->ring ? m->ring : (uint8_t *)at->y,
                       at->kernels,      s->formats[a->dtype],  s->formats[a->dtype],
                       s->threads,       s->instructions};
    const double began = seconds();
    Py_BEGIN_ALLOW_THREADS
    s->forward(h->layer, at->experts, a->counts, a->count, &call);
    Py_END_ALLOW_THREADS
    const double took = seconds() - began, waited = began - arrived;
    /* Now, since whoever is sent the answer may take this core at once: a ring that seems full then is of no use. */
    release(lane->in);
    const Outputs outputs = {took, waited, a->dtype, a->rows, a->width, m->ring ? NULL : at->y};
    int64_t bytes = 0;
    if (may_send(lane)) {
        Message now = message_on(lane);
        if (m->ring) put_in_ring(&now, lane, m->where, m->ring_bytes);
        bytes = put_outputs_message(&now, &a->ids, &outputs);
    }
    const int whole = bytes > 0 && send_now(lane, bytes);
    if (!note(served, a, waited, took)) return NULL;
    return whole ? Py_NewRef(Py_None) : unsent(a, &outputs, m, at);
}

/* What comes of the next message; 0 with nothing in `result` where it is not for here. */
static int answer_next(Answering *s, Lane *lane, PyObject *tables, PyObject *lock, PyObject *served, char *memory,
                       int64_t room, PyObject **result) {
    Whole w;
    Asked asked;
    Hosted hosted;
    Memory at;
    Message m;
    const int found = find_whole(lane, &w);
    if (found != TAKEN) return found;
    const double arrived = seconds();
    if (!read_forward(w.header, w.payload, &asked) || s->formats[asked.dtype] < 0 || s->closed) return OTHER;
    if (asked.where == INLINE && lane->end - lane->start < w.body + w.payload)
        return w.body + w.payload > lane->room ? OTHER : MORE;
    PyObject *kept = find_hosted(tables, &asked, &hosted);
    if (!kept) return OTHER;
    int did = OTHER;
    const Call sized = {.x_format = s->formats[asked.dtype], .y_format = s->formats[asked.dtype], .threads = s->threads,
                        .instructions = s->instructions};
    const int64_t kernels = s->scratch(hosted.layer, asked.rows, asked.count, &sized);
    const int64_t needed = lay_out(&at, memory, kernels, &asked) - memory, size = aligned(asked.rows * asked.width * SIZES[asked.dtype]);
    const uint8_t *payload;
    if (needed > room) {
        *result = PyLong_FromLongLong(needed);
        did = TAKEN;
    } else if (may_send(lane) && try_lock(lock)) {
        s->active++;
        if (!s->closed && find_payload(lane, &w, asked.where, &payload) == TAKEN) {
            if (copy_index(&asked, payload, at.token_of_row) && place(&m, lane, size)) {
                commit(lane, &m);
                pass(lane, &w, asked.where);
                *result = compute(s, lane, &asked, &hosted, payload, &at, &m, served, arrived);
                did = TAKEN;
            } else if (lane->in) {
                lane->in->head = lane->in->done; /* whoever reads it next holds it anew */
            }
        }
        if (!*result || !PyTuple_Check(*result)) s->active--; /* else it is, until the caller has sent the rest */
        let_go(lock);
    }
    Py_DECREF(kept);
    return did;
}

static const char ANSWER_USAGE[] = "answer(answering, lane, tables, lock, served, memory, room)";

/* Answer forwards as they come. answering: address of an Answering. tables: layer -> (address of its Layer, width of its
   rows, its experts' addresses as bytes of int64, what keeps them alive). lock: held by who computes. served: a deque,
   which gets (layer, experts and counts as bytes of int64, seconds waited and computed, when) of each. memory: `room`
   bytes, aligned to 64.

   Returns None where something else is to be read; a number of bytes where the next forward needs so much memory, 0 after
   MANY forwards; a tuple of what Result holds (with the place's position and address) of outputs that are still to be
   sent, an empty one where they went out in part; the forward is active until `sent` is called.
   The caller keeps others from receiving and from closing. Other threads run meanwhile. */
static PyObject *answer(PyObject *self, PyObject *const *args, Py_ssize_t count) {
    (void)self;
    if (!wants(count == 7 && PyDict_Check(args[2]), ANSWER_USAGE)) return NULL;
    Answering *s = PyLong_AsVoidPtr(args[0]);
    Lane *lane = PyLong_AsVoidPtr(args[1]);
    char *memory = PyLong_AsVoidPtr(args[5]);
    const int64_t room = number(args[6]);
    if (PyErr_Occurred()) return NULL;
    if (!lane || lane->fd < 0 || lane->reading) Py_RETURN_NONE;
    release(lane->in);
    for (int served = 0; served < MANY;) {
        PyObject *result = NULL;
        const int found = answer_next(s, lane, args[2], args[3], args[4], memory, room, &result);
        if (PyErr_Occurred()) {
            Py_XDECREF(result);
            return NULL;
        }
        if (found == OTHER) Py_RETURN_NONE;
        if (found == TAKEN) {
            if (result != Py_None) return result;
            Py_DECREF(result);
            if (lane->unsent_from != lane->unsent_to) {
                s->active++;
                return PyTuple_New(0);
            }
            served++;
            continue;
        }
        if (lane->start == lane->end) lane->start = lane->end = 0;
        if (lane->end == lane->room) Py_RETURN_NONE;
        ssize_t got;
        Py_BEGIN_ALLOW_THREADS
        got = recv((int)lane->fd, lane->buffer + lane->end, (size_t)(lane->room - lane->end), 0);
        Py_END_ALLOW_THREADS
        if (got <= 0) Py_RETURN_NONE;
        lane->end += got;
    }
    return PyLong_FromLong(0);
}

/* sent(answering): what `answer` had left of a forward has gone out, or never will. */
static PyObject *sent(PyObject *self, PyObject *address) {
    (void)self;
    Answering *s = PyLong_AsVoidPtr(address);
    if (PyErr_Occurred()) return NULL;
    s->active--;
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {{"answer", (PyCFunction)(void (*)(void))answer, METH_FASTCALL, ANSWER_USAGE},
                                {"sent", sent, METH_O, "sent(answering)"},
                                {NULL}};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, .m_name = "moeray.actors._native", .m_methods = methods};

PyMODINIT_FUNC PyInit__native(void) {
    acquire_name = PyUnicode_InternFromString("acquire");
    release_name = PyUnicode_InternFromString("release");
    append_name = PyUnicode_InternFromString("append");
    return acquire_name && release_name && append_name ? PyModule_Create(&module) : NULL;
}
