/* A layer's rows, from the gate's choice to the sums of the experts' outputs, in one call: dealt out, sent, waited for and
   combined without a line of Python between. What is unusual, or went wrong, is left to delivery.py. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "../../model/kernels/native/combine.h"
#include "../../wire/native/lane_out.h"
#include "../../wire/native/results.h"
#include "deal.h"

/* Where a share stands. IN_PART: the rest of it is still to be sent. */
enum { NOT_SENT, SENT, IN_PART, ANSWERED };

/* -- for Python ---------------------------------------------------------------------------------------------------- */

static PyObject *as_bytes(const int64_t *values, int64_t count) {
    return PyBytes_FromStringAndSize((const char *)values, count * (Py_ssize_t)sizeof *values);
}

static PyObject *as_list(const int64_t *values, int64_t count) {
    PyObject *list = PyList_New(count);
    for (int64_t i = 0; list && i < count; i++) {
        PyObject *value = PyLong_FromLongLong(values[i]);
        if (!value) Py_CLEAR(list);
        else PyList_SET_ITEM(list, i, value);
    }
    return list;
}

/* (actor, experts, counts, rows, tokens, token_of_row); the first is the actor's place among those of the table. */
static PyObject *as_tuple(const Share *s) {
    return Py_BuildValue("LNNNNN", s->actor, as_list(s->experts, s->expert_count), as_list(s->counts, s->expert_count),
                         as_bytes(s->row, s->rows), as_bytes(s->tokens, s->used), as_bytes(s->token_of_row, s->rows));
}

static int append(PyObject *list, PyObject *item) {
    const int did = item && !PyList_Append(list, item);
    Py_XDECREF(item);
    return did;
}

/* -- planning ------------------------------------------------------------------------------------------------------ */

/* args: table, carry, ids, tokens, top_k. Memory with the shares in `d`, to be freed; NULL with an exception. `dealt` is
   0 where it takes more. */
static char *deal_from(PyObject *const *args, Deal *d, int *dealt, const char *usage) {
    if (!wants(PyBytes_Check(args[0]) && PyByteArray_Check(args[1]), usage)) return NULL;
    const char *table = PyBytes_AS_STRING(args[0]);
    *d = (Deal){.table = (const Table *)table,
                .carry = (double *)PyByteArray_AS_STRING(args[1]),
                .ids = PyLong_AsVoidPtr(args[2]),
                .top_k = number(args[4])};
    d->rows = number(args[3]) * d->top_k;
    if (PyErr_Occurred()) return NULL;
    char *memory = PyMem_Calloc(1, d->rows > 0 ? lay_out(d, table, NULL) : 1);
    if (!memory) return (char *)PyErr_NoMemory();
    *dealt = d->rows > 0 && deal_rows(d, table, PyBytes_GET_SIZE(args[0]), PyByteArray_GET_SIZE(args[1]), memory);
    return memory;
}

static const char DEAL_USAGE[] = "deal(table: bytes, carry: bytearray, ids, tokens, top_k)";

/* The shares of the rows whose experts lie at the address `ids`, int64 [tokens, top_k], as tuples, and `carry` (double
   [actors]) as it is afterwards; None where it takes more. */
static PyObject *deal(PyObject *self, PyObject *const *args, Py_ssize_t arg_count) {
    (void)self;
    Deal d;
    int dealt;
    char *memory = wants(arg_count == 5, DEAL_USAGE) ? deal_from(args, &d, &dealt, DEAL_USAGE) : NULL;
    if (!memory) return NULL;
    PyObject *shares = dealt ? PyList_New(0) : Py_NewRef(Py_None);
    for (int64_t i = 0; shares && i < d.share_count; i++)
        if (!append(shares, as_tuple(d.shares + i))) Py_CLEAR(shares);
    PyMem_Free(memory);
    return shares;
}

/* -- a layer ------------------------------------------------------------------------------------------------------- */

/* Shares on their way. */
typedef struct {
    const Share *share;
    Lane *lane;
    int64_t id;
    double sent_at, took_s;
    int state;
} Post;

static void send_share(Post *p, const Ids *ids, Rows *rows) {
    const Share *s = p->share;
    rows->experts = s->experts;
    rows->counts = s->counts;
    rows->tokens = s->tokens;
    rows->token_of_row = s->token_of_row;
    rows->expert_count = s->expert_count;
    rows->used = s->used;
    rows->rows = s->rows;
    if (!p->lane || !send_rows(p->lane, ids, rows)) return;
    p->state = p->lane->unsent_from == p->lane->unsent_to ? SENT : IN_PART;
    p->id = ids->id;
    p->sent_at = seconds();
}

/* The last answer, which is read where it lies; `from` is NULL where there is none. */
typedef struct {
    const Post *from;
    Answer answer;
} Held;

/* Take answers until all have come, one of them is unusual, or the time is over. The last one is only held, where `held`
   is given: it is then for the caller to `be_done` with it. 0 with an exception. */
static int gather(Post *posts, int64_t count, const Target *target, double within_s, double *slowest, Held *held) {
    Wanted wanted[MAX_LANES];
    Post *of[MAX_LANES];
    int64_t left = 0;
    for (int64_t i = 0; i < count; i++) {
        if (posts[i].state != SENT) return 1; /* nobody waits before all are on their way */
        of[left] = posts + i;
        wanted[left++] = (Wanted){posts[i].lane, posts[i].id, posts[i].share->rows, posts[i].share->row};
    }
    const double until = seconds() + within_s;
    while (left) {
        Answer answer;
        int found;
        const double rest = until - seconds();
        const int64_t first = find_first(wanted, left, target, rest > 0 ? rest : 0, left < count, &answer, &found);
        if (first == FAILED) return 0;
        if (first == NONE_IN_TIME || found == OTHER) return 1;
        of[first]->state = ANSWERED;
        of[first]->took_s = seconds() - of[first]->sent_at;
        if (answer.compute_s > *slowest) *slowest = answer.compute_s;
        if (held && left == 1) *held = (Held){of[first], answer};
        else take(wanted + first, target, &answer);
        left--;
        wanted[first] = wanted[left];
        of[first] = of[left];
    }
    return 1;
}

/* -- the sums ------------------------------------------------------------------------------------------------------ */

/* What combines, and what it is told. */
typedef struct {
    void (*run)(const Combine *, const void *const *rows, int64_t tokens, int64_t top_k, int64_t size);
    Combine call;
} Sum;

/* item: (address of moeray_combine, format, weights_format, weights, out, threads), or None. 0 with an exception. */
static int read_sum(PyObject *item, Sum *sum, const char *usage) {
    sum->run = NULL;
    if (item == Py_None) return 1;
    if (!wants(PyTuple_Check(item) && PyTuple_GET_SIZE(item) == 6, usage)) return 0;
    int64_t n[6];
    for (int i = 0; i < 6; i++) n[i] = number(PyTuple_GET_ITEM(item, i));
    sum->run = (void (*)(const Combine *, const void *const *, int64_t, int64_t, int64_t))n[0];
    sum->call = (Combine){n[1], n[2], (const void *)n[3], (void *)n[4], n[5]};
    return !PyErr_Occurred();
}

/* Combine the rows, of which those that are held lie on their lane and all others in their places. The interpreter's lock
   is kept, since whoever closes the channel would take their memory away. */
static void combine(const Sum *sum, const Deal *d, const Target *target, const Held *held, const void **rows) {
    for (int64_t r = 0; r < d->rows; r++) rows[r] = target->out + r * target->row_bytes;
    const Share *share = held->from->share;
    for (int64_t r = 0; r < share->rows; r++) rows[share->row[r]] = held->answer.rows + r * target->row_bytes;
    sum->run(&sum->call, rows, d->rows / d->top_k, d->top_k, target->width);
    be_done(held->from->lane, &held->answer);
}

/* (answered, left, slowest, combined_s): see `layer`. */
static PyObject *outcome(const Post *posts, int64_t count, double slowest, double combined_s) {
    PyObject *answered = PyList_New(0), *left = PyList_New(0);
    for (int64_t i = 0; answered && left && i < count; i++) {
        const Post *p = posts + i;
        const Share *s = p->share;
        const int did = p->state == ANSWERED
            ? append(answered, Py_BuildValue("LNLLd", s->actor, as_list(s->experts, s->expert_count), s->rows, s->used, p->took_s))
            : append(left, Py_BuildValue("NLi", as_tuple(s), p->id, p->state == IN_PART));
        if (!did) Py_CLEAR(answered);
    }
    if (answered && left) return Py_BuildValue("NNdd", answered, left, slowest, combined_s);
    Py_XDECREF(answered);
    Py_XDECREF(left);
    return NULL;
}

static const char LAYER_USAGE[] =
    "layer(table, carry, ids, tokens, top_k, lanes, first_id, layer, epoch, dtype, x, width, out, within_s, sum)";

/* Deal out the rows as `deal` does, send each share on its actor's lane (addresses, 0: there is none) as the frame
   first_id + its place, wait for the outputs `within_s` seconds at most, and put them in their places. x, out: addresses
   of [tokens, width] and [tokens, top_k, width] of the dtype with that code. sum: None, or as `read_sum` has it: once all
   outputs are there they are combined, and need not be in `out`.

   Returns (answered, left, slowest, combined_s), or None where `deal` does, with nothing sent. answered: (actor, experts,
   rows, tokens, seconds) of the shares whose rows have come; left: (share as `deal` has it, id or 0 where it was not
   sent, whether it went out only in part) of the others; slowest: the longest that an actor says that it computed;
   combined_s: seconds that the sum took, 0 where nothing was combined, since something is left. */
static PyObject *layer(PyObject *self, PyObject *const *args, Py_ssize_t arg_count) {
    (void)self;
    Deal d;
    Sum sum;
    int dealt;
    if (!wants(arg_count == 15 && PyList_Check(args[5]) && PyFloat_Check(args[13]), LAYER_USAGE)) return NULL;
    if (!read_sum(args[14], &sum, LAYER_USAGE)) return NULL;
    char *memory = deal_from(args, &d, &dealt, LAYER_USAGE);
    if (!memory) return NULL;
    Ids ids = {number(args[6]), number(args[7]), number(args[8])};
    Rows rows = {.dtype = number(args[9]), .x = PyLong_AsVoidPtr(args[10]), .width = number(args[11])};
    PyObject *result = NULL;
    Post *posts = PyMem_New(Post, d.share_count + 1);
    const void **places = sum.run ? PyMem_New(const void *, d.rows + 1) : NULL;
    if (!wants(posts && (places || !sum.run) && !PyErr_Occurred() && rows.dtype >= 0 &&
                   rows.dtype < (int64_t)sizeof SIZES && rows.width >= 0 &&
                   (!dealt || PyList_GET_SIZE(args[5]) == d.table->actors), LAYER_USAGE))
        goto done;
    if (!dealt) {
        result = Py_NewRef(Py_None);
        goto done;
    }
    for (int64_t i = 0; i < d.share_count; i++, ids.id++) {
        posts[i] = (Post){.share = d.shares + i, .lane = PyLong_AsVoidPtr(PyList_GET_ITEM(args[5], d.shares[i].actor))};
        if (i < MAX_LANES) send_share(posts + i, &ids, &rows);
    }
    const int64_t row_bytes = rows.width * SIZES[rows.dtype];
    const Target target = {rows.dtype, rows.width, row_bytes, d.rows, PyLong_AsVoidPtr(args[12])};
    double slowest = 0, combined_s = 0;
    Held held = {NULL};
    /* An exception of the wait (a signal's) comes through; what was sent is then answered to nobody. */
    if (PyErr_Occurred() ||
        !gather(posts, d.share_count, &target, PyFloat_AS_DOUBLE(args[13]), &slowest, sum.run ? &held : NULL))
        goto done;
    if (held.from) {
        const double began = seconds();
        combine(&sum, &d, &target, &held, places);
        combined_s = seconds() - began;
    }
    result = outcome(posts, d.share_count, slowest, combined_s);
done:
    PyMem_Free(places);
    PyMem_Free(posts);
    PyMem_Free(memory);
    return result;
}

static PyMethodDef methods[] = {{"deal", (PyCFunction)(void (*)(void))deal, METH_FASTCALL, DEAL_USAGE},
                                {"layer", (PyCFunction)(void (*)(void))layer, METH_FASTCALL, LAYER_USAGE},
                                {NULL}};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, .m_name = "moeray.dispatch._native", .m_methods = methods};

PyMODINIT_FUNC PyInit__native(void) { return PyModule_Create(&module); }
