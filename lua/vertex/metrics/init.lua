--- metrics: what trained models are judged by. A metric is a file of this folder.

return { code_use = require "vertex.metrics.code_use" }
