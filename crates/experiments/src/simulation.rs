//! What the statistics promise, tried on made-up runs: arms that are alike are rarely called better, and intervals cover the
//! difference that is there.

#![allow(clippy::unwrap_used)]

use std::path::PathBuf;

use polyhead_runs::result::RunResult;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::json;

use super::comparison::Comparison;
use super::outcome::{ArmOutcome, Outcome, RunOutcome};
use super::tune;
use super::verdict::Verdict;

const SEEDS: u64 = 5;
const TRIALS: usize = 8;

/// Numbers from N(0, 1).
pub(crate) struct Noise(ChaCha8Rng);

impl Noise {
    pub(crate) fn new(seed: u64) -> Self {
        Self(ChaCha8Rng::seed_from_u64(seed))
    }

    pub(crate) fn draw(&mut self) -> f64 {
        let (a, b) = (1.0 - self.0.random::<f64>(), self.0.random::<f64>());
        (-2.0 * a.ln()).sqrt() * (std::f64::consts::TAU * b).cos()
    }
}

/// A finished run whose held-out halves have these losses; its accuracy falls as the loss grows.
pub(crate) fn run(seed: u64, [selection, reporting]: [f64; 2]) -> RunOutcome {
    let score = |loss: f64| json!({ "loss": loss, "bits_per_byte": null, "accuracy": 1.0 - loss, "targets": 100 });
    let result = json!({
        "id": "0123456789abcdef", "data": "made up", "steps": 10, "skipped": 0, "tokens": 1000, "targets": 1000,
        "parameters": 100, "flops_per_token": 200, "kv_bytes_per_token": 8, "validation": score((selection + reporting) / 2.0),
        "selection": score(selection), "reporting": score(reporting), "seconds": 1.0, "tokens_per_second": 1000.0,
        "median_step_seconds": 0.1, "peak_memory_bytes": null,
        "environment": { "version": "0", "device": "flex", "threads": 1, "instruction_set": "none", "processor": null,
            "system": "none", "release_build": true },
    });
    let end = Ok(serde_json::from_value::<RunResult>(result).unwrap());
    RunOutcome { seed, folder: PathBuf::new(), end, history: Vec::new(), evaluated: Default::default() }
}

/// A comparison of arms with these runs; the first is the base.
pub(crate) fn outcome(arms: Vec<Vec<RunOutcome>>, more: &str) -> Outcome {
    let named = (0..arms.len()).map(|at| format!("[[arm]]\nname = \"arm {at}\"\n")).collect::<String>();
    let seeds: Vec<u64> = arms[0].iter().map(|run| run.seed).collect();
    let comparison: Comparison = toml::from_str(&format!("seeds = {seeds:?}\n{more}\n{named}")).unwrap();
    let arm = |(at, runs): (usize, Vec<RunOutcome>)| ArmOutcome {
        name: format!("arm {at}"),
        choice: String::new(),
        considered: Vec::new(),
        edges: Vec::new(),
        matched: None,
        recipe: String::new(),
        tokens_per_step: 100,
        runs,
        failed_elsewhere: Vec::new(),
    };
    Outcome {
        title: "simulated".into(),
        name: "simulated".into(),
        file: "simulated.toml".into(),
        command: "none".into(),
        prepared: Vec::new(),
        comparison,
        arms: arms.into_iter().enumerate().map(arm).collect(),
    }
}

/// Runs of arms of which the second and all further ones are better by `planted`; a seed's luck is shared by all arms.
fn plain(arms: usize, planted: f64, noise: &mut Noise) -> Vec<Vec<RunOutcome>> {
    let shared: Vec<f64> = (0..SEEDS).map(|_| noise.draw()).collect();
    let loss = |arm: usize| if arm == 0 { 0.0 } else { -planted };
    let mut of_arm = |arm: usize| {
        let of_seed = |seed: u64| run(seed, [loss(arm) + shared[seed as usize] + noise.draw(); 2]);
        (0..SEEDS).map(of_seed).collect()
    };
    (0..arms).map(&mut of_arm).collect()
}

/// Runs of two arms that are alike and tuned as `[tune]` does it: the same settings, whose losses differ by up to `matter`, are
/// tried with two seeds, the one that does best on one half is trained anew, and the other half is reported. A run's luck is
/// shared by its halves.
fn tuned(matter: f64, noise: &mut Noise) -> Vec<Vec<RunOutcome>> {
    const HALF: f64 = 0.3; // what the draw of the held-out data adds
    let settings: Vec<f64> = (0..TRIALS).map(|_| matter * (2.0 * noise.0.random::<f64>() - 1.0).powi(2)).collect();
    let mut arm = || {
        let mut reached = |loss: f64| loss + (noise.draw() + noise.draw()) / 2.0 + HALF * noise.draw();
        let selection: Vec<Option<f64>> = settings.iter().map(|&loss| Some(reached(loss))).collect();
        let chosen = settings[tune::best(&selection, false).unwrap()];
        let mut report = |seed| {
            let own = chosen + noise.draw();
            run(seed, [own + HALF * noise.draw(), own + HALF * noise.draw()])
        };
        (0..SEEDS).map(&mut report).collect()
    };
    vec![arm(), arm()]
}

/// How many simulated comparisons call some arm better.
fn called_better(count: usize, mut simulate: impl FnMut() -> Outcome) -> usize {
    let better = |outcome: Outcome| outcome.compared().iter().any(|found| found.verdict == Verdict::Better);
    (0..count).filter(|_| better(simulate())).count()
}

#[test]
fn arms_that_are_alike_are_rarely_called_better() {
    for (arms, more) in [(2, ""), (6, ""), (6, "metric = \"accuracy\"")] {
        let mut noise = Noise::new(arms as u64);
        let better = called_better(200, || outcome(plain(arms, 0.0, &mut noise), more));
        assert!(better <= 10, "{better} of 200 comparisons of {arms} equal arms {more}");
        // The plain interval of each of many arms is wrong more often: the correction is needed.
        let mut noise = Noise::new(arms as u64);
        let alone = (0..200).filter(|_| {
            let compared = outcome(plain(arms, 0.0, &mut noise), more).compared();
            compared.iter().any(|found| found.difference.unwrap().beyond_chance().unwrap())
        });
        assert!(arms == 2 || alone.count() > 20);
    }
}

#[test]
fn tuning_makes_no_difference_between_arms_that_are_alike() {
    let choosing = "[tune]\ntrials = 8\n[tune.ranges]\nlr = { low = 1e-4, high = 1e-2 }";
    for matter in [0.0, 1.0, 5.0, 20.0] {
        let mut noise = Noise::new(7);
        let better = called_better(200, || outcome(tuned(matter, &mut noise), choosing));
        assert!(better <= 10, "{better} of 200 comparisons, where settings matter by {matter}");
    }
}

#[test]
fn intervals_cover_the_difference_that_is_there() {
    const COUNT: usize = 1000;
    let mut noise = Noise::new(1);
    let (mut covered, mut better) = (0, 0);
    for _ in 0..COUNT {
        let found = &outcome(plain(2, 2.0, &mut noise), "").compared()[0];
        let (low, high) = found.difference.unwrap().interval().unwrap();
        covered += usize::from((low..=high).contains(&-2.0));
        better += usize::from(found.verdict == Verdict::Better);
    }
    let share = covered as f64 / COUNT as f64;
    assert!((0.92..=0.98).contains(&share), "95 % intervals cover {share}");
    // A difference of 1.41 deviations of the paired differences, with 5 seeds: power 0.67 by the noncentral t distribution.
    assert!((0.62..=0.72).contains(&(better as f64 / COUNT as f64)), "found in {better} of {COUNT}");
}

#[test]
fn many_arms_are_corrected_and_the_plain_interval_stays() {
    let mut noise = Noise::new(3);
    let mut arms = plain(6, 0.0, &mut noise);
    // One arm that the plain interval alone calls better.
    let lower = [1.9, 0.3, 1.2, 0.2, 1.4];
    arms[2] = (0..SEEDS).map(|seed| run(seed, [base(&arms, seed) - lower[seed as usize]; 2])).collect();
    let outcome = outcome(arms, "");
    let found = outcome.compared().into_iter().find(|found| found.arm == 2).unwrap();
    assert!(found.p.unwrap() < 0.05 && found.corrected.unwrap() > 0.05, "{found:?}");
    assert_eq!(found.verdict, Verdict::Uncorrected);
    assert!(outcome.finding().contains("beyond chance alone, but not among 5 comparisons (Holm): arm 2"));
    assert!(
        outcome.power_note().unwrap().contains("arm 2 ") && outcome.power_note().unwrap().contains("(there are 5)")
    );
}

fn base(arms: &[Vec<RunOutcome>], seed: u64) -> f64 {
    arms[0].iter().find(|run| run.seed == seed).unwrap().end.as_ref().unwrap().validation.loss
}
