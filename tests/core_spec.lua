-- Tensors, views, the step scope, memory, random streams, printing, files that appear whole.

local H = require "tests.helper"
local vx = H.vx
local core = require "vertex.core"
local lfs = require "lfs"

local function collect()
  collectgarbage()
  collectgarbage()
end

describe("a tensor", function()
  it("is made from nested tables, numbers and shapes", function()
    local x = vx.tensor { { 1, 2, 3 }, { 4, 5, 6 } }
    assert.same({ 2, 3 }, x:shape())
    assert.same({ 2, "f32", "cpu", 6, 3, 2, 3 }, { x:dim(), x:dtype(), x:device(), x:numel(), x:size(2), x:size(-2),
      x:size(-1) })
    assert.same({ { 1, 2, 3 }, { 4, 5, 6 } }, x:totable())
    assert.same({ 3, 1 }, x:strides())
    local s = vx.tensor(2.5)
    assert.same({ {}, 0, 1, 2.5, 2.5 }, { s:shape(), s:dim(), s:numel(), s:item(), s:totable() })
    assert.same({ 0 }, vx.tensor({}):shape())
    assert.same({ 2, 0 }, vx.tensor({ {}, {} }):shape())
    assert.same({ 1, 2, 3, 4, 5, 6, 7, 8 }, vx.zeros({ 1, 2, 3, 4, 5, 6, 7, 8 }):shape())
    assert.same({ { 0, 0 } }, vx.zeros({ 1, 2 }):totable())
    assert.same({ 1, 1 }, vx.ones({ 2 }):totable())
    assert.same({ 7, 7 }, vx.full({ 2 }, 7):totable())
    assert.is_true(vx.tensor({ 1 }, { requires_grad = true }).requires_grad)
    assert.is_false(x.requires_grad)
    assert.is_true(vx.is_tensor(x))
    assert.is_false(vx.is_tensor {})
    assert.is_false(vx.is_tensor "x")
  end)

  it("has any of four dtypes", function()
    for _, dtype in ipairs { "f32", "bf16", "i32", "u8" } do
      local x = vx.tensor({ 1, 2, 250 }, { dtype = dtype })
      assert.equal(dtype, x:dtype())
      assert.same({ 1, 2, 250 }, x:totable())
    end
    assert.equal(-2147483648, vx.tensor({ -2147483648 }, { dtype = "i32" }):item())
    assert.equal("\1\2\250", vx.tensor({ 1, 2, 250 }, { dtype = "u8" }):bytes())
    assert.equal("\0\0\128\63\0\0\0\192", vx.tensor({ 1, -2 }):bytes())
    assert.equal("\128\63", vx.tensor({ 1 }, { dtype = "bf16" }):bytes())
  end)

  it("converts with to(), to itself where nothing changes", function()
    local x = vx.tensor { 1, 2, 3 }
    assert.equal(x, x:to "cpu")
    assert.equal(x, x:to "f32")
    local y = x:to "i32"
    assert.same({ "i32", { 1, 2, 3 } }, { y:dtype(), y:totable() })
  end)

  it("takes and gives raw bytes", function()
    local x = vx.zeros { 2 }
    x:frombytes "\0\0\128\63\0\0\0\192"
    assert.same({ 1, -2 }, x:totable())
    assert.equal(x:bytes(), vx.zeros({ 2 }):frombytes(x:bytes()):bytes())
  end)

  it("counts with arange, up to but without the end", function()
    assert.same({ 0, 1, 2 }, vx.arange(3):totable())
    assert.same({ 2, 3, 4 }, vx.arange(2, 5):totable())
    assert.same({ 5, 3 }, vx.arange(5, 1, -2):totable())
    assert.same({ 0, 0.25, 0.5, 0.75 }, vx.arange(0, 1, 0.25):totable())
    assert.same({ 0 }, vx.arange(0):shape())
    assert.same({ "i32", { 0, 1 } },
      { vx.arange(2, { dtype = "i32" }):dtype(), vx.arange(2, { dtype = "i32" }):totable() })
    assert.equal(10, vx.arange(0, 1, 0.1):numel())
  end)

  it("is read and written by index", function()
    local x = vx.zeros { 3, 2 }
    x[1] = 5
    x[2][1] = 7
    x[-1] = vx.tensor { 8, 9 }
    assert.same({ { 5, 5 }, { 7, 0 }, { 8, 9 } }, x:totable())
    assert.same({ 8, 9 }, x[3]:totable())
    assert.equal(9, x[3][2]:item())
    assert.is_nil(x.no_such_field)
    x.note = "kept"
    assert.equal("kept", x.note)
  end)

  it("shares its storage with its views", function()
    local x = vx.arange(12):reshape { 3, 4 }
    local t, row, part, same = x:t(), x[2], x:narrow(2, 2, 2), x:reshape { 12 }
    x:fill(1)
    for _, v in ipairs { t, row, part, same } do assert.equal(v:numel(), v:sum():item()) end
    part:fill(3)
    assert.same({ { 1, 3, 3, 1 }, { 1, 3, 3, 1 }, { 1, 3, 3, 1 } }, x:totable())
    assert.same({ 1, 3, 3, 1, 1, 3, 3, 1, 1, 3, 3, 1 }, same:totable())
    assert.is_false(t:is_contiguous())
    assert.is_true(t:contiguous():is_contiguous())
    local y = x:clone()
    y:fill(0)
    assert.equal(24, x:sum():item())
    assert.same({ 1, 4 }, t:t():strides() and { x:t():strides()[1], x:t():strides()[2] })
  end)

  it("outlives the handle that made its storage", function()
    local row
    do
      local x = vx.arange(1000):reshape { 10, 100 }
      row = x[7]
      x:release()
    end
    collect()
    local others = {}
    for i = 1, 50 do others[i] = vx.zeros { 1000 } end
    assert.equal(0, others[50]:sum():item())
    assert.equal(600, row[1]:item())
  end)

  it("copies across shapes that agree, and says what it copied from", function()
    local x, y = vx.zeros { 2, 3 }, vx.tensor { { 1, 2, 3 }, { 4, 5, 6 } }
    assert.equal(x, x:copy(y))
    assert.same(y:totable(), x:totable())
    assert.same(y:totable(), vx.zeros({ 2, 3 }, { dtype = "i32" }):copy(y):totable())
    H.raises(function() x:copy(5) end, "copy: source is 5, expected a tensor of x's shape")
  end)

  it("prints dtype, shape, statistics and its corners", function()
    local text = tostring(vx.tensor { { 1, 2 }, { 3, 4.5 } })
    for _, part in ipairs { "f32 (2,2) on cpu", "mean 2.625", "min 1", "max 4.5", "4.5000" } do
      assert.is_truthy(text:find(part, 1, true), part .. " in " .. text)
    end
    assert.is_truthy(tostring(vx.zeros { 100, 100 }):find("...", 1, true))
    assert.is_true(#tostring(vx.zeros { 100, 100, 100 }) < 4000)
    assert.is_truthy(tostring(vx.tensor { 1, 0 / 0 }):find("1 not finite", 1, true))
    assert.is_truthy(tostring(vx.zeros { 0, 3 }):find("no elements", 1, true))
    assert.is_truthy(tostring(vx.tensor(3)):find("3.", 1, true))
    assert.is_truthy(tostring(vx.tensor({ 1, 2 }, { dtype = "i32" })):find("[1, 2]", 1, true))
    assert.is_truthy(tostring(vx.tensor({ 1, 2 }, { dtype = "u8" })):find("u8 (2)", 1, true))
    assert.is_truthy(tostring(vx.tensor({ 1 }, { requires_grad = true }):exp()):find("from exp", 1, true))
    assert.is_truthy(tostring(vx.arange(12):reshape({ 3, 4 }):t()):find("(4,3)", 1, true))
  end)
end)

describe("the library", function()
  it("names its devices, or the reason why one is missing", function()
    local devices = vx.devices()
    assert.equal("cpu", devices[1].name)
    assert.is_true(devices[1].memory > 1e8)
    assert.is_true(#devices[1].description > 0)
    assert.is_true(#devices > 1 or type(devices.cuda) == "string")
    assert.is_string(vx.version)
    assert.equal("cpu", vx.device())
  end)

  it("refuses words that it does not know in variables of the environment, at its start", function()
    for _, case in ipairs {
      { "VERTEX_POOL", { "", "0", "1" }, { "no", "2" }, "0 (no block of memory" },
      { "VERTEX_SYNC", { "", "0", "1" }, { "true" }, "0 or 1" }, { "VERTEX_NCCL", { "", "0" }, { "yes" }, "0 or 1" },
      { "VERTEX_RANK_TIMEOUT", { "", "2.5" }, { "soon", "25 apples", "0", "-1", "nan", "inf" }, "seconds, a number" },
      { "VERTEX_BACKENDS", { "", "/tmp" }, { "/nowhere" }, "a folder" },
      { "VERTEX_DEBUG", { "", "0" }, { "yes", "3" }, "0 (off), 1" } } do
      local name, good, bad, expected = unpack(case)
      for _, text in ipairs(good) do
        local out, ok = H.child('print((require "vertex").zeros { 2 }:sum():item())', name .. "=" .. text)
        assert.same({ "0\n", true }, { out, ok })
      end
      for _, text in ipairs(bad) do
        local out, ok = H.child('require "vertex"', ("%s='%s'"):format(name, text))
        assert.is_false(ok)
        assert.is_truthy(out:find(("%s is '%s', expected %s"):format(name, text, expected), 1, true), out)
      end
    end
  end)

  it("lists the SIMD variants, uses the best that runs, and refuses any other word in VERTEX_SIMD", function()
    local names, best = {}, nil
    for i, variant in ipairs(core.cpu_variants()) do
      names[i] = variant.name
      if variant.runs and variant.chosen then best = variant.name end
    end
    assert.equal("portable", names[1])
    local kernels = 'print((require "vertex").devices()[1].description:match "(%S+) kernels")'
    assert.equal(best .. "\n", (H.child(kernels, "VERTEX_SIMD=")))
    for _, variant in ipairs(core.cpu_variants()) do
      if H.tagged(variant.name) ~= variant.name then break end -- the system has its say as well
      local out, ok = H.child('print((require "vertex").zeros { 2 }:sum():item())', "VERTEX_SIMD=" .. variant.name)
      assert.equal(variant.runs, ok)
      assert.is_truthy(out:find(variant.runs and "^0\n$" or "this processor runs portable", 1), out)
    end
    local out, ok = H.child('require "vertex".zeros { 2 }', "VERTEX_SIMD=fastest")
    assert.is_false(ok)
    assert.is_truthy(out:find("VERTEX_SIMD=fastest: expected one of " .. table.concat(names, ", "), 1, true), out)
  end)

  it("ends with another status than 0 where what it printed could not be written", function()
    for _, program in ipairs { "print(1)", "for i = 1, 5000 do print(i) end", "print(1) os.exit(0, true)" } do
      local text = "require 'vertex' " .. program
      local path = H.write(H.scratch "printing.lua", text)
      local run = "LUA_PATH='./lua/?.lua;./lua/?/init.lua;;' luajit '" .. path .. "'"
      local out, status = H.shell(run .. " > /dev/full")
      assert.is_true(status ~= 0, program)
      assert.is_truthy(out:find("standard output: ", 1, true), out)
      assert.equal(0, (select(2, H.shell(run .. " > /dev/null"))))
    end
    for _, name in ipairs { "vq_sweep", "compare", "report", "encode", "simplex_figures", "reproduce" } do
      local out, status = H.shell(("luajit experiments/%s.lua --help > /dev/full"):format(name))
      assert.equal(1, status, name .. ": " .. out)
    end
  end)

  it("says what a device can do, and what may be asked", function()
    assert.is_true(core.can("cpu", "host"))
    for _, what in ipairs { "bf16", "graphs", "peers" } do
      assert.equal(what ~= "peers", core.can("cpu", what))
      assert.is_true(core.can("emu:0", what))
    end
    assert.is_false(core.can("emu:0", "host"))
    assert.equal(core.can(vx.device(), "bf16"), core.can(nil, "bf16"))
    H.raises(function() core.can("cpu", "fly") end, "'fly', expected one of host, bf16, graphs, peers")
  end)

  it("sets the number of threads", function()
    local before = vx.threads()
    finally(function() vx.threads(before) end)
    assert.equal(1, vx.threads(1))
    assert.equal(1, vx.threads())
    assert.equal(3, vx.threads(3))
  end)

  it("says which library it tried, and what one of another version lacks", function()
    local function refused(library, ...)
      local out, ok = H.child("require 'vertex'", "VERTEX_LIB=" .. library)
      assert.is_false(ok)
      for _, text in ipairs { library, "./setup.sh", ... } do assert.truthy(out:find(text, 1, true), out) end
    end
    refused "/nonexistent.so"
    local folder = H.scratch "stale"
    lfs.mkdir(folder)
    local function library(name, text)
      H.write(folder .. "/" .. name .. ".c", text)
      assert.equal(0, os.execute(("cc -shared -fPIC -o '%s/%s.so' '%s/%s.c'"):format(folder, name, folder, name)))
      return folder .. "/" .. name .. ".so"
    end
    refused(library("other", "int nothing;"), "lacks vx_cdef()")
    refused(library("old", [[const char *vx_version(void) { return "0"; }
      const char *vx_cdef(void) { return "const char *vx_version(void);"; }]]), "lacks vx_error, which the Lua files")
  end)

  it("refuses an op, an argument or a constant that the library does not have", function()
    local x, y = vx.ones { 2 }, vx.zeros { 2 }
    local function lacks(f, what)
      local _, message = pcall(f)
      for _, text in ipairs { what, core.library_path, "./setup.sh" } do
        assert.truthy(tostring(message):find(text, 1, true), message)
      end
    end
    lacks(function() return core.op.nonsense end, "lacks the op 'nonsense'")
    lacks(function() return core.VX.NONSENSE end, "lacks the constant VX_NONSENSE")
    local kind = core.VX.EXP
    H.raises(function() core.op.unary { y = y, x = x, kind = kind, alpha = 1, beta = 0, gamma = 2 } end,
      "unary: there is no argument 'gamma'; it has y, x, kind, alpha, beta")
    H.raises(function() core.op.unary { y = y, x = x, kind = kind, alpha = 1 } end,
      "unary: the number 'beta' is missing")
    H.raises(function() core.op.unary { x = x, kind = kind, alpha = 1, beta = 0 } end, "unary: y is")
    H.raises(function() core.op.unary(y, x, kind, 1) end, "unary: the number 'beta' is missing")
    H.raises(function() core.op.unary(y, x, kind, 1, 0, 5) end, "unary: more arguments than it has")
    H.raises(function() core.op.unary(y, 3, kind, 1, 0) end, "a number where a tensor was expected")
    H.raises(function() core.op.unary(y, nil, kind, 1, 0) end, "unary: x is")
    assert.same({ 0, 0 }, y:totable())
    core.op.unary { y = y, x = x, kind = core.VX.AFFINE, alpha = 3, beta = 1 }
    assert.same({ 4, 4 }, y:totable())
    core.op.unary(y, x, core.VX.AFFINE, 5, 1)
    assert.same({ 6, 6 }, y:totable())
    H.raises(function() core.op.adamw { p = { x }, m = { y }, v = { y }, g = { y }, decay = { 0, 1 } } end,
      "adamw: 2 of 'decay', but 1 of 'p'")
    H.raises(function() core.op.adamw { p = { x }, rate = 1 } end, "adamw: there is no argument 'rate'")
    H.raises(function() core.op.adamw { p = { x }, m = { y }, v = { y }, g = { y }, decay = { 0 }, lr = 1 } end,
      "adamw: the number 'beta1' is missing")
  end)

  it("needs no global and leaves none", function()
    local out, ok = H.child [[
      local known = {}
      require "lfs" -- leaves one of its own
      for k in pairs(_G) do known[k] = true end
      local vx = require "vertex"
      vx.quantizer("softmax-knn-ce", { dim = 4, codes = 5, k = 2 }):forward(vx.randn { 9, 4 })
      for k in pairs(_G) do if not known[k] then error("global " .. k) end end
      print "clean" ]]
    assert.is_true(ok, out)
    assert.equal("clean\n", out)
  end)
end)

describe("eigenvectors of a symmetric matrix", function()
  it("are of length 1, at right angles, and make the matrix again, in float64", function()
    for _, n in ipairs { 1, 2, 5, 33, 70 } do
      local given, A = H.generator(n)({ n, n }, { grad = false }):totable(), {}
      for i = 1, n do
        A[i] = {}
        for j = 1, n do A[i][j] = given[i][j] + given[j][i] end
      end
      local values, vectors = core.symmetric_eigen(A)
      for i = 1, n do
        assert.is_true(i == 1 or values[i - 1] <= values[i])
        for j = 1, n do
          local dot, again = 0, 0
          for k = 1, n do
            dot = dot + vectors[i][k] * vectors[j][k]
            again = again + values[k] * vectors[k][i] * vectors[k][j]
          end
          assert.is_true(math.abs(dot - (i == j and 1 or 0)) < 1e-12)
          assert.is_true(math.abs(again - A[i][j]) < 1e-12 * n)
        end
      end
    end
  end)

  it("are refused for NaN and Inf", function()
    H.raises(function() core.symmetric_eigen { { 1, 0 }, { 0 / 0, 1 } } end, "NaN")
    H.raises(function() core.symmetric_eigen { { math.huge } } end, "Inf")
  end)
end)

describe("vx.step", function()
  local function live()
    collect()
    return vx.memory().live
  end

  it("frees all that f made except what it returns, also inside tables", function()
    local before = live()
    local inner
    local a, t, n = vx.step(function(size)
      local x = vx.ones { size }
      inner = x
      return x + 1, { deep = { x + 2 } }, 5
    end, 1000)
    assert.equal(5, n)
    assert.equal(2, a[1]:item())
    assert.equal(3, t.deep[1][7]:item())
    H.raises(function() inner:sum() end, "released", "vx.step")
    assert.is_true(vx.memory().live - before <= 2 * 4096 + 256)
    a:release()
    t.deep[1]:release()
    assert.equal(before, live())
  end)

  it("frees when f fails, and passes the error on", function()
    local before = live()
    local ok, message = pcall(vx.step, function()
      local _ = vx.ones { 100000 }
      error("mine", 0)
    end)
    assert.same({ false, "mine" }, { ok, message })
    assert.equal(before, vx.memory().live)
    local ok2, value = pcall(vx.step, function() error { code = 7 } end)
    assert.is_false(ok2)
    assert.equal(7, value.code)
  end)

  it("takes what it returns out of tables however deep, and leaves no scope behind", function()
    local chain = {}
    local at = chain
    for _ = 1, 20000 do
      at.n = {}
      at = at.n
    end
    local inside
    assert.equal(chain, vx.step(function()
      at.x, inside = vx.ones { 3 }, vx.ones { 2 }
      at.n = chain -- and round
      return chain
    end))
    assert.same({ 1, 1, 1 }, at.x:totable())
    H.raises(function() inside:sum() end, "made inside vx.step")
    local after = vx.ones { 3 } -- in no scope: an outer step's end leaves it alone
    assert.is_nil(after._scope)
  end)

  it("is named where a tensor was released by it, and by nothing else", function()
    local x, y = vx.ones { 3 }, nil
    x:release()
    vx.step(function()
      y = vx.ones { 3 }
      y:release()
    end)
    for _, released in ipairs { x, y } do
      local message = H.raises(function() released:sum() end, "this tensor was released")
      assert.is_nil(message:find("vx.step", 1, true), message)
    end
    H.raises(function() require("vertex.core").op.fill({}, 1) end)
  end)

  it("nests: what an inner step returns belongs to the outer one", function()
    local before, leaked = live(), nil
    local kept = vx.step(function()
      local x = vx.step(function() return vx.ones { 500 } end)
      leaked = vx.step(function() return vx.ones { 500 } end)
      local y = x * 2
      return y
    end)
    assert.equal(2, kept[1]:item())
    H.raises(function() leaked:sum() end, "released")
    kept:release()
    assert.equal(before, live())
  end)

  it("refuses a coroutine that would yield out of it, and leaves the state of others alone", function()
    for name, around in pairs { step = vx.step, no_grad = vx.no_grad,
      debug = function(f) return vx.debug(0, f) end } do
      local inside
      local co = coroutine.create(function()
        around(function()
          inside = vx.ones { 2 }
          coroutine.yield(1)
        end)
      end)
      local ok, message = coroutine.resume(co)
      assert.is_false(ok)
      assert.truthy(message:find("core_spec.lua:%d+: " .. name .. ": a coroutine cannot yield inside of it"), message)
      local mine = vx.ones({ 2 }, { requires_grad = true })
      local y = mine * 2
      assert.is_true(y.requires_grad)
      assert.equal(4, y:sum():item())
      assert.truthy(inside)
    end
    -- what makes a coroutine inside is free to yield in it
    local sum = 0
    vx.step(function()
      for x in coroutine.wrap(function() for i = 1, 3 do coroutine.yield(vx.full({ 1 }, i)) end end) do
        sum = sum + x:item()
      end
    end)
    assert.equal(6, sum)
    -- one made outside goes on as it was, wherever it is resumed
    local function numbers()
      local w = vx.ones({ 2 }, { requires_grad = true })
      return coroutine.wrap(function()
        local p = w * 1
        for i = 1, 4 do
          local n = p
          p = w * (i + 1)
          assert.is_true(n.requires_grad)
          assert.equal(5 * i, vx.step(function() return (n * 5):sum():item() end) / 2)
          coroutine.yield(n)
        end
      end)
    end
    local next_number = numbers()
    for i = 1, 4 do
      local around = i % 2 == 0 and vx.step or vx.no_grad
      assert.equal(2 * i, around(function() return next_number():sum():item() end))
    end
    -- one made inside lives in there, also when an inner step resumes it, and its tensors go with it
    local inside
    vx.step(function()
      local x = vx.ones({ 2 }, { requires_grad = true })
      local first = coroutine.wrap(function()
        for i = 1, 2 do
          inside = x * i
          coroutine.yield(inside)
        end
      end)
      local y = vx.step(function() return first():sum():item() end)
      assert.equal(2, y + inside:sum():item() - 2)
      vx.no_grad(function()
        local second = coroutine.create(function()
          coroutine.yield((x * 2).requires_grad)
          return coroutine.wrap(function() return (x * 2).requires_grad end)()
        end)
        assert.same({ true, false }, { coroutine.resume(second) })
        assert.same({ true, false }, { coroutine.resume(second) })
        assert.is_true(first().requires_grad)
      end)
    end)
    H.raises(function() inside:sum() end, "made inside vx.step")
    H.raises(function() vx.step(function() coroutine.wrap(3) end) end, "bad argument #1 to 'wrap'")
    -- steps of two coroutines in turn
    local function steps()
      return coroutine.wrap(function()
        for i = 1, 3 do coroutine.yield(vx.step(function() return (vx.full({ 1 }, i) * 2):item() end)) end
      end)
    end
    local a, b = steps(), steps()
    assert.same({ 2, 2, 4, 4 }, { a(), b(), a(), b() })
  end)

  it("spares what vx.keep names, and what was made before", function()
    local old, kept = vx.ones { 10 }, nil
    vx.step(function()
      kept = vx.keep(old + 1)
      old:fill(3)
    end)
    assert.equal(2, kept[1]:item())
    assert.equal(3, old[1]:item())
    assert.equal(5, vx.keep(5))
  end)

  it("leaves views of survivors intact", function()
    local y = vx.step(function()
      local x = vx.arange(10):reshape { 2, 5 }
      return x[2]
    end)
    assert.same({ 5, 6, 7, 8, 9 }, y:totable())
  end)

  it("returns several values, nil among them", function()
    local r = { vx.step(function() return nil, 2, nil, 4 end) }
    assert.same({ nil, 2, nil, 4 }, r)
  end)

  it("survives cyclic tables and returns a tensor twice", function()
    local a, b = vx.step(function()
      local t = { x = vx.ones { 2 } }
      t.self = t
      return t, t.x
    end)
    assert.equal(a.x, b)
    assert.equal(2, b:sum():item())
  end)

  it("works inside a coroutine", function()
    local co = coroutine.wrap(function() return vx.step(function() return vx.ones({ 3 }):sum():item() end) end)
    assert.equal(3, co())
  end)
end)

describe("memory", function()
  it("is counted: live, peak, tensors", function()
    collect()
    vx.reset_peak()
    local before = vx.memory()
    local x = vx.empty { 1000000 }
    local during = vx.memory()
    assert.is_true(during.live - before.live >= 4e6 and during.live - before.live < 4.6e6)
    assert.equal(1, during.tensors - before.tensors)
    local view = x:reshape { 1000, 1000 }
    assert.equal(during.tensors, vx.memory().tensors)
    x:release()
    assert.equal(during.live, vx.memory().live) -- the view still holds it
    view:release()
    assert.equal(before.live, vx.memory().live)
    assert.is_true(vx.memory().peak >= during.live)
    vx.memory_flush()
    assert.equal(0, vx.memory().cached)
    assert.is_true(vx.memory("cpu").limit > 0)
  end)

  it("of dead tensors is found before it hurts", function()
    collect()
    local most = 0
    for _ = 1, 3000 do
      local x = vx.empty { 1000000 } -- 4 MB each, 12 GB in all; Lua sees a few bytes
      x[1] = 1
      most = math.max(most, vx.memory().live)
    end
    assert.is_true(most < 1e9, ("%.0f MB live"):format(most / 1e6))
  end)

  local function training(steps)
    local ops, nn = vx.ops, vx.nn
    vx.seed(1)
    local net = nn.Sequential(nn.Linear(8, 16), nn.Apply("silu", ops.silu), nn.Linear(16, 6))
    local q = vx.quantizer("softmax-knn-ce", { dim = 6, codes = 8, k = 2 })
    local head = nn.Linear(6, 8)
    local all = {}
    for _, m in ipairs { net, q, head } do
      for _, p in ipairs(m:parameters()) do all[#all + 1] = p end
    end
    local opt = vx.optim.AdamW(all, { lr = 1e-2 })
    local first, last, live
    local x = vx.randn { 12, 8 }
    for step = 1, steps do
      local loss = vx.step(function()
        local o = q:forward(net(x))
        local l = ops.mse(head(o.quantized), x) + o.reg
        l:backward()
        opt:step()
        opt:zero_grad()
        return l:item()
      end)
      if step == 5 then live = vx.memory().live end
      if step > 5 and vx.memory().live ~= live then
        error(("step %d: %d bytes live, %d at step 5"):format(step, vx.memory().live, live))
      end
      first, last = first or loss, loss
    end
    return first, last
  end

  it("stays constant over 1,000 training steps, and the loss falls", function()
    collect()
    collectgarbage "stop" -- so that nothing but the step scope frees
    finally(function() collectgarbage "restart" end)
    local first, last = training(1000)
    assert.is_true(last < 0.8 * first)
  end)

  it("stays constant over 10,000 training steps #slow", function()
    collect()
    training(10000)
  end)
end)

describe("vx.debug", function()
  --- Runs a script in a process of its own → what it wrote to stderr, its status.
  local function child(script, environment)
    local path = H.write(H.scratch "debug.lua", script)
    local set = "LUA_PATH='./?.lua;./lua/?.lua;./lua/?/init.lua;;' VERTEX_LIB='%s' %s timeout 60 luajit '%s' 2>&1"
    return H.shell(("cd '%s' && " .. set)
      :format(H.root, os.getenv "VERTEX_LIB" or H.root .. "/build/libvertex.so", environment or "", path))
  end

  it("tells of every op, with formulas that its contract's letters fill, and changes no bit", function()
    local out, status = child [[
      local H = require "tests.helper"
      local vx = require "vertex"
      for _, op in ipairs(vx.ops.registry) do
        for i, args in ipairs(op.cases and op.cases(H.generator(H.number_of(op.name))) or {}) do
          local function run()
            return vx.step(function()
              local y = vx.ops[op.name](unpack(args, 1, table.maxn(args)))
              if y.requires_grad then y:backward(vx.ones(y:shape())) end
              return y:bytes()
            end)
          end
          assert(run() == vx.debug(2, run), op.name)
        end
      end
      local q = vx.quantizer("softmax-knn-ce", { dim = 4, codes = 8, k = 2 })
      local z = vx.randn { 10, 4 }
      z.requires_grad = true
      vx.debug(2, function() q(z).reg:backward() end)
      vx.debug(2, function() q:encode(z) end)
    ]]
    assert.equal(0, status, out)
    for _, name in ipairs { "gemm", "conv3x3_backward_weight", "sepconv2d", "sepconv2d_backward", "knn", "assign",
      "smooth_forward", "smooth_backward", "depthwise_conv2d" } do
      assert.truthy(out:find("\n" .. name .. " +[%d.]+ ms +[%d.]+ GB/s +[%d.]+ GFLOP/s +[%d.]+ k?B  %("), name)
    end
    assert.falsy(out:find("nan", 1, true) or out:find("inf", 1, true), out)
  end)

  it("counts bytes and operations, and gives totals at the end", function()
    local script = [[
      local vx = require "vertex"
      local a, b = vx.ones { 64, 32 }, vx.ones { 32, 16 }
      for _ = 1, 3 do a:matmul(b) end
    ]]
    local out = child(script, "VERTEX_DEBUG=2")
    assert.truthy(out:find("14.3 kB  (1,64,16) (1,64,32) (1,32,16)\n", 1, true), out)
    assert.truthy(out:find "\nops: [%d.]+ ms in all\n")
    local ms, calls, rate, bytes = out:match(
      "\ngemm +([%d.]+) ms +[%d.]+%% +(%d+) calls +[%d.]+ GB/s +([%d.]+) GFLOP/s +([%d.]+) kB\n")
    assert.equal("3", calls, out)
    assert.equal("43.0", bytes)
    H.close({ 3 * 2 * 64 * 32 * 16 / (tonumber(ms) * 1e-3) / 1e9 }, { tonumber(rate) }, 0.1, 0.1)
    out = child(script, "VERTEX_DEBUG=1")
    assert.equal(1, select(2, out:gsub("\n?gemm ", "")))
    assert.equal("", (child(script, "VERTEX_DEBUG=0")))
    out = child(script, "VERTEX_DEBUG=yes")
    assert.truthy(out:find("VERTEX_DEBUG is 'yes', expected 0 (off), 1", 1, true), out)
  end)

  it("lets the process end, also where LuaJIT has compiled its loops", function()
    local script = [[
      jit.opt.start "hotloop=3"
      local vx = require "vertex"
      local x = vx.ones { 3 }
      for _ = 1, tonumber(os.getenv "CALLS") do vx.debug(2, function() return (x:fill(1) + x):sum() end) end ]]
    for calls = 1, 12 do assert.equal(0, select(2, child(script, "CALLS=" .. calls)), calls .. " calls") end
  end)

  it("holds while its function runs, and hands on what that returns and raises", function()
    local plain = core.op.fill
    assert.same({ 1, nil, 3, n = 3 }, { n = 3, vx.debug(0, function() return 1, nil, 3 end) })
    H.raises(function() vx.debug(0, function() error "own words" end) end, "own words")
    H.raises(function() vx.debug(3) end, "level is 3, expected 0")
    H.raises(function() vx.debug "2" end, "level is '2', expected an integer, 0")
    assert.equal(plain, core.op.fill)
  end)
end)

describe("random streams", function()
  it("repeat for a seed and differ between seeds and draws", function()
    vx.seed(5)
    local a, b = vx.randn({ 100 }):bytes(), vx.randn({ 100 }):bytes()
    vx.seed(5)
    assert.equal(a, vx.randn({ 100 }):bytes())
    assert.equal(b, vx.randn({ 100 }):bytes())
    assert.not_equal(a, b)
    vx.seed(6)
    assert.not_equal(a, vx.randn({ 100 }):bytes())
  end)

  it("of a generator of one's own do not disturb the default one", function()
    vx.seed(5)
    local a = vx.rand({ 10 }):bytes()
    vx.seed(5)
    local g = vx.generator(9)
    local mine = vx.rand({ 10 }, { generator = g }):bytes()
    vx.randperm(10, { generator = g })
    assert.equal(a, vx.rand({ 10 }):bytes())
    assert.equal(mine, vx.rand({ 10 }, { generator = vx.generator(9) }):bytes())
    assert.not_equal(mine, vx.rand({ 10 }, { generator = g }):bytes())
  end)

  it("draws nothing where a call is refused", function()
    local g, i32, x = vx.generator(7), vx.zeros({ 3 }, { dtype = "i32" }), vx.zeros { 1, 4, 2, 2 }
    local frames = vx.tensor({ 5, 1 }, { dtype = "i32" })
    for name, refused in pairs {
      uniform = function() vx.uniform(i32, 0, 1, g) end, normal = function() vx.normal(i32, 0, 1, g) end,
      dirichlet = function() vx.dirichlet(vx.zeros { 2, 3 }, vx.tensor { 1, -1, 1 }, false, g) end,
      permutation = function() vx.permutation(-1, g) end,
      randperm = function() vx.randperm(2 ^ 40, { generator = g }) end,
      dropout = function() vx.dropout(i32, 0.5, g) end,
      attention = function() vx.attention(x, x, vx.zeros { 1, 3, 2, 2 }, { dropout = 0.5, generator = g }) end,
      kmeans_start = function() vx.kmeans_start(vx.full({ 4, 2 }, 0 / 0), 2, g) end,
      span_mask = function() vx.span_mask(2, 20, { lengths = vx.tensor({ 30, 2 }, { dtype = "i32" }) }, g) end,
      distractors = function() vx.distractors(frames, 9, 3, g) end,
      Linear = function() vx.nn.Linear(2, 3, { bios = true }) end,
      SeparableConv2d = function() vx.nn.SeparableConv2d(2, 0) end } do
      local default = vx.random_state()
      assert.is_false(pcall(refused), name)
      assert.equal(0, g.drawn, name)
      assert.same(default, vx.random_state(), name)
    end
    vx.normal(vx.zeros { 2 }, 0, 1, g)
    assert.equal(1, g.drawn)
  end)

  it("draws at a replay what steps without refused calls draw", function()
    local function course(recorded)
      local g, sums = vx.generator(3), {}
      local x, y = vx.zeros { 4 }, vx.zeros({ 3 }, { dtype = "i32" })
      local function step()
        pcall(vx.uniform, y, 0, 1, g)
        vx.uniform(x, 0, 1, g)
      end
      local graph = recorded and vx.graph(step)
      for i = 1, 5 do
        if graph then graph:replay() else step() end
        sums[i] = x:totable()[1]
      end
      return sums
    end
    assert.same(course(false), course(true))
  end)

  it("go on from a saved state", function()
    vx.seed(3)
    vx.randn { 5 }
    local state = vx.random_state()
    local a = vx.randn({ 5 }):bytes()
    vx.seed(99)
    vx.set_random_state(state)
    assert.equal(a, vx.randn({ 5 }):bytes())
  end)

  it("are the same in another process", function()
    vx.seed(21)
    local here = {}
    for _, v in ipairs(vx.randn({ 5 }):totable()) do here[#here + 1] = ("%.9g"):format(v) end
    local out, ok = H.child [[
      local vx = require "vertex"
      vx.device "cpu"
      vx.seed(21)
      local t = {}
      for _, v in ipairs(vx.randn({5}):totable()) do t[#t + 1] = ("%.9g"):format(v) end
      print(table.concat(t, " ")) ]]
    assert.is_true(ok, out)
    assert.equal(table.concat(here, " ") .. "\n", out)
  end)
end)

describe("a written file", function()
  it("appears whole", function()
    local path = H.scratch "whole.txt"
    core.write_file(path, "one\0two")
    assert.equal("one\0two", H.read(path))
    assert.equal(7, core.file_size(path))
    core.write_file(path, "three")
    assert.equal("three", H.read(path))
    assert.is_nil(core.file_size(H.scratch "none"))
  end)

  it("does not appear before commit, or after abort", function()
    local path = H.scratch "never.txt"
    local w = core.writer(path)
    w:bytes "half"
    assert.is_nil(H.read(path))
    w:abort()
    assert.is_nil(H.read(path))
    local w2 = core.writer(path)
    w2:bytes "forgotten"
    w2 = nil -- luacheck: ignore
    collect()
    for entry in lfs.dir(H.scratch "") do assert.is_nil(entry:find("never", 1, true)) end
  end)

  it("cannot be opened in a folder that is not there", function()
    H.raises(function() core.writer "/nonexistent/folder/x" end, "/nonexistent/folder/x")
  end)
end)

describe("interrupts", function()
  it("only raise a flag while caught", function()
    local out, ok = H.child [[
      local vx = require "vertex"
      local core = require "vertex.core"
      core.catching_interrupts(function()
        assert(not core.interrupted())
        os.execute("kill -TERM $PPID")
        assert(core.interrupted())
      end)
      print "finished" ]]
    assert.is_true(ok, out)
    assert.equal("finished\n", out)
  end)
end)
