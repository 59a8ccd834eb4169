--- Uses what a sweep has trained: codes of audio files, by a checkpoint of w2v_sweep, or of images, by one of ae_sweep;
-- of images also what the decoder makes of the codes.
--
--   luajit experiments/encode.lua out/w2v_sweep-tiny-1/checkpoints/softmax-knn-ce.safetensors a.flac b.wav --out codes
--   luajit experiments/encode.lua CHECKPOINT photo.jpg --format text
--   luajit experiments/encode.lua CHECKPOINT photos --out codes.npy --images decoded
--
-- npy: OUT/NAME.npy, integers from 0, of audio (frames, codebooks), of an image (rows, columns, codebooks), and
-- OUT/NAME.png, the reconstruction (IMAGES/NAME.png with --images). Where OUT ends in .npy: one array of all files,
-- (files, rows, columns, codebooks), and in codes.txt beside it the path of each. text: OUT/codes.txt, a line a file:
-- its path, a tab, then the codes of one frame or pixel after the other, those of several codebooks joined by commas.

local ffi = require "ffi"
ffi.cdef "char *realpath(const char *path, char *out);"
dofile(ffi.string(ffi.C.realpath(arg[0], nil)):match "^(.*/)experiments/" .. "lua/vertex/start.lua")

local lfs = require "lfs"
local vx = require "vertex"
local core, runs = require "vertex.core", vx.runs

local FINDERS = { ae_sweep = vx.data.find, w2v_sweep = require("vertex.data.speech").find } -- of a folder's files

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

--- The files that arguments name: of a folder those of its kind, at any depth.
local function files_of(arguments, find)
  local files, base = {}, {}
  for _, path in ipairs(arguments) do
    if lfs.attributes(path, "mode") == "directory" then
      local folder = path:gsub("(.)/+$", "%1")
      for _, file in ipairs((find(folder, "all"))) do files[#files + 1], base[file] = file, #folder + 2 end
    else
      files[#files + 1] = path
    end
  end
  return files, base
end

--- A name for each file's results: its own without the ending, of a folder's files with the folders on the way to it.
-- Two files of one name are refused.
local function names_of(files, base)
  local names, owner = {}, {}
  for i, file in ipairs(files) do
    local own = base[file] and file:sub(base[file]):gsub("/", "_") or file:match "[^/]*$"
    local name = own:gsub("(.)%.[^.]*$", "%1")
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
  parser:argument("files", "Audio files, images, or folders of them."):args "+"
  parser:option("--out", "Folder for the results; FILE.npy: all codes in one array."):argname "DIR":default "codes"
  parser:option("--images", "Folder for reconstructions; default: --out, where that is a folder."):argname "DIR"
  parser:option("--format", "npy: a file each; text: a line each, in one file."):choices { "npy", "text" }:default "npy"
  parser:option("--device", "cpu, cuda:0, ...; default: the GPU where one works."):argname "D"
  local args = runs.flags.read(parser)
  if args.device then vx.device(args.device) end
  local model, run = vx.restore(args.checkpoint)
  local experiment = run.config.experiment
  local files, base = files_of(args.files, FINDERS[experiment])
  local names = names_of(files, base)
  local encode = ENCODERS[experiment](model, run.preset)
  local whole = args.out:find "%.npy$" and {} or nil -- the codes of all files
  if whole and args.format == "text" then core.fail("--out %s: --format text wants a folder", args.out) end
  local folder = whole and (args.out:match "^(.*)/[^/]*$" or ".") or args.out
  local pictures = args.images or not whole and args.out or nil
  runs.make_folders(folder)
  if pictures then runs.make_folders(pictures) end
  local narrow = (model.quantizer.options.codes or math.huge) <= 65536 and { dtype = "u16" } or nil
  local lines, skipped = {}, 0
  for i, file in ipairs(files) do
    local ok, message = pcall(vx.step, function()
      return vx.no_grad(function()
        local codes, picture = encode(file)
        if args.format == "text" then
          lines[#lines + 1] = line_of(file, codes)
        elseif whole then
          local first = whole[1]
          if first and core.shape_text(first) ~= core.shape_text(codes) then
            core.fail("its codes are %s, those before %s; --out a folder keeps each", core.shape_text(codes),
              core.shape_text(first))
          end
          whole[#whole + 1], lines[#lines + 1] = vx.keep(codes:to "cpu"), file
        else
          vx.save(("%s/%s.npy"):format(folder, names[i]), codes, narrow)
        end
        if picture and pictures then vx.data.save(("%s/%s.png"):format(pictures, names[i]), picture) end
      end)
    end)
    if core.interrupted() then return 130 end
    if not ok then
      skipped = skipped + 1
      io.stderr:write(("skipped %s: %s\n"):format(file, runs.reason(message)))
    end
  end
  if whole and whole[1] then
    vx.step(function()
      for i, codes in ipairs(whole) do whole[i] = codes:reshape { 1, unpack(codes:shape()) } end
      while #whole > 1 do -- by pairs: one call takes few arguments
        local joined = {}
        for i = 1, #whole, 2 do joined[#joined + 1] = whole[i + 1] and vx.cat(1, whole[i], whole[i + 1]) or whole[i] end
        whole = joined
      end
      vx.save(args.out, whole[1], narrow)
    end)
  end
  if args.format == "text" or whole then
    core.write_file(folder .. "/codes.txt", #lines > 0 and table.concat(lines, "\n") .. "\n" or "")
  end
  io.stderr:write(("%d of %d files → %s\n"):format(#files - skipped, #files, args.out))
  return skipped > 0 and 1 or 0
end

runs.program(program)
