//! Reading event files back. Shares nothing with the writer but the framing's checksum, so that one
//! checks the other.

use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use super::TensorboardError;
use super::record::{self, Next};
use crate::run_folder::At;

/// One value of one step.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Seconds since 1970.
    pub wall_time: f64,
    /// The training step.
    pub step: u64,
    /// The value's name; empty where the record is no summary.
    pub tag: String,
    /// What was recorded.
    pub value: EventValue,
}

/// What an event holds.
#[derive(Debug, Clone, PartialEq)]
pub enum EventValue {
    /// One number.
    Scalar(f32),
    /// A distribution.
    Histogram {
        /// The smallest value.
        min: f64,
        /// The largest value.
        max: f64,
        /// How many values there are.
        num: f64,
        /// The sum of the values.
        sum: f64,
        /// The sum of their squares.
        sum_squares: f64,
        /// The upper end of each bucket.
        limits: Vec<f64>,
        /// How many values are in each bucket.
        counts: Vec<f64>,
    },
    /// Markdown.
    Text(String),
    /// A PNG file.
    Image {
        /// Pixels across.
        width: u64,
        /// Pixels down.
        height: u64,
        /// The file's bytes.
        png: Vec<u8>,
    },
    /// The record that begins a file.
    FileVersion(String),
    /// A run began or was resumed; earlier events from this step on are void.
    SessionStart,
    /// Something that this reader does not know.
    Other,
}

/// The events of one file, in their order.
///
/// As TensorBoard does, stops at a record that is torn (the last one after a kill) and steps over
/// one whose payload was altered.
///
/// # Errors
/// If the file cannot be read or begins with no event record at all.
pub fn read_events(path: &Path) -> Result<Vec<Event>, TensorboardError> {
    let mut reader = BufReader::new(File::open(path).at("read", path)?);
    let mut events = Vec::new();
    let mut any = false;
    loop {
        match record::next(&mut reader).at("read", path)? {
            Next::Record(payload) => {
                any = true;
                events.extend(decode_event(&payload).unwrap_or_default());
            }
            Next::Altered => {}
            Next::Broken if !any => {
                return Err(TensorboardError::NotEvents {
                    path: path.to_path_buf(),
                    reason: "it does not begin with a whole record",
                });
            }
            Next::Broken | Next::End => return Ok(events),
        }
    }
}

/// The events in one record: one for each value of its summary. `None`: not a valid message.
pub(super) fn decode_event(payload: &[u8]) -> Option<Vec<Event>> {
    let (mut wall_time, mut step) = (0.0, 0);
    let mut values = Vec::new();
    for field in fields(payload)? {
        match field {
            (1, Wire::Fixed64(bits)) => wall_time = f64::from_bits(bits),
            (2, Wire::Varint(value)) => step = value,
            (3, Wire::Bytes(version)) => {
                let version = String::from_utf8_lossy(version).into_owned();
                values.push((String::new(), EventValue::FileVersion(version)));
            }
            (5, Wire::Bytes(summary)) => {
                for value in fields(summary)? {
                    if let (1, Wire::Bytes(value)) = value {
                        values.push(decode_value(value)?);
                    }
                }
            }
            (7, Wire::Bytes(session)) => {
                let started = fields(session)?.contains(&(1, Wire::Varint(1)));
                let value = match started {
                    true => EventValue::SessionStart,
                    false => EventValue::Other,
                };
                values.push((String::new(), value));
            }
            _ => {}
        }
    }
    let event = |(tag, value)| Event { wall_time, step, tag, value };
    Some(values.into_iter().map(event).collect())
}

fn decode_value(bytes: &[u8]) -> Option<(String, EventValue)> {
    let (mut tag, mut value, mut plugin) = (String::new(), EventValue::Other, None);
    for field in fields(bytes)? {
        match field {
            (1, Wire::Bytes(name)) => tag = String::from_utf8_lossy(name).into_owned(),
            (2, Wire::Fixed32(bits)) => value = EventValue::Scalar(f32::from_bits(bits)),
            (4, Wire::Bytes(image)) => value = decode_image(image)?,
            (5, Wire::Bytes(histogram)) => value = decode_histogram(histogram)?,
            (8, Wire::Bytes(tensor)) => value = decode_string_tensor(tensor)?,
            (9, Wire::Bytes(metadata)) => plugin = plugin_name(metadata)?,
            _ => {}
        }
    }
    // Strings of another plugin (its configuration, say) are no text to show.
    if matches!(value, EventValue::Text(_)) && plugin.as_deref() != Some("text") {
        value = EventValue::Other;
    }
    Some((tag, value))
}

fn decode_image(bytes: &[u8]) -> Option<EventValue> {
    let (mut width, mut height, mut png) = (0, 0, Vec::new());
    for field in fields(bytes)? {
        match field {
            (1, Wire::Varint(value)) => height = value,
            (2, Wire::Varint(value)) => width = value,
            (4, Wire::Bytes(bytes)) => png = bytes.to_vec(),
            _ => {}
        }
    }
    Some(EventValue::Image { width, height, png })
}

fn decode_histogram(bytes: &[u8]) -> Option<EventValue> {
    let mut moments = [0.0; 5];
    let (mut limits, mut counts) = (Vec::new(), Vec::new());
    for field in fields(bytes)? {
        match field {
            (number @ 1..=5, Wire::Fixed64(bits)) => {
                moments[number as usize - 1] = f64::from_bits(bits);
            }
            (6, Wire::Bytes(packed)) => limits = doubles(packed)?,
            (7, Wire::Bytes(packed)) => counts = doubles(packed)?,
            _ => {}
        }
    }
    let [min, max, num, sum, sum_squares] = moments;
    Some(EventValue::Histogram { min, max, num, sum, sum_squares, limits, counts })
}

fn decode_string_tensor(bytes: &[u8]) -> Option<EventValue> {
    let fields = fields(bytes)?;
    let text = fields.iter().find_map(|field| match field {
        (8, Wire::Bytes(text)) => Some(String::from_utf8_lossy(text).into_owned()),
        _ => None,
    });
    // DT_STRING is 7.
    let is_string = fields.contains(&(1, Wire::Varint(7)));
    Some(match text {
        Some(text) if is_string => EventValue::Text(text),
        _ => EventValue::Other,
    })
}

fn plugin_name(metadata: &[u8]) -> Option<Option<String>> {
    for field in fields(metadata)? {
        if let (1, Wire::Bytes(plugin)) = field {
            for field in fields(plugin)? {
                if let (1, Wire::Bytes(name)) = field {
                    return Some(Some(String::from_utf8_lossy(name).into_owned()));
                }
            }
        }
    }
    Some(None)
}

fn doubles(packed: &[u8]) -> Option<Vec<f64>> {
    let (chunks, rest) = packed.as_chunks::<8>();
    rest.is_empty().then(|| chunks.iter().map(|chunk| f64::from_le_bytes(*chunk)).collect())
}

/// The value of one field as it is in the message.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Wire<'a> {
    Varint(u64),
    Fixed64(u64),
    Bytes(&'a [u8]),
    Fixed32(u32),
}

/// All fields of a message with their numbers; `None` where the bytes are no message.
fn fields(mut bytes: &[u8]) -> Option<Vec<(u64, Wire<'_>)>> {
    let mut fields = Vec::new();
    while !bytes.is_empty() {
        let key = varint(&mut bytes)?;
        let wire = match key & 7 {
            0 => Wire::Varint(varint(&mut bytes)?),
            1 => Wire::Fixed64(u64::from_le_bytes(*bytes.split_off(..8)?.as_array()?)),
            2 => {
                let length = usize::try_from(varint(&mut bytes)?).ok()?;
                Wire::Bytes(bytes.split_off(..length)?)
            }
            5 => Wire::Fixed32(u32::from_le_bytes(*bytes.split_off(..4)?.as_array()?)),
            _ => return None,
        };
        fields.push((key >> 3, wire));
    }
    Some(fields)
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let byte = *bytes.split_off_first()?;
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(value);
        }
    }
    None
}
