--- helper.lua: runs once before all specs. It opens the library, forbids accidental globals, and holds what specs
-- share:
--     local H = require "tests.helper"

-- -- Globals ----------------------------------------------------------------------------------------------------------

-- Says whether a function of this project is at a level of the stack: to it alone undeclared globals are errors.
local function ours(level)
  local info = debug.getinfo(level, "S")
  return info and (info.source:find("lua/vertex", 1, true) or info.source:find("tests/", 1, true)
    or info.source:find("experiments/", 1, true))
end
setmetatable(_G, {
  __newindex = function(t, name, value)
    if ours(3) then error("assignment to the undeclared global '" .. tostring(name) .. "'", 2) end
    rawset(t, name, value)
  end,
  __index = function(_, name)
    if ours(3) then error("use of the undeclared global '" .. tostring(name) .. "'", 2) end
  end,
})

-- Room for what the whole suite compiles: where a thousand traces or half a MB of code are reached, as LuaJIT has it,
-- all of it is thrown away and made again, over and over.
jit.opt.start("maxtrace=30000", "maxmcode=65536")

-- A thread that waits for another sleeps sooner than the library has it, here and in child processes: tests' tensors
-- are small, and on a machine with other work half of the time went into spinning.
local ffi = require "ffi"
ffi.cdef "int setenv(const char *name, const char *value, int overwrite);"
ffi.C.setenv("GOMP_SPINCOUNT", "1000", 0)

local lfs = require "lfs"
local vx = require "vertex"
local core = require "vertex.core"
if not lfs.attributes((core.library_path:gsub("[^/]+$", "libvertex_emu.so"))) then
  error("the tests need the emulator of CUDA, which is not in build/: ./setup.sh (without --cpu) builds it", 0)
end
vx.device "cpu"
vx.threads(2)

local H = {}
package.loaded["tests.helper"] = H

-- -- Random numbers ---------------------------------------------------------------------------------------------------

local Random = {}
Random.__index = Random
--- Makes a source of random numbers, the same on every machine: the minimal standard generator (Park and Miller 1988).
function H.random(seed) return setmetatable({ state = seed * 7919 % 2147483646 + 1 }, Random) end
function Random:uniform(low, high)
  self.state = self.state * 16807 % 2147483647
  return (low or 0) + ((high or 1) - (low or 0)) * (self.state / 2147483647)
end
function Random:integer(low, high) return math.min(high, low + math.floor(self:uniform() * (high - low + 1))) end
function Random:list(n, low, high)
  local t = {}
  for i = 1, n do t[i] = self:uniform(low, high) end
  return t
end

--- Multiplies the numbers of a list.
function H.product(list)
  local n = 1
  for i = 1, #list do n = n * list[i] end
  return n
end

--- Gives the T of ops' cases: T(shape, { low, high, grad, dtype }) → a tensor, uniform in low..high (-1..1; integers
-- 0..1 for other dtypes than f32), that requires a gradient where it is f32 and grad is not false.
function H.generator(seed)
  local random = H.random(seed)
  return function(shape, o)
    o = o or {}
    local flat, dtype = {}, o.dtype or "f32"
    for i = 1, H.product(shape) do
      flat[i] = dtype == "f32" and random:uniform(o.low or -1, o.high or 1) or random:integer(o.low or 0, o.high or 1)
    end
    local x = vx.empty(shape, { dtype = dtype }):fromtable(flat)
    if dtype == "f32" and o.grad ~= false then x.requires_grad = true end
    return x
  end
end

--- Gives a number for an op's random cases, which does not change when ops are added.
function H.number_of(name)
  local n = 0
  for i = 1, #name do n = (n * 31 + name:byte(i)) % 10061 end
  return 1000 * n
end

-- -- AdamW: the op takes lists ----------------------------------------------------------------------------------------

--- Runs one step of the op on all of an array of { p, m, v, g, decay }. A false in place of a tensor stands for a
-- released one.
function H.adamw(tuples, lr, beta1, beta2, eps, step)
  local lists, released = { {}, {}, {}, {}, {} }, vx.zeros { 1 }
  released:release()
  for i, t in ipairs(tuples) do
    for k = 1, 5 do lists[k][i] = t[k] or released end
  end
  return core.op.adamw(lists[1], lists[2], lists[3], lists[4], lists[5], lr, beta1, beta2, eps, step)
end

--- Makes such an array on a device, the same at every call. It has more tensors than a CUDA launch takes, of sizes
-- around what a vector, a block and a thread take, and several decays. Half of them are views, side by side in one
-- storage and off 16 bytes.
function H.adamw_tuples(device)
  local T, sizes, tuples = H.generator(21), { 0, 1, 3, 4, 5, 64, 1023, 1024, 1025 }, {}
  for i = 1, 170 do sizes[i] = sizes[i] or sizes[i % 9 + 1] end
  sizes[50], sizes[90], sizes[91], sizes[92], sizes[110] = 100003, 4095, 4096, 4097, 40000
  local function upload(x) return vx.empty(x:shape(), { device = device }):copy(x) end
  local packed, used = upload(T({ 60000 }, { grad = false, low = 0 })), 0
  for i, n in ipairs(sizes) do
    local t = { nil, nil, nil, nil, ({ 0, 0.1, 1e-4 })[i % 3 + 1] }
    for k = 1, 4 do
      if i % 2 == 1 and n < 2000 and used + n <= 60000 then
        t[k] = packed:narrow(1, used + 1, n)
        used = used + n
      else
        t[k] = upload(T({ n }, { grad = false, low = k == 3 and 0 or -1 }))
      end
    end
    tuples[i] = t
  end
  return tuples
end

--- Fails unless tensors updated in one call get the bits of calls of their own.
function H.check_adamw_lists(device)
  local together, alone = H.adamw_tuples(device), H.adamw_tuples(device)
  H.adamw(together, 0.1, 0.9, 0.99, 1e-8, 3)
  for i, t in ipairs(alone) do
    H.adamw({ t }, 0.1, 0.9, 0.99, 1e-8, 3)
    for k = 1, 4 do require("luassert").equal(t[k]:bytes(), together[i][k]:bytes()) end
  end
end

--- Fails unless sepconv2d_backward with an addend gives the bits of one without, and a sum.
function H.check_sepconv2d_addend(device)
  local T, op = H.generator(22), vx.ops.registry.sepconv2d
  local cases = op.cases(T)
  for _, args in ipairs(require("tests.larger_cases").sepconv2d(T)) do cases[#cases + 1] = args end
  -- in two bands
  cases[#cases + 1] = { T { 1, 260, 66, 64 }, T { 3, 3, 64 }, T { 8, 64 }, nil, T { 64 }, T { 64 }, nil,
    { groups = 4, activation = "silu" } }
  for i, args in ipairs(cases) do
    local here, n = {}, 0
    for k, x in pairs(args) do
      here[k], n = x, math.max(n, k)
      if vx.is_tensor(x) then
        here[k] = x:to(device)
        here[k].requires_grad = true
      end
    end
    local y = vx.ops.sepconv2d(unpack(here, 1, n))
    local dy, before = T(y:shape(), { grad = false }):to(device), T(here[1]:shape(), { grad = false }):to(device)
    local dx = op.backward(y._node.ctx, dy)
    require("luassert").equal((before + dx):bytes(), op.backward(y._node.ctx, dy, nil, before):bytes(), "case " .. i)
  end
end

--- Fails unless one number that is normalized by itself has a gradient of 0: nothing is left of two roundings times
-- 1 / sqrt(eps), or over a small norm.
function H.check_single_numbers(device)
  local T, ops = H.generator(23), vx.ops
  local function one(channels, ...) return { T { channels }, T { channels }, ... } end
  local function check(what, gradient)
    for _, g in ipairs(H.flat(gradient)) do
      if g ~= 0 then error(("%s on %s: a gradient of %g"):format(what, device, g), 3) end
    end
  end
  for _, method in ipairs { "ste-cosine", "re-cosine" } do
    local q = vx.quantizer(method, { dim = 3, groups = 3, codes = 5, seed = 2 }):to(device)
    local z = T({ 40, 3 }, { low = -1e-5, high = 1e-5 }):to(device)
    z.requires_grad = true
    local o = q(z)
    ops.add(ops.sum(ops.mul(o.quantized, T({ 40, 3 }, { grad = false }):to(device))), o.reg):backward()
    check(method, z.grad)
    check(method .. ": codebook", q.codebook.grad)
  end
  for _, c in ipairs { 1, 3, 8, 70 } do
    local lengths = vx.tensor({ 1, 0 }, { dtype = "i32" })
    for name, case in pairs {
      group_norm = { ops.group_norm, { 9, 1, c }, one(c, c) },
      ["group_norm, silu"] = { ops.group_norm, { 9, 1, c }, one(c, c, "silu") },
      ["group_norm, lengths"] = { ops.group_norm, { 2, 5, c }, one(c, c, "gelu", nil, lengths) },
      layer_norm = { ops.layer_norm, { 40 * c, 1 }, one(1) },
      sepconv2d = { ops.sepconv2d, { 9, 1, 1, c }, { T { 3, 3, c }, T { 5, c }, nil, T { c }, T { c }, nil,
        { groups = c, activation = "silu" } } } } do
      local x, rest = T(case[2]):to(device), {}
      for i = 1, table.maxn(case[3]) do
        rest[i] = case[3][i]
        if vx.is_tensor(rest[i]) then rest[i] = rest[i]:to(device) end
      end
      x.requires_grad = true
      local y = case[1](x, unpack(rest, 1, table.maxn(case[3])))
      y:backward(T(y:shape(), { grad = false }):to(device))
      check(("%s of %d channels"):format(name, c), x.grad)
    end
  end
end

-- -- Reading ----------------------------------------------------------------------------------------------------------

--- Gives all elements of a tensor in row-major order as a flat Lua array.
function H.flat(x)
  local out = {}
  local function walk(t)
    if type(t) ~= "table" then
      out[#out + 1] = t
    else
      for i = 1, #t do walk(t[i]) end
    end
  end
  walk(x:totable())
  return out
end

-- Gives ||x - y|| and ||y||.
local function norms(x, y)
  local difference, size = 0, 0
  for i = 1, #y do
    difference = difference + (x[i] - y[i]) ^ 2
    size = size + y[i] ^ 2
  end
  return math.sqrt(difference), math.sqrt(size)
end

--- Computes ||x - y|| / ||y|| of two flat arrays; ||x - y|| where y is 0.
function H.relative_error(x, y)
  assert(#x == #y, "relative_error: " .. #x .. " and " .. #y .. " elements")
  local difference, size = norms(x, y)
  if difference ~= difference then return math.huge end
  return size > 0 and difference / size or difference
end

-- -- Assertions -------------------------------------------------------------------------------------------------------

--- Fails unless every |x[i] - y[i]| <= absolute + relative |y[i]|, and says where. NaN equals only NaN.
function H.close(x, y, relative, absolute, what)
  if #x ~= #y then error(("%s: %d elements, expected %d"):format(what or "close", #x, #y), 2) end
  for i = 1, #y do
    local fine = x[i] == y[i] or math.abs(x[i] - y[i]) <= (absolute or 0) + relative * math.abs(y[i])
      or (x[i] ~= x[i] and y[i] ~= y[i])
    if not fine then error(("%s: element %d is %.9g, expected %.9g"):format(what or "close", i, x[i], y[i]), 2) end
  end
end

--- Runs f, which must raise at one of its own lines, with every one of the texts (plain) in the message; returns the
-- message.
function H.raises(f, ...)
  local ok, message = pcall(f)
  if ok then error("no error was raised", 2) end
  message = tostring(message)
  local info = debug.getinfo(f, "S")
  local file, line = message:match "^([^:]+):(%d+): "
  line = tonumber(line)
  if not file or not info.source:find(file:gsub("^%.%.%.", ""), 1, true) or line < info.linedefined
    or line > info.lastlinedefined then
    error(("the error does not point at lines %d-%d of %s: %s"):format(info.linedefined, info.lastlinedefined,
      info.short_src, message), 2)
  end
  for _, text in ipairs { ... } do
    if not message:find(text, 1, true) then error(("'%s' is not in the message: %s"):format(text, message), 2) end
  end
  return message
end

--- Fails unless two runs of f, each returning a list of byte strings, agree.
function H.same_bits(f, g)
  local a, b = f(), (g or f)()
  if #a ~= #b then error("different numbers of results", 2) end
  for i = 1, #a do
    if a[i] ~= b[i] then error("result " .. i .. " differs in its bits", 2) end
  end
end

--- Runs f with n threads.
function H.with_threads(n, f, ...)
  local before = vx.threads()
  vx.threads(n)
  local function done(ok, ...)
    vx.threads(before)
    if not ok then error((...), 0) end
    return ...
  end
  return done(pcall(f, ...))
end

-- -- Files and processes ----------------------------------------------------------------------------------------------

local folder
--- Gives a path in a folder of this run's own, which is removed at the end.
function H.scratch(name)
  if not folder then
    folder = os.tmpname()
    os.remove(folder)
    -- thousands of small files: quicker where there is no disk behind them
    local in_memory = "/dev/shm/" .. folder:match "[^/]+$"
    if lfs.mkdir(in_memory) then folder = in_memory else assert(lfs.mkdir(folder)) end
  end
  return folder .. "/" .. name
end

H.cleaner = newproxy(true)
getmetatable(H.cleaner).__gc = function()
  if folder then os.execute("rm -rf '" .. folder .. "'") end
end

--- Writes a file; returns its path.
function H.write(path, bytes)
  local f = assert(io.open(path, "wb"))
  f:write(bytes)
  f:close()
  return path
end

--- Reads a file; nil where there is none.
H.read = core.read_file

--- The checkout, as an absolute path: children run elsewhere.
H.root = (core.root:sub(1, 1) == "/" and core.root or lfs.currentdir() .. "/" .. core.root):gsub("/%.$", "")

--- Runs a shell command for 300 seconds at most; returns its output (both streams) and exit status (124: not ended).
function H.shell(command)
  local quoted = "'" .. command:gsub("'", "'\\''") .. "'"
  local pipe = assert(io.popen("{ timeout 300 sh -c " .. quoted .. " 2>&1; echo rc=$?; } 2>/dev/null"))
  local output, status = pipe:read("*a"):match "^(.*)rc=(%d+)\n$"
  pipe:close()
  return output, tonumber(status)
end

--- The name of a SIMD variant for a test's title: those of real AMX tiles have a tag, as nobody has seen them run yet.
function H.tagged(variant) return variant == "amx" and "amx #amx" or variant end

--- Runs Lua text in a LuaJIT of its own, with the same library and the given environment ("A=1 B=2"); returns its
-- output and whether it ended well.
function H.child(text, environment)
  local path = H.write(H.scratch "child.lua", text)
  local command = "%s LUA_PATH='./lua/?.lua;./lua/?/init.lua;./?.lua;;' timeout 120 luajit '%s'"
  local out, status = H.shell(command:format(environment or "", path))
  return out, status == 0
end

H.vx = vx

return H
