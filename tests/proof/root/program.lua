-- Loops that LuaJIT compiles to machine code; prints what each computed.
local bit = require("bit")
local ffi = require("ffi")

local function integers(n)
  local h = 5381
  for i = 1, n do h = bit.bxor(bit.tobit(h * 33), bit.rol(i, i % 31)) end
  return h
end

local function floats(n)
  local s, x = 0, 0.5
  for i = 1, n do
    x = 3.7 * x * (1 - x)
    s = s + math.sqrt(x) / i + math.floor(x * 10) % 3
  end
  return string.format("%.17g", s)
end

local function tables(n)
  local t, keys = {}, {}
  for i = 1, n do t[i] = (i * 7919) % 10007 end
  table.sort(t)
  for i = 1, n do keys["k" .. t[i] % 513] = (keys["k" .. t[i] % 513] or 0) + i end
  local sum = 0
  for i = 0, 512 do sum = (sum * 31 + (keys["k" .. i] or 0)) % 1000003 end
  return sum
end

local function strings(n)
  local parts = {}
  for i = 1, n do parts[i] = ("%d:%x"):format(i, i * i):reverse() end
  local text, count = table.concat(parts, ","):gsub("(%x)1", "%1-")
  return count .. " " .. #text
end

local function memory(n)
  local a = ffi.new("uint64_t[?]", n)
  for i = 0, n - 1 do a[i] = i * 0x9e3779b97f4a7c15ULL end
  local h = 0ULL
  for r = 1, 20 do for i = 0, n - 1 do h = (h + a[i]) * 6364136223846793005ULL + r end end
  return tostring(h)
end

print("integers", integers(3000000))
print("floats", floats(2000000))
print("tables", tables(60000))
print("strings", strings(60000))
print("memory", memory(30000))
