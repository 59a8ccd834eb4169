--- metrics/effective_rank: over how many directions rows spread, by the participation ratio of their covariance's
-- eigenvalues, (sum l)^2 / sum l^2. It is 1 where all lie on a line, and D where they spread evenly over D directions.

local core = require "vertex.core"
local moments = require "vertex.metrics.moments"

local fail, shape_text = core.fail, core.shape_text

--- Computes the participation ratio of a set of rows, of latents or of a codebook.
-- @param x tensor f32 (N,D)
-- @return number from 1 to D; 0 where all rows are the same
-- @raise where x has another shape, fewer than two rows, or a NaN or Inf
return function(x)
  if x:dim() ~= 2 or x:size(2) == 0 then fail("effective_rank: x %s should have the shape (N,D)", shape_text(x)) end
  return moments.new(x:size(2)):add(x):effective_rank()
end
