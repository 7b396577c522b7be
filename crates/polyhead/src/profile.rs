//! `train --profile`: what the time of a run is spent on, as a trace of Chrome's format (a JSON array of complete events), which
//! Perfetto and chrome://tracing open. The libraries mark spans with the crate `tracing`; without a profile nobody listens to
//! them, and all that each costs is the comparison that finds that out.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use polyhead_runs::Failure;
use serde_json::json;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

use crate::console::talk;

/// What every trace begins with: by it one is told from a file that must not be written over.
const HEAD: &str = "[\n{\"name\":\"process_name\",\"ph\":\"M\",\"pid\":1,\"args\":{\"name\":\"polyhead\"}}";

/// A trace being written.
pub struct Profile {
    path: PathBuf,
    trace: Arc<Trace>,
}

struct Trace {
    started: Instant,
    spans: AtomicU64,
    state: Mutex<State>,
}

struct State {
    out: BufWriter<File>,
    /// Name and begin of the spans that have not ended, by their number.
    open: HashMap<u64, (String, Duration)>,
    written: std::io::Result<()>,
}

impl Profile {
    /// Listens to all spans from now on.
    ///
    /// # Errors
    /// If the file cannot be written, or is there and is no trace.
    pub fn begin(path: &Path) -> Result<Self, Failure> {
        let mut head = Vec::new();
        match File::open(path).and_then(|file| file.take(HEAD.len() as u64).read_to_end(&mut head)) {
            Ok(_) if head == HEAD.as_bytes() => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Ok(_) => {
                let problem = format!("--profile {}: is there already, and is no trace", path.display());
                return Err(Failure::Run(format!("{problem}\n  hint: name another file")));
            }
            Err(error) => return Err(Failure::file("read", path, error)),
        }
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(|error| Failure::file("create", folder, error))?;
        }
        let mut out = BufWriter::new(File::create(path).map_err(|error| Failure::file("create", path, error))?);
        let written = out.write_all(HEAD.as_bytes());
        let state = Mutex::new(State { out, open: HashMap::new(), written });
        let trace = Arc::new(Trace { started: Instant::now(), spans: AtomicU64::new(1), state });
        tracing::subscriber::set_global_default(trace.clone()).expect("nothing else listens to spans");
        Ok(Self { path: path.to_owned(), trace })
    }

    /// Ends the trace, of a run that was stopped too.
    ///
    /// # Errors
    /// If it could not be written.
    pub fn finish(self) -> Result<(), Failure> {
        let mut state = self.trace.lock();
        let written = std::mem::replace(&mut state.written, Ok(()));
        let written = written.and_then(|()| state.out.write_all(b"\n]\n")).and_then(|()| state.out.flush());
        written.map_err(|error| Failure::file("write", &self.path, error))?;
        talk!("profile: {}, for https://ui.perfetto.dev or chrome://tracing", self.path.display());
        Ok(())
    }
}

impl Trace {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Subscriber for Trace {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_span() && metadata.target().starts_with("polyhead")
    }

    fn new_span(&self, span: &Attributes<'_>) -> Id {
        let mut name = Name(span.metadata().name().to_owned());
        span.record(&mut name);
        let number = self.spans.fetch_add(1, Ordering::Relaxed);
        self.lock().open.insert(number, (name.0, Duration::ZERO));
        Id::from_u64(number)
    }

    fn enter(&self, span: &Id) {
        if let Some((_, begun)) = self.lock().open.get_mut(&span.into_u64()) {
            *begun = self.started.elapsed();
        }
    }

    fn exit(&self, span: &Id) {
        let (now, mut state) = (self.started.elapsed(), self.lock());
        let Some((name, begun)) = state.open.get(&span.into_u64()) else { return };
        let micros = |time: Duration| time.as_nanos() as f64 / 1e3;
        let event = json!({ "name": name, "ph": "X", "ts": micros(*begun), "dur": micros(now.saturating_sub(*begun)),
            "pid": 1, "tid": thread() });
        if state.written.is_ok() {
            state.written = write!(state.out, ",\n{event}");
        }
    }

    fn try_close(&self, span: Id) -> bool {
        self.lock().open.remove(&span.into_u64()).is_some()
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, _: &Event<'_>) {}
}

/// A span's name, with the values of its fields behind it: `layer 3`.
struct Name(String);

impl Visit for Name {
    fn record_debug(&mut self, _: &Field, value: &dyn std::fmt::Debug) {
        // Writing into a string does not fail.
        let _ = write!(self.0, " {value:?}");
    }
}

/// The number of this thread, from 1 in the order in which they have met a span.
fn thread() -> u64 {
    static THREADS: AtomicU64 = AtomicU64::new(1);
    thread_local!(static NUMBER: u64 = THREADS.fetch_add(1, Ordering::Relaxed));
    NUMBER.with(|number| *number)
}
