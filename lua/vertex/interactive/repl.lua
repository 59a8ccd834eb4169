--- repl.lua: the interactive session: reads inputs from a terminal or a pipe, runs them (session.lua) and shows their
-- values.
--
-- What is typed is Lua (session.lua says with which two differences), `?name` (help.lua) or `!command` for the shell.
-- On a terminal that can move its cursor, lines are edited (edit.lua); on others, and from a pipe, they are read as
-- they come. From a pipe there are no prompts, and the exit status is 1 where an input failed.

local core = require "vertex.core"
local display = require "vertex.interactive.display"
local edit = require "vertex.interactive.edit"
local help = require "vertex.interactive.help"
local show = require "vertex.interactive.show"
local Session = require "vertex.interactive.session"

local repl = {}

local PROMPT, CONTINUED = "> ", ">> "
local SLOW = 1 -- seconds: the time of a slower input is told

local USAGE = [=[
vertex [-i] [FILE [ARGUMENT ...]]

Without a file: an interactive session, or one that reads its inputs from a pipe. `vx` is there.
With one: runs this Lua file; with -i a session follows, which sees its global variables.

  -i         a session after the file
  --help     this text
  --version  the library's version
]=]

local KEYS = [[
  ?name      what is known of a function, module, quantizer, op or variable:
             ?vx  ?vx.nn.Linear  ?matmul  ?softmax-knn-ce
  TAB        completes names, methods, and in quotes quantizers and files; after a whole name it tells the arguments
  _          the last value; a value followed by ; is not shown
  !command   runs a command of the shell
  Ctrl-C     stops what runs, or drops what is typed
  Ctrl-D     leaves
  Up         goes back to earlier lines that begin like this one
  Ctrl-R     finds earlier lines by what they hold]]

-- -- Output -----------------------------------------------------------------------------------------------------------

local unfinished = false -- whether the cursor stands behind text that an input wrote

--- Notes what is written to standard output, so that a prompt never follows text on its line.
local function watch_output()
  local files = getmetatable(io.stdout).__index
  local write = files.write
  local function note(...)
    for i = select("#", ...), 1, -1 do
      local text = (select(i, ...))
      if text ~= "" then
        unfinished = tostring(text):sub(-1) ~= "\n"
        return
      end
    end
  end
  function files.write(file, ...)
    if file == io.stdout then note(...) end
    return write(file, ...)
  end
  core.redefine("io", "write", function(...)
    local file = io.output()
    if file == io.stdout then note(...) end
    return write(file, ...)
  end)
  function _G.print(...) -- Lua's own asks the global tostring, which the user may have given another value
    unfinished = false
    local parts = { ... }
    for i = 1, select("#", ...) do parts[i] = tostring(parts[i]) end
    write(io.stdout, table.concat(parts, "\t"), "\n")
  end
end

--- Begins a new line where the cursor stands behind text.
local function fresh_line()
  if unfinished then io.stdout:write "\n" end
  io.stdout:flush()
end

--- Gives the number of columns that texts may fill; nil where nothing says so.
local function width()
  local columns = core.is_tty(1) and core.terminal_columns() or 0
  return columns > 0 and math.max(40, columns - 1) or nil
end

--- Writes what is no value: an error, a time.
local function say(text)
  fresh_line()
  io.stderr:write(text, "\n")
end

--- Writes a value; nil for one that shows itself.
local function describe(value)
  local meta = getmetatable(value)
  if type(meta) == "table" and rawget(meta, "__mime") then return nil end
  return show.value(value)
end

--- Shows an input's values: pictures as such, short values side by side.
local function show_values(values)
  fresh_line()
  local line
  local function flush()
    if line then io.stdout:write(line, "\n") end
    line = nil
  end
  for i = 1, values.n do
    local text = describe(values[i])
    if not text then
      flush()
      display.show(values[i])
    elseif text:find "\n" or line and #line + #text > 100 then
      flush()
      line = text
    else
      line = line and line .. "  " .. text or text
    end
  end
  flush()
end

-- -- Input ------------------------------------------------------------------------------------------------------------

--- Reads a line of standard input that is not edited, after a prompt where there is one; or gives nil and "interrupted"
-- or "end".
local function plain_line(prompt)
  if prompt then
    io.stdout:write(prompt)
    io.stdout:flush()
    if not edit.wait() then return nil, "interrupted" end
  end
  local line = io.stdin:read "*l"
  if line then return line end
  return nil, core.interrupted() and "interrupted" or "end"
end

--- Finds the history file: VERTEX_HISTORY, otherwise in the folder for what programs leave behind; nil for none.
local function history_path()
  local path = os.getenv "VERTEX_HISTORY"
  if path then return path ~= "" and path or nil end
  local state, home = os.getenv "XDG_STATE_HOME", os.getenv "HOME"
  if not state or state:sub(1, 1) ~= "/" then state = home and home .. "/.local/state" end
  return state and state .. "/vertex/history"
end

--- Gives a function that reads a line after a prompt, one that keeps a line for later sessions, and whether lines are
-- edited.
local function reader(complete)
  if edit.available() then
    local editor = edit.open { complete = complete, history = history_path() }
    return function(prompt) return editor:line(prompt) end, function(line) editor:remember(line) end, true
  end
  local prompts = core.is_tty(0)
  return function(prompt) return plain_line(prompts and prompt) end, function() end, false
end

-- -- The loop ---------------------------------------------------------------------------------------------------------

--- Runs one input and shows what comes of it; gives "failed", "interrupted" or nil.
local function evaluate(session, text, interactive)
  local question, command = text:match "^%s*%?(.*)$", text:match "^%s*!(.*)$"
  if question then
    local answer, reason = KEYS, nil
    if question:find "%S" then answer, reason = help.about(session, question, width()) end
    io.stdout:write(answer or reason, "\n")
    return not answer and "failed" or nil
  elseif command then
    local _, stopped = core.execute(command)
    if not stopped then return nil end
    core.session_interrupts() -- it was the command's
    unfinished = interactive -- behind the terminal's "^C"
    return "interrupted"
  end
  local began = core.time()
  local values, shown = session:run(text)
  local seconds = core.time() - began
  local failed
  if not values then
    unfinished = unfinished or shown.interrupted and interactive -- behind the terminal's "^C"
    say(Session.error_text(shown))
    failed = shown.interrupted and "interrupted" or "failed"
  elseif shown then
    local ok, problem = pcall(show_values, values)
    if not ok then say("the value cannot be shown: " .. tostring(problem)) end
  end
  if seconds > SLOW then say(("(%.2f s)"):format(seconds)) end
  return failed
end

--- Greets.
local function banner()
  local device = core.device()
  local description = ""
  for _, d in ipairs(core.devices()) do
    if d.name == device then description = d.description end
  end
  print(("Vertex %s on %s (%s)\n?name explains a name, ? the keys; Ctrl-D leaves."):format(core.version, device,
    description))
end

--- Holds an interactive session on standard input. The global variables are the session's.
-- @return exit status
function repl.run()
  _G.vx = require "vertex"
  _G._ = nil
  local session = Session.new { warn = say }
  local pending = "" -- lines of an input that goes on
  local interactive = core.is_tty(0)
  local status = 0
  display.mode = "terminal"
  display.protocol() -- raises now what is wrong with VERTEX_PICTURES
  Session.interpret_files()
  Session.watch_programs()
  watch_output()
  core.session_interrupts()
  local read, remember, edits = reader(function(line)
    local first, names, chain = session:complete(pending .. line)
    return first - #pending, names, function(name) return chain and help.line(session, chain .. name) end
  end)
  if interactive then banner() end

  while true do
    fresh_line()
    local line, why = read(pending == "" and PROMPT or CONTINUED)
    if line then
      remember(line)
      local text = pending .. line
      if pending == "" and not line:find "%S" then
        text = nil
      elseif Session.state(text) == "incomplete" then
        pending, text = text .. "\n", nil
      end
      if text then
        local whole = pending ~= "" and Session.on_one_line(text)
        if whole then remember(whole) end
        pending = ""
        if interactive and (text == "exit" or text == "quit") and rawget(_G, text) == nil then break end
        local failed = evaluate(session, text, interactive)
        if failed then status = 1 end
        if failed == "interrupted" and not interactive then return 130 end
      end
    elseif why == "interrupted" then
      io.stdout:write(edits and "^C\n" or "\n") -- where lines are not edited, the terminal has written its ^C
      core.session_interrupts()
      if not interactive then return 130 end
      pending = ""
    else
      if interactive then io.stdout:write "\n" end
      break
    end
  end
  if pending ~= "" and not interactive and evaluate(session, (pending:gsub("\n$", ""))) then status = 1 end
  return interactive and 0 or status
end

--- Runs a Lua file with its arguments, as luajit does; gives the exit status.
local function run_file(path, arguments)
  local chunk, problem = loadfile(path)
  if not chunk then
    io.stderr:write(problem, "\n")
    return 1
  end
  _G.arg = arguments
  local ok, trace = xpcall(chunk, function(raised)
    local message = type(raised) == "string" and raised or show.value(raised)
    return (debug.traceback(message, 2):gsub("\n%s*%[C%]: in function 'xpcall'.*$", ""))
  end, unpack(arguments))
  if ok then return 0 end
  io.stderr:write(trace, "\n")
  return 1
end

--- Does what the command line says.
-- @param argv array of its arguments
-- @return exit status
function repl.main(argv)
  local at, interactive = 1, false
  while argv[at] and argv[at]:sub(1, 1) == "-" do
    local flag = argv[at]
    if flag == "--help" or flag == "-h" then
      io.stdout:write(USAGE)
      return 0
    elseif flag == "--version" then
      print(core.version)
      return 0
    elseif flag ~= "-i" then
      io.stderr:write(("unknown option '%s'; known: -i, --help, --version\n"):format(flag))
      return 2
    end
    interactive, at = true, at + 1
  end
  local file = argv[at]
  if not file then return repl.run() end
  local arguments = { [0] = file }
  for i = at + 1, #argv do arguments[#arguments + 1] = argv[i] end
  _G.vx = require "vertex"
  local status = run_file(file, arguments)
  return interactive and repl.run() or status
end

return repl
