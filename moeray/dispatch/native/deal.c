/* A layer's plan in one pass, where no expert has so many rows that it might be split: plan.py and balance.py say the
   same in Python, which the numbers here follow to the last bit. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

/* A layer's replicas, as plan.py packs them; behind it `rates` [actors], `first` [experts + 1] and the actors of every
   expert, those of expert e from first[e] on. */
typedef struct {
    double near, decay;
    int64_t read, split_from, experts, actors;
} Table;

typedef struct {
    const Table *table;
    const double *rates;
    const int32_t *first, *hosts;
    const int64_t *ids;
    int64_t rows, top_k, present_count;
    /* of every expert: its rows, the actor that serves them, where the next of them goes; those that are chosen */
    int32_t *count, *owner, *present, *free;
    int64_t **next;
    double *cost, *carry;
    int32_t *place; /* of every token: in the share at hand */
} Deal;

/* Whether the table and carry are as long as they say, and all rates such that no cost is infinite or none. */
static int fits(const Deal *d, Py_ssize_t table_bytes, Py_ssize_t carry_bytes) {
    const int64_t actors = d->table->actors, hosts = (const char *)d->hosts - (const char *)d->table;
    if (carry_bytes != actors * (int64_t)sizeof(double) || hosts > table_bytes) return 0;
    if (table_bytes != hosts + d->first[d->table->experts] * (int64_t)sizeof(int32_t)) return 0;
    for (int64_t a = 0; a < actors; a++)
        if (!(d->rates[a] > 1e-100 && d->rates[a] < 1e100)) return 0;
    return d->rows <= INT32_MAX;
}

static int64_t replicas_of(const Deal *d, int32_t expert) { return d->first[expert + 1] - d->first[expert]; }

/* Counts the rows. 0 where one of its experts has no replica, or so many rows that it may be split. */
static int count_rows(Deal *d) {
    for (int64_t r = 0; r < d->rows; r++) {
        if (d->ids[r] < 0 || d->ids[r] >= d->table->experts) return 0;
        d->count[d->ids[r]]++;
    }
    for (int32_t e = 0; e < d->table->experts; e++) {
        if (!d->count[e]) continue;
        if (!replicas_of(d, e) || (replicas_of(d, e) > 1 && d->count[e] >= d->table->split_from)) return 0;
        d->present[d->present_count++] = e;
    }
    return 1;
}

/* What an expert costs, in rows: its weights are read also for few. */
static double work(const Deal *d, int32_t expert) {
    return d->count[expert] > d->table->read ? d->count[expert] : d->table->read;
}

/* The actor that is done first with the expert's rows; among nearly equal ones the one rested longest. */
static int32_t cheapest(const Deal *d, int32_t expert) {
    int32_t best = -1;
    double best_done = Py_HUGE_VAL, least = Py_HUGE_VAL;
    for (int32_t i = d->first[expert]; i < d->first[expert + 1]; i++) {
        const int32_t actor = d->hosts[i];
        const double done = d->cost[actor] + work(d, expert) * (1.0 / d->rates[actor]);
        if (done < least) least = done;
        const int near = done <= d->table->near * least;
        const int rested = best >= 0 && (d->carry[actor] < d->carry[best] ||
                                         (d->carry[actor] == d->carry[best] && done < best_done));
        if (best_done > d->table->near * least || (near && rested)) best = actor, best_done = done;
    }
    return best;
}

/* Most rows first, then in order. */
static void sort_free(const int32_t *count, int32_t *free, int64_t size) {
    for (int64_t i = 1; i < size; i++) {
        const int32_t expert = free[i];
        int64_t to = i;
        for (; to > 0 && count[free[to - 1]] < count[expert]; to--) free[to] = free[to - 1];
        free[to] = expert;
    }
}

static void rest(Deal *d, int32_t expert) {
    d->carry[d->owner[expert]] += work(d, expert) / d->rates[d->owner[expert]];
}

static void choose_owners(Deal *d) {
    int64_t free = 0;
    for (int64_t i = 0; i < d->present_count; i++) {
        const int32_t e = d->present[i], actor = d->hosts[d->first[e]];
        if (replicas_of(d, e) > 1) {
            d->free[free++] = e;
            continue;
        }
        d->owner[e] = actor;
        d->cost[actor] += work(d, e) / d->rates[actor];
    }
    sort_free(d->count, d->free, free);
    for (int64_t i = 0; i < free; i++) {
        const int32_t e = d->free[i], actor = d->owner[e] = cheapest(d, e);
        d->cost[actor] += work(d, e) * (1.0 / d->rates[actor]);
    }
    for (int64_t a = 0; a < d->table->actors; a++) d->carry[a] = d->carry[a] > 1e-6 ? d->carry[a] * d->table->decay : 0;
    for (int64_t i = 0; i < d->present_count; i++)
        if (replicas_of(d, d->present[i]) == 1) rest(d, d->present[i]);
    for (int64_t i = 0; i < free; i++) rest(d, d->free[i]);
}

/* -- the shares ---------------------------------------------------------------------------------------------------- */

static PyObject *ints(int64_t count) { return PyBytes_FromStringAndSize(NULL, count * (Py_ssize_t)sizeof(int64_t)); }

static int64_t *values(PyObject *bytes) { return (int64_t *)PyBytes_AS_STRING(bytes); }

/* (actor, experts, counts, rows): the rows are filled in by `put_rows`. */
static PyObject *begin_share(Deal *d, int32_t actor) {
    PyObject *experts = PyList_New(0), *counts = PyList_New(0), *rows = NULL, *share = NULL;
    int64_t total = 0;
    if (!experts || !counts) goto done;
    for (int64_t i = 0; i < d->present_count; i++) {
        const int32_t e = d->present[i];
        if (d->owner[e] != actor) continue;
        PyObject *expert = PyLong_FromLong(e), *count = PyLong_FromLong(d->count[e]);
        const int failed = !expert || !count || PyList_Append(experts, expert) || PyList_Append(counts, count);
        Py_XDECREF(expert);
        Py_XDECREF(count);
        if (failed) goto done;
        total += d->count[e];
    }
    if (!(rows = ints(total))) goto done;
    int64_t *next = values(rows);
    for (int64_t i = 0; i < d->present_count; i++) {
        const int32_t e = d->present[i];
        if (d->owner[e] != actor) continue;
        d->next[e] = next;
        next += d->count[e];
    }
    share = Py_BuildValue("lOOO", (long)actor, experts, counts, rows);
done:
    Py_XDECREF(experts);
    Py_XDECREF(counts);
    Py_XDECREF(rows);
    return share;
}

/* The share with its distinct tokens and each row's place among them. */
static PyObject *end_share(Deal *d, PyObject *begun) {
    PyObject *rows = PyTuple_GET_ITEM(begun, 3);
    const int64_t count = PyBytes_GET_SIZE(rows) / (Py_ssize_t)sizeof(int64_t), tokens = d->rows / d->top_k;
    memset(d->place, 0, tokens * sizeof *d->place);
    for (int64_t i = 0; i < count; i++) d->place[values(rows)[i] / d->top_k] = 1;
    int64_t used = 0;
    for (int64_t t = 0; t < tokens; t++) used += d->place[t];
    PyObject *used_U = ints(used), *places_R = ints(count), *share = NULL;
    if (used_U && places_R) {
        int32_t at = 0;
        for (int64_t t = 0; t < tokens; t++) {
            if (!d->place[t]) continue;
            values(used_U)[at] = t;
            d->place[t] = at++;
        }
        for (int64_t i = 0; i < count; i++) values(places_R)[i] = d->place[values(rows)[i] / d->top_k];
        share = PyTuple_Pack(6, PyTuple_GET_ITEM(begun, 0), PyTuple_GET_ITEM(begun, 1), PyTuple_GET_ITEM(begun, 2), rows,
                             used_U, places_R);
    }
    Py_XDECREF(used_U);
    Py_XDECREF(places_R);
    return share;
}

/* Those of all actors that get rows, in the actors' order. */
static PyObject *shares_of(Deal *d) {
    PyObject *shares = PyList_New(0);
    for (int32_t a = 0; shares && a < d->table->actors; a++) {
        if (!d->cost[a]) continue;
        PyObject *share = begin_share(d, a);
        if (!share || PyList_Append(shares, share)) Py_CLEAR(shares);
        Py_XDECREF(share);
    }
    if (!shares) return NULL;
    for (int64_t r = 0; r < d->rows; r++) *d->next[d->ids[r]]++ = r;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(shares); i++) {
        PyObject *share = end_share(d, PyList_GET_ITEM(shares, i));
        if (!share) {
            Py_DECREF(shares);
            return NULL;
        }
        PyList_SetItem(shares, i, share);
    }
    return shares;
}

/* -- what Python calls --------------------------------------------------------------------------------------------- */

/* Points `d` into the table and into `memory`, or says how much of that it needs where there is none. */
static size_t lay_out(Deal *d, const char *table, char *memory) {
    const size_t experts = d->table->experts, actors = d->table->actors, tokens = d->rows / d->top_k;
    d->rates = (const double *)(table + sizeof(Table));
    d->first = (const int32_t *)(d->rates + actors);
    d->hosts = d->first + experts + 1;
    d->cost = (double *)memory;
    d->next = (int64_t **)(d->cost + actors);
    d->count = (int32_t *)(d->next + experts);
    d->owner = d->count + experts;
    d->present = d->owner + experts;
    d->free = d->present + experts;
    d->place = d->free + experts;
    return (char *)(d->place + tokens) - memory;
}

/* deal(table, carry, ids, tokens, top_k): the shares of the rows whose experts lie at the address `ids`, int64
   [tokens, top_k], and `carry` (double [actors], a bytearray) as it is afterwards; None where it takes more. */
static PyObject *deal(PyObject *self, PyObject *const *args, Py_ssize_t arg_count) {
    (void)self;
    if (arg_count != 5 || !PyBytes_Check(args[0]) || !PyByteArray_Check(args[1])) {
        PyErr_SetString(PyExc_TypeError, "deal(table: bytes, carry: bytearray, ids, tokens, top_k)");
        return NULL;
    }
    const char *table = PyBytes_AS_STRING(args[0]);
    Deal d = {.table = (const Table *)table, .carry = (double *)PyByteArray_AS_STRING(args[1])};
    d.ids = PyLong_AsVoidPtr(args[2]);
    d.top_k = PyLong_AsLongLong(args[4]);
    d.rows = PyLong_AsLongLong(args[3]) * d.top_k;
    if (PyErr_Occurred()) return NULL;
    if (d.rows <= 0) Py_RETURN_NONE;
    const size_t size = lay_out(&d, table, NULL);
    char *memory = PyMem_Calloc(1, size);
    if (!memory) return PyErr_NoMemory();
    lay_out(&d, table, memory);
    PyObject *shares;
    if (fits(&d, PyBytes_GET_SIZE(args[0]), PyByteArray_GET_SIZE(args[1])) && count_rows(&d)) {
        choose_owners(&d);
        shares = shares_of(&d);
    } else {
        shares = Py_NewRef(Py_None);
    }
    PyMem_Free(memory);
    return shares;
}

static PyMethodDef methods[] = {{"deal", (PyCFunction)(void (*)(void))deal, METH_FASTCALL, NULL}, {NULL}};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, .m_name = "moeray.dispatch._native", .m_methods = methods};

PyMODINIT_FUNC PyInit__native(void) { return PyModule_Create(&module); }
