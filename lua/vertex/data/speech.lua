--- data/speech.lua: batches of crops from folders of speech, or of the synthetic set where there are none.
--
--     local set = vx.data.speech { path = "LibriSpeech", split = "train", crop = 32000, batch = 8, seed = 1 }
--     local waves, lengths = set:next()      -- f32 (8,32000), i32 (8): samples of each row that are of a file
--     local seen = set:broken()              -- { { path, reason }, ... }: named, left out
--
-- Any tree of folders will do; what libsndfile reads is read, mixed to one channel, at 16,000 samples a second. Files
-- of another rate are resampled, which is said once.
--
-- Index: every file is decoded once from end to end, before the first batch. So lengths are counted and not believed,
-- and what is damaged, empty, too short or holds a NaN is known from the start. The result is kept in a file of the
-- user's cache; later runs decode only what has changed since (size or time of writing).
--
-- Splits: of a folder with train*/ its folders train* are for training, and test* (without those dev* and val*) for
-- validation, as LibriSpeech's are; the name of any folder in it is a split of its own. Everything else is divided by a
-- hash of the names of the folders at the top (speakers, say), so that nobody is on both sides; where there is only one
-- such folder, of the files' names. About 7.5 % are for validation.

local lfs = require "lfs"
local arguments = require "vertex.arguments"
local check = require "vertex.check"
local core = require "vertex.core"
local folders = require "vertex.data.folders"

local fail = core.fail
local speech = {}

local SPEECH_RATE = 16000 -- of the synthetic set, and of what models of speech are made for

local OPTIONS = {
  path = "string", split = { "string", "train" },
  crop = { "count", 2 * SPEECH_RATE }, place = { "string", "random" }, shortest = { "count", 400 },
  rate = { "count", SPEECH_RATE }, quality = { "string", "best" },
  normalize = { "boolean", false }, eps = { "number", 1e-5 },
  batch = { "count", 8 }, seed = { "whole", 1 }, shuffle = { "boolean", true }, epochs = { "whole", 0 },
  position = { "whole", 0 }, shard = { "whole", 0 }, shards = { "count", 1 },
  workers = { "count", 2 }, queue = { "whole", 0 }, strict = { "boolean", false },
  cache_bytes = { "whole", 512 * 2 ^ 20 }, index = "any", progress = "function",
  count = "count", speech_seed = "whole", device = "string",
}

-- -- Files ------------------------------------------------------------------------------------------------------------

-- Files of these names are said to be audio, and are broken where they are not.
local NAMED_AS_AUDIO = {}
for ending in ("flac wav wave ogg oga opus mp3 aif aiff aifc au snd caf w64 rf64 sph voc m4a aac wma amr")
  :gmatch "%w+" do
  NAMED_AS_AUDIO[ending] = true
end

-- Lists the names of the folders in a folder that match one of the patterns.
local function folders_named(root, patterns)
  local names = {}
  for name in lfs.dir(root) do
    for _, pattern in ipairs(patterns) do
      if name:find(pattern) and folders.is_folder(root .. "/" .. name) then
        names[#names + 1] = name
        break
      end
    end
  end
  table.sort(names)
  return names
end

-- Finds the folders of a split in a folder that has its own division; nil where it has none.
local function own_division(root, split)
  local train = folders_named(root, { "^train" })
  local test = folders_named(root, { "^test" })
  if #test == 0 then test = folders_named(root, { "^dev", "^val" }) end
  if #train == 0 or #test == 0 then return nil end
  return split == "train" and train or test
end

-- Finds the parts of a folder that a split consists of, and whether they have yet to be divided.
local function parts_of(root, split)
  if split == "all" then return { root }, false end
  if split ~= "train" and split ~= "val" then
    if split ~= "" and not split:find "/" and split:sub(1, 1) ~= "." and folders.is_folder(root .. "/" .. split) then
      return { root .. "/" .. split }, false
    end
    fail("speech: split is '%s', expected train or val or all, or a folder in %s: %s", split, root,
      table.concat(folders_named(root, { "^[^.]" }), ", "))
  end
  local own = own_division(root, split)
  if not own then return { root }, true end
  for i, name in ipairs(own) do own[i] = root .. "/" .. name end
  return own, false
end

--- Finds the audio files of a split of a folder; the head of this file says what belongs to which.
-- @param folder path
-- @param split "train", "val", "all", or the name of a folder in it
-- @return array of paths
-- @return array of { path =, reason = }: folders that could not be looked into
-- @raise where there is no such folder or split, or no audio in it
function speech.find(folder, split)
  local mode = lfs.attributes(core.expect_path(folder), "mode")
  if not mode then fail("speech: no folder %s", folder) end
  if mode ~= "directory" then fail("speech: %s is a %s, expected a folder of audio files", folder, mode) end
  local root = folder:gsub("(.)/+$", "%1")
  local parts, undivided = parts_of(root, split)
  local files, unreadable, others = {}, {}, 0
  for _, part in ipairs(parts) do
    local all, unread = folders.list(part)
    local audio = folders.pick(all, NAMED_AS_AUDIO, core.audio_kind) -- so transcripts are passed over
    others = others + #all - #audio
    for _, path in ipairs(audio) do files[#files + 1] = path end
    for _, u in ipairs(unread) do unreadable[#unreadable + 1] = u end
  end
  if #files == 0 then
    local first = unreadable[1]
    fail("speech: no audio in %s (%d other files; FLAC, WAV and whatever libsndfile reads is audio, transcripts are "
      .. "not)%s", table.concat(parts, ", "), others,
      first and ("; cannot look into " .. first.path .. ": " .. first.reason) or "")
  end
  if undivided then
    local function top(path) return path:sub(#root + 2):match "^[^/]+" end
    local several = false
    for _, path in ipairs(files) do several = several or top(path) ~= top(files[1]) end
    files = folders.divide(files, split, several and top or function(path) return path:match "[^/]*$" end)
  end
  return files, unreadable
end

-- -- The index --------------------------------------------------------------------------------------------------------

local HEADER = "vertex audio index 1" -- first line; the number grows with what a line means
local CHUNK = 256                     -- files decoded between two looks at the progress

-- Names the file that keeps the index of a folder.
local function index_path(folder)
  local cache = os.getenv "XDG_CACHE_HOME"
  if not cache or cache == "" then cache = (os.getenv "HOME" or "/tmp") .. "/.cache" end
  local absolute = folder:sub(1, 1) == "/" and folder or lfs.currentdir() .. "/" .. folder
  return ("%s/vertex/audio-%08x.tsv"):format(cache, folders.hash(absolute:gsub("(.)/+$", "%1")))
end

-- Reads an index: path → what is known of the file. Lines that are none are passed over, as is another version.
local function read_index(path)
  local known = {}
  local file = io.open(path, "rb")
  if not file then return known end
  if file:read "*l" == HEADER then
    for line in file:lines() do
      local bytes, modified, frames, rate, channels, seek, reason, name =
        line:match "^(%d+)\t(%d+)\t(%d+)\t(%d+)\t(%d+)\t([01])\t([^\t]*)\t([^\t]+)$"
      if bytes then
        known[name] = { bytes = tonumber(bytes), modified = tonumber(modified), frames = tonumber(frames),
          rate = tonumber(rate), channels = tonumber(channels), exact_seek = seek == "1",
          reason = reason ~= "" and reason or nil }
      end
    end
  end
  file:close()
  return known
end

-- Writes an index; a folder that cannot be written to only means that the next run decodes again.
local function write_index(path, known)
  local names, lines = {}, { HEADER }
  for name in pairs(known) do
    if not name:find "[\t\n]" then names[#names + 1] = name end
  end
  table.sort(names)
  for _, name in ipairs(names) do
    local k = known[name]
    lines[#lines + 1] = ("%.0f\t%.0f\t%.0f\t%.0f\t%.0f\t%d\t%s\t%s"):format(k.bytes, k.modified, k.frames, k.rate,
      k.channels, k.exact_seek and 1 or 0, (k.reason or ""):gsub("[\t\n]", " "), name)
  end
  if not core.make_folders(path:match "^(.*)/" or ".") then return end
  pcall(core.write_file, path, table.concat(lines, "\n") .. "\n")
end

--- Takes the lengths of files, from the index where they are unchanged since.
-- @return array of what is known of each, in their order; nil where Ctrl-C came
local function lengths_of(files, path, progress)
  local known = path and read_index(path) or {}
  local list, stale = {}, {}
  for i, file in ipairs(files) do
    local bytes, modified = core.audio_stamp(file)
    local k = known[file]
    if k and bytes == k.bytes and modified == k.modified then list[i] = k else stale[#stale + 1] = i end
  end
  local complete = true
  for first = 1, #stale, CHUNK do
    local paths = {}
    for j = first, math.min(first + CHUNK - 1, #stale) do paths[#paths + 1] = files[stale[j]] end
    for j, about in ipairs(core.audio_scan(paths)) do
      complete = complete and about and true or false
      list[stale[first + j - 1]] = about or nil
      -- nothing is known of a file that was not there
      known[paths[j]] = about and about.modified > 0 and about or nil
    end
    if progress then progress(math.min(first + CHUNK - 1, #stale), #stale) end
    if not complete then break end
  end
  if path and #stale > 0 then write_index(path, known) end
  return complete and list or nil
end

-- -- The stream -------------------------------------------------------------------------------------------------------

local FIRST_VALIDATION = 2 ^ 32 -- synthetic set: utterances from there on have other voices

local said = {} -- what was said of which folder

-- Says once a folder and process that files are resampled.
local function say_resampled(o, files)
  local of_rate, rates, n = {}, {}, 0
  for _, file in ipairs(files) do
    if file.rate ~= o.rate then
      if not of_rate[file.rate] then rates[#rates + 1] = file.rate end
      of_rate[file.rate] = (of_rate[file.rate] or 0) + 1
      n = n + 1
    end
  end
  if n == 0 then return end
  table.sort(rates)
  for i, rate in ipairs(rates) do rates[i] = ("%d of %d Hz"):format(of_rate[rate], rate) end
  local text = ("%s: %d of %d files are resampled to %d Hz by libsamplerate (%s)"):format(o.path, n, #files, o.rate,
    table.concat(rates, ", "))
  if not said[text] then io.stderr:write(text, "\n") end
  said[text] = true
end

-- Divides what is known of files into those that can be used and those that cannot.
local function sort_out(o, paths, about)
  local usable, broken = {}, {}
  for i, path in ipairs(paths) do
    local a = about[i]
    local length = a.reason and 0 or math.ceil(a.frames * o.rate / a.rate)
    local reason = a.reason
    if not reason and length < o.shortest then
      reason = ("too short: %d samples at %d Hz, at least %d are needed"):format(length, o.rate, o.shortest)
    end
    if reason then
      broken[#broken + 1] = { path, reason, path = path, reason = reason }
    else
      usable[#usable + 1] = { path = path, frames = a.frames, rate = a.rate, channels = a.channels,
        exact_seek = a.exact_seek, length = length }
    end
  end
  return usable, broken
end

local Speech = {}
Speech.__index = Speech

--- Opens a set of utterances that gives batches of crops.
-- @param[opt] options table
-- @param[opt] options.path folder of audio files; without it the synthetic set, which is at 16,000 samples a second
-- @param[opt="train"] options.split "train", "val", "all", or the name of a folder in path
-- @param[opt=32000] options.crop samples of a row; a shorter utterance is followed by zeros
-- @param[opt="random"] options.place "random": one crop of each file an epoch, anywhere in it; "start": its first
-- samples; "all": all of each file, in crops one after the other
-- @param[opt=400] options.shortest samples; files shorter than that are left out as broken, and with "all" what is left
-- of a file after its whole crops where it is shorter
-- @param[opt=16000] options.rate samples a second
-- @param[opt="best"] options.quality of the conversion of other rates: "best" or "medium"; features of a model that was
-- trained through torchaudio's default resampler differ above 6 kHz
-- @param[opt=false] options.normalize true gives each crop mean 0 and variance 1, before zeros follow
-- @param[opt=1e-5] options.eps added to the variance there
-- @param[opt=8] options.batch crops in a batch
-- @param[opt=1] options.seed of order and crops
-- @param[opt=true] options.shuffle a new order each epoch; false: the files' own
-- @param[opt=0] options.epochs how often each file comes; 0: without end
-- @param[opt=0] options.position where to go on: what :position() said
-- @param[opt=2] options.workers decoding threads
-- @param[opt=0] options.queue crops decoded ahead; 0: two batches
-- @param[opt=false] options.strict true makes a broken file an error
-- @param[opt=2^29] options.cache_bytes bytes for utterances that have to be made whole: of codecs that do not seek
-- exactly, of other rates, and synthetic ones
-- @param[opt] options.index file that keeps the index; else one for the folder in $XDG_CACHE_HOME or ~/.cache; false:
-- none is kept
-- @param[opt] options.progress function(done, total) that is called while the index is built, of the files to decode
-- @param[opt=0] options.shard this reader's number among `shards` that share the stream, 0-based
-- @param[opt=1] options.shards readers that share the stream
-- @param[opt] options.count utterances of the synthetic set; 512, for "val" 64
-- @param[opt] options.speech_seed which synthetic set; else `seed`. Its validation utterances have other voices
-- @param[opt] options.device where batches go; else the default device
-- @return set: .files (array of { path, frames, rate, channels, length (samples at the set's rate) }) and the methods
-- next, position, broken, size, seconds, batches and close
-- @raise where an option is unknown or out of its range, the folder holds no audio of the split or none that can be
-- used, with `strict` where any cannot, and where Ctrl-C came while the index was built
function speech.speech(options)
  local o = check.options("speech", options, OPTIONS)
  check.number("speech", "eps", o.eps, 0, math.huge)
  check.integer("speech", "rate", o.rate, 1, 768000)
  local validation = o.split == "val"
  local stream
  local self = { options = o, files = {}, unusable = {} }
  if not o.path then
    check.choice("speech", "split", o.split, { "train", "val", "all" })
    if o.rate ~= SPEECH_RATE then fail("speech: the synthetic set is at %d Hz, rate is %d", SPEECH_RATE, o.rate) end
    stream = core.speech_stream(o.speech_seed or o.seed, validation and FIRST_VALIDATION or 0,
      o.count or (validation and 64 or 512), o)
  else
    local index = o.index
    if index == nil then index = index_path(o.path) end
    if index and type(index) ~= "string" then
      fail("speech: index is %s, expected a path or false", check.show(index))
    end
    local paths, unreadable = speech.find(o.path, o.split)
    local about = lengths_of(paths, index, o.progress)
    if not about then fail "speech: interrupted while the lengths of files were taken" end
    local broken
    self.files, broken = sort_out(o, paths, about)
    for _, list in ipairs { unreadable, broken } do
      for _, b in ipairs(list) do self.unusable[#self.unusable + 1] = b end
    end
    local first = self.unusable[1]
    if o.strict and first then fail("speech: %s: %s", first.path, first.reason) end
    if #self.files == 0 then
      fail("speech: none of %d files in %s can be used; the first: %s: %s", #paths, o.path, first.path, first.reason)
    end
    if core.rank_numbers() == 0 then say_resampled(o, self.files) end
    stream = core.audio_stream(self.files, o)
  end
  self.stream, self.count = stream, stream:items()
  return setmetatable(self, Speech)
end

-- Gives the stream of a set that was not closed.
local function open_stream(self) return self.stream or fail "speech: this set was closed" end

-- Moves a tensor of a batch to the set's device.
local function moved(self, x)
  local there = x:to(self.options.device or core.device())
  if there ~= x then x:release() end
  return there
end

--- Gives the next batch. The last batch of the last epoch may be smaller.
-- @return tensor f32 (B,crop); nil after the last epoch, and where Ctrl-C ended the wait (core.interrupted())
-- @return tensor i32 (B): how many samples of each row are of its file; zeros follow
-- @return tensor i32 (B) on the CPU: the files' numbers in the order of .files, 0-based; with place "all" those of the
-- crops, in that order
-- @raise where the set was closed, or `strict` is set and a file has changed or gone since its length was taken
function Speech:next()
  local batch, index = open_stream(self):next()
  if not batch then return nil end
  return moved(self, batch.waves), moved(self, batch.lengths), index
end

--- Says where the stream stands. A set opened with this `position` goes on exactly here.
-- @return number
-- @raise where the set was closed
function Speech:position() return open_stream(self):position() end

--- Lists what cannot be used: folders that could not be looked into, files that the index found to be damaged, empty,
-- too short or to hold a NaN, and files that changed since and were met as broken.
-- @return array of { path, reason }, which also have these fields by name
-- @raise where the set was closed
function Speech:broken()
  local list, seen = {}, {}
  for _, b in ipairs(self.unusable) do list[#list + 1] = b end
  for _, b in ipairs(open_stream(self):broken()) do -- with "all" a file is met once for each crop
    if not seen[b.path] then list[#list + 1] = b end
    seen[b.path] = true
  end
  return list
end

--- Counts the items of an epoch: files that can be used, or utterances; with place "all" the crops of them all.
-- @return integer
function Speech:size() return self.count end

--- Counts the batches of one epoch.
-- @return integer
function Speech:batches() return math.ceil(self.count / self.options.shards / self.options.batch) end

--- Adds up the lengths of the files that can be used.
-- @return seconds; nil of the synthetic set
function Speech:seconds()
  if not self.options.path then return nil end
  local sum = 0
  for _, file in ipairs(self.files) do sum = sum + file.frames / file.rate end
  return sum
end

--- Ends the threads and frees the cache. Lua's collector does so too, later.
function Speech:close()
  if self.stream then self.stream:close() end
  self.stream = nil
end

function Speech:__tostring()
  local o = self.options
  return ("speech(%s, %s: %d %s, %d samples each, batch %d)"):format(o.path or "synthetic", o.split, self.count,
    o.place == "all" and "crops" or o.path and "files" or "utterances", o.crop, o.batch)
end

-- -- Single waves -----------------------------------------------------------------------------------------------------

--- Reads an audio file: FLAC, WAV and whatever libsndfile reads, mixed to one channel.
-- @param path name of the file; its content decides, not its ending
-- @param[opt=16000] rate number of samples a second; 0: the file's own
-- @param[opt="best"] quality "best" or "medium"
-- @return tensor f32 (L) on the CPU; full scale is 1, values beyond it are kept
-- @return table about the file: rate and frames as they are in it, channels, exact_seek
-- @raise where the file cannot be read, is damaged, empty or no audio, or holds a NaN
function speech.open_audio(path, rate, quality)
  if type(path) ~= "string" then fail("open_audio: the path is a %s", type(path)) end
  check.integer("open_audio", "rate", rate or SPEECH_RATE, 0)
  return core.audio_open(path, rate or SPEECH_RATE, quality or "best")
end

--- Resamples a wave without delay: L samples become ceil(L new_rate / rate).
-- @param x tensor f32 (L) on the CPU
-- @param rate number of samples a second of x
-- @param new_rate number of samples a second that are wanted
-- @param[opt="best"] quality "best" (flat to 0.97 of half the lower rate) or "medium" (0.9, faster)
-- @return tensor f32
-- @raise where x is no such wave, a rate is no positive integer, or one is more than 256 times the other
function speech.resample(x, rate, new_rate, quality)
  check.integer("resample", "rate", rate, 1)
  check.integer("resample", "new_rate", new_rate, 1)
  return core.audio_resample(x, rate, new_rate, quality or "best")
end

--- Makes an utterance of the synthetic set, 2 to 10 seconds at 16,000 samples a second.
-- @param[opt=1] seed integer of 0 or more: which set
-- @param[opt=0] index number of the utterance, 0-based; from 2^32 on they have other voices
-- @return tensor f32 (L) on the CPU
-- @raise where seed or index is no integer of 0 or more
function speech.synthetic_speech(seed, index)
  check.integer("synthetic_speech", "seed", seed or 1, 0)
  check.integer("synthetic_speech", "index", index or 0, 0)
  return core.synthetic_speech(seed or 1, index or 0)
end

arguments.guard_class("speech", Speech)

return speech
