//! WAV files to samples (IBM and Microsoft 1991; WAVE_FORMAT_EXTENSIBLE; RF64 of EBU Tech 3306). Small enough to be our own: the
//! crates for it take the low bits of samples that fill a part of their container, or read what was written to a pipe as silence.

/// Audio.
#[derive(Debug, PartialEq)]
pub(super) struct Audio {
    /// Samples per second.
    pub(super) sample_rate: u32,
    /// From -1 to 1; several channels are averaged.
    pub(super) samples: Vec<f32>,
    /// Whether the length in its header is that of a writer that could not go back, so that all up to the end was taken.
    pub(super) streamed: bool,
}

/// How a sample is written.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    /// Whole numbers, in the upper bits of so many bytes; of one byte without a sign.
    Whole(usize),
    F32,
    F64,
}

/// The `fmt ` chunk.
#[derive(Debug, Clone, Copy)]
struct Format {
    kind: Kind,
    channels: usize,
    sample_rate: u32,
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().map(|chunk| u16::from_le_bytes(*chunk))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|chunk| u32::from_le_bytes(*chunk))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().map(|chunk| u64::from_le_bytes(*chunk))
}

/// Whether a chunk can begin here.
fn is_chunk(bytes: &[u8], at: usize) -> bool {
    let name = bytes.get(at..at + 4).is_some_and(|name| name.iter().all(|byte| (b' '..=b'~').contains(byte)));
    name && u32_at(bytes, at + 4).is_some_and(|length| length as usize <= bytes.len() - at - 8)
}

/// The audio of a file.
///
/// # Errors
/// What is wrong with it, in words.
pub(super) fn read(bytes: &[u8]) -> Result<Audio, String> {
    match (bytes.get(..4), bytes.get(8..12)) {
        (Some(b"RIFF" | b"RF64" | b"BW64"), Some(b"WAVE")) => {}
        (Some(b"RIFX"), _) => return Err("a WAV file of big-endian numbers (RIFX) is not read: save it as RIFF".into()),
        _ if bytes.is_empty() => return Err("the file is empty".into()),
        _ => return Err("not a WAV file: it does not begin with RIFF and WAVE".into()),
    }
    let (mut at, mut format, mut long) = (12, None, None);
    while let Some(length) = u32_at(bytes, at + 4) {
        let (name, content) = (&bytes[at..at + 4], at + 8);
        let inside = bytes.get(content..content.saturating_add(length as usize));
        match name {
            b"data" => {
                let format: Format = format.ok_or("no fmt chunk precedes its samples")?;
                let (end, streamed) = samples_end(bytes, content, length, long)?;
                return samples(&bytes[content..end], format, streamed);
            }
            b"fmt " => format = Some(Format::of(inside.ok_or("it is cut off in its header")?)?),
            b"ds64" => long = inside.and_then(|chunk| u64_at(chunk, 8)),
            _ => {}
        }
        let next = content.saturating_add(length as usize);
        // A byte pads chunks of odd length; some programs leave it out.
        let unpadded = length % 2 == 1 && !is_chunk(bytes, next.saturating_add(1)) && is_chunk(bytes, next);
        at = next.saturating_add(if unpadded { 0 } else { (length % 2) as usize });
    }
    Err("it holds no samples: there is no data chunk, or the file is cut off in front of it".into())
}

/// Where the samples end that begin at `start`, and whether that is simply the end of the file: a program that writes to a pipe
/// cannot know the length, and leaves the largest number (or nearly), or 0.
fn samples_end(bytes: &[u8], start: usize, length: u32, long: Option<u64>) -> Result<(usize, bool), String> {
    let there = bytes.len() - start;
    let promised = match (length, long) {
        (u32::MAX, Some(long)) => usize::try_from(long).unwrap_or(usize::MAX),
        _ => length as usize,
    };
    let unknown = length >= 0x7fff_0000 && promised > there && long.is_none();
    let never_filled_in = length == 0 && there > 0 && !is_chunk(bytes, start);
    match promised <= there {
        _ if unknown || never_filled_in => Ok((bytes.len(), true)),
        true => Ok((start + promised, false)),
        false => Err(format!("it is cut off: its header promises {promised} bytes of samples, and {there} are there")),
    }
}

impl Format {
    fn of(chunk: &[u8]) -> Result<Self, String> {
        let short = "its header is too short to say how samples are written";
        let field = |at| u16_at(chunk, at).ok_or(short);
        let (mut tag, channels, frame, bits) = (field(0)?, usize::from(field(2)?), usize::from(field(12)?), field(14)?);
        let sample_rate = u32_at(chunk, 4).ok_or(short)?;
        if tag == 0xfffe {
            // The format is in the first two bytes of its identifier.
            tag = field(24)?;
        }
        let width = frame / channels.max(1);
        if channels == 0 || width * channels != frame || usize::from(bits).div_ceil(8) > width {
            return Err(format!("its header contradicts itself: {channels} channels of {bits} bits in {frame} bytes"));
        }
        let kind = match (tag, width) {
            (1, 1..=4) if bits > 0 => Kind::Whole(width),
            (3, 4) => Kind::F32,
            (3, 8) => Kind::F64,
            (1, _) => {
                return Err(format!(
                    "samples of {bits} bits in {width} bytes are not read: save it with 16 or 24 bits"
                ));
            }
            (3, _) => return Err(format!("floats of {bits} bits are not read: save it with 32")),
            (other, _) => return Err(format!("{} is not read: save it as PCM of 16 bits", encoding(other))),
        };
        Ok(Self { kind, channels, sample_rate })
    }
}

/// What a format tag means (mmreg.h), of those that occur.
fn encoding(tag: u16) -> String {
    match tag {
        2 => "Microsoft ADPCM".into(),
        6 => "A-law".into(),
        7 => "mu-law".into(),
        0x11 => "IMA ADPCM".into(),
        0x31 => "GSM 6.10".into(),
        0x55 => "MP3 in a WAV file".into(),
        0xff | 0x1600 => "AAC in a WAV file".into(),
        other => format!("audio of format {other:#06x}"),
    }
}

fn samples(bytes: &[u8], format: Format, streamed: bool) -> Result<Audio, String> {
    let Format { kind, channels, sample_rate } = format;
    let width = match kind {
        Kind::Whole(width) => width,
        Kind::F32 => 4,
        Kind::F64 => 8,
    };
    if bytes.is_empty() {
        return Err("it holds no samples: its data chunk is empty".into());
    }
    if !bytes.len().is_multiple_of(width * channels) {
        let problem = format!("{} bytes are no whole number of frames of {} bytes", bytes.len(), width * channels);
        return Err(format!("it is cut off: {problem}"));
    }
    let all: Vec<f32> = match kind {
        Kind::F32 => bytes.as_chunks::<4>().0.iter().map(|&chunk| f32::from_le_bytes(chunk)).collect(),
        Kind::F64 => bytes.as_chunks::<8>().0.iter().map(|&chunk| f64::from_le_bytes(chunk) as f32).collect(),
        Kind::Whole(1) => bytes.iter().map(|&byte| (f32::from(byte) - 128.0) / 128.0).collect(),
        Kind::Whole(_) => {
            let full = (1u64 << (8 * width - 1)) as f32;
            let number = |chunk: &[u8]| {
                let mut wide = [0; 4];
                wide[4 - width..].copy_from_slice(chunk);
                (i32::from_le_bytes(wide) >> (8 * (4 - width))) as f32 / full
            };
            bytes.chunks_exact(width).map(number).collect()
        }
    };
    if let Some(at) = all.iter().position(|sample| !sample.is_finite()) {
        return Err(format!("sample {at} is {}", all[at]));
    }
    let samples = all.chunks(channels).map(|frame| frame.iter().sum::<f32>() / channels as f32).collect();
    Ok(Audio { sample_rate, samples, streamed })
}

#[cfg(test)]
mod tests;
