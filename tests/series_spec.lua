-- --seeds and --grid: a folder of runs, each a process of its own, and the comparison over them. Runs
-- tests/fixtures/experiments/vectors.lua.

local H = require "tests.helper"
local lfs = require "lfs"

local scratch = H.scratch "series"
local script = H.root .. "/tests/fixtures/experiments/vectors.lua"
local library = os.getenv "VERTEX_LIB" or H.root .. "/build/libvertex.so"

local function vectors(arguments)
  return H.shell(("cd '%s' && VERTEX_LIB='%s' luajit '%s' --device cpu --methods ste-euclid,softmax-knn-ce %s 2>&1")
    :format(scratch, library, script, arguments))
end

local function read(path) return assert(H.read(scratch .. "/" .. path), path) end

--- results.csv of a run without the time, which is its last column.
local function results(folder) return (read(folder .. "/results.csv"):gsub(",[%d.]+\n", "\n")) end

describe("a series", function()
  setup(function() assert(lfs.mkdir(scratch)) end)

  it("is a run for each value and seed, in their order, and the mean over seeds", function()
    local out, status = vectors "--steps 3 --seeds 3,1-2 --grid codes=8,16 quantizer.k=1 --out a"
    assert.equal(0, status, out)
    local names = {}
    for name in out:gmatch "run %d of 6: (%S+)" do names[#names + 1] = name end
    assert.same({ "codes=8,quantizer.k=1,seed=3", "codes=8,quantizer.k=1,seed=1", "codes=8,quantizer.k=1,seed=2",
      "codes=16,quantizer.k=1,seed=3", "codes=16,quantizer.k=1,seed=1", "codes=16,quantizer.k=1,seed=2" }, names)
    local sum, squares = 0, 0
    for seed = 1, 3 do
      local distance = tonumber(read(("a/codes=16,quantizer.k=1,seed=%d/results.csv"):format(seed))
        :match "ste%-euclid,%d,([^,]+)")
      sum, squares = sum + distance, squares + distance ^ 2
    end
    local mean, sd = read("a/compare.csv"):match "\ncodes=16,ste%-euclid,3,([^,]+),([^,]+)"
    assert.is_true(math.abs(mean - sum / 3) < 1e-6)
    assert.is_true(math.abs(sd - math.sqrt((squares - sum ^ 2 / 3) / 2)) < 1e-5)
    assert.truthy(out:find(read "a/table.md", 1, true), "the table is printed")
    assert.is_true(lfs.attributes(scratch .. "/a/curves.png", "size") > 1000)

    -- one of them by itself is the same run
    out, status = vectors "--steps 3 --seed 2 --set codes=16 --set quantizer.k=1 --out alone"
    assert.equal(0, status, out)
    assert.equal(results "alone", results "a/codes=16,quantizer.k=1,seed=2")
  end)

  it("goes on where it stopped, and takes more seeds", function()
    local before = read "a/compare.csv"
    local out, status = H.shell(("cd '%s' && VERTEX_LIB='%s' luajit '%s' --out a --resume 2>&1"):format(scratch,
      library, script))
    assert.equal(0, status, out)
    assert.equal(before, read "a/compare.csv")
    assert.equal(select(2, out:gsub("finished before", "")), 12)
    out, status = vectors "--steps 3 --seeds 1-4 --grid codes=16 quantizer.k=1 --out a --resume"
    assert.equal(0, status, out)
    assert.truthy(read("a/compare.csv"):find("\n,ste-euclid,4,", 1, true))
  end)

  it("stops at Ctrl-C with what is finished, and goes on to the same bits", function()
    local flags = "--steps 400 --checkpoint 0 --seeds 1-2 --methods ste-euclid "
    local out, status = vectors(flags .. "--out whole")
    assert.equal(0, status, out)
    local command = ("cd '%s' && export VERTEX_LIB='%s'; luajit '%s' --device cpu %s --out parts > said 2>&1 & pid=$!; "
      .. "while [ ! -s parts/seed=1/results.csv ] || [ ! -s parts/seed=2/checkpoints/ste-euclid.safetensors ]; "
      .. "do kill -0 $pid || exit 9; sleep 0.02; done; kill -INT $pid; wait $pid"):format(scratch, library, script,
      flags)
    out, status = H.shell(command)
    assert.equal(130, status, out .. read "said")
    assert.truthy(read("said"):find("--out parts --resume", 1, true))
    assert.truthy(read("parts/table.md"):find("ste-euclid | 1 ", 1, true), read "parts/table.md")
    out, status = vectors "--methods ste-euclid --out parts --resume"
    assert.equal(0, status, out)
    for seed = 1, 2 do
      local folder = "/seed=" .. seed
      assert.equal(results("whole" .. folder), results("parts" .. folder))
      assert.equal(read("whole" .. folder .. "/metrics.jsonl"), read("parts" .. folder .. "/metrics.jsonl"))
    end
  end)

  it("takes its run with it when it is killed", function()
    local command = ("cd '%s' && export VERTEX_LIB='%s'; luajit '%s' --device cpu --steps 100000 --seeds 1 "
      .. "--checkpoint 0 --methods ste-euclid --out killed > said 2>&1 & pid=$!; "
      .. "while [ ! -s killed/seed=1/checkpoints/ste-euclid.safetensors ]; "
      .. "do kill -0 $pid || exit 9; sleep 0.02; done; "
      .. "kill -KILL $pid; wait $pid; for i in $(seq 500); do flock -n killed/seed=1/.lock true && exit 0; "
      .. "sleep 0.02; done; exit 8"):format(scratch, library, script)
    local out, status = H.shell(command)
    assert.equal(0, status, out)
  end)

  it("goes past a run that fails, and says which", function()
    lfs.mkdir(scratch .. "/q")
    H.write(scratch .. "/q/fragile.lua", [[
      local core, registry = require "vertex.core", require "vertex.quantizers"
      local Fragile = registry.Quantizer.extend "Fragile"
      function Fragile:quantize(z)
        if self.options.seed == 2 then core.fail "seed 2 is not to its taste" end
        return { quantized = z, codes = core.new({ z:size(1), self.columns }, { dtype = "i32" }):zero(), terms = {} }
      end
      return { order = 90, kind = "hard", metric = "cosine", codebook = true, class = Fragile, options = {},
        names = { { name = "fragile", summary = "breaks", paper = "none" } } }
    ]])
    local out, status = H.shell(("cd '%s' && VERTEX_LIB='%s' luajit '%s' --device cpu --quantizers q --methods fragile "
      .. "--steps 2 --seeds 1-3 --out failing 2>&1"):format(scratch, library, script))
    assert.equal(1, status, out)
    assert.truthy(out:find("seed 2 is not to its taste", 1, true), out)
    assert.truthy(out:find("failed: seed=2: exit status 1", 1, true), out)
    assert.truthy(read("failing/compare.csv"):find("\n,fragile,2,", 1, true), read "failing/compare.csv")
  end)

  it("refuses what cannot be had, and leaves nothing behind", function()
    for arguments, expected in pairs {
      ["--seeds 3-1"] = "'3-1': expected integers",
      ["--seeds 1,1"] = "'1,1': 1 is given twice",
      ["--seeds 1,,2"] = "'1,,2': expected integers",
      ["--grid codes=8,,16"] = "--grid codes: a value is missing in '8,,16'",
      ["--grid quantizer.tau=1,2 --methods ste-euclid"] = "--grid quantizer.tau: none of ste-euclid has that option",
      ["--grid k=1,2 --methods ste-euclid"] = "--grid k: none of ste-euclid has that option",
      ["--seeds 1,x"] = "'1,x': expected integers",
      ["--seeds 1 --seed 2"] = "--seed and --seeds: give one of them",
      ["--grid tao=1,2"] = "--grid tao: neither the preset nor a quantizer has it, did you mean 'tau'?",
      ["--grid codes"] = "--grid codes: expected NAME=VALUE,VALUE,...",
      ["--grid codes=8,8"] = "--grid codes: 8 is given twice",
      ["--grid codes=8 codes=16"] = "--grid gives codes twice",
      ["--grid seed=1,2"] = "--grid seed: --seeds sets it",
      ["--grid batch=32,33"] = "--batch: expected a multiple of 8",
      ["--grid codes=8,many"] = "--set codes=\"many\": expected a number, as 16",
    } do
      local out, status = vectors(arguments .. " --out refused")
      assert.equal(2, status, out)
      assert.truthy(out:find(expected, 1, true), out)
      assert.is_nil(lfs.attributes(scratch .. "/refused", "mode"))
    end
    local out, status = vectors "--seeds 1 --out a"
    assert.equal(2, status)
    assert.truthy(out:find("--out a holds a series already; --resume goes on with it", 1, true), out)
  end)
end)
