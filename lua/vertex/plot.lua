--- Figures for papers and notebooks: lines, points, bars, histograms, heat maps, pictures.
--
-- Drawn with libcairo through LuaJIT's FFI and nothing else; the module loads without cairo and asks for it when a
-- figure is first drawn. A figure records what it is told and draws it when saved, so one figure can be saved to several formats.
--
--     local fig = plot.figure{width = 900, height = 400, cols = 2, title = "Two runs"}
--     fig:axes(1):line(nil, losses, {label = "loss"}):set{ylog = true, xlabel = "step"}
--     fig:save("loss.png")
--
-- Data: wherever an array is asked for, give a Lua array of numbers or an object with `:totable()`. Numbers that
-- are NaN or infinite are gaps: a line breaks there, a point or bar is left out. Arrays are copied.
-- Pictures: `{width=, height=, rgb=string}` with 8-bit RGB, row by row, or an object with `:shape()` -> {H, W, 3},
-- `:dtype()` -> "u8" or "f32" (0..1) and `:bytes()`.
-- Colours: "#rrggbb", {r, g, b} in 0..1, or a number that picks from `plot.colors`. Series without one take the
-- next of `plot.colors`; each further round changes the dash of lines and the marker of points.
-- Sizes are points, 1/72 inch; a PNG has `scale` pixels to the point. Text is UTF-8.
-- @module vertex.plot

local ffi = require "ffi"
local floor, ceil, abs, min, max, huge, pi = math.floor, math.ceil, math.abs, math.min, math.max, math.huge, math.pi
local log10 = math.log10
local nan = 0 / 0

local plot = {}

-- Only what is used. Handles are void *, enums int and structs arrays: no types are defined, so loading twice is harmless.
ffi.cdef [[
int getpid(void);
void *cairo_image_surface_create(int format, int width, int height); void *cairo_svg_surface_create(const char *path, double width, double height);
void *cairo_pdf_surface_create(const char *path, double width, double height); unsigned char *cairo_image_surface_get_data(void *surface);
int cairo_image_surface_get_stride(void *surface); int cairo_surface_write_to_png(void *surface, const char *path);
void cairo_surface_flush(void *surface); void cairo_surface_mark_dirty(void *surface); void cairo_surface_finish(void *surface);
int cairo_surface_status(void *surface); void cairo_surface_destroy(void *surface); const char *cairo_status_to_string(int status);
void *cairo_create(void *surface); int cairo_status(void *cr); void cairo_destroy(void *cr); void cairo_save(void *cr); void cairo_restore(void *cr);
void cairo_translate(void *cr, double x, double y); void cairo_scale(void *cr, double x, double y); void cairo_rotate(void *cr, double radians);
void cairo_set_source_rgba(void *cr, double r, double g, double b, double a);
void cairo_set_source_surface(void *cr, void *surface, double x, double y); void *cairo_get_source(void *cr);
void cairo_pattern_set_filter(void *pattern, int filter); void cairo_set_antialias(void *cr, int mode);
void cairo_set_line_width(void *cr, double width); void cairo_set_line_join(void *cr, int join);
void cairo_set_dash(void *cr, const double *dashes, int count, double offset); void cairo_move_to(void *cr, double x, double y);
void cairo_line_to(void *cr, double x, double y); void cairo_arc(void *cr, double x, double y, double radius, double from, double to);
void cairo_rectangle(void *cr, double x, double y, double width, double height); void cairo_new_path(void *cr); void cairo_close_path(void *cr);
void cairo_stroke(void *cr); void cairo_fill(void *cr); void cairo_paint(void *cr); void cairo_clip(void *cr);
void cairo_select_font_face(void *cr, const char *family, int slant, int weight); void cairo_set_font_size(void *cr, double size);
void cairo_text_extents(void *cr, const char *text, double extents[6]); void cairo_show_text(void *cr, const char *text);
void *cairo_font_options_create(void); void cairo_font_options_set_hint_style(void *options, int style);
void cairo_font_options_set_hint_metrics(void *options, int metrics); void cairo_font_options_destroy(void *options);
void cairo_set_font_options(void *cr, void *options);
]]

local ARGB32, RGB24, NEAREST, GOOD, SHARP_EDGES, ROUND_JOIN = 0, 1, 3, 1, 1, 1

-- In SVG and PDF a layer with more marks than this becomes a picture: 20,000 dots would be 5 MB of paths.
local MAX_VECTOR_MARKS = 2000
-- Pixels to the point in such a picture: 3 is 216 dpi.
local RASTER_SCALE = 3
-- More entries than this hide too much data: the legend goes outside.
local MAX_INSIDE_ENTRIES = 6

local cairo     -- the library, once a figure has been drawn

local function load_cairo()
  if cairo then return end
  local ok, lib = pcall(ffi.load, "libcairo.so.2")
  if not ok then error("plot: drawing needs libcairo.so.2, Debian package libcairo2 (" .. tostring(lib) .. ")", 0) end
  cairo = lib
end

-- Colours --------------------------------------------------------------------------------------------------------

--- The series colours, "#rrggbb": Okabe and Ito's set, which colour-blind readers can tell apart, with its grey in
-- place of its yellow, which vanishes on white paper.
plot.colors = {"#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999"}

local dashes = {{}, {5, 2}, {1.5, 1.5}, {7, 2, 1.5, 2}}
local marker_names = {"circle", "square", "triangle", "diamond", "cross", "plus"}

local palettes = {
  viridis = {"#440154", "#482878", "#3E4A89", "#31688E", "#26828E", "#1F9E89", "#35B779", "#6DCD59", "#B4DE2C", "#FDE725"},
  magma = {"#000004", "#180F3E", "#451077", "#721F81", "#9F2F7F", "#CD4071", "#F1605D", "#FD9567", "#FEC98D", "#FCFDBF"},
  bluered = {"#2166AC", "#67A9CF", "#D1E5F0", "#F7F7F7", "#FDDBC7", "#EF8A62", "#B2182B"},
  gray = {"#000000", "#FFFFFF"},
}

local function hex(text)
  local r, g, b = text:match "^#(%x%x)(%x%x)(%x%x)$"
  return r and tonumber(r, 16) / 255, r and tonumber(g, 16) / 255, r and tonumber(b, 16) / 255
end

for _, stops in pairs(palettes) do
  for i, text in ipairs(stops) do stops[i] = {hex(text)} end
end

local function sorted_keys(t)
  local keys = {}
  for k in pairs(t) do keys[#keys + 1] = tostring(k) end
  table.sort(keys)
  return table.concat(keys, ", ")
end

--- The colour at a place on a colour map.
-- @param name "viridis", "magma", "bluered" or "gray"
-- @param t number; below 0 counts as 0, above 1 as 1
-- @return r, g, b in 0..1
function plot.colormap(name, t)
  local stops = palettes[name]
  if not stops then error(("plot.colormap: no palette %q; there are %s"):format(tostring(name), sorted_keys(palettes)), 2) end
  local at = min(max(t, 0), 1) * (#stops - 1)
  local i = min(floor(at), #stops - 2)
  local a, b, f = stops[i + 1], stops[i + 2], at - i
  return a[1] + f * (b[1] - a[1]), a[2] + f * (b[2] - a[2]), a[3] + f * (b[3] - a[3])
end

-- Arguments ------------------------------------------------------------------------------------------------------
-- Every check takes the level to blame: 3 from a public function is the line that called it.

local function finite(v) return v - v == 0 end

-- The least and greatest finite value so far; only positive ones count where `positive` is set.
local function widen(lo, hi, values, positive)
  for _, v in ipairs(values) do
    if finite(v) and (v > 0 or not positive) then lo, hi = min(lo, v), max(hi, v) end
  end
  return lo, hi
end

-- lo, hi made into a range that can be divided by: empty becomes 0..1, a single value gets room on both sides.
local function open_range(lo, hi)
  if lo > hi then return 0, 1 end
  if hi - lo > 1e-12 * max(abs(lo), abs(hi)) then return lo, hi end
  local room = lo == 0 and 1 or abs(lo) * 0.1
  return lo - room, hi + room
end

local function show(v)
  if type(v) == "string" then return ("%q"):format(v) end
  return type(v) == "number" and tostring(v) or "a " .. type(v)
end

local function check_options(options, known, who, level)
  if options == nil then return {} end
  if type(options) ~= "table" then error(("%s: options are a table, got %s"):format(who, show(options)), level) end
  for key, value in pairs(options) do
    local want = known[key]
    if not want then error(("%s: no option %q; there are %s"):format(who, tostring(key), sorted_keys(known)), level) end
    local got = type(value)
    if want ~= "any" and got ~= want and not (want == "string" and got == "number") then
      error(("%s: %s is a %s, got %s"):format(who, key, want, show(value)), level)
    end
  end
  return options
end

local function check_positive(value, name, who, level)
  if not (type(value) == "number" and value > 0 and value < huge) then
    error(("%s: %s is a positive number, got %s"):format(who, name, show(value)), level)
  end
  return value
end

local function check_whole(value, name, who, level)
  if not (type(value) == "number" and value >= 1 and value < huge and value == floor(value)) then
    error(("%s: %s is a whole number from 1, got %s"):format(who, name, show(value)), level)
  end
  return value
end

local function plain(v)
  if type(v) == "table" and rawget(v, 1) ~= nil then return v end
  local ok, method = pcall(function() return v.totable end)
  if ok and method then return v:totable() end
  return v
end

local function check_array(v, name, who, level)
  local source, out = plain(v), {}
  if type(source) ~= "table" then
    error(("%s: %s is an array of numbers, got %s"):format(who, name, show(v)), level)
  end
  for i = 1, #source do
    local e = source[i]
    if type(e) ~= "number" then e = type(e) == "cdata" and tonumber(e) end
    if not e then
      error(("%s: %s[%d] is %s, expected a number (0/0 leaves a gap)"):format(who, name, i, show(source[i])), level)
    end
    out[i] = e
  end
  return out
end

local function check_lengths(a, a_name, b, b_name, who, level)
  if #a ~= #b then
    error(("%s: %s has %d values and %s has %d; they must match"):format(who, a_name, #a, b_name, #b), level)
  end
end

local function check_labels(labels, name, who)
  if type(labels) ~= "table" then error(("%s: %s is an array of strings, got %s"):format(who, name, show(labels)), 3) end
  local out = {}
  for i, label in ipairs(labels) do
    if type(label) ~= "string" and type(label) ~= "number" then error(("%s: %s[%d] is a string, got %s"):format(who, name, i, show(label)), 3) end
    out[i] = tostring(label)
  end
  return out
end

local function check_color(value, who, level)
  local color
  if type(value) == "string" then color = {hex(value)} end
  if type(value) == "number" and plot.colors[value] then color = {hex(plot.colors[value])} end
  if type(value) == "table" then color = {value[1], value[2], value[3]} end
  for i = 1, 3 do
    local c = color and color[i]
    if not (type(c) == "number" and c >= 0 and c <= 1) then
      error(("%s: a color is \"#rrggbb\", {r, g, b} in 0..1 or a number 1..%d, got %s"):format(who, #plot.colors, show(value)), level)
    end
  end
  return color
end

local function check_marker(value, who, level)
  for _, name in ipairs(marker_names) do
    if name == value then return value end
  end
  error(("%s: no marker %s; there are %s"):format(who, show(value), table.concat(marker_names, ", ")), level)
end

local function float_bytes(bytes, count)
  local from, to = ffi.cast("const float *", bytes), ffi.new("uint8_t[?]", count)
  for i = 0, count - 1 do
    local v = from[i]
    to[i] = v >= 1 and 255 or v > 0 and floor(v * 255 + 0.5) or 0     -- NaN fails both: black
  end
  return ffi.string(to, count)
end

-- Any accepted picture as a new {width, height, rgb}: a copy, since a tensor may be freed before the figure is drawn.
local function check_image(img, who, level)
  if type(img) == "table" and rawget(img, "rgb") then
    local w, h = check_whole(img.width, "image.width", who, level + 1), check_whole(img.height, "image.height", who, level + 1)
    if type(img.rgb) ~= "string" or #img.rgb ~= 3 * w * h then
      error(("%s: a %dx%d image has an rgb string of %d bytes, got %s"):format(who, w, h, 3 * w * h,
        type(img.rgb) == "string" and #img.rgb or show(img.rgb)), level)
    end
    return {width = w, height = h, rgb = img.rgb}
  end
  local ok, shape, dtype = pcall(function() return img:shape(), img:dtype() end)
  if not ok or type(shape) ~= "table" then
    error(("%s: an image is {width=, height=, rgb=} or an object with shape, dtype and bytes, got %s"):format(who, show(img)), level)
  end
  if #shape ~= 3 or shape[3] ~= 3 or shape[1] < 1 or shape[2] < 1 or not (dtype == "u8" or dtype == "f32") then
    error(("%s: an image object is (H, W, 3) of u8 or f32, got (%s) of %s"):format(who, table.concat(shape, ", "), tostring(dtype)), level)
  end
  local count, bytes = shape[1] * shape[2] * 3, img:bytes()
  if #bytes ~= count * (dtype == "u8" and 1 or 4) then
    error(("%s: (%s) of %s does not fill %d bytes"):format(who, table.concat(shape, ", "), dtype, #bytes), level)
  end
  return {width = shape[2], height = shape[1], rgb = dtype == "u8" and bytes or float_bytes(bytes, count)}
end

-- Numbers and ticks ----------------------------------------------------------------------------------------------

local function power10(e) return tonumber("1e" .. e) end       -- exact, which 10^e need not be
local function exponent(v) return floor(log10(abs(v)) + 1e-9) end

local function fixed(v, digits) return ("%%.%df"):format(max(0, digits)):format(v) end

local function trim(text)
  if not text:find ".%..*" then return text end
  return (text:gsub("0+$", ""):gsub("%.$", ""))
end

--- A number as an axis writes it: 0, 0.05, 1200, 16k, 2.5M, 1e-4.
-- @param v number
-- @param[opt] step distance to the next tick, which fixes the decimals; without it four digits are kept, zeros dropped
-- @param[opt] magnitude the largest |tick| of the axis, so that all its ticks share one unit; default |v|
-- @return string
function plot.format_number(v, step, magnitude)
  if v == 0 then return "0" end
  if not finite(v) then return tostring(v) end
  magnitude = magnitude or abs(v)
  if magnitude < 1e-3 * (1 - 1e-9) or magnitude >= 1e12 then
    local e = exponent(v)
    local mantissa = v / power10(e)
    return trim(fixed(mantissa, step and e - exponent(step) or 3)) .. "e" .. e
  end
  local unit, suffix = 1, ""
  for _, u in ipairs {{1e9, "G"}, {1e6, "M"}, {1e3, "k"}} do
    if magnitude >= max(u[1], 1e4) and (step or u[1]) >= u[1] / 100 then unit, suffix = u[1], u[2] break end
  end
  if step then return fixed(v / unit, -exponent(step / unit)) .. suffix end
  return trim(fixed(v / unit, 3 - exponent(v / unit))) .. suffix
end

--- Round values for a linear axis: steps of 1, 2 or 5 times a power of ten.
-- @param lo lower end
-- @param hi upper end, above lo
-- @param count the most ticks wanted, at least 2
-- @return array of values within lo..hi, ascending
-- @return the step
function plot.ticks(lo, hi, count)
  local raw = (hi - lo) / max(count - 1, 1)
  local e, mantissa = exponent(raw), 10
  for _, m in ipairs {5, 2, 1} do
    if m * power10(e) >= raw * (1 - 1e-9) then mantissa = m end
  end
  local step, out = mantissa * power10(e), {}
  local first = ceil(lo / step - 1e-9)
  for i = 0, min(floor(hi / step + 1e-9) - first, count) do
    local k = first + i
    out[i + 1] = e < 0 and k * mantissa / power10(-e) or k * step     -- dividing gives 0.3, multiplying 0.30000000000000004
  end
  return out, step
end

--- Round values for a logarithmic axis: 1, 2, 5 of each decade where they fit, else decades, else every n-th decade;
-- linear ticks where the range holds fewer than two of those.
-- @param lo lower end, above 0
-- @param hi upper end, above lo
-- @param count the most ticks wanted, at least 2
-- @return array of values within lo..hi, ascending
-- @return the step where the ticks are linear, else nil
function plot.log_ticks(lo, hi, count)
  local first, last = floor(log10(lo)), ceil(log10(hi))
  local function pick(mantissas, stride)
    local out = {}
    for e = first, last do
      for _, m in ipairs(e % stride == 0 and mantissas or {}) do
        local v = m * power10(e)
        if v >= lo * (1 - 1e-9) and v <= hi * (1 + 1e-9) then out[#out + 1] = v end
      end
    end
    return out
  end
  local out, stride = pick({1, 2, 5}, 1), 1
  if #out < 2 then return plot.ticks(lo, hi, count) end
  if #out <= count then return out end
  out = pick({1}, 1)
  if #out < 2 then return plot.ticks(lo, hi, count) end
  while #out > max(count, 2) do
    stride = stride + 1
    out = pick({1}, stride)
  end
  return out
end

-- Drawing tools --------------------------------------------------------------------------------------------------

local INK, GRAY, GRID = {0.13, 0.13, 0.13}, {0.45, 0.45, 0.45}, {0.9, 0.9, 0.9}

local function source(cr, color, alpha) cairo.cairo_set_source_rgba(cr, color[1], color[2], color[3], alpha or 1) end

local function set_font(cr, size, bold)
  cairo.cairo_select_font_face(cr, "DejaVu Sans", 0, bold and 1 or 0)
  cairo.cairo_set_font_size(cr, size)
end

-- Width of a text in points.
local function text_width(cr, text, size, bold)
  local extents = ffi.new "double[6]"                 -- cairo_text_extents_t: x and y bearing, width, height, x and y advance
  set_font(cr, size, bold)
  cairo.cairo_text_extents(cr, text, extents)
  return extents[4]
end

-- Draw a text around (x, y): align 0 starts there, 0.5 centres, 1 ends; vertically the middle of a capital is at y.
-- style: {align=, bold=, angle=, color=, fit=}; a text wider than fit is drawn smaller.
local function draw_text(cr, text, x, y, size, style)
  style = style or {}
  local width = text_width(cr, text, size, style.bold)
  if style.fit and width > style.fit then
    size = size * style.fit / width
    width = text_width(cr, text, size, style.bold)
  end
  cairo.cairo_save(cr)
  cairo.cairo_translate(cr, x, y)
  if style.angle then cairo.cairo_rotate(cr, style.angle) end
  source(cr, style.color or INK)
  cairo.cairo_move_to(cr, -width * (style.align or 0), size * 0.365)     -- half of DejaVu's capital height
  cairo.cairo_show_text(cr, text)
  cairo.cairo_restore(cr)
end

local function segment(cr, x0, y0, x1, y1)
  cairo.cairo_move_to(cr, x0, y0)
  cairo.cairo_line_to(cr, x1, y1)
end

local function set_dash(cr, dash, width)
  local lengths = ffi.new("double[?]", max(#dash, 1))
  for i, v in ipairs(dash) do lengths[i - 1] = v * width end
  cairo.cairo_set_dash(cr, lengths, #dash, 0)
end

local function polygon(cr, x, y, r, corners)
  for i = 1, #corners, 2 do cairo.cairo_line_to(cr, x + r * corners[i], y + r * corners[i + 1]) end
  cairo.cairo_close_path(cr)
end

local markers = {
  circle = function(cr, x, y, r) cairo.cairo_arc(cr, x, y, r, 0, 2 * pi) end,
  square = function(cr, x, y, r) cairo.cairo_rectangle(cr, x - 0.9 * r, y - 0.9 * r, 1.8 * r, 1.8 * r) end,
  triangle = function(cr, x, y, r) polygon(cr, x, y, 1.15 * r, {0, -1, 0.9, 0.7, -0.9, 0.7}) end,
  diamond = function(cr, x, y, r) polygon(cr, x, y, 1.25 * r, {0, -1, 0.8, 0, 0, 1, -0.8, 0}) end,
  cross = function(cr, x, y, r)
    polygon(cr, x, y, r, {-1, -0.6, -0.6, -1, 0, -0.4, 0.6, -1, 1, -0.6, 0.4, 0, 1, 0.6, 0.6, 1, 0, 0.4, -0.6, 1, -1, 0.6, -0.4, 0})
  end,
  plus = function(cr, x, y, r)
    polygon(cr, x, y, r, {-0.3, -1, 0.3, -1, 0.3, -0.3, 1, -0.3, 1, 0.3, 0.3, 0.3, 0.3, 1, -0.3, 1, -0.3, 0.3, -1, 0.3, -1, -0.3, -0.3, -0.3})
  end,
}

local function draw_marker(cr, name, x, y, size)
  cairo.cairo_new_path(cr)
  markers[name](cr, x, y, size / 2)
  cairo.cairo_fill(cr)
end

-- A picture as a cairo surface, each pixel repeated `zoom` times both ways.
local function image_surface(img, zoom)
  local w, h = img.width, img.height
  local surface = ffi.gc(cairo.cairo_image_surface_create(RGB24, w * zoom, h * zoom), cairo.cairo_surface_destroy)
  local status = cairo.cairo_surface_status(surface)
  if status ~= 0 then error(("plot: a %dx%d image: %s"):format(w, h, ffi.string(cairo.cairo_status_to_string(status))), 0) end
  cairo.cairo_surface_flush(surface)
  local stride, to = cairo.cairo_image_surface_get_stride(surface), cairo.cairo_image_surface_get_data(surface)
  local from = ffi.cast("const uint8_t *", img.rgb)
  for y = 0, h * zoom - 1 do
    local row, out = from + floor(y / zoom) * w * 3, to + y * stride
    for x = 0, w * zoom - 1 do
      local p = row + floor(x / zoom) * 3
      out[4 * x], out[4 * x + 1], out[4 * x + 2], out[4 * x + 3] = p[2], p[1], p[0], 255
    end
  end
  cairo.cairo_surface_mark_dirty(surface)
  return surface
end

-- Draw a picture as large as fits the box, in its middle. Tiny ones are enlarged here, since viewers of SVG and PDF blur.
local function draw_image(cr, img, x, y, w, h)
  local scale = min(w / img.width, h / img.height)
  local zoom = scale >= 1.5 and ceil(scale) or 1
  local surface = image_surface(img, zoom)
  cairo.cairo_save(cr)
  cairo.cairo_translate(cr, x + (w - img.width * scale) / 2, y + (h - img.height * scale) / 2)
  cairo.cairo_scale(cr, scale / zoom, scale / zoom)
  cairo.cairo_set_source_surface(cr, surface, 0, 0)
  cairo.cairo_pattern_set_filter(cairo.cairo_get_source(cr), zoom > 1 and NEAREST or GOOD)
  cairo.cairo_paint(cr)
  cairo.cairo_restore(cr)
  cairo.cairo_surface_destroy(ffi.gc(surface, nil))
end

-- Layers ---------------------------------------------------------------------------------------------------------
-- What line, scatter, bar, hist and heatmap record. Each kind has draw(layer, cr, view); view.x and view.y map data to
-- the page and give NaN where there is no place (a gap, or nothing positive on a log axis). layer.x and layer.y are
-- the arrays the axes must cover; layer.ink(view, add) names places of the page that a legend should not hide.

local kinds = {}

-- The stretches of a curve without a gap, on the page: array of {x = {}, y = {}, z = {}}; z belongs to `lower`, if given.
local function runs(view, xs, ys, lower)
  local out, run = {}, nil
  for i = 1, #xs do
    local x, y, z = view.x(xs[i]), view.y(ys[i]), lower and view.y(lower[i]) or 0
    if finite(x + y + z) then
      if not run then
        run = {x = {}, y = {}, z = {}}
        out[#out + 1] = run
      end
      local n = #run.x + 1
      run.x[n], run.y[n], run.z[n] = x, y, z
    else
      run = nil
    end
  end
  return out
end

-- A run with at most four points (first, lowest, highest, last) per half point of width: looks the same, and a stroke of
-- 200,000 points would take cairo 12 seconds.
local function thin(run)
  local xs, ys, out, i = run.x, run.y, {x = {}, y = {}}, 1
  while i <= #xs do
    local bucket, last, low, high = floor(xs[i] * 2), i, i, i
    while last < #xs and floor(xs[last + 1] * 2) == bucket do
      last = last + 1
      if ys[last] < ys[low] then low = last end
      if ys[last] > ys[high] then high = last end
    end
    local previous
    for _, k in ipairs {i, min(low, high), max(low, high), last} do
      if k ~= previous then out.x[#out.x + 1], out.y[#out.y + 1] = xs[k], ys[k] end
      previous = k
    end
    i = last + 1
  end
  return out
end

local function draw_band(layer, cr, view)
  source(cr, layer.color, 0.18)
  for _, run in ipairs(runs(view, layer.x[1], layer.band[2], layer.band[1])) do
    for i = 1, #run.x do cairo.cairo_line_to(cr, run.x[i], run.y[i]) end
    for i = #run.x, 1, -1 do cairo.cairo_line_to(cr, run.x[i], run.z[i]) end
    cairo.cairo_close_path(cr)
    cairo.cairo_fill(cr)
  end
end

function kinds.line(layer, cr, view)
  if layer.band then draw_band(layer, cr, view) end
  source(cr, layer.color)
  cairo.cairo_set_line_width(cr, layer.width)
  cairo.cairo_set_line_join(cr, ROUND_JOIN)
  for _, run in ipairs(runs(view, layer.x[1], layer.y[1])) do
    if not layer.marker then run = thin(run) end
    set_dash(cr, layer.dash, layer.width)
    for i = 1, #run.x do cairo.cairo_line_to(cr, run.x[i], run.y[i]) end
    cairo.cairo_stroke(cr)
    set_dash(cr, {}, 1)
    local marker = layer.marker or #run.x == 1 and "circle"     -- a lone point has no line to show it
    for i = 1, marker and #run.x or 0 do
      draw_marker(cr, marker, run.x[i], run.y[i], layer.marker and layer.width + 4 or layer.width + 1)
    end
  end
end

local function line_ink(layer, view, add)
  for _, run in ipairs(runs(view, layer.x[1], layer.y[1])) do
    for i = 1, #run.x do
      local dx, dy = run.x[i] - (run.x[i - 1] or run.x[i]), run.y[i] - (run.y[i - 1] or run.y[i])
      local steps = min(ceil(max(abs(dx), abs(dy)) / 5), 200)
      for k = 0, max(steps - 1, 0) do add(run.x[i] - dx * k / max(steps, 1), run.y[i] - dy * k / max(steps, 1)) end
    end
  end
end

function kinds.scatter(layer, cr, view)
  source(cr, layer.color, layer.alpha)
  local xs, ys = layer.x[1], layer.y[1]
  for i = 1, #xs do
    local x, y = view.x(xs[i]), view.y(ys[i])
    if finite(x + y) then draw_marker(cr, layer.marker, x, y, layer.size) end
  end
end

local function scatter_ink(layer, view, add)
  for i = 1, #layer.x[1] do add(view.x(layer.x[1][i]), view.y(layer.y[1][i])) end
end

-- Page box of bar i; NaN for a gap. On a log axis, which has no zero, bars stand on the frame.
local function bar_box(layer, view, i)
  local x0, x1, y, zero = view.x(layer.x[1][i]), view.x(layer.x[2][i]), view.y(layer.y[1][i]), view.y(0)
  if not finite(zero) then zero = view.top + view.height end
  return x0, min(y, zero), x1 - x0, max(y, zero) - min(y, zero)
end

function kinds.bars(layer, cr, view)
  for i, value in ipairs(layer.y[1]) do
    local x, y, w, h = bar_box(layer, view, i)
    if finite(x + y + w + h) and finite(value) then
      source(cr, layer.color, layer.alpha)
      cairo.cairo_rectangle(cr, x, y, w, h)
      cairo.cairo_fill(cr)
      local lo, hi = layer.y[2] and view.y(layer.y[2][i]) or nan, layer.y[3] and view.y(layer.y[3][i]) or nan
      if finite(hi) then
        source(cr, INK)
        cairo.cairo_set_line_width(cr, 1)
        local middle, cap = x + w / 2, min(w * 0.2, 4)
        if not finite(lo) then lo = view.top + view.height end
        segment(cr, middle, lo, middle, hi)
        segment(cr, middle - cap, hi, middle + cap, hi)
        segment(cr, middle - cap, lo, middle + cap, lo)
        cairo.cairo_stroke(cr)
      end
    end
  end
end

local function bar_ink(layer, view, add)
  for i = 1, #layer.y[1] do
    local x, y, w, h = bar_box(layer, view, i)
    for k = 0, finite(h) and ceil(h / 5) or -1 do add(x + w / 2, y + min(5 * k, h)) end
  end
end

function kinds.heatmap(layer, cr, view)
  local e, lo, hi = layer.extent, layer.range[1], layer.range[2]
  cairo.cairo_set_antialias(cr, SHARP_EDGES)      -- else neighbours leave hairlines between them
  for r, row in ipairs(layer.rows) do
    local y0 = view.y(e[3] + (e[4] - e[3]) * (r - 1) / #layer.rows)
    local y1 = view.y(e[3] + (e[4] - e[3]) * r / #layer.rows)
    for c, v in ipairs(row) do
      local x0 = view.x(e[1] + (e[2] - e[1]) * (c - 1) / #row)
      local x1 = view.x(e[1] + (e[2] - e[1]) * c / #row)
      if finite(v) then
        source(cr, {plot.colormap(layer.palette, (v - lo) / (hi - lo))})
        cairo.cairo_rectangle(cr, x0, y0, x1 - x0, y1 - y0)
        cairo.cairo_fill(cr)
      end
    end
  end
end

-- Draw a layer as a picture into a vector page.
local function draw_raster(layer, cr, view)
  local w, h = ceil(view.width * RASTER_SCALE), ceil(view.height * RASTER_SCALE)
  local surface = ffi.gc(cairo.cairo_image_surface_create(ARGB32, w, h), cairo.cairo_surface_destroy)
  local inner = ffi.gc(cairo.cairo_create(surface), cairo.cairo_destroy)
  cairo.cairo_scale(inner, RASTER_SCALE, RASTER_SCALE)
  cairo.cairo_translate(inner, -view.left, -view.top)
  kinds[layer.kind](layer, inner, view)
  cairo.cairo_destroy(ffi.gc(inner, nil))
  cairo.cairo_translate(cr, view.left, view.top)
  cairo.cairo_scale(cr, 1 / RASTER_SCALE, 1 / RASTER_SCALE)
  cairo.cairo_set_source_surface(cr, surface, 0, 0)
  cairo.cairo_paint(cr)
  cairo.cairo_surface_destroy(ffi.gc(surface, nil))
end

-- Legend ---------------------------------------------------------------------------------------------------------

local corners = {["upper right"] = {1, 0}, ["upper left"] = {0, 0}, ["lower right"] = {1, 1}, ["lower left"] = {0, 1}}
local corner_order = {"upper right", "upper left", "lower right", "lower left"}
local SWATCH = 24

-- The legend's entries and size, in as many columns as the height asks for; nil when nothing has a label.
local function measure_legend(ax, cr, size, height)
  local entries, widest = {}, 0
  for _, layer in ipairs(ax.layers) do
    if layer.label then
      entries[#entries + 1] = layer
      widest = max(widest, text_width(cr, layer.label, size))
    end
  end
  if #entries == 0 or ax.options.legend == "none" then return nil end
  local line = size * 1.45
  local columns = ceil(#entries * line / max(height - 12, line))
  local column = SWATCH + 6 + widest + 10
  local per_column = ceil(#entries / columns)
  return {entries = entries, size = size, line = line, column = column, per_column = per_column,
          width = columns * column + 4, height = per_column * line + 8}
end

local function legend_outside(ax, legend, w, h)
  local where = ax.options.legend or "auto"
  if where ~= "auto" then return where == "right" end
  return #legend.entries > MAX_INSIDE_ENTRIES or legend.width > 0.6 * w or legend.height > 0.5 * h
end

-- The corner with the least ink under the legend; the first of them on a tie.
local function quietest_corner(ax, legend, view, place)
  local counts = {}
  for _, layer in ipairs(ax.layers) do
    if layer.ink then
      layer.ink(layer, view, function(px, py)
        for name in pairs(corners) do
          local x, y = place(name)
          if px > x - 4 and px < x + legend.width + 4 and py > y - 4 and py < y + legend.height + 4 then
            counts[name] = (counts[name] or 0) + 1
          end
        end
      end)
    end
  end
  local best = corner_order[1]
  for _, name in ipairs(corner_order) do
    if (counts[name] or 0) < (counts[best] or 0) then best = name end
  end
  return best
end

local function draw_swatch(cr, layer, x, y)
  source(cr, layer.color, layer.alpha)
  if layer.kind == "line" then
    cairo.cairo_set_line_width(cr, layer.width)
    set_dash(cr, layer.dash, layer.width)
    segment(cr, x, y, x + SWATCH, y)
    cairo.cairo_stroke(cr)
    set_dash(cr, {}, 1)
    if layer.marker then draw_marker(cr, layer.marker, x + SWATCH / 2, y, layer.width + 4) end
  elseif layer.kind == "scatter" then
    draw_marker(cr, layer.marker, x + SWATCH / 2, y, max(layer.size, 5))
  else
    cairo.cairo_rectangle(cr, x + 3, y - 4, SWATCH - 6, 8)
    cairo.cairo_fill(cr)
  end
end

local function draw_legend(cr, legend, x, y)
  source(cr, {1, 1, 1}, 0.85)
  cairo.cairo_rectangle(cr, x, y, legend.width, legend.height)
  cairo.cairo_fill(cr)
  for i, layer in ipairs(legend.entries) do
    local left = x + 4 + floor((i - 1) / legend.per_column) * legend.column
    local middle = y + 4 + legend.line * ((i - 1) % legend.per_column + 0.5)
    draw_swatch(cr, layer, left, middle)
    draw_text(cr, layer.label, left + SWATCH + 6, middle, legend.size)
  end
end

-- Layout of axes ---------------------------------------------------------------------------------------------------

local LABEL_ANGLE = -40 * pi / 180

-- Ends of an axis, from limits given or from the data with a little air; reversed ends are kept.
local function axis_range(ax, name)
  local o, lo, hi, air, zero = ax.options, huge, -huge, false, false
  local log, limits = o[name .. "log"], o[name .. "lim"] or {}
  for _, layer in ipairs(ax.layers) do
    for _, values in ipairs(layer[name]) do lo, hi = widen(lo, hi, values, log) end
    air = air or not layer.tight
    zero = zero or name == "y" and layer.kind == "bars"
  end
  if zero and not log then lo, hi = min(lo, 0), max(hi, 0) end
  if log and lo > hi then lo, hi = 1, 10 end
  lo, hi = open_range(lo, hi)
  if air then
    local pad = (log and log10(hi / lo) or hi - lo) * 0.035
    local from, to = lo, hi
    lo, hi = log and lo / 10 ^ pad or lo - pad, log and hi * 10 ^ pad or hi + pad
    if zero and from == 0 then lo = 0 end
    if zero and to == 0 then hi = 0 end
  end
  if ax.reversed and name == "y" then lo, hi = hi, lo end
  return {lo = limits[1] or lo, hi = limits[2] or hi, log = log, labels = ax[name .. "labels"]}
end

-- Map from data to the page; NaN for what has no place. Far outside is cut to what cairo's fixed point holds.
local function mapper(axis, from, to)
  local lo, hi = axis.lo, axis.hi
  if axis.log then lo, hi = log10(lo), log10(hi) end
  return function(v)
    if axis.log then v = v > 0 and log10(v) or nan end
    local p = from + (v - lo) / (hi - lo) * (to - from)
    return finite(p) and min(max(p, -1e5), 1e5) or nan
  end
end

-- The ticks of an axis as {value, label, width}, at most `count` of them.
local function make_ticks(cr, axis, count, size)
  local out, lo, hi = {}, min(axis.lo, axis.hi), max(axis.lo, axis.hi)
  local values, step
  if axis.log then values, step = plot.log_ticks(lo, hi, count) else values, step = plot.ticks(lo, hi, count) end
  local magnitude = step and max(abs(lo), abs(hi))
  for _, v in ipairs(values) do
    local label = plot.format_number(v, step, magnitude):gsub("-", "−")
    out[#out + 1] = {value = v, label = label, width = text_width(cr, label, size)}
  end
  return out
end

-- Given labels, one at each whole number; every n-th only where they would touch even when turned.
local function label_ticks(cr, axis, spacing, size)
  local out = {}
  for i = 1, #axis.labels, max(1, ceil(size * 1.15 / spacing)) do
    out[#out + 1] = {value = i, label = axis.labels[i], width = text_width(cr, axis.labels[i], size)}
  end
  return out
end

local function x_ticks_fit(ticks, map, size)
  for i = 2, #ticks do
    local gap = abs(map(ticks[i].value) - map(ticks[i - 1].value))
    if gap < (ticks[i].width + ticks[i - 1].width) / 2 + size * 0.6 then return false end
  end
  return true
end

-- Ticks for an axis `length` points long. Second result: true when the labels of an x axis must be turned.
local function fit_ticks(cr, axis, length, name, size)
  local map = mapper(axis, 0, length)
  if axis.labels then
    local ticks = label_ticks(cr, axis, abs(map(2) - map(1)), size)
    return ticks, name == "x" and not x_ticks_fit(ticks, map, size)
  end
  local count = name == "x" and min(10, floor(length / 45)) or min(9, floor(length / (size * 2.6)))
  local ticks
  count = max(count, 4)                               -- fewer may find no round value in the range
  repeat
    ticks = make_ticks(cr, axis, count, size)
    count = count - 1
  until count < 3 or name == "y" or x_ticks_fit(ticks, map, size)
  return ticks, false
end

local function widest(ticks)
  local w = 0
  for _, tick in ipairs(ticks) do w = max(w, tick.width) end
  return w
end

-- Space that labels, titles, legend and colour bar need on each side of a plot area in a cell of w by h points.
local function measure_axes(ax, cr, w, h)
  local size, o = ax.figure.font, ax.options
  local m = {left = 50, right = 20, top = 20, bottom = 40}
  local xaxis, yaxis = axis_range(ax, "x"), axis_range(ax, "y")
  local legend = measure_legend(ax, cr, size * 0.9, h * 0.8)
  for _ = 1, 2 do                                     -- ticks depend on the space, the space on the ticks
    local width, height = max(w - m.left - m.right, 20), max(h - m.top - m.bottom, 20)
    local xticks, turned = fit_ticks(cr, xaxis, width, "x", size * 0.9)
    local map, over_left, over_right = mapper(xaxis, 0, width), 0, 0
    for _, tick in ipairs(xticks) do
      local at = map(tick.value)
      over_left = max(over_left, (turned and math.cos(LABEL_ANGLE) or 0.5) * tick.width - at)
      over_right = max(over_right, turned and 0 or at + tick.width / 2 - width)
    end
    local drop = turned and widest(xticks) * -math.sin(LABEL_ANGLE) + size * 0.6 or size * 0.9
    m.xlabel_at = 8 + drop + size * 0.7
    m.bottom = 8 + drop + (o.xlabel and size * 1.5 or 0) + 4
    m.left = 8 + widest(fit_ticks(cr, yaxis, height, "y", size * 0.9)) + (o.ylabel and size * 1.7 or 0) + 6
    m.left = max(m.left, over_left + (o.ylabel and size * 1.7 or 0) + 4)
    m.top = o.title and size * 2.1 or size * 0.8
    m.right = max(over_right, 4) + 8
    if ax.bar_layer then m.right = m.right + 24 + widest(make_ticks(cr, ax.bar_layer.bar_axis, 6, size * 0.9)) end
    if legend and legend_outside(ax, legend, w - m.left - m.right, h - m.top - m.bottom) then
      m.legend_at = m.right
      m.right = m.right + legend.width + 4
    end
  end
  return m
end

-- Drawing of axes ----------------------------------------------------------------------------------------------------

local function draw_grid(cr, view, xticks, yticks)
  source(cr, GRID)
  cairo.cairo_set_line_width(cr, 0.7)
  for _, tick in ipairs(xticks) do segment(cr, view.x(tick.value), view.top, view.x(tick.value), view.top + view.height) end
  for _, tick in ipairs(yticks) do segment(cr, view.left, view.y(tick.value), view.left + view.width, view.y(tick.value)) end
  cairo.cairo_stroke(cr)
end

-- Small marks at 2..9 of each decade, on a log axis of few enough decades to keep them apart.
local function draw_minor_ticks(axis, mark)
  local first, last = floor(log10(min(axis.lo, axis.hi))), ceil(log10(max(axis.lo, axis.hi)))
  if last - first > 8 then return end
  for e = first, last do
    for m = 2, 9 do
      local v = m * power10(e)
      if v >= min(axis.lo, axis.hi) and v <= max(axis.lo, axis.hi) then mark(v, 2) end
    end
  end
end

local function draw_frame(cr, ax, view, xticks, yticks, turned)
  local size, o = ax.figure.font * 0.9, ax.options
  local left, bottom = view.left, view.top + view.height
  source(cr, GRAY)
  cairo.cairo_set_line_width(cr, 0.8)
  segment(cr, left, view.top, left, bottom)
  segment(cr, left, bottom, left + view.width, bottom)
  local function mark_x(v, length) segment(cr, view.x(v), bottom, view.x(v), bottom + length) end
  local function mark_y(v, length) segment(cr, left - length, view.y(v), left, view.y(v)) end
  for _, tick in ipairs(xticks) do mark_x(tick.value, 3.5) end
  for _, tick in ipairs(yticks) do mark_y(tick.value, 3.5) end
  if view.xaxis.log then draw_minor_ticks(view.xaxis, mark_x) end
  if view.yaxis.log then draw_minor_ticks(view.yaxis, mark_y) end
  cairo.cairo_stroke(cr)
  for _, tick in ipairs(xticks) do
    draw_text(cr, tick.label, view.x(tick.value), bottom + 6 + size * 0.45, size,
      {align = turned and 1 or 0.5, angle = turned and LABEL_ANGLE})
  end
  for _, tick in ipairs(yticks) do draw_text(cr, tick.label, left - 6, view.y(tick.value), size, {align = 1}) end
  if o.xlabel then
    draw_text(cr, o.xlabel, left + view.width / 2, bottom + view.xlabel_at, ax.figure.font, {align = 0.5, fit = view.width})
  end
  if o.ylabel then
    draw_text(cr, o.ylabel, view.cell_left + ax.figure.font * 0.8, view.top + view.height / 2, ax.figure.font,
      {align = 0.5, angle = -pi / 2, fit = view.height})
  end
end

local function draw_color_bar(cr, layer, view, size)
  local axis, x, n = layer.bar_axis, view.left + view.width + 10, 128
  cairo.cairo_save(cr)
  cairo.cairo_set_antialias(cr, SHARP_EDGES)
  for i = 0, n - 1 do
    source(cr, {plot.colormap(layer.palette, i / (n - 1))})
    cairo.cairo_rectangle(cr, x, view.top + view.height * (1 - (i + 1) / n), 12, view.height / n)
    cairo.cairo_fill(cr)
  end
  cairo.cairo_restore(cr)
  local map = mapper(axis, view.top + view.height, view.top)
  for _, tick in ipairs((fit_ticks(cr, axis, view.height, "y", size))) do
    source(cr, GRAY)
    segment(cr, x + 12, map(tick.value), x + 15, map(tick.value))
    cairo.cairo_stroke(cr)
    draw_text(cr, tick.label, x + 18, map(tick.value), size)
  end
end

local function draw_layers(cr, ax, view, vector)
  for _, layer in ipairs(ax.layers) do
    cairo.cairo_save(cr)
    cairo.cairo_rectangle(cr, view.left - 1, view.top - 1, view.width + 2, view.height + 2)
    cairo.cairo_clip(cr)
    local draw = vector and (layer.marks or 0) > MAX_VECTOR_MARKS and draw_raster or kinds[layer.kind]
    cairo.cairo_new_path(cr)
    draw(layer, cr, view)
    cairo.cairo_restore(cr)
  end
end

local function draw_axes(cr, ax, cell, m, vector)
  local view = {left = cell.x + m.left, top = cell.y + m.top, cell_left = cell.x, xlabel_at = m.xlabel_at,
                width = max(cell.w - m.left - m.right, 10), height = max(cell.h - m.top - m.bottom, 10),
                xaxis = axis_range(ax, "x"), yaxis = axis_range(ax, "y")}
  view.x = mapper(view.xaxis, view.left, view.left + view.width)
  view.y = mapper(view.yaxis, view.top + view.height, view.top)
  local size, o = ax.figure.font, ax.options
  local xticks, turned = fit_ticks(cr, view.xaxis, view.width, "x", size * 0.9)
  local yticks = fit_ticks(cr, view.yaxis, view.height, "y", size * 0.9)
  local grid = o.grid == nil and not ax.bar_layer or o.grid
  if grid then draw_grid(cr, view, ax.xlabels and {} or xticks, yticks) end
  draw_layers(cr, ax, view, vector)
  draw_frame(cr, ax, view, xticks, yticks, turned)
  if o.title then
    draw_text(cr, o.title, view.left + view.width / 2, cell.y + size * 0.95, size * 1.1, {align = 0.5, bold = true, fit = cell.w - m.left})
  end
  if ax.bar_layer then draw_color_bar(cr, ax.bar_layer, view, size * 0.9) end
  local legend = measure_legend(ax, cr, size * 0.9, cell.h * 0.8)
  if not legend then return end
  if m.legend_at then return draw_legend(cr, legend, cell.x + cell.w - m.right + m.legend_at, view.top) end
  local function place(name)
    local f = corners[name]
    return view.left + 6 + f[1] * (view.width - legend.width - 12), view.top + 4 + f[2] * (view.height - legend.height - 8)
  end
  draw_legend(cr, legend, place(corners[o.legend] and o.legend or quietest_corner(ax, legend, view, place)))
end

local function draw_picture(cr, ax, cell)
  local o, size = ax.options, ax.figure.font
  local top, bottom = o.title and size * 2.1 or 4, o.xlabel and size * 2 or 4
  draw_image(cr, ax.picture, cell.x + 4, cell.y + top, cell.w - 8, cell.h - top - bottom)
  if o.title then draw_text(cr, o.title, cell.x + cell.w / 2, cell.y + size * 0.95, size * 1.1, {align = 0.5, bold = true, fit = cell.w - 8}) end
  if o.xlabel then draw_text(cr, o.xlabel, cell.x + cell.w / 2, cell.y + cell.h - size, size, {align = 0.5, fit = cell.w - 8}) end
end

-- Cells of one column share left and right margins, cells of one row top and bottom: plot areas line up.
local function draw_all_axes(fig, cr, width, height, vector)
  local pad, head = 8, fig.title and fig.font * 2.4 or 0
  if fig.title then draw_text(cr, fig.title, width / 2, pad + fig.font * 0.9, fig.font * 1.35, {align = 0.5, bold = true, fit = width - 2 * pad}) end
  local w, h = (width - 2 * pad) / fig.cols, (height - 2 * pad - head) / fig.rows
  local columns, rows, margins = {}, {}, {}
  for i, ax in pairs(fig.cells) do
    if not ax.picture then
      local m, r, c = measure_axes(ax, cr, w, h), floor((i - 1) / fig.cols), (i - 1) % fig.cols
      local column, row = columns[c] or {left = 0, right = 0}, rows[r] or {top = 0, bottom = 0}
      columns[c], rows[r], margins[i] = column, row, m
      column.left, column.right = max(column.left, m.left), max(column.right, m.right)
      row.top, row.bottom = max(row.top, m.top), max(row.bottom, m.bottom)
    end
  end
  for i, ax in pairs(fig.cells) do
    local r, c = floor((i - 1) / fig.cols), (i - 1) % fig.cols
    local cell = {x = pad + c * w, y = pad + head + r * h, w = w, h = h}
    if ax.picture then
      draw_picture(cr, ax, cell)
    else
      draw_axes(cr, ax, cell, {left = columns[c].left, right = columns[c].right, top = rows[r].top, bottom = rows[r].bottom,
        legend_at = margins[i].legend_at, xlabel_at = margins[i].xlabel_at}, vector)
    end
  end
end

-- Axes -------------------------------------------------------------------------------------------------------------

local Axes = {}
Axes.__index = Axes

-- Colour, dash and marker for the next series; `who` blames the caller of a method.
local function next_style(ax, options, who)
  local n, k = ax.series, #plot.colors
  local round = floor(n / k)
  local style = {
    color = check_color(options.color or n % k + 1, who, 4),
    label = options.label and tostring(options.label),
    dash = options.dash and check_array(options.dash, "dash", who, 4) or dashes[round % #dashes + 1],
    marker = options.marker and check_marker(options.marker, who, 4),
    round = round,
  }
  ax.series = n + 1
  return style
end

local function add_layer(ax, kind, layer)
  layer.kind = kind
  ax.layers[#ax.layers + 1] = layer
  return ax
end

-- What every drawing method checks first.
local function begin(ax, who, options, known)
  if ax.picture then error(who .. ": these axes hold a picture", 3) end
  local o = check_options(options, known, who, 4)     -- no tail call: it would drop a level
  return o
end

-- x (nil for 1..n) and y, checked.
local function check_points(x, y, who)
  y = check_array(y, "y", who, 4)
  if x == nil then
    x = {}
    for i = 1, #y do x[i] = i end
  end
  x = check_array(x, "x", who, 4)
  check_lengths(x, "x", y, "y", who, 4)
  return x, y
end

-- The range option, or the range of the data.
local function data_range(range, arrays, who)
  if range then
    local lo, hi = range[1], range[2]
    if not (type(lo) == "number" and type(hi) == "number" and lo < hi) then
      error(("%s: range is {lo, hi} with lo below hi, got {%s, %s}"):format(who, show(lo), show(hi)), 3)
    end
    return lo, hi
  end
  local lo, hi = huge, -huge
  for _, values in ipairs(arrays) do lo, hi = widen(lo, hi, values) end
  return open_range(lo, hi)
end

local function offset(values, by, sign)
  local out = {}
  for i, v in ipairs(values) do out[i] = v + sign * by[i] end
  return out
end

--- Draw a curve.
-- @param x array, or nil for 1..n
-- @param y array of the same length
-- @param[opt] options label; color; width in points (1.6); dash, array of lengths in line widths ({} is solid);
-- marker: circle, square, triangle, diamond, cross or plus; a shaded band, either band = {lo, hi} with two arrays or
-- sd = array for y - sd .. y + sd
-- @return the axes
function Axes:line(x, y, options)
  local who = "Axes:line"
  local o = begin(self, who, options, {label = "string", color = "any", width = "number", dash = "any", band = "table",
    sd = "any", marker = "string"})
  x, y = check_points(x, y, who)
  local band
  if o.sd then
    local sd = check_array(o.sd, "sd", who, 3)
    check_lengths(sd, "sd", y, "y", who, 3)
    band = {offset(y, sd, -1), offset(y, sd, 1)}
  elseif o.band then
    band = {check_array(o.band[1], "band[1]", who, 3), check_array(o.band[2], "band[2]", who, 3)}
    check_lengths(band[1], "band[1]", y, "y", who, 3)
    check_lengths(band[2], "band[2]", y, "y", who, 3)
  end
  local width = check_positive(o.width or 1.6, "width", who, 3)
  local layer = next_style(self, o, who)
  layer.x, layer.y, layer.band, layer.width, layer.ink = {x}, {y, band and band[1], band and band[2]}, band, width, line_ink
  return add_layer(self, "line", layer)
end

--- Draw points.
-- @param x array, or nil for 1..n
-- @param y array of the same length
-- @param[opt] options label; color; marker as for line; size, diameter in points (5); alpha 0..1 (0.8)
-- @return the axes
function Axes:scatter(x, y, options)
  local who = "Axes:scatter"
  local o = begin(self, who, options, {label = "string", color = "any", marker = "string", size = "number", alpha = "number"})
  x, y = check_points(x, y, who)
  local size = check_positive(o.size or 5, "size", who, 3)
  local layer = next_style(self, o, who)
  layer.x, layer.y, layer.ink, layer.marks, layer.size, layer.alpha = {x}, {y}, scatter_ink, #x, size, o.alpha or 0.8
  layer.marker = layer.marker or marker_names[layer.round % #marker_names + 1]
  return add_layer(self, "scatter", layer)
end

--- Draw a histogram.
-- @param values array; NaN and infinite ones are left out
-- @param[opt] options label; color; alpha (0.75); bins, their number (10 to 60 by the amount of data);
-- range = {lo, hi}, default all values
-- @return the axes
function Axes:hist(values, options)
  local who = "Axes:hist"
  local o = begin(self, who, options, {label = "string", color = "any", alpha = "number", bins = "number", range = "table"})
  values = check_array(values, "values", who, 3)
  local bins = check_whole(o.bins or min(max(ceil(math.sqrt(#values)), 10), 60), "bins", who, 3)
  local lo, hi = data_range(o.range, {values}, who)
  local left, right, counts = {}, {}, {}
  for i = 1, bins do
    left[i], right[i], counts[i] = lo + (hi - lo) * (i - 1) / bins, lo + (hi - lo) * i / bins, 0
  end
  for _, v in ipairs(values) do
    if v >= lo and v <= hi then
      local i = min(floor((v - lo) / (hi - lo) * bins) + 1, bins)
      counts[i] = counts[i] + 1
    end
  end
  local layer = next_style(self, o, who)
  layer.x, layer.y, layer.ink, layer.alpha = {left, right}, {counts}, bar_ink, o.alpha or 0.75
  return add_layer(self, "bars", layer)
end

-- Bars of several calls stand side by side in their group, which is 0.8 wide.
local function place_bars(ax)
  for k, layer in ipairs(ax.bar_layers) do
    local width = 0.8 / #ax.bar_layers
    layer.x = {{}, {}}
    for i = 1, #layer.y[1] do
      layer.x[1][i] = i - 0.4 + (k - 1) * width
      layer.x[2][i] = i - 0.4 + k * width
    end
  end
end

--- Draw bars, one per label. Calling it again with the same labels puts the new bars beside the old ones.
-- @param labels array of strings
-- @param values array of the same length
-- @param[opt] options label (for the legend); color; alpha (1); errors, array of half lengths of the error bars
-- @return the axes
function Axes:bar(labels, values, options)
  local who = "Axes:bar"
  local o = begin(self, who, options, {label = "string", color = "any", alpha = "number", errors = "any"})
  labels = check_labels(labels, "labels", who)
  values = check_array(values, "values", who, 3)
  check_lengths(labels, "labels", values, "values", who, 3)
  if self.xlabels then check_lengths(self.xlabels, "the first bar's labels", values, "values", who, 3) end
  local errors = o.errors and check_array(o.errors, "errors", who, 3)
  if errors then check_lengths(errors, "errors", values, "values", who, 3) end
  local layer = next_style(self, o, who)
  layer.y = {values, errors and offset(values, errors, -1), errors and offset(values, errors, 1)}
  layer.ink, layer.alpha = bar_ink, o.alpha
  self.xlabels = self.xlabels or labels
  self.bar_layers[#self.bar_layers + 1] = layer
  place_bars(self)
  return add_layer(self, "bars", layer)
end

--- Draw a matrix as colours, with a colour bar; row 1 is at the top. NaN cells stay white.
-- @param rows array of arrays of one length (or an object with totable)
-- @param[opt] options palette (see plot.colormap; "viridis"); range = {lo, hi} of the colours, default the data's;
-- row_labels, col_labels, arrays of strings; extent = {x0, x1, y0, y1}: where the matrix lies on the axes, with row 1 at y0
-- and y upwards
-- @return the axes
function Axes:heatmap(rows, options)
  local who = "Axes:heatmap"
  local o = begin(self, who, options, {palette = "string", range = "table", row_labels = "table", col_labels = "table", extent = "table"})
  if o.palette and not palettes[o.palette] then
    error(("%s: no palette %q; there are %s"):format(who, o.palette, sorted_keys(palettes)), 2)
  end
  local source_rows, copy = plain(rows), {}
  if type(source_rows) ~= "table" or #source_rows == 0 then error(("%s: rows is an array of arrays, got %s"):format(who, show(rows)), 2) end
  for r, row in ipairs(source_rows) do
    copy[r] = check_array(row, ("rows[%d]"):format(r), who, 3)
    check_lengths(copy[1], "rows[1]", copy[r], ("rows[%d]"):format(r), who, 3)
  end
  if o.row_labels then check_lengths(o.row_labels, "row_labels", copy, "rows", who, 3) end
  if o.col_labels then check_lengths(o.col_labels, "col_labels", copy[1], "rows[1]", who, 3) end
  local lo, hi = data_range(o.range, copy, who)
  local e = check_array(o.extent or {0.5, #copy[1] + 0.5, 0.5, #copy + 0.5}, "extent", who, 3)
  if #e ~= 4 then error(("%s: extent is {x0, x1, y0, y1}, got %d values"):format(who, #e), 2) end
  self.reversed = not o.extent
  self.xlabels = o.col_labels and check_labels(o.col_labels, "col_labels", who)
  self.ylabels = o.row_labels and check_labels(o.row_labels, "row_labels", who)
  self.bar_layer = {rows = copy, range = {lo, hi}, palette = o.palette or "viridis", extent = e, tight = true,
    x = {{e[1], e[2]}}, y = {{e[3], e[4]}}, marks = #copy * #copy[1], bar_axis = {lo = lo, hi = hi}}
  return add_layer(self, "heatmap", self.bar_layer)
end

--- Show one picture instead of a plot, as large as fits, aspect kept, without frame; title and xlabel still show.
-- @param img picture, see the top of this file
-- @return the axes
function Axes:image(img)
  if #self.layers > 0 then error("Axes:image: these axes hold data already", 2) end
  self.picture = check_image(img, "Axes:image", 3)
  return self
end

--- Set texts and scales. May be called again; what is not named stays.
-- @param options title, xlabel, ylabel: strings; xlog, ylog: booleans; xlim, ylim: {lo, hi}, either may be nil, hi < lo turns
-- the axis round; legend: "auto" (the emptiest corner; right of the plot when large or over six entries), "right", "none",
-- "upper right", "upper left", "lower right" or "lower left"; grid: boolean
-- @return the axes
function Axes:set(options)
  local who = "Axes:set"
  local o = check_options(options, {title = "string", xlabel = "string", ylabel = "string", xlog = "boolean", ylog = "boolean",
    xlim = "table", ylim = "table", legend = "string", grid = "boolean"}, who, 3)
  local known = {auto = true, right = true, none = true}
  if o.legend and not (known[o.legend] or corners[o.legend]) then
    error(("%s: no legend place %q; there are auto, none, right, %s"):format(who, o.legend, sorted_keys(corners)), 2)
  end
  local new = setmetatable({}, {__index = self.options})
  for key, value in pairs(o) do new[key] = value end
  for _, name in ipairs {"x", "y"} do
    local limits = new[name .. "lim"] or {}
    for i = 1, 2 do
      local v = limits[i]
      if v ~= nil and not (type(v) == "number" and finite(v) and (v > 0 or not new[name .. "log"])) then
        error(("%s: %slim[%d] is a %snumber, got %s"):format(who, name, i, new[name .. "log"] and "positive " or "", show(v)), 2)
      end
    end
    if limits[1] and limits[1] == limits[2] then error(("%s: %slim has no width, both ends are %g"):format(who, name, limits[1]), 2) end
  end
  for key, value in pairs(o) do self.options[key] = type(value) == "number" and tostring(value) or value end
  return self
end

-- Figures ------------------------------------------------------------------------------------------------------------

local Figure = {}
Figure.__index = Figure

--- A new figure of rows by cols axes.
-- @param[opt] options width (640), height (400): of the whole, in points; rows (1), cols (1); title; scale: PNG pixels to the
-- point (2); font: size of labels in points (11)
-- @return the figure
function plot.figure(options)
  local who = "plot.figure"
  local o = check_options(options, {width = "number", height = "number", rows = "number", cols = "number", title = "string",
    scale = "number", font = "number"}, who, 3)
  return setmetatable({
    width = check_positive(o.width or 640, "width", who, 3), height = check_positive(o.height or 400, "height", who, 3),
    rows = check_whole(o.rows or 1, "rows", who, 3), cols = check_whole(o.cols or 1, "cols", who, 3),
    scale = check_positive(o.scale or 2, "scale", who, 3), font = check_positive(o.font or 11, "font", who, 3),
    title = o.title and tostring(o.title), cells = {}, draw = draw_all_axes,
  }, Figure)
end

--- The axes at a place of the figure, made when first asked for.
-- @param row row from 1, or with one argument the place counted row by row
-- @param[opt] col column from 1
-- @return Axes
function Figure:axes(row, col)
  if not self.cells then error("Figure:axes: an image grid has no axes", 2) end
  check_whole(row, "row", "Figure:axes", 3)
  if col then check_whole(col, "col", "Figure:axes", 3) end
  local index = col and (row - 1) * self.cols + col or row
  if index > self.rows * self.cols or col and col > self.cols then
    error(("Figure:axes: no axes at %d%s in %d row(s) of %d"):format(row, col and ", " .. col or "", self.rows, self.cols), 2)
  end
  self.cells[index] = self.cells[index] or setmetatable({figure = self, layers = {}, bar_layers = {}, options = {}, series = 0}, Axes)
  return self.cells[index]
end

-- Image grids --------------------------------------------------------------------------------------------------------

-- Measure a grid: its size and where the cells begin.
local function measure_grid(fig, cr)
  local size, left, top, columns = fig.font, 0, 0, 0
  for _, label in ipairs(fig.row_labels) do left = max(left, text_width(cr, label, size) + 10) end
  for _, row in ipairs(fig.images) do columns = max(columns, #row) end
  local turned, over = false, 0
  for _, label in ipairs(fig.col_labels) do turned = turned or text_width(cr, label, size) > fig.cell_width + fig.gap - 4 end
  for i, label in ipairs(fig.col_labels) do
    local w = text_width(cr, label, size)
    top = max(top, turned and -math.sin(LABEL_ANGLE) * w + size * 1.6 or size * 1.7)
    if turned then over = max(over, math.cos(LABEL_ANGLE) * w - (columns - i + 0.5) * (fig.cell_width + fig.gap)) end
  end
  local pad = 8
  fig.turned, fig.left, fig.top = turned, pad + left, pad + top + (fig.title and size * 2.2 or 0)
  fig.width = fig.left + columns * (fig.cell_width + fig.gap) - fig.gap + pad + over
  fig.height = fig.top + #fig.images * (fig.cell_height + fig.gap) - fig.gap + pad
end

local function draw_grid_figure(fig, cr, width)
  local size, w, h = fig.font, fig.cell_width, fig.cell_height
  if fig.title then draw_text(cr, fig.title, width / 2, 8 + size * 0.7, size * 1.25, {align = 0.5, bold = true, fit = width - 16}) end
  for c, label in ipairs(fig.col_labels) do
    local style = fig.turned and {angle = LABEL_ANGLE} or {align = 0.5}
    draw_text(cr, label, fig.left + (c - 1) * (w + fig.gap) + w / 2, fig.top - size * 0.8, size, style)
  end
  for r, row in ipairs(fig.images) do
    local y = fig.top + (r - 1) * (h + fig.gap)
    if fig.row_labels[r] then draw_text(cr, fig.row_labels[r], fig.left - 8, y + h / 2, size, {align = 1}) end
    for c, img in ipairs(row) do
      if img then draw_image(cr, img, fig.left + (c - 1) * (w + fig.gap), y, w, h) end
    end
  end
end

--- A figure of pictures in rows and columns, as large as it needs to be.
-- @param rows array of arrays of pictures; false leaves a cell empty, rows may differ in length
-- @param[opt] options row_labels, col_labels: arrays of strings; cell: longer side of a picture's place in points (96); gap
-- between them (4); title; scale: PNG pixels to the point (2); font: size of labels in points (11)
-- @return the figure, to save
function plot.image_grid(rows, options)
  local who = "plot.image_grid"
  local o = check_options(options, {row_labels = "table", col_labels = "table", cell = "number", gap = "number", title = "string",
    scale = "number", font = "number"}, who, 3)
  if type(rows) ~= "table" or #rows == 0 then error(("%s: rows is an array of arrays of images, got %s"):format(who, show(rows)), 2) end
  local cell, images, wide, high = check_positive(o.cell or 96, "cell", who, 3), {}, 0, 0
  for r, row in ipairs(rows) do
    images[r] = {}
    for c = 1, #row do
      local img = row[c] and check_image(row[c], ("%s: rows[%d][%d]"):format(who, r, c), 3)
      images[r][c] = img
      if img then
        local scale = cell / max(img.width, img.height)
        wide, high = max(wide, img.width * scale), max(high, img.height * scale)
      end
    end
  end
  if wide == 0 then wide, high = cell, cell end
  return setmetatable({
    images = images, cell_width = wide, cell_height = high, gap = o.gap or 4, title = o.title and tostring(o.title),
    row_labels = check_labels(o.row_labels or {}, "row_labels", who), col_labels = check_labels(o.col_labels or {}, "col_labels", who),
    scale = check_positive(o.scale or 2, "scale", who, 3), font = check_positive(o.font or 11, "font", who, 3),
    measure = measure_grid, draw = draw_grid_figure,
  }, Figure)
end

-- Output -------------------------------------------------------------------------------------------------------------

-- Draw with a new context on a surface; raises what the drawing raised or what cairo says of it.
local function draw_on(surface, draw)
  local cr, options = cairo.cairo_create(surface), cairo.cairo_font_options_create()
  cairo.cairo_font_options_set_hint_style(options, 1)
  cairo.cairo_font_options_set_hint_metrics(options, 1)      -- both off: text is as wide in a PNG as in a PDF
  cairo.cairo_set_font_options(cr, options)
  cairo.cairo_font_options_destroy(options)
  local ok, why = pcall(draw, cr)
  local status = cairo.cairo_status(cr)
  cairo.cairo_destroy(cr)
  if not ok then error(why, 0) end
  if status ~= 0 then error("cairo: " .. ffi.string(cairo.cairo_status_to_string(status)), 0) end
end

local formats = {
  png = function(fig) return cairo.cairo_image_surface_create(RGB24, ceil(fig.width * fig.scale), ceil(fig.height * fig.scale)) end,
  svg = function(fig, path) return cairo.cairo_svg_surface_create(path, fig.width, fig.height) end,
  pdf = function(fig, path) return cairo.cairo_pdf_surface_create(path, fig.width, fig.height) end,
}

-- Draw the figure into a file; raises a text without a position.
local function write_figure(fig, format, path)
  load_cairo()
  if fig.measure then
    local scratch = ffi.gc(cairo.cairo_image_surface_create(RGB24, 1, 1), cairo.cairo_surface_destroy)
    draw_on(scratch, function(cr) fig:measure(cr) end)
  end
  local surface = formats[format](fig, path)
  local ok, why = pcall(draw_on, surface, function(cr)
    if format == "png" then cairo.cairo_scale(cr, fig.scale, fig.scale) end
    cairo.cairo_set_source_rgba(cr, 1, 1, 1, 1)
    cairo.cairo_paint(cr)
    fig:draw(cr, fig.width, fig.height, format ~= "png")
  end)
  local status = 0
  if ok and format == "png" then status = cairo.cairo_surface_write_to_png(surface, path) end
  cairo.cairo_surface_finish(surface)
  if status == 0 then status = cairo.cairo_surface_status(surface) end
  cairo.cairo_surface_destroy(surface)
  if not ok then error(why, 0) end
  if status ~= 0 then error("cairo: " .. ffi.string(cairo.cairo_status_to_string(status)), 0) end
end

--- Save the figure. The file appears whole or not at all: it is written under another name beside it and renamed.
-- @param path file name ending in .png, .svg or .pdf
-- @return the figure
function Figure:save(path)
  local format = type(path) == "string" and (path:match "%.(%w+)$" or ""):lower()
  if not formats[format] then error(("Figure:save: the file name ends in .png, .svg or .pdf, got %s"):format(show(path)), 2) end
  local temporary = ("%s.%d.tmp"):format(path, ffi.C.getpid())
  local file, reason = io.open(temporary, "wb")
  if not file then error(("Figure:save: cannot write %s: %s"):format(path, reason:sub(#temporary + 3)), 2) end
  file:close()
  local ok, why = pcall(write_figure, self, format, temporary)
  if ok then
    ok, why = os.rename(temporary, path)
    why = why and why:gsub("^.*: ", "")
  end
  if not ok then
    os.remove(temporary)
    error(("Figure:save: cannot write %s: %s"):format(path, why), 2)
  end
  return self
end

--- The figure as a PNG in memory.
-- @return string, the bytes of the file
function Figure:png()
  local path = os.tmpname()
  local ok, why = pcall(write_figure, self, "png", path)
  local file = ok and io.open(path, "rb")
  local bytes = file and file:read "*a"
  if file then file:close() end
  os.remove(path)
  if not bytes then error("Figure:png: " .. tostring(why), 2) end
  return bytes
end

return plot
