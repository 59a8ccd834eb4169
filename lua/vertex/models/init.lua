--- models: whole networks under the names of the libraries they are known from, so that published weights load.

return { wav2vec2 = require "vertex.models.wav2vec2" }
