/* The least that C can do to hand blocks from one process to others: a ring of slots, a count of
 * those that were filled, and of each reader a count of those that were read. And how every way in
 * this benchmark fills a block with fresh data, and reads all of it.
 */
#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <sched.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

struct side {
    _Alignas(64) _Atomic uint64_t count;
};

/* Fresh data of two kinds. Copied: out of memory that no cache holds, another part each time, as fast
 * as this machine copies; both ends of a block tell its number. Computed: each word anew, of its
 * place and the block's number, a few cycles each; the reader computes it too, and compares. */
#define SOURCE ((size_t)128 << 20)

static char *source;
static int computed;

static inline uint64_t word_of(uint64_t number, size_t at) {
    uint64_t x = (number << 32 | at) * UINT64_C(0x9e3779b97f4a7c15);
    x = (x ^ x >> 29) * UINT64_C(0xbf58476d1ce4e5b9);
    return x ^ x >> 32;
}

static void fill(char *at, size_t nbytes, uint64_t number) {
    uint64_t *words = (uint64_t *)at;
    if (computed) {
        for (size_t word = 0; word < nbytes / 8; word++)
            words[word] = word_of(number, word);
        return;
    }
    for (size_t done = 0, part; done < nbytes; done += part) {
        size_t from = (number * nbytes + done) % SOURCE;
        part = nbytes - done < SOURCE - from ? nbytes - done : SOURCE - from;
        memcpy(at + done, source + from, part);
    }
    words[0] = words[nbytes / 8 - 1] = number;
}

static volatile uint64_t sink;

/* Every byte read: 0, or 1 where it is not the block of that number. */
static int read_all(const char *at, size_t nbytes, uint64_t number) {
    const uint64_t *words = (const uint64_t *)at;
    uint64_t sum = 0;
    if (computed) {
        for (size_t word = 0; word < nbytes / 8; word++)
            sum |= words[word] ^ word_of(number, word);
        return sum != 0;
    }
    for (size_t word = 0; word < nbytes / 8; word++)
        sum += words[word];
    sink = sum;
    return words[0] != number || words[nbytes / 8 - 1] != number;
}

static void await(_Atomic uint64_t *count, uint64_t value) {
    for (unsigned turn = 1; atomic_load_explicit(count, memory_order_acquire) < value; turn++) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
        if (turn % 64 == 0)
            sched_yield();
    }
}

/* sides[0]: the writer's; then one of each reader. */
static void produce(struct side *sides, int readers, char *slots, uint64_t slot_count, size_t stride,
             size_t nbytes, uint64_t first, uint64_t count) {
    for (uint64_t number = first; number < first + count; number++) {
        for (int reader = 1; reader <= readers && number >= slot_count; reader++)
            await(&sides[reader].count, number - slot_count + 1);
        fill(slots + number % slot_count * stride, nbytes, number);
        atomic_store_explicit(&sides[0].count, number + 1, memory_order_release);
    }
}

/* How many blocks were not as they should be. */
static uint64_t consume(struct side *sides, int reader, const char *slots, uint64_t slot_count,
                 size_t stride, size_t nbytes, uint64_t first, uint64_t count) {
    uint64_t wrong = 0;
    for (uint64_t number = first; number < first + count; number++) {
        await(&sides[0].count, number + 1);
        wrong += read_all(slots + number % slot_count * stride, nbytes, number);
        atomic_store_explicit(&sides[reader].count, number + 1, memory_order_release);
    }
    return wrong;
}

/* --- As Python calls it: an extension module, since a call of ctypes takes 0.3 us --------------- */

static int numbers(PyObject *const *arguments, Py_ssize_t given, uint64_t *found, int wanted) {
    for (int index = 0; index < wanted && given == wanted; index++) {
        found[index] = PyLong_AsUnsignedLongLong(arguments[index]);
        if (PyErr_Occurred())
            return -1;
    }
    if (given != wanted)
        PyErr_Format(PyExc_TypeError, "%d integers", wanted);
    return given == wanted ? 0 : -1;
}

static PyObject *py_fill(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    uint64_t to[3];
    if (numbers(arguments, given, to, 3) < 0)
        return NULL;
    fill((char *)to[0], to[1], to[2]);
    Py_RETURN_NONE;
}

static PyObject *py_read(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    uint64_t of[3];
    if (numbers(arguments, given, of, 3) < 0)
        return NULL;
    return PyBool_FromLong(read_all((char *)of[0], of[1], of[2]));
}

static PyObject *py_choose(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    uint64_t kind;
    if (numbers(arguments, given, &kind, 1) < 0)
        return NULL;
    computed = kind != 0;
    Py_RETURN_NONE;
}

static PyObject *py_produce(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    uint64_t of[8];
    if (numbers(arguments, given, of, 8) < 0)
        return NULL;
    produce((struct side *)of[0], (int)of[1], (char *)of[2], of[3], of[4], of[5], of[6], of[7]);
    return PyLong_FromLong(0);
}

static PyObject *py_consume(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    uint64_t of[8];
    if (numbers(arguments, given, of, 8) < 0)
        return NULL;
    return PyLong_FromUnsignedLongLong(consume((struct side *)of[0], (int)of[1], (char *)of[2],
                                               of[3], of[4], of[5], of[6], of[7]));
}

static PyMethodDef methods[] = {
    {"fill", (PyCFunction)(void (*)(void))py_fill, METH_FASTCALL, "address, nbytes, number"},
    {"read", (PyCFunction)(void (*)(void))py_read, METH_FASTCALL, "whether it is not that block"},
    {"choose", (PyCFunction)(void (*)(void))py_choose, METH_FASTCALL, "0: copied, 1: computed"},
    {"produce", (PyCFunction)(void (*)(void))py_produce, METH_FASTCALL, "as in C"},
    {"consume", (PyCFunction)(void (*)(void))py_consume, METH_FASTCALL, "as in C"},
    {NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "ring", NULL, -1, methods};

PyMODINIT_FUNC PyInit_ring(void) {
    source = malloc(SOURCE);
    if (source == NULL)
        return PyErr_NoMemory();
    for (size_t at = 0; at < SOURCE; at += sizeof(uint64_t))
        *(uint64_t *)(source + at) = at * UINT64_C(0x9e3779b97f4a7c15);
    return PyModule_Create(&module);
}
