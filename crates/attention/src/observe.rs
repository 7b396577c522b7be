//! Observations of a call, measured only when asked, and never changing its output.

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

/// The observations of one layer.
#[derive(Debug, Clone, Default)]
pub struct Observation {
    /// Name and values, `[heads]` or `[1]` where the layer has one value.
    pub numbers: Vec<(String, Tensor<1>)>,
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
        seen.add("", [statistics.entropy, statistics.first_key_mass, statistics.largest_score]);
        if let Some(mass) = statistics.sink_mass {
            seen.number("sink_mass", mass);
        }
        seen
    }

    /// Adds the statistics of a kernel call: entropy (nats), weight on the first key, largest score, each `[heads]`.
    pub(crate) fn add(&mut self, prefix: &str, statistics: [Tensor<1>; 3]) {
        for (name, values) in ["entropy", "first_token_mass", "largest_score"].into_iter().zip(statistics) {
            self.number(&format!("{prefix}{name}"), values);
        }
    }

    /// Adds one number per head, or one for the layer.
    pub(crate) fn number(&mut self, name: &str, values: Tensor<1>) {
        self.numbers.push((name.to_owned(), values));
    }
}
