//! Runs and tasks as processes of their own: started with a share of the cores, or by a launcher, and ended with this one.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::Ordering;
use std::time::Duration;

use polyhead_runs::Failure;
use polyhead_training::run::Requests;

use super::launcher::Launcher;

/// Between two looks at the children; chosen by us.
pub const LOOK: Duration = Duration::from_millis(100);
/// Last lines of a failed run's log that are told.
const LAST_LINES: usize = 6;

/// What child processes share: how many there are at a time, how many threads each has, what starts them, and what this one was allowed.
#[derive(Debug, Clone)]
pub struct Share {
    /// Runs at a time.
    pub jobs: usize,
    /// Threads of each; `None` where a launcher decides.
    pub threads: Option<usize>,
    /// What starts them elsewhere.
    pub launcher: Option<Launcher>,
    /// Flags that every child is given: those of this command line that say what is allowed.
    pub flags: Vec<String>,
}

impl Share {
    /// All cores of this machine, divided among `jobs` runs; or what a launcher gives to each.
    pub fn of(jobs: usize, launcher: Option<Launcher>, flags: Vec<String>) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = launcher.is_none().then_some((cores / jobs).max(1));
        Self { jobs, threads, launcher, flags }
    }

    /// How each is run, in words.
    pub fn words(&self) -> String {
        let threads = self.threads.map(|threads| format!("{threads} threads each"));
        let launched = self.launcher.as_ref().map(|launcher| format!("each started by `{}`", launcher.words()));
        threads.or(launched).unwrap_or_default()
    }
}

/// Commands that are run as child processes, some at a time.
pub trait Jobs {
    /// One of them.
    type Job;

    /// The next one to start, if one can start now.
    fn next(&mut self) -> Option<Self::Job>;

    /// Starts it.
    ///
    /// # Errors
    /// If the system refuses files or processes.
    fn start(&mut self, job: &Self::Job, share: &Share) -> Result<Child, Failure>;

    /// One has ended; `stopped` where a signal had asked for it.
    ///
    /// # Errors
    /// If what it wrote cannot be read.
    fn ended(&mut self, job: Self::Job, status: ExitStatus, stopped: bool) -> Result<(), Failure>;

    /// Whether it saves and goes on when it is asked to; others would end.
    fn saves(&self) -> bool {
        false
    }

    /// Time has passed.
    fn poll(&mut self) {}
}

/// Runs jobs until none is left; signals are passed on, and after one none is started.
///
/// # Errors
/// If a signal came, or a job cannot be started or read.
pub fn run_jobs(jobs: &mut impl Jobs, share: &Share, requests: &Requests) -> Result<(), Failure> {
    let stop = &requests.stop;
    let (mut running, mut told) = (Vec::new(), 0);
    loop {
        let signal = stop.load(Ordering::SeqCst);
        if signal != told {
            told = signal;
            let passed = if share.launcher.is_some() { children::LAUNCHED.to_vec() } else { vec![signal] };
            running.iter().for_each(|(_, child)| passed.iter().for_each(|signal| children::send(child, *signal)));
        }
        if jobs.saves() {
            children::save_if_asked(requests, running.iter().map(|(_, child)| child));
        }
        while signal == 0 && running.len() < share.jobs {
            let Some(job) = jobs.next() else { break };
            let child = jobs.start(&job, share)?;
            running.push((job, child));
        }
        if running.is_empty() {
            break;
        }
        std::thread::sleep(LOOK);
        for (job, mut child) in std::mem::take(&mut running) {
            match child.try_wait()? {
                None => running.push((job, child)),
                Some(status) => jobs.ended(job, status, stop.load(Ordering::SeqCst) != 0)?,
            }
        }
        jobs.poll();
    }
    match stop.load(Ordering::SeqCst) {
        0 => Ok(()),
        signal => Err(Failure::Interrupted(signal)),
    }
}

/// Starts this program with other arguments and a share of the threads; what it says goes to a log, what it puts out to
/// `output` or there too.
pub fn spawn(arguments: &[String], log: &Path, output: Option<File>, share: &Share) -> Result<Child, Failure> {
    let unopened = |error| Failure::file("open", log, error);
    let mut file = File::options().create(true).append(true).open(log).map_err(unopened)?;
    let program = std::env::current_exe()?;
    let mut command = match &share.launcher {
        Some(launcher) => {
            writeln!(file, "started by {}", launcher.words()).map_err(unopened)?;
            launcher.command(&program)
        }
        None => Command::new(&program),
    };
    command.args(arguments).args(&share.flags);
    command.envs(share.threads.map(|threads| ("RAYON_NUM_THREADS", threads.to_string())));
    command.stdin(Stdio::null()).stdout(output.map_or_else(|| file.try_clone(), Ok)?).stderr(file);
    children::bind(&mut command);
    let starter = command.get_program().to_owned();
    command.spawn().map_err(|error| Failure::file("start", Path::new(&starter), error))
}

/// How a child ended that has not done its work: a launcher may say that all went well.
pub fn ended_without(status: ExitStatus, log: &Path) -> String {
    let how = if status.success() { "ended without a result".into() } else { status.to_string() };
    format!("{how}\n{}", end_of_log(log))
}

/// The last lines of a log, and where it is.
fn end_of_log(path: &Path) -> String {
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

    /// The signals that have a launched run save and leave: srun asks back at SIGINT, and mpirun passes SIGUSR1 on at once, SIGTERM later.
    pub const LAUNCHED: [usize; 2] = [libc::SIGUSR1 as usize, libc::SIGTERM as usize];

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

    /// No signal is sent here.
    pub const LAUNCHED: [usize; 0] = [];

    /// Elsewhere Ctrl-C reaches every process of the console.
    pub fn bind(_command: &mut Command) {}

    /// Nobody asks.
    pub fn save_if_asked<'a>(_requests: &Requests, _runs: impl Iterator<Item = &'a Child>) {}

    /// See [`bind`].
    pub fn send(_child: &Child, _signal: usize) {}
}
