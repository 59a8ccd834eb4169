--- plot: figures for papers and notebooks. Lines, points, arrows, bars, histograms, heat maps and pictures; the same on
-- the simplex.
--
-- A figure records what it is told and draws it when saved or shown, so that one figure can be saved in several
-- formats. libcairo draws; the module loads without it and asks for it when a figure is first drawn. fig:show() draws
-- in the terminal or the notebook, or writes a file (interactive/display.lua).
--
--     local fig = plot.figure { width = 900, height = 400, cols = 2, title = "Two runs" }
--     fig:axes(1):line(nil, losses, { label = "loss" }):set { ylog = true, xlabel = "step" }
--     fig:simplex(2):scatter(p, { label = "π" })
--     fig:save("loss.png")
--
-- Data: an array is a Lua array of numbers, a tensor (N), or another object with `:totable()`. Numbers that are NaN or
-- infinite are gaps: a line breaks there, a point or bar is left out. Arrays are copied.
-- Pictures: { width =, height =, rgb = string } with 8-bit RGB, row by row; or a tensor (H,W,3), u8, or f32 in 0..1;
-- or another object with `:shape()`, `:dtype()` and `:bytes()`.
-- Colours: "#rrggbb", { r, g, b } in 0..1, or a number, 1-based, that picks from `plot.colors`. A series without one
-- takes the next of `plot.colors`; each further round changes the dash of lines and the marker of points.
-- Sizes are points, 1/72 inch: 0.01 to 10000 of marks and lines, 0.1 to 500 of letters, 1 to 32767 of a figure's sides.
-- A PNG has `scale` pixels to the point, 0.001 to 50. Text is UTF-8; bytes that are not become U+FFFD.
--
-- This file holds figures. The others, from what a user says to what is drawn:
--
--   axes      records line, runs, scatter, arrows, text, hist, bar, heatmap, image and set as layers
--   ternary   does so on the simplex
--   grid      the figure of pictures
--   page      draws a figure of axes: layout places them, scales maps numbers and writes ticks, marks draws a layer,
--             density estimates how closely points lie, legend names the series
--   canvas    what is drawn on; braille is a canvas of text
--   colors serves them all; inputs copies the arrays and pictures that a user gives

local arguments = require "vertex.arguments"
local core = require "vertex.core"
local display = require "vertex.interactive.display"
local axes = require "vertex.plot.axes"
local braille = require "vertex.plot.braille"
local canvas = require "vertex.plot.canvas"
local check = require "vertex.check"
local colors = require "vertex.plot.colors"
local grid = require "vertex.plot.grid"
local inputs = require "vertex.plot.inputs"
local page = require "vertex.plot.page"
local scales = require "vertex.plot.scales"
local ternary = require "vertex.plot.ternary"
local fail = core.fail

local plot = {
  colors = colors.series, colormap = colors.map,
  format_number = scales.format_number, ticks = scales.ticks, log_ticks = scales.log_ticks,
}

-- -- Figures ----------------------------------------------------------------------------------------------------------

local Figure = {}
Figure.__index = Figure

--- Makes a figure of rows x cols axes, all empty.
-- @param[opt] options table
-- @param[opt=640] options.width of the whole, in points
-- @param[opt=400] options.height of the whole, in points
-- @param[opt=1] options.rows number of rows of axes
-- @param[opt=1] options.cols number of columns of axes
-- @param[opt] options.title string
-- @param[opt=2] options.scale PNG pixels to the point
-- @param[opt=11] options.font size of labels in points
-- @return figure
-- @raise where an option is unknown, of another type or out of its range, or a PNG would have more than 32767 pixels
-- along a side
function plot.figure(options)
  local fig = check.options("plot.figure", options, { width = { inputs.side, 640 }, height = { inputs.side, 400 },
    rows = { inputs.integer(1, 1000), 1 }, cols = { inputs.integer(1, 1000), 1 }, title = inputs.text,
    scale = { inputs.scale, 2 }, font = { inputs.letters, 11 } })
  local why = canvas.too_large(fig.width, fig.height, fig.scale)
  if why then fail("plot.figure: %s", why) end
  fig.cells, fig.draw = {}, page.draw
  return setmetatable(fig, Figure)
end

--- Makes a figure of pictures in rows and columns, as large as it needs to be.
-- @param rows array of arrays of pictures; false leaves a cell empty, rows may differ in length
-- @param[opt] options table
-- @param[opt] options.row_labels array of strings
-- @param[opt] options.col_labels array of strings
-- @param[opt=96] options.cell longer side of a picture's place, in points
-- @param[opt=4] options.gap between places, in points
-- @param[opt] options.title string
-- @param[opt=2] options.scale PNG pixels to the point
-- @param[opt=11] options.font size of labels in points
-- @return figure, to save or show; it has no axes
-- @raise where rows are no arrays of pictures, or an option is unknown or of another type
function plot.image_grid(rows, options) return setmetatable(grid.new(rows, options), Figure) end

-- Gives the number of a cell of the figure, counted row by row from 1.
local function cell_index(fig, who, row, col)
  if not fig.cells then fail("%s: an image grid has no axes", who) end
  check.integer(who, "row", row, 1)
  if col then check.integer(who, "col", col, 1) end
  local index = col and (row - 1) * fig.cols + col or row
  if index > fig.rows * fig.cols or col and col > fig.cols then
    fail("%s: no axes at %d%s in %d row(s) of %d", who, row, col and ", " .. col or "", fig.rows, fig.cols)
  end
  return index
end

--- Gives the axes at a place of the figure, and makes them when first asked for.
-- @param row integer, the row, 1-based; without col the place, 1-based, counted row by row
-- @param[opt] col integer, the column, 1-based
-- @return axes
-- @raise where the figure has no such place, or is a grid of pictures
function Figure:axes(row, col)
  local index = cell_index(self, "Figure:axes", row, col)
  self.cells[index] = self.cells[index] or axes.new(self)
  return self.cells[index]
end

--- Gives the axes on the simplex at a place of the figure, and makes them when first asked for: a triangle with ticks
-- on its three sides for M = 3 codes, a regular polygon for more.
-- @param row integer, the row, 1-based; without col the place, 1-based, counted row by row
-- @param[opt] col integer (the column, 1-based) or table, the options where there is no col
-- @param[opt] options table, of new axes
-- @param[opt=3] options.codes M
-- @param[opt] options.labels array of M strings, at the vertices (e₁, e₂, ...)
-- @param[opt=5] options.ticks parts into which ticks divide a triangle's side; 0 for none
-- @return axes on the simplex
-- @raise where the figure has no such place, it holds other axes, options are given for axes that are there, or M < 3
function Figure:simplex(row, col, options)
  if type(col) == "table" then col, options = nil, col end
  local index = cell_index(self, "Figure:simplex", row, col)
  if not self.cells[index] then
    self.cells[index] = ternary.new(self, options)
  elseif not self.cells[index].simplex or options then
    fail("Figure:simplex: the place has %s already", self.cells[index].simplex and "a simplex" or "axes")
  end
  return self.cells[index]
end

-- -- Output -----------------------------------------------------------------------------------------------------------

-- Draws the figure into a file. Raises a text without a position.
local function draw_file(fig, format, path)
  if fig.measure then canvas.measure(function(on) fig:measure(on) end) end
  canvas.draw_file(format, path, fig.width, fig.height, fig.scale, function(on) fig:draw(on) end)
end

-- Gives the bytes of the figure's file, or nil and the reason. Cairo writes files only, unless C calls back into Lua.
local function render(fig, format)
  local file = core.memory_file()
  local ok, why = pcall(draw_file, fig, format, file.path)
  local bytes = ok and core.read_file(file.path) or nil
  file:close()
  return bytes, why
end

--- Saves the figure. The file appears whole or not at all.
-- @param path file name ending in .png, .svg or .pdf
-- @return the figure
-- @raise where the name ends otherwise, the file cannot be written, or libcairo is not installed
function Figure:save(path)
  local format = type(path) == "string" and (path:match "%.(%w+)$" or ""):lower()
  if not canvas.formats[format] then
    fail("Figure:save: the file name ends in .png, .svg or .pdf, got %s", check.show(path))
  end
  local bytes, why = render(self, format)
  if not bytes then fail("Figure:save: cannot write %s: %s", path, why) end
  core.write_file(path, bytes)
  return self
end

--- Draws the figure as a PNG in memory.
-- @return string, the bytes of the file
-- @raise where libcairo is not installed
function Figure:png()
  local bytes, why = render(self, "png")
  if not bytes then fail("Figure:png: %s", why) end
  return bytes
end

--- Draws the figure as text for a terminal: data in braille dots (2 by 4 to the character), numbers and names in
-- letters.
-- @param[opt] options table
-- @param[opt=80] options.columns width in characters, at least 20
-- @param[opt=false] options.color true adds the escape sequences of terminals
-- @return string of lines
-- @raise where columns is below 20, or libcairo is not installed
function Figure:text(options)
  local o = check.options("Figure:text", options, { columns = { inputs.integer(20, 10000), 80 }, color = "boolean" })
  local ok, result = pcall(braille.draw, self, o.columns, o.color)
  if not ok then fail("Figure:text: %s", result) end
  return result
end

--- Shows the figure where the user looks: in the terminal, in the notebook, or in a file that a script without a
-- terminal writes.
-- @param[opt] options table
-- @param[opt] options.id string: a later show with the same id takes this one's place in a notebook
-- @return nothing, since sessions and notebooks show what is returned
-- @raise where libcairo is not installed
function Figure:show(options) display.show(self, options) end

-- Gives the forms in which interactive/display.lua shows a figure. Colours are for terminals that have them.
function Figure.__mime(fig)
  local terminal = display.mode ~= "notebook" and core.is_tty(1) and not os.getenv "NO_COLOR"
    and os.getenv "TERM" ~= "dumb"
  local columns = core.is_tty(1) and core.terminal_columns() or 0
  if columns < 20 then columns = 80 end                  -- terminals that do not know say 0
  local text = fig:text { columns = math.min(columns, 120), color = terminal }
  return { ["image/png"] = fig:png(), ["text/plain"] = text },
    { ["image/png"] = { width = math.ceil(fig.width), height = math.ceil(fig.height) } }
end

function Figure.__tostring(fig)
  if fig.images then return ("figure of %d row(s) of pictures"):format(#fig.images) end
  return ("figure %g x %g pt, %d x %d axes"):format(fig.width, fig.height, fig.rows, fig.cols)
end

arguments.guard_class("figure", Figure)

return plot
