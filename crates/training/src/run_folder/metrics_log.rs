//! `metrics.jsonl`: what was measured, one JSON object a line.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{At, FileError, atomic_write_with};

/// The append-only log of a run's measurements.
///
/// Each line reaches the operating system before [`MetricsLog::append`] returns, so a killed
/// process loses none. Numbers that JSON cannot hold (NaN, infinities) become `null`.
#[derive(Debug)]
pub struct MetricsLog {
    path: PathBuf,
    file: File,
    length: u64, // bytes of complete lines
    dropped: usize,
}

impl MetricsLog {
    /// Opens `metrics.jsonl` in `run_dir`.
    ///
    /// With `resume_step = Some(s)`, lines whose `"step"` is greater than `s` and lines that are
    /// not complete JSON objects (the last one after a kill) are removed, by an atomic rewrite;
    /// lines without a step stay. With `None` the run starts from nothing and so does the log:
    /// earlier lines are removed.
    ///
    /// # Errors
    /// If the file cannot be read or written.
    pub fn open(run_dir: &Path, resume_step: Option<u64>) -> Result<Self, FileError> {
        fs::create_dir_all(run_dir).at("create", run_dir)?;
        let path = run_dir.join("metrics.jsonl");
        let dropped = match resume_step {
            Some(step) => drop_lines_after(&path, step)?,
            None => 0,
        };
        let file = OpenOptions::new().append(true).create(true).open(&path).at("open", &path)?;
        if resume_step.is_none() {
            file.set_len(0).at("empty", &path)?;
        }
        let length = file.metadata().at("read", &path)?.len();
        Ok(Self { path, file, length, dropped })
    }

    /// How many lines opening the log removed or mended.
    pub fn dropped(&self) -> usize {
        self.dropped
    }

    /// Adds one line.
    ///
    /// # Errors
    /// If it cannot be written, for example because the disk is full; the log then ends with the
    /// line before.
    pub fn append(&mut self, line: &Value) -> Result<(), FileError> {
        let mut bytes = line.to_string().into_bytes();
        bytes.push(b'\n');
        if let Err(cause) = self.file.write_all(&bytes) {
            // Part of the line may stand there; the next line must not be glued to it.
            let _ = self.file.set_len(self.length);
            return Err(cause).at("append to", &self.path);
        }
        self.length += bytes.len() as u64;
        Ok(())
    }

    /// Makes all lines survive a power cut; to be called before a checkpoint is committed.
    ///
    /// # Errors
    /// If the operating system reports that it could not.
    pub fn sync(&self) -> Result<(), FileError> {
        self.file.sync_data().at("sync", &self.path)
    }
}

/// Rewrites the log without lines of later steps and without broken lines; returns how many went.
fn drop_lines_after(path: &Path, step: u64) -> Result<usize, FileError> {
    let unwanted = match count_unwanted(path, step) {
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Ok(0),
        counted => counted.at("read", path)?,
    };
    if unwanted > 0 {
        let source = File::open(path).at("read", path)?;
        atomic_write_with(path, |target| {
            for line in BufReader::new(source).split(b'\n') {
                let line = line?;
                if is_kept(&line, step) {
                    target.write_all(&line)?;
                    target.write_all(b"\n")?;
                }
            }
            Ok(())
        })?;
    }
    Ok(unwanted)
}

fn count_unwanted(path: &Path, step: u64) -> io::Result<usize> {
    let mut reader = BufReader::new(File::open(path)?);
    let (mut unwanted, mut line) = (0, Vec::new());
    while reader.read_until(b'\n', &mut line)? > 0 {
        // A last line without its line feed is rewritten even if it is whole: the next line would
        // be glued to it.
        let whole = line.pop_if(|byte| *byte == b'\n').is_some();
        unwanted += usize::from(!whole || !is_kept(&line, step));
        line.clear();
    }
    Ok(unwanted)
}

fn is_kept(line: &[u8], step: u64) -> bool {
    let Ok(Value::Object(fields)) = serde_json::from_slice(line) else {
        return false;
    };
    match fields.get("step") {
        None => true,
        Some(value) => value.as_f64().is_some_and(|found| found <= step as f64),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::json;

    fn steps(run_dir: &Path) -> Vec<u64> {
        let text = fs::read_to_string(run_dir.join("metrics.jsonl")).unwrap();
        assert!(text.is_empty() || text.ends_with('\n'), "{text:?}");
        text.lines()
            .map(|line| serde_json::from_str::<Value>(line).unwrap())
            .map(|line| line["step"].as_u64().unwrap_or(u64::MAX))
            .collect()
    }

    #[test]
    fn resuming_removes_later_steps_and_a_half_written_line_and_writes_each_step_once() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = MetricsLog::open(dir.path(), None).unwrap();
        log.append(&json!({"recipe": "no step"})).unwrap();
        for step in 1..=10 {
            log.append(&json!({"step": step, "loss": 1.5})).unwrap();
        }
        drop(log);
        let path = dir.path().join("metrics.jsonl");
        let mut bytes = fs::read(&path).unwrap();
        bytes.extend_from_slice(br#"{"step": 11, "lo"#);
        fs::write(&path, bytes).unwrap();

        let mut log = MetricsLog::open(dir.path(), Some(6)).unwrap();
        assert_eq!(log.dropped(), 5);
        for step in 7..=9 {
            log.append(&json!({"step": step, "loss": 1.5})).unwrap();
        }
        assert_eq!(steps(dir.path()), [u64::MAX, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
    }

    #[test]
    fn every_cut_of_the_last_line_is_mended() {
        let whole = b"{\"step\":1}\n{\"step\":2}\n";
        for length in 0..=whole.len() {
            let dir = tempfile::tempdir().unwrap();
            fs::write(dir.path().join("metrics.jsonl"), &whole[..length]).unwrap();
            let mut log = MetricsLog::open(dir.path(), Some(5)).unwrap();
            log.append(&json!({"step": 6})).unwrap();
            let found = steps(dir.path());
            // Complete lines stay, and so does a whole object that only lacks its line feed.
            assert_eq!(found[..found.len() - 1], [1, 2][..(length + 1) / 11], "{length}");
            assert_eq!(found.last(), Some(&6));
        }
    }

    #[test]
    fn starting_from_nothing_empties_the_log_and_an_untouched_log_is_not_rewritten() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = MetricsLog::open(dir.path(), Some(3)).unwrap();
        log.append(&json!({"step": 1})).unwrap();
        log.sync().unwrap();
        let log = MetricsLog::open(dir.path(), Some(3)).unwrap();
        assert_eq!((log.dropped(), steps(dir.path())), (0, vec![1]));
        MetricsLog::open(dir.path(), None).unwrap();
        assert_eq!(steps(dir.path()), [0u64; 0]);
    }
}
