-- Audio files: values against soundfile's, every bad file named with the reason; resampling against SciPy's.

local vx = require "vertex"
local core = require "vertex.core"
local A = require "tests.audio_files"
local H = require "tests.helper"

local wav, wav_of, floats, noise = A.wav, A.wav_of, A.floats, A.noise

local folder = "tests/fixtures/audio"
local golden = dofile "tests/fixtures/audio.lua"

local function open_bytes(content) return vx.data.open_audio(H.write(H.scratch "one.wav", content), 0) end

-- -- Files ------------------------------------------------------------------------------------------------------------

describe("audio files", function()
  local names = {}
  for name in pairs(golden.sound) do names[#names + 1] = name end
  table.sort(names)
  local lossy = { ["chirp.ogg"] = true, ["chirp.opus"] = true, ["chirp.mp3"] = true, ["headerless.mp3"] = true }

  for _, name in ipairs(names) do
    it("are read as soundfile reads them: " .. name, function()
      local expected = golden.sound[name]
      local x, about = vx.data.open_audio(folder .. "/" .. name, 0)
      assert.equal(expected.frames, x:size(1))
      assert.same({ expected.frames, expected.rate, 1 }, { about.frames, about.rate, about.channels })
      assert.equal(not lossy[name] and name ~= "piped.flac", about.exact_seek)
      local values, picked = x:totable(), {}
      for i = 1, #values, golden.stride do picked[#picked + 1] = values[i] end
      -- nine digits stand in the file
      H.close(picked, expected.samples, lossy[name] and 0 or 1e-8, lossy[name] and 2e-4 or 0, name)
    end)
  end

  it("of 8, 16, 24 and 32 bits are exact fractions of full scale", function()
    for _, case in ipairs {
      { wav(string.char(0, 1, 128, 129, 255), 16000, 1, 8), { -1, -127 / 128, 0, 1 / 128, 127 / 128 } },
      { wav_of { -32768, -1, 0, 1, 32767 }, { -1, -1 / 32768, 0, 1 / 32768, 32767 / 32768 } },
      { wav_of({ -8388608, -1, 3, 8388607 }, 16000, 1, 24), { -1, -1 / 8388608, 3 / 8388608, 8388607 / 8388608 } },
      { wav_of({ -2147483648, 128 }, 16000, 1, 32), { -1, 128 / 2147483648 } },
    } do
      assert.same(case[2], open_bytes(case[1]):totable())
    end
  end)

  it("of floats keep values above 1", function()
    local values = { 0.5, 1.5, -3, 1e-3, 2 ^ -20 }
    local x = open_bytes(wav(floats(values), 16000, 1, 32, 3))
    H.close(x:totable(), values, 1e-7, 0)
  end)

  it("of several channels are mixed to their mean", function()
    local values = noise(60, 5)
    local stereo, about = open_bytes(wav_of(values, 16000, 2))
    local mean = {}
    for i = 1, 30 do mean[i] = (values[2 * i - 1] + values[2 * i]) / 65536 end
    assert.same(mean, stereo:totable())
    assert.equal(2, about.channels)
    local three = open_bytes(wav_of(values, 16000, 3)):totable()
    for i = 1, 20 do mean[i] = (values[3 * i - 2] + values[3 * i - 1] + values[3 * i]) / 3 / 32768 end
    H.close(three, { unpack(mean, 1, 20) }, 1e-7, 0)
  end)

  it("are refused with the sample's number where one is NaN or infinite", function()
    for _, bad in ipairs { 0 / 0, 1 / 0, -1 / 0 } do
      local path = H.write(H.scratch "nan.wav", wav(floats { 0, 0, 0, 0, 1, bad, 1, 0 }, 16000, 2, 32, 3))
      H.raises(function() vx.data.open_audio(path) end, path, "sample 2 (0-based) is NaN or Inf")
    end
  end)

  for name, text in pairs {
    ["truncated.flac"] = "cut short or damaged: ", ["truncated.wav"] = "cut short: 3000 bytes of 6044",
    ["damaged.flac"] = "cut short or damaged: ", ["transcript.flac"] = "no audio by its content",
    ["transcript.au"] = "no audio by its content", ["empty.wav"] = "an empty file",
    ["song.m4a"] = "MPEG-4 audio, but libsndfile cannot read it: ", ["no_samples.wav"] = "no samples in it",
    ["headerless_vbr.mp3"] = "cut short or damaged: 3291 samples of ",
  } do
    it("that cannot be used are named with the reason: " .. name, function()
      H.raises(function() vx.data.open_audio(folder .. "/" .. name) end, folder .. "/" .. name .. ": " .. text)
    end)
  end

  it("that were cut are told by the size in their header", function()
    local data = {}
    for i, v in ipairs(noise(600)) do data[i] = wav_of({ v }):sub(-2) end
    data = table.concat(data)
    local sphere = ("NIST_1A\n   1024\nsample_count -i 600\nsample_rate -i 8000\nchannel_count -i 1\n"
      .. "sample_n_bytes -i 2\nsample_byte_format -s2 01\nsample_sig_bits -i 16\nsample_coding -s3 pcm\nend_head\n")
    sphere = sphere .. ("\n"):rep(1024 - #sphere) .. data
    local au = ".snd\0\0\0\24\0\0\4\176\0\0\0\3\0\0\31\64\0\0\0\1" .. data
    for name, case in pairs {
      ["a.sph"] = { sphere, "cut short or damaged: 300 samples of 600" },
      ["a.au"] = { au, "cut short: 624 bytes of 1224" },
      ["a.wav"] = { wav_of(noise(600)), "cut short: 644 bytes of 1244" },
    } do
      local path = H.write(H.scratch(name), case[1])
      assert.equal(600, vx.data.open_audio(path, 0):size(1))
      H.write(path, case[1]:sub(1, -601))
      H.raises(function() vx.data.open_audio(path) end, path .. ": " .. case[2])
    end
  end)

  it("have a case for each broken fixture", function()
    assert.equal(9, #golden.broken)
  end)

  it("are what their bytes say, whatever the name", function()
    assert.equal("WAV", core.audio_kind(folder .. "/wav_inside.txt"))
    assert.equal("none", core.audio_kind(folder .. "/1-2.trans.txt"))
    assert.equal("FLAC", core.audio_kind(folder .. "/chirp.flac"))
    assert.same({ "MPEG-4 audio", false }, { core.audio_kind(folder .. "/song.m4a") })
    assert.same({ "MP3", true }, { core.audio_kind(folder .. "/headerless.mp3") })
    assert.is_nil((core.audio_kind "no/such/file"))
  end)

  it("are no pipes, folders or missing ones", function()
    local pipe = H.scratch "pipe.wav"
    H.shell("mkfifo '" .. pipe .. "'")
    H.raises(function() vx.data.open_audio(pipe) end, "a device or pipe, not a file")
    H.raises(function() vx.data.open_audio(folder) end, "a folder, not a file")
    H.raises(function() vx.data.open_audio "no/such.wav" end, "no/such.wav: No such file or directory")
    H.raises(function() vx.data.open_audio(3) end, "path is 3, expected")
  end)
end)

-- -- Resampling -------------------------------------------------------------------------------------------------------

describe("resampling", function()
  -- Makes n samples of the golden tones at a rate.
  local function tones(rate, n)
    local x = {}
    for i = 1, n do
      local sum = 0
      for _, tone in ipairs(golden.tones) do
        sum = sum + tone[1] * math.sin(2 * math.pi * tone[2] * (i - 1) / rate + tone[3])
      end
      x[i] = sum
    end
    return x
  end

  for rate, expected in pairs(golden.resampled) do
    it("gives what SciPy gives, from " .. rate .. " Hz", function()
      local y = vx.data.resample(vx.tensor(tones(rate, 3000)), rate, 16000)
      assert.equal(expected.count, y:size(1))
      local values, compared = y:totable(), 0
      local edge = math.ceil(200 * math.max(1, 16000 / rate)) -- filters differ where they see the ends
      for i = 1, #values, 99 do
        if i > edge and i <= #values - edge then
          assert.is_true(math.abs(values[i] - expected.samples[(i - 1) / 99 + 1]) < 2e-5)
          compared = compared + 1
        end
      end
      assert.is_true(compared >= 6)
    end)
  end

  it("makes ceil(n new / old) samples", function()
    for _, case in ipairs { { 44100, 44100, 16000 }, { 88200, 44100, 32000 }, { 441000, 44100, 160000 },
      { 1000, 44100, 363 }, { 1, 44100, 1 }, { 22050, 22050, 16000 }, { 48000, 48000, 16000 }, { 7999, 7999, 16000 },
      { 3, 8000, 6 }, { 0, 8000, 0 } } do
      for _, quality in ipairs { "best", "medium" } do
        assert.equal(case[3], vx.data.resample(vx.zeros { case[1] }, case[2], 16000, quality):size(1))
      end
    end
  end)

  it("keeps the level up to the end, and leaves one rate as it is", function()
    local constant = vx.data.resample(vx.ones { 4410 }, 44100, 16000):totable()
    assert.equal(1600, #constant)
    for i = 300, 1300 do assert.is_true(math.abs(constant[i] - 1) < 1e-5) end
    assert.is_true(math.abs(constant[1600]) > 0.2, "the last samples come out of the filter")
    local x = vx.data.synthetic_speech(1, 1)
    local y = vx.data.resample(x, 8000, 8000)
    assert.equal(x:size(1), y:size(1))
  end)

  it("refuses what makes no sense", function()
    local x = vx.zeros { 4 }
    H.raises(function() vx.data.resample(x, 0, 16000) end, "rate is 0, expected an integer of 1 or more")
    H.raises(function() vx.data.resample(x, 8000, 16000, "fast") end, "quality is 'fast', expected best or medium")
    H.raises(function() vx.data.resample(x, 16000, 16) end, "16000 samples a second cannot become 16")
    H.raises(function() vx.data.resample(vx.zeros { 2, 2 }, 8000, 16000) end, "audio_resample: x (2,2)")
  end)
end)
