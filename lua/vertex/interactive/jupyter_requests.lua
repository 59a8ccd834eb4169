--- jupyter_requests.lua: what each of Jupyter's requests is answered. requests.NAME(server, message), by the message's
-- type, replies and publishes what the protocol asks for.
--
-- A cell is an input of session.lua, `?name` (help.lua) or `!command` for the shell.

local core = require "vertex.core"
local docs = require "vertex.interactive.docs"
local help = require "vertex.interactive.help"
local json = require "vertex.json"
local output = require "vertex.interactive.jupyter_output"
local Session = require "vertex.interactive.session"
local utf8 = require "vertex.utf8"
local wire = require "vertex.interactive.jupyter_wire"

local requests = {}

local RED, PLAIN = "\27[31m", "\27[0m"

-- -- What this is -----------------------------------------------------------------------------------------------------

--- Says what this is.
function requests.kernel_info_request(server, message)
  server:reply(message, "kernel_info_reply", { protocol_version = wire.VERSION, implementation = "vertex",
    implementation_version = core.version, banner = ("Vertex %s, %s"):format(core.version, jit.version),
    language_info = { name = "lua", version = "5.1", mimetype = "text/x-lua", file_extension = ".lua",
      pygments_lexer = "lua", codemirror_mode = "lua" },
    debugger = false, help_links = json.array() })
end

-- -- Cells ------------------------------------------------------------------------------------------------------------

--- Writes a problem of Session:run as Jupyter wants it.
local function error_content(problem)
  local lines = {}
  for line in (Session.error_text(problem) .. "\n"):gmatch "(.-)\n" do lines[#lines + 1] = utf8.clean(line) end
  lines[1] = RED .. lines[1] .. PLAIN
  return { ename = problem.interrupted and "Interrupted" or problem.syntax and "SyntaxError" or "Error",
    evalue = (utf8.clean(problem.message)), traceback = json.array(lines) }
end

--- Publishes a cell's values. Several values become several results; the last is the one that a notebook numbers.
local function show_values(server, values, silent)
  for i = 1, silent and 0 or values.n do
    local data, metadata = output.forms(values[i])
    local content = { data = data, metadata = metadata }
    if i == values.n then content.execution_count = server.session.count end
    server:publish(i == values.n and "execute_result" or "display_data", content)
  end
end

--- Writes the input that runs a shell command and prints what it writes.
local function shell(command)
  return ("for line in io.popen(%q, 'r'):lines() do print(line) end"):format("{ " .. command .. "\n} 2>&1")
end

--- Computes the expressions that a front end asks for beside a cell: name → forms or error.
local function expressions(server, asked)
  local out = json.object()
  for name, text in pairs(type(asked) == "table" and asked or {}) do
    local values, problem = server.session:run("return " .. tostring(text))
    server.session.count = server.session.count - 1
    if values then
      local data, metadata = output.forms(values[1])
      out[name] = { status = "ok", data = data, metadata = metadata }
    else
      out[name] = error_content(problem)
      out[name].status = "error"
    end
  end
  return out
end

--- Answers `?name`: a page of text, and the problem where nothing is known.
local function explain(server, name)
  server.session.count = server.session.count + 1
  local text, reason = help.about(server.session, name)
  if not text then return json.array(), { message = reason, trace = {} } end
  return json.array { { source = "page", data = output.bundle { ["text/plain"] = text }, start = 0 } }
end

--- Runs a cell.
function requests.execute_request(server, message)
  local content, session = message.content, server.session
  local code, silent = tostring(content.code or ""), content.silent == true
  local keep = not silent and content.store_history ~= false and code:find "%S" ~= nil
  server.displayed, server.input_from = {}, content.allow_stdin and message or nil
  if not silent then server:publish("execute_input", { code = code, execution_count = session.count + 1 }) end
  local values, problem, shown = { n = 0 }, nil, nil
  local payload = json.array()
  local about, command = code:match "^%s*%?%s*(.-)%s*$", code:match "^%s*!(.*)$"
  if about then
    payload, problem = explain(server, about)
  elseif code:find "%S" then
    server.out:hurry()
    values, shown = session:run(command and shell(command) or code)
    if not values then problem, shown = shown, nil end
  else
    session.count = session.count + 1
  end
  server.out:flush(true)
  if shown then
    local ok, reason = pcall(show_values, server, values, silent)
    if not ok then problem = { message = tostring(reason), trace = {} } end
  end
  if keep then server.history[#server.history + 1] = { session.count, code } else session.count = session.count - 1 end
  local reply = { execution_count = session.count, payload = payload }
  if problem then
    for key, value in pairs(error_content(problem)) do reply[key] = value end
    server:publish("error", error_content(problem))
    reply.status = "error"
  else
    reply.user_expressions = expressions(server, content.user_expressions)
  end
  server.input_from = nil
  server.out:flush(true)
  if problem and content.stop_on_error ~= false then server:set_waiting_aside() end
  server:reply(message, "execute_reply", reply)
end

--- Answers a cell that waited for one which failed.
function requests.aborted(server, message)
  server:reply(message, "execute_reply", { status = "aborted", execution_count = server.session.count })
end

--- Says whether Return should run a cell or begin a new line.
function requests.is_complete_request(server, message)
  local status, indent = Session.state(tostring(message.content.code or ""))
  server:reply(message, "is_complete_reply", { status = status, indent = indent })
end

-- -- Names ------------------------------------------------------------------------------------------------------------

--- Converts a cursor's place: Jupyter counts characters, Lua bytes.
local function bytes_of(text, characters)
  local n = 0
  for at in text:gmatch "()[%z\1-\127\194-\255]" do
    if n == characters then return at - 1 end
    n = n + 1
  end
  return #text
end

--- Converts a place in bytes into one in characters.
local function characters_of(text, bytes) return utf8.length(text:sub(1, bytes)) end

--- Reads the text and the cursor's place, in bytes, of a request.
local function code_and_cursor(message)
  local code = tostring(message.content.code or "")
  return code, bytes_of(code, tonumber(message.content.cursor_pos) or #code)
end

--- Completes the name before the cursor; functions and classes come with their parameters.
function requests.complete_request(server, message)
  local code, cursor = code_and_cursor(message)
  local first, names, chain = server.session:complete(code, cursor)
  local from, to, types = characters_of(code, first - 1), characters_of(code, cursor), json.array()
  for i, name in ipairs(names) do
    local doc = chain and docs.of_value(server.session, server.session:lookup(chain .. name))
    types[i] = { text = name, start = from, ["end"] = to, type = doc and doc.kind or "",
      signature = doc and ("(%s)"):format(docs.signature(doc, chain:sub(-1) == ":")) or "" }
  end
  server:reply(message, "complete_reply", { matches = json.array(names), cursor_start = from, cursor_end = to,
    metadata = json.object { _jupyter_types_experimental = types } })
end

--- Explains the name at the cursor.
function requests.inspect_request(server, message)
  local code, cursor = code_and_cursor(message)
  local before, after = code:sub(1, cursor):match "[%w_.:%-]*$", code:sub(cursor + 1):match "^[%w_]*"
  local text = help.about(server.session, (before .. after):gsub("^[.:%-]+", "") .. "", nil, true)
  server:reply(message, "inspect_reply", { found = text ~= nil,
    data = text and output.bundle { ["text/plain"] = text } or json.object(), metadata = json.object() })
end

-- -- History ----------------------------------------------------------------------------------------------------------

--- Says whether a text is what a pattern stands for, in which * is any text and ? any character. It goes back to the
-- last * only, so that no pattern takes longer than the product of both lengths.
local function fits(text, pattern)
  local t, p, star, from = 1, 1, nil, nil
  while t <= #text do
    local c = pattern:sub(p, p)
    if c == "*" then
      star, from, p = p, t, p + 1
    elseif p <= #pattern and (c == "?" or c == text:sub(t, t)) then
      t, p = t + 1, p + 1
    elseif star then
      from = from + 1
      t, p = from, star + 1
    else
      return false
    end
  end
  return not pattern:find("[^*]", p)
end

--- Answers with the inputs so far, each as Jupyter wants it: { 0, count, input }.
function requests.history_request(server, message)
  local ask, found = message.content, {}
  local pattern = ask.hist_access_type == "search" and tostring(ask.pattern or "*")
  local seen = {}
  for _, entry in ipairs(server.history) do
    local inside = ask.hist_access_type ~= "range" or entry[1] >= (tonumber(ask.start) or 0)
      and entry[1] < (tonumber(ask.stop) or math.huge)
    if inside and (not pattern or fits(entry[2], pattern)) and not (ask.unique and seen[entry[2]]) then
      seen[entry[2]] = true
      found[#found + 1] = json.array { 0, entry[1], ask.output and json.array { entry[2], "" } or entry[2] }
    end
  end
  local n = ask.hist_access_type ~= "range" and tonumber(ask.n)
  while n and #found > n do table.remove(found, 1) end
  server:reply(message, "history_reply", { history = json.array(found) })
end

-- -- Widgets: not known here ------------------------------------------------------------------------------------------

--- Says that there are no widgets.
function requests.comm_info_request(server, message)
  server:reply(message, "comm_info_reply", { comms = json.object() })
end

--- Closes what is opened.
function requests.comm_open(server, message)
  server:publish("comm_close", { comm_id = message.content.comm_id, data = json.object() })
end

--- Ignores what is sent to a widget.
function requests.comm_msg() end

--- Ignores that a widget is closed.
function requests.comm_close() end

-- -- Ending -----------------------------------------------------------------------------------------------------------

--- Ends the process after the answer.
function requests.shutdown_request(server, message)
  server.over = true
  server:reply(message, "shutdown_reply", { restart = message.content.restart == true })
end

--- Answers an interrupt while nothing runs; what runs is interrupted by SIGINT.
function requests.interrupt_request(server, message) server:reply(message, "interrupt_reply", {}) end

return requests
