--- display.lua: how an object shows itself in a script, in a terminal session or in a notebook.
--
-- An object that can be more than text has a function `__mime` in its metatable. It returns a bundle, one entry for
-- each form (a MIME type) with raw bytes, never base64; and, if it likes, metadata for each form, as notebooks take
-- them:
--     __mime = function(self)
--       return { ["image/png"] = bytes, ["text/plain"] = text }, { ["image/png"] = { width = 640, height = 400 } }
--     end
--
-- Who runs the code says what showing means:
--     display.mode      "script" (at the start), "terminal" (an interactive session) or "notebook"
--     display.backend   function(bundle, options), which display.show calls in the modes "terminal" and "notebook"; nil
--                       means display.terminal. options is a table with id and metadata; each may be nil
-- In a script on a terminal, display.show draws there; elsewhere it writes the picture to SCRIPT-N.png and says so.

local core = require "vertex.core"

local display = { mode = "script", backend = nil }

local MODES = { script = true, terminal = true, notebook = true }
local written = 0 -- pictures of this script so far

--- Gives the forms of a value: those its __mime tells, and its text.
-- @param object any value
-- @return table form → bytes, "text/plain" always among them
-- @return table form → metadata; may be empty
-- @raise where __mime gives no table
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

--- Makes an object that shows itself in the given forms: vx.display.object { ["text/html"] = "<b>bold</b>" }.
-- @param bundle table form → bytes
-- @param[opt] metadata table form → table, as notebooks take it
-- @return object to show, or to end a cell with
-- @raise where a form is no MIME type, or what stands under it is no string
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

--- Writes bytes in base64, without line breaks.
-- @param bytes string, any bytes
-- @return string
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

--- Tells how the terminal takes pictures, by what it says of itself in the environment. VERTEX_PICTURES=kitty, iterm2
-- or none decides instead. Within tmux and screen it takes none, since they keep the sequences to themselves.
-- @param[opt] env function(name) → text or nil, in place of os.getenv
-- @return "kitty" or "iterm2"; nil where the terminal takes no pictures
-- @raise where VERTEX_PICTURES has another word
function display.protocol(env)
  env = env or os.getenv
  local asked, term, program = env "VERTEX_PICTURES", env "TERM" or "", env "TERM_PROGRAM" or ""
  if asked and asked ~= "" then
    if asked == "none" then return nil end
    if asked == "kitty" or asked == "iterm2" then return asked end
    error(("VERTEX_PICTURES is '%s', expected kitty, iterm2 or none"):format(asked), 0)
  end
  if env "TMUX" or term:match "^screen" or term:match "^tmux" or term == "dumb" or term == "" then return nil end
  if term:find("kitty", 1, true) or env "KITTY_WINDOW_ID" or term:find("ghostty", 1, true) or program == "ghostty" then
    return "kitty"
  end
  if program == "iTerm.app" or program == "WezTerm" or program == "mintty" or env "LC_TERMINAL" == "iTerm2" then
    return "iterm2"
  end
  return nil
end

--- Writes the sequence that makes a terminal show a picture in place.
-- @param png string, a PNG file
-- @param protocol "kitty" or "iterm2", as of display.protocol
-- @return string to write to the terminal
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

--- Writes a bundle to standard output: its picture where the terminal takes pictures, else its text.
-- @param bundle table form → bytes, with "text/plain"
-- @raise where there is no such text
function display.terminal(bundle)
  if type(bundle["text/plain"]) ~= "string" then
    core.fail('display.terminal: the form text/plain is %s, expected a string', type(bundle["text/plain"]))
  end
  local png, protocol = bundle["image/png"], display.protocol()
  if png and protocol and core.is_tty(1) then
    io.stdout:write(display.escape(png, protocol))
  else
    io.stdout:write(bundle["text/plain"], "\n")
  end
  io.stdout:flush()
end

-- -- Showing ----------------------------------------------------------------------------------------------------------

--- Gives the name of the next picture: SCRIPT-1.png, SCRIPT-2.png, ... in the current folder.
local function next_file()
  written = written + 1
  local script = rawget(_G, "arg") and _G.arg[0] or "vertex"
  return ("%s-%d.png"):format(script:match "([^/]+)$":gsub("%.lua$", ""), written)
end

--- Shows a bundle in a script.
local function show_in_script(bundle)
  local png = bundle["image/png"]
  if not png or core.is_tty(1) then
    display.terminal(bundle)
    return
  end
  local path = next_file()
  core.write_file(path, png)
  io.stdout:write("figure written to ", path, "\n")
end

--- Shows an object where the user looks.
-- @param object any value; one with `__mime` in its metatable can be a picture
-- @param[opt] options { id = any value: in a notebook, a later show with the same id replaces what this one shows }
-- @raise where display.mode is none of the three, or __mime gives no table
function display.show(object, options)
  if not MODES[display.mode] then
    core.fail("display: mode is '%s', expected script, terminal or notebook", tostring(display.mode))
  end
  local bundle, metadata = display.mime(object)
  local show = display.mode == "script" and show_in_script or display.backend or display.terminal
  show(bundle, { id = options and options.id, metadata = metadata })
end

return display
