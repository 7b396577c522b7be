//! `metrics.jsonl`: what was measured, one JSON object a line.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::files;
use super::{At, FileError, atomic_write_with};

/// The append-only log of a run's measurements.
///
/// Each line reaches the operating system before [`MetricsLog::append`] returns, so a killed
/// process loses none. What could not be written is kept and written with the next line.
/// Numbers that JSON cannot hold (NaN, infinities) become `null`.
#[derive(Debug)]
pub struct MetricsLog {
    path: PathBuf,
    file: File,
    length: u64, // bytes of complete lines
    pending: Vec<u8>,
    dropped: usize,
    damaged: Vec<usize>,
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
        let path = run_dir.join(files::METRICS);
        let Unwanted { lines: dropped, damaged } = match resume_step {
            Some(step) => drop_lines_after(&path, step)?,
            None => Unwanted::default(),
        };
        let file = OpenOptions::new().append(true).create(true).open(&path).at("open", &path)?;
        if resume_step.is_none() {
            file.set_len(0).at("empty", &path)?;
        }
        let length = file.metadata().at("read", &path)?.len();
        Ok(Self { path, file, length, pending: Vec::new(), dropped, damaged })
    }

    /// How many lines opening the log removed or mended.
    pub fn dropped(&self) -> usize {
        self.dropped
    }

    /// What opening the log left out because it was no line of the log, each with file and line.
    pub fn damaged(&self) -> Vec<String> {
        let path = self.path.display();
        self.damaged.iter().map(|line| format!("{path}:{line}: damaged, so it was left out")).collect()
    }

    /// Adds one line.
    ///
    /// # Errors
    /// If it cannot be written, for example because the disk is full; the log then ends with the
    /// line before, and the next call tries again.
    pub fn append(&mut self, line: &Value) -> Result<(), FileError> {
        self.pending.extend(line.to_string().into_bytes());
        self.pending.push(b'\n');
        self.flush()
    }

    /// Writes the lines that could not be written before.
    ///
    /// # Errors
    /// As for [`append`](Self::append).
    pub fn flush(&mut self) -> Result<(), FileError> {
        if let Err(cause) = self.file.write_all(&self.pending) {
            // Part of a line may stand there; the next line must not be glued to it.
            let _ = self.file.set_len(self.length);
            return Err(cause).at("append to", &self.path);
        }
        self.length += self.pending.len() as u64;
        self.pending.clear();
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

/// The lines of a run's `metrics.jsonl`, and the numbers (from 1) of those that are damaged; none where there is no such file.
/// A last line without its line feed is still being written, and left out.
///
/// # Errors
/// If the file cannot be read.
pub fn read_metrics(run_dir: &Path) -> Result<(Vec<Value>, Vec<usize>), FileError> {
    let path = run_dir.join(files::METRICS);
    let bytes = match fs::read(&path) {
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Ok(Default::default()),
        read => read.at("read", &path)?,
    };
    let (mut lines, mut damaged) = (Vec::new(), Vec::new());
    for (number, line) in (1..).zip(bytes.split_inclusive(|byte| *byte == b'\n')) {
        match serde_json::from_slice(line) {
            Ok(Value::Object(fields)) => lines.push(Value::Object(fields)),
            _ if !line.ends_with(b"\n") => {}
            _ => damaged.push(number),
        }
    }
    Ok((lines, damaged))
}

#[derive(Debug, Default)]
struct Unwanted {
    /// Lines that go or are mended.
    lines: usize,
    /// The numbers, from 1, of those that are no line of a log.
    damaged: Vec<usize>,
}

/// Rewrites the log without lines of later steps and without broken lines; returns what went.
fn drop_lines_after(path: &Path, step: u64) -> Result<Unwanted, FileError> {
    let unwanted = match find_unwanted(path, step) {
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Ok(Unwanted::default()),
        found => found.at("read", path)?,
    };
    if unwanted.lines > 0 {
        let source = File::open(path).at("read", path)?;
        atomic_write_with(path, |target| {
            for line in BufReader::new(source).split(b'\n') {
                let line = line?;
                if step_in(&line).is_some_and(|found| found <= step as f64) {
                    target.write_all(&line)?;
                    target.write_all(b"\n")?;
                }
            }
            Ok(())
        })?;
    }
    Ok(unwanted)
}

fn find_unwanted(path: &Path, step: u64) -> io::Result<Unwanted> {
    let mut reader = BufReader::new(File::open(path)?);
    let (mut unwanted, mut line, mut number) = (Unwanted::default(), Vec::new(), 0);
    while reader.read_until(b'\n', &mut line)? > 0 {
        number += 1;
        // A last line without its line feed is rewritten even if it is whole: the next line would
        // be glued to it.
        let whole = line.pop_if(|byte| *byte == b'\n').is_some();
        let found = step_in(&line);
        unwanted.damaged.extend(found.is_none().then_some(number));
        unwanted.lines += usize::from(!whole || found.is_none_or(|found| found > step as f64));
        line.clear();
    }
    Ok(unwanted)
}

/// The step of a line, 0 for one without; `None` if it is no line of a log.
fn step_in(line: &[u8]) -> Option<f64> {
    let Ok(Value::Object(fields)) = serde_json::from_slice(line) else {
        return None;
    };
    fields.get("step").map_or(Some(0.0), Value::as_f64)
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
        let told = log.damaged();
        assert!(told.len() == 1 && told[0].contains("metrics.jsonl:12: "), "{told:?}");
        for step in 7..=9 {
            log.append(&json!({"step": step, "loss": 1.5})).unwrap();
        }
        assert_eq!(steps(dir.path()), [u64::MAX, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
    }

    #[test]
    fn damaged_lines_are_told_by_their_numbers() {
        let dir = tempfile::tempdir().unwrap();
        let text = b"{\"step\":1}\n{\"step\": 2, \xff}\n[3]\n{\"step\":\"four\"}\n{\"step\":5}\n{\"st";
        fs::write(dir.path().join("metrics.jsonl"), text).unwrap();
        let (lines, damaged) = read_metrics(dir.path()).unwrap();
        assert_eq!((lines.len(), damaged), (3, vec![2, 3]), "the last one is being written");
        let log = MetricsLog::open(dir.path(), Some(9)).unwrap();
        let numbers = |told: &String| told.rsplit("jsonl:").next().unwrap().split(':').next().unwrap().to_owned();
        assert_eq!(log.damaged().iter().map(numbers).collect::<Vec<_>>(), ["2", "3", "4", "6"]);
        assert_eq!(steps(dir.path()), [1, 5]);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_line_that_could_not_be_written_comes_with_the_next() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = MetricsLog::open(dir.path(), None).unwrap();
        log.append(&json!({"step": 1})).unwrap();
        let sound = std::mem::replace(&mut log.file, OpenOptions::new().write(true).open("/dev/full").unwrap());
        log.append(&json!({"step": 2})).unwrap_err();
        log.file = sound;
        log.append(&json!({"step": 3})).unwrap();
        assert_eq!(steps(dir.path()), [1, 2, 3]);
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
