//! `match = "time"`: how much longer a step of each arm takes than one of its base arm, measured on this machine before the arms
//! run, and with it how many steps take equally long.
//!
//! All arms are trained for a few steps, one after the other, in rounds: what is compared is always the same round, so that a
//! machine that slows down slows both. What was measured is kept (`calibration.json`), because the number of steps decides what
//! a run is: measured anew, finished runs would be other ones.

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus};

use polyhead_runs::Failure;
use polyhead_runs::result;
use polyhead_training::run::Requests;
use polyhead_training::run_folder::{atomic_write, files};
use serde::{Deserialize, Serialize};

use super::matching::Match;
use super::processes::{Jobs, Share, ended_without, run_jobs, spawn};
use super::statistics::Summary;

/// Rounds at least, and at most; chosen by us.
const ROUNDS: [usize; 2] = [3, 9];
/// Steps of a round: a tenth of the run, within these; chosen by us.
const STEPS: [u64; 2] = [20, 200];
/// What is measured, in the comparison's folder.
const FILE: &str = "calibration.json";

/// How a step of an arm compares with one of its base arm.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Pace {
    /// The arm.
    pub arm: String,
    /// Seconds of a step of the base arm.
    pub base_seconds: f64,
    /// How many times as long a step of this arm takes.
    pub ratio: f64,
    /// By which share the ratio may be off: its standard error.
    pub error: f64,
    /// The ratio in each round.
    pub rounds: Vec<f64>,
}

/// What was measured, by the key of what it was measured for.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Paces {
    /// Runs at a time, and threads of each, 0 with a launcher: with others, steps take other times.
    shared: [usize; 2],
    paces: BTreeMap<String, Pace>,
}

/// Two recipes whose steps are to be timed.
#[derive(Debug, Clone, PartialEq)]
pub struct Timing {
    /// A hash of both.
    pub key: String,
    /// The arm.
    pub arm: String,
    /// Its recipe, resolved.
    pub own: String,
    /// The recipe of its base arm.
    pub base: String,
    /// Steps of the base arm's run.
    pub steps: u64,
}

impl Timing {
    /// A timing, with its key.
    pub fn new(arm: &str, own: String, base: String, steps: u64) -> Self {
        Self { key: result::id(&own, Some(&base)), arm: arm.to_owned(), own, base, steps }
    }
}

impl Pace {
    /// The number of steps that takes as long as `steps` of the base arm.
    ///
    /// # Errors
    /// If steps are so few that one of them is more than the tolerance.
    pub fn equal(&self, steps: u64, tolerance: f64) -> Result<Match, String> {
        let value = (steps as f64 / self.ratio).round().max(1.0) as u64;
        let milliseconds = |steps: f64| (1e3 * self.base_seconds * steps).round() as u64;
        let (target, found) = (milliseconds(steps as f64), milliseconds(value as f64 * self.ratio));
        let off = value as f64 * self.ratio / steps as f64 - 1.0;
        match off.abs() <= tolerance {
            true => Ok(Match { key: "training.steps".into(), value, target, found }),
            false => Err(format!(
                "{value} steps, which take {:.3} times as long as the base arm's, come nearest to its {steps}, {:+.2} % off, and \
                 {:.2} % are allowed: train for more steps",
                self.ratio,
                100.0 * off,
                100.0 * tolerance
            )),
        }
    }
}

impl Paces {
    /// What was measured for runs that share the machine like this; nothing where that was never done.
    ///
    /// # Errors
    /// If there is a file that cannot be read.
    pub fn read(out: &Path, share: &Share) -> Result<Self, Failure> {
        let (path, shared) = (out.join(FILE), [share.jobs, share.threads.unwrap_or(0)]);
        let empty = Self { shared, paces: BTreeMap::new() };
        if !path.exists() {
            return Ok(empty);
        }
        let bytes = std::fs::read(&path).map_err(|error| Failure::file("read", &path, error))?;
        let found: Self = serde_json::from_slice(&bytes).map_err(|error| {
            Failure::Run(format!("{}: {error}\n  hint: delete it, and steps are timed anew", path.display()))
        })?;
        Ok(if found.shared == shared { found } else { empty })
    }

    /// The pace of an arm, where it was measured.
    pub fn get(&self, key: &str) -> Option<&Pace> {
        self.paces.get(key)
    }

    /// Measures what is missing, and keeps it.
    ///
    /// # Errors
    /// If a run fails, or a signal came.
    pub fn measure(
        mut self,
        (timings, tolerance): (&[Timing], f64),
        out: &Path,
        (share, requests): (&Share, &Requests),
        tell: fn(&str),
    ) -> Result<Self, Failure> {
        let mut recipes: Vec<(&str, u64)> = Vec::new();
        for timing in timings {
            for text in [&timing.base, &timing.own] {
                if recipes.iter().all(|(known, _)| known != text) {
                    recipes.push((text, (timing.steps / 10).clamp(STEPS[0], STEPS[1])));
                }
            }
        }
        tell(&format!("calibration: the steps of {} arms are timed in {} rounds or more", recipes.len(), ROUNDS[0]));
        let mut seconds: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
        for round in 0..ROUNDS[1] {
            // The order changes: whoever comes last may have the machine to itself.
            let mut order: VecDeque<(&str, u64)> = recipes.iter().copied().collect();
            let first = round % order.len().max(1);
            order.rotate_left(first);
            let mut timed = Round { waiting: order, out, seconds: Vec::new(), failed: None };
            run_jobs(&mut timed, share, requests)?;
            if let Some(problem) = timed.failed {
                return Err(Failure::Run(problem));
            }
            timed.seconds.into_iter().for_each(|(text, took)| seconds.entry(text).or_default().push(took));
            let paces: Vec<Option<Pace>> = timings.iter().map(|timing| pace(timing, &seconds)).collect();
            let known = paces.iter().flatten().all(|pace| pace.error <= tolerance / 2.0);
            if round + 1 >= ROUNDS[0] && (known || round + 1 == ROUNDS[1]) {
                let found = timings.iter().zip(paces).filter_map(|(timing, pace)| Some((timing.key.clone(), pace?)));
                self.paces.extend(found);
                break;
            }
        }
        for pace in timings.iter().filter_map(|timing| self.get(&timing.key)) {
            tell(&format!(
                "calibration: {}: a step takes {:.3} ± {:.3} times as long as the base arm's, which is {:.1} ms",
                pace.arm,
                pace.ratio,
                pace.error * pace.ratio,
                1e3 * pace.base_seconds
            ));
            if pace.error > tolerance {
                tell(
                    "warning: the speed of this machine varies more than the tolerance; what the runs take will be reported",
                );
            }
        }
        let text = serde_json::to_string_pretty(&self).map_err(|error| Failure::Run(error.to_string()))?;
        atomic_write(&out.join(FILE), format!("{text}\n").as_bytes())?;
        Ok(self)
    }
}

/// The median ratio over rounds, in each of which both were timed.
fn pace(timing: &Timing, seconds: &BTreeMap<&str, Vec<f64>>) -> Option<Pace> {
    let (own, base) = (seconds.get(timing.own.as_str())?, seconds.get(timing.base.as_str())?);
    let rounds: Vec<f64> = own.iter().zip(base).map(|(own, base)| own / base).collect();
    let ratio = median(&rounds)?;
    let deviation = Summary::of(&rounds)?.deviation.unwrap_or(f64::INFINITY);
    let error = deviation / (rounds.len() as f64).sqrt() / ratio;
    Some(Pace { arm: timing.arm.clone(), base_seconds: median(base)?, ratio, error, rounds })
}

fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let (low, high) = (sorted.get((sorted.len().checked_sub(1)?) / 2)?, sorted.get(sorted.len() / 2)?);
    Some((low + high) / 2.0)
}

/// A round: every recipe once.
struct Round<'a> {
    waiting: VecDeque<(&'a str, u64)>,
    out: &'a Path,
    seconds: Vec<(&'a str, f64)>,
    failed: Option<String>,
}

impl Round<'_> {
    fn folder(&self, text: &str) -> PathBuf {
        self.out.join("calibration").join(&result::id(text, None)[..8])
    }
}

impl<'a> Jobs for Round<'a> {
    type Job = (&'a str, u64);

    fn next(&mut self) -> Option<(&'a str, u64)> {
        if self.failed.is_some() { None } else { self.waiting.pop_front() }
    }

    fn start(&mut self, &(text, steps): &(&'a str, u64), share: &Share) -> Result<Child, Failure> {
        let folder = self.folder(text);
        let at = |error| Failure::file("create", &folder, error);
        std::fs::create_dir_all(&folder).map_err(at)?;
        std::fs::remove_dir_all(&folder).map_err(at)?;
        std::fs::create_dir_all(&folder).map_err(at)?;
        let recipe = folder.join(files::RECIPE);
        atomic_write(&recipe, text.as_bytes())?;
        let [recipe, out] = [&recipe, &folder].map(|path| path.display().to_string());
        // Steps alone, as the runs count their seconds.
        let changes = [
            format!("training.steps={steps}").as_str(),
            "lr_scheduler.warmup_steps=0",
            "validation.interval=0",
            "validation.batches=1",
            "checkpoint.interval=0",
            "metrics.log_freq=1",
            "metrics.tensorboard=false",
            "metrics.observe=false",
            "generation.sampling.max_new_tokens=1",
        ]
        .map(str::to_owned);
        let arguments: Vec<String> =
            ["train".into(), recipe].into_iter().chain(changes).chain(["--out".into(), out]).collect();
        spawn(&arguments, &folder.join(files::LOG), None, share)
    }

    fn ended(&mut self, (text, _): (&'a str, u64), status: ExitStatus, stopped: bool) -> Result<(), Failure> {
        let folder = self.folder(text);
        let took = result::read(&folder)?.and_then(|result| result.median_step_seconds);
        match took {
            Some(took) if status.success() => self.seconds.push((text, took)),
            _ if stopped => {}
            _ => self.failed = Some(format!("calibration: {}", ended_without(status, &folder.join(files::LOG)))),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn timing() -> Timing {
        Timing::new("slow", "own".into(), "base".into(), 1000)
    }

    #[test]
    fn steps_are_those_that_take_as_long() {
        // The second round was disturbed, for both.
        let seconds = BTreeMap::from([("own", vec![0.30, 0.60, 0.31]), ("base", vec![0.20, 0.41, 0.20])]);
        let pace = pace(&timing(), &seconds).unwrap();
        assert!((pace.ratio - 1.5).abs() < 1e-12 && (pace.base_seconds - 0.2).abs() < 1e-12, "{pace:?}");
        let found = pace.equal(1000, 0.02).unwrap();
        assert_eq!(
            (found.key.as_str(), found.value, found.target, found.found),
            ("training.steps", 667, 200_000, 200_100)
        );
        assert!(found.deviation().abs() < 0.001);
        let told = pace.equal(10, 0.02).unwrap_err();
        assert!(told.contains("7 steps") && told.contains("+5.00 % off") && told.contains("more steps"), "{told}");
        assert_eq!(median(&[3.0, 1.0, 2.0, 10.0]), Some(2.5));
    }

    #[test]
    fn what_was_measured_is_kept_for_the_same_share() {
        let folder = tempfile::tempdir().unwrap();
        let share = |jobs| Share { jobs, threads: Some(1), launcher: None, flags: Vec::new() };
        let mut paces = Paces::read(folder.path(), &share(2)).unwrap();
        let seconds = BTreeMap::from([("own", vec![0.3; 3]), ("base", vec![0.2; 3])]);
        paces.paces.insert(timing().key, pace(&timing(), &seconds).unwrap());
        std::fs::write(folder.path().join(FILE), serde_json::to_string(&paces).unwrap()).unwrap();
        assert_eq!(Paces::read(folder.path(), &share(2)).unwrap(), paces);
        assert!(Paces::read(folder.path(), &share(1)).unwrap().get(&timing().key).is_none());
        std::fs::write(folder.path().join(FILE), "{").unwrap();
        assert!(Paces::read(folder.path(), &share(2)).unwrap_err().to_string().contains("delete it"));
    }
}
