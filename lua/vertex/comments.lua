--- comments.lua: reads the comments of a Lua source as declarations, in the form of LDoc [1]: what a function does, its
-- arguments, its result, its errors; what a file is about.
--
--     --- Adds up the rows. More about it.
--     -- @param x tensor f32 (N,D)
--     -- @param[opt=1] dim dimension, 1-based
--     -- @param[opt] options table
--     -- @param[opt] options.dtype a field of that table
--     -- @return tensor f32 (D)
--     -- @raise where x has no rows
--
-- The text of an argument begins with what kind of value it is; vertex/arguments.lua holds calls to that.
--
-- [1] https://lunarmodules.github.io/ldoc

local comments = {}

--- Cuts a text into its lines.
function comments.lines_of(text)
  local lines = {}
  for line in ((text or "") .. "\n"):gmatch "(.-)\n" do lines[#lines + 1] = line end
  return lines
end

--- Gives the text without the space around it; nil where nothing is left.
local function trimmed(text)
  text = text:gsub("^%s+", ""):gsub("%s+$", "")
  return text ~= "" and text or nil
end

--- Reads one of the three tags, and what stands behind it, into a doc. Gives the table whose text goes on in the lines
-- below.
local function read_tag(doc, tag, rest)
  local entry = { text = rest }
  if tag == "param" then
    local brackets, name, text = rest:match "^(%b[])%s*(%S+)%s*(.*)$"
    if not brackets then name, text = rest:match "^%s*(%S+)%s*(.*)$" end
    entry.name, entry.text = name or "", text or ""
    entry.optional = brackets ~= nil
    entry.default = brackets and brackets:match "^%[opt=(.*)%]$"
    doc.args[#doc.args + 1] = entry
  elseif tag == "return" then
    doc.returned[#doc.returned + 1] = entry
  elseif tag == "raise" then
    doc.raised[#doc.raised + 1] = entry
  end
  return entry
end

--- Joins the texts of several tags of a kind; nil where there are none.
local function joined(entries)
  local texts = {}
  for i, entry in ipairs(entries) do texts[i] = trimmed(entry.text) end
  return texts[1] and table.concat(texts, "\n") or nil
end

--- Reads a comment, given as its lines without their dashes.
-- @return table with text, args, returns and raises
function comments.parsed(comment)
  local doc, text, current = { args = {}, returned = {}, raised = {} }, {}, nil
  for _, line in ipairs(comment) do
    local tag, rest = line:match "^%s*@(%a+)(.*)$"
    if tag then
      current = read_tag(doc, tag, rest)
    elseif current then
      current.text = current.text .. (line:find "^%s%s" and "\n" or " ") .. line:gsub("^%s", "")
    else
      text[#text + 1] = line
    end
  end
  for _, arg in ipairs(doc.args) do arg.text = trimmed(arg.text) end
  return { text = trimmed(table.concat(text, "\n")), args = doc.args, returns = joined(doc.returned),
    raises = joined(doc.raised) }
end

local function is_comment(line) return line:find "^%s*%-%-" ~= nil end
local function is_ruler(line) return line:find "^%s*%-%- %-%- " ~= nil end
local function undashed(line) return (line:gsub("^%s*%-%-%-?%s?", "", 1)) end

--- Gives the comment that ends directly above line n, as lines without dashes: from the last "---" on, where it has
-- one.
function comments.above(lines, n)
  local first = n
  while first > 1 and is_comment(lines[first - 1]) and not is_ruler(lines[first - 1]) do first = first - 1 end
  for i = n - 1, first, -1 do
    if lines[i]:find "^%s*%-%-%-" then
      first = i
      break
    end
  end
  local out = {}
  for i = first, n - 1 do out[#out + 1] = undashed(lines[i]) end
  return out
end

--- Gives a file's banner: the comment that it begins with, without dashes.
function comments.banner(lines)
  local at, out = lines[1] and lines[1]:find "^#!" and 2 or 1, {}
  while lines[at] and lines[at]:find "^%-%-" do
    out[#out + 1] = undashed(lines[at])
    at = at + 1
  end
  return trimmed(table.concat(out, "\n"))
end

--- Gives the comment of a class of modules: that above its constructor X:init, on line n, or above the line
-- `X = nn.module "X"` where the constructor follows that directly.
function comments.above_constructor(lines, n)
  local made = (lines[n - 1] or ""):find "^[%w_. ]+= *[%w_.]+ *%(?\"[%w_]+\""
  return comments.above(lines, made and n - 1 or n)
end

return comments
