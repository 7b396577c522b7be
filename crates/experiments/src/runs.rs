//! The runs of a comparison: each a process of its own, because the random state of a backend belongs to a process.
//!
//! A run that has finished is known by its `result.json`, one that was cut off goes on from its last checkpoint, and one
//! that failed is told as failed and tried again by the next call.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::process::Child;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use polyhead_training::run::Requests;
use polyhead_training::run_folder::{RunFolderError, RunLock, atomic_write, files};

use polyhead_runs::Failure;
use polyhead_runs::result::{self, RunResult};

use super::plan::{Plan, Run};
use super::processes::{LOOK, Share, children, end_of_log, spawn};

/// How long runs of an earlier call may take to save and leave; chosen by us.
const PATIENCE: Duration = Duration::from_secs(60);

/// How a run ended.
pub enum End {
    /// With a result.
    Finished(Box<RunResult>),
    /// Without; why.
    Failed(String),
}

/// Receives the progress of runs, each named by its place in the plan.
pub trait Watch {
    /// Before the first run starts; `done` says which need not run.
    fn begin(&mut self, done: &dyn Fn(usize) -> bool);
    /// A run was started.
    fn started(&mut self, at: usize);
    /// A run has finished.
    fn finished(&mut self, at: usize, result: &RunResult);
    /// A run has failed.
    fn failed(&mut self, at: usize, problem: &str);
    /// Time has passed: a chance to read how far the runs are.
    fn poll(&mut self);
}

/// Runs everything that has not finished yet; gives the end of each run, in the plan's order.
///
/// # Errors
/// If a signal came (the runs have saved), or the system refuses files or processes. A run that fails is no error here.
pub fn run_all(plan: &Plan, share: Share, requests: &Requests, progress: &mut dyn Watch) -> Result<Vec<End>, Failure> {
    let stop = &requests.stop;
    let mut ends = Vec::new();
    for run in &plan.runs {
        wait_until_free(run)?;
        ends.push(finished(run)?.map(|result| End::Finished(Box::new(result))));
    }
    let mut waiting: VecDeque<usize> = (0..ends.len()).filter(|&at| ends[at].is_none()).collect();
    progress.begin(&|at| ends[at].is_some());
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
        progress.poll();
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
    let recipe = run.folder.join(files::RECIPE);
    atomic_write(&recipe, run.text.as_bytes())?;
    let [recipe, folder] = [&recipe, &run.folder].map(|path| path.display().to_string());
    spawn(&["train".into(), recipe, "--out".into(), folder], &log_of(run), None, threads)
}

fn log_of(run: &Run) -> PathBuf {
    run.folder.join(files::LOG)
}
