//! Numbers that are kept as they come, a line each, so that a command that was killed goes on where it was.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use polyhead_runs::Failure;
use polyhead_training::run_folder::{RunLock, atomic_write};
use serde_json::{Value, json};

/// The log of one command in one folder, which nobody else writes meanwhile.
pub struct ResumeLog {
    path: PathBuf,
    file: File,
    done: BTreeMap<String, Vec<f64>>,
    _lock: RunLock,
}

impl ResumeLog {
    /// Opens a log of what `key` stands for: model, input and options. What a kill left of its last line is taken out.
    ///
    /// # Errors
    /// If it is of something else, or cannot be read or written.
    pub fn open(folder: &Path, name: &str, key: &str) -> Result<Self, Failure> {
        let lock = RunLock::acquire(folder)?;
        let path = folder.join(name);
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(Failure::file("read", &path, error)),
        };
        let head = json!({ "key": key });
        let mut kept = format!("{head}\n");
        let mut done = BTreeMap::new();
        // A line is whole if it ends; the last one may not.
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        for (at, line) in whole.lines().enumerate() {
            let value: Value = serde_json::from_str(line).unwrap_or_default();
            if at == 0 && value != head {
                return Err(Failure::Run(format!(
                    "{} is of another model, of other pairs or of other options: remove it, or name another folder with --out",
                    path.display()
                )));
            }
            let numbers =
                value["values"].as_array().and_then(|all| all.iter().map(Value::as_f64).collect::<Option<_>>());
            if let (Some(name), Some(numbers)) = (value["of"].as_str(), numbers) {
                kept.push_str(line);
                kept.push('\n');
                done.insert(name.to_owned(), numbers);
            }
        }
        atomic_write(&path, kept.as_bytes())?;
        let file = OpenOptions::new().append(true).open(&path);
        let file = file.map_err(|error| Failure::file("open", &path, error))?;
        Ok(Self { path, file, done, _lock: lock })
    }

    /// What is known already.
    pub fn get(&self, of: &str) -> Option<&Vec<f64>> {
        self.done.get(of)
    }

    /// Keeps numbers.
    ///
    /// # Errors
    /// If one of them is not finite, or they cannot be written.
    pub fn put(&mut self, of: &str, values: Vec<f64>) -> Result<&Vec<f64>, Failure> {
        if values.iter().any(|value| !value.is_finite()) {
            return Err(Failure::Run(format!(
                "{of}: a difference of logits is not finite: the model's weights are broken"
            )));
        }
        let line = format!("{}\n", json!({ "of": of, "values": values }));
        self.file.write_all(line.as_bytes()).map_err(|error| Failure::file("write", &self.path, error))?;
        Ok(self.done.entry(of.to_owned()).insert_entry(values).into_mut())
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.done.len()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_was_written_is_there_again_and_half_a_line_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let open = |key: &str| ResumeLog::open(dir.path(), "log.jsonl", key);
        let mut log = open("a").unwrap();
        log.put("0/1.2", vec![0.1, -3e-9]).unwrap();
        assert!(log.put("0/1.3", vec![f64::NAN]).is_err());
        assert!(open("a").is_err(), "one writer at a time");
        drop(log);
        let path = dir.path().join("log.jsonl");
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, format!("{text}{{\"of\": \"0/1.4\", \"val")).unwrap();
        let mut log = open("a").unwrap();
        assert_eq!((log.len(), log.get("0/1.2")), (1, Some(&vec![0.1, -3e-9])));
        log.put("0/1.4", vec![2.0]).unwrap();
        drop(log);
        assert_eq!(open("a").unwrap().get("0/1.4"), Some(&vec![2.0]));
        assert!(open("b").err().unwrap().to_string().contains("of another model"));
    }
}
