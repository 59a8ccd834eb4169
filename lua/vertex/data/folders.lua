--- data/folders.lua: what a folder of data holds, and which of it is for training and which for validation. The
-- division is by hashes of names, so that what belongs together (a photograph's copies, a speaker's utterances) stays
-- on its side when files come, go or move.

local bit = require "bit"
local lfs = require "lfs"
local core = require "vertex.core"

local expect_path, fail = core.expect_path, core.fail

local folders = {}

local VALIDATION_PER_MILLE = 75

--- Says whether a path is that of a folder.
function folders.is_folder(path) return lfs.attributes(expect_path(path), "mode") == "directory" end

--- Lists all files below a folder, in the order of their names at each level. Names that begin with a dot are left out.
-- A folder reached twice through symbolic links counts once.
-- @param folder path
-- @return array of paths
-- @return array of { path =, reason = }: folders that could not be looked into
-- @raise where there is no such folder
function folders.list(folder)
  if type(folder) ~= "string" then fail("list: the folder is a %s, expected a path", type(folder)) end
  local mode, why = lfs.attributes(expect_path(folder), "mode")
  if not mode then fail("list: no folder %s (%s)", folder, tostring(why):match "([^:]*)$":gsub("^ ", "")) end
  if mode ~= "directory" then fail("list: %s is a %s, expected a folder", folder, mode) end
  local files, unreadable, seen = {}, {}, {}
  local function enter(path)
    local about = lfs.attributes(path)
    local identity = about.dev .. ":" .. about.ino
    if seen[identity] then return end
    seen[identity] = true
    local names = {}
    local ok, reason = pcall(function()
      for name in lfs.dir(path) do
        if name:sub(1, 1) ~= "." then names[#names + 1] = name end
      end
    end)
    if not ok then
      reason = tostring(reason):match ": ([^:]*)$" or tostring(reason)
      unreadable[#unreadable + 1] = { path, reason, path = path, reason = reason }
    end
    table.sort(names)
    local prefix = path:sub(-1) == "/" and path or path .. "/"
    for _, name in ipairs(names) do
      local child = prefix .. name
      local kind = lfs.attributes(child, "mode")
      if kind == "directory" then
        enter(child)
      elseif kind == "file" or kind == nil then -- nil: a link to nowhere; who opens it says so
        files[#files + 1] = child
      end
    end
  end
  enter(folder)
  return files, unreadable
end

--- Picks the files of a kind. A usual name is believed until the file is decoded, which judges by content. Of any other
-- file (no extension, a wrong one) the first bytes are read now. So a text file is passed over unless it is named like
-- one of the kind.
-- @param files array of paths
-- @param endings table whose keys are the usual extensions, in lower case
-- @param kind_of function(path) → what its first bytes say: "none" where they are of no such kind, nil where they
-- cannot be read
-- @return array of paths
function folders.pick(files, endings, kind_of)
  local picked = {}
  for _, path in ipairs(files) do
    local extension = path:match "%.([^./]*)$"
    local named = extension and endings[extension:lower()]
    local kind = not named and kind_of(path)
    if named or kind and kind ~= "none" then picked[#picked + 1] = path end
  end
  return picked
end

-- -- The division ----------------------------------------------------------------------------------------------------

-- Multiplies two integers modulo 2^32.
local function multiply32(a, b)
  local low, high = bit.band(a, 0xffff), bit.rshift(a, 16)
  b = b % 2 ^ 32
  return bit.tobit((high * b) % 65536 * 65536 + low * b % 2 ^ 32)
end

--- Hashes a string to 32 bits: FNV-1a with murmur3's finish.
function folders.hash(text)
  local h = bit.tobit(2166136261)
  for i = 1, #text do h = multiply32(bit.bxor(h, text:byte(i)), 16777619) end
  h = multiply32(bit.bxor(h, bit.rshift(h, 16)), 0x85EBCA6B)
  h = multiply32(bit.bxor(h, bit.rshift(h, 13)), 0xC2B2AE35)
  return bit.bxor(h, bit.rshift(h, 16)) % 2 ^ 32
end

--- Gives the files of one side of the hashed division, in the order given. Files of one key are on one side.
-- @param files array of paths
-- @param split "train" or "val"
-- @param key_of function of a path that gives its key
-- @return array of paths; all of them where there is only one file
function folders.divide(files, split, key_of)
  local keys, side, validation = {}, {}, 0
  for place, path in ipairs(files) do
    local key = key_of(path)
    if not side[key] then
      local h = folders.hash(key)
      keys[#keys + 1] = { key = key, hash = h, place = place }
      side[key] = h % 1000 < VALIDATION_PER_MILLE and "val" or "train"
      if side[key] == "val" then validation = validation + 1 end
    end
  end
  if #files == 1 then return files end
  if #keys == 1 then return folders.divide(files, split, function(path) return path end) end
  -- a handful of keys may all fall on one side: the one with the extreme hash changes over
  table.sort(keys, function(a, b)
    if a.hash ~= b.hash then return a.hash < b.hash end
    return a.place < b.place
  end)
  if validation == 0 then side[keys[1].key] = "val" end
  if validation == #keys then side[keys[#keys].key] = "train" end
  local chosen = {}
  for _, path in ipairs(files) do
    if side[key_of(path)] == split then chosen[#chosen + 1] = path end
  end
  return chosen
end

return folders
