//! The runs of a comparison: each a process of its own, because the random state of a backend belongs to a process.
//!
//! A run that has finished is known by its `result.json`, one that was cut off goes on from its last checkpoint, and one
//! that failed is told as failed and tried again by the next call.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::process::{Child, ExitStatus};
use std::time::{Duration, Instant};

use polyhead_training::run::Requests;
use polyhead_training::run_folder::{RunFolderError, RunLock, atomic_write, files};

use polyhead_runs::Failure;
use polyhead_runs::result::{self, RunResult};

use super::plan::Run;
use super::processes::{Jobs, LOOK, Share, ended_without, run_jobs, spawn};

/// How long runs of an earlier call may take to save and leave; chosen by us.
const PATIENCE: Duration = Duration::from_secs(60);

/// How a run ended.
#[derive(Clone)]
pub enum End {
    /// With a result.
    Finished(Box<RunResult>),
    /// Without; why.
    Failed(String),
}

/// Receives the progress of runs, each named by its place among those that were picked.
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

/// Runs what has not finished yet of some runs; gives the end of each, in their order.
///
/// # Errors
/// If a signal came (the runs have saved), or the system refuses files or processes. A run that fails is no error here.
pub fn run_all(
    runs: Vec<&Run>,
    (share, requests): (&Share, &Requests),
    progress: &mut dyn Watch,
) -> Result<Vec<End>, Failure> {
    let mut ends = Vec::new();
    for run in &runs {
        wait_until_free(run)?;
        ends.push(finished(run)?.map(|result| End::Finished(Box::new(result))));
    }
    let waiting: VecDeque<usize> = (0..ends.len()).filter(|&at| ends[at].is_none()).collect();
    progress.begin(&|at| ends[at].is_some());
    let mut training = Training { runs, waiting, ends, progress };
    run_jobs(&mut training, share, requests)?;
    Ok(training.ends.into_iter().flatten().collect())
}

/// Runs that wait or run, by their place among those that were picked.
struct Training<'a> {
    runs: Vec<&'a Run>,
    waiting: VecDeque<usize>,
    ends: Vec<Option<End>>,
    progress: &'a mut dyn Watch,
}

impl Jobs for Training<'_> {
    type Job = usize;

    fn next(&mut self) -> Option<usize> {
        self.waiting.pop_front()
    }

    fn start(&mut self, &at: &usize, share: &Share) -> Result<Child, Failure> {
        let child = start(self.runs[at], share)?;
        self.progress.started(at);
        Ok(child)
    }

    fn ended(&mut self, at: usize, status: ExitStatus, stopped: bool) -> Result<(), Failure> {
        match finished(self.runs[at])? {
            Some(result) => {
                self.progress.finished(at, &result);
                self.ends[at] = Some(End::Finished(Box::new(result)));
            }
            None if stopped => {} // saved and left
            None => {
                let problem = ended_without(status, &log_of(self.runs[at]));
                self.progress.failed(at, &problem);
                self.ends[at] = Some(End::Failed(problem));
            }
        }
        Ok(())
    }

    fn saves(&self) -> bool {
        true
    }

    fn poll(&mut self) {
        self.progress.poll();
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
fn start(run: &Run, share: &Share) -> Result<Child, Failure> {
    let recipe = run.folder.join(files::RECIPE);
    atomic_write(&recipe, run.text.as_bytes())?;
    let [recipe, folder] = [&recipe, &run.folder].map(|path| path.display().to_string());
    spawn(&["train".into(), recipe, "--out".into(), folder], &log_of(run), None, share)
}

fn log_of(run: &Run) -> PathBuf {
    run.folder.join(files::LOG)
}
