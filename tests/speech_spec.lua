-- Streams of speech: the index of a folder, the same crops whatever the workers, files that cannot be used, splits by
-- speaker, the synthetic set.

local lfs = require "lfs"
local vx = require "vertex"
local core = require "vertex.core"
local speech = require "vertex.data.speech"
local A = require "tests.audio_files"
local H = require "tests.helper"

local wav, wav_of, floats, noise, folder_of = A.wav, A.wav_of, A.floats, A.noise, A.folder_of

local folder = "tests/fixtures/audio"
local golden = dofile "tests/fixtures/audio.lua"

-- Opens a set without an index of its own; undefined options are the fixtures'.
local function open(options)
  local o = { path = folder, split = "all", crop = 3000, batch = 4, seed = 3, index = false, quality = "medium" }
  for name, value in pairs(options or {}) do o[name] = value end
  return vx.data.speech(o)
end

-- Up to n batches as strings of bytes, with their positions.
local function run(options, n)
  local set, batches, positions = open(options), {}, {}
  for i = 1, n do
    local waves, lengths, index = set:next()
    if not waves then break end
    batches[i], positions[i] = waves:bytes() .. lengths:bytes() .. index:bytes(), set:position()
  end
  set:close()
  return batches, positions
end

-- Lists what a set cannot use, as "name: reason".
local function broken_of(set)
  local list = {}
  for i, b in ipairs(set:broken()) do list[i] = b.path:match "[^/]*$" .. ": " .. b.reason end
  table.sort(list)
  return list
end

-- -- The index --------------------------------------------------------------------------------------------------------

describe("the index of a folder", function()
  -- Opens a set and counts the files that were decoded for it.
  local function opened(path, index, extra)
    local decoded = 0
    local o = { path = path, index = index, crop = 100, shortest = 1 }
    function o.progress(_, total) decoded = total end
    for name, value in pairs(extra or {}) do o[name] = value end
    local set = open(o)
    return set, decoded
  end

  local function lengths(set)
    local list = {}
    for i, file in ipairs(set.files) do list[i] = file.path:match "[^/]*$" .. " " .. file.frames end
    return list
  end

  it("is made once, and again for the files that change, come or go", function()
    local path, index = folder_of { ["a.wav"] = wav_of(noise(300)), ["b.wav"] = wav_of(noise(400)), ["c.wav"] = "x" },
      H.scratch "folders/of/the/index.tsv"
    local set, decoded = opened(path, index)
    assert.same({ 3, { "a.wav 300", "b.wav 400" } }, { decoded, lengths(set) })
    assert.same({ "c.wav: no audio by its content" }, broken_of(set))
    local first = set:next():bytes()
    set, decoded = opened(path, index)
    assert.same({ 0, { "a.wav 300", "b.wav 400" } }, { decoded, lengths(set) })
    assert.same({ "c.wav: no audio by its content" }, broken_of(set))
    assert.is_true(first == set:next():bytes())

    H.write(path .. "/b.wav", wav_of(noise(500)))
    H.write(path .. "/d.wav", wav_of(noise(600)))
    os.remove(path .. "/a.wav")
    set, decoded = opened(path, index)
    assert.same({ 2, { "b.wav 500", "d.wav 600" } }, { decoded, lengths(set) })

    -- of the same size, written later
    H.write(path .. "/c.wav", "y")
    lfs.touch(path .. "/c.wav", 1e9)
    set, decoded = opened(path, index)
    assert.equal(1, decoded)
    assert.equal(1, #set:broken())
  end)

  it("keeps files apart that are decoded side by side, broken ones among them", function()
    local sound = { "chirp.flac", "chirp.ogg", "chirp.opus", "chirp.mp3", "law.au", "adpcm.wav" }
    local contents, paths, expected = {}, {}, {}
    for i = 1, 120 do
      local name = sound[i % #sound + 1]
      local bytes = H.read(folder .. "/" .. name)
      local broken = i % 4 < 2
      contents[i .. ".bin"] = broken and bytes:sub(1, 12) .. ("x"):rep(3000) or bytes
      expected[i] = not broken and golden.sound[name].frames or nil
    end
    local path = folder_of(contents)
    for i = 1, 120 do paths[i] = ("%s/%d.bin"):format(path, i) end
    H.with_threads(8, function()
      for _ = 1, 5 do
        for i, about in ipairs(core.audio_scan(paths)) do
          if expected[i] then assert.is_nil(about.reason) end
          assert.equal(expected[i] or 0, about.frames)
        end
      end
    end)
  end)

  it("holds for the splits of a folder together", function()
    local path, index = folder_of { ["train/a.wav"] = wav_of(noise(300)), ["test/b.wav"] = wav_of(noise(300)) },
      H.scratch "splits.tsv"
    local decoded = {}
    for i, split in ipairs { "train", "val", "train", "val", "all" } do
      local _, n = opened(path, index, { split = split })
      decoded[i] = n
    end
    assert.same({ 1, 1, 0, 0, 0 }, decoded)
  end)

  it("may be garbage, of another version, or where nothing can be written", function()
    local path = folder_of { ["a.wav"] = wav_of(noise(300)) }
    for _, text in ipairs { "\0\1\2", "vertex audio index 0\n1\t2\t3\t4\t5\t1\t\t" .. path .. "/a.wav\n",
      "vertex audio index 1\nline\n1\t2\n" } do
      local _, decoded = opened(path, H.write(H.scratch "garbage.tsv", text))
      assert.equal(1, decoded)
    end
    local _, decoded = opened(path, path .. "/a.wav/index.tsv")
    assert.equal(1, decoded)
    H.raises(function() open { index = 3 } end, "speech: index is 3, expected a path or false")
  end)

  it("is kept in the user's cache", function()
    local path, cache = folder_of { ["a.wav"] = wav_of(noise(300)) }, H.scratch "cache"
    local script = ([[
      local vx = require "vertex"
      local n = 0
      vx.data.speech { path = %q, split = "all", shortest = 1, progress = function() n = n + 1 end }
      print(n)
    ]]):format(path)
    assert.equal("1\n", (H.child(script, "XDG_CACHE_HOME='" .. cache .. "'")))
    assert.equal("0\n", (H.child(script, "XDG_CACHE_HOME='" .. cache .. "'")))
    assert.equal("0\n", (H.child(script:gsub(path, path .. "/"), "XDG_CACHE_HOME='" .. cache .. "'")))
  end)

  it("is left for the next time when interrupted", function()
    local path, index = folder_of { ["a.wav"] = wav_of(noise(300)) }, H.scratch "interrupted.tsv"
    core.catching_interrupts(function()
      os.execute "kill -TERM $PPID" -- os.execute itself shields from SIGINT
      H.raises(function() vx.data.speech { path = path, index = index } end,
        "speech: interrupted while the lengths of files were taken")
    end)
    local set, decoded = opened(path, index)
    assert.same({ 1, { "a.wav 300" } }, { decoded, lengths(set) })
  end)
end)

-- -- Streams ----------------------------------------------------------------------------------------------------------

describe("a stream of speech", function()
  for _, case in ipairs {
    { "random crops", {} },
    { "the first samples, in order", { place = "start", shuffle = false } },
    { "all crops", { place = "all" } },
    { "another rate", { rate = 11025 } },
    { "normalized", { normalize = true } },
    { "synthetic", { path = false, count = 12, crop = 20000 } },
  } do
    it("gives the same batches whatever the workers, queue and cache: " .. case[1], function()
      local function with(extra)
        for name, value in pairs(case[2]) do extra[name] = value or nil end
        if case[2].path == false then
          local set = { count = 12, crop = 20000, batch = 4, seed = 3, workers = extra.workers, queue = extra.queue,
            cache_bytes = extra.cache_bytes }
          local batches, s = {}, vx.data.speech(set)
          for i = 1, 8 do
            local waves, lengths, index = s:next()
            batches[i] = waves:bytes() .. lengths:bytes() .. index:bytes()
          end
          return batches, {}
        end
        return run(extra, 12)
      end
      local batches, positions = with { workers = 1, queue = 1, cache_bytes = 0 }
      assert.is_true(#batches >= 8)
      for _, other in ipairs { { workers = 2 }, { workers = 7, queue = 3 }, { workers = 5, cache_bytes = 60000 } } do
        local b, p = with(other)
        assert.equal(#batches, #b)
        for i = 1, #b do assert.is_true(b[i] == batches[i], "batch " .. i) end
        assert.same(positions, p)
      end
    end)
  end

  it("crops windows of the whole wave, sample by sample, of every codec", function()
    local crop, starts = 1000, {}
    local set = open { crop = crop, epochs = 3, quality = "best" }
    while true do
      local waves, lengths, index = set:next()
      if not waves then break end
      waves = waves:totable()
      for row, i in ipairs(index:totable()) do
        local file = set.files[i + 1]
        local whole = vx.data.open_audio(file.path):totable()
        assert.equal(#whole, file.length)
        assert.equal(crop, lengths:totable()[row])
        local found
        for start = 0, #whole - crop do
          local k = 1
          while k <= crop and whole[start + k] == waves[row][k] do k = k + 1 end
          if k > crop then
            found = start
            break
          end
        end
        assert.is_not_nil(found, file.path)
        starts[#starts + 1] = found
      end
    end
    assert.equal(3 * 12, #starts)
    table.sort(starts)
    assert.is_true(starts[30] - starts[6] > 4000, "crops come from all over")
  end)

  it("gives all of every file with place 'all', less what is too short at the end", function()
    local path = folder_of { ["a.wav"] = wav_of(noise(250)), ["b.wav"] = wav_of(noise(209)),
      ["c.wav"] = wav_of(noise(100)), ["d.wav"] = wav_of(noise(30)) }
    local set = open { path = path, crop = 100, shortest = 10, place = "all", shuffle = false, epochs = 1, batch = 100 }
    local waves, lengths = set:next()
    -- 250 = 100 + 100 + 50; 209 = 100 + 100 (+ 9); 100; 30
    assert.same({ 100, 100, 50, 100, 100, 100, 30 }, lengths:totable())
    assert.same({ 7, 7 }, { set:size(), waves:size(1) })
    local rows, at = waves:totable(), 1
    for _, n in ipairs { 250, 209, 100, 30 } do
      local values = noise(n)
      for i = 1, n < 209 and n or n == 250 and 250 or 200 do
        assert.equal(values[i] / 32768, rows[at + math.floor((i - 1) / 100)][(i - 1) % 100 + 1])
      end
      at = at + (n == 250 and 3 or n == 209 and 2 or 1)
    end
  end)

  it("follows short utterances by zeros, and normalizes before that", function()
    local path = folder_of { ["a.wav"] = wav_of(noise(500)) }
    local values = noise(500)
    for _, normalize in ipairs { false, true } do
      local waves, lengths = open({ path = path, crop = 800, batch = 1, normalize = normalize }):next()
      local row, mean, variance = waves:totable()[1], 0, 0
      assert.same({ 500 }, lengths:totable())
      for i = 501, 800 do assert.equal(0, row[i]) end
      for i = 1, 500 do mean = mean + values[i] / 32768 / 500 end
      for i = 1, 500 do variance = variance + (values[i] / 32768 - mean) ^ 2 / 500 end
      for i = 1, 500 do
        local plain = values[i] / 32768
        local expected = normalize and (plain - mean) / math.sqrt(variance + 1e-5) or plain
        assert.is_true(math.abs(row[i] - expected) < 1e-6)
      end
    end
  end)

  it("goes on from a position exactly, and divides among shards", function()
    local batches, positions = run({}, 12)
    for _, done in ipairs { 1, 7 } do
      local rest = run({ position = positions[done], workers = 3 }, 12 - done)
      for i = 1, #rest do assert.is_true(rest[i] == batches[done + i]) end
    end
    assert.is_false(batches[1] == run({ seed = 4 }, 1)[1])
    local seen = {}
    for shard = 0, 2 do
      local set = open { shard = shard, shards = 3, epochs = 1 }
      while true do
        local waves, _, index = set:next()
        if not waves then break end
        for _, i in ipairs(index:totable()) do seen[i] = (seen[i] or 0) + 1 end
      end
    end
    for i = 0, 11 do assert.equal(1, seen[i]) end
  end)

  it("names, counts and leaves out what cannot be used; with strict it is fatal", function()
    local set = open {}
    local broken = broken_of(set)
    assert.equal(#golden.broken, #broken)
    for i, name in ipairs(golden.broken) do assert.equal(name, broken[i]:match "^(.-): ") end
    assert.equal(12, #set.files)
    H.raises(function() open { strict = true } end, "speech: " .. folder .. "/damaged.flac: cut short or damaged: ")
  end)

  it("leaves out files shorter than asked for, at the rate of the set", function()
    local path = folder_of { ["three.wav"] = wav_of { 1, 2, 3 }, ["399.wav"] = wav_of(noise(399)),
      ["400.wav"] = wav_of(noise(400)), ["slow.wav"] = wav_of(noise(200), 8000),
      ["slower.wav"] = wav_of(noise(199), 8000) }
    local set = open { path = path }
    assert.same({ "399.wav: too short: 399 samples at 16000 Hz, at least 400 are needed",
      "slower.wav: too short: 398 samples at 16000 Hz, at least 400 are needed",
      "three.wav: too short: 3 samples at 16000 Hz, at least 400 are needed" }, broken_of(set))
    assert.equal(2, set:size())
    H.raises(function() open { path = path, shortest = 401 } end,
      "speech: none of 5 files in " .. path .. " can be used; the first: " .. path .. "/399.wav: too short: ")
    H.raises(function() open { path = path, strict = true } end, path .. "/399.wav: too short: 399 samples")
    assert.equal(5, open({ path = path, shortest = 1, crop = 3 }):size())
  end)

  it("leaves out NaN samples wherever they are in the file", function()
    local values = {}
    for i = 1, 3000 do values[i] = i == 2991 and 0 / 0 or 0.1 end
    local path = folder_of { ["nan.wav"] = wav(floats(values), 16000, 1, 32, 3), ["b.wav"] = wav_of(noise(2000)) }
    local set = open { path = path, crop = 100, epochs = 3 }
    assert.same({ "nan.wav: sample 2990 (0-based) is NaN or Inf" }, broken_of(set))
    assert.equal(1, set:size())
  end)

  it("reads 7,999 Hz, stereo, 8 and 24 bits and floats above 1 side by side", function()
    local loud = {}
    for i = 1, 900 do loud[i] = 1.5 * math.cos(i) end
    local path = folder_of { ["7999.wav"] = wav_of(noise(800), 7999), ["stereo.wav"] = wav_of(noise(2000), 16000, 2),
      ["8.wav"] = wav(("\200\100"):rep(500), 16000, 1, 8), ["24.wav"] = wav_of(noise(700), 16000, 1, 24),
      ["float.wav"] = wav(floats(loud), 16000, 1, 32, 3) }
    local set = open { path = path, crop = 2000, shuffle = false, batch = 5 }
    local waves, lengths = set:next()
    assert.same({ 700, math.ceil(800 * 16000 / 7999), 1000, 900, 1000 }, lengths:totable())
    local rows = waves:totable()
    assert.same({ 72 / 128, -28 / 128 }, { rows[3][1], rows[3][2] })
    assert.equal(noise(1)[1] / 8388608, rows[1][1])
    local largest = 0
    for i = 1, 900 do largest = math.max(largest, rows[4][i]) end
    assert.is_true(largest > 1.49)
  end)

  it("says once which files are resampled", function()
    local path = folder_of { ["a.wav"] = wav_of(noise(800), 7999), ["b.wav"] = wav_of(noise(800), 8000),
      ["c.wav"] = wav_of(noise(900), 8000), ["d.wav"] = wav_of(noise(900)) }
    local out = H.child(([[
      local vx = require "vertex"
      for _ = 1, 3 do vx.data.speech { path = %q, split = "all", index = false } end
    ]]):format(path))
    assert.equal(path .. ": 3 of 4 files are resampled to 16000 Hz by libsamplerate (1 of 7999 Hz, 2 of 8000 Hz)\n",
      out)
  end)

  it("names a file that changed or went after its length was taken", function()
    local path = H.scratch "changing"
    local function set_before(contents, strict, place)
      core.make_folders(path)
      for _, name in ipairs { "a.wav", "b.wav" } do H.write(path .. "/" .. name, wav_of(noise(900))) end
      local set = open { path = path, crop = 500, batch = 1, queue = 1, workers = 1, epochs = 9, strict = strict,
        place = place }
      set:next()
      if contents then H.write(path .. "/b.wav", contents) else os.remove(path .. "/b.wav") end
      return set
    end
    local stale = "no longer the file of 900 samples that it was when its length was taken"
    for _, case in ipairs { { wav_of(noise(100)), stale }, { wav_of(noise(900), 8000), stale },
      { "text", "no audio by its content" }, { nil, "No such file or directory" } } do
      local set, batches = set_before(case[1]), 1
      while set:next() do batches = batches + 1 end
      assert.same({ "b.wav: " .. case[2] }, broken_of(set))
      assert.is_true(batches >= 9 and batches < 13)
      local strict = set_before(case[1], true)
      H.raises(function() while strict:next() do end end, path .. "/b.wav: " .. case[2])
    end
    local all = set_before(nil, false, "all")
    while all:next() do end
    assert.same({ "b.wav: No such file or directory" }, broken_of(all))
  end)

  it("keeps no tensor, and is closed at once", function()
    local set = open {}
    vx.step(function() set:next() end)
    collectgarbage()
    local before = core.memory("cpu").live
    for _ = 1, 20 do vx.step(function() set:next() end) end
    assert.equal(before, core.memory("cpu").live)
    assert.equal(3, set:batches())
    assert.is_true(math.abs(set:seconds() - (9 * 12000 + 12204 + 13248 + 2000) / 16000) < 1e-9)
    set:close()
    set:close()
    H.raises(function() set:next() end, "speech: this set was closed")
    assert.truthy(tostring(set):find("12 files", 1, true))
  end)

  it("puts batches where it is told", function()
    local waves, lengths, index = open({ device = "emu:0" }):next()
    assert.same({ "emu:0", "emu:0", "cpu" }, { waves:device(), lengths:device(), index:device() })
    assert.same({ { 4, 3000 }, { 4 }, "i32" }, { waves:shape(), lengths:shape(), lengths:dtype() })
  end)

  it("refuses what makes no sense, at the caller's line", function()
    H.raises(function() open { crops = 3 } end, "speech: unknown option 'crops', did you mean 'crop'?")
    H.raises(function() open { crop = 0 } end, "crop is 0, expected an integer of 1 or more")
    H.raises(function() open { crop = 2 ^ 40 } end, "crop <= 268435456")
    H.raises(function() open { place = "end" } end, "place is 'end', expected random or start or all")
    H.raises(function() open { quality = "fast" } end, "quality is 'fast', expected best or medium")
    H.raises(function() open { eps = -1 } end, "eps is -1, expected a number of at least 0")
    H.raises(function() open { rate = 2 ^ 30 } end, "rate is 1073741824, expected an integer from 1 to 768000")
    H.raises(function() open { rate = 10 } end, "none of 21 files", "too short: ")
    H.raises(function() open { path = "no/such" } end, "speech: no folder no/such")
    H.raises(function() open { path = folder .. "/chirp.flac" } end, "is a file, expected a folder of audio files")
    H.raises(function() vx.data.speech { split = "test" } end, "split is 'test', expected train or val or all")
    H.raises(function() vx.data.speech { rate = 8000 } end, "the synthetic set is at 16000 Hz, rate is 8000")
  end)
end)

-- -- Folders ----------------------------------------------------------------------------------------------------------

describe("a folder of speech", function()
  local function found(path, split)
    local list = {}
    for i, file in ipairs((speech.find(path, split))) do list[i] = file:sub(#path + 2) end
    return list
  end

  it("without audio, or with transcripts only, says so", function()
    local path = folder_of {}
    H.raises(function() open { path = path } end, "speech: no audio in " .. path .. " (0 other files")
    path = folder_of { ["1-2.trans.txt"] = "1-2-0000 WORDS\n", ["README"] = "text", ["x.tsv"] = "a\tb\n" }
    H.raises(function() open { path = path } end, "speech: no audio in " .. path .. " (3 other files", "transcripts")
    path = folder_of { ["words.flac"] = "1-2-0000 WORDS\n" }
    H.raises(function() open { path = path } end, "none of 1 files in", "words.flac: no audio by its content")
  end)

  it("keeps its own division, and each of its folders is a split", function()
    local path = folder_of { ["train-a/1/x.flac"] = "", ["train-b/2/y.wav"] = "", ["test-other/3/z.wav"] = "",
      ["dev-clean/4/w.wav"] = "", ["odd.wav"] = "", ["train-a/1/1.trans.txt"] = "" }
    assert.same({ "train-a/1/x.flac", "train-b/2/y.wav" }, found(path, "train"))
    assert.same({ "test-other/3/z.wav" }, found(path, "val"))
    assert.same({ "dev-clean/4/w.wav" }, found(path, "dev-clean"))
    assert.equal(5, #found(path, "all"))
    os.remove(path .. "/test-other/3/z.wav")
    H.shell("rm -r '" .. path .. "/test-other'")
    assert.same({ "dev-clean/4/w.wav" }, found(path, "val"))
    H.raises(function() open { path = path, split = "test" } end,
      "split is 'test', expected train or val or all, or a folder in " .. path .. ": dev-clean, train-a, train-b")
    H.raises(function() open { path = path, split = "../x" } end, "split is '../x'")
  end)

  it("is divided by speaker where it has no division of its own", function()
    local files = {}
    for speaker = 1, 40 do
      for i = 1, 3 do files[("%d/7/%d-7-%04d.flac"):format(speaker, speaker, i)] = "" end
    end
    local path = folder_of(files)
    local train, val = found(path, "train"), found(path, "val")
    assert.equal(120, #train + #val)
    assert.is_true(#val >= 3 and #val <= 24, #val)
    local side = {}
    for _, file in ipairs(train) do side[file:match "^%d+"] = true end
    for _, file in ipairs(val) do assert.is_nil(side[file:match "^%d+"]) end
    -- fixed for good: a checkpoint's validation speakers must stay what they were
    assert.equal("1/7/1-7-0001.flac", val[1])
  end)

  it("is divided by file where all is in one folder", function()
    local files = {}
    for i = 1, 30 do files[("speaker/%d.wav"):format(i)] = "" end
    local path = folder_of(files)
    local train, val = found(path, "train"), found(path, "val")
    assert.equal(30, #train + #val)
    assert.is_true(#val >= 1 and #val <= 9)
  end)
end)

-- -- The synthetic set ------------------------------------------------------------------------------------------------

describe("synthetic speech", function()
  it("is a function of seed and index", function()
    local x = vx.data.synthetic_speech(1, 0)
    assert.is_true(x:bytes() == vx.data.synthetic_speech(1, 0):bytes())
    assert.is_false(x:bytes() == vx.data.synthetic_speech(1, 1):bytes())
    assert.is_false(x:bytes() == vx.data.synthetic_speech(2, 0):bytes())
    -- fixed for good: results of another day must be comparable
    assert.equal(72182, x:size(1))
  end)

  local cosine, sine = {}, {}
  for i = 0, 511 do cosine[i], sine[i] = math.cos(2 * math.pi * i / 512), math.sin(2 * math.pi * i / 512) end

  -- Gives mean power of |x| in a band of Hz, by a plain discrete Fourier transform of 512 samples from `at` on.
  local function power(x, at, low, high)
    local sum = 0
    for k = math.floor(low / 31.25), math.floor(high / 31.25) do
      local re, im = 0, 0
      for i = 0, 511 do
        local window = 0.5 - 0.5 * cosine[i]
        re = re + window * x[at + i] * cosine[k * i % 512]
        im = im + window * x[at + i] * sine[k * i % 512]
      end
      sum = sum + re * re + im * im
    end
    return sum
  end

  it("has a speech-like level, pauses, and both voiced and noisy stretches", function()
    for index = 0, 1 do
      local x = vx.data.synthetic_speech(3, index)
      local values, squares = x:totable(), 0
      assert.is_true(#values >= 32000 and #values <= 160000)
      for i = 1, #values do squares = squares + values[i] ^ 2 end
      local rms = math.sqrt(squares / #values)
      assert.is_true(rms > 0.025 and rms < 0.11, "level " .. rms)
      local quiet, voiced, noisy, frames = 0, 0, 0, 0
      for at = 1, math.min(#values, 48000) - 512, 1024 do
        local low, high = power(values, at, 60, 1200), power(values, at, 2800, 7900)
        frames = frames + 1
        if low + high < 0.02 * squares / #values * 512 * 96 then quiet = quiet + 1
        elseif low > 10 * high then voiced = voiced + 1
        elseif high > 3 * low then noisy = noisy + 1 end
      end
      assert.is_true(voiced > 0.15 * frames, "voiced " .. voiced)
      assert.is_true(quiet + noisy > 0, "quiet or noisy " .. quiet .. " " .. noisy)
    end
  end)

  it("comes through the same stream", function()
    local set = vx.data.speech { count = 5, crop = 160000, batch = 5, shuffle = false, speech_seed = 7, epochs = 1 }
    local waves, lengths = set:next()
    for i = 1, 5 do
      local x = vx.data.synthetic_speech(7, i - 1)
      assert.equal(x:size(1), lengths:totable()[i])
      assert.is_true(core.contiguous(waves[i]:narrow(1, 1, x:size(1))):bytes() == x:bytes())
    end
    assert.is_nil((set:next()))
    assert.same({}, set:broken())
    assert.is_nil(set:seconds())
  end)

  it("has other utterances and voices for validation", function()
    local function first(split)
      return vx.data.speech({ split = split, count = 1, batch = 1 }):next():bytes()
    end
    assert.is_false(first "train" == first "val")
    assert.equal(64, vx.data.speech({ split = "val" }):size())
    assert.equal(512, vx.data.speech():size())
  end)
end)
