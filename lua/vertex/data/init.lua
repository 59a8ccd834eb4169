--- data: what networks are trained on. A kind of data is a file of this folder; its reader gives batches by :next(),
-- says where it stands by :position(), and ends by :close().
--
--     vx.data.images { path = "photos", size = 64, batch = 16 }      photographs, or images made on the fly
--     vx.data.speech { path = "LibriSpeech", crop = 32000, batch = 8 }  speech, or synthetic utterances
--     vx.data.vectors { path = "features.npy", batch = 4096 }        vectors of your own
--
-- Beside the readers: single images, read, written and converted, and single waves, read and resampled.

local images = require "vertex.data.images"
local speech = require "vertex.data.speech"

local data = { images = images.images, speech = speech.speech, vectors = require "vertex.data.vectors" }

for _, name in ipairs { "list", "find", "mean", "std", "open", "decode", "resize", "procedural", "normalize",
  "denormalize", "to_u8", "save", "png" } do
  data[name] = images[name]
end
for _, name in ipairs { "open_audio", "resample", "synthetic_speech" } do data[name] = speech[name] end

return data
