--- pictures.lua: what specs of figures share: the pixels of a PNG, and small pictures. Pixels are read back by cairo's
-- own PNG reader, so the bytes of the file are what is checked.

local ffi = require "ffi"
local H = require "tests.helper"
local plot = require "vertex.plot"

ffi.cdef [[
void *cairo_image_surface_create_from_png(const char *path);
]]
local cairo = ffi.load "libcairo.so.2"

local pictures = {}

local function big_endian(bytes, at)
  local a, b, c, d = bytes:byte(at, at + 3)
  return ((a * 256 + b) * 256 + c) * 256 + d
end

--- Gives width and height of a PNG.
function pictures.size(png) return big_endian(png, 17), big_endian(png, 21) end

--- Gives the function (x, y) → r, g, b over the pixels of a PNG, 0-based.
function pictures.pixels(png)
  local path = H.write(os.tmpname(), png)
  local surface = cairo.cairo_image_surface_create_from_png(path)
  os.remove(path)
  assert(cairo.cairo_surface_status(surface) == 0, "no PNG")
  local data, stride = cairo.cairo_image_surface_get_data(surface), cairo.cairo_image_surface_get_stride(surface)
  return function(x, y)
    local p = data + y * stride + x * 4
    return p[2], p[1], p[0]
  end
end

--- Finds the pixels of exactly this colour: { n =, x =, y = their middle, left =, right =, top =, bottom = }.
function pictures.spot(png, r, g, b)
  local at, w, h = pictures.pixels(png), pictures.size(png), select(2, pictures.size(png))
  local s, sum_x, sum_y = { n = 0, left = w, right = -1, top = h, bottom = -1 }, 0, 0
  for y = 0, h - 1 do
    for x = 0, w - 1 do
      local pr, pg, pb = at(x, y)
      if pr == r and pg == g and pb == b then
        s.n, sum_x, sum_y = s.n + 1, sum_x + x, sum_y + y
        s.left, s.right = math.min(s.left, x), math.max(s.right, x)
        s.top, s.bottom = math.min(s.top, y), math.max(s.bottom, y)
      end
    end
  end
  s.x, s.y = sum_x / s.n, sum_y / s.n
  return s
end

--- Counts the pixels of exactly this colour.
function pictures.count(png, r, g, b) return pictures.spot(png, r, g, b).n end

--- Gives a colour of a map as pixels have it.
function pictures.map_color(name, t)
  local r, g, b = plot.colormap(name, t)
  return math.floor(r * 255 + 0.5), math.floor(g * 255 + 0.5), math.floor(b * 255 + 0.5)
end

--- Makes a picture of one colour.
function pictures.solid(w, h, r, g, b) return { width = w, height = h, rgb = string.char(r, g, b):rep(w * h) } end

return pictures
