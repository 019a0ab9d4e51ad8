// A client of a memdesc service in C: maps what is shared under names, and prints the checksums.
//
//     c_client SERVICE SHARE...
//
// Made of docs/protocol.md and the C library alone. What comes from the service is believed no
// more than it believes its clients: each value is checked before it is used.

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/un.h>

#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010
#endif

#define VERSION 3
#define MAX_MESSAGE 131072
#define MAX_FDS 253
#define PATIENCE 5.0 // seconds to wait for the service, and for it to share

static void __attribute__((noreturn, format(printf, 1, 2))) fail(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "c_client: ");
    vfprintf(stderr, format, arguments);
    fprintf(stderr, "\n");
    exit(1);
}

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

// -- MessagePack: as much as the protocol needs --------------------------------------------------

struct writer {
    uint8_t data[4096];
    size_t length;
};

static void put_bytes(struct writer *out, const void *bytes, size_t count)
{
    if (count > sizeof out->data - out->length)
        fail("a message of ours does not fit");
    memcpy(out->data + out->length, bytes, count);
    out->length += count;
}

static void put_byte(struct writer *out, uint8_t byte)
{
    put_bytes(out, &byte, 1);
}

static void put_big_endian(struct writer *out, uint64_t number, int bytes)
{
    while (bytes--)
        put_byte(out, (uint8_t)(number >> (8 * bytes)));
}

static void put_map(struct writer *out, int pairs)
{
    put_byte(out, 0x80 | pairs); // up to 15
}

static void put_text(struct writer *out, const char *text)
{
    size_t length = strlen(text);
    if (length > UINT16_MAX)
        fail("a text of %zu bytes", length);
    put_byte(out, 0xda);
    put_big_endian(out, length, 2);
    put_bytes(out, text, length);
}

static void put_integer(struct writer *out, int64_t number)
{
    put_byte(out, 0xd3);
    put_big_endian(out, (uint64_t)number, 8);
}

// A place in a message that was received. Whatever does not fit makes it `bad`, and stays so: then
// all that is read is zero, and the caller looks once, at the end.
struct reader {
    const uint8_t *at, *end;
    bool bad;
};

static uint64_t take_big_endian(struct reader *in, int bytes)
{
    uint64_t number = 0;
    if (in->bad || in->end - in->at < bytes) {
        in->bad = true;
        return 0;
    }
    while (bytes--)
        number = number << 8 | *in->at++;
    return number;
}

static const uint8_t *take_bytes(struct reader *in, uint64_t count)
{
    const uint8_t *found = in->at;
    if (in->bad || count > (uint64_t)(in->end - in->at)) {
        in->bad = true;
        return NULL;
    }
    in->at += count;
    return found;
}

// The head of text, an array or a map: their three encodings, by length, and one for short ones.
static uint64_t take_head(struct reader *in, uint8_t fixed, uint8_t mask, uint8_t first, bool bytes)
{
    uint8_t head = (uint8_t)take_big_endian(in, 1);
    if (!in->bad && (head & (uint8_t)~mask) == fixed)
        return head & mask;
    if (bytes && head == first)
        return take_big_endian(in, 1);
    if (head == first + bytes)
        return take_big_endian(in, 2);
    if (head == first + bytes + 1)
        return take_big_endian(in, 4);
    in->bad = true;
    return 0;
}

static uint64_t take_map(struct reader *in)
{
    return take_head(in, 0x80, 0x0f, 0xde, false);
}

static uint64_t take_array(struct reader *in)
{
    return take_head(in, 0x90, 0x0f, 0xdc, false);
}

struct text {
    const char *bytes;
    uint64_t length;
};

static struct text take_text(struct reader *in)
{
    struct text text = {.length = take_head(in, 0xa0, 0x1f, 0xd9, true)};
    text.bytes = (const char *)take_bytes(in, text.length);
    if (in->bad)
        text.length = 0;
    return text;
}

static bool is(struct text text, const char *word)
{
    return text.length == strlen(word) && memcmp(text.bytes, word, text.length) == 0;
}

// An integer of 0 or more: all that the protocol has for lengths, places and numbers.
static uint64_t take_natural(struct reader *in)
{
    uint8_t head = (uint8_t)take_big_endian(in, 1);
    if (in->bad || head < 0x80)
        return head;
    uint64_t number = 0;
    if (head >= 0xcc && head <= 0xcf)
        number = take_big_endian(in, 1 << (head - 0xcc));
    else if (head == 0xd3) // a signed one may come where it is positive
        number = take_big_endian(in, 8);
    else
        in->bad = true;
    if (number > INT64_MAX)
        in->bad = true;
    return in->bad ? 0 : number;
}

static bool take_bool(struct reader *in)
{
    uint8_t head = (uint8_t)take_big_endian(in, 1);
    if (head != 0xc2 && head != 0xc3)
        in->bad = true;
    return head == 0xc3;
}

static void skip(struct reader *in, int depth)
{
    static const uint8_t sizes[32] = {
        // nil, -, false, true; then those of fixed size, by their heads from 0xc0
        [0xca - 0xc0] = 4, [0xcb - 0xc0] = 8, [0xcc - 0xc0] = 1, [0xcd - 0xc0] = 2,
        [0xce - 0xc0] = 4, [0xcf - 0xc0] = 8, [0xd0 - 0xc0] = 1, [0xd1 - 0xc0] = 2,
        [0xd2 - 0xc0] = 4, [0xd3 - 0xc0] = 8, [0xd4 - 0xc0] = 2, [0xd5 - 0xc0] = 3,
        [0xd6 - 0xc0] = 5, [0xd7 - 0xc0] = 9, [0xd8 - 0xc0] = 17,
    };
    if (depth > 32 || in->bad || in->at == in->end) { // so deep is nothing of ours
        in->bad = true;
        return;
    }
    uint8_t head = *in->at;
    uint64_t items = 0;
    if ((head & 0xf0) == 0x80 || head == 0xde || head == 0xdf) {
        items = 2 * take_map(in);
    } else if ((head & 0xf0) == 0x90 || head == 0xdc || head == 0xdd) {
        items = take_array(in);
    } else if ((head & 0xe0) == 0xa0 || (head >= 0xd9 && head <= 0xdb)) {
        take_text(in);
    } else if (head >= 0xc4 && head <= 0xc6) { // bytes
        in->at++;
        take_bytes(in, take_big_endian(in, 1 << (head - 0xc4)));
    } else if (head >= 0xc7 && head <= 0xc9) { // an extension: its type is one byte more
        in->at++;
        take_bytes(in, take_big_endian(in, 1 << (head - 0xc7)) + 1);
    } else {
        in->at++;
        if (head >= 0xc0 && head <= 0xdf)
            take_bytes(in, sizes[head - 0xc0]);
    }
    while (items-- && !in->bad)
        skip(in, depth + 1);
}

// Give the value of a field of a map, or a bad place where there is none.
static struct reader field(struct reader map, const char *name)
{
    for (uint64_t pairs = take_map(&map); pairs && !map.bad; pairs--) {
        if (is(take_text(&map), name))
            return map;
        skip(&map, 0);
    }
    map.bad = true;
    return map;
}

static struct text text_of(struct reader map, const char *name)
{
    struct reader at = field(map, name);
    return take_text(&at);
}

static uint64_t natural_of(struct reader map, const char *name)
{
    struct reader at = field(map, name);
    return take_natural(&at);
}

// -- the connection ------------------------------------------------------------------------------

struct message {
    uint8_t data[MAX_MESSAGE];
    struct reader map;
    struct text type;
    int fds[MAX_FDS];
    int count;
};

static void send_message(int sock, const struct writer *out)
{
    if (send(sock, out->data, out->length, MSG_NOSIGNAL) < 0)
        fail("cannot send: %s", strerror(errno));
}

static void close_fds(struct message *message)
{
    while (message->count)
        close(message->fds[--message->count]);
}

// Receive one packet; false at the end of the connection.
static bool receive(int sock, struct message *message)
{
    union {
        struct cmsghdr align;
        char room[CMSG_SPACE(MAX_FDS * sizeof(int))];
    } control;
    struct iovec part = {message->data, sizeof message->data};
    struct msghdr header = {
        .msg_iov = &part,
        .msg_iovlen = 1,
        .msg_control = control.room,
        .msg_controllen = sizeof control.room,
    };
    ssize_t length = recvmsg(sock, &header, MSG_CMSG_CLOEXEC);
    if (length <= 0)
        return false;
    message->count = 0;
    for (struct cmsghdr *one = CMSG_FIRSTHDR(&header); one; one = CMSG_NXTHDR(&header, one)) {
        if (one->cmsg_level != SOL_SOCKET || one->cmsg_type != SCM_RIGHTS)
            continue;
        size_t came = (one->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        memcpy(message->fds + message->count, CMSG_DATA(one), came * sizeof(int));
        message->count += (int)came;
    }
    if (header.msg_flags & (MSG_TRUNC | MSG_CTRUNC))
        fail("a message, or its descriptors, did not arrive whole: `ulimit -n`?");
    message->map = (struct reader){message->data, message->data + length, false};
    message->type = text_of(message->map, "type");
    return true;
}

// Answer what the service asks of us: that we do not do.
static void refuse(int sock, uint64_t id)
{
    struct writer out = {.length = 0};
    put_map(&out, 6);
    put_text(&out, "type"), put_text(&out, "Failed");
    put_text(&out, "id"), put_integer(&out, (int64_t)id);
    put_text(&out, "error"), put_text(&out, "MappingError");
    put_text(&out, "message"), put_text(&out, "this client takes nothing from its service");
    put_text(&out, "errno"), put_integer(&out, EPERM);
    put_text(&out, "reason"), put_text(&out, "REFUSED");
    send_message(sock, &out);
}

// Wait for the answer to question `id`; what else comes meanwhile is refused, or is no concern.
static void wait_answer(int sock, uint64_t id, struct message *message)
{
    static const char *const questions[] = {"PushMapping", "PullMapping", "ReadMemory",
                                            "WriteMemory"};
    for (;;) {
        if (!receive(sock, message))
            fail("the service ended the connection");
        struct reader number = field(message->map, "id");
        uint64_t found = take_natural(&number);
        bool question = false;
        for (size_t i = 0; i < sizeof questions / sizeof *questions; i++)
            question = question || is(message->type, questions[i]);
        if (!number.bad && !question && found == id)
            return;
        if (!number.bad && question)
            refuse(sock, found);
        close_fds(message);
    }
}

static void socket_path(const char *name, struct sockaddr_un *address)
{
    const char *own = getenv("MEMDESC_RUNTIME_DIR"), *session = getenv("XDG_RUNTIME_DIR");
    const char *temporary = getenv("TMPDIR");
    char *path = address->sun_path;
    size_t room = sizeof address->sun_path;
    int length;
    if (strchr(name, '/'))
        length = snprintf(path, room, "%s", name);
    else if (own && *own)
        length = snprintf(path, room, "%s/%s", own, name);
    else if (session && *session)
        length = snprintf(path, room, "%s/memdesc/%s", session, name);
    else
        length = snprintf(path, room, "%s/memdesc-%u/%s",
                          temporary && *temporary ? temporary : "/tmp", geteuid(), name);
    if (length < 0 || (size_t)length >= room)
        fail("the path of service %s is too long", name);
    address->sun_family = AF_UNIX;
}

// Connect and greet, again where nobody listens yet or another process has the name by now.
static int connect_to(const char *name, struct message *message)
{
    struct sockaddr_un address = {0};
    socket_path(name, &address);
    for (double until = now() + PATIENCE;; usleep(10000)) {
        int sock = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
        if (sock < 0)
            fail("no socket: %s", strerror(errno));
        if (connect(sock, (struct sockaddr *)&address, sizeof address) == 0) {
            struct writer hello = {.length = 0};
            put_map(&hello, 2);
            put_text(&hello, "type"), put_text(&hello, "Hello");
            put_text(&hello, "version"), put_integer(&hello, VERSION);
            // A service that turns us away may have done so already: its reason can be read.
            if (send(sock, hello.data, hello.length, MSG_NOSIGNAL) < 0 && errno != EPIPE)
                fail("cannot send: %s", strerror(errno));
            if (!receive(sock, message))
                fail("service %s speaks another version, or ended", name);
            close_fds(message);
            if (is(message->type, "Welcome"))
                return sock;
            if (!is(message->type, "Moved")) {
                struct text why = text_of(message->map, "message");
                fail("not admitted: %.*s", (int)why.length, why.bytes);
            }
        } else if (errno != ENOENT && errno != ECONNREFUSED) {
            fail("cannot connect to %s: %s", address.sun_path, strerror(errno));
        }
        close(sock);
        if (now() > until)
            fail("no service %s at %s", name, address.sun_path);
    }
}

// -- the share -----------------------------------------------------------------------------------

static void open_share(int sock, const char *name, struct message *message)
{
    static uint64_t id;
    for (double until = now() + PATIENCE;; usleep(10000)) {
        struct writer out = {.length = 0};
        put_map(&out, 3);
        put_text(&out, "type"), put_text(&out, "OpenShare");
        put_text(&out, "id"), put_integer(&out, (int64_t)++id);
        put_text(&out, "name"), put_text(&out, name);
        send_message(sock, &out);
        wait_answer(sock, id, message);
        if (is(message->type, "Opened"))
            return;
        struct text why = text_of(message->map, "message");
        if (!is(text_of(message->map, "error"), "ShareNotFoundError") || now() > until)
            fail("%.*s", (int)why.length, why.bytes);
        close_fds(message);
    }
}

// Check an object as the kernel shows it; give its size.
static uint64_t check_object(int fd, bool writable)
{
    int seals = fcntl(fd, F_GET_SEALS);
    if (seals < 0 || !(seals & F_SEAL_SHRINK))
        fail("what came could be truncated under us: no memfd, or not sealed against it");
    if (!writable && !(seals & (F_SEAL_WRITE | F_SEAL_FUTURE_WRITE)))
        fail("what came as read-only can be written by others");
    struct stat status;
    if (fstat(fd, &status) < 0 || status.st_size < 0)
        fail("fstat: %s", strerror(errno));
    return (uint64_t)status.st_size;
}

// Adler-32 (RFC 1950), as zlib.adler32 has it.
static uint32_t checksum(uint32_t sum, const uint8_t *bytes, uint64_t count)
{
    uint32_t low = sum & 0xffff, high = sum >> 16;
    for (uint64_t i = 0; i < count; i++) {
        low = (low + bytes[i]) % 65521;
        high = (high + low) % 65521;
    }
    return high << 16 | low;
}

// Map one piece, read-only, and go on with the sum over it.
static uint32_t sum_piece(int fd, uint64_t offset, uint64_t length, uint32_t sum)
{
    struct statvfs system;
    if (fstatvfs(fd, &system) < 0)
        fail("fstatvfs: %s", strerror(errno));
    uint64_t page = system.f_bsize; // of huge pages theirs
    uint64_t start = offset / page * page, skipped = offset - start;
    uint8_t *mapped = mmap(NULL, skipped + length, PROT_READ, MAP_SHARED, fd, (off_t)start);
    if (mapped == MAP_FAILED)
        fail("mmap: %s", strerror(errno));
    sum = checksum(sum, mapped + skipped, length);
    munmap(mapped, skipped + length);
    return sum;
}

static void print_share(const char *name, struct message *message)
{
    struct reader portable = field(message->map, "portable");
    struct reader may_write = field(portable, "writable");
    bool writable = take_bool(&may_write);
    struct reader pieces = field(portable, "pieces");
    uint64_t sizes[MAX_FDS], total = 0;
    for (int i = 0; i < message->count; i++)
        sizes[i] = check_object(message->fds[i], writable);
    uint64_t count = take_array(&pieces);
    uint32_t sum = 1;
    for (uint64_t i = 0; i < count && !pieces.bad; i++) {
        uint64_t three = take_array(&pieces), object = take_natural(&pieces);
        uint64_t offset = take_natural(&pieces), length = take_natural(&pieces);
        if (pieces.bad || three != 3 || object >= (uint64_t)message->count || length == 0 ||
            offset > sizes[object] || length > sizes[object] - offset)
            fail("a piece of %s is not within what came", name);
        sum = sum_piece(message->fds[object], offset, length, sum);
        total += length;
    }
    struct reader share = field(message->map, "share");
    if (pieces.bad || may_write.bad || share.bad || natural_of(portable, "version") != 1 ||
        natural_of(share, "nbytes") != total)
        fail("the answer makes no sense");
    printf("%s: %" PRIu64 " bytes in %" PRIu64 " pieces of %d objects, %s, checksum %08" PRIx32 "\n",
           name, total, count, message->count, writable ? "writable" : "read-only", sum);
}

int main(int count, char **arguments)
{
    static struct message message;
    if (count < 3)
        fail("usage: c_client SERVICE SHARE...");
    int sock = connect_to(arguments[1], &message);
    for (int i = 2; i < count; i++) {
        open_share(sock, arguments[i], &message);
        print_share(arguments[i], &message);
        close_fds(&message);
    }
    close(sock);
    return 0;
}
