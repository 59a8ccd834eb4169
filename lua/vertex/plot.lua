--- Figures for papers and notebooks: lines, points, bars, histograms, heat maps, pictures.
--
-- Drawn with libcairo through LuaJIT's FFI; the module loads without cairo and asks for it when a figure is first drawn.
-- A figure records what it is told and draws it when saved, so one figure can be saved to several formats.
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
--
-- This file holds figures and the canvas, which is all that knows cairo. plot/axes.lua records what is to be drawn (and documents
-- line, scatter, text, hist, bar, heatmap, image, set), plot/grid.lua is the figure of pictures; plot/page.lua draws a figure of axes
-- with plot/layout.lua, plot/legend.lua, plot/scales.lua and plot/marks.lua; plot/colors.lua and plot/check.lua serve them all.
-- @module vertex.plot

local ffi = require "ffi"
local core = require "vertex.core"
local Axes = require "vertex.plot.axes"
local check = require "vertex.plot.check"
local colors = require "vertex.plot.colors"
local grid = require "vertex.plot.grid"
local page = require "vertex.plot.page"
local scales = require "vertex.plot.scales"
local floor, ceil, min, max = math.floor, math.ceil, math.min, math.max
local fail = core.fail

local plot = {
  colors = colors.series, colormap = colors.map,
  format_number = scales.format_number, ticks = scales.ticks, log_ticks = scales.log_ticks,
}

-- Cairo --------------------------------------------------------------------------------------------------------------

-- Only what is used. Handles are void *, enums int and structs arrays: no types are defined, so loading twice is harmless.
ffi.cdef [[
void *dlopen(const char *name, int flags);
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

-- Pixels to the point in a picture that stands for many marks in SVG and PDF: 3 is 216 dpi.
local RASTER_SCALE = 3

local RTLD_NOW_NODELETE = 0x1002
local cairo     -- the library, once a figure has been drawn

local function load_cairo()
  if cairo then return end
  local ok, lib = pcall(ffi.load, "libcairo.so.2")
  if ok then ffi.C.dlopen("libcairo.so.2", RTLD_NOW_NODELETE) end -- closing the Lua state must not unmap the caches of its font library
  if not ok then error("plot: drawing needs libcairo.so.2, Debian package libcairo2 (" .. tostring(lib) .. ")", 0) end
  cairo = lib
end

local function check_status(status, what)
  if status ~= 0 then error((what or "cairo") .. ": " .. ffi.string(cairo.cairo_status_to_string(status)), 0) end
end

local function new_image_surface(format, w, h)
  return ffi.gc(cairo.cairo_image_surface_create(format, w, h), cairo.cairo_surface_destroy)
end

-- Canvas -------------------------------------------------------------------------------------------------------------
-- A place to draw on. Positions and sizes are points from its upper left corner. What fills, strokes or writes leaves no path.

local Canvas = {}
Canvas.__index = Canvas

-- Call draw(canvas) with a canvas on a surface; raises what the drawing raised or what cairo says of it. vector: whether the
-- surface keeps shapes rather than pixels.
local function draw_on(surface, vector, draw)
  local cr, options = cairo.cairo_create(surface), cairo.cairo_font_options_create()
  cairo.cairo_font_options_set_hint_style(options, 1)
  cairo.cairo_font_options_set_hint_metrics(options, 1)      -- both off: text is as wide in a PNG as in a PDF
  cairo.cairo_set_font_options(cr, options)
  cairo.cairo_font_options_destroy(options)
  local ok, why = pcall(draw, setmetatable({cr = cr, vector = vector}, Canvas))
  local status = cairo.cairo_status(cr)
  cairo.cairo_destroy(cr)
  if not ok then error(why, 0) end
  check_status(status)
end

function Canvas:save() cairo.cairo_save(self.cr) end
function Canvas:restore() cairo.cairo_restore(self.cr) end
function Canvas:sharp_edges() cairo.cairo_set_antialias(self.cr, SHARP_EDGES) end
function Canvas:round_joins() cairo.cairo_set_line_join(self.cr, ROUND_JOIN) end
function Canvas:color(color, alpha) cairo.cairo_set_source_rgba(self.cr, color[1], color[2], color[3], alpha or 1) end

function Canvas:clip(x, y, w, h)
  cairo.cairo_rectangle(self.cr, x, y, w, h)
  cairo.cairo_clip(self.cr)
end

--- Width of strokes, and their dash as an array of lengths in widths; solid without.
function Canvas:pen(width, dash)
  local n = dash and #dash or 0
  local lengths = ffi.new("double[?]", max(n, 1))
  for i = 1, n do lengths[i - 1] = dash[i] * width end
  cairo.cairo_set_line_width(self.cr, width)
  cairo.cairo_set_dash(self.cr, lengths, n, 0)
end

function Canvas:line_to(x, y) cairo.cairo_line_to(self.cr, x, y) end

function Canvas:segment(x0, y0, x1, y1)
  cairo.cairo_move_to(self.cr, x0, y0)
  cairo.cairo_line_to(self.cr, x1, y1)
end

function Canvas:stroke() cairo.cairo_stroke(self.cr) end

--- Fill the path, which is closed first.
function Canvas:fill()
  cairo.cairo_close_path(self.cr)
  cairo.cairo_fill(self.cr)
end

function Canvas:box(x, y, w, h)
  cairo.cairo_rectangle(self.cr, x, y, w, h)
  cairo.cairo_fill(self.cr)
end

function Canvas:disc(x, y, r)
  cairo.cairo_arc(self.cr, x, y, r, 0, 2 * math.pi)
  cairo.cairo_fill(self.cr)
end

--- Width of a text in points.
function Canvas:text_width(text, size, bold)
  local extents = ffi.new "double[6]"                 -- cairo_text_extents_t: x and y bearing, width, height, x and y advance
  cairo.cairo_select_font_face(self.cr, "DejaVu Sans", 0, bold and 1 or 0)
  cairo.cairo_set_font_size(self.cr, size)
  cairo.cairo_text_extents(self.cr, text, extents)
  return extents[4]
end

--- Write a text around (x, y): align 0 starts there, 0.5 centres, 1 ends; vertically the middle of a capital is at y.
-- style: {align=, bold=, angle=, fit=, color=}; a text wider than fit is drawn smaller.
function Canvas:text(text, x, y, size, style)
  style = style or {}
  local cr, width = self.cr, self:text_width(text, size, style.bold)
  if style.fit and width > style.fit then
    size = size * style.fit / width
    width = self:text_width(text, size, style.bold)
  end
  self:save()
  cairo.cairo_translate(cr, x, y)
  if style.angle then cairo.cairo_rotate(cr, style.angle) end
  self:color(style.color or colors.ink)
  cairo.cairo_move_to(cr, -width * (style.align or 0), size * 0.365)     -- half of DejaVu's capital height
  cairo.cairo_show_text(cr, text)
  cairo.cairo_new_path(cr)
  self:restore()
end

-- The 8-bit values of a picture.
local function image_values(img)
  if img.dtype == "u8" then return ffi.cast("const uint8_t *", img.bytes) end
  local count, from = img.width * img.height * 3, ffi.cast("const float *", img.bytes)
  local to = ffi.new("uint8_t[?]", count)
  for i = 0, count - 1 do
    local v = from[i]
    to[i] = v >= 1 and 255 or v > 0 and floor(v * 255 + 0.5) or 0     -- NaN fails both: black
  end
  return to
end

-- A picture as a cairo surface, each pixel repeated `zoom` times both ways.
local function image_surface(img, zoom)
  local w, h, from = img.width, img.height, image_values(img)
  local surface = new_image_surface(RGB24, w * zoom, h * zoom)
  check_status(cairo.cairo_surface_status(surface), ("plot: a %dx%d image"):format(w, h))
  cairo.cairo_surface_flush(surface)
  local stride, to = cairo.cairo_image_surface_get_stride(surface), cairo.cairo_image_surface_get_data(surface)
  for y = 0, h * zoom - 1 do
    local row, out = floor(y / zoom) * w * 3, to + y * stride
    for x = 0, w * zoom - 1 do
      local p = row + floor(x / zoom) * 3
      out[4 * x], out[4 * x + 1], out[4 * x + 2], out[4 * x + 3] = from[p + 2], from[p + 1], from[p], 255
    end
  end
  cairo.cairo_surface_mark_dirty(surface)
  return surface
end

-- Paint a surface at (x, y), scaled, and free it.
local function paint(cr, surface, x, y, scale, filter)
  cairo.cairo_save(cr)
  cairo.cairo_translate(cr, x, y)
  cairo.cairo_scale(cr, scale, scale)
  cairo.cairo_set_source_surface(cr, surface, 0, 0)
  cairo.cairo_pattern_set_filter(cairo.cairo_get_source(cr), filter)
  cairo.cairo_paint(cr)
  cairo.cairo_restore(cr)
  cairo.cairo_surface_destroy(ffi.gc(surface, nil))
end

--- Draw a picture as large as fits the box, in its middle. Tiny ones are enlarged here, since viewers of SVG and PDF blur.
function Canvas:image(img, x, y, w, h)
  local scale = min(w / img.width, h / img.height)
  local zoom = scale >= 1.5 and ceil(scale) or 1
  local left, top = x + (w - img.width * scale) / 2, y + (h - img.height * scale) / 2
  paint(self.cr, image_surface(img, zoom), left, top, scale / zoom, zoom > 1 and NEAREST or GOOD)
end

--- Put what draw(canvas) draws within the box here as one picture.
function Canvas:raster(x, y, w, h, draw)
  local surface = new_image_surface(ARGB32, ceil(w * RASTER_SCALE), ceil(h * RASTER_SCALE))
  draw_on(surface, false, function(inner)
    cairo.cairo_scale(inner.cr, RASTER_SCALE, RASTER_SCALE)
    cairo.cairo_translate(inner.cr, -x, -y)
    draw(inner)
  end)
  paint(self.cr, surface, x, y, 1 / RASTER_SCALE, GOOD)
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
  local o = check.options(options, {width = "number", height = "number", rows = "number", cols = "number", title = "string",
    scale = "number", font = "number"}, who)
  return setmetatable({
    width = check.positive(o.width or 640, "width", who), height = check.positive(o.height or 400, "height", who),
    rows = check.whole(o.rows or 1, "rows", who), cols = check.whole(o.cols or 1, "cols", who),
    scale = check.positive(o.scale or 2, "scale", who), font = check.positive(o.font or 11, "font", who),
    title = o.title, cells = {}, draw = page.draw,
  }, Figure)
end

--- A figure of pictures in rows and columns, as large as it needs to be.
-- @param rows array of arrays of pictures; false leaves a cell empty, rows may differ in length
-- @param[opt] options row_labels, col_labels: arrays of strings; cell: longer side of a picture's place in points (96); gap
-- between them (4); title; scale: PNG pixels to the point (2); font: size of labels in points (11)
-- @return the figure, to save
function plot.image_grid(rows, options) return setmetatable(grid.new(rows, options), Figure) end

--- The axes at a place of the figure, made when first asked for.
-- @param row row from 1, or with one argument the place counted row by row
-- @param[opt] col column from 1
-- @return Axes
function Figure:axes(row, col)
  if not self.cells then fail "Figure:axes: an image grid has no axes" end
  check.whole(row, "row", "Figure:axes")
  if col then check.whole(col, "col", "Figure:axes") end
  local index = col and (row - 1) * self.cols + col or row
  if index > self.rows * self.cols or col and col > self.cols then
    fail("Figure:axes: no axes at %d%s in %d row(s) of %d", row, col and ", " .. col or "", self.rows, self.cols)
  end
  self.cells[index] = self.cells[index] or Axes.new(self)
  return self.cells[index]
end

-- Output -------------------------------------------------------------------------------------------------------------

local formats = {
  png = function(fig) return cairo.cairo_image_surface_create(RGB24, ceil(fig.width * fig.scale), ceil(fig.height * fig.scale)) end,
  svg = function(fig, path) return cairo.cairo_svg_surface_create(path, fig.width, fig.height) end,
  pdf = function(fig, path) return cairo.cairo_pdf_surface_create(path, fig.width, fig.height) end,
}

-- Draw the figure into a file; raises a text without a position.
local function draw_file(fig, format, path)
  load_cairo()
  if fig.measure then draw_on(new_image_surface(RGB24, 1, 1), false, function(canvas) fig:measure(canvas) end) end
  local surface = formats[format](fig, path)
  local ok, why = pcall(draw_on, surface, format ~= "png", function(canvas)
    if format == "png" then cairo.cairo_scale(canvas.cr, fig.scale, fig.scale) end
    canvas:color(colors.white)
    cairo.cairo_paint(canvas.cr)
    fig:draw(canvas)
  end)
  local status = 0
  if ok and format == "png" then status = cairo.cairo_surface_write_to_png(surface, path) end
  cairo.cairo_surface_finish(surface)
  if status == 0 then status = cairo.cairo_surface_status(surface) end
  cairo.cairo_surface_destroy(surface)
  if not ok then error(why, 0) end
  check_status(status)
end

-- The bytes of the figure's file, or nil and why not. Cairo writes files only, unless C calls back into Lua.
local function render(fig, format)
  local path = os.tmpname()
  local ok, why = pcall(draw_file, fig, format, path)
  local file, bytes
  if ok then file, why = io.open(path, "rb") end
  if file then
    bytes, why = file:read "*a"
    file:close()
  end
  os.remove(path)
  return bytes, why
end

--- Save the figure. The file appears whole or not at all.
-- @param path file name ending in .png, .svg or .pdf
-- @return the figure
function Figure:save(path)
  local format = type(path) == "string" and (path:match "%.(%w+)$" or ""):lower()
  if not formats[format] then fail("Figure:save: the file name ends in .png, .svg or .pdf, got %s", check.show(path)) end
  local bytes, why = render(self, format)
  if not bytes then fail("Figure:save: cannot write %s: %s", path, why) end
  core.write_file(path, bytes)
  return self
end

--- The figure as a PNG in memory.
-- @return string, the bytes of the file
function Figure:png()
  local bytes, why = render(self, "png")
  if not bytes then fail("Figure:png: %s", why) end
  return bytes
end

return plot
