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
pub const METRICS: [Metric; 10] = [
    Metric {
        key: Cow::Borrowed("validation_loss"),
        title: Cow::Borrowed("validation loss"),
        unit: "nats",
        decimals: 4,
        factor: 1.0,
        of: |r, swept| Some(score(r, swept)?.loss),
    },
    Metric {
        key: Cow::Borrowed("bits_per_byte"),
        title: Cow::Borrowed("bits per byte"),
        unit: "",
        decimals: 4,
        factor: 1.0,
        of: |r, swept| score(r, swept)?.bits_per_byte,
    },
    Metric {
        key: Cow::Borrowed("accuracy"),
        title: Cow::Borrowed("accuracy"),
        unit: "%",
        decimals: 2,
        factor: 100.0,
        of: |r, swept| Some(score(r, swept)?.accuracy),
    },
    Metric {
        key: Cow::Borrowed("tokens_per_second"),
        title: Cow::Borrowed("tokens/s"),
        unit: "",
        decimals: 0,
        factor: 1.0,
        of: |r, _| Some(r.tokens_per_second),
    },
    Metric {
        key: Cow::Borrowed("median_step_seconds"),
        title: Cow::Borrowed("median step"),
        unit: "ms",
        decimals: 1,
        factor: 1e3,
        of: |r, _| r.median_step_seconds,
    },
    Metric {
        key: Cow::Borrowed("peak_memory_bytes"),
        title: Cow::Borrowed("peak memory"),
        unit: "MiB",
        decimals: 1,
        factor: 1.0 / 1048576.0,
        of: |r, _| Some(r.peak_memory_bytes? as f64),
    },
    Metric {
        key: Cow::Borrowed("kv_bytes_per_token"),
        title: Cow::Borrowed("KV bytes per token"),
        unit: "",
        decimals: 0,
        factor: 1.0,
        of: |r, _| Some(r.kv_bytes_per_token as f64),
    },
    Metric {
        key: Cow::Borrowed("parameters"),
        title: Cow::Borrowed("parameters"),
        unit: "",
        decimals: 0,
        factor: 1.0,
        of: |r, _| Some(r.parameters as f64),
    },
    Metric {
        key: Cow::Borrowed("flops_per_token"),
        title: Cow::Borrowed("forward FLOPs per token"),
        unit: "",
        decimals: 0,
        factor: 1.0,
        of: |r, _| Some(r.flops_per_token as f64),
    },
    Metric {
        key: Cow::Borrowed("seconds"),
        title: Cow::Borrowed("time in steps"),
        unit: "s",
        decimals: 1,
        factor: 1.0,
        of: |r, _| Some(r.seconds),
    },
];

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
