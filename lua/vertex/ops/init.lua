--- ops: every op that Lua knows, one record each (see record.lua): what it is, forward beside backward, and the cases
-- its specs run on. The numeric work is a call or two of C (core/ops.def); a record says which, on which shapes, and
-- what the gradient is. ops.NAME(...) is the function; ops.registry holds the records.

local record = require "vertex.ops.record"

for _, kind in ipairs { "view", "elementwise", "reduce", "linear", "conv", "norm", "attention", "index", "loss",
  "contrastive", "quantize", "neighbours", "dirichlet", "random", "operators" } do
  require("vertex.ops." .. kind)
end

local ops = record.ops
ops.registry = record.registry

return ops
