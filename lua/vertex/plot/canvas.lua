--- plot/canvas.lua: the canvas that figures are drawn on. Only this file knows libcairo: it calls it through LuaJIT's
-- FFI, and loads it when a figure is first drawn.

local ffi = require "ffi"
local colors = require "vertex.plot.colors"
local floor, ceil, min, max = math.floor, math.ceil, math.min, math.max

-- -- Cairo ------------------------------------------------------------------------------------------------------------

-- Only what is used. Handles are void *, enums int and structs arrays: no types are defined, so loading twice is
-- harmless.
ffi.cdef [[
void *dlopen(const char *name, int flags);
void *cairo_image_surface_create(int format, int width, int height);
void *cairo_svg_surface_create(const char *path, double width, double height);
void *cairo_pdf_surface_create(const char *path, double width, double height);
unsigned char *cairo_image_surface_get_data(void *surface); int cairo_image_surface_get_stride(void *surface);
int cairo_surface_write_to_png(void *surface, const char *path);
void cairo_surface_flush(void *surface); void cairo_surface_mark_dirty(void *surface);
void cairo_surface_finish(void *surface); void cairo_surface_destroy(void *surface);
int cairo_surface_status(void *surface); const char *cairo_status_to_string(int status);
void *cairo_create(void *surface); int cairo_status(void *cr); void cairo_destroy(void *cr);
void cairo_save(void *cr); void cairo_restore(void *cr);
void cairo_translate(void *cr, double x, double y); void cairo_scale(void *cr, double x, double y);
void cairo_rotate(void *cr, double radians);
void cairo_set_source_rgba(void *cr, double r, double g, double b, double a);
void cairo_set_source_surface(void *cr, void *surface, double x, double y); void *cairo_get_source(void *cr);
void cairo_pattern_set_filter(void *pattern, int filter); void cairo_set_antialias(void *cr, int mode);
void cairo_set_line_width(void *cr, double width); void cairo_set_line_join(void *cr, int join);
void cairo_set_dash(void *cr, const double *dashes, int count, double offset);
void cairo_move_to(void *cr, double x, double y); void cairo_line_to(void *cr, double x, double y);
void cairo_arc(void *cr, double x, double y, double radius, double from, double to);
void cairo_rectangle(void *cr, double x, double y, double width, double height);
void cairo_new_path(void *cr); void cairo_close_path(void *cr);
void cairo_stroke(void *cr); void cairo_fill(void *cr); void cairo_paint(void *cr); void cairo_clip(void *cr);
void cairo_select_font_face(void *cr, const char *family, int slant, int weight);
void cairo_set_font_size(void *cr, double size);
void cairo_text_extents(void *cr, const char *text, double extents[6]);
void cairo_show_text(void *cr, const char *text);
void *cairo_font_options_create(void); void cairo_font_options_set_hint_style(void *options, int style);
void cairo_font_options_set_hint_metrics(void *options, int metrics); void cairo_font_options_destroy(void *options);
void cairo_set_font_options(void *cr, void *options);
]]

local ARGB32, RGB24, NEAREST, GOOD, SHARP_EDGES, ROUND_JOIN = 0, 1, 3, 1, 1, 1

-- Pixels to the point in a picture that stands for many marks in SVG and PDF: 3 is 216 dpi.
local RASTER_SCALE = 3

local RTLD_NOW_NODELETE = 0x1002
local cairo     -- the library, once a figure has been drawn

-- Opens the library when something is first drawn.
local function load()
  if cairo then return end
  local ok, lib = pcall(ffi.load, "libcairo.so.2")
  -- closing the Lua state must not unmap the caches of its font library
  if ok then ffi.C.dlopen("libcairo.so.2", RTLD_NOW_NODELETE) end
  if not ok then error("plot: drawing needs libcairo.so.2, Debian package libcairo2 (" .. tostring(lib) .. ")", 0) end
  cairo = lib
end

-- Raises what cairo says of a status other than 0, without a position.
local function check_status(status, what)
  if status ~= 0 then error((what or "cairo") .. ": " .. ffi.string(cairo.cairo_status_to_string(status)), 0) end
end

-- Pixels along a side that cairo's pictures have at most.
local MOST_PIXELS = 32767

-- Pixels along a side up to which a small picture is enlarged.
local MOST_ENLARGED = 4096

-- Makes a surface of w by h pixels, freed with its handle.
local function new_image_surface(format, w, h)
  return ffi.gc(cairo.cairo_image_surface_create(format, w, h), cairo.cairo_surface_destroy)
end

-- -- Canvas -----------------------------------------------------------------------------------------------------------
-- A canvas is a place to draw on. Positions and sizes are points from its upper left corner. Filling, stroking and
-- writing leave no path behind.

local Canvas = {}
Canvas.__index = Canvas

-- Calls draw(canvas) with a canvas on a surface. Raises what the drawing raised, or what cairo says of it. vector says
-- whether the surface keeps shapes rather than pixels; class and fields are those of a canvas that is not a plain one.
local function draw_on(surface, vector, draw, class, fields)
  local cr, options = cairo.cairo_create(surface), cairo.cairo_font_options_create()
  cairo.cairo_font_options_set_hint_style(options, 1)
  cairo.cairo_font_options_set_hint_metrics(options, 1)      -- both off: text is as wide in a PNG as in a PDF
  cairo.cairo_set_font_options(cr, options)
  cairo.cairo_font_options_destroy(options)
  local on = { cr = cr, vector = vector }
  for name, value in pairs(fields or {}) do on[name] = value end
  local ok, why = pcall(draw, setmetatable(on, class or Canvas))
  local status = cairo.cairo_status(cr)
  cairo.cairo_destroy(cr)
  if not ok then error(why, 0) end
  check_status(status)
end

--- Keeps the state (colour, pen, clip, map) for the next restore.
function Canvas:save() cairo.cairo_save(self.cr) end
--- Goes back to the state of the last save.
function Canvas:restore() cairo.cairo_restore(self.cr) end
--- Draws without antialiasing until the next restore.
function Canvas:sharp_edges() cairo.cairo_set_antialias(self.cr, SHARP_EDGES) end
--- Rounds the joints of strokes until the next restore.
function Canvas:round_joins() cairo.cairo_set_line_join(self.cr, ROUND_JOIN) end
--- Takes a colour { r, g, b } and an opacity, each in 0..1, for what is drawn next.
function Canvas:color(color, alpha) cairo.cairo_set_source_rgba(self.cr, color[1], color[2], color[3], alpha or 1) end

--- Draws inside of this box only, until the next restore.
function Canvas:clip(x, y, w, h)
  cairo.cairo_rectangle(self.cr, x, y, w, h)
  cairo.cairo_clip(self.cr)
end

--- Sets the width of strokes, and their dash: an array of lengths in widths, solid without.
function Canvas:pen(width, dash)
  local n = dash and #dash or 0
  local lengths = ffi.new("double[?]", max(n, 1))
  for i = 1, n do lengths[i - 1] = dash[i] * width end
  cairo.cairo_set_line_width(self.cr, width)
  cairo.cairo_set_dash(self.cr, lengths, n, 0)
end

--- Goes on with the path in a straight line; the first point of a path only begins it.
function Canvas:line_to(x, y) cairo.cairo_line_to(self.cr, x, y) end

--- Adds a straight line to the path.
function Canvas:segment(x0, y0, x1, y1)
  cairo.cairo_move_to(self.cr, x0, y0)
  cairo.cairo_line_to(self.cr, x1, y1)
end

--- Draws the path as lines.
function Canvas:stroke() cairo.cairo_stroke(self.cr) end

--- Closes the path and fills it.
function Canvas:fill()
  cairo.cairo_close_path(self.cr)
  cairo.cairo_fill(self.cr)
end

--- Fills a box.
function Canvas:box(x, y, w, h)
  cairo.cairo_rectangle(self.cr, x, y, w, h)
  cairo.cairo_fill(self.cr)
end

--- Fills a circle.
function Canvas:disc(x, y, r)
  cairo.cairo_arc(self.cr, x, y, r, 0, 2 * math.pi)
  cairo.cairo_fill(self.cr)
end

--- Measures the width of a text in points.
function Canvas:text_width(text, size, bold)
  -- cairo_text_extents_t: x and y bearing, width, height, x and y advance
  local extents = ffi.new "double[6]"
  cairo.cairo_select_font_face(self.cr, "DejaVu Sans", 0, bold and 1 or 0)
  cairo.cairo_set_font_size(self.cr, size)
  cairo.cairo_text_extents(self.cr, text, extents)
  return extents[4]
end

--- Writes a text around (x, y): align 0 starts there, 0.5 centres, 1 ends. The middle of a capital is at y. style:
-- { align =, bold =, angle = in radians, fit = in points, color = }; a text wider than fit is drawn smaller.
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

-- Gives the 8-bit values of a picture.
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

-- Makes a cairo surface of a picture, each pixel repeated `zoom` times both ways.
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

-- Paints a surface at (x, y), scaled, and frees it.
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

--- Draws a picture as large as fits the box, in its middle. Small ones are enlarged here, since viewers of SVG and PDF
-- blur them.
function Canvas:image(img, x, y, w, h)
  local scale = min(w / img.width, h / img.height)
  local zoom = scale >= 1.5 and ceil(scale) or 1
  zoom = max(1, min(zoom, floor(MOST_ENLARGED / max(img.width, img.height))))
  local left, top = x + (w - img.width * scale) / 2, y + (h - img.height * scale) / 2
  paint(self.cr, image_surface(img, zoom), left, top, scale / zoom, zoom > 1 and NEAREST or GOOD)
end

--- Draws what draw(canvas) draws within the box as one picture.
function Canvas:raster(x, y, w, h, draw)
  local scale = min(RASTER_SCALE, MOST_PIXELS / ceil(max(w, h)))
  local surface = new_image_surface(ARGB32, ceil(w * scale), ceil(h * scale))
  draw_on(surface, false, function(inner)
    cairo.cairo_scale(inner.cr, scale, scale)
    cairo.cairo_translate(inner.cr, -x, -y)
    draw(inner)
  end)
  paint(self.cr, surface, x, y, 1 / scale, GOOD)
end

-- -- Where drawings go ------------------------------------------------------------------------------------------------

local surfaces = {
  png = function(_, w, h, scale) return cairo.cairo_image_surface_create(RGB24, ceil(w * scale), ceil(h * scale)) end,
  svg = function(path, w, h) return cairo.cairo_svg_surface_create(path, w, h) end,
  pdf = function(path, w, h) return cairo.cairo_pdf_surface_create(path, w, h) end,
}

local canvas = { formats = surfaces }

--- Makes a class of canvases that draws otherwise; it inherits the methods of a canvas.
function canvas.extend(class)
  class.__index = class
  return setmetatable(class, Canvas)
end

--- Says that w by h points are too many pixels for a picture; nil where they are not.
function canvas.too_large(w, h, scale)
  local across, down = ceil(w * scale), ceil(h * scale)
  if across <= MOST_PIXELS and down <= MOST_PIXELS then return nil end
  return ("%g x %g points are %.0f x %.0f pixels, expected at most %d along a side"):format(w, h, across, down,
    MOST_PIXELS)
end

--- Calls measure(canvas) with a canvas that shows nothing.
function canvas.measure(measure)
  load()
  draw_on(new_image_surface(RGB24, 1, 1), false, measure)
end

--- Draws w by h points into a file.
-- @param format "png", "svg" or "pdf"
-- @param path where to
-- @param w width in points
-- @param h height in points
-- @param scale pixels of a png to the point
-- @param draw function(canvas); what it raises is raised, without a position
function canvas.draw_file(format, path, w, h, scale, draw)
  load()
  local why_not = format == "png" and canvas.too_large(w, h, scale)
  if why_not then error(why_not, 0) end
  local surface = surfaces[format](path, w, h, scale)
  local ok, why = pcall(draw_on, surface, format ~= "png", function(on)
    if format == "png" then cairo.cairo_scale(on.cr, scale, scale) end
    on:color(colors.white)
    cairo.cairo_paint(on.cr)
    draw(on)
  end)
  local status = 0
  if ok and format == "png" then status = cairo.cairo_surface_write_to_png(surface, path) end
  cairo.cairo_surface_finish(surface)
  if status == 0 then status = cairo.cairo_surface_status(surface) end
  cairo.cairo_surface_destroy(surface)
  if not ok then error(why, 0) end
  check_status(status)
end

--- Draws on w by h pixels and reads them.
-- @param w number of pixels
-- @param h number of pixels
-- @param size points to the pixel
-- @param class class of the canvas, from canvas.extend, or nil
-- @param fields table: fields of the canvas beside those that every canvas has, or nil
-- @param draw function(canvas); what it raises is raised, without a position
-- @return function(x, y) -> red, green, blue of a pixel, 0-based, each in 0..255
function canvas.draw_pixels(w, h, size, class, fields, draw)
  load()
  local why_not = canvas.too_large(w * size, h * size, 1 / size)
  if why_not then error(why_not, 0) end
  local surface = new_image_surface(RGB24, w, h)
  check_status(cairo.cairo_surface_status(surface))
  draw_on(surface, false, function(on)
    cairo.cairo_scale(on.cr, 1 / size, 1 / size)
    on:color(colors.white)
    cairo.cairo_paint(on.cr)
    draw(on)
  end, class, fields)
  cairo.cairo_surface_flush(surface)
  local stride, data = cairo.cairo_image_surface_get_stride(surface), cairo.cairo_image_surface_get_data(surface)
  return function(x, y)
    local p = data + y * stride + 4 * x
    return p[2], p[1], p[0], surface       -- the surface owns the pixels
  end
end

return canvas
