//! One case: an empty folder, draws, and the binary with limits on time and memory.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use crate::random::Random;

/// What did not hold, in words.
#[derive(Debug)]
pub struct Broken(pub String);

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<E: std::error::Error> From<E> for Broken {
    fn from(error: E) -> Self {
        Self(format!("the attack itself: {error}"))
    }
}

/// What held, or what did not.
pub type Held<T = ()> = Result<T, Broken>;

/// How a case went that broke nothing.
pub enum Tried {
    /// As it should be.
    Held,
    /// Could not be tried here, and why.
    Skipped(String),
}

/// Fails the case with words unless something holds.
macro_rules! ensure {
    ($holds:expr, $($words:tt)+) => {
        if !$holds {
            return Err($crate::case::Broken(format!($($words)+)));
        }
    };
}
pub(crate) use ensure;

/// Limits and surroundings of a process.
pub struct How {
    /// Longer is a failure: it hangs.
    pub seconds: u64,
    /// Address space in MiB; 0 is no limit.
    pub memory: u64,
    /// The longest file that may be written, in blocks of 512 bytes.
    pub file_blocks: Option<u64>,
    /// Variables of the environment.
    pub env: Vec<(&'static str, String)>,
    /// A command that runs the binary, such as strace.
    pub through: Vec<String>,
}

impl Default for How {
    fn default() -> Self {
        Self { seconds: 60, memory: 4096, file_blocks: None, env: Vec::new(), through: Vec::new() }
    }
}

/// What a process said and how it ended.
pub struct Answer {
    pub code: Option<i32>,
    pub signal: Option<i32>,
    pub timed_out: bool,
    pub out: String,
    pub err: String,
    asked: String,
}

impl Answer {
    /// Holds if it ended by itself with one of these codes, in time, without a panic, and told an error where there was one.
    pub fn ends(self, codes: &[i32]) -> Held<Self> {
        let Self { asked, err, .. } = &self;
        let tail: String = err.chars().rev().take(600).collect::<Vec<_>>().into_iter().rev().collect();
        ensure!(!self.timed_out, "`{asked}` does not end: {tail}");
        ensure!(self.signal.is_none(), "`{asked}` died of signal {:?}: {tail}", self.signal);
        ensure!(!err.contains("panicked at"), "`{asked}` panicked: {tail}");
        let code = self.code.unwrap_or(-1);
        ensure!(codes.contains(&code), "`{asked}` ended with {code}, not one of {codes:?}: {tail}");
        ensure!(
            code == 0 || code > 2 || err.contains("error"),
            "`{asked}` ended with {code} and told no error: {tail}"
        );
        let odd = err.chars().find(|sign| sign.is_control() && !['\n', '\t', '\r'].contains(sign));
        ensure!(odd.is_none(), "`{asked}` writes {odd:?} to a terminal: {tail:?}");
        Ok(self)
    }
}

/// A process that runs.
pub struct Running {
    child: Child,
    started: Instant,
    limit: Duration,
    asked: String,
    outputs: [PathBuf; 2],
}

impl Running {
    /// Whether it runs still.
    pub fn runs(&mut self) -> Held<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// Sends a signal by its name, such as "TERM", if the process runs still. Gives whether it did.
    pub fn signal(&mut self, name: &str) -> Held<bool> {
        if !self.runs()? {
            return Ok(false);
        }
        Command::new("kill").arg(format!("-{name}")).arg(self.child.id().to_string()).status()?;
        Ok(true)
    }

    /// Waits for its end, and ends it where it takes too long.
    pub fn wait(mut self) -> Held<Answer> {
        let mut timed_out = false;
        let status: ExitStatus = loop {
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            if self.started.elapsed() > self.limit && !timed_out {
                timed_out = true;
                self.child.kill()?;
            }
            let pause = if self.started.elapsed() < Duration::from_millis(50) { 1 } else { 5 };
            std::thread::sleep(Duration::from_millis(pause));
        };
        let text = |path: &Path| std::fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        let [out, err] = &self.outputs;
        let (out, err) = (text(out)?, text(err)?);
        let (code, signal) = (status.code(), status.signal());
        Ok(Answer { code, signal, timed_out, out, err, asked: std::mem::take(&mut self.asked) })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // A case that failed must not leave a process behind.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A folder in which the binary is attacked.
pub struct Case {
    pub dir: PathBuf,
    pub random: Random,
    binary: PathBuf,
    script: String,
    started: usize,
}

impl Case {
    pub fn new(dir: &Path, binary: &Path, random: Random) -> io::Result<Self> {
        std::fs::create_dir_all(dir)?;
        Ok(Self { dir: dir.to_owned(), random, binary: binary.to_owned(), script: String::new(), started: 0 })
    }

    /// The binary under attack.
    pub fn binary(&self) -> &Path {
        &self.binary
    }

    /// What was done, as a script that does it again.
    pub fn script(&self) -> String {
        format!("#!/bin/sh\n# P is the path of the binary\ncd \"$(dirname \"$0\")\"; P=${{P:?}}\n{}", self.script)
    }

    /// Adds a remark to the script.
    pub fn note(&mut self, words: &str) {
        self.script += &format!("# {words}\n");
    }

    /// Writes a file of the case, with the folders above it.
    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> Held {
        let path = self.dir.join(name);
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        Ok(std::fs::write(path, bytes)?)
    }

    /// Starts the binary.
    pub fn start(&mut self, how: &How, args: &[&str]) -> Held<Running> {
        // A shell sets the limits, so that the script says the same. Too long a file is an error then, and no signal.
        let mut limits = "ulimit -c 0".to_owned();
        if how.memory > 0 {
            limits += &format!("; ulimit -v {}", how.memory * 1024);
        }
        if let Some(blocks) = how.file_blocks {
            limits += &format!("; trap '' XFSZ; ulimit -f {blocks}");
        }
        let outputs = ["out", "err"].map(|name| self.dir.join(format!(".{name}-{}", self.started)));
        let mut command = Command::new("sh");
        command.args(["-c", &format!("{limits}; exec \"$@\""), "sh"]).args(&how.through).arg(&self.binary).args(args);
        command.envs(how.env.iter().map(|(key, value)| (key, value))).env_remove("RUST_BACKTRACE");
        command.current_dir(&self.dir).stdin(Stdio::null());
        command.stdout(File::create(&outputs[0])?).stderr(File::create(&outputs[1])?);
        let quoted = |words: &mut dyn Iterator<Item = &str>| words.map(quote).collect::<Vec<_>>().join(" ");
        let asked = quoted(&mut args.iter().copied());
        let through = quoted(&mut how.through.iter().map(String::as_str));
        let env: String = how.env.iter().map(|(key, value)| format!("{key}={value} ")).collect();
        let limit = how.seconds + 1;
        self.script += &format!("({limits}; {env}timeout {limit} {through} \"$P\" {asked}); echo \"exit code $?\"\n");
        self.started += 1;
        let (started, limit) = (Instant::now(), Duration::from_secs(how.seconds));
        Ok(Running { child: command.spawn()?, started, limit, asked: format!("polyhead {asked}"), outputs })
    }

    /// Runs the binary to its end.
    pub fn run_as(&mut self, how: &How, args: &[&str]) -> Held<Answer> {
        self.start(how, args)?.wait()
    }

    /// Runs the binary with the usual limits; it must end with one of these codes.
    pub fn run(&mut self, codes: &[i32], args: &[&str]) -> Held<Answer> {
        self.run_as(&How::default(), args)?.ends(codes)
    }
}

/// A word as a shell reads it.
fn quote(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_=./,:".contains(c);
    match !word.is_empty() && word.chars().all(plain) {
        true => word.to_owned(),
        false => format!("'{}'", word.replace('\'', "'\\''")),
    }
}
