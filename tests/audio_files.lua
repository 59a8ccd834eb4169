--- audio_files.lua: WAV files of given samples, and folders of files, for the specs of audio.

local ffi = require "ffi"
local core = require "vertex.core"
local H = require "tests.helper"

local A = {}

--- Writes an integer as n little-endian bytes.
local function bytes(v, n)
  local out = {}
  for i = 1, n do
    out[i] = string.char(v % 256)
    v = math.floor(v / 256)
  end
  return table.concat(out)
end

--- Makes a WAV file of raw sample bytes. format: 1 PCM, 3 float.
function A.wav(raw, rate, channels, bits, format)
  local frame = channels * bits / 8
  return "RIFF" .. bytes(36 + #raw, 4) .. "WAVEfmt " .. bytes(16, 4) .. bytes(format or 1, 2) .. bytes(channels, 2)
    .. bytes(rate, 4) .. bytes(rate * frame, 4) .. bytes(frame, 2) .. bytes(bits, 2) .. "data" .. bytes(#raw, 4) .. raw
end

--- Makes a WAV file of integers, 16 bits and one channel unless said.
function A.wav_of(values, rate, channels, bits)
  local out, size = {}, (bits or 16) / 8
  for i, v in ipairs(values) do out[i] = bytes(v < 0 and v + 256 ^ size or v, size) end
  return A.wav(table.concat(out), rate or 16000, channels or 1, bits or 16)
end

--- Gives the bytes of float32 numbers.
function A.floats(values) return ffi.string(ffi.new("float[?]", #values, values), 4 * #values) end

--- Makes n integers of 16 bits that differ from file to file.
function A.noise(n, seed)
  local values, random = {}, H.random(seed or 1)
  for i = 1, n do values[i] = random:integer(-20000, 20000) end
  return values
end

local made = 0

--- Makes a folder of files, name (may hold folders) → bytes; returns its path.
function A.folder_of(contents)
  made = made + 1
  local path = H.scratch("speech" .. made)
  assert(core.make_folders(path))
  for name, content in pairs(contents) do
    local inner = name:match "^(.*)/"
    if inner then assert(core.make_folders(path .. "/" .. inner)) end
    H.write(path .. "/" .. name, content)
  end
  return path
end

return A
