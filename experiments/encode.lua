--- Uses what a sweep has trained: codes of audio files, by a checkpoint of w2v_sweep, or of images, by one of ae_sweep;
-- of images also what the decoder makes of the codes.
--
--   luajit experiments/encode.lua out/w2v_sweep-tiny-1/checkpoints/softmax-knn-ce.safetensors a.flac b.wav --out codes
--   luajit experiments/encode.lua CHECKPOINT photo.jpg --format text
--
-- npy: OUT/NAME.npy, integers from 0, of audio (frames, codebooks), of an image (rows, columns, codebooks), and
-- OUT/NAME.png, the reconstruction. text: OUT/codes.txt, a line a file: its path, a tab, then the codes of one frame or
-- pixel after the other, those of several codebooks joined by commas.

local ffi = require "ffi"
ffi.cdef "char *realpath(const char *path, char *out);"
dofile(ffi.string(ffi.C.realpath(arg[0], nil)):match "^(.*/)experiments/" .. "lua/vertex/start.lua")

local vx = require "vertex"
local core, runs = require "vertex.core", vx.runs

-- By experiment: the function that makes codes of a file, i32 of any shape, and a picture or nil.
local ENCODERS = {}

function ENCODERS.w2v_sweep(model)
  return function(file)
    local wave = vx.data.open_audio(file):to(vx.device())
    return model:encode(wave:reshape { 1, wave:size(1) })
  end
end

function ENCODERS.ae_sweep(model, preset)
  return function(file)
    local images = vx.data.images { files = { file }, size = preset.size, resize = preset.resize, batch = 1,
      shuffle = false, epochs = 1, workers = 1, strict = true }
    local x = images:next() or core.fail "interrupted"
    images:close()
    local z = model.encoder(x)
    local codes = model.quantizer:encode(z)
    local y = model.decoder(model.quantizer:decode(codes):reshape(z:shape()))
    return codes:reshape { z:size(2), z:size(3), codes:size(2) }, vx.data.to_u8(vx.data.denormalize(y))[1]
  end
end

-- -- Files ------------------------------------------------------------------------------------------------------------

--- A name for each file's results: its own without the ending. Two files of one name are refused.
local function names_of(files)
  local names, owner = {}, {}
  for i, file in ipairs(files) do
    local name = file:match "[^/]*$":gsub("(.)%.[^.]*$", "%1")
    if owner[name] then core.fail("%s and %s would both become %s.npy", owner[name], file, name) end
    names[i], owner[name] = name, file
  end
  return names
end

--- The codes of a file as a line of text.
local function line_of(file, codes)
  local rows = {}
  for i, row in ipairs(codes:reshape({ -1, codes:size(-1) }):totable()) do rows[i] = table.concat(row, ",") end
  return file .. "\t" .. table.concat(rows, " ")
end

local function program()
  local parser = require "argparse"("encode", "Codes of audio files or images by a checkpoint of a sweep.")
  parser:argument("checkpoint", "checkpoints/METHOD.safetensors of w2v_sweep (audio) or ae_sweep (images).")
  parser:argument("files", "Audio files or images."):args "+"
  parser:option("--out", "Folder for the results."):argname "DIR":default "codes"
  parser:option("--format", "npy: a file each; text: a line each, in one file."):choices { "npy", "text" }:default "npy"
  parser:option("--device", "cpu, cuda:0, ...; default: the GPU where one works."):argname "D"
  local args = parser:parse()
  if args.device then vx.device(args.device) end
  local names = names_of(args.files)
  local model, run = vx.restore(args.checkpoint)
  local encode = ENCODERS[run.config.experiment](model, run.preset)
  runs.make_folders(args.out)
  local narrow = (model.quantizer.options.codes or math.huge) <= 65536 and { dtype = "u16" } or nil
  local lines, skipped = {}, 0
  for i, file in ipairs(args.files) do
    local ok, message = pcall(vx.step, function()
      return vx.no_grad(function()
        local codes, picture = encode(file)
        local path = ("%s/%s"):format(args.out, names[i])
        if args.format == "text" then lines[#lines + 1] = line_of(file, codes)
        else vx.save(path .. ".npy", codes, narrow) end
        if picture then vx.data.save(path .. ".png", picture) end
      end)
    end)
    if core.interrupted() then return 130 end
    if not ok then
      skipped = skipped + 1
      io.stderr:write(("skipped %s: %s\n"):format(file, runs.reason(message)))
    end
  end
  if args.format == "text" then
    core.write_file(args.out .. "/codes.txt", #lines > 0 and table.concat(lines, "\n") .. "\n" or "")
  end
  io.stderr:write(("%d of %d files → %s\n"):format(#args.files - skipped, #args.files, args.out))
  return skipped > 0 and 1 or 0
end

local ok, status = pcall(program)
if not ok then runs.refuse("%s", runs.reason(status)) end
os.exit(status, true)
