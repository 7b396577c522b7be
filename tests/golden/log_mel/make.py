"""Log-mel energies by transformers' audio_utils, which a test of crates/data compares ours with.

python make.py > values.json      (numpy and transformers; written with transformers 5.24)
"""

import json

import numpy
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

cases = []
for sample_rate, n_fft, hop, n_mels, n_frames in [(8000, 256, 128, 32, 6), (16000, 512, 160, 40, 5), (44100, 1024, 300, 24, 4)]:
    length = (n_frames - 1) * hop + n_fft
    time = numpy.arange(length) / sample_rate
    # A falling tone, a steady one and something rough, all of them exact in f32.
    samples = 0.5 * numpy.sin(2 * numpy.pi * (1800 - 9000 * time) * time) + 0.2 * numpy.sin(2 * numpy.pi * 440 * time)
    samples = (samples + 0.05 * ((numpy.arange(length) * 7919 % 101) / 50 - 1)).astype(numpy.float32)
    bank = mel_filter_bank(n_fft // 2 + 1, n_mels, 0.0, sample_rate / 2, sample_rate, norm=None, mel_scale="htk")
    energies = spectrogram(
        samples.astype(numpy.float64),
        window_function(n_fft, "hann", periodic=True),
        frame_length=n_fft,
        hop_length=hop,
        power=2.0,
        center=False,
        mel_filters=bank,
        mel_floor=0.0,
    )
    cases.append(
        {
            "sample_rate": sample_rate,
            "n_fft": n_fft,
            "hop": hop,
            "n_mels": n_mels,
            "n_frames": n_frames,
            "samples": [round(float(x), 9) for x in samples],
            "logarithms": [[float(numpy.float32(x)) for x in row] for row in numpy.log(energies + 1e-6)],
        }
    )
print(json.dumps(cases))
