--- edit.lua: lines typed at a terminal, with editing, history and completion by libedit. The only file that knows
-- libedit.
--
-- libedit is called as it is, not through its imitation of readline, because its keys have to come through a function
-- of ours. At the prompt, Ctrl-C and Ctrl-Z are then plain characters (the terminal makes no signals of them), so that
-- Ctrl-C ends a line and nothing else. libedit itself handles no signal: it would hand signals on to the whole process
-- group. ~/.editrc is read, as by every program that uses libedit; its name for this one is "vertex".
--
-- The history is a text file with a line for each line typed. Lines are appended at once, so that sessions side by side
-- lose nothing.

local ffi = require "ffi"
local core = require "vertex.core"
local show = require "vertex.interactive.show"

jit.off(true, true) -- libedit calls functions of this file: such C must not be called from compiled code

local edit = {}

ffi.cdef [[
extern void *stdin, *stdout, *stderr;
void *el_init(const char *program, void *in, void *out, void *err);
int el_set(void *editor, int what, ...); int el_source(void *editor, const char *path);
const char *el_gets(void *editor, int *count); const void *el_line(void *editor);
int el_insertstr(void *editor, const char *text);
void el_resize(void *editor); void *history_init(void); int history(void *history, void *event, int what, ...);
char *setlocale(int category, const char *name); long read(int fd, void *bytes, size_t count);
int poll(void *fds, unsigned long count, int milliseconds); int kill(int pid, int signal);
unsigned umask(unsigned mask);
]]
local C = ffi.C

-- as histedit.h numbers them
local EL_PROMPT, EL_EDITOR, EL_SIGNAL, EL_BIND, EL_SETTY, EL_ADDFN, EL_HIST, EL_GETCFN, EL_PREP_TERM, EL_REFRESH = 0, 2,
  3, 4, 8, 9, 10, 13, 16, 20
local CC_REFRESH, CC_ERROR, CC_REDISPLAY = 4, 6, 8
local H_SETSIZE, H_ENTER, H_SETUNIQUE = 1, 10, 20
local LC_CTYPE, SIGTSTP = 0, 20
local POLLIN = 1
local END_OF_LINE = 5 -- Ctrl-E: the cursor goes behind what was typed
local LOOK = 250      -- milliseconds between looks at the window's size and at signals that came just before a wait

local KEPT = 2000 -- lines of history; the file is cut to them when it holds twice as many

local libedit

--- Says whether lines can be edited: standard input and output are a terminal that can move its cursor, and libedit is
-- there.
-- @return boolean
function edit.available()
  local term = os.getenv "TERM"
  if not core.is_tty(0) or not core.is_tty(1) or not term or term == "" or term == "dumb" then return false end
  if not libedit then
    local ok, library = pcall(ffi.load, "libedit.so.2")
    libedit = ok and library or nil
  end
  return libedit ~= nil
end

-- -- History ----------------------------------------------------------------------------------------------------------

--- Runs f(...) so that nobody else may read the files it makes.
local function private(f, ...)
  local before = C.umask(63) -- 077
  local result = f(...)
  C.umask(before)
  return result
end

--- Reads the last lines of a history file, and cuts a file that is twice too long.
-- @param path string
-- @return array of strings, oldest first; empty where the file cannot be read
function edit.read_history(path)
  local lines, file = {}, io.open(path, "r")
  if not file then return lines end
  for line in file:lines() do lines[#lines + 1] = line end
  file:close()
  if #lines <= KEPT then return lines end
  local last = {}
  for i = #lines - KEPT + 1, #lines do last[#last + 1] = lines[i] end
  if #lines > 2 * KEPT then pcall(private, core.write_file, path, table.concat(last, "\n") .. "\n") end
  return last
end

--- Adds a line to a history file.
-- @param path string
-- @param line string
-- @return true; false where that failed
function edit.append_history(path, line)
  return private(function()
    core.make_folders(path:match "^(.*)/[^/]*$" or "")
    local file = io.open(path, "a")
    if not file then return false end
    file:write(line, "\n")
    return file:close() and true or false
  end)
end

-- -- Keys -------------------------------------------------------------------------------------------------------------

local Editor = {}
Editor.__index = Editor

local byte, stdin = ffi.new "uint8_t[1]", ffi.new("struct { int fd; short events, revents; }", { 0, POLLIN, 0 })

--- Lets libedit draw what is typed again where the window's width has changed.
local function follow_window(self)
  local columns = core.terminal_columns()
  if columns == self.columns then return end
  self.columns = columns
  libedit.el_resize(self.el)
  io.stdout:write "\r\27[J"
  libedit.el_set(self.el, EL_REFRESH)
end

--- Waits until something is typed.
-- @param[opt] idle function, called now and then meanwhile
-- @return true; false where Ctrl-C came as a signal instead, also where it came just before
function edit.wait(idle)
  repeat
    if core.interrupted() then return false end
    if idle then idle() end
  until C.poll(stdin, 1, LOOK) > 0
  return true
end

--- Reads the next byte typed; nil at the end, or where Ctrl-C came before the terminal was told to make no signal of
-- it.
local function next_byte(self)
  if not edit.wait(self.idle) then return nil end
  return C.read(0, byte, 1) == 1 and byte[0] or nil
end

--- Reads the next character typed, a code point: bytes are UTF-8, whatever the locale; those that are not give U+FFFD.
local function next_character(self)
  local first = next_byte(self)
  if not first or first < 0x80 then return first end
  local more = first >= 0xF0 and 3 or first >= 0xE0 and 2 or first >= 0xC0 and 1 or 0
  if more == 0 then return 0xFFFD end
  local code = first % 2 ^ (6 - more)
  for _ = 1, more do
    local following = next_byte(self)
    if not following then return nil end
    if following < 0x80 or following > 0xBF then return 0xFFFD end
    code = code * 64 + following % 64
  end
  return (code > 0x10FFFF or code >= 0xD800 and code <= 0xDFFF) and 0xFFFD or code
end

--- Stops the process as Ctrl-Z does, with the terminal as other programs expect it meanwhile.
local function suspend(self)
  libedit.el_set(self.el, EL_PREP_TERM, ffi.new("int", 0))
  io.stdout:write "\n"
  io.stdout:flush()
  C.kill(0, SIGTSTP)
  libedit.el_set(self.el, EL_PREP_TERM, ffi.new("int", 1))
  libedit.el_set(self.el, EL_REFRESH)
end

-- What terminals send around pasted text where they were asked to, the first behind an escape, and what asks them.
local PASTE_BEGINS, PASTE_ENDS = "[200~", "\27[201~"
local ASK_FOR_PASTE, NO_PASTE = "\27[?2004h", "\27[?2004l"
local RETURN, NEWLINE = 13, 10
local ESCAPE, LITERAL = 27, 22 -- Ctrl-V: libedit takes the next key as it is
local WAIT_FOR_SEQUENCE = 30 -- milliseconds: behind an escape that nobody typed, more is there at once

--- Reads on behind an escape. Gives whether `sequence` followed; what was read is in the queue.
local function follows(self, sequence)
  local queue = self.queue
  for i = 1, #sequence do
    local code = next_character(self)
    if not code then return false end
    queue[#queue + 1] = code
    if code ~= sequence:byte(i) then return false end
  end
  return true
end

--- Says whether a character is of the upper controls, C1, which libedit takes for keys and has none for.
local function is_upper_control(code) return code >= 128 and code < 160 end

--- Reads pasted text to its end, behind what the queue holds: no character of it does what its key would, but for the
-- ends of lines.
local function read_paste(self)
  local text, keys, matched = {}, self.queue, 0 -- matched: how many characters of the end's mark came last
  while matched < #PASTE_ENDS do
    local code = next_character(self)
    if not code then break end
    text[#text + 1] = code
    matched = code == PASTE_ENDS:byte(matched + 1) and matched + 1 or code == ESCAPE and 1 or 0
  end
  for i = 1, #text - matched do
    local code = text[i]
    if code == RETURN or code == NEWLINE and text[i - 1] ~= RETURN then
      keys[#keys + 1] = NEWLINE
    elseif code ~= NEWLINE then
      if code < 32 or code == 127 or is_upper_control(code) then keys[#keys + 1] = LITERAL end
      keys[#keys + 1] = code
    end
  end
end

--- Gives libedit the next key: whether there is one, and which.
local function next_key(self)
  if self.interrupted then return false end -- the cursor is at the end now
  if self.queue[1] then return true, table.remove(self.queue, 1) end
  local code, before = next_character(self), self.before
  self.before = code
  if code == ESCAPE and C.poll(stdin, 1, WAIT_FOR_SEQUENCE) > 0 then
    if follows(self, PASTE_BEGINS) then
      self.queue = {}
      read_paste(self)
      return next_key(self)
    end
  elseif code == PASTE_BEGINS:byte() and before == ESCAPE then -- the escape is libedit's already
    if follows(self, PASTE_BEGINS:sub(2)) then read_paste(self) end
  elseif code == NEWLINE and before == RETURN then -- one line's end, as pasted text has it
    return next_key(self)
  elseif code == 3 or not code and core.interrupted() then
    self.interrupted = true
    return true, END_OF_LINE
  elseif code == 26 then
    suspend(self)
    return next_key(self)
  elseif code and is_upper_control(code) then
    self.queue = { code }
    return true, LITERAL
  end
  return code ~= nil, code
end

-- -- Completion -------------------------------------------------------------------------------------------------------

local LISTED = 400 -- completions, at most

--- Gives what all names begin with.
local function common_start(names)
  local n = #names[1]
  for _, name in ipairs(names) do
    while name:sub(1, n) ~= names[1]:sub(1, n) do n = n - 1 end
  end
  return names[1]:sub(1, n)
end

--- Answers TAB: inserts what all completions share, or lists them, or explains the only one where it stands there
-- already. At the start of a line it indents.
local function tab(self)
  local line = ffi.cast("const char *const *", libedit.el_line(self.el)) -- its buffer, cursor and end
  local before = ffi.string(line[0], line[1] - line[0])
  if not before:find "%S" then
    libedit.el_insertstr(self.el, "  ")
    return CC_REFRESH
  end
  local first, names, explain = self.complete(before)
  if #names == 0 then return CC_ERROR end
  local typed, shared = before:sub(first), common_start(names)
  if #shared > #typed then
    libedit.el_insertstr(self.el, shared:sub(#typed + 1))
    return CC_REFRESH
  end
  if #names == 1 then
    local text = explain and explain(typed)
    if not text then return CC_ERROR end
    io.stdout:write("\n", text, "\n")
    io.stdout:flush()
    return CC_REDISPLAY
  end
  local shown, more = {}, #names - LISTED
  for i = 1, math.min(#names, LISTED) do shown[i] = names[i]:match "([^/]*/?)$" end
  io.stdout:write("\n", show.columns(shown, math.max(20, core.terminal_columns())), "\n",
    more > 0 and ("... %d more\n"):format(more) or "")
  io.stdout:flush()
  return CC_REDISPLAY
end

-- -- Lines ------------------------------------------------------------------------------------------------------------

-- Keys, as libedit writes them, and its commands. The sequences are those of xterm, rxvt and the Linux console.
local KEYS = {
  ["^I"] = "vertex-complete", ["^R"] = "em-inc-search-prev",
  ["\\e[A"] = "ed-search-prev-history", ["\\eOA"] = "ed-search-prev-history",
  ["\\e[B"] = "ed-search-next-history", ["\\eOB"] = "ed-search-next-history",
  ["\\e[H"] = "ed-move-to-beg", ["\\eOH"] = "ed-move-to-beg", ["\\e[1~"] = "ed-move-to-beg",
  ["\\e[7~"] = "ed-move-to-beg",
  ["\\e[F"] = "ed-move-to-end", ["\\eOF"] = "ed-move-to-end", ["\\e[4~"] = "ed-move-to-end",
  ["\\e[8~"] = "ed-move-to-end",
  ["\\e[3~"] = "ed-delete-next-char", ["\\e[1;5C"] = "em-next-word", ["\\e[1;5D"] = "ed-prev-word",
  ["\\e" .. PASTE_BEGINS] = "ed-ignore", -- what is typed behind it is in the queue by then
}

--- Makes the editor of this terminal; there can be one.
-- @param options { complete = function(text up to the cursor) → first byte of the word to complete (1-based), array of
-- words, function(word) → a line about it or nil; history = path of the history file, or nil }
-- @return Editor
-- @raise where libedit cannot use the terminal
function edit.open(options)
  -- only the locale of characters: that of numbers would write 0,5
  local locale = C.setlocale(LC_CTYPE, "")
  if locale == nil or ffi.string(locale) == "C" or ffi.string(locale) == "POSIX" then
    C.setlocale(LC_CTYPE, "C.UTF-8")
  end
  local el, history = libedit.el_init("vertex", C.stdin, C.stdout, C.stderr), libedit.history_init()
  if el == nil or history == nil then core.fail "edit: libedit cannot use this terminal" end
  local self = setmetatable({ el = el, history = history, event = ffi.new "struct { int number; const char *text; }",
    path = options.history, complete = options.complete, columns = core.terminal_columns(),
    queue = {} }, Editor) -- keys that were read ahead

  function self.idle() follow_window(self) end

  -- Functions that libedit calls. They live as long as the process, and none may raise an error.
  local function prompt() return self.prompt end
  local function key(_, out)
    local ok, there, code = pcall(next_key, self)
    if not (ok and there) then return 0 end
    out[0] = code
    return 1
  end
  local function complete()
    local ok, what = pcall(tab, self)
    return ok and what or CC_ERROR
  end
  self.anchors = { ffi.cast("const char *(*)(void *)", prompt), ffi.cast("int (*)(void *, int *)", key),
    ffi.cast("unsigned char (*)(void *, int)", complete) }

  local set = libedit.el_set
  set(el, EL_PROMPT, self.anchors[1])
  set(el, EL_SIGNAL, ffi.new("int", 0))
  set(el, EL_EDITOR, "emacs")
  set(el, EL_GETCFN, self.anchors[2])
  set(el, EL_SETTY, "-d", "-isig", "-icrnl", "-inlcr", nil)
  libedit.history(history, self.event, H_SETSIZE, ffi.new("int", KEPT))
  libedit.history(history, self.event, H_SETUNIQUE, ffi.new("int", 1))
  set(el, EL_HIST, ffi.cast("int (*)(void *, void *, int, ...)", libedit.history), history)
  set(el, EL_ADDFN, "vertex-complete", "completes names", self.anchors[3])
  for keys, command in pairs(KEYS) do set(el, EL_BIND, keys, command, nil) end
  libedit.el_source(el, nil)
  for _, line in ipairs(self.path and edit.read_history(self.path) or {}) do
    libedit.history(history, self.event, H_ENTER, line)
  end
  return self
end

--- Reads a line.
-- @param prompt text before it
-- @return string without the line's end; nil where there is none
-- @return then "interrupted" (Ctrl-C) or "end" (Ctrl-D on an empty line)
function Editor:line(prompt)
  self.prompt = ffi.new("char[?]", #prompt + 1, prompt)
  self.interrupted = false
  libedit.el_set(self.el, EL_PREP_TERM, ffi.new("int", 1)) -- before the prompt is there: who sees it may type any key
  io.stdout:write(ASK_FOR_PASTE)
  io.stdout:flush()
  local text = libedit.el_gets(self.el, ffi.new "int[1]")
  io.stdout:write(NO_PASTE)
  io.stdout:flush()
  if self.interrupted then
    self.queue = {}
    return nil, "interrupted"
  end
  if text == nil then return nil, "end" end
  return (ffi.string(text):gsub("[\r\n]+$", ""))
end

--- Puts a line into the history and its file; empty ones are left out.
-- @param line string
function Editor:remember(line)
  if not line:find "%S" then return end
  libedit.history(self.history, self.event, H_ENTER, line)
  if self.path and not edit.append_history(self.path, line) then self.path = nil end
end

return edit
