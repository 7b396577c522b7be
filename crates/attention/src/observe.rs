//! What a mechanism can tell about a call, measured only when asked, and never changing its output.

use burn::tensor::Tensor;
use polyhead_kernels::Statistics;

/// What to measure during a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Observe {
    /// Nothing: the default, and free.
    #[default]
    Nothing,
    /// Numbers per head.
    Numbers,
    /// Numbers per head, and the attention weights of the first row of the batch.
    Maps,
}

impl Observe {
    /// Whether anything is to be measured.
    pub fn wanted(self) -> bool {
        self != Self::Nothing
    }
}

/// What one layer saw.
#[derive(Debug, Clone, Default)]
pub struct Observation {
    /// Name and values, `[heads]` or `[1]` where the layer has one value.
    pub numbers: Vec<(&'static str, Tensor<1>)>,
    /// `[heads, queries, keys]`: the weights of the first row of the batch; may be negative where maps are subtracted.
    pub maps: Option<Tensor<3>>,
}

impl Observation {
    /// The statistics of a kernel call as numbers: names of entropy (nats), weight on the first key, largest score.
    pub(crate) fn add(&mut self, names: [&'static str; 3], seen: &Statistics) {
        let values = [&seen.entropy, &seen.first_key_mass, &seen.largest_score];
        self.numbers.extend(names.into_iter().zip(values.into_iter().cloned()));
    }
}
