--- display.lua: how an object shows itself in a script, a terminal session or a notebook.
--
-- An object that can be more than text has a function `__mime` in its metatable:
--     __mime = function(self) return {["image/png"] = bytes, ["text/plain"] = text}, {["image/png"] = {width = 640,
--     height = 400}} end
-- the bundle (one entry per form, raw bytes, never base64) and, if it likes, metadata per form, as notebooks take them.
--
-- Who runs the code says what showing means:
--     display.mode      "script" (the start), "terminal" (an interactive session) or "notebook"
--     display.backend   function(bundle, options): what display.show calls in the modes "terminal" and "notebook";
--     without one the bundle
--                       goes to display.terminal. options is a table: id and metadata, each may be nil.
-- In a script on a terminal show() draws there; elsewhere it writes the picture to SCRIPT-N.png and says so.

local core = require "vertex.core"

local display = { mode = "script", backend = nil }

local MODES = { script = true, terminal = true, notebook = true }
local written = 0 -- pictures of this script so far

--- Any value as a bundle of its forms; "text/plain" is always among them.
-- @return bundle: form → string
-- @return metadata: form → table; may be empty
function display.mime(object)
  local meta = getmetatable(object)
  local f = type(meta) == "table" and rawget(meta, "__mime")
  if not f then return { ["text/plain"] = tostring(object) }, {} end
  local bundle, metadata = f(object)
  if type(bundle) ~= "table" then
    core.fail("display: __mime of a %s returned a %s, expected a table of forms", type(object), type(bundle))
  end
  bundle["text/plain"] = bundle["text/plain"] or tostring(object)
  return bundle, metadata or {}
end

--- An object that shows itself in the given forms: display.object{["text/html"] = "<b>bold</b>"}, {["image/svg+xml"] =
-- ...}.
-- @param bundle form → bytes
-- @param[opt] metadata form → table
function display.object(bundle, metadata)
  if type(bundle) ~= "table" or next(bundle) == nil then
    core.fail("display.object: expected a table of forms, got %s", tostring(bundle))
  end
  for form, bytes in pairs(bundle) do
    if type(form) ~= "string" or not form:find "^%l+/" or type(bytes) ~= "string" then
      core.fail("display.object: form %s with a %s, expected a form such as text/html with a string", tostring(form),
        type(bytes))
    end
  end
  local text = bundle["text/plain"] or ("(%s)"):format((next(bundle)))
  return setmetatable({}, { __mime = function() return bundle, metadata end, __tostring = function() return text end })
end

-- -- Pictures in terminals --------------------------------------------------------------------------------------------

local DIGITS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"

--- Base64 of a string, without line breaks.
function display.base64(bytes)
  local out = {}
  for i = 1, #bytes, 3 do
    local a, b, c = bytes:byte(i, i + 2)
    local n = a * 65536 + (b or 0) * 256 + (c or 0)
    local p, q, r, s = math.floor(n / 262144), math.floor(n / 4096) % 64, math.floor(n / 64) % 64, n % 64
    out[#out + 1] = DIGITS:sub(p + 1, p + 1) .. DIGITS:sub(q + 1, q + 1) .. (b and DIGITS:sub(r + 1, r + 1) or "=")
      .. (c and DIGITS:sub(s + 1, s + 1) or "=")
  end
  return table.concat(out)
end

--- How the terminal takes pictures: "kitty", "iterm2" or nil, by what it says of itself in the environment;
-- VERTEX_PICTURES=kitty, iterm2 or none decides instead. Not within tmux or screen, which keep the sequences to
-- themselves.
function display.protocol(env)
  env = env or os.getenv
  local asked, term, program = env "VERTEX_PICTURES", env "TERM" or "", env "TERM_PROGRAM" or ""
  if asked and asked ~= "" then return (asked == "kitty" or asked == "iterm2") and asked or nil end
  if env "TMUX" or term:match "^screen" or term:match "^tmux" or term == "dumb" or term == "" then return nil end
  if term:find("kitty", 1, true) or env "KITTY_WINDOW_ID" or term:find("ghostty", 1, true) or program == "ghostty" then
    return "kitty"
  end
  if program == "iTerm.app" or program == "WezTerm" or program == "mintty" or env "LC_TERMINAL" == "iTerm2" then
    return "iterm2"
  end
  return nil
end

--- The bytes that make a terminal show a PNG in place; protocol as display.protocol() names it.
function display.escape(png, protocol)
  local text = display.base64(png)
  if protocol == "iterm2" then return ("\27]1337;File=inline=1;size=%d:%s\7\n"):format(#png, text) end
  local parts, first = {}, "f=100,a=T,"
  for i = 1, #text, 4096 do
    parts[#parts + 1] = ("\27_G%sm=%d;%s\27\\"):format(first, i + 4096 <= #text and 1 or 0, text:sub(i, i + 4095))
    first = ""
  end
  return table.concat(parts) .. "\n"
end

--- Writes a bundle to standard output: the picture where the terminal shows pictures, else the text.
function display.terminal(bundle)
  local png, protocol = bundle["image/png"], display.protocol()
  if png and protocol and core.is_tty(1) then
    io.write(display.escape(png, protocol))
  else
    io.write(bundle["text/plain"], "\n")
  end
  io.flush()
end

-- -- Showing ----------------------------------------------------------------------------------------------------------

--- SCRIPT-1.png, SCRIPT-2.png, ... in the current folder.
local function next_file()
  written = written + 1
  local script = rawget(_G, "arg") and _G.arg[0] or "vertex"
  return ("%s-%d.png"):format(script:match "([^/]+)$":gsub("%.lua$", ""), written)
end

local function script(bundle)
  local png = bundle["image/png"]
  if not png or core.is_tty(1) then return display.terminal(bundle) end
  local path = next_file()
  core.write_file(path, png)
  io.write("figure written to ", path, "\n")
end

--- Shows an object where the user looks.
-- @param object anything; one with `__mime` in its metatable can be a picture
-- @param[opt] options id: a later show with the same id replaces what this one shows, where that can be done
-- (notebooks)
function display.show(object, options)
  if not MODES[display.mode] then
    core.fail("display: mode is '%s', expected script, terminal or notebook", tostring(display.mode))
  end
  local bundle, metadata = display.mime(object)
  if display.mode == "script" then return script(bundle) end
  return (display.backend or display.terminal)(bundle, { id = options and options.id, metadata = metadata })
end

return display
