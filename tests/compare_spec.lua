-- experiments/compare.lua on run folders written here, whose means and deviations are known.

local H = require "tests.helper"
local lfs = require "lfs"
local core = require "vertex.core"
local json = require "vertex.json"

local scratch = H.scratch "compare"

local function compare(arguments)
  return H.shell(("cd '%s' && VERTEX_LIB='%s' luajit '%s/experiments/compare.lua' %s"):format(scratch,
    os.getenv "VERTEX_LIB" or H.root .. "/build/libvertex.so", H.root, arguments))
end

--- Writes a run: config, its rows of results.csv under "method,seed,error,steps,note", and a log of "mse".
local function run(name, config, rows, log)
  local folder = scratch .. "/" .. name
  assert(lfs.mkdir(folder))
  config.experiment, config.methods = config.experiment or "mine", { "a", "b" }
  H.write(folder .. "/config.json", json.encode(config))
  H.write(folder .. "/results.csv", "method,seed,error,steps,note\n" .. rows)
  local lines = {}
  for i, mse in ipairs(log or {}) do
    lines[i] = json.encode { method = "a", seed = config.seed, step = i, mse = mse }
  end
  H.write(folder .. "/metrics.jsonl", table.concat(lines, "\n") .. "\n")
end

describe("compare", function()
  setup(function()
    assert(lfs.mkdir(scratch))
    run("one", { seed = 1 }, "a,1,1.5,10,\nb,1,0.25,10,\n", { 4, 2 })
    run("two", { seed = 2 }, "a,2,2.5,10,\nb,2,0.25,10,\n", { 6, 2 })
    run("three", { seed = 3 }, "a,3,3.5,10,\n", { 5, 2 })
    run("other", { seed = 1, set = { k = 8 } }, "a,1,9,10,\n", { 5, 2 })
    run("foreign", { seed = 1, experiment = "theirs" }, "a,1,9,10,\n")
    run("again", { seed = 2 }, "a,2,2.5,10,\n")
    run("more", { seed = 3 }, "b,3,0.5,10,\n")
    assert(lfs.mkdir(scratch .. "/empty"))
  end)

  it("gives mean and standard deviation over the seeds, and leaves out columns without numbers", function()
    local out, status = compare "one two three --out kept"
    assert.equal(0, status, out)
    assert.truthy(out:find("| Method | Seeds | error     | steps  |", 1, true), out)
    assert.truthy(out:find("| a      | 3     | 2.5 ± 1.0 | 10 ± 0 |", 1, true), out)
    assert.truthy(out:find("| b      | 2     | 0.25 ± 0  | 10 ± 0 |", 1, true), out)
    assert.equal(out, H.read(scratch .. "/kept/table.md"))
    assert.equal("run,method,seeds,error_mean,error_sd,steps_mean,steps_sd\n,a,3,2.5,1,10,0\n,b,2,0.25,0,10,0\n",
      H.read(scratch .. "/kept/compare.csv"))
    assert.is_true(core.file_size(scratch .. "/kept/curves.png") > 1000)
  end)

  it("puts methods of one experiment beside each other that lie in several folders", function()
    local out, status = compare "three more --columns error"
    assert.equal(0, status, out)
    assert.truthy(out:find("| a      | 1     | 3.5   |\n| b      | 1     | 0.5   |", 1, true), out)
  end)

  it("says what differs beside the seed, and keeps such runs apart", function()
    local out, status = compare "one two other --columns error --methods a"
    assert.equal(0, status, out)
    assert.truthy(out:find("differ in k\n", 1, true), out)
    assert.truthy(out:find("| k=not set | a      | 2     | 2.00 ± 0.71 |", 1, true), out)
    assert.truthy(out:find("| k=8       | a      | 1     | 9           |", 1, true), out)
  end)

  it("refuses what is no run, or not of the same kind, by name", function()
    for arguments, expected in pairs {
      ["one empty"] = "empty holds no run (config.json)",
      ["one nowhere"] = "nowhere holds no run",
      ["one foreign"] = 'one is a run of "mine", foreign of "theirs"',
      ["one two again"] = "two and again are the same experiment: a, seed 2",
      ["one --columns errors"] = "no run has the column 'errors'; there are error, steps",
      ["one --methods c"] = "no run has the method 'c'; there are a, b",
      ["one --out refused --fields loss"] = "no run has logged 'loss'",
    } do
      local out, status = compare(arguments)
      assert.equal(2, status, out)
      assert.truthy(out:find(expected, 1, true), out)
      assert.falsy(out:find("traceback", 1, true), out)
    end
    assert.is_nil(lfs.attributes(scratch .. "/refused", "mode"))
  end)
end)
