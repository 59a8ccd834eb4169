--- models: whole networks under the names of the libraries they are known from, so that published weights load.

return { inception_v3 = require "vertex.models.inception_v3", wav2vec2 = require "vertex.models.wav2vec2" }
