#![allow(clippy::unwrap_used)]
use super::*;

/// A chunk, with its padding.
fn chunk(name: &[u8; 4], content: &[u8]) -> Vec<u8> {
    let mut all = [&name[..], &(content.len() as u32).to_le_bytes(), content].concat();
    all.resize(all.len().next_multiple_of(2), 0);
    all
}

fn file(chunks: &[Vec<u8>]) -> Vec<u8> {
    let body = chunks.concat();
    [b"RIFF", &(body.len() as u32 + 4).to_le_bytes()[..], b"WAVE", &body].concat()
}

/// A format chunk: tag, channels, bytes of a sample, valid bits; extensible where `inner` is the tag inside.
fn format(tag: u16, channels: u16, width: u16, bits: u16, inner: Option<u16>) -> Vec<u8> {
    let frame = channels * width;
    let mut all = [tag.to_le_bytes(), channels.to_le_bytes()].concat();
    all.extend(8000u32.to_le_bytes());
    all.extend((8000 * u32::from(frame)).to_le_bytes());
    all.extend([frame.to_le_bytes(), (if inner.is_some() { 8 * width } else { bits }).to_le_bytes()].concat());
    if let Some(inner) = inner {
        all.extend([22u16.to_le_bytes(), bits.to_le_bytes(), [0; 2], [0; 2], inner.to_le_bytes()].concat());
        all.extend(b"\0\0\0\0\x10\0\x80\0\0\xaa\0\x38\x9b\x71");
    }
    chunk(b"fmt ", &all)
}

const SAMPLES: [f32; 5] = [0.0, 0.5, -0.5, 0.25, -1.0];

/// The samples as whole numbers in the upper bits of so many bytes.
fn whole(width: usize) -> Vec<u8> {
    let number = |sample: &f32| ((f64::from(*sample) * 2f64.powi(31)) as i32).to_le_bytes()[4 - width..].to_vec();
    SAMPLES.iter().flat_map(number).collect()
}

fn sixteen(data: &[u8]) -> Vec<u8> {
    file(&[format(1, 1, 2, 16, None), chunk(b"data", data)])
}

#[test]
fn one_sound_is_the_same_in_every_kind() {
    let floats: Vec<u8> = SAMPLES.iter().flat_map(|sample| sample.to_le_bytes()).collect();
    let doubles: Vec<u8> = SAMPLES.iter().flat_map(|sample| f64::from(*sample).to_le_bytes()).collect();
    let eight: Vec<u8> = SAMPLES.iter().map(|sample| (sample * 128.0 + 128.0) as u8).collect();
    let twice: Vec<u8> = whole(2).chunks(2).flat_map(|sample| [sample, sample].concat()).collect();
    for (name, format, data) in [
        ("8 bits", format(1, 1, 1, 8, None), eight),
        ("16 bits", format(1, 1, 2, 16, None), whole(2)),
        ("12 bits in 2 bytes", format(1, 1, 2, 12, None), whole(2)),
        ("24 bits", format(1, 1, 3, 24, None), whole(3)),
        ("32 bits", format(1, 1, 4, 32, None), whole(4)),
        ("floats", format(3, 1, 4, 32, None), floats.clone()),
        ("doubles", format(3, 1, 8, 64, None), doubles),
        ("extensible, 16 bits", format(0xfffe, 1, 2, 16, Some(1)), whole(2)),
        ("extensible, 24 bits in 4 bytes", format(0xfffe, 1, 4, 24, Some(1)), whole(4)),
        ("extensible, 20 bits in 3 bytes", format(0xfffe, 1, 3, 20, Some(1)), whole(3)),
        ("extensible floats", format(0xfffe, 1, 4, 32, Some(3)), floats),
        ("two channels", format(1, 2, 2, 16, None), twice),
    ] {
        // A chunk of odd length, padded, is in between.
        let audio = read(&file(&[format, chunk(b"LIST", b"odd"), chunk(b"data", &data)]));
        let audio = audio.unwrap_or_else(|problem| panic!("{name}: {problem}"));
        assert_eq!(
            (audio.samples.as_slice(), audio.sample_rate, audio.streamed),
            (&SAMPLES[..], 8000, false),
            "{name}"
        );
    }
}

#[test]
fn chunks_may_lack_their_padding_and_follow_the_samples() {
    let mut list = chunk(b"LIST", b"odd");
    list.pop();
    let bytes = file(&[list, format(1, 1, 2, 16, None), chunk(b"data", &whole(2)), chunk(b"id3 ", b"title")]);
    assert_eq!(read(&bytes).unwrap().samples, SAMPLES);
}

#[test]
fn what_was_written_to_a_pipe_is_read_to_its_end() {
    for length in [u32::MAX, 0, 0x7fff_f000] {
        let mut bytes = sixteen(&whole(2));
        let at = bytes.len() - whole(2).len() - 4;
        bytes[at..at + 4].copy_from_slice(&length.to_le_bytes());
        let audio = read(&bytes).unwrap();
        assert!(audio.samples == SAMPLES && audio.streamed, "{length:#x}: {audio:?}");
    }
    // RF64 tells the length apart.
    let long = [&[0; 8][..], &10u64.to_le_bytes(), &[0; 12]].concat();
    let mut bytes = file(&[chunk(b"ds64", &long), format(1, 1, 2, 16, None), chunk(b"data", &whole(2))]);
    let at = bytes.len() - 14;
    bytes[at..at + 4].fill(0xff);
    bytes[..4].copy_from_slice(b"RF64");
    bytes.extend(chunk(b"LIST", b"more"));
    assert_eq!(read(&bytes).unwrap(), Audio { sample_rate: 8000, samples: SAMPLES.into(), streamed: false });
}

#[test]
fn what_cannot_be_read_is_refused_in_words() {
    let data = |format: Vec<u8>, data: &[u8]| file(&[format, chunk(b"data", data)]);
    let whole = whole(2);
    let mut cut = sixteen(&whole);
    cut.truncate(cut.len() - 2);
    for (bytes, words) in [
        (Vec::new(), "empty"),
        (b"RIFX\0\0\0\0WAVE".to_vec(), "big-endian"),
        (b"OggS".to_vec(), "not a WAV file"),
        (sixteen(b""), "its data chunk is empty"),
        (file(&[format(1, 1, 2, 16, None)]), "no data chunk"),
        (file(&[chunk(b"data", &whole)]), "no fmt chunk"),
        (cut, "promises 10 bytes of samples, and 8 are there"),
        (sixteen(&whole[..9]), "no whole number of frames"),
        (data(format(6, 1, 1, 8, None), &whole), "A-law is not read"),
        (data(format(0xfffe, 1, 1, 8, Some(7)), &whole), "mu-law is not read"),
        (data(format(2, 1, 2, 16, None), &whole), "ADPCM"),
        (data(format(1, 0, 2, 16, None), &whole), "contradicts itself"),
        (data(format(1, 1, 8, 64, None), &whole), "64 bits in 8 bytes"),
        (data(format(3, 1, 2, 16, None), &whole), "floats of 16 bits"),
        (data(format(3, 1, 4, 32, None), &f32::NAN.to_le_bytes()), "sample 0 is NaN"),
    ] {
        let problem = read(&bytes).unwrap_err();
        assert!(problem.contains(words), "{problem}, not {words}");
    }
    // Nothing panics, however short.
    let whole = sixteen(&whole);
    (0..whole.len()).for_each(|length| assert!(read(&whole[..length]).is_err(), "{length}"));
}
