-- report.html: a run's and a series' page stands alone, holds what the table says, and shows every picture.

local H = require "tests.helper"
local lfs = require "lfs"
local vx = require "vertex"

local scratch = H.scratch "report"
local library = os.getenv "VERTEX_LIB" or H.root .. "/build/libvertex.so"

local function luajit(program, arguments)
  return H.shell(("cd '%s' && VERTEX_LIB='%s' luajit '%s/%s' %s 2>&1"):format(scratch, library, H.root, program,
    arguments))
end

local function read(path) return assert(H.read(scratch .. "/" .. path), path) end

--- The cells of the page's first table, row by row, without marks.
local function cells(html)
  local rows = {}
  for row in html:match "<table>(.-)</table>":gmatch "<tr>(.-)</tr>" do
    rows[#rows + 1] = {}
    for cell in row:gmatch "<t[hd]>(.-)</t[hd]>" do table.insert(rows[#rows], (cell:gsub("</?b>", ""))) end
  end
  return rows
end

describe("a report", function()
  setup(function() assert(lfs.mkdir(scratch)) end)

  it("of a run has the table, the pictures as they are on disk, configuration and machine", function()
    local out, status = luajit("experiments/ae_sweep.lua",
      "--device cpu --steps 2 --methods softmax-knn-ce,ste-euclid --out run --quiet")
    assert.equal(0, status, out)
    local html = read "run/report.html"
    local rows, expected = cells(html), {}
    for line in read("run/table.md"):gmatch "|[^\n]+" do
      if not line:find "^|[:|-]+$" then
        expected[#expected + 1] = {}
        for cell in line:sub(2):gmatch " (.-) |" do table.insert(expected[#expected], (cell:gsub("%*%*", ""))) end
      end
    end
    assert.same(expected, rows)
    assert.equal(3, #rows)
    local pictures = 0
    for name, data in html:gmatch '<img alt="([^"]+)" src="data:image/png;base64,([^"]+)">' do
      H.write(scratch .. "/one.txt", data)
      assert.equal("", H.shell(("base64 -d '%s/one.txt' > '%s/one.png'"):format(scratch, scratch)))
      assert.equal(read("run/" .. name), read "one.png", name)
      pictures = pictures + 1
    end
    assert.equal(5, pictures) -- curves, code_maps, code_use, reconstructions, softness
    for _, text in ipairs { "<b>", "procedural images", "luajit ", "--steps 2", "LuaJIT 2" } do
      assert.truthy(html:find(text, 1, true), text)
    end
    assert.falsy(html:find 'src="[^d]' or html:find "https?:", "it needs no other file")
  end)

  it("of a series has mean and deviation, the best of each column in bold", function()
    local out, status = luajit("tests/fixtures/experiments/vectors.lua",
      "--device cpu --steps 3 --seeds 1-2 --grid codes=4,8 --methods softmax-knn-ce,ste-euclid --out 'a<b' --quiet")
    assert.equal(0, status, out)
    local html = read "a<b/report.html"
    local rows, best = cells(html), 2
    assert.same({ "Run", "Method", "Seeds", "Distance", "Codes", "Time" }, rows[1])
    assert.equal(5, #rows)
    for i = 3, 5 do
      if tonumber(rows[i][4]:match "^[%d.]+") < tonumber(rows[best][4]:match "^[%d.]+") then best = i end
    end
    assert.truthy(html:find("<td><b>" .. rows[best][4] .. "</b></td>", 1, true), "the least distance is bold")
  end)

  it("shows which region took which code, a colour a code", function()
    for _, method in ipairs { "softmax-knn-ce", "ste-euclid" } do
      local kept = vx.load(("%s/run/checkpoints/%s.safetensors"):format(scratch, method))
      local maps
      for name, x in pairs(kept) do maps = name:find "code_maps$" and x or maps end
      assert.same({ 10, 8, 8 }, maps:shape())
      local picture, color_of, code_of = vx.runs.code_maps.picture(maps[1]:totable()), {}, {}
      assert.same({ 8, 8, 3 * 64 }, { picture.width, picture.height, #picture.rgb })
      for y, row in ipairs(maps[1]:totable()) do
        for x, code in ipairs(row) do
          local at = 3 * ((y - 1) * 8 + x - 1) + 1
          local color = picture.rgb:sub(at, at + 2)
          assert.equal(color_of[code] or color, color)
          assert.equal(code_of[color] or code, code)
          color_of[code], code_of[color] = color, code
        end
      end
    end
  end)

  it("is made again by its command, and refused where there is nothing to report", function()
    local before, curves = read "run/report.html", read "run/curves.png"
    for _, file in ipairs { "report.html", "table.md", "curves.png" } do os.remove(scratch .. "/run/" .. file) end
    local out, status = luajit("experiments/report.lua", "run/")
    assert.equal(0, status, out)
    assert.truthy(out:find("report.html in run", 1, true), out)
    assert.equal(before, read "run/report.html")
    assert.equal(curves, read "run/curves.png")
    before = read "a<b/report.html"
    os.remove(scratch .. "/a<b/report.html") -- a series of a program that is not in experiments/: its page alone
    out, status = luajit("experiments/report.lua", "'a<b'")
    assert.equal(0, status, out)
    assert.equal("a<b/report.html\n", out)
    assert.equal(before, read "a<b/report.html")
    os.remove(scratch .. "/a<b/compare.csv")
    out, status = luajit("tests/fixtures/experiments/vectors.lua", "--report --out 'a<b'") -- which does all of it
    assert.equal(0, status, out)
    assert.equal(before, read "a<b/report.html")
    assert.truthy(read "a<b/compare.csv")
    lfs.mkdir(scratch .. "/empty")
    for folder, expected in pairs { empty = "empty holds no run (config.json) and no series (series.json)",
      nowhere = "nowhere holds no run" } do
      out, status = luajit("experiments/report.lua", folder)
      assert.equal(2, status, out)
      assert.truthy(out:find(expected, 1, true), out)
    end
  end)
end)
