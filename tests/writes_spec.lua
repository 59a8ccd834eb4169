-- What is written, and who sees it: memory that a gradient still needs, writes to what gradients flow through, copies
-- between views of one storage. Nothing is silently wrong: the right numbers, or an error that changes nothing.

local H = require "tests.helper"
local core = require "vertex.core"
local larger = require "tests.larger_cases"
local vx = H.vx
local ops = vx.ops
local raises = H.raises

local function leaf(t) return vx.tensor(t, { requires_grad = true }) end

describe("memory under the tape", function()
  it("may not change between an op and its gradient: whatever writes is named, and no gradient changes", function()
    local writes = {
      fill = function(x) x:fill(9) end,
      zero = function(x) x:zero() end,
      copy = function(x) x:copy(vx.tensor { 7, 8, 9 }) end,
      fromtable = function(x) x:fromtable { 7, 8, 9 } end,
      frombytes = function(x) x:frombytes(vx.tensor({ 7, 8, 9 }):bytes()) end,
      element = function(x) x[2] = 5 end,
      view = function(x) x:narrow(1, 2, 1):fill(5) end,
      detached = function(x) x:detach():fill(5) end,
      normal = function(x) ops.normal(x) end,
      uniform = function(x) ops.uniform(x) end,
    }
    for name, write in pairs(writes) do
      local w, x = leaf { 1, 1, 1 }, vx.tensor { 1, 2, 3 }
      ops.affine(w, 2):sum():backward()
      local l = (w * x):sum()
      write(x)
      local message = raises(function() l:backward() end, "backward: mul needs b (3) as it was", "compute the loss")
      assert.is_truthy(message:find(({ element = "fill", view = "fill", detached = "fill", zero = "fill",
        fromtable = "write", frombytes = "write" })[name] or name, 1, true), message)
      assert.same({ 2, 2, 2 }, w.grad:totable())
    end
  end)

  it("a step of the optimizer between two losses that share a weight", function()
    local w, x = leaf { 1, 1, 1 }, vx.tensor { 1, 2, 3 }
    local optimizer = vx.optim.AdamW({ w }, { lr = 0.1 })
    local first, second, third = (w * x):sum(), (w * w):sum(), (w + x):sum()
    first:backward()
    optimizer:step()
    raises(function() second:backward() end, "mul needs a (3)", "adamw has written")
    optimizer:zero_grad()
    third:backward() -- needs neither
    assert.same({ 1, 1, 1 }, w.grad:totable())
  end)

  it("a codebook that changes between forward and backward", function()
    for _, method in ipairs { "ste-euclid", "re-cosine", "softmax-knn-ce" } do
      local q = vx.quantizer(method, { dim = 4, codes = 8, k = 2, seed = 1 })
      local z = vx.randn { 12, 4 }
      z.requires_grad = true
      local o = q:forward(z)
      vx.no_grad(function() q.codebook:copy(q.codebook * 2) end)
      raises(function() (o.quantized:sum() + o.reg):backward() end, "backward: ", "codebook", "copy has written")
    end
  end)

  it("what an op of one's own keeps, however deep, and what it is given", function()
    for name, keep in pairs { deep = function(ctx, _, t) ctx.a = { b = { c = t } } end,
      round = function(ctx, _, t)
        ctx.a = { ctx = ctx, t }
        ctx.a.a = ctx.a
      end, upvalue = function() end } do
      local t, w = vx.tensor { 1, 2 }, leaf { 3, 4 }
      local scaled = vx.custom { name = name, forward = function(ctx, x, y)
        keep(ctx, x, y)
        return x * y
      end, backward = function(_, dy) return dy * t end }
      local l = scaled(w, t):sum()
      t:fill(9)
      raises(function() l:backward() end, name .. " needs ", "(2) as it was, and fill has written")
    end
    local chain = {}
    local deep = vx.custom { name = "deep", forward = function(ctx, x)
      local at = chain
      for _ = 1, 20000 do
        at.n = {}
        at = at.n
      end
      ctx.chain = chain
      return x * 2
    end, backward = function(_, dy) return dy * 2 end }
    local w = leaf { 1 }
    deep(w):backward()
    assert.same({ 2 }, w.grad:totable())
  end)

  it("a result that is written to, and one that nobody's gradient reads", function()
    local x = leaf { 1, 2 }
    local y = x:exp()
    y:detach():fill(0)
    raises(function() y:sum():backward() end, "exp needs its result (2)", "fill")
    local z = x * 3 + 1
    z:detach():fill(0)
    z:sum():backward()
    assert.same({ 3, 3 }, x.grad:totable())
  end)

  it("every op: another input gives its gradients or an error, never other gradients", function()
    local refused = 0
    for _, op in ipairs(ops.registry) do
      local number = H.number_of(op.name)
      if op.cases and op.backward or op.composite then
        for kind, list in ipairs { op.cases and op.cases(H.generator(100 + number)) or {},
          larger[op.name] and larger[op.name](H.generator(600 + number)) or {} } do
          for c, args in ipairs(list) do
            local n = table.maxn(args)
            local function gradients(changed)
              vx.seed(5)
              local inputs = {}
              for i = 1, n do
                inputs[i] = args[i]
                if core.is_tensor(args[i]) then
                  inputs[i] = core.new_like(args[i]):copy(args[i])
                  inputs[i].requires_grad = args[i].requires_grad
                end
              end
              local y = op.name and ops[op.name](unpack(inputs, 1, n))
              if not (core.is_tensor(y) and y.requires_grad) then return nil end
              local dy = core.new_like(y):fill(0.5)
              if changed then
                local x = inputs[changed]:detach()
                x:copy(x:dtype() == "f32" and x * 1.5 + 0.25 or core.new_like(x):zero())
              end
              local ok, message = pcall(y.backward, y, dy)
              if not ok then return tostring(message) end
              local list_of = {}
              for i = 1, n do
                if core.is_tensor(inputs[i]) and inputs[i].grad then list_of[#list_of + 1] = inputs[i].grad:bytes() end
              end
              return list_of
            end
            local expected = gradients()
            for i = 1, n do
              if expected and core.is_tensor(args[i]) then
                local got = gradients(i)
                local what = ("%s, case %d.%d, argument %d"):format(op.name, kind, c, i)
                if type(got) == "string" then
                  refused = refused + 1
                  assert.is_truthy(got:find("as it was, and copy has written", 1, true), what .. ": " .. got)
                else
                  assert.same(expected, got, what)
                end
              end
            end
          end
        end
      end
    end
    assert.is_true(refused > 50)
  end)

  it("a recorded graph's launch writes what its ops write, and that alone #cuda", function()
    if not pcall(core.device_number, "cuda:0") then pending "no GPU" return end
    local function on(t) return vx.tensor(t, { device = "cuda:0" }) end
    local x, y, w = on { 1, 2 }, on { 0, 0 }, leaf { 1, 1 }:to "cuda:0"
    w.requires_grad = true
    local step = vx.graph(function()
      y:copy(x)
      return x * 2
    end, { device = "cuda:0" })
    step:replay()
    local result = step:replay()
    local reads, writes, made = (w * x):sum(), (w * y):sum(), (w * result):sum()
    step:replay()
    reads:backward()
    raises(function() writes:backward() end, "mul needs b", "a graph's launch")
    raises(function() made:backward() end, "mul needs b")
  end)
end)

describe("writes that gradients would not see", function()
  it("to a result on the tape are refused, by every way to write", function()
    local x = leaf { { 1, 2 }, { 3, 4 } }
    local z = x * 2
    raises(function() z[1] = 0 end, "x[i] = ...", "vx.where", "x:detach()")
    raises(function() z[1][2] = 0 end, "x[i] = ...")
    raises(function() z[1]:fill(0) end, "fill: ")
    raises(function() z:fill(0) end, "fill: ")
    raises(function() z:zero() end, "zero: ")
    raises(function() z:copy(vx.ones { 2, 2 }) end, "copy: ")
    raises(function() z:narrow(1, 1, 1):copy(vx.ones { 1, 2 }) end, "copy: ")
    raises(function() z:fromtable { 1, 2, 3, 4 } end, "fromtable: ")
    raises(function() z:frombytes(("x"):rep(16)) end, "frombytes: ")
    raises(function() ops.normal(z) end, "normal: ")
    raises(function() ops.uniform(z) end, "uniform: ")
    raises(function() ops.dirichlet(z, vx.ones { 2 }) end, "dirichlet: ")
    raises(function() ops.scatter_add(z, vx.ones { 1, 2 }, vx.tensor({ 0 }, { dtype = "i32" })) end, "scatter_add: ")
    assert.same({ { 2, 4 }, { 6, 8 } }, z:totable()) -- nothing has changed
    z:sum():backward()
    assert.same({ { 2, 2 }, { 2, 2 } }, x.grad:totable())
  end)

  it("of a value on the tape are refused, and told what keeps its gradient", function()
    local y, x = leaf { 1, 2 }, vx.zeros { 3, 2 }
    raises(function() x[1] = y * 2 end, "would be lost", "vx.stack", "value:detach()")
    raises(function() x[1] = y end, "would be lost")
    assert.same({ { 0, 0 }, { 0, 0 }, { 0, 0 } }, x:totable())
    x[1] = (y * 2):detach()
    vx.no_grad(function() x[2] = y * 3 end)
    x[3] = 7
    assert.same({ { 2, 4 }, { 3, 6 }, { 7, 7 } }, x:totable())
    raises(function() x:copy(leaf { { 1, 2 }, { 3, 4 }, { 5, 6 } } * 2) end, "copy: ", "would be lost")
    local index = vx.tensor({ 0 }, { dtype = "i32" })
    raises(function() ops.scatter_add(x, leaf { { 1, 2 } }, index) end, "scatter_add: ", "would be lost")
    raises(function() ops.dirichlet(x, leaf { 1, 2 }) end, "dirichlet: ", "would be lost")
    assert.same({ { 2, 4 }, { 3, 6 }, { 7, 7 } }, x:totable())
    x:copy(leaf { { 1, 2 }, { 3, 4 }, { 5, 6 } }) -- a parameter's values, a copy of a network's say
    x:narrow(1, 1, 2):copy(leaf { { 1, 2 }, { 3, 4 }, { 5, 6 } }:narrow(1, 1, 2))
    vx.no_grad(function() ops.scatter_add(x, leaf { { 1, 2 } }, index) end)
    assert.same({ { 2, 4 }, { 3, 4 }, { 5, 6 } }, x:totable())
    local w = leaf { { 1, 2 }, { 3, 4 } } -- a leaf may be filled: nothing flows into it
    w[1] = 0
    w:narrow(1, 2, 1):narrow(2, 1, 1):fill(5)
    assert.same({ { 0, 0 }, { 5, 4 } }, w:totable())
  end)
end)

describe("ops that write to a tensor they read", function()
  it("give what they give for a copy of it", function()
    local t = vx.tensor { { 1, 1 }, { 2, 2 }, { 3, 3 } }
    ops.scatter_add(t, t, vx.tensor({ 1, 2, 0 }, { dtype = "i32" }))
    assert.same({ { 4, 4 }, { 3, 3 }, { 5, 5 } }, t:totable())
    local c = vx.tensor({ { 0, 2, 2 } }, { dtype = "i32" })
    ops.count_codes(c:reshape { 3, 1 }, 3, c)
    assert.same({ { 1, 2, 4 } }, c:totable())
    local alpha = { 0.5, 2, 3 }
    local p = vx.tensor { alpha, { 1, 1, 1 } }
    local expected = ops.dirichlet(vx.empty { 2, 3 }, vx.tensor(alpha), false, vx.generator(3)):totable()
    assert.same(expected, ops.dirichlet(p, p[1], false, vx.generator(3)):totable())
  end)
end)

describe("copies between views of one storage", function()
  --- Runs dst:copy(src) of two views of a tensor, which must give what a copy of the source first would give.
  local function check(device, size, dtype, view, what)
    local flat = {}
    for i = 1, H.product(size) do flat[i] = i % 251 end
    local function run(direct)
      local x = vx.empty(size, { dtype = dtype, device = device })
      x:copy(vx.tensor(flat, { dtype = dtype, device = "cpu" }):reshape(size))
      local dst, src = view(x)
      dst:copy(direct and src or core.new_like(src):copy(src))
      return x:to("cpu"):totable()
    end
    assert.same(run(false), run(true), what .. " on " .. device)
  end

  for _, device in ipairs { "cpu", "emu:0" } do
    it("give what a copy of the source first would give: " .. device, function()
      for _, n in ipairs { 5, 100, 40000 } do
        for _, dtype in ipairs { "f32", "i32", "u8", "bf16" } do
          check(device, { n }, dtype, function(x) return x:narrow(1, 2, n - 1), x:narrow(1, 1, n - 1) end, "up " .. n)
          check(device, { n }, dtype, function(x) return x:narrow(1, 1, n - 1), x:narrow(1, 2, n - 1) end, "down " .. n)
        end
      end
      for _, n in ipairs { 3, 70, 130 } do
        check(device, { n, n }, "f32", function(x) return x, x:t() end, "transposed " .. n)
        check(device, { n, n }, "f32", function(x) return x:narrow(1, 2, n - 1), x:narrow(1, 1, n - 1) end, "row " .. n)
        check(device, { n, n }, "f32", function(x) return x:select(2, 1), x:select(1, 1) end, "column, row " .. n)
        check(device, { n, n }, "f32", function(x) return x, core.view(x, { n, n }, { 0, 1 }, 0) end, "repeated " .. n)
      end
    end)
  end

  it("refuse a destination whose elements share memory, and change nothing", function()
    local x = vx.tensor { { 1 }, { 2 }, { 3 } }
    for _, view in ipairs { x:expand { 3, 4 }, core.view(x, { 2, 2 }, { 1, 1 }, 0),
      core.view(vx.zeros { 16 }, { 4, 3 }, { 2, 3 }, 0) } do
      raises(function() view:copy(vx.ones(view:shape())) end, "copy: elements of dst", core.shape_text(view),
        "share memory")
      raises(function() view:fromtable(H.flat(vx.ones(view:shape()))) end, "share memory")
    end
    local repeated = x:expand { 3, 4 }
    raises(function() repeated[1] = vx.ones { 4 } end, "share memory")
    assert.same({ { 1 }, { 2 }, { 3 } }, x:totable())
    -- strides that interlock, but meet nowhere
    local y = core.view(vx.zeros { 12 }, { 2, 3 }, { 3, 2 }, 0)
    y:copy(vx.tensor { { 1, 2, 3 }, { 4, 5, 6 } })
    assert.same({ { 1, 2, 3 }, { 4, 5, 6 } }, y:totable())
    x:expand({ 3, 4 }):fill(5) -- one number for all is no question of order
    assert.same({ { 5 }, { 5 }, { 5 } }, x:totable())
  end)
end)
