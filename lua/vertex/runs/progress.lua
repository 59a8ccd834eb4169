--- runs/progress: how far a loop has come: a bar that updates in place on a terminal and in a notebook, and a plain
-- line now and then elsewhere (in a job's log, say).

local arguments = require "vertex.arguments"
local check = require "vertex.check"
local core = require "vertex.core"
local display = require "vertex.interactive.display"

--- Seconds as a short text for people.
local function duration(seconds)
  if seconds ~= seconds or seconds == math.huge then return "--:--" end
  seconds = math.floor(seconds + 0.5)
  if seconds >= 3600 then return ("%d:%02d:%02d"):format(seconds / 3600, seconds / 60 % 60, seconds % 60) end
  return ("%d:%02d"):format(seconds / 60, seconds % 60)
end

local Progress = {}
Progress.__index = Progress

local bars = 0 -- so far

--- Makes a progress bar.
-- @param label text in front of it
-- @param options {total = steps in all, done = those done before (0), quiet = true for none, every = seconds between
-- plain lines (10), place = text: which of several loops this is, overall = function(seconds left of this loop) →
-- seconds left of all of them}
-- @return bar with :update(done, text) and :finish(text)
-- @raise where an option is unknown, or total is missing
local function progress(label, options)
  bars = bars + 1
  local notebook = display.mode == "notebook"
  local o = check.options("progress", options, { total = "whole", done = { "whole", 0 }, quiet = "boolean",
    every = { "number", 10 }, place = "text", overall = "function" })
  if not o.total then core.fail "progress: needs total, the steps in all" end
  return setmetatable({ label = label, total = o.total, first = o.done, quiet = o.quiet,
    notebook = notebook, tty = not notebook and core.is_tty(2), every = o.every, place = o.place and o.place .. ", ",
    overall = o.overall, started = core.time(),
    shown = -math.huge, id = "progress " .. bars }, Progress)
end

--- The text that fits into some columns, cut between its parts, which two spaces separate.
local function fit(text, columns)
  while text ~= "" and #text > columns do text = text:match "^(.*)  .-$" or "" end
  return text
end

--- Gives the bar as a line.
-- @param done number of steps done
-- @param text text, what is shown beside it; what does not fit is left out
-- @param left text: the time left
-- @param columns integer: the most that the line may take
-- @return text
function Progress:line(done, text, left, columns)
  local share = (" %3.0f%%  "):format(100 * done / self.total)
  text = fit(text, columns - #self.label - #share - #left - 4)
  local tail = share .. (text ~= "" and text .. "  " or "") .. left
  local room = math.max(0, math.min(30, columns - #self.label - #tail - 2))
  local full = math.floor(room * done / self.total)
  return ("%s %s%s%s"):format(self.label, ("━"):rep(full), ("╌"):rep(room - full), tail)
end

--- Shows how far it is. Limits itself to ten times a second (where lines are printed: to one in `every` seconds, and
-- the last), so call it as often as you like.
-- @param done number of steps done
-- @param text text beside the bar
-- @raise in a notebook, where display.show raises
function Progress:update(done, text)
  if self.quiet then return end
  local now, last = core.time(), done >= self.total
  if not last and now - self.shown < ((self.tty or self.notebook) and 0.1 or self.every) then return end
  self.shown = now
  local elapsed = now - self.started
  local seconds = elapsed / math.max(1e-9, done - self.first) * (self.total - done)
  local left = "left " .. duration(seconds)
  if self.overall then
    left = ("%s  %stotal left %s"):format(left, self.place or "", duration(self.overall(seconds)))
  end
  if self.notebook then
    display.show(self:line(done, text, left, 120), { id = self.id })
  elseif self.tty then
    io.stderr:write("\r\27[K" .. self:line(done, text, left, core.terminal_columns()))
    io.stderr:flush()
    self.drawn = true
  else
    io.stderr:write(("%s %d/%d  %s  %s\n"):format(self.label, done, self.total, text, left))
  end
end

--- Leaves the line.
-- @param[opt] text text in the bar's place; without, a terminal's bar vanishes and a notebook's stays
-- @raise in a notebook, where display.show raises
function Progress:finish(text)
  if self.quiet then return end
  if self.notebook then
    if text then display.show(text, { id = self.id }) end
    return
  end
  if self.drawn then io.stderr:write("\r\27[K") end
  if text then io.stderr:write(text .. "\n") end
end

arguments.guard_class("progress", Progress)

return progress
