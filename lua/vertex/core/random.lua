--- core/random.lua: random streams. A (seed, stream) pair determines all numbers drawn with it (Philox, see
-- core/rng.h), on any device; generators hand the pairs out.

local check = require "vertex.check"
local count = require("vertex.core.graph").count
local fail = require("vertex.core.library").fail

local random = {}

local Generator = {}
Generator.__index = Generator

--- Makes a source of random streams: every call of :stream() gives the next (seed, stream) pair. Its state is { seed,
-- drawn }: the seed and how many streams were drawn.
-- @param seed integer from 0 to 2^53
-- @return generator
-- @raise where seed is no such integer
function random.generator(seed)
  return setmetatable({ seed = check.integer("seed", "seed", seed, 0), drawn = 0 }, Generator)
end

--- Draws the next stream.
-- @return seed, and the number of the stream, from 1 on
function Generator:stream() return self.seed, count(self, "drawn", "stream") end

--- What everything random draws from unless given another generator.
random.default_generator = random.generator(0)

--- Draws the next stream of a generator.
-- @param generator of random.generator, or a table with a method :stream(); nil is the default one
-- @return seed and stream
-- @raise where it is no generator
function random.next_stream(generator)
  generator = generator or random.default_generator
  if type(generator) ~= "table" or type(generator.stream) ~= "function" then
    fail("generator is %s, expected what vx.generator(seed) gives", check.show(generator))
  end
  return generator:stream()
end

--- Seeds the default generator, from which everything random draws unless given another.
-- @param seed integer from 0 to 2^53
-- @raise where seed is no such integer
function random.seed(seed)
  local g = random.generator(seed)
  random.default_generator.seed, random.default_generator.drawn = g.seed, 0
end

return random
