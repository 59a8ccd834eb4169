-- The quantizer's benchmark as a user runs it, without PyTorch and at a size where times mean nothing: flags, results,
-- errors against float64. And the steps of kernels/lab, which only have to agree with float64 here.

local H = require "tests.helper"
local core = require "vertex.core"
local shell = H.shell

local function bench(arguments) return shell("luajit experiments/bench/quantizer.lua " .. arguments) end

--- The rows of a CSV file as tables by column name; fails where a row has more or fewer cells than the header.
local function rows_of(path)
  local rows, columns = {}, nil
  for line in H.read(path):gmatch "[^\n]+" do
    local cells = {}
    for cell in (line .. ","):gmatch "([^,]*)," do cells[#cells + 1] = cell end
    if columns then
      assert.equal(#columns, #cells, line)
      local row = {}
      for i, name in ipairs(columns) do row[name] = cells[i] end
      rows[#rows + 1] = row
    else
      columns = cells
    end
  end
  return rows
end

describe("the quantizer's benchmark", function()
  it("names its sections, shapes and baselines under --help", function()
    local text, status = bench "--help"
    assert.equal(0, status)
    for _, word in ipairs { "op ", "regularizer ", "gumbel ", "assign ", "sweep ", "large ", "late ", "NxDxMxK",
      "naive", "cdist", "faiss", "sklearn", "--python", "--memory", "--against", "--latents" } do
      assert.is_truthy(text:find(word, 1, true), word)
    end
  end)

  it("refuses what it does not know, and says what it knows", function()
    local rows = H.scratch "rows.safetensors"
    H.vx.save(rows, { z = H.vx.randn { 200, 1, 3 } })
    for arguments, texts in pairs {
      ["--sections late --latents " .. rows] = { "has no codebook" },
      ["--sections op,nothing"] = { "unknown section 'nothing'", "regularizer" },
      ["--shapes Q"] = { "unknown shape 'Q'", "NxDxMxK" },
      ["--shapes 4x8x16x5"] = { "K at most N" },
      ["--methods softmax-knn"] = { "unknown method 'softmax-knn'", "softmax-knn-ce" },
      ["--rounds 0"] = { "--rounds", "above 0" },
      ["--clock processor --threads 2"] = { "--clock processor", "--threads 1" },
    } do
      local text, status = bench(arguments .. " --python none --out " .. H.scratch "refused")
      assert.equal(2, status, text)
      for _, wanted in ipairs(texts) do assert.is_truthy(text:find(wanted, 1, true), text) end
    end
  end)

  it("writes a row for every op and shape, with errors that are float32's", function()
    local out = H.scratch "bench"
    local text, status = bench("--sections op,assign --shapes 200x3x70x4,96x32x130x2 --python none --rounds 1 "
      .. "--seconds 0.01 --out " .. out)
    assert.equal(0, status, text)
    local csv = text:match "(%S+%.csv)"
    local rows, seen = rows_of(csv), {}
    assert.equal(8, #rows)
    for _, row in ipairs(rows) do
      seen[row.section .. " " .. row.shape .. " " .. row.method] = true
      assert.equal("vertex", row.side)
      assert.equal("0", row.codes_differ)
      for _, name in ipairs { "ms", "ms_min", "extra_bytes", "floor_ms", "floor_percent", "fma", "exp2", "compare" } do
        assert.is_true(tonumber(row[name]) > 0, name .. ": " .. row[name])
      end
      if row.section == "op" then
        assert.equal("0", row.near_differ)
        for name, most in pairs { quantized = 1e-5, reg = 5e-5, dz = 1e-4, dcodebook = 1e-4, dlog_tau = 1e-3 } do
          assert.is_true(tonumber(row[name]) <= most, name .. ": " .. row[name])
        end
      end
    end
    for _, shape in ipairs { "200x3x70x4", "96x32x130x2" } do
      for _, op in ipairs { "op %s softmax-knn-ce", "op %s softmax-knn-l2", "assign %s euclid", "assign %s cosine" } do
        assert.is_true(seen[op:format(shape)], op)
      end
    end
    local tables = H.read((csv:gsub("csv$", "txt")))
    assert.is_truthy(tables:find("Smoothed quantizer", 1, true) and tables:find("Nearest code", 1, true))

  end)
end)

describe("the quantizer's benchmark late in training", function()
  local library = os.getenv "VERTEX_LIB" or core.root .. "/build/libvertex.so"
  local small = "--python none --rounds 1 --seconds 0.01 --methods softmax-knn-ce --against " .. library

  it("runs rows near codes at each temperature, and another build beside each; the rows of a run; again", function()
    local out, vx = H.scratch "late", H.vx
    local text, status = bench(small .. " --sections late --shapes 300x3x80x4 --taus 0.1,0.01 --threads 1 --clock "
      .. "processor --out " .. out)
    assert.equal(0, status, text)
    local csv, seen = text:match "(%S+%.csv)", {}
    local written, lines = H.read(csv), #rows_of(csv)
    for _, row in ipairs(rows_of(csv)) do
      seen[row.method .. " " .. row.tau .. " " .. (row.side:match "^build" or row.side)] = true
      assert.is_true(tonumber(row.ms) > 0)
      if row.side == "vertex" then assert.equal("0", row.codes_differ) end
    end
    for _, tau in ipairs { 0.1, 0.01 } do
      assert.is_true(seen[("softmax-knn-ce %g vertex"):format(tau)] and seen[("softmax-knn-ce %g build"):format(tau)])
    end
    assert.is_true(seen["euclid 0.01 vertex"] and seen["cosine 0.01 build"])

    local file = H.scratch "late.safetensors"
    vx.save(file, { z = vx.randn { 300, 1, 3 }, codebook = vx.randn { 1, 80, 3 },
      log_tau = vx.tensor { math.log(0.02) } })
    text, status = bench(small .. " --sections late --errors no --threads 1 --clock processor --latents " .. file
      .. " --neighbours 3 --out " .. out)
    assert.equal(0, status, text)
    local row
    for _, r in ipairs(rows_of(csv)) do row = r.K == "3" and r.method == "softmax-knn-ce" and r or row end
    assert.is_true(row.N == "300" and row.M == "80" and math.abs(row.tau - 0.02) < 1e-6)
    assert.equal(lines + 6, #rows_of(csv))

    text, status = bench(small .. " --sections late --errors no --shapes 300x3x80x4 --taus 0.01 --threads 1 --clock "
      .. "processor --out " .. out)
    assert.equal(0, status, text)
    assert.equal(lines + 6, #rows_of(csv), "what runs again takes the place of what it wrote")
    assert.is_true(H.read(csv) ~= written)
  end)
end)

describe("gpu.sh", function()
  local function gpu(arguments) return shell("experiments/bench/gpu.sh " .. arguments) end

  it("refuses what it cannot use, and measures nothing without the device", function()
    local full = H.scratch "full"
    assert(require("lfs").mkdir(full))
    H.write(full .. "/thesis.txt", "words")
    for arguments, expected in pairs {
      [""] = "gpu.sh OUT", ["--dry"] = "gpu.sh OUT", ["a b"] = "gpu.sh OUT", ["a --rounds 3"] = "gpu.sh OUT",
        ["a --data"] = "gpu.sh OUT",
      ["a --seconds x"] = "--seconds x: expected a number", ["a --data nowhere"] = "nowhere: no such folder",
        [full] = "is not empty",
    } do
      local text, status = gpu(arguments)
      assert.equal(2, status, text)
      assert.is_truthy(text:find(expected, 1, true), text)
    end
    local out = H.scratch "nothing"
    local text, status = gpu(out .. " --device cuda:77")
    assert.equal(1, status, text)
    assert.is_truthy(text:find("no measurements: device 'cuda:77'", 1, true), text)
    assert.equal(text, H.read(out .. "/summary.txt"))
  end)

  it("runs all its parts on the emulator, and leaves a file of each #slow", function()
    local out = H.scratch "gpu"
    local text, status = gpu(out .. " --dry")
    assert.equal(0, status, text)
    assert.equal(text, H.read(out .. "/summary.txt"))
    for line in text:gmatch "[^\n]+" do
      local name, said = line:match "^(%S+) +(.-)%s*$"
      if name ~= "sanitizer" then
        assert.is_truthy(said:find "^ok ", line)
        assert.is_true(#H.read(out .. "/" .. name .. ".txt") > 0, name)
      end
    end
    local modes = {}
    for _, row in ipairs(rows_of(out .. "/ae.csv")) do
      modes[#modes + 1] = row.method .. " " .. row.dtype .. " " .. row.graph
      assert.is_true(tonumber(row.vertex_ms) > 0)
    end
    table.sort(modes)
    assert.same({ "none bf16 on", "none f32 on", "softmax-knn-ce bf16 on", "softmax-knn-ce f32 off",
      "softmax-knn-ce f32 on" }, modes)
    local sides = {}
    for _, row in ipairs(rows_of(out .. "/errors/quantizer-emu-0.csv")) do
      sides[row.side] = true
      if row.side == "vertex" then assert.is_true(tonumber(row.dz) < 1e-4 and row.near_differ == "0") end
    end
    assert.same({ vertex = true, ["vertex graph"] = true }, sides)
    assert.is_truthy(H.read(out .. "/train/results.csv"):find "\nste%-euclid,")
  end)
end)

describe("the benchmark of a pretraining step", function()
  it("times steps without PyTorch, and measures the memory of clips", function()
    local folder = H.scratch "w2v-step"
    local out, status = shell(("luajit experiments/bench/w2v_step.lua --python none --presets tiny --batch 2 --rounds "
      .. "1 --seconds 1 --methods none,softmax-knn-ce --csv '%s.csv' 2>&1"):format(folder))
    assert.equal(0, status, out)
    for _, row in ipairs(rows_of(folder .. ".csv")) do
      assert.is_true(tonumber(row.vertex_ms) > 0)
      assert.same({ "tiny", "2", "" }, { row.preset, row.batch, row.torch })
    end
    out, status = shell "luajit experiments/bench/w2v_step.lua --presets tiny --frames 20,40 2>&1"
    assert.equal(0, status, out)
    local of = {}
    for T, mb in out:gmatch "(%d+) frames: +[%d.]+ MB at the peak, +([%d.]+) MB" do of[tonumber(T)] = tonumber(mb) end
    assert.is_true(of[20] > 0 and of[40] > of[20] and of[40] < 3 * of[20], out)
  end)
end)

describe("kernels/lab", function()
  it("agrees with float64 in every step #slow", function()
    local text, status = shell "kernels/lab/run.sh --quick"
    assert.equal(0, status, text)
    assert.is_nil(text:find("FAILED", 1, true), text)
    local steps = select(2, text:gsub("\n *%d+ %w", ""))
    assert.equal(7 + 8 + 6 + 8 + 7 + 7 + 5 + 7 + 6 + 6, steps, text)
  end)

  for _, variant in ipairs(core.cpu_variants()) do
    if variant.name:find "^amx" and variant.runs then
      local title = "finds the products of AMX tiles as exact as float32's, with VERTEX_SIMD="
      it(title .. H.tagged(variant.name), function()
        local text, status = shell(("VERTEX_SIMD=%s kernels/lab/run.sh --quick amx"):format(variant.name))
        assert.equal(0, status, text)
        assert.equal(5, select(2, text:gsub("\n *%d+ +%d+%.%d+ ", "")), text)
      end)
    end
  end
end)
