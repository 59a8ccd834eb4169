--- core/random.lua: random streams. A (seed, stream) pair determines all numbers drawn with it (Philox, see
-- core/rng.h), on any device; generators hand the pairs out.

local check = require "vertex.check"
local graph = require "vertex.core.graph"
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
function Generator:stream() return self.seed, graph.count(self, "drawn", "stream") end

--- What everything random draws from unless given another generator.
random.default_generator = random.generator(0)

local function settled(generator, drawn, ok, ...)
  if ok then return ... end
  if drawn then graph.take_back(generator, "drawn", drawn) end
  error((...), 0)
end

--- Draws the next stream of a generator for f(seed, stream, ...). Where f fails, the stream was not drawn.
-- @param generator of random.generator, or a table with a method :stream() and, as `of`, the generator that this
-- draws from; nil is the default one
-- @param f function of the seed, the stream and the rest of the arguments
-- @param ... arguments for f
-- @return what f returns
-- @raise where it is no generator, and what f raises
function random.drawing(generator, f, ...)
  generator = generator or random.default_generator
  if type(generator) ~= "table" or type(generator.stream) ~= "function" then
    fail("generator is %s, expected what vx.generator(seed) gives", check.show(generator))
  end
  local counting = generator.of or generator
  local drawn = counting.drawn
  local seed, stream = generator:stream()
  return settled(counting, drawn, pcall(f, seed, stream, ...))
end

--- Seeds the default generator, from which everything random draws unless given another.
-- @param seed integer from 0 to 2^53
-- @raise where seed is no such integer
function random.seed(seed)
  local g = random.generator(seed)
  random.default_generator.seed, random.default_generator.drawn = g.seed, 0
end

return random
