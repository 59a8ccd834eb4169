--- core/op.lua: the numeric ops of C (core/ops.def), and the functions of one number that C has.

local ffi = require "ffi"
local C = require("vertex.core.library").C

local op = {}

--- Lists the ops of ops.def: array of { name, contract, text }.
function op.op_list()
  local list = {}
  for line in ffi.string(C.vx_ops()):gmatch "[^\n]+" do
    local name, contract, text = line:match "^(.-)\t(.-)\t(.*)$"
    list[#list + 1] = { name = name, contract = contract, text = text }
  end
  return list
end

local int_out = ffi.new "int[1]"

--- Says whether a backend ("cpu", "cuda") has a kernel for an op of ops.def; nil and why where its library cannot
-- be opened.
function op.backend_has(backend, name)
  if C.vx_backend_has(backend, name, int_out) == 0 then return int_out[0] ~= 0 end
  return nil, ffi.string(C.vx_error())
end

--- Computes ln gamma(x), in float64; NaN below 0.
function op.lgamma(x) return C.vx_lgamma(x) end

--- Computes the first derivative of ln gamma at x, in float64; NaN below 0.
function op.digamma(x) return C.vx_digamma(x) end

--- Computes the second derivative of ln gamma at x, in float64; NaN below 0.
function op.trigamma(x) return C.vx_trigamma(x) end

return op
