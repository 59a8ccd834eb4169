--- metrics: what trained models are judged by. A metric is a file of this folder.

local moments = require "vertex.metrics.moments"
local score = require "vertex.metrics.inception_score"
local tightness = require "vertex.metrics.tightness"

return { code_use = require "vertex.metrics.code_use", effective_rank = require "vertex.metrics.effective_rank",
  moments = moments.new, frechet = moments.frechet,
  inception_score = score.inception_score, inception_scores = score.new,
  tightness = tightness.tightness, unselected = tightness.unselected, contested = tightness.contested,
  smoothing = tightness.smoothing }
