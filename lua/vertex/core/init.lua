--- core: the only folder that calls C. Each file gives a table of functions; this one joins them, so that others say
-- core.new, core.device, core.writer:
--
--   library   opens libvertex and raises its errors at the user's line
--   dtype     the dtypes of tensors
--   device    devices by name, settings of their kernels, their memory
--   op        the numeric ops: core.op.NAME(...)
--   extent    what holds while a function runs, and in which coroutines
--   tensor    creation, views, questions, reading and writing
--   scope     what a training step made goes when it is over
--   graph     recorded graphs
--   random    generators of random streams
--   files     files that appear whole or not at all; folders
--   system    interrupts, hooks, threads, clock, terminal
--   comm      several processes that train together
--   data      images, audio, and streams of samples
--   trace     what each op costs
--   lapack    matrices of float64 (core.float64), eigenvectors of symmetric ones
--   sha256    the SHA-256 of files

local library = require "vertex.core.library"

local core = {}

-- What C is called with is for this folder alone.
local PRIVATE = { C = true, call = true, check = true, check_uses = true, lacks = true, handle = true, at_exit = true,
  OVER = true }

for _, part in ipairs { "library", "dtype", "device", "op", "extent", "tensor", "scope", "graph", "random", "files",
  "system", "comm", "data", "trace", "lapack", "sha256" } do
  if part ~= "library" then library.check_uses(library.directory .. "/core/" .. part .. ".lua") end
  for name, value in pairs(require("vertex.core." .. part)) do
    assert(core[name] == nil, name)
    if not PRIVATE[name] then core[name] = value end
  end
end

return core
