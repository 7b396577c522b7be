//! What a person sees: talk on standard error, data on standard output, and while a model trains a progress bar on a
//! terminal, plain lines elsewhere.

use std::borrow::Cow;
use std::io::{IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use polyhead_models::Evaluated;
use polyhead_training::run::{Logged, View};

use polyhead_runs::Failure;
pub use polyhead_runs::text::{bytes, clock, thousands};

/// A line on standard error, in which nothing steers a terminal; see [`say`].
macro_rules! talk {
    ($($words:tt)*) => { $crate::console::say(&format!($($words)*)) };
}
pub(crate) use talk;

/// A line of data on standard output; see [`print`].
macro_rules! put {
    ($($words:tt)*) => { $crate::console::print(format_args!("{}\n", format_args!($($words)*))) };
}
pub(crate) use put;

/// Writes a line to standard error. What it tells of files, data and templates may hold control characters, which are spelt
/// out; a log is looked at on a terminal, too. That nobody listens (a closed pipe, a terminal that is gone) must not end a run:
/// the standard library's macros panic there.
pub fn say(line: &str) {
    if !is_quiet() {
        say_aloud(line);
    }
}

/// [`say`] what went wrong, with `--quiet` too.
pub fn complain(line: &str) {
    if !is_hushed() {
        say_aloud(line);
    }
}

/// Whether this process says nothing: of several ranks, one speaks.
static HUSHED: AtomicBool = AtomicBool::new(false);

/// From here on nothing is said but what [`say_aloud`] says.
#[cfg(feature = "mpi")]
pub fn hush() {
    HUSHED.store(true, Ordering::SeqCst);
}

fn is_hushed() -> bool {
    HUSHED.load(Ordering::SeqCst)
}

/// `--quiet` and `--json`.
static ONLY_ERRORS: AtomicBool = AtomicBool::new(false);
static AS_JSON: AtomicBool = AtomicBool::new(false);

/// Sets whether nothing but errors is said, and whether data is printed as JSON, before anything is done.
pub fn decide(only_errors: bool, as_json: bool) {
    ONLY_ERRORS.store(only_errors, Ordering::SeqCst);
    AS_JSON.store(as_json, Ordering::SeqCst);
}

/// Whether nothing is said but what went wrong.
pub fn is_quiet() -> bool {
    is_hushed() || ONLY_ERRORS.load(Ordering::SeqCst)
}

/// Whether data is printed as JSON.
pub fn wants_json() -> bool {
    AS_JSON.load(Ordering::SeqCst)
}

/// [`say`], whoever else speaks.
pub fn say_aloud(line: &str) {
    // Locked while a bar is being moved, which writes itself.
    let shown = SHOWN.try_lock().ok();
    match shown.as_ref().and_then(|shown| shown.as_ref()).and_then(|shown| shown.bar.as_ref()) {
        Some(bar) => bar.println(harmless(line)),
        None => drop(writeln!(std::io::stderr(), "{}", harmless(line))),
    }
}

/// Writes data to standard output: as it is, but for control characters on a terminal.
///
/// # Errors
/// If it cannot be written, a closed pipe included, where `print!` would panic.
pub fn print(data: std::fmt::Arguments<'_>) -> Result<(), Failure> {
    if is_hushed() {
        return Ok(());
    }
    let mut stdout = std::io::stdout().lock();
    let written = match stdout.is_terminal() {
        true => stdout.write_all(harmless(&data.to_string()).as_bytes()),
        false => stdout.write_fmt(data),
    };
    written.and_then(|()| stdout.flush()).map_err(output)
}

/// Standard output could not be written.
pub fn output(error: std::io::Error) -> Failure {
    match error.kind() {
        std::io::ErrorKind::BrokenPipe => Failure::Unread,
        _ => Failure::Run(format!("cannot write to standard output: {error}")),
    }
}

/// Shows a run on standard error.
pub struct Console {
    bar: Option<ProgressBar>,
    steps: u64,
    tokens_per_step: u64,
    speed: &'static str,
}

impl Console {
    /// A view of a run of `steps` steps that starts behind step `start`, whose steps read so many of a unit.
    pub fn new(start: u64, steps: u64, (tokens_per_step, unit): (u64, &str)) -> Self {
        let bar = has_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(Some(steps), ProgressDrawTarget::stderr());
            let style = ProgressStyle::with_template("{bar:24} {pos}/{len}  {msg}");
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar.set_position(start);
            bar
        });
        let speed = if unit == "token" { "tps" } else { "examples/s" };
        Self { bar, steps, tokens_per_step, speed }
    }

    fn say(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.println(harmless(line)),
            None => talk!("{line}"),
        }
    }

    fn eta(&self, logged: &Logged) -> String {
        let left = (self.steps - logged.step) * self.tokens_per_step;
        let seconds = (left as f64 / logged.tokens_per_second.max(1e-9)).round();
        clock(Duration::from_secs_f64(seconds.min(1e9)))
    }
}

/// Whether a bar can be shown.
pub fn has_terminal() -> bool {
    std::io::stderr().is_terminal() && !is_quiet()
}

/// Between two lines about the same work, where there is no terminal; chosen by us.
const QUIET: Duration = Duration::from_secs(5);

/// Work that takes no longer than this is not shown while it goes on; chosen by us.
const SHORT: Duration = Duration::from_secs(2);

/// Work of a known length on standard error: a bar on a terminal, elsewhere a line now and then; a line at its end.
pub struct Progress {
    what: &'static str,
    all: u64,
    done: u64,
    began: Instant,
    /// When the last line was written.
    told: Option<Instant>,
    bar: Option<ProgressBar>,
}

/// The work whose progress libraries report.
static SHOWN: Mutex<Option<Progress>> = Mutex::new(None);

/// Shows how far work is that may be long. It ends with `done` = `all`, or where other work begins.
pub fn progress(what: &'static str, done: u64, all: u64) {
    let mut shown = SHOWN.lock().unwrap_or_else(PoisonError::into_inner);
    shown.take_if(|shown| shown.what != what || done >= all);
    if done < all {
        shown.get_or_insert_with(|| Progress::new(what, all)).reach(done);
    }
}

/// How far data is read and turned into tokens, in bytes.
pub fn reading(done: u64, all: u64) {
    progress("reading data", done, all);
}

impl Progress {
    /// `what` will be done in `all` pieces.
    pub fn new(what: &'static str, all: u64) -> Self {
        let bar = has_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(Some(all), ProgressDrawTarget::stderr());
            let style = ProgressStyle::with_template("{bar:24} {percent:>3} %  {msg}");
            bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        });
        Self { what, all, done: 0, began: Instant::now(), told: None, bar }
    }

    /// So many pieces are done.
    fn reach(&mut self, done: u64) {
        self.done = done;
        let percent = 100 * done / self.all.max(1);
        self.show(|| format!("{percent} %"));
    }

    /// One more piece is done, which words describe.
    pub fn step(&mut self, piece: impl FnOnce(u64) -> String) {
        self.done += 1;
        let last = self.done - 1;
        self.show(|| piece(last));
    }

    fn show(&mut self, piece: impl FnOnce() -> String) {
        let said = self.told.is_some_and(|told| told.elapsed() < QUIET);
        if self.began.elapsed() < SHORT || (self.bar.is_none() && said) {
            return;
        }
        let left = self.all.saturating_sub(self.done) as f64 / self.done.max(1) as f64;
        let eta = clock(self.began.elapsed().mul_f64(left));
        let line = format!("{}: {}, eta {eta}", self.what, piece());
        match &self.bar {
            Some(bar) => {
                bar.set_position(self.done);
                bar.set_message(line);
            }
            None => {
                self.told = Some(Instant::now());
                talk!("{line}");
            }
        }
    }

    /// Ends it with its result.
    pub fn finish(mut self, result: &str) {
        self.clear();
        talk!("{}: {result} ({:.1} s)", self.what, self.began.elapsed().as_secs_f64());
    }

    fn clear(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.clear();
    }
}

/// Text from anywhere must not steer the terminal, nor be shown in another order than it has: control characters, and those
/// that turn the direction of writing, are spelt out, but for those that lay text out.
pub fn harmless(text: &str) -> Cow<'_, str> {
    let steers = |sign: char| {
        (sign.is_control() && !matches!(sign, '\n' | '\t'))
            || matches!(sign, '\u{61C}' | '\u{200E}' | '\u{200F}' | '\u{202A}'..='\u{202E}' | '\u{2066}'..='\u{2069}')
    };
    if !text.contains(steers) {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len());
    for sign in text.chars() {
        match steers(sign) {
            true => out.extend(sign.escape_default()),
            false => out.push(sign),
        }
    }
    Cow::Owned(out)
}

impl View for Console {
    fn stepped(&mut self, logged: &Logged) {
        let mut parts = vec![format!("loss: {:.4}", logged.loss)];
        parts.extend(logged.bits_per_byte.map(|bits| format!("bpb: {bits:.3}")));
        parts.push(format!("grad_norm: {:.2}", logged.grad_norm));
        if self.bar.is_none() {
            parts.extend(logged.memory.map(|memory| format!("memory: {}", bytes(memory))));
        }
        parts.push(format!("{}: {}", self.speed, thousands(logged.tokens_per_second as u64)));
        parts.push(format!("eta: {}", self.eta(logged)));
        if logged.skipped {
            parts.push("SKIPPED: not finite".into());
        }
        let line = parts.join("  ");
        match &self.bar {
            Some(bar) => {
                bar.set_position(logged.step);
                bar.set_message(line);
            }
            None if logged.logged => talk!("step: {}  {line}", logged.step),
            None => {}
        }
    }

    fn validated(&mut self, step: u64, sums: &Evaluated) {
        let bits = sums.bits_per_byte().map_or(String::new(), |bits| format!("  bpb: {bits:.3}"));
        let (loss, accuracy) = (sums.mean_loss(), 100.0 * sums.accuracy());
        self.say(&format!("step: {step}  validation loss: {loss:.4}{bits}  accuracy: {accuracy:.1} %"));
    }

    fn saved(&mut self, _step: u64) {}

    fn note(&mut self, note: &str) {
        self.say(note);
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{SHOWN, harmless, progress, say};

    #[test]
    fn progress_lasts_until_all_is_done_or_other_work_begins() {
        let shown = || SHOWN.lock().expect("no panic before").as_ref().map(|shown| (shown.what, shown.done));
        progress("loading", 1, 4);
        say("a line meanwhile");
        progress("loading", 3, 4);
        assert_eq!(shown(), Some(("loading", 3)));
        progress("exporting", 0, 2);
        assert_eq!(shown(), Some(("exporting", 0)));
        progress("exporting", 2, 2);
        assert_eq!(shown(), None);
    }

    #[test]
    fn nothing_steers_a_terminal() {
        let plain = "Zürich\t– 🦀\nשלום \u{a0}\u{200d}";
        assert_eq!(harmless(plain), plain);
        let steers = "a\u{1b}[2J\u{7}\r\u{7f}\u{9b}31m\u{202e}b\u{2066}\u{200f}\u{61c}\0";
        let shown = harmless(steers);
        assert_eq!(shown, "a\\u{1b}[2J\\u{7}\\r\\u{7f}\\u{9b}31m\\u{202e}b\\u{2066}\\u{200f}\\u{61c}\\u{0}");
    }
}
