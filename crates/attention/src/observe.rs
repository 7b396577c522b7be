//! Observations of a call, measured only when asked, and never changing its output.

use std::fmt;
use std::sync::Arc;

use burn::tensor::Tensor;
use polyhead_kernels::{Measure, Statistics};

/// The observations to make during a call.
#[derive(Debug, Clone, Default)]
pub enum Observe {
    /// Nothing: the default, and free.
    #[default]
    Nothing,
    /// Numbers per head.
    Numbers,
    /// Numbers per head, and what every query gives to sets of keys: `[batch, keys, sets]`, 1 where a key belongs to a
    /// set, else 0.
    Spans(Arc<Tensor<3>>),
    /// Numbers per head, and the attention weights of the first row of the batch.
    Maps,
}

impl Observe {
    /// Whether anything is to be measured.
    pub fn wanted(&self) -> bool {
        !matches!(self, Self::Nothing)
    }

    /// The same, as the kernel is asked.
    pub(crate) fn measure(&self) -> Measure {
        match self {
            Self::Nothing => Measure::Nothing,
            Self::Numbers => Measure::Numbers,
            Self::Spans(spans) => Measure::Spans(spans.clone()),
            Self::Maps => Measure::Weights,
        }
    }
}

/// A number that a mechanism observes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Observed {
    /// Its name in logs: `attention/layer_03/<name>`.
    pub name: &'static str,
    /// What it is.
    pub meaning: &'static str,
    /// "nats", ...; empty where it is a share or a plain number.
    pub unit: &'static str,
}

impl Observed {
    /// The number of a name.
    pub(crate) const fn new(name: &'static str, meaning: &'static str, unit: &'static str) -> Self {
        Self { name, meaning, unit }
    }
}

impl PartialEq<str> for Observed {
    fn eq(&self, name: &str) -> bool {
        self.name == name
    }
}

impl fmt::Display for Observed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.unit {
            "" => f.write_str(self.meaning),
            unit => write!(f, "{}, in {unit}", self.meaning),
        }
    }
}

/// What every softmax over scores tells of its heads.
pub(crate) const SCORES: [Observed; 3] = [
    Observed::new("entropy", "entropy of a query's weights, mean over queries", "nats"),
    Observed::new("first_token_mass", "weight on the first key, the usual attention sink", ""),
    Observed::new("largest_score", "largest score before softmax", ""),
];

/// The same of heads that are subtracted; [`SCORES`] are those of the others then.
pub(crate) const NOISE: [Observed; 3] = [
    Observed::new("noise_entropy", "entropy of a noise head's weights, mean over queries", "nats"),
    Observed::new("noise_first_token_mass", "a noise head's weight on the first key", ""),
    Observed::new("noise_largest_score", "a noise head's largest score before softmax", ""),
];

/// Where there are sinks.
pub(crate) const SINK_MASS: Observed = Observed::new("sink_mass", "weight on the sink, mean over queries", "");

/// The observations of one layer.
#[derive(Debug, Clone, Default)]
pub struct Observation {
    /// What it is and its values, `[heads]` or `[1]` where the layer has one value.
    pub numbers: Vec<(Observed, Tensor<1>)>,
    /// `[heads, queries, keys]`: the weights of the first row of the batch; may be negative where maps are subtracted.
    pub maps: Option<Tensor<3>>,
    /// `[batch, heads, queries, sets]`: the weights of each query on each set of keys, summed.
    pub span_mass: Option<Tensor<4>>,
    /// `[heads, queries]`: what each head's output was multiplied by in the first row of the batch, 0 where it was not
    /// computed; `None` where all heads count alike.
    pub gates: Option<Tensor<2>>,
}

impl Observation {
    /// The observations of a layer with a single kernel call.
    pub(crate) fn of(statistics: Statistics) -> Self {
        let mut seen = Self { maps: statistics.weights, span_mass: statistics.span_mass, ..Self::default() };
        seen.scores(&SCORES, [statistics.entropy, statistics.first_key_mass, statistics.largest_score]);
        if let Some(mass) = statistics.sink_mass {
            seen.number(SINK_MASS, mass);
        }
        seen
    }

    /// Adds the statistics of a kernel call: what [`SCORES`] are of these heads, each `[heads]`.
    pub(crate) fn scores(&mut self, rows: &[Observed; 3], statistics: [Tensor<1>; 3]) {
        rows.iter().zip(statistics).for_each(|(row, values)| self.number(*row, values));
    }

    /// Adds one number per head, or one for the layer.
    pub(crate) fn number(&mut self, row: Observed, values: Tensor<1>) {
        self.numbers.push((row, values));
    }
}
