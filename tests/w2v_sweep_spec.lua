-- experiments/w2v_sweep.lua and experiments/encode.lua as a user runs them: results, kill and resume, the names of
-- degenerate values, codes of files, and what is refused.

local H = require "tests.helper"
local A = require "tests.audio_files"
local json = require "vertex.json"
local lfs = require "lfs"
local vx = require "vertex"

local scratch = H.scratch "w2v-sweep"
lfs.mkdir(scratch)

local function run(program, arguments, before)
  local library = os.getenv "VERTEX_LIB" or H.root .. "/build/libvertex.so"
  return H.shell(("cd '%s' && VERTEX_LIB='%s' XDG_CACHE_HOME='%s' %s luajit '%s/experiments/%s.lua' %s 2>&1"):format(
    scratch, library, scratch, before or "", H.root, program, arguments))
end

-- seconds, not minutes: clips of 0.6 s, two at a time
local SMALL = "--device cpu --batch 2 --set crop=10000 "

local function read(path) return assert(H.read(scratch .. "/" .. path), path) end

--- Rows of results.csv by method.
local function results(out)
  local names, rows = nil, {}
  for line in read(out .. "/results.csv"):gmatch "[^\n]+" do
    local cells = {}
    for c in (line .. ","):gmatch "([^,]*)," do cells[#cells + 1] = c end
    if not names then names = cells else
      local row = {}
      for i, name in ipairs(names) do row[name] = tonumber(cells[i]) end
      rows[cells[1]] = row
    end
  end
  return rows
end

--- Bytes of every tensor of a checkpoint, in one string.
local function tensors(path)
  local loaded, names, parts = vx.load(scratch .. "/" .. path), {}, {}
  for name in pairs(loaded) do names[#names + 1] = name end
  table.sort(names)
  for i, name in ipairs(names) do parts[i] = name .. loaded[name]:bytes() end
  return table.concat(parts)
end

--- A wave as 16-bit WAV.
local function wav(path, samples, rate)
  local parts = {}
  local function u32(n) return string.char(n % 256, math.floor(n / 256) % 256, math.floor(n / 65536) % 256,
    math.floor(n / 2 ^ 24)) end
  local function u16(n) return string.char(n % 256, math.floor(n / 256)) end
  for i, x in ipairs(samples) do parts[i] = u16(math.floor(x * 32767) % 65536) end
  local data = table.concat(parts)
  H.write(scratch .. "/" .. path, "RIFF" .. u32(36 + #data) .. "WAVEfmt " .. u32(16) .. u16(1) .. u16(1) .. u32(rate)
    .. u32(2 * rate) .. u16(2) .. u16(16) .. "data" .. u32(#data) .. data)
end

local function tone(samples, cycles)
  local list = {}
  for i = 1, samples do list[i] = 0.3 * math.sin(2 * math.pi * cycles * i / samples) end
  return list
end

describe("w2v_sweep", function()
  -- The 64 utterances that synthetic speech is evaluated on take longer than any training here: one test has them, the
  -- others a folder of four clips.
  local FEW = SMALL .. "--data few "
  setup(function()
    vx.runs.make_folders(scratch .. "/few/train")
    vx.runs.make_folders(scratch .. "/few/val")
    for i = 1, 3 do H.write(scratch .. ("/few/train/%d.wav"):format(i), A.wav_of(A.noise(12000, i))) end
    H.write(scratch .. "/few/val/1.wav", A.wav_of(A.noise(12000, 4)))
  end)

  it("trains, evaluates, and leaves every file", function()
    local out, status = run("w2v_sweep", SMALL .. "--steps 3 --out a --methods softmax-knn-ce,ste-euclid")
    assert.equal(0, status, out)
    for _, file in ipairs { "config.json", "results.csv", "table.md", "metrics.jsonl", "curves.png",
      "checkpoints/ste-euclid.safetensors" } do
      assert.is_truthy(lfs.attributes(scratch .. "/a/" .. file), file)
    end
    for method, r in pairs(results "a") do
      for _, name in ipairs { "code_use_1", "code_use_2", "code_use", "accuracy", "equal" } do
        assert.is_true(r[name] >= 0 and r[name] <= 1, method .. " " .. name)
      end
      H.close({ r.perplexity_share }, { r.perplexity / 64 }, 1e-6, 0)
      assert.is_true(math.abs((r.code_use_1 + r.code_use_2) / 2 - r.code_use) < 1e-6)
      assert.is_true(r.perplexity >= 1 and r.perplexity <= 64 and r.loss >= 0 and r.steps == 3)
    end
    assert.truthy(read("a/table.md"):find("| Method | Codebook#1 | Codebook#2 |", 1, true))
  end)

  it("resumes to the same bits", function()
    local flags = FEW .. "--steps 12 --methods hgumbel-knn-ce --checkpoint 0 --quiet "
    local out, status = run("w2v_sweep", flags .. "--out whole")
    assert.equal(0, status, out)
    run("w2v_sweep", flags .. ("--out parts & pid=$!; until [ -e '%s/parts/checkpoints/hgumbel-knn-ce.safetensors' ]; "
      .. "do kill -0 $pid || exit; sleep 0.005; done; kill -9 $pid; wait $pid"):format(scratch), "exec")
    assert.is_nil(H.read(scratch .. "/parts/table.md"), "the run was never interrupted")
    out, status = run("w2v_sweep", flags .. "--out parts --resume")
    assert.equal(0, status, out)
    local checkpoint = "/checkpoints/hgumbel-knn-ce.safetensors"
    assert.equal(tensors("whole" .. checkpoint), tensors("parts" .. checkpoint))
    assert.equal(read "whole/metrics.jsonl", read "parts/metrics.jsonl")
    local a, b = results("whole")["hgumbel-knn-ce"], results("parts")["hgumbel-knn-ce"]
    for _, measured in ipairs { "seconds", "step_ms", "peak_mb" } do a[measured], b[measured] = nil, nil end
    assert.same(a, b)
  end)

  it("names a collapsed codebook in its log at the step that has it", function()
    local out, status = run("w2v_sweep", FEW .. "--steps 2 --out one --methods ste-euclid --set codes=1")
    assert.equal(0, status, out)
    assert.truthy(out:find("step 1: every distractor equals its target: loss 0", 1, true), out)
    local events = {}
    for line in read("one/metrics.jsonl"):gmatch "[^\n]+" do
      local entry = json.decode(line)
      if entry.event then events[#events + 1] = { entry.step, entry.event, entry.method } end
    end
    assert.same({ { 1, "collapsed", "ste-euclid" }, { 1, "collapse", "ste-euclid" } }, events)
    local r = results("one")["ste-euclid"]
    assert.same({ 1, 0, 0 }, { r.equal, r.loss, r.accuracy })
  end)

  it("names a stuck model: targets that cannot be told apart and are not equal", function()
    lfs.mkdir(scratch .. "/q")
    H.write(scratch .. "/q/blurred.lua", [[
      local core, ops, registry = require "vertex.core", require "vertex.ops", require "vertex.quantizers"
      local Blurred = registry.Quantizer.extend "Blurred"
      function Blurred:quantize(z) -- one direction for all rows, and a size for each
        local N, sizes = z:size(1), {}
        for n = 1, N do sizes[n] = n end
        local rows = ops.add(ops.affine(z, 0, 0), ops.reshape(core.tensor(sizes), { N, 1, 1 }))
        return { quantized = rows, codes = core.new({ N, self.columns }, { dtype = "i32" }):zero(), terms = {} }
      end
      return { order = 90, kind = "hard", metric = "cosine", codebook = true, class = Blurred, options = {},
        names = { { name = "blurred", summary = "one direction", paper = "none" } } }
    ]])
    local out, status = run("w2v_sweep", FEW .. "--steps 1 --out stuck --quantizers q --methods blurred")
    assert.equal(0, status, out)
    local entry = json.decode(read("stuck/metrics.jsonl"):match "[^\n]+")
    assert.same({ "stuck", 1 }, { entry.event, entry.step })
    assert.truthy(entry.text:find("ln 101 = 4.615", 1, true))
  end)

  it("refuses what cannot work before anything is written", function()
    local function refused(arguments, ...)
      local out, status = run("w2v_sweep", arguments .. " --out refused")
      assert.equal(2, status, out)
      for _, text in ipairs { ... } do assert.truthy(out:find(text, 1, true), out) end
      assert.is_nil(lfs.attributes(scratch .. "/refused"))
    end
    lfs.mkdir(scratch .. "/words")
    H.write(scratch .. "/words/1.trans.txt", "1 A TRANSCRIPT\n")
    refused("--data words", "no audio in words", "transcripts")
    refused("--data nowhere", "no folder nowhere")
    refused("--preset 1x1023", "unknown preset '1x1023'", "did you mean '1x1024'?")
    refused("--set crop=3000", "crop 3000 makes 9 frames, expected more than the 10 of a span")
    refused("--set quantizer.k=0", "k")
  end)

  it("refuses a checkpoint of another configuration", function()
    local out, status = run("w2v_sweep", SMALL .. "--steps 2 --out a --resume")
    assert.equal(2, status)
    assert.truthy(out:find("its steps is 3, asked for is 2 (it may grow)", 1, true), out)
  end)

  it("trains on a folder, and names and counts what it skips", function()
    lfs.mkdir(scratch .. "/set")
    for i, speaker in ipairs { "train-a", "test-b" } do
      lfs.mkdir(scratch .. "/set/" .. speaker)
      for k = 1, 2 do wav(("set/%s/%d.wav"):format(speaker, k), tone(11000, 100 * i * k), 16000) end
    end
    wav("set/train-a/short.wav", { 0.1, 0.2, 0.3 }, 16000)
    H.write(scratch .. "/set/train-a/broken.flac", "fLaC and no more")
    local flags = SMALL .. "--steps 2 --methods softmax-knn-ce --data set "
    local out, status = run("w2v_sweep", flags .. "--out set1")
    assert.equal(0, status, out)
    assert.truthy(out:find("skipped set/train-a/short.wav: too short: 3 samples", 1, true), out)
    assert.truthy(out:find("skipped set/train-a/broken.flac", 1, true), out)
    out, status = run("w2v_sweep", flags .. "--out set2 --strict")
    assert.is_true(status ~= 0, out)
    assert.truthy(out:find("set/train-a/", 1, true), out)
  end)
end)

describe("encode", function()
  local checkpoint = "a/checkpoints/softmax-knn-ce.safetensors"

  it("writes codes of audio files as npy and as text, and says what it skipped", function()
    wav("one.wav", tone(16000, 300), 16000)
    wav("two.wav", tone(9000, 500), 16000)
    wav("tiny.wav", { 0.1, 0.2, 0.3 }, 16000)
    local out, status = run("encode", checkpoint .. " one.wav two.wav --out codes --device cpu")
    assert.equal(0, status, out)
    local one, two = vx.load(scratch .. "/codes/one.npy"), vx.load(scratch .. "/codes/two.npy")
    assert.same({ { 49, 2 }, { 27, 2 } }, { one:shape(), two:shape() })
    assert.is_true(one:to("f32"):max():item() < 64 and one:to("f32"):min():item() >= 0)
    out, status = run("encode", checkpoint .. " one.wav tiny.wav two.wav --out text --format text --device cpu")
    assert.equal(1, status)
    assert.truthy(out:find("skipped tiny.wav: ", 1, true), out)
    assert.truthy(out:find("2 of 3 files", 1, true), out)
    local lines = {}
    for path, codes in read("text/codes.txt"):gmatch "([^\t\n]*)\t([^\n]*)\n" do
      local rows = {}
      for a, b in codes:gmatch "(%d+),(%d+)" do rows[#rows + 1] = { tonumber(a), tonumber(b) } end
      lines[#lines + 1] = { path, rows }
    end
    assert.same({ { "one.wav", one:totable() }, { "two.wav", two:totable() } }, lines)
  end)

  it("writes codes and reconstructions of images", function()
    local out, status = run("ae_sweep", "--steps 2 --batch 2 --out images --methods ste-euclid --device cpu --quiet")
    assert.equal(0, status, out)
    vx.data.save(scratch .. "/photo.png", vx.data.procedural({ 50, 70 }, 1, 3))
    out, status = run("encode", "images/checkpoints/ste-euclid.safetensors photo.png --out pictures --device cpu")
    assert.equal(0, status, out)
    assert.same({ 8, 8, 1 }, vx.load(scratch .. "/pictures/photo.npy"):shape())
    assert.same({ 32, 32, 3 }, vx.data.open(scratch .. "/pictures/photo.png"):shape())
    vx.runs.make_folders(scratch .. "/album/deeper")
    for i, name in ipairs { "a", "deeper/a", "b" } do
      vx.data.save(("%s/album/%s.png"):format(scratch, name), vx.data.procedural({ 40, 40 }, 1, i))
    end
    out, status = run("encode", "images/checkpoints/ste-euclid.safetensors album photo.png --out whole/codes.npy "
      .. "--images decoded --device cpu")
    assert.equal(0, status, out)
    local files, all = read "whole/codes.txt", vx.load(scratch .. "/whole/codes.npy")
    local row = 0
    for file in files:gmatch "[^\n]+" do
      row = row + 1
      if file == "photo.png" then
        assert.same(vx.load(scratch .. "/pictures/photo.npy"):totable(), all[row]:totable())
      end
    end
    assert.same({ 4, 8, 8, 1 }, all:shape())
    assert.same({ 4, 3 }, { row, select(2, files:gsub("album/", "")) })
    for _, name in ipairs { "a", "deeper_a", "b", "photo" } do
      assert.same({ 32, 32, 3 }, vx.data.open(("%s/decoded/%s.png"):format(scratch, name)):shape())
    end
    out, status = run("encode", "images/checkpoints/ste-euclid.safetensors album --out x.npy --format text")
    assert.equal(2, status, out)
    assert.truthy(out:find("--out x.npy: --format text wants a folder", 1, true), out)
  end)

  it("refuses what it cannot use", function()
    local function refused(arguments, text)
      local out, status = run("encode", arguments .. " --out refused --device cpu")
      assert.equal(2, status, out)
      assert.truthy(out:find(text, 1, true), out)
      assert.is_nil(lfs.attributes(scratch .. "/refused"))
    end
    refused("none.safetensors one.wav", "none.safetensors: no such file")
    vx.save(scratch .. "/plain.safetensors", { x = vx.zeros { 1 } })
    refused("plain.safetensors one.wav", "plain.safetensors is no checkpoint of this project")
    lfs.mkdir(scratch .. "/more")
    wav("more/one.wav", tone(9000, 500), 16000)
    refused(checkpoint .. " one.wav more/one.wav", "one.wav and more/one.wav would both become one.npy")
    local state, meta = vx.load(scratch .. "/" .. checkpoint)
    state["model.project_q.weight"] = vx.zeros { 3, 3 }
    vx.save(scratch .. "/other.safetensors", state, meta)
    refused("other.safetensors one.wav", "is of another model than the preset 'tiny'")
  end)
end)
