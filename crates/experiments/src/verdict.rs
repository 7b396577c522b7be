//! What is said about the difference of each arm to its base: by its own interval, and among all that were looked at.

use serde::Serialize;

use super::outcome::Outcome;
use super::statistics::{CONFIDENCE, MOST_SEEDS, Summary, holm};

/// What is said about an arm.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Better than the base arm, corrected for the number of comparisons.
    Better,
    /// Worse than the base arm, corrected for the number of comparisons.
    Worse,
    /// Its own interval excludes 0, but among so many comparisons one does by chance.
    Uncorrected,
    /// No difference beyond chance.
    Equal,
    /// One seed or none: nothing is known about chance.
    Unknown,
}

/// The difference of an arm to its base.
#[derive(Debug, Clone, PartialEq)]
pub struct Compared {
    /// Which arm.
    pub arm: usize,
    /// What it is compared with.
    pub base: usize,
    /// Arm minus base, over the seeds that both finished.
    pub difference: Option<Summary>,
    /// Of the plain t test; `None` without an interval.
    pub p: Option<f64>,
    /// The same, corrected by Holm's method for all differences of the comparison.
    pub corrected: Option<f64>,
    /// What is said.
    pub verdict: Verdict,
}

impl Compared {
    /// How many seeds would find the difference seen, where something is known about chance.
    pub fn seeds_needed(&self) -> Option<usize> {
        self.difference?.values_needed()
    }
}

impl Outcome {
    /// The difference of every arm that is compared, in the comparison's metric.
    pub fn compared(&self) -> Vec<Compared> {
        let metric = self.comparison.metric.metric();
        let differences: Vec<_> =
            self.pairs(0..self.arms.len()).map(|(arm, base)| (arm, base, self.difference(arm, base, metric))).collect();
        let known: Vec<f64> = differences.iter().filter_map(|(_, _, difference)| (*difference)?.p_value()).collect();
        let mut corrected = holm(&known).into_iter();
        let grows = self.comparison.metric.grows();
        let of = |(arm, base, difference): (usize, usize, Option<Summary>)| {
            let p = difference.and_then(|difference| difference.p_value());
            let corrected = p.and_then(|_| corrected.next());
            let verdict = difference.map_or(Verdict::Unknown, |difference| verdict(difference, corrected, grows));
            Compared { arm, base, difference, p, corrected, verdict }
        };
        differences.into_iter().map(of).collect()
    }
}

fn verdict(difference: Summary, corrected: Option<f64>, grows: bool) -> Verdict {
    match (difference.beyond_chance(), corrected) {
        (Some(false), _) => Verdict::Equal,
        (Some(true), Some(p)) if p < 1.0 - CONFIDENCE => match (difference.mean > 0.0) == grows {
            true => Verdict::Better,
            false => Verdict::Worse,
        },
        (Some(true), _) => Verdict::Uncorrected,
        (None, _) => Verdict::Unknown,
    }
}

/// A p as tables show it.
pub fn shown_p(p: Option<f64>) -> String {
    match p {
        None => "–".into(),
        Some(p) if p < 0.0001 => "< 0.0001".into(),
        Some(p) => format!("{p:.4}"),
    }
}

/// How many seeds are needed, as tables show it.
pub fn shown_seeds(seeds: Option<usize>) -> String {
    match seeds {
        None => "–".into(),
        Some(MOST_SEEDS) => format!("over {}", polyhead_runs::text::thousands(MOST_SEEDS as u64)),
        Some(seeds) => polyhead_runs::text::thousands(seeds as u64),
    }
}
