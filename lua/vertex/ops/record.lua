--- ops/record.lua: the form of an op. A record says everything about an op that anybody asks for: help prints it, the
-- specs test it, the tape runs it.
--
--   define("narrow", {
--     text = "Gives a view of ...",                     -- a sentence or more, the first says what it does
--     args = { { "x", "tensor of any shape and dtype" },          -- name, then kind (vertex/arguments.lua holds calls
--                                                                 --   to it), shape, unit, 0-based or 1-based
--       { "keep", "...", optional = true },             -- may be nil
--       { "groups", "...", default = 1 } },             -- may be nil, and is this then
--     returns = "tensor; shape of x with ...",
--     raises = "where ...",
--     calls = { "reduce" },                             -- the ops of core/ops.def that do its work
--     source = "Eq. 13",                                -- optional: equation or paper
--     also = { "mse_loss" },                            -- optional: PyTorch's names for it, none of them of vx
--     method = true,                                    -- optional: x:name(...), too
--     forward = function(ctx, ...) ... end,             -- see lua/vertex/tape.lua for the rules; no backward: no
--     backward = function(ctx, dy) ... end,             --   gradient flows through
--     composite = true,                                 -- optional: made of other ops, whose gradients it has
--     outputs = 2, takes_bf16 = true, accumulates = true, -- optional: see the rules
--     cases = function(T) return { { T { 2, 3 }, 1 } } end,
--   })
--
-- `cases` gives argument lists for the specs, where T(shape, { low, high, grad = false, dtype }) makes a random tensor;
-- each is checked against a float64 loop (tests/ops_spec.lua), against finite differences, and twice for the same bits.

local arguments = require "vertex.arguments"
local core = require "vertex.core"
local tape = require "vertex.tape"

local record = {
  ops = {},      -- name → function
  registry = {}, -- array of the records, and by name
}

local FIELDS = { name = "string", text = "string", args = "table", returns = "string", raises = "string",
  calls = "table", forward = "function" }

--- Raises what a record lacks.
local function check(op)
  for field, kind in pairs(FIELDS) do
    if type(op[field]) ~= kind or op[field] == "" then
      error(("op %s: its record needs the field '%s', a %s"):format(op.name, field, kind), 3)
    end
  end
  for i, arg in ipairs(op.args) do
    if type(arg[1]) ~= "string" or type(arg[2]) ~= "string" or arg[2] == "" then
      error(("op %s: argument %d needs a name and what it is"):format(op.name, i), 3)
    end
  end
end

--- Gives source and line of the definition under way: of the file that is being loaded, where it has helpers between.
local function place()
  local found
  for level = 3, 6 do
    local info = debug.getinfo(level, "Sl")
    if not info or info.what == "C" then break end
    found = info
    if info.what == "main" then break end
  end
  return found.source, found.currentline
end

--- Adds an op: it becomes a function of vertex.ops, and a method of tensors where its record says so.
function record.define(name, op)
  op.name = name
  check(op)
  for _, called in ipairs(op.calls) do core.expect_op(called) end
  op.source_file, op.line = place()
  record.registry[#record.registry + 1], record.registry[name] = op, op
  record.ops[name] = arguments.of_record(op, tape.recorded(op))
  tape.op_of[record.ops[name]] = op
  if op.method then core.Tensor[name] = record.ops[name] end
end

return record
