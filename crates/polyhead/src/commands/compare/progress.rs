//! What a person sees while a comparison runs: how far all runs are together, and when they will be done.

use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::Value;

use crate::console::{clock, harmless, has_terminal, talk};
use polyhead_runs::result::RunResult;

use polyhead_experiments::plan::{Plan, Run};
use polyhead_experiments::runs::Watch;
use polyhead_training::run_folder::files::METRICS;

/// Between two lines about the whole where there is no terminal; chosen by us.
const QUIET: Duration = Duration::from_secs(30);
/// Bytes at the end of a log that contain its last line; chosen by us.
const TAIL: u64 = 1 << 16;

/// A view of all runs on standard error.
pub struct Progress<'a> {
    runs: Vec<&'a Run>,
    names: Vec<String>,
    bar: Option<ProgressBar>,
    began: Instant,
    told: Instant,
    /// Steps taken of each run, as far as known.
    steps: Vec<u64>,
    /// The sum of them when this call began.
    before: u64,
    running: Vec<usize>,
}

impl<'a> Progress<'a> {
    /// A view of some of a plan's runs.
    pub fn of_plan(plan: &'a Plan, picked: &[usize]) -> Self {
        let runs: Vec<&Run> = picked.iter().map(|&at| &plan.runs[at]).collect();
        let name = |run: &Run| {
            let arm = &plan.arms[run.arm];
            let words = &arm.choices[run.choice].words;
            let choice = if words.is_empty() { String::new() } else { format!(", {words}") };
            format!("{}{choice}, seed {}", arm.name, run.seed)
        };
        let names = runs.iter().map(|run| name(run)).collect();
        Self::new(runs, names)
    }

    /// A view of runs with a name each.
    pub fn new(runs: Vec<&'a Run>, names: Vec<String>) -> Self {
        Self {
            bar: None,
            began: Instant::now(),
            told: Instant::now(),
            steps: vec![0; runs.len()],
            before: 0,
            running: Vec::new(),
            runs,
            names,
        }
    }

    /// Everything together, in words.
    fn whole(&self) -> String {
        let (done, all): (u64, u64) = (self.steps.iter().sum(), self.runs.iter().map(|run| run.steps).sum());
        let finished = self.steps.iter().zip(&self.runs).filter(|(steps, run)| **steps >= run.steps).count();
        let new = done.saturating_sub(self.before);
        let eta = match new {
            0 => "?".into(),
            _ => clock(self.began.elapsed().mul_f64(((all - done) as f64 / new as f64).min(1e6))),
        };
        format!("{finished} of {} runs, step {done} of {all} in all, eta {eta}", self.runs.len())
    }

    fn say(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.println(harmless(line)),
            None => talk!("{line}"),
        }
    }
}

impl Watch for Progress<'_> {
    fn begin(&mut self, done: &dyn Fn(usize) -> bool) {
        let finished = (0..self.runs.len()).filter(|&at| done(at)).count();
        talk!("{} runs, {finished} of them have finished before", self.runs.len());
        for (at, run) in self.runs.iter().enumerate() {
            self.steps[at] = if done(at) { run.steps } else { steps_taken(&run.folder).min(run.steps) };
        }
        self.before = self.steps.iter().sum();
        let all = self.runs.iter().map(|run| run.steps).sum();
        self.bar = (has_terminal() && finished < self.runs.len()).then(|| {
            let bar = ProgressBar::with_draw_target(Some(all), ProgressDrawTarget::stderr());
            let style = ProgressStyle::with_template("{bar:24} {percent:>3} %  {msg}");
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
            bar
        });
    }

    fn started(&mut self, at: usize) {
        self.running.push(at);
        self.say(&format!("started   {}", self.names[at]));
    }

    fn finished(&mut self, at: usize, result: &RunResult) {
        self.running.retain(|&other| other != at);
        self.steps[at] = self.runs[at].steps;
        let score = &result.validation;
        let (accuracy, time) = (100.0 * score.accuracy, clock(Duration::from_secs_f64(result.seconds)));
        let words = format!("validation loss {:.4}, accuracy {accuracy:.1} %, {time}", score.loss);
        self.say(&format!("finished  {}: {words}", self.names[at]));
    }

    fn failed(&mut self, at: usize, problem: &str) {
        self.running.retain(|&other| other != at);
        self.say(&format!("FAILED    {}: {problem}", self.names[at]));
    }

    fn poll(&mut self) {
        for &at in &self.running {
            self.steps[at] = steps_taken(&self.runs[at].folder).min(self.runs[at].steps);
        }
        if let Some(bar) = &self.bar {
            bar.set_position(self.steps.iter().sum());
            bar.set_message(self.whole());
        } else if self.told.elapsed() > QUIET {
            self.told = Instant::now();
            talk!("          {}", self.whole());
        }
    }
}

impl Drop for Progress<'_> {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// The last step in a run's log; 0 where there is none yet.
fn steps_taken(run_dir: &Path) -> u64 {
    let read = || -> std::io::Result<String> {
        let mut file = std::fs::File::open(run_dir.join(METRICS))?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(TAIL)))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    let text = read().unwrap_or_default();
    let mut lines = text.lines().rev().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    lines.find_map(|line| line["step"].as_u64()).unwrap_or(0)
}
