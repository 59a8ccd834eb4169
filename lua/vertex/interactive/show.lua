--- show.lua: values as text for people: what print(tensor) says (dtype, shape, device, statistics, and the corners of a
-- large tensor), and what sessions show of any value (tables with what is in them).

local arguments = require "vertex.arguments"
local core = require "vertex.core"
local tape = require "vertex.tape"

local EDGE, FEW = 3, 8 -- of a dimension longer than FEW, the first EDGE and the last EDGE are shown
local CELL = 9 -- characters that most numbers take, with what stands between them

--- Gives the function that writes a number of a dtype.
local function number_format(dtype)
  if dtype == "i32" or dtype == "u8" then return function(v) return ("%d"):format(v) end end
  return function(v)
    if v ~= v then return "nan" end
    if v == math.floor(v) and math.abs(v) < 1e5 then return ("%d."):format(v) end
    local a = math.abs(v)
    if a ~= 0 and (a < 1e-3 or a >= 1e5) then return ("%.3e"):format(v) end
    return ("%.4f"):format(v)
  end
end

--- Lists the indices (1-based) that are shown of dimension d of a shape; 0 stands for "...". Of four dimensions and
-- more the first ones are shown by their first and last alone; of the last dimension up to `most` are.
local function shown(shape, d, most)
  local list, n = {}, shape[d]
  local outer = #shape > 3 and d < #shape - 1
  local edge, few = outer and 1 or EDGE, outer and 2 or FEW
  if d == #shape then edge, few = math.max(1, math.floor((most - 1) / 2)), most end
  if n <= few then
    for i = 1, n do list[i] = i end
  else
    for i = 1, edge do list[i] = i end
    list[edge + 1] = 0
    for i = n - edge + 1, n do list[#list + 1] = i end
  end
  return list
end

--- Writes the shown corners of x, of a row as much as the terminal has room for; reads only those rows.
local function values(x, most)
  local format, shape = number_format(x:dtype()), x:shape()
  local room = core.is_tty(1) and core.terminal_columns() - 2 * #shape - 1 or 0
  most = most or math.max(FEW, math.floor(room / CELL))
  local width = 0
  local function collect(view, d)
    if d == #shape then
      local row, out = d == 0 and { view:item() } or view:totable(), {}
      for _, i in ipairs(d == 0 and { 1 } or shown(shape, d, most)) do
        local text = i == 0 and "..." or format(row[i])
        out[#out + 1] = text
        width = math.max(width, #text)
      end
      return out
    end
    local out = {}
    for _, i in ipairs(shown(shape, d, most)) do out[#out + 1] = i == 0 and "..." or collect(view[i], d + 1) end
    return out
  end
  local cells = collect(x, #shape == 0 and 0 or 1)
  if #shape == 0 then return cells[1] end
  local fitting = math.max(FEW, math.floor(room / (width + 2)))
  if fitting < most and fitting < shape[#shape] then return values(x, fitting) end
  local function render(level, d)
    if type(level) == "string" then return level end
    local parts = {}
    for i, c in ipairs(level) do parts[i] = d == #shape and (" "):rep(width - #c) .. c or render(c, d + 1) end
    local between = d == #shape and ", " or "," .. ("\n"):rep(#shape - d) .. (" "):rep(d)
    return "[" .. table.concat(parts, between) .. "]"
  end
  return render(cells, 1)
end

-- -- Pictures ---------------------------------------------------------------------------------------------------------

local SMALLEST, PICTURES, COLUMNS = 8, 64, 8 -- pixels of a side; pictures that are drawn, and beside each other

--- Gives one picture of bytes, (H,W,1) or (H,W,3), as a batch; other tensors as they are.
local function as_batch(x)
  return x:dim() == 3 and x:dtype() == "u8" and x:reshape { 1, unpack(x:shape()) } or x
end

--- Says whether a tensor is a batch of pictures, (N,H,W,1) or (N,H,W,3): bytes, f32 from 0 to 1, or standardized as
-- vx.data.images gives them.
-- @param x tensor
-- @return "bytes", "0 to 1" or "standardized"; nil for other tensors
local function picture_values(x)
  local shape, dtype = x:shape(), x:dtype()
  local channels = shape[4]
  if #shape ~= 4 or (channels ~= 1 and channels ~= 3) or shape[1] < 1 or math.min(shape[2], shape[3]) < SMALLEST then
    return nil
  end
  if dtype == "u8" then return "bytes" end
  if dtype ~= "f32" or require("vertex.ops").nonfinite(x:reshape { -1, channels }) > 0 then return nil end
  local least, most = x:min():item(), x:max():item()
  if least >= 0 and most <= 1 then return most > least and "0 to 1" or nil end
  if channels ~= 3 then return nil end
  local data = require "vertex.data"
  for c = 1, 3 do
    local channel = x:narrow(4, c, 1)
    local low, high = -data.mean[c] / data.std[c], (1 - data.mean[c]) / data.std[c]
    if channel:min():item() < low - 1e-3 or channel:max():item() > high + 1e-3 then return nil end
  end
  return "standardized"
end

--- Writes what a batch of pictures is, in a line.
local function pictures_text(x, kind)
  local shape = x:shape()
  return ("%d picture%s of %d x %d in %d channel%s, %s%s"):format(shape[1], shape[1] == 1 and "" or "s", shape[2],
    shape[3], shape[4], shape[4] == 1 and "" or "s", kind,
    shape[1] > PICTURES and ("; the first %d are shown"):format(PICTURES) or "")
end

--- Draws a batch of pictures.
-- @return figure
local function draw_pictures(x, kind)
  local shape = x:shape()
  local n, rows = math.min(shape[1], PICTURES), {}
  x = x:narrow(1, 1, n):to "cpu"
  if kind == "standardized" then x = require("vertex.data").denormalize(x) end
  if shape[4] == 1 then x = require("vertex.ops").cat(4, x, x, x) end
  local columns = math.min(COLUMNS, n)
  for i = 1, n do
    local r = math.ceil(i / columns)
    rows[r] = rows[r] or {}
    table.insert(rows[r], x[i])
  end
  return require("vertex.plot").image_grid(rows, { cell = math.max(64, math.min(128, shape[2], shape[3])), gap = 3 })
end

--- Writes mean, standard deviation, extremes and the number of values that are not finite.
local function statistics(x)
  if x:numel() < 2 then return "" end
  local f = x:dtype() == "f32" and x or x:to "f32"
  local bad = require("vertex.ops").nonfinite(f:reshape { -1, 1 })
  local mean = f:mean():item()
  local deviation = math.sqrt(math.max(0, (f - mean):square():mean():item()))
  local text = ("  mean %.4g  sd %.4g  min %.4g  max %.4g"):format(mean, deviation, f:min():item(), f:max():item())
  return bad > 0 and text .. ("  %d not finite"):format(bad) or text
end

--- Writes "f32 (2,3) on cpu", and the op that made x where a gradient goes through it.
local function head_of(x)
  local head = ("%s %s on %s"):format(x:dtype(), core.shape_text(x), x:device())
  if x.requires_grad then head = head .. (x._node and "  from " .. x._node.op.name or "  requires_grad") end
  return head
end

--- Writes all that print(x) shows.
local function describe(x)
  if core.is_released(x) then return "tensor (released)" end
  local head = head_of(x)
  if x:numel() == 0 then return head .. "  (no elements)" end
  local text
  core.step(function()
    text = tape.no_grad(function()
      local batch = as_batch(x)
      local kind = picture_values(batch)
      return head .. statistics(x) .. "\n" .. (kind and pictures_text(batch, kind) or values(x))
    end)
  end)
  return text
end

core.Tensor.__tostring = function(x)
  local ok, text = pcall(describe, x)
  return ok and text or "tensor (" .. tostring(text) .. ")"
end

--- Gives a batch of pictures as a picture, and other tensors as text alone.
core.Tensor.__mime = function(x)
  local bundle, drawn = { ["text/plain"] = tostring(x) }, nil
  local display = require "vertex.interactive.display"
  if core.is_released(x) or display.mode == "terminal" and not display.protocol() then return bundle end
  local fine, size = pcall(core.step, function()
    return tape.no_grad(function()
      local batch = as_batch(x)
      local kind = picture_values(batch)
      if not kind then return nil end
      local figure = draw_pictures(batch, kind)
      drawn = figure:png()
      return { width = math.ceil(figure.width), height = math.ceil(figure.height) }
    end)
  end)
  if not (fine and drawn) then return bundle end -- without libcairo: the text
  bundle["image/png"] = drawn
  return bundle, { ["image/png"] = size }
end

-- -- Any value --------------------------------------------------------------------------------------------------------

local show = {}

-- Of a large table the first ITEMS entries are shown; of a table DEEP levels down, only that it is there.
local ITEMS, DEEP = 60, 5
local WIDTH = 100

local ESCAPES = { ["\n"] = "\\n", ["\t"] = "\\t", ["\r"] = "\\r", ['"'] = '\\"', ["\\"] = "\\\\" }
--- Writes a string as Lua reads it.
local function quoted(s)
  local function numbered(c) return ("\\%d"):format(c:byte()) end
  s = s:gsub('[%c"\\]', function(c) return ESCAPES[c] or numbered(c) end)
  return '"' .. s:gsub("\194[\128-\159]", function(control) return (control:gsub(".", numbered)) end) .. '"'
end

--- Writes the parameters of a function: an op's as its record names them.
-- @param f function
-- @return text such as "x, dims, ..."
function show.parameters(f)
  local op, names = tape.op_of[f], {}
  if op and op.args then
    for i, arg in ipairs(op.args) do names[i] = arg[1] end
    return table.concat(names, ", ")
  end
  local own, hidden = op and op.forward or arguments.plain(f), op and 1 or 0 -- an op's forward takes a context first
  local info = debug.getinfo(own, "u")
  for i = hidden + 1, info.nparams do names[#names + 1] = debug.getlocal(own, i) end
  if info.isvararg then names[#names + 1] = "..." end
  return table.concat(names, ", ")
end

--- Writes a path: from the library's folder on where it is in there.
-- @param path text
-- @return text
function show.path(path)
  if path:sub(1, #core.root + 1) == core.root .. "/" then return path:sub(#core.root + 2) end
  return path
end

--- Writes where a function is defined, an op where its record is.
-- @param f function
-- @return text "file.lua:12"; nil for a function in C
function show.place(f)
  local op = tape.op_of[f]
  local info = debug.getinfo(op and op.forward or arguments.plain(f), "S")
  if info.what == "C" then return nil end
  local source, line = info.source, info.linedefined
  if op and op.source_file then source, line = op.source_file, op.line end
  return ("%s:%d"):format(show.path(source:match "^[@=](.*)" or info.short_src), line)
end

--- Writes a function: its parameters and its place.
local function function_text(f)
  local place = show.place(f)
  if not place then return "function (built in)" end
  return ("function(%s) at %s"):format(show.parameters(f), place)
end

--- Finds the name under which a table of functions was required.
-- @param t table
-- @return string; nil for other tables
function show.module_name(t)
  for name, module in pairs(package.loaded) do
    if module == t then
      for _, value in next, t do
        if type(value) == "function" then return name end
      end
    end
  end
end

--- Lists the names in a table that begin with a letter, in order, with those of its metatable's table __names, which
-- come into being when they are asked for.
-- @param t table
-- @return array of strings
function show.names(t)
  local names, meta = {}, getmetatable(t)
  for key in next, t do
    if type(key) == "string" and key:find "^%a" then names[#names + 1] = key end
  end
  for key in pairs(type(meta) == "table" and rawget(meta, "__names") or {}) do
    if rawget(t, key) == nil then names[#names + 1] = key end
  end
  table.sort(names)
  return names
end

--- Writes a value that stands within another, on one line.
local function brief(v)
  if core.is_tensor(v) then
    if core.is_released(v) then return "tensor (released)" end
    return v:numel() == 1 and v:dim() == 0 and head_of(v) .. ": " .. number_format(v:dtype())(v:item()) or head_of(v)
  end
  local text = tostring(v)
  local first = text:match "^[^\n]*"
  return #first < #text and first .. " ..." or text
end

--- Orders keys: by type, then numbers and strings by value.
local function key_order(a, b)
  local s, t = type(a), type(b)
  if s ~= t then return s < t end
  if s == "number" or s == "string" then return a < b end
  return tostring(a) < tostring(b)
end

--- Says whether a value has a __tostring.
local function has_text(v)
  local meta = getmetatable(v)
  return type(meta) == "table" and rawget(meta, "__tostring") ~= nil
end

--- Writes names in columns, as many as fit the width, down the columns first.
-- @param names array of strings
-- @param width characters of a line
-- @return string of several lines
function show.columns(names, width)
  local longest = 0
  for _, name in ipairs(names) do longest = math.max(longest, #name) end
  local per_row = math.max(1, math.floor(width / (longest + 2)))
  local rows = math.ceil(#names / per_row)
  local out = {}
  for row = 1, rows do
    local line = {}
    for i = row, #names, rows do line[#line + 1] = names[i] .. (" "):rep(longest - #names[i]) end
    out[row] = table.concat(line, "  "):gsub("%s+$", "")
  end
  return table.concat(out, "\n")
end

local render

--- Lists the entries of a table as texts: the array part without its keys, then the rest in order.
local function entries(t, depth, indent, seen)
  local list, more, n = {}, 0, 0
  local function add(text) if #list < ITEMS then list[#list + 1] = text else more = more + 1 end end
  while rawget(t, n + 1) ~= nil do
    n = n + 1
    if n <= ITEMS then add(render(rawget(t, n), depth + 1, indent .. "  ", seen)) else more = more + 1 end
  end
  local keys = {}
  for key in next, t do
    if not (type(key) == "number" and key >= 1 and key <= n and key == math.floor(key)) then keys[#keys + 1] = key end
  end
  table.sort(keys, key_order)
  for _, key in ipairs(keys) do
    if #list >= ITEMS then
      more = more + 1
    else
      local name = type(key) == "string" and (key:find "^[%a_][%w_]*$" and key or "[" .. quoted(key) .. "]")
        or "[" .. brief(key) .. "]"
      add(name .. " = " .. render(rawget(t, key), depth + 1, indent .. "  ", seen))
    end
  end
  if more > 0 then list[#list + 1] = ("... %d more"):format(more) end
  return list
end

--- Writes any value. depth: tables around it; indent: spaces before its lines; seen: the tables around it, as a set.
function render(v, depth, indent, seen)
  local kind = type(v)
  if kind == "string" then return quoted(v) end
  if kind == "function" then return function_text(v) end
  if kind ~= "table" or has_text(v) then return depth == 0 and tostring(v) or brief(v) end
  if seen[v] then return "{ itself }" end
  local module = show.module_name(v)
  if module then return "module " .. module .. (depth == 0 and "\n" .. show.columns(show.names(v), WIDTH) or "") end
  if depth >= DEEP then return next(v) == nil and "{}" or "{ ... }" end
  seen[v] = true
  local list = entries(v, depth, indent, seen)
  seen[v] = nil
  if #list == 0 then return "{}" end
  local width, lines = #indent + 2, false
  for _, text in ipairs(list) do
    width = width + #text + 2
    lines = lines or text:find("\n", 1, true)
  end
  if not lines and width <= WIDTH then return "{ " .. table.concat(list, ", ") .. " }" end
  local between = ",\n" .. indent .. "  "
  local out, line = {}, nil -- short entries share lines
  for _, text in ipairs(list) do
    if line and not line:find("\n", 1, true) and not text:find("\n", 1, true) and not text:find " = "
      and not line:find " = "
      and #line + #text + #indent + 4 <= WIDTH then
      line = line .. ", " .. text
    else
      out[#out + 1] = line
      line = text
    end
  end
  out[#out + 1] = line
  return "{\n" .. indent .. "  " .. table.concat(out, between) .. "\n" .. indent .. "}"
end

--- Writes a value as a session shows it: strings quoted, tables with what is in them (keys in order, large ones cut),
-- functions with their parameters and their place, everything with a __tostring as that says.
-- @param v any value
-- @return string
function show.value(v) return render(v, 0, "", {}) end

return show
