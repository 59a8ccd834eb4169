-- A notebook's process: a child that this file asks over ZeroMQ as Jupyter does; and Jupyter's own tests of it,
-- where installed.

local H = require "tests.helper"
local core = require "vertex.core"
local json = require "vertex.json"
local lfs = require "lfs"
local wire = require "vertex.interactive.jupyter_wire"

local root, shell = H.root, H.shell
local program = root .. "/lua/vertex/interactive/jupyter.lua"

local started = 0
local client -- {pid, talk, a socket of each kind}

-- to its process group, as Jupyter does
local function signal(name) os.execute(("kill -s %s -- -%d"):format(name, client.pid)) end
local function alive() return (H.read(("/proc/%d/stat"):format(client.pid)) or ") Z"):match "%) (%u)" ~= "Z" end

local function end_parent()
  H.write(client.folder .. "/parent", "")
  client.pipe:close()
end

--- Says whether the process ends within five seconds.
local function gone()
  local until_when = core.time() + 5
  while alive() and core.time() < until_when do os.execute "sleep 0.02" end
  return not alive()
end

local function ask(kind, content, socket) return client.talk:send(socket or client.shell, {}, kind, content) end

--- Waits for the reply to a request and for the "idle" after it → content of the reply, array of {kind, content}
-- published meanwhile.
local function answer(id, on_input)
  local reply, idle, published, until_when = nil, false, {}, core.time() + 20
  while not (reply and idle) do
    if core.time() > until_when then
      error("no answer within 20 s; its log:\n" .. tostring(H.read(client.folder .. "/log")), 2)
    end
    for socket in pairs(wire.poll({ client.shell, client.control, client.iopub, client.stdin }, 100)) do
      local message = client.talk:receive(socket)
      if message and message.parent.msg_id == id then
        if socket == client.stdin then
          on_input(message)
        elseif socket ~= client.iopub then
          reply = message.content
        elseif message.kind == "status" then
          idle = message.content.execution_state == "idle"
        elseif message.kind ~= "execute_input" then
          published[#published + 1] = { message.kind, message.content }
        end
      end
    end
  end
  return reply, published
end

local function execute(code, more)
  local content = { code = code, silent = false, store_history = true, allow_stdin = false, stop_on_error = true,
    user_expressions = {} }
  for key, value in pairs(more or {}) do content[key] = value end
  return ask("execute_request", content)
end
local function run(code, more, on_input) return answer(execute(code, more), on_input) end

--- Subscriptions take a moment: asks until the iopub socket answers too. The message it answers with may be the
-- "idle" of a request whose "busy" came too early for it, so one more request shows that both arrive.
local function wait_until_up()
  for _ = 1, 100 do
    local id, until_when = ask("kernel_info_request", {}), core.time() + 0.2
    while core.time() < until_when do
      wire.poll({ client.iopub }, 20)
      local message = client.talk:receive(client.iopub)
      if message and message.parent.msg_id == id then
        return answer(ask("kernel_info_request", {}))
      end
    end
  end
  error("the notebook's process does not answer; its log:\n" .. tostring(H.read(client.folder .. "/log")))
end

--- Starts a notebook's process. Its parent ends when there is a file "parent", or this process is no more.
local function start()
  started = started + 1
  local folder = H.scratch("notebook-" .. started)
  lfs.mkdir(folder)
  local connection = { transport = "ipc", ip = folder .. "/socket", key = "a key", signature_scheme = "hmac-sha256",
    shell_port = 1, iopub_port = 2,
    stdin_port = 3, control_port = 4, hb_port = 5 }
  H.write(folder .. "/connection.json", json.encode(connection))
  local command = "cd '%s'; JPY_PARENT_PID=1 setsid luajit '%s' connection.json >log 2>&1 & echo $!; %s"
  local pipe = assert(io.popen(command:format(folder, program,
    "while [ ! -e parent ] && kill -0 $PPID; do sleep 0.1; done 2>/dev/null")))
  client = { pid = pipe:read "*n", talk = wire.talk("a key", "spec"), context = wire.context(), folder = folder,
    pipe = pipe }
  for i, name in ipairs { "shell", "iopub", "stdin", "control", "hb" } do
    local kind = name == "iopub" and "SUB" or name == "hb" and "REQ" or "DEALER"
    client[name] = wire.socket(client.context, kind, "connect", ("ipc://%s/socket-%d"):format(folder, i),
      kind == "DEALER" and "spec" or nil)
  end
  wait_until_up()
end

--- Waits until a cell has printed something.
local function wait_for_output(id)
  local message
  repeat
    wire.poll({ client.iopub }, 1000)
    message = client.talk:receive(client.iopub)
  until message and message.kind == "stream" and message.parent.msg_id == id
end

--- What a cell showed as text: streams and plain forms in order.
local function texts(published)
  local out = {}
  for i, p in ipairs(published) do
    local content = p[2]
    out[i] = p[1] .. ": " .. (content.text or content.evalue or content.data and tostring(content.data["text/plain"]))
  end
  return table.concat(out, "\n")
end

describe("a notebook's process", function()
  setup(function()
    start()
  end)
  teardown(function()
    if alive() then
      signal "KILL"
      end_parent()
    end
  end)

  it("says what it is", function()
    local reply = answer(ask("kernel_info_request", {}))
    assert.same({ "ok", "5.3", "vertex", "lua", ".lua" }, { reply.status, reply.protocol_version, reply.implementation,
      reply.language_info.name,
      reply.language_info.file_extension })
  end)

  it("runs cells: values, output in order, counts", function()
    local reply, published = run "x = 3; x + 1"
    assert.same({ "ok", 1, "execute_result: 4" }, { reply.status, reply.execution_count, texts(published) })
    reply, published = run [[
      local y = x * 2
      print('a', nil, y) io.stderr:write 'b\n' io.stdout:write('c', 1)
      io.write '\195' io.write '\169 \255']]
    assert.equal("stream: a\tnil\t6\nstream: b\nstream: c1é \239\191\189", texts(published):gsub("\n\n", "\n") .. "")
    assert.equal(2, reply.execution_count)
    reply, published = run("y", { silent = true })
    assert.same({ 2, 0 }, { reply.execution_count, #published })
    reply, published = run "y"
    assert.same({ 3, "execute_result: 6" }, { reply.execution_count, texts(published) })
    reply, published = run "y;"
    assert.same({ 4, 0 }, { reply.execution_count, #published })
    reply = run("y", { user_expressions = { double = "2 * y", wrong = "nothing.there" } })
    assert.equal("12", reply.user_expressions.double.data["text/plain"])
    assert.equal("error", reply.user_expressions.wrong.status)
    published = select(2, run "vx.tensor { { 1, 2 }, { 3, 4 } }")
    assert.truthy(texts(published):find("f32 (2,2) on cpu", 1, true))
  end)

  it("keeps what a cell prints in pieces, not one message for each", function()
    local _, published = run "for i = 1, 20000 do print(i) end"
    local text = {}
    for i, p in ipairs(published) do text[i] = p[2].text end
    text = table.concat(text)
    assert.truthy(#published < 2000, #published)
    assert.equal(20000, select(2, text:gsub("\n", "")))
    assert.truthy(text:find "^1\n2\n3\n" and text:find "\n20000\n$")
  end)

  it("shows errors at the user's line, and runs no cell that waited for a failed one", function()
    local reply, published = run "local x = {}\n\nx.y.z = 2"
    assert.equal("error", reply.status)
    assert.truthy(reply.evalue:find("^In%[%d+%]:3: attempt to index field 'y'"), reply.evalue)
    assert.equal("error", published[1][1])
    assert.truthy(table.concat(published[1][2].traceback, "\n"):find("x.y.z = 2", 1, true))
    reply = run "vx.matmul(vx.zeros { 2, 3 }, vx.zeros { 2, 3 })"
    assert.truthy(reply.evalue:find("^In%[%d+%]:1: matmul: a %(2,3%) and b %(2,3%)"), reply.evalue)
    assert.equal("SyntaxError", (run "x = = 1").ename)
    assert.equal("In[1]:1: no", (run "error('In[1]:1: no', 0)").evalue)
    assert.truthy((run "error { code = 3 }").evalue:find("code = 3", 1, true))
    assert.equal("error", (run "setmetatable({}, { __mime = function() error 'no picture' end })").status)
    local ids = { execute "z = 1", execute "os.execute 'sleep 0.2' error 'stop'", execute "z = 2", execute("z = 3") }
    local status = {}
    repeat
      wire.poll({ client.shell }, 5000)
      local message = assert(client.talk:receive(client.shell))
      status[message.parent.msg_id] = message.content.status
    until status[ids[4]]
    assert.same({ "ok", "error", "aborted", "aborted" }, { status[ids[1]], status[ids[2]], status[ids[3]],
      status[ids[4]] })
    assert.equal("execute_result: 1", texts(select(2, run "z")))
  end)

  it("is interrupted again and again, and lives on", function()
    for _, code in ipairs { "while true do end", "while true do pcall(function() while true do end end) end",
      "vx.step(function() local y = vx.zeros { 64, 64 } while true do y = vx.matmul(y, y) end end)",
      "while true do pcall(os.execute, 'sleep 60') end" } do
      local id = execute("print 'on the way' " .. code)
      wait_for_output(id)
      signal "INT"
      local reply
      reply = answer(id)
      assert.same({ "error", "Interrupted" }, { reply.status, reply.ename }, code)
    end
    signal "INT" -- while nothing runs
    assert.equal("ok", run("x").status)
  end)

  it("shows a batch of pictures as one, of two pixels to the point", function()
    local _, published = run "vx.rand { 4, 16, 16, 3 }"
    local content = published[#published][2]
    assert.equal("iVBOR", content.data["image/png"]:sub(1, 5))
    assert.truthy(content.metadata["image/png"].width > 4 * 64)
    assert.truthy(content.data["text/plain"]:find("\n4 pictures of 16 x 16 in 3 channels, 0 to 1$"))
    _, published = run "x = vx.zeros { 2 }; #x" -- which is no warning yet: x is made here
    assert.equal("execute_result: 0", texts(published))
    _, published = run "#x"
    assert.truthy(texts(published):find("#x: x is a tensor and no table: # gives 0", 1, true), texts(published))
  end)

  it("completes, with places in characters", function()
    local reply = answer(ask("complete_request", { code = "'é' .. vx.quantizer", cursor_pos = 17 }))
    assert.same({ "quantizer", "quantizers" }, { reply.matches[#reply.matches - 1], reply.matches[#reply.matches] })
    assert.same({ 10, 17 }, { reply.cursor_start, reply.cursor_end })
    local about = reply.metadata._jupyter_types_experimental[#reply.matches - 1]
    assert.same({ "quantizer", "function", "(name, options)", 10, 17 }, { about.text, about.type, about.signature,
      about.start, about["end"] })
    reply = answer(ask("complete_request", { code = "nothing.at_all", cursor_pos = 14 }))
    assert.same({}, reply.matches)
    reply = answer(ask("complete_request", { code = "vx.quantizer('softmax-knn", cursor_pos = 25 }))
    assert.same({ "softmax-knn-ce", "softmax-knn-l2" }, reply.matches)
  end)

  it("explains names, and says whether a cell is complete", function()
    local reply = answer(ask("inspect_request", { code = "local y = vx.matmul(a, b)", cursor_pos = 15,
      detail_level = 0 }))
    assert.truthy(reply.found and reply.data["text/plain"]:find("vx.matmul(", 1, true), reply.data["text/plain"])
    assert.falsy(answer(ask("inspect_request", { code = "nothing.at_all", cursor_pos = 3, detail_level = 0 })).found)
    assert.same({ "incomplete", "  " }, { answer(ask("is_complete_request", { code = "for i = 1, 3 do" })).status,
      answer(ask("is_complete_request", { code = "for i = 1, 3 do" })).indent })
    assert.equal("complete", answer(ask("is_complete_request", { code = "x = 1" })).status)
    assert.equal("invalid", answer(ask("is_complete_request", { code = "x = = 1" })).status)
    assert.equal("page", run("?vx.matmul").payload[1].source)
    assert.truthy(run("?softmax-knn-ce").payload[1].data["text/plain"]:find("tau", 1, true))
    assert.equal("nothing is known of 'nothing_at_all'", run("?nothing_at_all").evalue)
  end)

  it("remembers the session's inputs", function()
    run "first_of_three = 1"
    run "second_of_three = 2"
    local reply = answer(ask("history_request", { hist_access_type = "tail", n = 2, raw = true, output = false }))
    assert.same({ "first_of_three = 1", "second_of_three = 2" }, { reply.history[1][3], reply.history[2][3] })
    reply = answer(ask("history_request", { hist_access_type = "search", pattern = "*of_three*1", raw = true,
      output = false }))
    assert.same({ 1, "first_of_three = 1" }, { #reply.history, reply.history[1][3] })
  end)

  it("searches its history in a time that no pattern makes long", function()
    run(("x"):rep(3000) .. " = 1")
    local reply = answer(ask("history_request", { hist_access_type = "search", pattern = ("*x"):rep(60) .. "y" }))
    assert.equal(0, #reply.history)
  end)

  it("does not run a message that came before", function()
    local sent
    local to = client.shell
    local send = to.send
    rawset(to, "send", function(socket, frames)
      sent = frames
      return send(socket, frames)
    end)
    run "runs = (runs or 0) + 1"
    rawset(to, "send", nil)
    send(to, sent)
    local _, published = run "runs"
    assert.equal("1", published[1][2].data["text/plain"])
    assert.truthy(H.read(client.folder .. "/log"):find("a message that came before", 1, true))
  end)

  it("outlives messages that are nested deep, and assignments to Lua's own names", function()
    for _, depth in ipairs { 500, 990 } do
      local deep = {}
      for _ = 1, depth do deep = { deep } end
      for _, kind in ipairs { "execute_request", "history_request", "complete_request" } do
        answer(ask(kind, { code = deep, pattern = deep, hist_access_type = "search", user_expressions = deep }))
      end
    end
    run "saved = {}; for name, value in pairs(_G) do saved[name] = value end"
    run "table = 5; type = 5; string = 5; pairs = 5; tostring = 5; pcall = 5; error = 5; io = 5"
    local _, published = run "1 + 1"
    assert.equal("2", published[1][2].data["text/plain"])
    _, published = run "vx.tensor { 1, 2 }"
    assert.truthy(published[1][2].data["text/plain"]:find("[1., 2.]", 1, true))
    run "for name, value in saved.pairs(saved) do saved._G[name] = value end"
    run [[libraries, kept = { "io", "table", "string", "math", "debug", "os", "coroutine", "jit", "ffi" }, {}
      for _, name in ipairs(libraries) do
        local library = require(name)
        kept[library] = {}
        for key, value in pairs(library) do kept[library][key], library[key] = value, nil end
      end
      print "still"]]
    _, published = run "vx.tensor { 1, 2 }"
    assert.truthy(published[1][2].data["text/plain"]:find("[1., 2.]", 1, true))
    _, published = run "vx.data.images; nosuch.x"
    assert.equal("error", published[1][1])
    assert.same({ "linear" }, answer(ask("complete_request", { code = "vx.line", cursor_pos = 7 })).matches)
    _, published = run "for library, t in pairs(kept) do for k, v in pairs(t) do library[k] = v end end; print 'whole'"
    assert.equal("stream: whole\n", texts(published))
  end)

  it("shows pictures and text, and replaces what has an id", function()
    local _, published = run [[
      display = require "vertex.interactive.display"
      local picture = setmetatable({}, { __tostring = function() return "a picture" end, __mime = function()
        return { ["image/png"] = "\137PNG\0\255", ["image/svg+xml"] = "<svg/>", ["text/html"] = "<b>é</b>" },
          { ["image/png"] = { width = 4 } } end })
      display.show(picture)
      picture]]
    assert.same({ "display_data", "execute_result" }, { published[1][1], published[2][1] })
    for i = 1, 2 do
      assert.same({ ["image/png"] = "iVBORwD/", ["image/svg+xml"] = "<svg/>", ["text/html"] = "<b>é</b>",
        ["text/plain"] = "a picture" }, published[i][2].data)
      assert.same({ ["image/png"] = { width = 4 } }, published[i][2].metadata)
    end
    local code = "for i = 1, 3 do display.show('step ' .. i, { id = 'p' }) end"
    for _ = 1, 2 do -- run again, the cell's old output is gone: it begins with a new display
      _, published = run(code)
      assert.equal("display_data: step 1\nupdate_display_data: step 2\nupdate_display_data: step 3", texts(published))
      assert.equal("p", published[3][2].transient.display_id)
    end
    _, published = run [[
      local p = vx.runs.progress('fit', { total = 3 })
      p:update(1, 'loss 2') p:update(3, 'loss 1') p:finish()]]
    assert.equal(2, #published)
    assert.same({ "display_data", "update_display_data" }, { published[1][1], published[2][1] })
    assert.truthy(texts(published):find("fit ━━━━━━━━━━╌╌╌╌", 1, true) and texts(published):find("100%%  loss 1"),
      texts(published))
  end)

  it("shows HTML and SVG made by hand", function()
    local _, published = run "vx.display.object { ['text/html'] = '<i>x</i>' }"
    assert.same({ ["text/html"] = "<i>x</i>", ["text/plain"] = "(text/html)" }, published[1][2].data)
    assert.truthy(run("vx.display.object { html = 'x' }").evalue:find("^In%[%d+%]:1: display.object: form html"))
  end)

  it("asks for input", function()
    local function type_in(message)
      client.talk:send(client.stdin, {}, "input_reply", { value = "12 é" }, message.json)
    end
    local _, published = run("io.write 'name? ' local n = io.read(); n, #n", { allow_stdin = true }, type_in)
    assert.equal('stream: name? \ndisplay_data: "12 é"\nexecute_result: 5', texts(published))
    assert.truthy(run("io.read()").evalue:find("takes no input", 1, true))
    local reply = run("io.stdin:read()", { allow_stdin = true }, function() signal "INT" end)
    assert.equal("Interrupted", reply.ename)
  end)

  it("runs shell commands", function()
    assert.equal("stream: one\ntwo\n", (texts(select(2, run "!echo one; echo two >&2")):gsub("\n\nstream: ", "\n")))
    local id = execute "!echo started; sleep 60"
    wait_for_output(id)
    signal "INT"
    assert.equal("Interrupted", answer(id).ename)
  end)

  it("passes every interrupt on to the command, and again to one that was not ready for the first", function()
    assert.equal("Interrupted", run("!trap '' INT; kill -INT $PPID; sleep 0.2; trap - INT; sleep 60").ename)
    local twice = "n=0; trap 'n=$((n+1)); [ $n -lt 2 ] || exit 3' INT; sleep 0.4; kill -INT $PPID; "
      .. "while [ $n -lt 1 ]; do sleep 0.02; done; kill -INT $PPID; while :; do sleep 0.1; done"
    local code = ("os.execute [[%s]]"):format(twice)
    assert.equal("execute_result: 768", texts(select(2, run(code))))
  end)

  it("leaves other files alone", function()
    local _, published = run [[
      f = io.open('file', 'w') f:write('one\n', 2) f:close()
      io.input('file'); io.read(), io.read '*n']]
    assert.equal('display_data: "one"\nexecute_result: 2', texts(published))
    assert.equal("one\n2", H.read(client.folder .. "/file"))
    run "io.input(io.stdin)"
  end)

  it("beats while it works", function()
    local id = execute "print 'on the way' while true do end"
    wait_for_output(id)
    client.hb:send { "ping" }
    wire.poll({ client.hb }, 5000)
    assert.same({ "ping" }, client.hb:receive())
    signal "INT"
    assert.equal("Interrupted", answer(id).ename)
  end)

  it("ignores what is not signed, and what it does not know", function()
    local stranger = wire.talk("another key", "spec")
    stranger:send(client.shell, {}, "execute_request", { code = "z = 'stolen'" })
    client.shell:send { "no", "message" }
    ask("debug_request", {})
    ask("comm_open", { comm_id = "7", target_name = "a widget", data = {} })
    assert.equal("execute_result: 1", texts(select(2, run "z")))
    local log = H.read(client.folder .. "/log")
    for _, text in ipairs { "wrong signature", "without the frames", "debug_request" } do
      assert.truthy(log:find(text, 1, true), text .. log)
    end
    assert.same({}, answer(ask("comm_info_request", {})).comms)
  end)

  it("ends when told to, or when Jupyter is gone", function()
    assert.same({ status = "ok", restart = false },
      (answer(ask("shutdown_request", { restart = false }, client.control))))
    assert.truthy(gone())
    end_parent()
    for _, code in ipairs { "x = 1", "while true do end" } do -- idle, and at work
      start()
      local id = execute(code)
      local message
      repeat
        wire.poll({ client.iopub, client.shell }, 5000)
        message = client.talk:receive(client.shell) or client.talk:receive(client.iopub)
      until message and message.parent.msg_id == id
        and (message.kind == "execute_input" or message.kind == "execute_reply")
      assert.truthy(alive())
      end_parent()
      assert.truthy(gone(), code)
    end
  end)
end)

describe("the program for Jupyter", function()
  it("is installed where Jupyter looks", function()
    local prefix = H.scratch "prefix/deep"
    local out, rc = shell(("cd '%s/lua/vertex/interactive' && luajit jupyter.lua install --prefix '%s'"):format(root,
      prefix))
    assert.equal(0, rc, out)
    local spec = json.decode(H.read(prefix .. "/share/jupyter/kernels/vertex/kernel.json"))
    assert.same({ "luajit", program, "{connection_file}", n = nil }, setmetatable(spec.argv, nil))
    assert.same({ "lua", "signal" }, { spec.language, spec.interrupt_mode })
    out, rc = shell(("JUPYTER_DATA_DIR='%s/user' luajit '%s' install"):format(prefix, program))
    assert.equal(0, rc, out)
    assert.truthy(H.read(prefix .. "/user/kernels/vertex/kernel.json"))
  end)

  it("explains wrong arguments", function()
    local not_json = H.write(H.scratch "not.json", "{ 1")
    local no_ports = H.write(H.scratch "no_ports.json", '{"shell_port": 1}')
    for arguments, expected in pairs { [""] = "usage:", ["install --somewhere"] = "usage:",
      ["install --prefix"] = "usage:",
      ["nowhere.json"] = "nowhere.json: No such",
      [not_json] = "is no connection file", [no_ports] = "its control_port is nil",
        ["install --prefix /proc/x"] = "cannot make the folder" } do
      local out, rc = shell(("luajit '%s' %s"):format(program, arguments))
      assert.truthy(rc ~= 0, arguments)
      assert.truthy(out:find(expected, 1, true), out)
      assert.falsy(out:find("stack traceback", 1, true), out)
    end
  end)

  it("passes Jupyter's own tests #slow", function()
    local python = "/usr/bin/python3" -- the one Debian's packages belong to
    if select(2, shell(python .. " -c 'import jupyter_kernel_test'")) ~= 0 then
      return pending "python3-jupyter-kernel-test is not installed"
    end
    local prefix = H.scratch "jupyter"
    assert.equal(0, select(2, shell(("luajit '%s' install --prefix '%s'"):format(program, prefix))))
    local out, rc = shell(("JUPYTER_PATH='%s/share/jupyter' timeout 100 %s '%s/tests/jupyter_test.py'"):format(prefix,
      python, root))
    assert.equal(0, rc, out)
    assert.truthy(out:find "Ran %d%d tests", out)
  end)
end)
