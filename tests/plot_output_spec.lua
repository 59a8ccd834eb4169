-- What becomes of a figure: files in three formats, text in a terminal, a picture in a notebook; and what is left when
-- that fails.

local H = require "tests.helper"
local pictures = require "tests.pictures"
local core = require "vertex.core"
local display = require "vertex.interactive.display"
local ffi = require "ffi"
local plot = require "vertex.plot"
local solid = pictures.solid
local read = H.read

local folder = H.scratch "figures"
local function fresh(name) return folder .. "/" .. name end
local function files() return (H.shell(("ls -A '%s'"):format(folder))) end

describe("a figure", function()
  setup(function() assert(os.execute(("mkdir '%s'"):format(folder)) == 0) end)

  it("saves by the ending, svg and pdf too", function()
    local fig = plot.figure()
    fig:axes(1):line(nil, { 1, 2 }, { label = "é" })
    fig:save(fresh "a.png"):save(fresh "a.svg"):save(fresh "a.PDF")
    assert.equal(fig:png(), read(fresh "a.png"))
    assert.matches("<svg", read(fresh "a.svg"))
    assert.equal("%PDF", read(fresh "a.PDF"):sub(1, 4))
    assert.equal("a.PDF\na.png\na.svg\n", files())
    os.execute(("rm '%s'/*"):format(folder))
    H.raises(function() fig:save(fresh "a.jpg") end, ".png, .svg or .pdf", "a.jpg")
    H.raises(function() fig:save() end, ".png, .svg or .pdf")
  end)

  it("turns layers of many marks into a picture in an svg", function()
    local function bytes(n)
      local x = {}
      for i = 1, n do x[i] = i % 97 end
      local fig = plot.figure()
      fig:axes(1):scatter(nil, x)
      fig:save(fresh "s.svg")
      local text = read(fresh "s.svg")
      os.remove(fresh "s.svg")
      return text
    end
    assert.is_nil(bytes(1000):find("data:image/png", 1, true))
    local many = bytes(20000)
    assert.is_truthy(many:find("data:image/png", 1, true))
    assert.is_true(#many < 1e6)
    local fig, rows = plot.figure(), {}
    for i = 1, 2100 do rows[i] = { 0.5, i / 4200, 0.5 - i / 4200 } end
    fig:simplex(1):scatter(rows)
    fig:save(fresh "s.svg")
    assert.is_truthy(read(fresh "s.svg"):find("data:image/png", 1, true))
    os.remove(fresh "s.svg")
  end)

  it("is text with braille dots in a terminal", function()
    local fig = plot.figure { width = 480, height = 240 }
    fig:axes(1):line(nil, { 1, 2, 3 }, { label = "rising" }):set { title = "A title", xlabel = "steps", ylabel = "loss",
      legend = "upper left" }
    local text = fig:text { columns = 80 }
    for _, words in ipairs { "A title", "steps", "rising" } do assert.is_truthy(text:find(words, 1, true)) end
    local rows, highest, lowest = {}, nil, nil
    for row in (text .. "\n"):gmatch "(.-)\n" do rows[#rows + 1] = row end
    assert.equal(20, #rows)                             -- 240 points of 12 to the row
    local function width(row) return #row:gsub("[\128-\191]", "") end
    for _, row in ipairs(rows) do assert.is_true(width(row) <= 80) end
    assert.is_nil(text:find("\27", 1, true))
    assert.equal(text, fig:text { columns = 80 })
    -- the line rises: where it is near its right end is above where it begins
    local plain = plot.figure { width = 480, height = 240 }
    plain:axes(1):line(nil, { 1, 2, 3 }, { color = "#000000", width = 4 }):set { grid = false }
    local row_number = 0
    for row in (plain:text() .. "\n"):gmatch "(.-)\n" do
      row_number = row_number + 1
      local column = 0
      for letter in row:gmatch "[%z\1-\127\194-\244][\128-\191]*" do
        column = column + 1
        if letter:byte() == 0xE2 and column > 60 and not highest then highest = row_number end
        if letter:byte() == 0xE2 and column > 12 and column < 20 and row_number < 18 then lowest = row_number end
      end
    end
    assert.is_true(highest < 4 and lowest > 14)
    assert.matches("\27%[38;2;%d+;1%d%d;1%d%dm", fig:text { columns = 80, color = true })
    local narrow = plot.figure { width = 2000, height = 300, cols = 2 }
    narrow:axes(1):line(nil, { 1, 2 })
    narrow:simplex(2):scatter { { 1, 0, 0 } }
    for row in narrow:text { columns = 60 }:gmatch "[^\n]+" do assert.is_true(width(row) <= 60) end
  end)

  it("shows pictures as text by their lightness", function()
    local function dots(level)
      local text, n = plot.image_grid({ { solid(8, 8, level, level, level) } }, { cell = 96 }):text(), 0
      for a, b in text:gmatch "\226([\160-\163])([\128-\191])" do
        local bits = (a:byte() - 160) * 64 + b:byte() - 128
        while bits > 0 do n, bits = n + bits % 2, math.floor(bits / 2) end
      end
      return n
    end
    assert.equal(0, dots(255))
    assert.near(1024, dots(0), 70)                      -- 96 points are 32 dots
    assert.is_true(dots(180) > 100 and dots(180) < 900)
  end)

  it("shows itself in a notebook as a PNG and as text", function()
    local mode, backend, shown, options = display.mode, display.backend, nil, nil
    display.mode, display.backend = "notebook", function(bundle, o) shown, options = bundle, o end
    local fig = plot.figure { width = 100, height = 80 }
    local ok, result = pcall(function() return select("#", fig:show { id = "loss" }) end)
    display.mode, display.backend = mode, backend
    assert.is_true(ok)
    assert.equal(0, result)
    assert.equal(fig:png(), shown["image/png"])
    assert.is_nil(shown["text/plain"]:find("\27", 1, true))
    assert.same({ id = "loss", metadata = { ["image/png"] = { width = 100, height = 80 } } }, options)
    assert.matches("figure 100 x 80 pt", tostring(fig))
    assert.matches("pictures", tostring(plot.image_grid { { solid(1, 1, 0, 0, 0) } }))
    local two = plot.figure { cols = 2 }
    assert.equal("axes with 1 layer(s)", tostring(two:axes(1):line(nil, { 1, 2 })))
    assert.equal("axes on the simplex of 3 codes with 1 layer(s)", tostring(two:simplex(2):scatter { { 1, 0, 0 } }))
  end)

  it("is written to a file by show in a script without a terminal", function()
    local here = io.popen "pwd":read "*l"
    local function absolute(path) return path:sub(1, 1) == "/" and path or here .. "/" .. path end
    local library = os.getenv "VERTEX_LIB" or absolute(core.root) .. "/build/libvertex.so"
    local file = assert(io.open(fresh "try.lua", "w"))
    file:write(([[package.path = "%s/lua/?.lua;%s/lua/?/init.lua;" .. package.path
      local plot = require "vertex.plot"
      plot.figure {width = 50, height = 40}:show()
      plot.figure {width = 60, height = 40}:show()]]):format(absolute(core.root), absolute(core.root)))
    file:close()
    local run = io.popen(("cd '%s' && VERTEX_LIB='%s' luajit try.lua 2>&1"):format(folder, absolute(library)))
    local output = run:read "*a"
    run:close()
    assert.equal("figure written to try-1.png\nfigure written to try-2.png\n", output)
    assert.same({ 120, 80 }, { pictures.size(read(fresh "try-2.png")) })
    os.execute(("rm '%s'/*"):format(folder))
  end)

  it("leaves nothing behind when saving fails", function()
    local fig = plot.figure()
    H.raises(function() fig:save(fresh "no/such/folder.png") end, fresh "no/such/folder.png",
      "No such file or directory")
    os.execute(("mkdir '%s'"):format(fresh "folder.png"))
    H.raises(function() fig:save(fresh "folder.png") end, "folder.png", "it is a folder")
    os.execute(("rmdir '%s'"):format(fresh "folder.png"))
    fig.draw = function() error("the drawing fails", 0) end
    for _, name in ipairs { "bad.png", "bad.svg", "bad.pdf" } do
      H.raises(function() fig:save(fresh(name)) end, name, "the drawing fails")
    end
    H.raises(function() fig:png() end, "the drawing fails")
    local large = plot.image_grid({ { pictures.solid(1, 1, 0, 0, 0), pictures.solid(1, 1, 0, 0, 0) } },
      { cell = 9000 })
    H.raises(function() large:save(fresh "huge.png") end, "huge.png", "36040 x 18032 pixels, expected at most 32767")
    assert.equal("", files())
  end)

  it("keeps the file that was there when saving fails, and replaces it when not", function()
    local path = fresh "kept.png"
    local fig = plot.figure():save(path)
    local before = read(path)
    local draw = fig.draw
    fig.draw = function() error("the drawing fails", 0) end
    H.raises(function() fig:save(path) end, "kept.png", "the drawing fails")
    assert.equal(before, read(path))
    fig.draw = draw
    fig:axes(1):set { title = "drawn" }
    fig:save(path)
    assert.equal(fig:png(), read(path))
    assert.equal("kept.png\n", files())
    os.remove(path)
  end)

  it("leaves nothing behind when the process is killed while it draws", function()
    H.child(([[
      local plot, ffi = require "vertex.plot", require "ffi"
      os.tmpname = function()
        io.open("%s", "w"):close()
        return "%s"
      end
      ffi.cdef "int kill(int, int); int getpid(void);"
      local fig = plot.figure()
      fig.draw = function() ffi.C.kill(ffi.C.getpid(), 9) end
      fig:save "%s"
    ]]):format(fresh "temporary", fresh "temporary", fresh "killed.svg"))
    assert.equal("", files())
  end)

  it("says which package is missing when there is no cairo", function()
    local load, loaded = ffi.load, {}
    for _, name in ipairs { "vertex.plot", "vertex.plot.canvas" } do
      loaded[name], package.loaded[name] = package.loaded[name], nil
    end
    local without = require "vertex.plot"
    for name, module in pairs(loaded) do package.loaded[name] = module end
    ffi.load = function(name) error(name .. ": cannot open shared object file") end
    local ok, message = pcall(function() without.figure():png() end)
    ffi.load = load
    assert.is_false(ok)
    assert.matches("libcairo2", message)
  end)
end)
