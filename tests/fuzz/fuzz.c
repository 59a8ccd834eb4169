/* fuzz.c: one file's bytes to the reader of its format, for libFuzzer (tests/fuzz.sh). FORMAT is one of jpeg, png,
 * audio, safetensors, npy.
 *
 * Images and audio are decoded by the C core. The other two formats are read by Lua files on top of it: an interpreter
 * runs them, and a hook tells libFuzzer the pairs of lines that follow each other as if they were edges of C. There, an
 * error whose words are LuaJIT's own is a fault like a crash.
 */
#define _GNU_SOURCE /* memfd_create */
#include <lauxlib.h>
#include <lualib.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include <zlib.h>

#include "core/vertex.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t room);

static int is(const char *format) { return strcmp(FORMAT, format) == 0; }

/* -- Images -------------------------------------------------------------------------------------------------------- */

static void decode_image(const uint8_t *data, size_t size)
{
    vx_tensor *x = NULL, *small = NULL;
    if (vx_image_decode(&x, data, size)) {
        if (!*vx_error()) abort();
        return;
    }
    int64_t shape[3] = {3, 5, 3};
    if (vx_ndim(x) != 3 || vx_size(x, 2) != 3 || vx_numel(x) < 3) abort();
    if (vx_new(&small, 0, VX_U8, 3, shape) || vx_image_resize(small, x, "bilinear")) abort();
    vx_free(small);
    vx_free(x);
}

/* Makes the chunks' sums of a PNG right, so that what was changed is read. */
static void sum_chunks(uint8_t *data, size_t size)
{
    for (size_t at = 8; at + 12 <= size;) {
        const size_t length = (size_t)data[at] << 24 | data[at + 1] << 16 | data[at + 2] << 8 | data[at + 3];
        if (length > size - at - 12) break;
        const uint32_t sum = (uint32_t)crc32(0, data + at + 4, (uInt)length + 4);
        for (int i = 0; i < 4; i++) data[at + 8 + length + i] = (uint8_t)(sum >> (24 - 8 * i));
        at += length + 12;
    }
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t room, unsigned seed);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t room, unsigned seed)
{
    size = LLVMFuzzerMutate(data, size, room);
    if (is("png") && seed % 4) sum_chunks(data, size);
    return size;
}

/* -- What is read from a file -------------------------------------------------------------------------------------- */

/* Makes an unnamed file of the bytes; *path: where it can be opened. */
static int file_of(const uint8_t *data, size_t size, char path[32])
{
    const int fd = memfd_create("fuzz", 0);
    if (fd < 0 || write(fd, data, size) != (ssize_t)size) abort();
    snprintf(path, 32, "/proc/self/fd/%d", fd);
    return fd;
}

static void decode_audio(const char *path)
{
    vx_audio_info info;
    vx_tensor *x = NULL;
    if (vx_audio_scan(&path, 1, &info)) abort();
    if (!vx_audio_open(&x, path, 0, "medium", &info) && vx_numel(x) != info.frames) abort();
    vx_free(x);
    x = NULL;
    if (info.frames < 100000 && !vx_audio_open(&x, path, 16000, "medium", &info) && vx_ndim(x) != 1) abort();
    vx_free(x);
}

/* -- Readers in Lua ------------------------------------------------------------------------------------------------ */

__attribute__((section("__libfuzzer_extra_counters"))) static uint8_t counters[1 << 15];

__attribute__((no_sanitize("coverage"))) static void count_line(lua_State *L, lua_Debug *where)
{
    static size_t last;
    size_t here = (size_t)where->currentline;
    lua_getinfo(L, "S", where);
    for (const char *c = where->source; *c; c++) here = here * 31 + (size_t)*c;
    counters[(last ^ here) % sizeof counters]++;
    last = here >> 1;
}

static const char *const READ = "require('jit').off()\n"
                                "package.path = ROOT .. '/lua/?.lua;' .. ROOT .. '/lua/?/init.lua'\n"
                                "local vx = require 'vertex'\n"
                                "local load = require('vertex.' .. FORMAT).load\n"
                                "vx.memory_limit(300e6)\n"
                                "return function(path)\n"
                                "  local ok, message = pcall(vx.step, function() load(path) end)\n"
                                "  if ok or type(message) == 'string' and not message:find '^[^:]*%.lua:%d+:' then\n"
                                "    return\n"
                                "  end\n"
                                "  return tostring(message)\n"
                                "end\n";

static void read_in_lua(const char *path)
{
    static lua_State *L;
    if (!L) {
        L = luaL_newstate();
        luaL_openlibs(L);
        lua_pushstring(L, ROOT);
        lua_setglobal(L, "ROOT");
        lua_pushstring(L, FORMAT);
        lua_setglobal(L, "FORMAT");
        if (luaL_dostring(L, READ)) {
            fprintf(stderr, "%s\n", lua_tostring(L, -1));
            exit(1);
        }
        lua_sethook(L, count_line, LUA_MASKLINE, 0);
    }
    lua_pushvalue(L, 1);
    lua_pushstring(L, path);
    lua_call(L, 1, 1);
    if (!lua_isnil(L, -1)) {
        fprintf(stderr, "told from inside: %s\n", lua_tostring(L, -1));
        abort();
    }
    lua_pop(L, 1);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (is("jpeg") || is("png")) decode_image(data, size);
    else {
        char path[32];
        const int fd = file_of(data, size, path);
        if (is("audio")) decode_audio(path);
        else read_in_lua(path);
        close(fd);
    }
    return 0;
}
