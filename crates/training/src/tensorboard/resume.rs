//! Taking what an abandoned run wrote out of a folder's event files.

use std::fs::{self, File};
use std::io::{self, BufReader, Read};
use std::path::{Path, PathBuf};

use super::read::{EventValue, decode_event};
use super::record::{self, Next};
use crate::run_folder::{At, FileError, atomic_write_with};

/// Removes from the event files in `dir` everything after step `keep_through` (with `None`:
/// everything), and what is torn or altered.
///
/// Returns the largest number of seconds in the names of the files that it found.
pub(super) fn purge(dir: &Path, keep_through: Option<u64>) -> Result<Option<u64>, FileError> {
    let mut newest = None;
    for path in event_files(dir)? {
        newest = newest.max(seconds_in_name(&path));
        match keep_through {
            Some(step) => keep_steps_through(&path, step)?,
            None => fs::remove_file(&path).at("remove", &path)?,
        }
    }
    Ok(newest)
}

/// What TensorBoard takes for event files: all whose name contains "tfevents".
fn event_files(dir: &Path) -> Result<Vec<PathBuf>, FileError> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).at("read", dir)? {
        let entry = entry.at("read", dir)?;
        let is_file = entry.file_type().at("read", dir)?.is_file();
        if is_file && entry.file_name().to_string_lossy().contains("tfevents") {
            found.push(entry.path());
        }
    }
    found.sort();
    Ok(found)
}

fn seconds_in_name(path: &Path) -> Option<u64> {
    let name = path.file_name()?.to_str()?;
    let (_, rest) = name.split_once("tfevents.")?;
    rest.split('.').next()?.parse().ok()
}

fn keep_steps_through(path: &Path, step: u64) -> Result<(), FileError> {
    let open = || Ok(BufReader::new(File::open(path)?));
    let survey = open().and_then(|mut reader| survey(&mut reader, step)).at("read", path)?;
    if survey.values_kept == 0 {
        // Only a header would be left; such files would pile up restart by restart.
        return fs::remove_file(path).at("remove", path);
    }
    if survey.all_kept {
        return Ok(());
    }
    atomic_write_with(path, |target| {
        let mut reader = open()?;
        loop {
            match record::next(&mut reader)? {
                Next::Record(payload) if values_through(&payload, step).is_some() => {
                    let mut bytes = Vec::new();
                    record::append(&mut bytes, &payload);
                    target.write_all(&bytes)?;
                }
                Next::Record(_) | Next::Altered => {}
                Next::Broken | Next::End => return Ok(()),
            }
        }
    })
}

struct Survey {
    values_kept: usize,
    all_kept: bool,
}

fn survey(reader: &mut impl Read, step: u64) -> io::Result<Survey> {
    let mut survey = Survey { values_kept: 0, all_kept: true };
    loop {
        match record::next(reader)? {
            Next::Record(payload) => match values_through(&payload, step) {
                Some(values) => survey.values_kept += values,
                None => survey.all_kept = false,
            },
            Next::Altered => survey.all_kept = false,
            Next::Broken => {
                survey.all_kept = false;
                return Ok(survey);
            }
            Next::End => return Ok(survey),
        }
    }
}

/// How many tagged values a record holds, if it is to be kept.
fn values_through(payload: &[u8], step: u64) -> Option<usize> {
    let events = decode_event(payload)?;
    let tagged = |event: &&super::Event| !matches!(event.value, EventValue::FileVersion(_) | EventValue::SessionStart);
    events.iter().all(|event| event.step <= step).then(|| events.iter().filter(tagged).count())
}
