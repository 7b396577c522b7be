//! The numbers that runs are compared by, and how they are shown.

use std::borrow::Cow;

use polyhead_runs::result::{RunResult, Score};

use super::comparison::{Looked, Quality};
use super::statistics::Summary;

/// A number that every run has.
#[derive(Debug, Clone)]
pub struct Metric {
    /// As files name it.
    pub key: Cow<'static, str>,
    /// As people name it.
    pub title: Cow<'static, str>,
    /// Its unit; empty where its name says it.
    pub unit: &'static str,
    /// Decimals to show.
    pub decimals: usize,
    /// What shown numbers are multiplied by, as 100 for percent.
    pub factor: f64,
    /// Reads it; told whether a sweep chose among settings, so that scores come from the other half.
    pub of: fn(&RunResult, bool) -> Option<f64>,
}

/// All of them, as tables list them.
pub static METRICS: [Metric; 10] = [
    every(["validation_loss", "validation loss", "nats"], (4, 1.0), |r, swept| Some(score(r, swept)?.loss)),
    every(["bits_per_byte", "bits per byte", ""], (4, 1.0), |r, swept| score(r, swept)?.bits_per_byte),
    every(["accuracy", "accuracy", "%"], (2, 100.0), |r, swept| Some(score(r, swept)?.accuracy)),
    every(["tokens_per_second", "tokens/s", ""], (0, 1.0), |r, _| Some(r.tokens_per_second)),
    every(["median_step_seconds", "median step", "ms"], (1, 1e3), |r, _| r.median_step_seconds),
    every(["peak_memory_bytes", "peak memory", "MiB"], (1, 1.0 / 1048576.0), |r, _| Some(r.peak_memory_bytes? as f64)),
    every(["kv_bytes_per_token", "KV bytes per token", ""], (0, 1.0), |r, _| Some(r.kv_bytes_per_token as f64)),
    every(["parameters", "parameters", ""], (0, 1.0), |r, _| Some(r.parameters as f64)),
    every(["flops_per_token", "forward FLOPs per token", ""], (0, 1.0), |r, _| Some(r.flops_per_token as f64)),
    every(["seconds", "time in steps", "s"], (1, 1.0), |r, _| Some(r.seconds)),
];

/// A metric that every run has: how files and people name it, and its unit; decimals and factor; what reads it.
const fn every(
    [key, title, unit]: [&'static str; 3],
    (decimals, factor): (usize, f64),
    of: fn(&RunResult, bool) -> Option<f64>,
) -> Metric {
    Metric { key: Cow::Borrowed(key), title: Cow::Borrowed(title), unit, decimals, factor, of }
}

/// The time that a run's steps took, of [`METRICS`].
pub const SECONDS: usize = 9;

fn score(result: &RunResult, swept: bool) -> Option<&Score> {
    if swept { result.reporting.as_ref() } else { Some(&result.validation) }
}

impl Quality {
    /// The number that it is.
    pub fn metric(self) -> &'static Metric {
        match self {
            Self::ValidationLoss => &METRICS[0],
            Self::BitsPerByte => &METRICS[1],
            Self::Accuracy => &METRICS[2],
        }
    }

    /// Whether a larger one is better.
    pub fn grows(self) -> bool {
        self == Self::Accuracy
    }

    /// Reads it from a score.
    pub fn of_score(self, score: &Score) -> Option<f64> {
        match self {
            Self::ValidationLoss => Some(score.loss),
            Self::BitsPerByte => score.bits_per_byte,
            Self::Accuracy => Some(score.accuracy),
        }
    }
}

impl Looked {
    /// The number that it is.
    pub fn metric(&self) -> Metric {
        match self {
            Self::Quality(quality) => quality.metric().clone(),
            Self::Logged(name) => {
                METRICS.iter().find(|metric| metric.key == *name).cloned().unwrap_or_else(|| Metric::logged(name))
            }
        }
    }
}

impl Metric {
    /// `mean ± standard deviation`, without the latter where all values are the same number or there is one only.
    pub fn spread(&self, summary: Option<Summary>) -> String {
        match summary {
            None => "–".into(),
            Some(Summary { mean, deviation: Some(deviation), .. }) if deviation > 0.0 => {
                format!("{} ± {}", self.shown(mean), self.shown(deviation))
            }
            Some(summary) => self.shown(summary.mean),
        }
    }

    /// A number that logs hold under this name; runs tell it by their logs only.
    pub fn logged(name: &str) -> Self {
        let name = || Cow::Owned(name.to_owned());
        Self { key: name(), title: name(), unit: "", decimals: 4, factor: 1.0, of: |_, _| None }
    }

    /// Its name with its unit, as heads of tables and axes have it.
    pub fn label(&self) -> String {
        if self.unit.is_empty() { self.title.to_string() } else { format!("{}, {}", self.title, self.unit) }
    }

    /// A value as tables show it.
    pub fn shown(&self, value: f64) -> String {
        let value = value * self.factor;
        match self.decimals {
            0 if value >= 0.0 => polyhead_runs::text::thousands(value.round() as u64),
            _ if value >= 1e4 => polyhead_runs::text::thousands(value.round() as u64),
            decimals => format!("{value:.decimals$}"),
        }
    }
}
