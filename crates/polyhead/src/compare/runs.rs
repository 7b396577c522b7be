//! The runs of a comparison: each a process of its own, because the random state of a backend belongs to a process.
//!
//! A run that has finished is known by its `result.json`, one that was cut off goes on from its last checkpoint, and one
//! that failed is told as failed and tried again by the next call.

use std::collections::VecDeque;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use polyhead_training::run::Requests;
use polyhead_training::run_folder::{RunFolderError, RunLock, atomic_write};

use crate::report::Failure;
use crate::result::{self, RunResult};

use super::plan::{Plan, Run};
use super::progress::Progress;

/// Between two looks at the children; chosen by us.
pub const LOOK: Duration = Duration::from_millis(100);
/// How long runs of an earlier call may take to save and leave; chosen by us.
const PATIENCE: Duration = Duration::from_secs(60);
/// Last lines of a failed run's log that are told.
const LAST_LINES: usize = 6;

/// How a run ended.
pub enum End {
    /// With a result.
    Finished(Box<RunResult>),
    /// Without; why.
    Failed(String),
}

/// How many runs at a time, and how many threads each has.
#[derive(Debug, Clone, Copy)]
pub struct Share {
    /// Runs at a time.
    pub jobs: usize,
    /// Threads of each.
    pub threads: usize,
}

impl Share {
    /// All cores, divided among `jobs` runs.
    pub fn of(jobs: usize) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self { jobs, threads: (cores / jobs).max(1) }
    }
}

/// Runs everything that has not finished yet; gives the end of each run, in the plan's order.
///
/// # Errors
/// If a signal came (the runs have saved), or the system refuses files or processes. A run that fails is no error here.
pub fn run_all(plan: &Plan, share: Share, requests: &Requests, progress: &mut Progress) -> Result<Vec<End>, Failure> {
    let stop = &requests.stop;
    let mut ends = Vec::new();
    for run in &plan.runs {
        wait_until_free(run)?;
        ends.push(finished(run)?.map(|result| End::Finished(Box::new(result))));
    }
    let mut waiting: VecDeque<usize> = (0..ends.len()).filter(|&at| ends[at].is_none()).collect();
    progress.begin(|at| ends[at].is_some());
    let mut running: Vec<(usize, Child)> = Vec::new();
    let mut told = 0;
    loop {
        let signal = stop.load(Ordering::SeqCst);
        if signal != told {
            told = signal;
            running.iter().for_each(|(_, child)| children::send(child, signal));
        }
        children::save_if_asked(requests, running.iter().map(|(_, child)| child));
        while signal == 0 && running.len() < share.jobs {
            let Some(at) = waiting.pop_front() else { break };
            running.push((at, start(&plan.runs[at], share.threads)?));
            progress.started(at);
        }
        if running.is_empty() {
            break;
        }
        std::thread::sleep(LOOK);
        let mut still = Vec::new();
        for (at, mut child) in running {
            let run = &plan.runs[at];
            match child.try_wait()? {
                None => still.push((at, child)),
                Some(status) => match finished(run)? {
                    Some(result) => {
                        progress.finished(at, &result);
                        ends[at] = Some(End::Finished(Box::new(result)));
                    }
                    None if stop.load(Ordering::SeqCst) != 0 => {} // saved and left
                    None => {
                        let problem = format!("{status}\n{}", end_of_log(&log_of(run)));
                        progress.failed(at, &problem);
                        ends[at] = Some(End::Failed(problem));
                    }
                },
            }
        }
        running = still;
        progress.observe_layers();
    }
    match stop.load(Ordering::SeqCst) {
        0 => Ok(ends.into_iter().flatten().collect()),
        signal => Err(Failure::Interrupted(signal)),
    }
}

/// The result of a run, if it has finished as what the plan says.
///
/// # Errors
/// If there is one that cannot be read.
pub fn finished(run: &Run) -> Result<Option<RunResult>, Failure> {
    Ok(result::read(&run.folder)?.filter(|result| result.id == run.id))
}

/// A killed call may leave runs behind that still save.
fn wait_until_free(run: &Run) -> Result<(), Failure> {
    let since = Instant::now();
    loop {
        match RunLock::acquire(&run.folder) {
            Ok(_free) => return Ok(()),
            Err(RunFolderError::Locked { .. }) if since.elapsed() < PATIENCE => std::thread::sleep(LOOK),
            Err(error) => return Err(error.into()),
        }
    }
}

/// `polyhead train` on the run's recipe; what it says goes to `log.txt`.
fn start(run: &Run, threads: usize) -> Result<Child, Failure> {
    let recipe = run.folder.join("recipe.toml");
    atomic_write(&recipe, run.text.as_bytes())?;
    let [recipe, folder] = [&recipe, &run.folder].map(|path| path.display().to_string());
    spawn(&["train".into(), recipe, "--out".into(), folder], &log_of(run), None, threads)
}

fn log_of(run: &Run) -> PathBuf {
    run.folder.join("log.txt")
}

/// Starts this program with other arguments and so many threads; what it says goes to a log, what it puts out to `output` or
/// there too.
pub fn spawn(arguments: &[String], log: &Path, output: Option<File>, threads: usize) -> Result<Child, Failure> {
    let file = File::options().create(true).append(true).open(log);
    let file = file.map_err(|error| Failure::file("open", log, error))?;
    let mut command = Command::new(std::env::current_exe()?);
    command.args(arguments).env("RAYON_NUM_THREADS", threads.to_string());
    command.stdin(Stdio::null()).stdout(output.map_or_else(|| file.try_clone(), Ok)?).stderr(file);
    children::bind(&mut command);
    Ok(command.spawn()?)
}

/// The last lines of a log, and where it lies.
pub fn end_of_log(path: &Path) -> String {
    let log = std::fs::read_to_string(path).unwrap_or_default();
    let lines: Vec<&str> = log.lines().filter(|line| !line.trim().is_empty()).collect();
    format!("{} ends with:\n{}", path.display(), lines[lines.len().saturating_sub(LAST_LINES)..].join("\n"))
}

/// Children that hear of signals from us alone, and that do not outlive us.
#[cfg(unix)]
pub mod children {
    use std::os::unix::process::CommandExt;
    use std::process::{Child, Command};
    use std::sync::atomic::Ordering;

    use polyhead_training::run::Requests;

    /// Ctrl-C on a terminal reaches a whole process group; a second signal would end a run before it has saved. So each
    /// run is in a group of its own. Should we be killed, the system tells it to save and leave (on Linux).
    pub fn bind(command: &mut Command) {
        command.process_group(0);
        #[cfg(target_os = "linux")]
        {
            let parent = std::process::id();
            let follow = move || {
                // SAFETY: two system calls without pointers, which may be made between fork and exec.
                let (set, now) = unsafe { (libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM), libc::getppid()) };
                // An error of a number, not of words: those would be allocated, and another thread of the parent may have
                // held the allocator's lock at the fork.
                match (set, now as u32 == parent) {
                    (0, true) => Ok(()),
                    (0, false) => Err(std::io::Error::from_raw_os_error(libc::ESRCH)), // the comparison has ended
                    _ => Err(std::io::Error::last_os_error()),
                }
            };
            // SAFETY: `follow` makes system calls and reads `errno`, and takes no lock: it allocates in no case.
            unsafe { command.pre_exec(follow) };
        }
    }

    /// Tells runs to save and go on, where that was asked for.
    pub fn save_if_asked<'a>(requests: &Requests, runs: impl Iterator<Item = &'a Child>) {
        if requests.save.swap(false, Ordering::SeqCst) {
            runs.for_each(|run| send(run, libc::SIGUSR1 as usize));
        }
    }

    /// Passes a signal on.
    pub fn send(child: &Child, signal: usize) {
        // SAFETY: a system call without pointers; the child is ours and has not been waited for.
        let _ = unsafe { libc::kill(child.id() as libc::pid_t, signal as libc::c_int) };
    }
}

#[cfg(not(unix))]
pub mod children {
    use std::process::{Child, Command};

    use polyhead_training::run::Requests;

    /// Elsewhere Ctrl-C reaches every process of the console.
    pub fn bind(_command: &mut Command) {}

    /// Nobody asks.
    pub fn save_if_asked<'a>(_requests: &Requests, _runs: impl Iterator<Item = &'a Child>) {}

    /// See [`bind`].
    pub fn send(_child: &Child, _signal: usize) {}
}
