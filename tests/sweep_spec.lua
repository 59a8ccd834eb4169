-- The main job as a user runs it: flags, output folder, results, kill and resume. Runs experiments/ae_sweep.lua in
-- child processes. What holds for any experiment is in runs_spec.lua.

local H = require "tests.helper"
local lfs = require "lfs"
local core = require "vertex.core"
local json = require "vertex.json"
local vx = require "vertex"

local root, shell = H.root, H.shell
local scratch

local function sweep(arguments, before)
  local library = os.getenv "VERTEX_LIB" or root .. "/build/libvertex.so"
  return shell(("cd '%s' && VERTEX_LIB='%s' %s luajit '%s/experiments/ae_sweep.lua' %s"):format(scratch, library,
    before or "", root, arguments))
end

local function read(path) return assert(H.read(scratch .. "/" .. path), path) end
local function write(path, text) H.write(scratch .. "/" .. path, text) end

--- results.csv without the columns that depend on the clock, or on when a run was cut in two.
local function results(out)
  local lines, kept = {}, {}
  for line in read(out .. "/results.csv"):gmatch "[^\n]+" do
    local cells = {}
    for c in (line .. ","):gmatch "([^,]*)," do cells[#cells + 1] = c end
    local row = {}
    for i, c in ipairs(cells) do
      if #lines == 0 then kept[i] = c ~= "seconds" and c ~= "step_ms" and c ~= "peak_mb" end
      if kept[i] then row[#row + 1] = c end
    end
    lines[#lines + 1] = table.concat(row, ",")
  end
  return table.concat(lines, "\n")
end

--- Bytes of every tensor of a checkpoint, in one string.
local function tensors(out, method)
  local loaded, names, parts = vx.load(("%s/%s/checkpoints/%s.safetensors"):format(scratch, out, method)), {}, {}
  for name in pairs(loaded) do names[#names + 1] = name end
  table.sort(names)
  for i, name in ipairs(names) do parts[i] = name .. loaded[name]:bytes() end
  return table.concat(parts)
end

describe("ae_sweep", function()
  setup(function()
    scratch = H.scratch "sweep"
    assert(lfs.mkdir(scratch))
  end)

  it("adds FID and IS where --inception names weights", function()
    for _, split in ipairs { "train", "val" } do
      vx.runs.make_folders(scratch .. "/few/" .. split)
      for i = 1, 3 do vx.data.save(("%s/few/%s/%d.png"):format(scratch, split, i), vx.data.procedural(32, i, 1)) end
    end
    vx.seed(1)
    local state = vx.models.inception_v3({ num_classes = 1008 }):state_dict()
    vx.save(scratch .. "/fid.safetensors", state)
    local line = "--data few --steps 2 --batch 3 --methods ste-euclid --inception fid.safetensors --out "
    local output, status = sweep(line .. "judged")
    assert.equal(0, status, output)
    assert.truthy(output:find("FID over 3 images is biased upwards", 1, true), output)
    local names, values = read("judged/results.csv"):match "^([^\n]+)\n([^\n]+)\n$"
    local row, at = {}, 0
    local columns = {}
    for name in names:gmatch "[^,]+" do columns[#columns + 1] = name end
    for value in (values .. ","):gmatch "([^,]*)," do
      at = at + 1
      row[columns[at]] = value
    end
    assert.equal(H.shell("sha256sum '" .. scratch .. "/fid.safetensors'"):sub(1, 16), row.inception)
    assert.equal("", row.fid_tv)
    assert.is_true(tonumber(row.fid_tf) > 0)
    assert.is_true(tonumber(row.is_tf) >= 1 - 1e-6, row.is_tf) -- images alike, after two steps
    local rank = tonumber(row.rank_latents)
    assert.is_true(rank >= 1 and rank <= 32, row.rank_latents)
    rank = tonumber(row.rank_codebook)
    assert.is_true(rank > 20 and rank <= 32, row.rank_codebook) -- 256 normal codes of width 32
    H.close({ tonumber(row.perplexity_share) }, { tonumber(row.perplexity) / 256 }, 1e-6, 0)
    assert.is_true(tonumber(row.peak_mb) > 1 and tonumber(row.step_ms) > 0)
    assert.truthy(read("judged/table.md"):find("FID (TF)", 1, true))
    state["fc.weight"] = vx.zeros { 1008, 7 }
    vx.save(scratch .. "/fid.safetensors", state)
    output, status = sweep(line .. "refused")
    assert.equal(2, status, output)
    assert.truthy(output:find("'fc.weight' is (1008,7) in the file, (1008,2048) in the module", 1, true), output)
    assert.is_nil(lfs.attributes(scratch .. "/refused"))
  end)

  it("trains, evaluates and leaves every file", function()
    local output, status = sweep "--steps 3 --batch 4 --out a/b --methods softmax-knn-ce,ste-euclid"
    assert.equal(0, status, output)
    for _, file in ipairs { "config.json", "results.csv", "table.md", "metrics.jsonl", "curves.png",
      "reconstructions.png",
      "checkpoints/ste-euclid.safetensors" } do
      assert.truthy(core.file_size(scratch .. "/a/b/" .. file), file)
    end
    local csv = read "a/b/results.csv"
    assert.truthy(csv:find("method,seed,code_use,perplexity,rmse,psnr,fid_tv,is_tv,steps,seconds", 1, true))
    assert.truthy(csv:find("\nste-euclid,1,", 1, true))
    assert.truthy(output:find("softmax-knn-ce", 1, true) and output:find("Code use", 1, true))
    for line in read("a/b/metrics.jsonl"):gmatch "[^\n]+" do
      local entry = assert(json.decode(line))
      assert.truthy(entry.loss > 0 and entry.code_use > 0 and entry.step >= 1)
    end
    assert.truthy(read("a/b/table.md"):find("| softmax-knn-ce |", 1, true))
  end)

  it("trains under --autocast bf16 nearly as in float32", function()
    local function outcome(setting)
      local output, status = sweep(("--steps 20 --batch 4 --out cast-%s --autocast %s --methods softmax-ppl"):format(
        setting, setting))
      assert.equal(0, status, output)
      local csv = read("cast-" .. setting .. "/results.csv")
      local names, values = csv:match "^([^\n]+)\n([^\n]+)\n$"
      local row, columns = {}, {}
      for name in names:gmatch "[^,]+" do columns[#columns + 1] = name end
      for value in (values .. ","):gmatch "([^,]*)," do row[#row + 1] = value end
      for i, name in ipairs(columns) do row[name] = tonumber(row[i]) end
      return row
    end
    local exact, rounded = outcome "f32", outcome "bf16"
    assert.near(exact.rmse, rounded.rmse, 0.02 * exact.rmse)
    assert.near(exact.psnr, rounded.psnr, 0.2)
    assert.not_equal(exact.rmse, rounded.rmse)
    assert.is_true(rounded.peak_mb < 0.8 * exact.peak_mb, ("%g, %g MB"):format(rounded.peak_mb, exact.peak_mb))
  end)

  it("refuses a folder that holds an experiment, or something else, and changes nothing", function()
    local before = read "a/b/config.json"
    local output, status = sweep "--steps 3 --batch 4 --out a/b"
    assert.equal(2, status)
    assert.truthy(output:find("holds an experiment already", 1, true), output)
    output, status = sweep "--steps 2 --out a/b --resume"
    assert.equal(2, status)
    assert.truthy(output:find("its steps is 3, asked for is 2 (it may grow)", 1, true), output)
    assert.equal(before, read "a/b/config.json")
    lfs.mkdir(scratch .. "/other")
    write("other/thesis.txt", "words")
    output, status = sweep "--out other"
    assert.equal(2, status)
    assert.truthy(output:find("thesis.txt", 1, true), output)
    write("file", "")
    output, status = sweep "--out file"
    assert.equal(2, status)
    assert.truthy(output:find("expected a folder", 1, true), output)
    output, status = sweep "--out /proc/nowhere/x"
    assert.equal(2, status)
    assert.truthy(output:find("cannot make", 1, true), output)
    output, status = sweep "--out other --resume"
    assert.equal(2, status)
    assert.truthy(output:find("holds no experiment of ours", 1, true), output)
  end)

  it("does not run finished methods again, and takes new ones", function()
    local before = read "a/b/checkpoints/ste-euclid.safetensors"
    local output, status = sweep "--out a/b --resume --methods ste-euclid,hgumbel-ppl"
    assert.equal(0, status, output)
    assert.truthy(output:find("ste%-euclid +finished before"))
    assert.equal(before, read "a/b/checkpoints/ste-euclid.safetensors")
    assert.truthy(read("a/b/results.csv"):find("\nhgumbel-ppl,", 1, true))
    assert.truthy(read("a/b/results.csv"):find("\nsoftmax-knn-ce,", 1, true))
  end)

  it("refuses what cannot be had, says why, and leaves nothing behind", function()
    for _, folder in ipairs { "empty", "words", "words/train", "split", "split/train", "split/val" } do
      assert(lfs.mkdir(scratch .. "/" .. folder))
    end
    write("words/train/letter.txt", "words")
    vx.data.save(scratch .. "/split/train/1.png", vx.data.procedural(40, 1, 1))
    lfs.mkdir(scratch .. "/picky")
    write("picky/picky.lua", [[
      local registry = require "vertex.quantizers"
      local Picky = registry.Quantizer.extend "Picky"
      function Picky:setup(options)
        if options.codes ~= 243 then require("vertex.core").fail("picky: codes is %d, expected 243", options.codes) end
      end
      function Picky:quantize() end
      function Picky:nearest() end
      function Picky:lookup() end
      return { names = { { name = "picky", summary = "wants 243 codes" } }, paper = "none", kind = "hard",
        metric = "euclid", codebook = true, class = Picky }
    ]])
    for arguments, expected in pairs {
      ["--methods softmax-knn"] = "unknown method 'softmax-knn', did you mean 'softmax-ppl'?; known: paper, all, ste",
      ["--preset huge"] = "unknown preset 'huge'; known: 16x16x32-1024",
      ["--stepps 3"] = "--steps",
      ["--steps -3"] = "expected an integer from 1",
      ["--steps 1.5"] = "expected an integer from 1",
      ["--batch 1e99"] = "expected an integer from 1",
      ["--seed x"] = "expected an integer from 0",
      ["--steps 1 --epochs 1"] = "give one of them",
      ["--methods ,"] = "names none",
      ["--device tpu"] = "device 'tpu': expected \"cpu\"",
      ["--data nowhere"] = "no folder nowhere",
      ["--data file"] = "file is a file, expected a folder",
      ["--data empty"] = "no image in empty",
      ["--data words"] = "no image in words/train",
      ["--data split"] = "no image in split/val",
      ["--quantizers nowhere"] = "'nowhere' is no folder",
      ["--quantizers picky --methods ste-euclid,picky"] = "picky: codes is 256, expected 243",
      ["--autocast f16"] = "must be one of 'f32', 'bf16'",
      ["--graph maybe"] = "must be one of 'on', 'off'",
      ["--set x"] = "--set x: expected NAME=VALUE",
      ["--set codes=4 --set codes=5"] = "--set gives codes twice",
      ["--set cods=4"] = "--set cods: the preset 'tiny' has no such field, did you mean 'codes'?; it has batch",
      ["--set codes=many"] = '--set codes="many": expected a number, as 256',
      ["--set batch=4"] = "--set batch: --batch sets it",
      ["--set quantizer.level=[4,4] --methods fsq,lfq"] =
        "none of fsq, lfq has that option, did you mean 'quantizer.levels'?",
      ["--set quantizer.levels=[3,3] --methods fsq"] = "levels 3 x 3 make 9 codes, the option codes is 256",
    } do
      local outs = { " --out refused/a" }
      if arguments:find "^%-%-data" then outs = { " --out refused/a", "", " --out refused --resume" } end
      for _, out in ipairs(outs) do
        local output, status = sweep(arguments .. out)
        assert.equal(2, status, arguments)
        assert.truthy(output:find(expected, 1, true), arguments .. ": " .. output)
        assert.falsy(output:find("stack traceback", 1, true) or output:find(".lua:", 1, true), output)
        for _, folder in ipairs { "refused", "out" } do
          assert.is_nil(lfs.attributes(scratch .. "/" .. folder, "mode"), arguments)
        end
      end
    end
  end)

  it("lists methods, columns and flags under --help", function()
    local output, status = sweep "--help"
    assert.equal(0, status)
    for _, item in ipairs(vx.quantizers()) do assert.truthy(output:find(item.name, 1, true), item.name) end
    for _, text in ipairs { "Folder of images", "Images per step", "of results.csv", "rmse_soft", "--strict" } do
      assert.truthy(output:find(text, 1, true), text)
    end
  end)

  it("--set changes the preset and the quantizers' options, and belongs to the configuration", function()
    local settings = "--set codes=32 --set 'channels=[8,16]' --set quantizer.start=kmeans --set quantizer.warmup=2"
    local command = "--steps 4 --batch 8 --methods ste-euclid --out set/x "
    local output, status = sweep(command .. settings)
    assert.equal(0, status, output)
    assert.same({ codes = 32, channels = { 8, 16 }, ["quantizer.start"] = "kmeans", ["quantizer.warmup"] = 2 },
      setmetatable(json.decode(read "set/x/config.json").set, nil))
    local model = vx.load(scratch .. "/set/x/checkpoints/ste-euclid.safetensors")
    local codebook
    for name, x in pairs(model) do
      if name:find "codebook$" and not name:find "optimizer" then codebook = codebook or x:shape() end
    end
    assert.same({ 1, 32, 16 }, codebook)
    local log = {}
    for line in read("set/x/metrics.jsonl"):gmatch "[^\n]+" do log[#log + 1] = json.decode(line) end
    assert.is_nil(log[1].perplexity) -- z passes through
    assert.truthy(log[#log].perplexity)
    output, status = sweep(command .. "--resume --set codes=32")
    assert.equal(2, status, output)
    assert.truthy(output:find("its set is {", 1, true), output)
    output, status = sweep(command .. "--resume")
    assert.equal(0, status, output)
  end)

  it("--resume starts anew where there is nothing, so that one command line serves a requeued job", function()
    local command = "--steps 2 --batch 4 --methods ste-euclid --resume --out again/x"
    for i, expected in ipairs { "ste%-euclid +Code use", "ste%-euclid +finished before" } do
      local output, status = sweep(command)
      assert.equal(0, status, output)
      assert.truthy(output:find(expected), i .. ": " .. output)
    end
    -- a start that was killed before it had written anything whole
    assert(lfs.mkdir(scratch .. "/begun"))
    write("begun/config.json.4711.tmp", "{")
    local output, status = sweep "--steps 2 --batch 4 --methods ste-euclid --resume --out begun"
    assert.equal(0, status, output)
    -- without --out: the newest of the preset, and the first where there is none
    for i, expected in ipairs { "Code use", "finished before" } do
      output, status = sweep "--steps 2 --batch 4 --methods ste-euclid --resume"
      assert.equal(0, status, output)
      assert.truthy(output:find(expected, 1, true) and output:find("out/ae_sweep-tiny-1", 1, true), i .. ": " .. output)
    end
  end)

  it("refuses to resume with other settings, also where one of them was not given before", function()
    for arguments, expected in pairs {
      ["--batch 5"] = "its batch is 4, asked for is 5",
      ["--data photos"] = "its data is not set, asked for is \"photos\"",
      ["--epochs 2"] = "its epochs is not set, asked for is 2",
    } do
      local output, status = sweep("--out again/x --resume " .. arguments)
      assert.equal(2, status, output)
      assert.truthy(output:find(expected, 1, true), output)
    end
  end)

  it("gives bit for bit the uninterrupted result after kills at any moment", function()
    local common = "--steps 24 --batch 4 --checkpoint 0 --quiet --methods sgumbel-knn-ce,re-cosine"
    local output, status = sweep(common .. " --out whole")
    assert.equal(0, status, output)
    local tries, done = 0, false
    while not done and tries < 60 do
      tries = tries + 1
      output, status = sweep(common .. " --out killed --resume", ("timeout -s KILL %.2f"):format(0.2 + 0.1 * tries))
      done = status == 0
    end
    assert.truthy(done, output)
    assert.truthy(tries > 1, "the run was never interrupted")
    assert.equal(results "whole", results "killed")
    assert.equal(read "whole/metrics.jsonl", read "killed/metrics.jsonl")
    for _, method in ipairs { "sgumbel-knn-ce", "re-cosine" } do
      assert.equal(tensors("whole", method), tensors("killed", method))
    end
  end)

  it("gives its model back from a checkpoint alone", function()
    local output, status = sweep "--steps 2 --batch 4 --quiet --methods ste-euclid --set codes=64 --out restored"
    assert.equal(0, status, output)
    local path = scratch .. "/restored/checkpoints/ste-euclid.safetensors"
    local model, run = vx.restore(path)
    assert.same({ "ste-euclid", 2, 64, false }, { run.method, run.step, run.preset.codes, model.training })
    local stored = vx.load(path)
    for name, x in pairs(model:state_dict()) do assert.equal(stored["model." .. name]:bytes(), x:bytes(), name) end
    assert.equal(model, model:load_state_dict(stored)) -- a whole checkpoint, too
    local codes = vx.no_grad(function() return model.quantizer:encode(model.encoder(vx.zeros { 2, 32, 32, 3 })) end)
    assert.same({ 2 * 8 * 8, 1 }, codes:shape())
    H.raises(function() vx.restore(scratch .. "/nowhere") end, "restore: ", "no such file")
    vx.save(scratch .. "/other.safetensors", { x = vx.zeros { 1 } })
    H.raises(function() vx.restore(scratch .. "/other.safetensors") end, "is no checkpoint of this project")
  end)

  it("goes on for more steps where the shorter run stood, with the schedule of the longer", function()
    local command = "--batch 4 --methods hgumbel-knn-l2 --out grown --resume --steps "
    for _, steps in ipairs { 4, 6 } do
      local output, status = sweep(command .. steps)
      assert.equal(0, status, output)
    end
    local schedule = vx.optim.warmup_cosine { peak = 1e-3, final = 5e-4, warmup = 6 / 4, total = 6 }
    local before, steps = vx.optim.warmup_cosine { peak = 1e-3, final = 5e-4, warmup = 1, total = 4 }, 0
    for line in read("grown/metrics.jsonl"):gmatch "[^\n]+" do
      local entry = json.decode(line)
      steps = steps + 1
      assert.equal(steps, entry.step)
      H.close({ entry.lr }, { (steps <= 4 and before or schedule)(steps) }, 1e-6, 0)
    end
    assert.equal(6, steps)
    assert.truthy(read("grown/results.csv"):find("\nhgumbel%-knn%-l2,1,[^\n]*,6,"))
    local extra = vx.runs.checkpoint.peek(scratch .. "/grown/checkpoints/hgumbel-knn-l2.safetensors")
    assert.equal(6 * 4, extra.position) -- every image in its turn, none twice
  end)

  it("refuses other data than those it was begun with", function()
    for _, split in ipairs { "train", "val" } do
      vx.runs.make_folders(scratch .. "/album/" .. split)
      for i = 1, 4 do vx.data.save(("%s/album/%s/%d.png"):format(scratch, split, i), vx.data.procedural(32, i, 1)) end
    end
    local command = "--data album --preset tiny --steps 2 --batch 4 --methods ste-euclid --out albums --resume"
    local output, status = sweep(command)
    assert.equal(0, status, output)
    output, status = sweep(command)
    assert.equal(0, status, output)
    vx.data.save(scratch .. "/album/train/5.png", vx.data.procedural(32, 5, 1))
    output, status = sweep(command)
    assert.equal(2, status, output)
    local said = "%-%-out albums was begun with other data: album held 8 items %(%x+%) then, now 9 items %(%x+%)"
    assert.truthy(output:find(said), output)
  end)

  it("stops cleanly at Ctrl-C and goes on", function()
    -- once, to the child alone
    local output, status = sweep("--steps 400000 --batch 4 --out stopped --methods softmax-ppl",
      "timeout --foreground -s INT 2")
    assert.truthy(status == 124 or status == 130, output)
    assert.truthy(output:find("stopped; go on with: luajit", 1, true), output)
    local extra = vx.runs.checkpoint.peek(scratch .. "/stopped/checkpoints/softmax-ppl.safetensors")
    assert.truthy(extra.step >= 1)
  end)

  it("refuses a damaged or foreign checkpoint by name", function()
    local path = "a/b/checkpoints/softmax-knn-ce.safetensors"
    local good = read(path)
    for what, bytes in pairs { truncated = good:sub(1, #good - 100),
      foreign = read "whole/checkpoints/re-cosine.safetensors", text = "hello" } do
      write(path, bytes)
      local output, status = sweep "--out a/b --resume"
      assert.equal(2, status, what)
      assert.truthy(output:find("softmax-knn-ce.safetensors", 1, true), output)
      assert.equal(bytes, read(path), what)
    end
    write(path, good)
  end)

  it("takes quantizers from another folder", function()
    lfs.mkdir(scratch .. "/more")
    write("more/mine.lua", [[
      local registry = require "vertex.quantizers"
      local ops = require "vertex.ops"
      local Mine = registry.Quantizer.extend "Mine"
      local how = { metric = "euclid", estimator = "ste", beta = 0.5, reduction = "sum" }
      function Mine:quantize(z)
        local y, reg, codes = ops.quantize_hard(z, self.codebook, how)
        return { quantized = y, codes = codes, terms = { hard = reg } }
      end
      return { names = { { name = "mine", summary = "half the commitment" } }, paper = "none",
        kind = "hard", metric = "euclid", codebook = true, class = Mine }
    ]])
    local output, status = sweep "--quantizers more --methods mine --steps 2 --batch 4 --out m"
    assert.equal(0, status, output)
    assert.truthy(read("m/results.csv"):find("\nmine,", 1, true))
    output = sweep "--quantizers more --help"
    assert.truthy(output:find("half the commitment", 1, true))
  end)

  it("says what is wrong with a file of quantizers", function()
    lfs.mkdir(scratch .. "/wrong")
    local class = "class = require('vertex.quantizers').Quantizer.extend 'Empty', "
    local facts = "paper = 'p', kind = 'hard', codebook = true, "
    local x = "names = { { name = 'x', summary = 's' } }, "
    for text, expected in pairs {
      ["return {"] = "wrong/one.lua:1: unexpected symbol",
      ["error 'no'"] = "wrong/one.lua:1: no",
      ["return 3"] = "wrong/one.lua returns a number",
      ["return { " .. class .. "}"] = "names no quantizer",
      ["return { names = { { name = 'a,b', summary = 's' } }, " .. facts .. class .. "}"] = "names[1] has no name",
      ["return { names = { { name = 'x' } }, " .. facts .. class .. "}"] = "its summary is missing",
      ["return { " .. x .. "kind = 'hard', codebook = true, " .. class .. "}"] = "does not declare paper of 'x'",
      ["return { " .. x .. "paper = 'p', codebook = true, " .. class .. "}"] = "does not declare kind of 'x'",
      ["return { " .. x .. "paper = 'p', kind = 'hard', " .. class .. "}"] = "does not declare codebook of 'x'",
      ["return { " .. x .. facts .. "metric = 'l2', " .. class .. "}"] = "declares metric = l2 of 'x', expected",
      ["return { " .. x .. facts .. "stages = 1.5, " .. class .. "}"] = "declares stages = 1.5 of 'x'",
      ["return { " .. x .. facts .. "optimizer = { lr = 1 }, " .. class .. "}"] = "declares optimizer = ",
      ["return { " .. x .. facts .. "optimiser = {}, " .. class .. "}"] = "has an unknown field 'optimiser'",
      ["return { " .. x .. facts .. "options = { 'k' }, " .. class .. "}"] = "options[1] should be",
      ["return { " .. x .. facts .. "class = 'X' }"] = "has as class a string",
      ["return { " .. x .. facts .. class .. "}"] = "does not define Empty:quantize",
    } do
      write("wrong/one.lua", text)
      local output, status = sweep "--quantizers wrong --steps 1 --out w"
      assert.equal(2, status, text)
      assert.truthy(output:find(expected, 1, true), text .. ": " .. output)
      assert.truthy(output:find("--quantizers: ", 1, true) == 1, output)
    end
    local mine = read "more/mine.lua"
    write("wrong/one.lua", (mine:gsub('"mine"', '"ste-euclid"')))
    local output = sweep "--quantizers wrong --steps 1 --out w"
    assert.truthy(output:find("'ste-euclid' of wrong/one.lua exists already", 1, true), output)
    assert.falsy(lfs.attributes(scratch .. "/w", "mode"))
  end)

  it("names and counts a broken image and goes on; --strict ends there", function()
    lfs.mkdir(scratch .. "/photos")
    for i = 1, 12 do vx.data.save(("%s/photos/%02d.png"):format(scratch, i), vx.data.procedural(40, 1, i)) end
    local bytes = read "photos/03.png"
    write("photos/03.png", bytes:sub(1, #bytes / 2))
    local output, status = sweep "--data photos --steps 6 --batch 4 --out p --methods ste-euclid"
    assert.equal(0, status, output)
    assert.truthy(output:find("03.png", 1, true), output)
    output, status = sweep "--data photos --steps 6 --batch 4 --out q --methods ste-euclid --strict"
    assert.truthy(status ~= 0)
    assert.truthy(output:find("03.png", 1, true), output)
  end)
end)
