#!/bin/sh
# libsndfile 1.2.2 (soundfile 0.14) and 1.2.0 (Debian 12): of an MP3 file of variable bit rate without a Xing, Info or
# VBRI header, which every recorder that streams writes, it guesses the number of samples from the first frames and the
# size of the file, and reads no more than that. There is no error: the rest of the sound is not there. (A guess that
# is too high does no harm: what is read is all there is.)
#
# Seen: a chirp of 12,000 samples, which fills 23 frames. Without the header 2,880 samples
# of 13,248 are read.
#
# What we do about it: core/data/audio_format.c counts the headers of the frames, and such a file is refused as cut
# short, with both numbers.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q soundfile==0.14.0 numpy==2.4.6
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import sys

import numpy as np
import soundfile

path = sys.argv[1] + "/chirp.mp3"
t = np.arange(12000) / 16000
soundfile.write(path, 0.4 * np.sin(2 * np.pi * (200 * t + 900 * t * t)), 16000, format="MP3")
data = open(path, "rb").read()
kbits = [0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160]
at, frames = data.find(b"\xff\xf3"), []
while at + 4 <= len(data) and data[at] == 0xFF:  # MPEG 2, layer III, 576 samples a frame
    size = 72000 * kbits[data[at + 2] >> 4] // 16000 + (data[at + 2] >> 1 & 1)
    frames.append(data[at:at + size])
    at += size
assert b"Xing" in frames[0] or b"Info" in frames[0]
open(path, "wb").write(b"".join(frames[1:]))
whole = len(soundfile.read(path)[0])
print(f"{len(frames) - 1} frames of 576 samples, {576 * (len(frames) - 1)} in all; read: {whole}")
assert whole < 576 * (len(frames) - 1) // 2
PYTHON
