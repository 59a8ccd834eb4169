--- plot/braille.lua: figures as text. A canvas whose pixels are braille dots and whose texts are letters between them.
--
-- A character is 6 by 12 points and holds 2 by 4 dots. Shapes are drawn by cairo, one pixel to the dot, and a dot is
-- set where the pixel is dark enough: ordered dithering with Bayer's matrix, so that shades of a heat map or a picture
-- come out as densities. The thinnest pen is one dot, and what is lighter than the grid's lines is not drawn.

local canvas = require "vertex.plot.canvas"
local colors = require "vertex.plot.colors"
local floor, ceil, max, min, abs = math.floor, math.ceil, math.max, math.min, math.abs

-- The size of a character, and of a dot, in points.
local CELL_WIDTH, CELL_HEIGHT, DOT = 6, 12, 3

-- A dot is not set from this lightness on: just below that of grid lines and of a faint band.
local WHITE = 0.86

local braille = {}

-- Iterates over the characters of a text in UTF-8.
local function characters(text) return text:gmatch "[%z\1-\127\194-\244][\128-\191]*" end

-- Counts the characters of a text.
local function length(text)
  local n = 0
  for _ in characters(text) do n = n + 1 end
  return n
end

-- -- Canvas -----------------------------------------------------------------------------------------------------------
-- Its fields: zoom, by how much a figure wider than the terminal shrinks (1 for others); letters, row → column →
-- { text, color }.

local Text = canvas.extend {}
local plain = getmetatable(Text)     -- the canvas of pictures

-- Colours of lines and markers lighter than this are darkened to it: yellow ones would be taken for paper. Greys, such
-- as the grid's, stay.
local LIGHTEST = 0.55

-- Measures a text: every character has the same width.
function Text:text_width(text) return length(text) * CELL_WIDTH * self.zoom end

-- Keeps the lightness of areas, which are drawn with sharp edges, for the dithering, until the next restore.
function Text:sharp_edges()
  self.shading = true
  plain.sharp_edges(self)
end

-- Ends shading too.
function Text:restore()
  self.shading = false
  plain.restore(self)
end

-- Darkens light colours, but not of areas.
function Text:color(color, alpha)
  local r, g, b = color[1], color[2], color[3]
  local light = 0.299 * r + 0.587 * g + 0.114 * b
  if not self.shading and light > LIGHTEST and max(r, g, b) - min(r, g, b) > 0.1 then
    local f = LIGHTEST / light
    color = { r * f, g * f, b * f }
  end
  plain.color(self, color, alpha)
end

-- Strokes at least one dot wide.
function Text:pen(width, dash) plain.pen(self, max(width, DOT * self.zoom), dash) end
-- Fills a circle of at least one dot.
function Text:disc(x, y, r) plain.disc(self, x, y, max(r, 0.75 * DOT * self.zoom)) end

-- Puts a letter at a character's place, 0-based.
function Text:put(column, row, letter, color)
  local line = self.letters[row] or {}
  self.letters[row] = line
  line[column] = { letter, color }
end

-- Writes letters side by side; those of an upright text one below the other, those of a slanted one along the slope.
function Text:text(text, x, y, _, style)
  style = style or {}
  local w, h, n = CELL_WIDTH * self.zoom, CELL_HEIGHT * self.zoom, length(text)
  local angle = style.angle or 0
  local upright = abs(angle) > 1.5
  local fit = style.fit and max(1, floor(style.fit / (upright and h or w))) or n
  local across, down = upright and 0 or w, upright and h or w * math.tan(angle)
  n = min(n, fit)
  x, y = x - across * n * (style.align or 0), y - down * n * (style.align or 0) + (upright and h / 2 or 0)
  local k = 0
  for letter in characters(text) do
    if k >= n then break end
    self:put(floor((x + across * k) / w + 0.5), floor((y + down * k) / h), letter, style.color or colors.ink)
    k = k + 1
  end
end

-- -- Dots -------------------------------------------------------------------------------------------------------------

-- The bit of a dot by its column and row in the character, and Bayer's thresholds 1/32 .. 31/32.
local BITS = { [0] = { [0] = 1, 2, 4, 64 }, { [0] = 8, 16, 32, 128 } }
local BAYER = { [0] = { [0] = 0, 8, 2, 10 }, { [0] = 12, 4, 14, 6 }, { [0] = 3, 11, 1, 9 }, { [0] = 15, 7, 13, 5 } }

-- Gives the dots of a character as a number 0..255, and the colour of the darkest of them, which is not mixed with
-- paper.
local function dots(pixel, column, row)
  local bits, most, r, g, b = 0, 0, 0, 0, 0
  for dx = 0, 1 do
    for dy = 0, 3 do
      local x, y = 2 * column + dx, 4 * row + dy
      local pr, pg, pb = pixel(x, y)
      local light = (0.299 * pr + 0.587 * pg + 0.114 * pb) / 255
      local ink = min(1, (WHITE - light) / 0.3)        -- every series colour sets its dots, shades between are dithered
      if ink > (BAYER[y % 4][x % 4] + 0.5) / 16 then
        bits = bits + BITS[dx][dy]
        if 1 - light > most then most, r, g, b = 1 - light, pr, pg, pb end
      end
    end
  end
  return bits, r, g, b
end

-- Gives the braille character of dots, in UTF-8.
local function glyph(bits)
  if bits == 0 then return " " end
  local code = 0x2800 + bits
  return string.char(0xE2, 0x80 + floor(code / 64) % 64, 0x80 + code % 64)
end

-- The escape sequence for the terminal's own colour.
local DEFAULT = "\27[39m"

-- Gives the escape sequence for a colour 0..255. Near-black and greys take the terminal's own colour, which can be read
-- on any background.
local function escape(r, g, b)
  if max(r, g, b) - min(r, g, b) < 24 then return DEFAULT end
  return ("\27[38;2;%d;%d;%dm"):format(r, g, b)
end

-- Gives the figure's lines of text: letters, and dots where there are none.
local function lines(pixel, letters, columns, rows, color)
  local out = {}
  for row = 0, rows - 1 do
    local line, now = {}, DEFAULT
    for column = 0, columns - 1 do
      local letter, code = letters[row] and letters[row][column], now
      local text = letter and letter[1]
      if letter then
        code = escape(letter[2][1] * 255, letter[2][2] * 255, letter[2][3] * 255)
      else
        local bits, r, g, b = dots(pixel, column, row)
        text = glyph(bits)
        if bits > 0 then code = escape(r, g, b) end
      end
      if color and code ~= now then
        line[#line + 1], now = code, code
      end
      line[#line + 1] = text
    end
    local text = table.concat(line):gsub(" +$", "")
    out[#out + 1] = now ~= DEFAULT and text .. DEFAULT or text
  end
  return table.concat(out, "\n")
end

--- Draws a figure as lines of text, at most `columns` wide. Axes are laid out for that width, pictures are made
-- smaller.
function braille.draw(fig, columns, color)
  local width, height, zoom = fig.width, fig.height, 1
  local letters = {}
  if fig.measure then
    canvas.measure(function() end)                       -- loads
    fig:measure(setmetatable({ zoom = 1 }, Text))
    width, height = fig.width, fig.height
    zoom = max(1, width / (columns * CELL_WIDTH))
  elseif width > columns * CELL_WIDTH then
    -- as high as it was while the rows of axes keep room to be read
    width, height = columns * CELL_WIDTH, max(height * columns * CELL_WIDTH / width, min(height, 240 * fig.rows))
  end
  local across, down = ceil(width / (CELL_WIDTH * zoom)), ceil(height / (CELL_HEIGHT * zoom))
  local sized = setmetatable({ width = width, height = height }, { __index = fig })
  local pixel = canvas.draw_pixels(2 * across, 4 * down, DOT * zoom, Text, { zoom = zoom, letters = letters },
    function(on) sized:draw(on) end)
  return lines(pixel, letters, across, down, color)
end

return braille
