-- runs/: what stands around the training loop of any experiment. Runs tests/fixtures/experiments/vectors.lua, which is
-- one file and knows no images, in child processes; and scripts from everywhere.

local H = require "tests.helper"
local lfs = require "lfs"
local experiment = require "vertex.runs.experiment"
local json = require "vertex.json"
local vx = require "vertex"

local scratch, library

local function luajit(script, arguments, before)
  return H.shell(("cd '%s' && VERTEX_LIB='%s' %s luajit '%s' %s"):format(scratch, library, before or "", script,
    arguments))
end

local function vectors(...) return luajit(H.root .. "/tests/fixtures/experiments/vectors.lua", ...) end
local function read(path) return assert(H.read(scratch .. "/" .. path), path) end

setup(function()
  library = os.getenv "VERTEX_LIB" or H.root .. "/build/libvertex.so"
  scratch = H.scratch "runs"
  assert(lfs.mkdir(scratch))
end)

describe("a meter", function()
  it("averages numbers and tensors between two looks", function()
    local meter = vx.runs.meter()
    assert.same({}, meter:take())
    for i = 1, 4 do
      vx.step(function() meter:add { number = i, tensor = vx.full({}, 2 * i), sometimes = i > 2 and vx.full({ 1 }, i)
        or nil } end)
    end
    assert.same({ number = 2.5, tensor = 5, sometimes = 3.5 }, meter:take())
    meter:add { tensor = vx.full({}, 7) }
    assert.same({ tensor = 7 }, meter:take())
  end)
end)

describe("code use", function()
  it("counts over batches and columns, and leaves out what is masked", function()
    local used = vx.metrics.code_use(4, 2)
    local function codes(t) return vx.tensor(t, { dtype = "i32" }) end
    used:add(codes { { 0, 3 }, { 1, 3 } })
    assert.equal(3 / 8, used:share()) -- 2 of 4 in the first column, 1 of 4 in the second
    used:add(codes { { -1, -1 }, { 2, 0 }, { 3, -1 } }, { masked = true })
    assert.equal(6 / 8, used:share())
    H.close({ used:perplexity() }, { (4 + math.exp(-(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3)))) / 2 }, 1e-12)
    used:clear()
    assert.equal(0, used:share())
    assert.is_true(used:perplexity() ~= used:perplexity())
  end)

  it("refuses numbers that are none", function()
    H.raises(function() vx.metrics.code_use(0) end, "code_use: codes is 0, expected an integer of 1 or more")
    H.raises(function() vx.metrics.code_use(4, 1.5) end, "columns is 1.5")
  end)
end)

describe("what is summed over steps", function()
  it("goes through a checkpoint", function()
    local path, model = scratch .. "/sums.safetensors", vx.nn.Linear(2, 2)
    local function anew() return { meter = vx.runs.meter(), used = vx.metrics.code_use(4) } end
    local function add(sums, i)
      sums.meter:add { number = 0.1 * i, loss = vx.full({}, i / 3), row = vx.full({ 1 }, i), bad = 0 / 0 }
      sums.used:add(vx.tensor({ { i }, { 0 } }, { dtype = "i32" }))
    end
    local whole, before, after = anew(), anew(), anew()
    for i = 1, 3 do add(whole, i) end
    for i = 1, 2 do add(before, i) end
    vx.runs.checkpoint.save(path, { model = model, sums = before }, { step = 2 })
    vx.runs.checkpoint.load(path, { model = model, sums = after })
    add(after, 3)
    assert.equal(0.5, before.used:share() - 0.25)
    assert.equal(whole.used:share(), after.used:share())
    assert.equal(whole.used:perplexity(), after.used:perplexity())
    local expected, means = whole.meter:take(), after.meter:take()
    for _, name in ipairs { "number", "loss", "row" } do assert.equal(expected[name], means[name]) end
    assert.is_true(means.bad ~= means.bad)
    vx.runs.checkpoint.load(path, { model = model }) -- by who sums nothing
  end)
end)

describe("an experiment of another modality", function()
  it("sweeps two methods and leaves its own columns, table and picture", function()
    local output, status = vectors "--methods ste-euclid,softmax-knn-ce --out v --noise 0.2"
    assert.equal(0, status, output)
    local csv = read "v/results.csv"
    assert.equal("method,seed,distance,codes_used,steps,seconds", csv:match "^[^\n]+")
    local distance, used = csv:match "\nste%-euclid,1,([%d.]+),(%d+),20,"
    assert.truthy(tonumber(distance) > 0 and tonumber(used) >= 1, csv)
    local text = read "v/table.md"
    assert.equal("# small, noise 0.2\n\n| Method | Distance | Codes | Time |\n|:--|--:|--:|--:|\n| ste-euclid | ",
      text:match "^.-| ste%-euclid | ")
    assert.truthy(text:find("\n\nDistance: mean over new vectors of |x - q(x)|.\n", 1, true), text)
    -- the lower distance and the greater number of codes are the best
    local rows = {}
    for a, b in csv:gmatch "\n[%w-]+,1,([%d.e-]+),(%d+)," do rows[#rows + 1] = { tonumber(a), tonumber(b) } end
    assert.truthy(text:find(("**%.3f**"):format(math.min(rows[1][1], rows[2][1])), 1, true), text)
    assert.truthy(text:find(("**%d**"):format(math.max(rows[1][2], rows[2][2])), 1, true), text)
    assert.truthy(output:find("Method +Distance +Codes +Time\n"), output)
    assert.truthy(output:find("results.csv, table.md, curves.png, report.html in v", 1, true), output)
    assert.equal("\137PNG", read("v/curves.png"):sub(1, 4))
    assert.same({ batch = 32, experiment = "vectors", methods = { "ste-euclid", "softmax-knn-ce" }, noise = 0.2,
      preset = "small", seed = 1, steps = 20 }, json.decode(read "v/config.json"))
  end)

  it("resumes: the same bits after a kill, nothing twice", function()
    local before = read "v/results.csv"
    local output, status = vectors "--out v --resume"
    assert.equal(0, status, output)
    assert.truthy(output:find "ste%-euclid +finished before", output)
    assert.equal(before, read "v/results.csv")
    local common = "--methods re-cosine --steps 300 --checkpoint 0 --resume --out "
    output, status = vectors(common .. "whole")
    assert.equal(0, status, output)
    local command = "cd '%s' && export VERTEX_LIB='%s'; luajit '%s/tests/fixtures/experiments/vectors.lua' %skilled"
      .. " & pid=$!; until [ -e killed/checkpoints/re-cosine.safetensors ]; do kill -0 $pid || exit; sleep 0.005; done;"
      .. " kill -9 $pid; wait $pid"
    H.shell(command:format(scratch, library, H.root, common))
    assert.is_nil(H.read(scratch .. "/killed/table.md"), "the run was never interrupted")
    output, status = vectors(common .. "killed")
    assert.equal(0, status, output)
    assert.equal(read "whole/metrics.jsonl", read "killed/metrics.jsonl")
    local function without_time(out) return (read(out .. "/results.csv"):gsub(",[%d.e-]+\n", "\n")) end
    assert.equal(without_time "whole", without_time "killed")
  end)

  it("goes on with the next method where one fails, and says so in the table and at the end", function()
    lfs.mkdir(scratch .. "/q")
    H.write(scratch .. "/q/fragile.lua", [[
      local core, registry = require "vertex.core", require "vertex.quantizers"
      local Fragile = registry.Quantizer.extend "Fragile"
      function Fragile:quantize(z)
        if self.steps > 2 and not os.getenv "MENDED" then core.fail "no | third step" end
        return { quantized = z, codes = core.new({ z:size(1), self.columns }, { dtype = "i32" }):zero(), terms = {} }
      end
      return { order = 90, kind = "hard", metric = "cosine", codebook = true, class = Fragile, options = {},
        names = { { name = "fragile", summary = "breaks", paper = "none" } } }
    ]])
    local flags = "--quantizers q --methods ste-euclid,fragile,re-cosine --steps 4 --out fails"
    local output, status = vectors(flags)
    assert.equal(1, status, output)
    assert.truthy(output:find("\nfragile +failed: no | third step\n"), output)
    assert.truthy(read("fails/table.md"):find("\n| fragile | failed: no ¦ third step |  |  |\n", 1, true),
      read "fails/table.md")
    local csv = read "fails/results.csv"
    assert.truthy(csv:find "\nste%-euclid," and csv:find "\nre%-cosine," and not csv:find "fragile", csv)
    output, status = vectors(flags .. " --resume", "MENDED=1")
    assert.equal(0, status, output)
    assert.truthy(output:find "ste%-euclid +finished before", output)
    assert.truthy(read("fails/results.csv"):find "\nfragile,1,")
    output, status = vectors "--quantizers q --methods fragile --steps 4 --out alone"
    assert.equal(1, status, output)
    assert.truthy(read("alone/report.html"):find("failed: no ¦ third step", 1, true))
  end)

  it("keeps a second process out of its folder, and clears away what a killed one left", function()
    local flags = "--methods re-cosine --steps 100000 --checkpoint 0 --quiet --out shared"
    local script = H.root .. "/tests/fixtures/experiments/vectors.lua"
    local command = "cd '%s' && export VERTEX_LIB='%s'; luajit '%s' %s & pid=$!;"
      .. " until [ -e shared/checkpoints/re-cosine.safetensors ]; do kill -0 $pid || exit 9; sleep 0.005; done;"
      .. " luajit '%s' %s --resume; echo status $?; kill -9 $pid; wait $pid"
    local output = H.shell(command:format(scratch, library, script, flags, script, flags))
    local who = output:match "^%-%-out shared is in use by (.-); nothing was changed\nstatus 2"
    assert.truthy(who, output)
    who = who:match "^process %d+ on %S+, since [%d%-]+ [%d:]+ UTC: (.*)$"
    assert.equal(("luajit %s %s"):format(script, flags), who)
    for _, name in ipairs { "curves.png", "checkpoints/re-cosine.safetensors" } do
      H.write(("%s/shared/%s.4711.tmp"):format(scratch, name), "half")
    end
    local status
    output, status = vectors "--methods re-cosine --out shared --resume --steps 3"
    assert.equal(2, status, output) -- refused, but as another experiment: the folder is free
    assert.truthy(output:find("its steps is 100000, asked for is 3 (it may grow)", 1, true), output)
    local config = read "shared/config.json"
    H.write(scratch .. "/shared/config.json", (config:gsub("100000", "3")))
    os.remove(scratch .. "/shared/checkpoints/re-cosine.safetensors")
    output, status = vectors "--methods re-cosine --out shared --resume --steps 3"
    assert.equal(0, status, output)
    for _, folder in ipairs { "shared", "shared/checkpoints" } do
      for entry in lfs.dir(scratch .. "/" .. folder) do assert.falsy(entry:find "tmp$", entry) end
    end
  end)

  it("lets --steps grow: the same bits as that many from the start, where no schedule says otherwise", function()
    local common = "--methods sgumbel-knn-ce,re-cosine --noise 0.5 --out "
    local output, status = vectors(common .. "long --steps 30")
    assert.equal(0, status, output)
    for _, steps in ipairs { 10, 20, 30 } do
      output, status = vectors(("%sgrown --resume --steps %d"):format(common, steps))
      assert.equal(0, status, output)
      assert.equal(steps == 10, not output:find("steps at first; on to", 1, true), output)
    end
    local function entries(out)
      local list = {}
      for line in read(out .. "/metrics.jsonl"):gmatch "[^\n]+" do list[#list + 1] = line end
      table.sort(list)
      return list
    end
    assert.same(entries "long", entries "grown")
    local function without_time(out) return (read(out .. "/results.csv"):gsub(",[%d.e-]+\n", "\n")) end
    assert.equal(without_time "long", without_time "grown")
    assert.same({ 10, 20 }, setmetatable(json.decode(read "grown/config.json").lengthened_from, nil))
    assert.truthy(read("grown/table.md"):find("Trained for 10, 20 steps at first, and on to 30 with the schedule of 30",
      1, true))
    for arguments, expected in pairs {
      ["--steps 40 --methods re-cosine"] = "go on from 30 together, and --methods leaves out sgumbel-knn-ce",
      ["--steps 20"] = "its steps is 30, asked for is 20 (it may grow)",
      ["--steps 40 --noise 2"] = "its noise is 0.5, asked for is 2" } do
      output, status = vectors("--out grown --resume " .. arguments)
      assert.equal(2, status, output)
      assert.truthy(output:find(expected, 1, true), output)
    end
  end)

  it("leaves table and pictures of what is finished at Ctrl-C, and draws them again at any time", function()
    local flags = "--methods ste-euclid,re-cosine --steps 2000 --checkpoint 0 --out cut"
    local script = H.root .. "/tests/fixtures/experiments/vectors.lua"
    local command = "cd '%s' && export VERTEX_LIB='%s'; luajit '%s' %s >cut.txt 2>&1 & pid=$!;"
      .. " until [ -e cut/checkpoints/re-cosine.safetensors ]; do kill -0 $pid || exit 9; sleep 0.005; done;"
      .. " luajit '%s' --report --out cut; mv cut/table.md cut/curves.png .; kill -INT $pid; wait $pid; echo status $?"
    local output = H.shell(command:format(scratch, library, script, flags, script))
    assert.truthy(output:find("status 130", 1, true), output)
    local said = read "cut.txt"
    local files = "results.csv, table.md, curves.png, report.html in cut\n"
    assert.truthy(said:find(files .. "stopped; go on with: luajit ", 1, true), said)
    assert.equal(read "table.md", read "cut/table.md") -- of the finished method, while the next was trained and after
    assert.truthy(read("table.md"):find("| ste-euclid |", 1, true) and not read("table.md"):find("re-cosine", 1, true))
    assert.equal("\137PNG", read("curves.png"):sub(1, 4))
    local status
    os.remove(scratch .. "/cut/table.md")
    output, status = vectors "--report --out cut"
    assert.equal(0, status, output)
    assert.equal(read "table.md", read "cut/table.md")
    for folder, expected in pairs { nowhere = "--report: nowhere holds no run" } do
      output, status = vectors("--report --out " .. folder)
      assert.equal(2, status, output)
      assert.truthy(output:find(expected, 1, true), output)
    end
  end)

  it("shows how far all methods are, in what the terminal has room for", function()
    local function line(columns, text)
      local bar = vx.runs.progress(("%-15s"):format "re-cosine", { total = 8, quiet = true })
      return bar:line(2, text, "left 0:12  method 2 of 3, total left 1:30", columns)
    end
    local text = "loss 0.4521  codes 100%  ppl 245  1640 images/s"
    assert.equal("re-cosine       ━━━━━╌╌╌╌╌╌╌╌╌╌╌╌╌╌╌  25%  loss 0.4521  left 0:12  method 2 of 3, total left 1:30",
      line(98, "loss 0.4521"))
    for columns = 0, 40 do assert.is_string(line(columns, text)) end -- a terminal that does not know its width has 0
    for columns = 70, 160 do
      local shown = line(columns, text)
      assert.is_true(require("vertex.utf8").length(shown) < columns, shown)
      assert.truthy(shown:find("25%%  .*left 0:12  method 2 of 3, total left 1:30$"), shown)
    end
    assert.truthy(line(160, text):find(text, 1, true))
    local output, status = vectors "--methods ste-euclid,re-cosine --out watched"
    assert.equal(0, status, output)
    assert.truthy(output:find("re%-cosine +%d+/20 .- left 0:%d+  method 2 of 2, total left 0:%d+\n"), output)
  end)

  it("has its own words and flags, and none of another's", function()
    local output, status = vectors "--help"
    assert.equal(0, status)
    for _, text in ipairs { "Vectors per step", "--noise X", "distance", "small, wide; default small" } do
      assert.truthy(output:find(text, 1, true), text)
    end
    for _, text in ipairs { "mage", "--data", "--epochs", "--strict", "--graph", "--autocast" } do
      assert.falsy(output:find(text, 1, true), text)
    end
  end)

  it("refuses before anything is written: its own flags, its own checks, methods it does not know", function()
    for arguments, expected in pairs {
      ["--noise -1"] = "--noise: expected a number of 0 or more",
      ["--noise much"] = "noise",
      ["--batch 12"] = "--batch: expected a multiple of 8",
      ["--data x"] = "unknown option '--data'",
      ["--methods paper,nothing"] = "unknown method 'nothing'; known: paper, all, ",
    } do
      local output, status = vectors(arguments .. " --out refused")
      assert.equal(2, status, output)
      assert.truthy(output:find(expected, 1, true), arguments .. ": " .. output)
      assert.is_nil(lfs.attributes(scratch .. "/refused", "mode"))
    end
    local output, status = vectors "--out v --resume --noise 0.3"
    assert.equal(2, status)
    assert.truthy(output:find("its noise is 0.2, asked for is 0.3", 1, true), output)
  end)

  it("runs the paper's methods where none are named, all without the ablations with all", function()
    local output, status = vectors "--steps 1 --quiet --out p"
    assert.equal(0, status, output)
    local paper = json.decode(read "p/config.json").methods
    assert.equal(13, #paper)
    assert.same({ "ste-euclid", "softmax-knn-ce" }, { paper[1], paper[13] })
    output, status = vectors "--steps 1 --quiet --out all --methods all"
    assert.equal(0, status, output)
    local wanted = {}
    for _, item in ipairs(vx.quantizers()) do
      if not item.ablation then wanted[#wanted + 1] = item.name end
    end
    assert.same(wanted, json.decode(read "all/config.json").methods)
  end)

  it("is told what its declaration lacks", function()
    local function declare(changes)
      local spec = { name = "x", summary = "s", presets = { a = {} }, preset = "a",
        columns = { { name = "c", title = "C", format = "%d", from = "f" } } }
      for key, value in pairs(changes) do spec[key] = value end
      return function() experiment(spec) end
    end
    declare {}()
    local column = { name = "c", title = "C", format = "%d", from = "f" }
    local function with(key, value)
      local c = {}
      for k, v in pairs(column) do c[k] = v end
      c[key] = value
      return { columns = { c } }
    end
    for expected, changes in pairs {
      ["its name should be letters"] = { name = "a b" }, ["it has no summary"] = { summary = "" },
      ["presets has no 'b'"] = { preset = "b" },
      ["column 'c' has no title"] = with("title", false), ["column 'c' has no from"] = with("from", ""),
      ["better is 'big', expected 'high', 'low'"] = with("better", "big"),
      ["format is a number"] = with("format", 3),
      ["name is c d, expected letters"] = with("name", "c d"),
      ["column 'c' is declared twice"] = { columns = { column, column } },
      ["column 'fid' is none of the runs' own"] = { columns = { "fid" } },
      ["names no column 'd'"] = { table = { columns = { "d" } } },
      ["flags[1] should be"] = { flags = { "strict" } },
      ["pictures[1] should be"] = { pictures = { print } },
    } do
      local ok, message = pcall(declare(changes))
      assert.is_false(ok, expected)
      assert.truthy(message:find(expected, 1, true), message)
    end
  end)
end)

describe("a script", function()
  local SCRIPTS = { -- what shows that it runs: arguments, and text it writes
    ["experiments/ae_sweep.lua"] = { "--help", "Usage: ae_sweep" },
    ["experiments/compare.lua"] = { "--help", "Usage: compare" },
    ["experiments/simplex_figures.lua"] = { "--help", "Usage: simplex_figures" },
    ["experiments/readme_table.lua"] = { "--check", "up to date", "out of date" },
    ["experiments/bench/ae_step.lua"] = { "--help", "Usage: ae_step" },
    ["experiments/bench/quantizer.lua"] = { "--help", "Usage: quantizer" },
    ["notebooks/run.lua"] = { "", "which notebook?" },
    ["lua/repl.lua"] = { "--help", "interactive session" },
    ["lua/vertex/interactive/jupyter.lua"] = { "", "install" },
    ["tests/fixtures/experiments/vectors.lua"] = { "--help", "Usage: vectors" },
  }

  it("finds its modules from any folder and through symbolic links", function()
    assert(lfs.mkdir(scratch .. "/links"))
    for path, case in pairs(SCRIPTS) do
      local folder, file = path:match "^(.*)/([^/]+)$"
      assert(lfs.link(H.root .. "/" .. path, scratch .. "/links/link.lua", true))
      assert(lfs.link(H.root .. "/" .. folder, scratch .. "/links/folder", true))
      for _, command in ipairs {
        ("cd '%s' && luajit %s"):format(H.root, path),
        ("cd '%s/%s' && luajit %s"):format(H.root, folder, file),
        ("cd '%s/%s' && luajit ../%s/%s"):format(H.root, folder, folder:match "[^/]+$", file),
        ("cd '%s' && luajit links/link.lua"):format(scratch),
        ("cd '%s/links' && luajit folder/%s"):format(scratch, file),
      } do
        local output = H.shell(("export VERTEX_LIB='%s'; %s %s </dev/null"):format(library, command, case[1]))
        local found = output:find(case[2], 1, true) or case[3] and output:find(case[3], 1, true)
        assert.truthy(found, command .. ": " .. output)
        assert.falsy(output:find("traceback", 1, true), output)
      end
      os.remove(scratch .. "/links/link.lua")
      os.remove(scratch .. "/links/folder")
    end
  end)
end)
