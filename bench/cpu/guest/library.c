// Whole libraries: zlib compresses, Lua interprets.
#include <lua5.4/lauxlib.h>
#include <lua5.4/lua.h>
#include <lua5.4/lualib.h>
#include <string.h>
#include <zlib.h>

#include "bench.h"

#define TEXT_SIZE (256 << 10)
static uint8_t text[TEXT_SIZE + 64], compressed[TEXT_SIZE * 2];

static int setup_text(void) {
  static const char *words[] = {"the ",   "guest ",     "kernel ",  "page ", "of ",
                                "and ",   "fault ",     "returns ", "a ",    "value ",
                                "0x1f",   "\n",         "if (",     ") {",   "ret ",
                                "%rax, ", "translate ", "block ",   "in ",   "cache "};
  seed(555);
  for (int i = 0; i < TEXT_SIZE;) {
    const char *word = words[(random_u32() >> 16) % 20];
    size_t length = strlen(word);
    memcpy(text + i, word, length);
    i += length;
    if (random_u32() >> 28 == 0) text[i++] = random_u32() >> 24;
  }
  return SETUP_OK;
}
static uint64_t run_gzip(void) {
  z_stream stream = {0};
  if (deflateInit2(&stream, 6, Z_DEFLATED, 15 + 16, 8, Z_DEFAULT_STRATEGY) != Z_OK) return 0;
  stream.next_in = text;
  stream.avail_in = TEXT_SIZE;
  stream.next_out = compressed;
  stream.avail_out = sizeof compressed;
  int result = deflate(&stream, Z_FINISH);
  uint64_t size = stream.total_out;
  deflateEnd(&stream);
  return result == Z_STREAM_END ? fnv1a(compressed, size) : 0;
}

static const char *script =
    "local function fib(n) if n<2 then return n end return fib(n-1)+fib(n-2) end\n"
    "local P={} P.__index=P\n"
    "function P.new(x,y) return setmetatable({x=x,y=y},P) end\n"
    "function P:add(o) return P.new(self.x+o.x,self.y+o.y) end\n"
    "function bench()\n"
    "  local s=fib(17)\n"
    "  local t={} for i=1,3000 do t[i]=(i*7919)%3001 end\n"
    "  table.sort(t) for i=1,#t do s=s+t[i]*(i%3) end\n"
    "  local d={} for i=1,2000 do local k='k'..(i%257) d[k]=(d[k] or 0)+i end\n"
    "  for k,v in pairs(d) do s=s+v%7 end\n"
    "  local p=P.new(0,0) for i=1,3000 do p=p:add(P.new(i,1)) end s=s+p.x+p.y\n"
    "  local c=0 for w in (('alpha beta gamma '):rep(100)):gmatch('%a+') do c=c+#w end\n"
    "  local x=0.5 for i=1,5000 do x=x*1.000001+i/3 end\n"
    "  return s+c+x\n"
    "end\n";
static lua_State *lua;
static int setup_lua(void) {
  lua = luaL_newstate();
  if (!lua) return SETUP_FAILED;
  luaL_requiref(lua, "_G", luaopen_base, 1);
  luaL_requiref(lua, "table", luaopen_table, 1);
  luaL_requiref(lua, "string", luaopen_string, 1);
  return luaL_dostring(lua, script) ? SETUP_FAILED : SETUP_OK;
}
static uint64_t run_lua(void) {
  lua_getglobal(lua, "bench");
  if (lua_pcall(lua, 0, 1, 0)) return 0;
  double value = lua_tonumber(lua, -1);
  lua_pop(lua, 1);
  return fnv1a(&value, sizeof value);
}

const struct workload library_workloads[] = {
    {.name = "gzip", .unit = "MB/s", .work = TEXT_SIZE / 1e6, .setup = setup_text, .run = run_gzip},
    {.name = "lua", .unit = "run/s", .work = 1, .setup = setup_lua, .run = run_lua},
    {0}};
