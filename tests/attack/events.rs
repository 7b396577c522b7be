//! What TensorBoard's files of a run record: tags and steps, so that a step which is recorded twice, or not at all, shows.

use std::path::Path;

use crate::case::{Broken, Held};

/// `step tag` of every value in all event files of a run, sorted.
pub fn recorded(run: &Path) -> Held<Vec<String>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(run)? {
        let path = entry?.path();
        if path.to_string_lossy().contains("tfevents") {
            let bytes = std::fs::read(&path)?;
            let cut = || Broken(format!("{} is no whole file of records", path.display()));
            found.extend(of_file(&bytes).ok_or_else(cut)?);
        }
    }
    found.sort();
    Ok(found)
}

/// A record is its length, a checksum, an event and a checksum. `None` where the file is cut.
fn of_file(mut bytes: &[u8]) -> Option<Vec<String>> {
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let length = u64::from_le_bytes(*bytes.first_chunk::<8>()?) as usize;
        let event = fields(bytes.get(12..12 + length)?)?;
        // Event: 2 is the step, 5 the summary; of a summary 1 is a value, and of that 1 the tag.
        let step = event.iter().find(|field| field.0 == 2).map_or(0, |field| field.1);
        for (_, _, summary) in event.iter().filter(|field| field.0 == 5) {
            for (_, _, value) in fields(summary)?.iter().filter(|field| field.0 == 1) {
                let tag = fields(value)?.iter().find(|field| field.0 == 1).map(|field| field.2.to_vec());
                found.push(format!("{step:06} {}", String::from_utf8_lossy(&tag?)));
            }
        }
        bytes = bytes.get(16 + length..)?;
    }
    Some(found)
}

/// The fields of a protocol buffer: number, value where it is a whole number, content where it is a piece of bytes.
fn fields(mut bytes: &[u8]) -> Option<Vec<(u64, u64, &[u8])>> {
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let key = varint(&mut bytes)?;
        let (mut value, mut content) = (0, &bytes[..0]);
        let length = match key & 7 {
            0 => {
                value = varint(&mut bytes)?;
                0
            }
            1 => 8,
            2 => varint(&mut bytes)? as usize,
            5 => 4,
            _ => return None,
        };
        if key & 7 == 2 {
            content = bytes.get(..length)?;
        }
        bytes = bytes.get(length..)?;
        found.push((key >> 3, value, content));
    }
    Some(found)
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (&byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(value);
        }
    }
    None
}
