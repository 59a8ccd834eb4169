--- runs/code_maps: which region of an image took which code, one of an experiment's pictures: a row of images, and
-- below it one of maps for each method, a colour a code.

--- The colour of a code: hues a golden section apart, which keeps codes that follow each other distinct, on three
-- levels of brightness.
-- @param code integer from 0
-- @return red, green, blue, integers 0..255
local function color(code)
  local hue, value = code * 0.618033988749895 % 1, ({ 0.95, 0.75, 0.5 })[code % 3 + 1]
  local function channel(shift)
    local k = (shift + 6 * hue) % 6
    return math.floor(255 * value * (1 - 0.8 * math.max(0, math.min(k, 4 - k, 1))) + 0.5)
  end
  return channel(5), channel(3), channel(1)
end

--- Makes a picture of codes.
-- @param map array of rows of codes, integers from 0
-- @return picture { width =, height =, rgb = }, a pixel a code
local function picture(map)
  local bytes = {}
  for _, row in ipairs(map) do
    for _, code in ipairs(row) do bytes[#bytes + 1] = string.char(color(code)) end
  end
  return { width = #map[1], height = #map, rgb = table.concat(bytes) }
end

--- Draws what finished methods kept as `code_maps`, i32 (images, rows, columns), below the images that they kept as
-- `originals`, and how many codes stand in each. Nothing is drawn where no method kept maps.
-- @param run table of runs.start
-- @param path path of the PNG
-- @raise where the file cannot be written
local function draw(run, path)
  local plot = require "vertex.plot"
  local rows, labels = {}, {}
  for _, method in ipairs(run.config.methods) do
    local kept = run:kept(method)
    if kept and kept.code_maps then
      if #rows == 0 then
        rows[1], labels[1] = {}, "image"
        for i = 1, kept.originals:size(1) do rows[1][i] = kept.originals[i] end
      end
      local row, codes, count = {}, {}, 0
      for i, map in ipairs(kept.code_maps:totable()) do
        row[i] = picture(map)
        for _, line in ipairs(map) do
          for _, code in ipairs(line) do
            count = count + (codes[code] and 0 or 1)
            codes[code] = true
          end
        end
      end
      rows[#rows + 1], labels[#labels + 1] = row, ("%s  %d codes"):format(method, count)
    end
  end
  if #rows > 0 then plot.image_grid(rows, { row_labels = labels, cell = 72, gap = 3 }):save(path) end
end

return { file = "code_maps.png", draw = draw, picture = picture }
