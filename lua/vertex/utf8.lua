--- utf8: text in UTF-8, as Unicode defines it (version 15, table 3-7): what is well formed, and what to make of the
-- rest.

local utf8 = {}

-- Well-formed characters of two to four bytes: for each of their bytes the least and the greatest value.
local REST = { 0x80, 0xBF }
local CHARACTERS = {
  { { 0xC2, 0xDF }, REST },
  { { 0xE0, 0xE0 }, { 0xA0, 0xBF }, REST },
  { { 0xE1, 0xEC }, REST, REST },
  { { 0xED, 0xED }, { 0x80, 0x9F }, REST },
  { { 0xEE, 0xEF }, REST, REST },
  { { 0xF0, 0xF0 }, { 0x90, 0xBF }, REST, REST },
  { { 0xF1, 0xF3 }, REST, REST, REST },
  { { 0xF4, 0xF4 }, { 0x80, 0x8F }, REST, REST },
}
local BY_FIRST = {} -- first byte -> its entry of CHARACTERS
for _, character in ipairs(CHARACTERS) do
  for byte = character[1][1], character[1][2] do BY_FIRST[byte] = character end
end

--- Bytes of the character that begins at byte `at` (1-based); nil where none does. The second result tells whether the
-- text ends within one.
local function character_length(text, at)
  local first = text:byte(at)
  if first < 0x80 then return 1 end
  local character = BY_FIRST[first]
  for i = 2, character and #character or 0 do
    local byte = text:byte(at + i - 1)
    if not byte then return nil, true end
    if byte < character[i][1] or byte > character[i][2] then return nil end
  end
  return character and #character
end

--- Tells whether a text is well-formed UTF-8.
-- @param text string
-- @return boolean
function utf8.valid(text)
  local at = text:find "[\128-\255]"
  while at do
    local n = character_length(text, at)
    if not n then return false end
    at = text:find("[\128-\255]", at + n)
  end
  return true
end

--- Makes well-formed UTF-8 of any bytes: each byte that belongs to no character becomes U+FFFD.
-- @param bytes string
-- @return text, and the bytes of an unfinished character at the end ("" where there is none), which more bytes may
-- complete
function utf8.clean(bytes)
  if not bytes:find "[\128-\255]" then return bytes, "" end
  local out, at = {}, 1
  while at <= #bytes do
    local plain = bytes:match("^[%z\1-\127]+", at)
    local n, unfinished = plain and #plain, false
    if not n then n, unfinished = character_length(bytes, at) end
    if unfinished then return table.concat(out), bytes:sub(at) end
    out[#out + 1] = n and bytes:sub(at, at + n - 1) or "\239\191\189"
    at = at + (n or 1)
  end
  return table.concat(out), ""
end

--- Encodes a code point.
-- @param code integer, 0 to 0x10FFFF
-- @return string of one to four bytes
function utf8.char(code)
  if code < 0x80 then return string.char(code) end
  local tail = string.char(0x80 + code % 64)
  code = math.floor(code / 64)
  if code < 0x20 then return string.char(0xc0 + code) .. tail end
  tail = string.char(0x80 + code % 64) .. tail
  code = math.floor(code / 64)
  if code < 0x10 then return string.char(0xe0 + code) .. tail end
  return string.char(0xf0 + math.floor(code / 64), 0x80 + code % 64) .. tail
end

--- Counts the characters of a text.
-- @param text string, well-formed UTF-8
-- @return integer
function utf8.length(text) return select(2, text:gsub("[^\128-\191]", "")) end

return utf8
