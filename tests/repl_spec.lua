-- The interactive session as its users meet it: on a terminal (a pseudo-terminal this file types into), on a dumb one,
-- from a pipe; and what ?name says.

local H = require "tests.helper"
local vx = H.vx
local core = require "vertex.core"
local help = require "vertex.interactive.help"
local Session = require "vertex.interactive.session"
local terminals = require "tests.terminal"
local terminal = terminals.open

-- -- Pipes ------------------------------------------------------------------------------------------------------------

--- What a session on a pipe writes: standard output, standard error, exit status.
local function piped(text, command)
  local input, errors = H.write(H.scratch "input", text), H.scratch "errors"
  local pipe = io.popen(("%s < '%s' 2> '%s'; echo rc=$?"):format(command or "timeout 60 luajit lua/repl.lua", input,
    errors))
  local out = pipe:read "*a"
  pipe:close()
  local body, status = out:match "^(.*)rc=(%d+)\n$"
  return body, H.read(errors), tonumber(status)
end

describe("a session on a pipe", function()
  it("shows values without prompts, and takes inputs of several lines", function()
    local out, errors, status = piped 'x = 20\nx + 1\nfor i = 1, 2 do\n  print("line", i)\nend\n_, "text", nil\n'
    assert.equal('21\nline\t1\nline\t2\n21  "text"  nil\n', out)
    assert.equal("", errors)
    assert.equal(0, status)
  end)

  it("keeps its own names: every global of Lua's is the user's to assign", function()
    local names = { "assert", "collectgarbage", "debug", "error", "getfenv", "getmetatable", "io", "ipairs", "jit",
      "loadstring", "math", "next", "os", "pairs", "pcall", "rawget", "rawset", "require", "select", "setfenv",
      "setmetatable", "string", "table", "tonumber", "tostring", "type", "unpack", "xpcall", "package", "print" }
    local lines = {}
    for i, name in ipairs(names) do lines[i] = name .. " = 5" end
    local out, errors, status = piped(table.concat(lines, "\n") .. "\n1 + 1\ntype + table\n?softmax-ppl\n"
      .. "vx.tensor { 1, 2 } + 1\nvx.nn.Linear(2, 3)\nvx.matmul(1)\n{ 1, 2 }\n")
    assert.truthy(out:find("2\n10\n", 1, true), out .. errors)
    assert.truthy(out:find("vx.quantizer(\"softmax-ppl\", options)", 1, true), out .. errors)
    assert.truthy(out:find("[2., 3.]", 1, true) and out:find("Linear(2 -> 3)", 1, true), out .. errors)
    assert.truthy(errors:find("matmul: a is 1, expected a tensor", 1, true), errors)
    assert.equal("{ 1, 2 }\n", out:sub(-9))
    assert.equal(1, status)
  end)

  it("keeps Lua's libraries: their tables, and where modules are found, are the user's to change", function()
    local out, errors = piped [[
local next, require = next, require
for _, name in next, { "io", "table", "string", "math", "debug", "os", "coroutine", "jit", "bit", "ffi", "lfs" } do
  local library = require(name)
  for key in next, library do library[key] = nil end
end
package.path, package.cpath, package.loaders, package.searchpath = "x", "x", {}, nil
for name in next, package.loaded do package.loaded[name] = nil end
package.loaded = {}
vx.tensor { 1, 2 } + 1
?softmax-ppl
vx.nn.Linear(2, 3)
{ 1, 2 }
vx.matmul(1)
("x"):rep(3)
function string.twice(s) return s .. s end
("ab"):twice()
vx.simplex.dirichlet({ 1, 1, 1 }, 2):shape()
vx.runs.progress ~= nil and vx.data.images ~= nil and vx.plot.figure() ~= nil and vx.metrics.moments ~= nil
vx.restore "nofile"
]]
    assert.truthy(out:find("[2., 3.]", 1, true) and out:find("Linear(2 -> 3)", 1, true), out .. errors)
    assert.truthy(out:find("vx.quantizer(\"softmax-ppl\", options)", 1, true), out .. errors)
    assert.equal('{ 1, 2 }\n"xxx"\n"abab"\n{ 2, 3 }\ntrue\n', out:match "Linear.-\n(.*)$", errors)
    assert.truthy(errors:find("matmul: a is 1, expected a tensor", 1, true), errors)
    assert.truthy(errors:find("restore: nofile: no such file", 1, true), errors)
  end)

  it("has steps that hold for coroutines made inside", function()
    local out, errors = piped [[
f = function() x = vx.ones { 2 } end
vx.step(function() coroutine.wrap(f)() end)
x:sum()
vx.step(function() coroutine.resume(coroutine.create(f)) end)
x:sum()
]]
    assert.equal("", out)
    assert.equal(2, select(2, errors:gsub("this tensor was released: it was made inside vx.step", "")), errors)
  end)

  it("goes on where an input leads io's default files elsewhere", function()
    local file = H.write(H.scratch "default", "a line\n")
    local out, errors, status = piped(("io.input '%s'; io.output '%s.out';\nio.read()\n1 + 1\nio.write 'there';\n")
      :format(file, file) .. "print 'here'; io.output():close();\n?sum\n")
    assert.equal('"a line"\n2\n', out:sub(1, 11), errors)
    assert.truthy(out:find("here\n", 1, true) and out:find("vx.sum(", 1, true), out .. errors)
    assert.equal("there", H.read(file .. ".out"))
    assert.equal(0, status)
  end)

  it("takes the last line without its end", function() assert.equal("2\n", (piped "1 + 1")) end)

  it("keeps locals, and keeps quiet after a semicolon", function()
    assert.equal("7\n", (piped "local a, b = 3, 4\na * b;\na + b\n"))
  end)

  it("has vx, and shows tensors, modules and tables", function()
    local out = piped [[
vx.zeros{2, 3}
vx.nn.Sequential(vx.nn.Linear(3, 4))
vx.nn
vx.sum
{ b = { 1, 2 }, a = "x\n" }
]]
    assert.truthy(out:find("f32 (2,3) on cpu", 1, true), out)
    assert.truthy(out:find("1: Linear(3 -> 4)  16 parameters", 1, true), out)
    assert.truthy(out:find("module vertex.nn\nApply ", 1, true), out)
    assert.truthy(out:find("function(x, dims, keep) at lua/vertex/ops/reduce.lua:", 1, true), out)
    assert.truthy(out:find('{ a = "x\\n", b = { 1, 2 } }', 1, true), out)
  end)

  it("goes on after errors, which show the input's line and no frames of its own, and ends with status 1", function()
    local out, errors, status = piped [[
function f(t)
  return t.a.b
end
f {}
vx.matmul(vx.zeros{2,3}, vx.zeros{4,5})
x = = 1
for i = 1
1 + 1
2 + 2
]]
    assert.equal("4\n", out) -- `1 + 1` ends what `for i = 1` began
    assert.equal(1, status)
    assert.truthy(errors:find("[1]:2: attempt to index field 'a' (a nil value)\n", 1, true), errors)
    assert.truthy(errors:find "%[1%]:2 f +return t%.a%.b\n", errors)
    assert.truthy(errors:find "%[2%]:1 +f {}\n", errors)
    assert.truthy(errors:find("[3]:1: matmul: a (2,3) and b (4,5) disagree on the inner size", 1, true), errors)
    assert.truthy(errors:find("[4]:1   x = = 1", 1, true), errors)
    assert.falsy(errors:find "lua/", errors)
    assert.falsy(errors:find "%[C%]", errors)
  end)

  it("says that an input has no end, or a value cannot be shown", function()
    local _, errors, status = piped "for i = 1, 2 do\n"
    assert.truthy(errors:find("'end' expected near '<eof>'", 1, true), errors)
    assert.equal(1, status)
    errors = select(2, piped 'setmetatable({}, { __tostring = function() error "no text" end })\n')
    assert.truthy(errors:find("the value cannot be shown: ", 1, true) and errors:find("no text", 1, true), errors)
  end)

  it("tells the time of an input that took long", function()
    local _, errors = piped 'os.execute "sleep 1.1"\nx = 1\n'
    assert.truthy(errors:find "^%(1%.%d%d s%)\n$" or errors:find "^%(%d+%.%d%d s%)\n$", errors)
  end)

  it("reads what an input reads, runs shell commands, never writes behind unfinished text", function()
    assert.equal('"hello"\n', (piped "word = io.read()\nhello\nword\n"))
    assert.equal("from the shell\n", (piped "!echo from the shell\n"))
    assert.equal("abc\n5\n", (piped 'io.write "abc";\n5\n'))
    assert.equal("abc\n5\n", (piped 'io.stdout:write("abc");\n5\n'))
  end)

  it("is stopped by Ctrl-C in a loop", function()
    local _, errors, status = piped("while true do end\nprint 'not reached'\n",
      "timeout --foreground -s INT 1 luajit lua/repl.lua")
    assert.truthy(errors:find("interrupted\n", 1, true), errors)
    assert.equal(130, status == 124 and 130 or status) -- timeout says 124 of what it ended
  end)

  it("runs a file, with a session after it where asked", function()
    local file = H.write(H.scratch "script.lua", 'answer = #vx.zeros{3}:shape() + #arg\nprint(arg[1], ...)\n')
    local out, errors, status = piped("", ("luajit lua/repl.lua '%s' one two"):format(file))
    assert.same({ "one\tone\ttwo\n", "", 0 }, { out, errors, status })
    out = piped("answer\n", ("luajit lua/repl.lua -i '%s'"):format(file))
    assert.equal("nil\n1\n", out)
    out, errors, status = piped("", ("luajit lua/repl.lua '%s'"):format(H.write(H.scratch "bad.lua", "error 'boom'")))
    assert.truthy(errors:find("bad.lua:1: boom", 1, true), errors)
    assert.same({ "", 1 }, { out, status })
    out, errors, status = piped("", "luajit lua/repl.lua --nonsense")
    assert.truthy(errors:find("unknown option '--nonsense'; known: -i, --help, --version", 1, true), errors)
    assert.same({ "", 2 }, { out, status })
    assert.truthy(piped("", "luajit lua/repl.lua --help"):find("[-i] [FILE", 1, true))
    out, errors, status = piped("1\n", "env VERTEX_PICTURES=sixel luajit lua/repl.lua")
    assert.truthy(errors:find("VERTEX_PICTURES is 'sixel', expected kitty, iterm2 or none", 1, true), errors)
    assert.same({ "", 1 }, { out, status })
  end)
end)

describe("README's session", function()
  it("is what a session says", function()
    local function unnumbered(text) return (text:gsub("%.lua:%d+", ".lua")) end
    local inputs, expected = {}, {}
    for line in H.read(core.root .. "/README.md"):match "## Exploring.-```\n(.-)```":gmatch "[^\n]+" do
      local input = line:match "^>>? (.*)$"
      if input then inputs[#inputs + 1] = input else expected[#expected + 1] = line end
    end
    local out = piped(table.concat(inputs, "\n") .. "\n", "sh -c 'luajit lua/repl.lua 2>&1'")
    out = out:gsub("%(%d+%.%d%d s%)\n", "") -- told of a slow input, where the machine is busy
    assert.equal(unnumbered(table.concat(expected, "\n") .. "\n"), unnumbered(out))
  end)
end)

-- -- Terminals --------------------------------------------------------------------------------------------------------

describe("a session on a terminal", function()
  after_each(terminals.close_all)

  it("greets, shows values, remembers the last one, leaves at Ctrl-D", function()
    local t = terminal()
    t:wait(("Vertex %s on cpu"):format(core.version))
    t:wait "> "
    t:enter("6 * 7", "\n42\r\n")
    t:enter("_ + 1", "\n43\r\n")
    t:enter("_ + 1;", "\r\n")
    t:enter("_", "\n44\r\n")
    assert.equal(0, t:leave())
  end)

  it("takes pasted text as it is, and brings an input of several lines back as one", function()
    local t = terminal()
    t:wait "> "
    t:type "\27[200~text = 'a\tb'\r\27[201~"
    t:wait "> "
    t:enter("#text .. '!'", '\n"3!"\r\n')
    t:wait "> "
    t:type "\27[200~function twice(n)\r\treturn 2 * n\rend\rtwice(21)\r\27[201~"
    t:wait "\n42\r\n"
    t:wait "> "
    t:type "function t\27[A"
    t:wait "wice(n) return 2 * n end"
    t:type "\r"
    t:wait "> "
    t:enter("twice(4)", "\n8\r\n")
    assert.equal(0, t:leave())
  end)

  it("takes pasted lines that end in two characters, and marks that come in pieces", function()
    local t = terminal()
    t:wait "> "
    t:type "\27[200~a = [[\r\n1\r\n2]]\r\n#a\r\n\27[201~"
    t:wait "\n3\r\n"
    t:wait "> "
    t:type "b = [[\r\n1\r\n2]]\r\n" -- where a terminal marks nothing
    t:enter("#b", "\n3\r\n")
    t:wait "> "
    for _, piece in ipairs { "\27", "[", "200~c = 'x\ty\27", "\27[2", "01", "~'\r" } do
      t:type(piece)
      os.execute "sleep 0.1"
    end
    t:wait "> "
    t:enter("#c, _", '\n4  3\r\n')
    assert.equal(0, t:leave())
  end)

  it("keeps control characters beyond ASCII, and never writes them", function()
    local t = terminal()
    t:wait "> "
    t:enter("'a\194\133b\194\155c'", '\n"a\\194\\133b\\194\\155c"\r\n')
    t:type "\27[200~#'a\194\133b\194\155c'\27[201~\r"
    t:wait "\n7\r\n"
    assert.falsy(t.all:find "\194[\128-\159]")
    assert.equal(0, t:leave())
  end)

  it("completes names through tables, metatables and quotes", function()
    local t = terminal()
    t:wait "> "
    t:enter("vx.zer\t{2}", "f32 (2) on cpu")
    t:enter("x = vx.zeros{3, 4}", "> ")
    t:enter("x:shap\t()", "{ 3, 4 }")
    t:enter("q = vx.quantizer('softmax-knn-c\t', {dim = 4, codes = 8})", "> ")
    t:enter("q.labe\t", '"softmax-knn-ce"')
    t:enter("vx.random\t().drawn >= 0", "\ntrue\r\n") -- random_state: set_random_state begins otherwise
    t:type "vx.ma\t"
    t:wait "matmul" -- listed: several begin so
    t:enter("t\t == vx.matmul", "\ntrue\r\n")
    t:enter("vx.nonsens\t", "nil\r\n")
    t:type "vx.matmul\t" -- there is nothing to add: what is it?
    t:wait "vx.matmul(a, b)"
  end)

  it("stops a running loop at Ctrl-C, again and again, and stays", function()
    local t = terminal()
    t:wait "> "
    for _, loop in ipairs { "while true do end", "while true do pcall(error) end",
      "while true do vx.randn{8}:sum() end",
      "coroutine.wrap(function() while true do end end)()" } do
      t:type(loop .. "\r")
      t:wait(loop:sub(-6) .. "\r\n")
      os.execute "sleep 0.2"
      t:type "\3"
      t:wait "interrupted"
      t:wait "> "
    end
    t:enter("1 + 1", "\n2\r\n")
  end)

  it("drops what is typed at Ctrl-C, also several lines", function()
    local t = terminal()
    t:wait "> "
    t:type "x = 'half\3"
    t:wait "^C\r\n"
    t:enter("for i = 1, 2 do", ">> ")
    t:type "\3"
    t:wait "^C\r\n"
    t:enter("x", "nil\r\n")
    t:enter("for i = 1, 2 do", ">> ")
    t:enter("print(i * 111) end", "\n111\r\n222\r\n")
  end)

  it("edits lines of any characters", function()
    local t = terminal()
    t:wait "> "
    t:enter("#'é\127\1\5ü' -- end\27[D", "\n2\r\n") -- é was deleted, ü is two bytes
    t:enter("'a\27[D\27[D\5b'", '"ab"')
  end)

  it("finds earlier lines, those of earlier sessions too", function()
    local t = terminal()
    t:wait "> "
    t:enter("first_of_all = 11", "> ")
    t:enter("second = 2", "> ")
    t:enter("firs\27[A", "\n") -- the one that begins so
    t:leave()
    assert.truthy(H.read(H.scratch "history"):find("first_of_all = 11\nsecond = 2\nfirst_of_all = 11\n", 1, true))
    t = terminal()
    t:wait "> "
    t:type "\27[A\27[A"
    t:wait "second = 2"
    t:enter("", "> ")
    t:enter("second + 1", "3\r\n")
  end)

  it("sets the clock for slow inputs and answers questions", function()
    local t = terminal()
    t:wait "> "
    t:enter("?vx.nn.Linear", "nn.Linear(inputs, outputs, options), a class of modules")
    t:enter("?", "what is known of")
    t:enter("?no_such", "nothing is known of 'no_such'")
  end)

  local picture = "p = setmetatable({}, { __mime = function() "
    .. 'return { ["image/png"] = "PNG", ["text/plain"] = "as text" } end })'
  it("shows pictures where the terminal does, text elsewhere", function()
    local t = terminal "VERTEX_PICTURES=kitty"
    t:wait "> "
    t:enter(picture, "> ")
    t:enter("p", "\27_Gf=100,a=T,m=0;UE5H\27\\")
    t = terminal "VERTEX_PICTURES=none"
    t:wait "> "
    t:enter(picture, "> ")
    t:enter("p", "\nas text\r\n")
  end)

  it("stops the loop around a program that Ctrl-C ended, and what follows a command", function()
    local t = terminal()
    t:wait "> "
    t:enter("for i = 1, 3 do print('turn ' .. i) pcall(os.execute, 'sleep 20') end", "turn 1\r\n")
    os.execute "sleep 0.3"
    t:type "\3"
    t:wait "interrupted"
    t:wait "> "
    t:type "!echo running; sleep 20\r"
    t:wait "\nrunning\r\n"
    os.execute "sleep 0.3"
    t:type "\3"
    t:wait "\n> "
    t:enter("os.execute 'exit 3' / 256", "\n3\r\n") -- its own status, and no interrupt
    t:enter("1 + 1", "\n2\r\n")
    assert.falsy(t.all:find("\r\nturn 2", 1, true), t.all)
  end)

  it("shows as many numbers of a row as fit, and a batch of pictures as such", function()
    for columns, expected in pairs { [80] = "[ 0.,  1.,  2., ..., 17., 18., 19.]\r\n", [200] = "17., 18., 19.]\r\n" } do
      local t = terminal("VERTEX_PICTURES=none", columns)
      t:wait "> "
      local text = t:enter("vx.arange(20)", expected)
      assert.equal(columns == 200, text:find(" 3.,  4.,  5.,  6.", 1, true) ~= nil, text)
      t:enter("vx.zeros { 200 }", "..., ")
      for line in t:wait("> "):gmatch "[^\r\n]+" do assert.is_true(#line < columns, line) end
      t:enter("vx.rand { 4, 16, 16, 3 }", "\n4 pictures of 16 x 16 in 3 channels, 0 to 1\r\n> ")
    end
    local t = terminal "VERTEX_PICTURES=kitty"
    t:wait "> "
    t:enter("vx.rand { 4, 16, 16, 3 }", "\27_Gf=100,a=T,m=")
  end)

  it("does without editing on a dumb terminal", function()
    local t = terminal "TERM=dumb"
    t:wait "> "
    t:enter("1 + 1", "\n2\r\n")
    t:enter("for i = 1, 2 do", ">> ")
    t:type "\3"
    t:wait "^C\r\n"
    t:type "while true do end\r"
    os.execute "sleep 0.3"
    t:type "\3"
    t:wait "interrupted"
    t:wait "> "
    t:type "\3"
    t:wait "^C\r\n"
    t:enter("2 + 2", "\n4\r\n")
    assert.equal(0, t:leave())
    assert.falsy(t.all:find "\27", t.all)
  end)
end)

-- -- Help -------------------------------------------------------------------------------------------------------------

describe("?name", function()
  local session = Session.new { env = setmetatable({ vx = vx }, { __index = _G }) }
  local function about(name, ...)
    local text = assert(help.about(session, name))
    for _, part in ipairs { ... } do
      assert.truthy(text:find(part, 1, true), ("'%s' is not in what ?%s says:\n%s"):format(part, name, text))
    end
    return text
  end

  it("shows an op's parameters, comment and contract", function()
    about("vx.matmul", "vx.matmul(a, b)", "Differentiable.")
    about("matmul", "vx.matmul(a, b)")
    about("x:sum", "x:sum(dims, keep)")
    about("conv3x3_backward_input", "dx:body(B,H,W,C) <- dy:body(B,H,W,O)")
  end)

  it("shows a comment above the definition, of inputs too", function()
    about("vx.tensor", "vx.tensor(data, options)", "Makes a tensor from nested tables of numbers.")
    about("vx.zeros", "vx.zeros(shape, options)", "Makes a tensor of zeros.", "array of sizes",
      "returns  tensor of that", "error    where a size is no integer")
    session:run "--- Twice its argument.\nfunction double(x) return 2 * x end\n"
    about("double", "double(x)", "Twice its argument.")
    about("double(", "Twice its argument.")
  end)

  it("shows quantizers by name with their options, and as objects", function()
    about("softmax-knn-ce", "Morita 2025", "codebook size M", "K, neighbours pulled toward each vertex",
      "kind smooth, metric cosine, sampler softmax, regularizer knn-ce", "(default 0.1)")
    session:run 'q = vx.quantizer("ste-euclid", { dim = 4, codes = 8 })'
    about("q", "ste-euclid, dim 4, 8 codes", "van den Oord", "codebook size M")
  end)

  it("shows modules by their banner and what is in them, classes by their comment, values as they are", function()
    about("vx", "a workbench for vector quantization", "quantizer ")
    about("vx.optim", "and learning-rate schedules. A schedule", ".AdamW(parameters, options)",
      "AdamW over a list of parameters.")
    about("vx.nn.Linear", "Linear(inputs, outputs, options)", "y = x wT + b")
    session:run "n = 3 t = vx.zeros{2}"
    about("n", "3")
    about("t", "f32 (2) on cpu")
    about("string.rep", "a function of Lua itself")
    assert.same({ nil, "nothing is known of 'nonsense.name'" }, { help.about(session, "nonsense.name") })
  end)
end)

-- -- Installing -------------------------------------------------------------------------------------------------------

describe("cmake --install", function()
  it("puts the command, the library and the Lua files where they find each other, from any folder and through a link",
    function()
    if not core.file_size(core.root .. "/build/cmake_install.cmake") then return pending "there is no build folder" end
    local prefix, link = H.scratch "some where", H.scratch "link"
    os.execute(("cmake --install '%s/build' --prefix '%s' > /dev/null && ln -s '%s/bin/vertex' '%s'"):format(core.root,
      prefix, prefix, link))
    local out, errors, status = piped("vx.zeros{2}\n?vx.nn.Linear\nprint(require 'vertex.core'.directory)\n",
      ("cd / && env -u LUA_PATH -u LUA_CPATH -u VERTEX_LIB '%s'"):format(link))
    assert.same({ "", 0 }, { errors, status })
    assert.truthy(out:find("f32 (2) on cpu", 1, true), out)
    assert.truthy(out:find("y = x wT + b", 1, true), out)
    assert.truthy(out:find(prefix .. "/share/lua/5.1/vertex\n", 1, true), out)
  end)
end)
