-- The main job on several ranks: ae_sweep under mpirun follows the trajectory of one rank, goes on after a stop or on
-- another number of ranks, and ends with a message where a rank fails or the ranks do not fit together.

local H = require "tests.helper"
local lfs = require "lfs"
local json = require "vertex.json"
local mpirun = require "tests.mpirun"
local vx = require "vertex"

local scratch
local SWEEP = "luajit '" .. H.root .. "/experiments/ae_sweep.lua' --device cpu "

local function sweep(n, arguments, more) return mpirun.run(scratch, n, SWEEP .. arguments, more) end
local function alone(arguments)
  return H.shell(("cd '%s'; %s VERTEX_LIB='%s' %s"):format(scratch, mpirun.clean,
    os.getenv "VERTEX_LIB" or H.root .. "/build/libvertex.so", SWEEP .. arguments))
end

local function metrics(out)
  local list = {}
  for line in assert(H.read(("%s/%s/metrics.jsonl"):format(scratch, out)), out):gmatch "[^\n]+" do
    list[#list + 1] = json.decode(line)
  end
  return list
end

--- results.csv: { method = { column = number } }.
local function results(out)
  local rows, names = {}, nil
  for line in assert(H.read(("%s/%s/results.csv"):format(scratch, out)), out):gmatch "[^\n]+" do
    local cells = {}
    for cell in (line .. ","):gmatch "([^,]*)," do cells[#cells + 1] = cell end
    if names then
      local row = {}
      for i, name in ipairs(names) do row[name] = tonumber(cells[i]) end
      rows[cells[1]] = row
    else
      names = cells
    end
  end
  return rows
end

--- Bytes of the tensors of a checkpoint in one string, without what is summed.
local function tensors(out, method)
  local loaded, names, parts = vx.load(("%s/%s/checkpoints/%s.safetensors"):format(scratch, out, method)), {}, {}
  for name in pairs(loaded) do
    if not name:find "^sums%." then names[#names + 1] = name end
  end
  table.sort(names)
  for i, name in ipairs(names) do parts[i] = name .. loaded[name]:bytes() end
  return table.concat(parts)
end

--- Fails unless two runs have the same losses up to a relative error, from a step on, and the same results.
local function expect_same_course(one, other, from)
  local a, b = metrics(one), metrics(other)
  assert.equal(#a, #b)
  for i = 1, #a do
    assert.equal(a[i].method .. a[i].step, b[i].method .. b[i].step)
    for _, field in ipairs { "loss", "mse", "code_use" } do
      if a[i].step >= (from or 1) then
        assert.is_true(math.abs(a[i][field] - b[i][field]) <= 1e-4 * math.abs(a[i][field]),
          ("%s step %d %s: %.9g, %.9g"):format(a[i].method, a[i].step, field, a[i][field], b[i][field]))
      end
    end
  end
  local c, d = results(one), results(other)
  for method, row in pairs(c) do
    for _, column in ipairs { "code_use", "code_use_256", "perplexity", "rmse", "psnr", "rank_latents", "rank_codebook",
      "tightness", "tightness_q05", "gap", "unselected", "contested" } do
      local x, y = row[column], d[method][column]
      assert.equal(x == nil, y == nil, method .. " " .. column)
      local some = (column == "unselected" or column == "contested") and 0.01 or 1e-4 * (x or 0) -- a row or two of 512
      assert.is_true(math.abs((x or 0) - (y or 0)) <= some, ("%s %s: %s, %s"):format(method, column, x, y))
    end
  end
end

local METHODS = "--methods ste-euclid,ema-cosine "
local COMMON = "--batch 8 --steps 20 --checkpoint 0 --quiet "

describe("ae_sweep on ranks #ranks", function()
  local ranked = mpirun.needed(it, pending)

  setup(function()
    scratch = H.scratch "ranks_sweep"
    assert(lfs.mkdir(scratch))
    -- methods that go wrong on rank 1 at step 3, or wait there for ever
    lfs.mkdir(scratch .. "/wrong")
    H.write(scratch .. "/wrong/wrong.lua", [[
      local dist, hard = require "vertex.dist", require "vertex.quantizers.hard"
      local Wrong = require("vertex.quantizers").Quantizer.extend "Wrong"
      for name, value in pairs(hard.class) do
        if type(value) == "function" and not name:find "^__" then Wrong[name] = value end
      end
      function Wrong:setup(options)
        hard.class.setup(self, options)
        self.extra = require("vertex.nn").buffer { 2 }
      end
      function Wrong:learn()
        if self.steps < 3 or dist.rank() ~= 1 then return end
        if self.label == "hangs" then while true do end end
        if self.label == "drifts" then return self.extra:fill(0.5) end
        require("vertex.core").fail "something is wrong"
      end
      local names = {}
      for _, name in ipairs { "fails", "hangs", "drifts" } do
        names[#names + 1] = { name = name, summary = "goes wrong", metric = "euclid", estimator = "ste" }
      end
      return { names = names, paper = "none", kind = "hard", codebook = true, options = hard.options, class = Wrong }
    ]])
  end)

  ranked("share the images of FID and IS, which are those of one rank, also where one has none left", function()
    for split, count in pairs { train = 4, val = 13 } do
      vx.runs.make_folders(("%s/few/%s"):format(scratch, split))
      for i = 1, count do
        vx.data.save(("%s/few/%s/%02d.png"):format(scratch, split, i), vx.data.procedural(32, i, 1))
      end
    end
    vx.seed(1)
    local state = vx.models.inception_v3({ num_classes = 1008 }):state_dict()
    state["fc.weight"] = state["fc.weight"] * 1e4 -- else all images are of all classes, and the order does not matter
    vx.save(scratch .. "/fid.safetensors", state)
    local line = "--data few --steps 1 --batch 4 --methods ste-euclid --inception fid.safetensors --out "
    local output, status = alone(line .. "fid1")
    assert.equal(0, status, output)
    output, status = sweep(2, line .. "fid2")
    assert.equal(0, status, output)
    local one, two = results("fid1")["ste-euclid"], results("fid2")["ste-euclid"]
    assert.is_true(one.is_tf > 1.001, one.is_tf)
    H.close({ two.fid_tf, two.is_tf - 1 }, { one.fid_tf, one.is_tf - 1 }, 1e-2, 0)
  end)

  ranked("follow one rank's trajectory, and do so to the bit twice", function()
    local output, status = alone(METHODS .. COMMON .. "--out one")
    assert.equal(0, status, output)
    for _, n in ipairs { 2, 4 } do
      output, status = sweep(n, METHODS .. COMMON .. "--out of" .. n)
      assert.equal(0, status, output)
      assert.equal(1, select(2, output:gsub("Method +Code use", "")), output) -- one table
      assert.equal(nil, output:find "\27") -- for no terminal
      expect_same_course("one", "of" .. n)
    end
    output, status = sweep(2, METHODS .. COMMON .. "--out again")
    assert.equal(0, status, output)
    assert.equal(H.read(scratch .. "/of2/metrics.jsonl"), H.read(scratch .. "/again/metrics.jsonl"))
    for _, method in ipairs { "ste-euclid", "ema-cosine" } do
      assert.equal(tensors("of2", method), tensors("again", method))
    end
  end)

  ranked("follow it under a KNN regularizer where neighbours are those of all ranks", function()
    local arguments = "--methods softmax-knn-ce --set quantizer.scope=world --batch 8 --steps 20 --quiet --out "
    local output, status = alone(arguments .. "world1")
    assert.equal(0, status, output)
    output, status = sweep(4, arguments .. "world4")
    assert.equal(0, status, output)
    expect_same_course("world1", "world4")
  end)

  ranked("go on after a kill, as many to the bit, others on the same course", function()
    local checkpoint = "killed/checkpoints/ema-cosine.safetensors"
    local output = mpirun.run_until(scratch, 2, SWEEP .. METHODS .. COMMON .. "--out killed", checkpoint,
      "kill -9 $pid $ranks")
    assert.truthy(H.read(scratch .. "/" .. checkpoint), output)
    H.shell(("cp -r '%s/killed' '%s/killed4'"):format(scratch, scratch))
    output = sweep(2, "--out killed --resume --quiet --checkpoint 0")
    assert.truthy(output:find("Code use", 1, true), output)
    assert.equal(H.read(scratch .. "/of2/metrics.jsonl"), H.read(scratch .. "/killed/metrics.jsonl"))
    assert.equal(tensors("of2", "ema-cosine"), tensors("killed", "ema-cosine"))
    output = sweep(4, "--out killed4 --resume --quiet --checkpoint 0")
    assert.truthy(output:find("Code use", 1, true), output)
    expect_same_course("one", "killed4")
  end)

  ranked("stop at Ctrl-C or SIGUSR1 on mpirun, and go on to the bit", function()
    for _, signal in ipairs { "INT", "USR1" } do
      local out = "stopped" .. signal
      local output, status, seconds, left = mpirun.run_until(scratch, 2, SWEEP .. METHODS
        .. "--batch 8 --steps 20 --checkpoint 100 --out " .. out, out .. "/metrics.jsonl",
        "kill -" .. signal .. " $pid")
      assert.is_true(status ~= 0 and seconds < 15 and not left, output)
      assert.truthy(H.read(scratch .. "/" .. out .. "/checkpoints/ste-euclid.safetensors"), output)
      if signal == "USR1" then
        assert.equal(130, status, output)
        assert.truthy(output:find("stopped; go on with", 1, true), output)
      end
      output = sweep(2, ("--out %s --resume --quiet"):format(out))
      assert.truthy(output:find("Code use", 1, true), output)
      assert.equal(H.read(scratch .. "/of2/metrics.jsonl"), H.read(scratch .. "/" .. out .. "/metrics.jsonl"))
    end
  end)

  ranked("end where a rank is killed, fails or hangs, and leave a checkpoint to go on from", function()
    local output, status, seconds, left = mpirun.run_until(scratch, 2, SWEEP .. METHODS
      .. "--batch 8 --steps 2000 --checkpoint 0 --quiet --out lost", "lost/checkpoints/ste-euclid.safetensors",
      "kill -9 $(echo $ranks | cut -d' ' -f2)")
    assert.is_true(seconds < 30 and not left, output)
    assert.equal(137, status, output)
    assert.truthy(output:find "rank 1 with PID %d+ on node %S+ exited on signal 9", output)
    local wrong = SWEEP .. "--quantizers wrong --batch 8 --steps 20 --checkpoint 0 --quiet --out %s --methods %s"
    output, status = mpirun.run(scratch, 2, wrong:format("failed", "fails"))
    assert.equal(1, status, output)
    assert.truthy(output:find "rank 1: [^\n]*something is wrong", output)
    local began = vx.runs and os.time()
    output, status = mpirun.run(scratch, 2, wrong:format("hung", "hangs"), "VERTEX_RANK_TIMEOUT=2")
    assert.equal(1, status, output)
    assert.is_true(os.time() - began < 30)
    assert.truthy(output:find "rank 0: [^\n]*sum: rank 1 did not come within 2 s", output)
    output, status = mpirun.run(scratch, 2, wrong:format("drifted", "drifts"))
    assert.equal(1, status, output)
    assert.truthy(output:find("model and optimizer of rank 1 are no longer those of rank 0", 1, true), output)
    for _, out in ipairs { "lost", "failed", "hung", "drifted" } do
      local method = ({ lost = "ste-euclid", failed = "fails", hung = "hangs", drifted = "drifts" })[out]
      local path = ("%s/%s/checkpoints/%s.safetensors"):format(scratch, out, method)
      assert.is_true(vx.runs.checkpoint.peek(path).step >= 1)
    end
  end)

  ranked("refuse what cannot be trained together, say why once, and leave nothing behind", function()
    local function refused(text, parts, more)
      local output, status = mpirun.run(scratch, nil, parts, more)
      assert.equal(2, status, output)
      assert.truthy(output:find(text, 1, true), output)
      assert.equal(1, select(2, output:gsub(text:gsub("%p", "%%%0"), "")), output)
      assert.equal(nil, lfs.attributes(scratch .. "/refused"))
    end
    local command = SWEEP .. "--steps 2 --quiet --out refused "
    refused("--batch 9 does not divide among 2 ranks; expected a multiple of 2", { 2, command .. "--batch 9" })
    refused("the ranks disagree on --seed: rank 0 has 1, rank 1 has 2", { 1, command, 1, command .. "--seed 2" })
    refused("the ranks disagree on methods: rank 0 has ste-cosine, rank 1 has ste-euclid",
      { 1, command .. "--methods ste-cosine", 1, command .. "--methods ste-euclid" })
    refused("--seeds and --grid start a process for each run", { 2, command .. "--seeds 1,2" })
    refused("--graph on: several ranks run their steps op by op", { 2, command .. "--graph on" })
    refused("unknown method 'x'", { 2, command .. "--methods x" })
    for _, folder in ipairs { "here", "there", "here/photos", "there/photos" } do
      lfs.mkdir(scratch .. "/" .. folder)
      for i = 1, folder:find "photos" and (folder:find "^here/" and 2 or 3) or 0 do
        vx.data.save(("%s/%s/%d.png"):format(scratch, folder, i), vx.data.procedural(40, 1, i))
      end
    end
    refused("the ranks disagree on the data: rank 0 has 2 items", { 1, "-wdir here " .. command .. "--data photos", 1,
      "-wdir there " .. command .. "--data photos" })
  end)

  ranked("share the vectors of vq_sweep and the clips of w2v_sweep", function()
    local function run(n, name, arguments)
      local command = ("luajit '%s/experiments/%s.lua' --device cpu --quiet %s"):format(H.root, name, arguments)
      local output, status
      if n == 1 then
        output, status = H.shell(("cd '%s'; %s VERTEX_LIB='%s' %s"):format(scratch, mpirun.clean,
          os.getenv "VERTEX_LIB" or H.root .. "/build/libvertex.so", command))
      else
        output, status = mpirun.run(scratch, n, command)
      end
      assert.equal(0, status, output)
    end
    local vectors = "--batch 512 --steps 8 --methods ema-euclid,softmax-knn-ce,kmeans"
      .. " --set quantizer.scope=world --out vq"
    for _, n in ipairs { 1, 2 } do run(n, "vq_sweep", vectors .. n) end
    local one, two = results "vq1", results "vq2"
    for method, row in pairs(one) do
      for _, column in ipairs { "error", "code_use", "perplexity" } do
        assert.is_true(math.abs(row[column] - two[method][column]) <= 1e-4 * row[column], method .. " " .. column)
      end
    end
    run(2, "w2v_sweep", "--batch 4 --steps 2 --methods ema-euclid --out w2v2")
    assert.is_true(results("w2v2")["ema-euclid"].code_use > 0)
  end)

  ranked("are measured by bench/scaling", function()
    local output, status = mpirun.run(scratch, 2, "luajit '" .. H.root
      .. "/experiments/bench/scaling.lua' --rounds 1 --steps 1 --preset tiny --batch 4 --parts ae")
    assert.equal(0, status, output)
    assert.truthy(output:find "strong: [%d.]+ of 1 x 2 %b()   weak: [%d.]+ of 1 x 1", output)
    output, status = mpirun.run(scratch, 3, "luajit '" .. H.root .. "/experiments/bench/scaling.lua'")
    assert.truthy(status ~= 0 and output:find("scaling: 3 ranks; start it by mpirun -np 2", 1, true), output)
  end)
end)
