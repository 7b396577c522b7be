//! VAR, redistribution of attention from sinks (Kang et al. 2025, arXiv 2503.03321), and the sinks that it finds by channels of the
//! residual stream. The span may be a retrieved passage instead of an image.
//!
//! ```text
//! φ(t) = max over sink channels of |x_t| / √(mean x_t² + ε);  t is a sink where φ > τ
//! share = Σ_{sinks in span} A / Σ_span A,  mass = Σ_span A
//! ```
//! Where share ≤ ρ and mass ≥ the least one, all sink columns are multiplied by p, and what they lose goes to the span's other columns
//! in proportion to their weight. The authors' code is followed: a layer whose span has no sink is left alone even if there are sinks
//! elsewhere, and the last layer is changed too (their option for it has no effect).

use std::ops::Range;

use polyhead_kernels::comparison::largest;

/// When and how much is redistributed; the defaults are the authors'.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct VarConfig {
    /// What φ of a sink is above. Default: 20.
    pub tau: f64,
    /// The largest share of sinks. Default: 0.5.
    pub rho: f64,
    /// The least weight on the span. Default: 0.2.
    pub least_mass: f64,
    /// What is left of sinks. Default: 0.6.
    pub p: f64,
    /// Inside φ's square root. Default: 1e-6.
    pub eps_phi: f64,
    /// Added to each weight of the span in the share's denominator. Default: 1e-6.
    pub eps_share: f64,
}

impl Default for VarConfig {
    fn default() -> Self {
        Self { tau: 20.0, rho: 0.5, least_mass: 0.2, p: 0.6, eps_phi: 1e-6, eps_share: 1e-6 }
    }
}

/// φ of a token by its residual stream.
pub fn phi(hidden: &[f32], sink_channels: &[usize], eps: f64) -> f64 {
    let squares: f64 = hidden.iter().map(|&value| f64::from(value).powi(2)).sum();
    let scale = (squares / hidden.len() as f64 + eps).sqrt();
    largest(0.0, sink_channels.iter().map(|&channel| f64::from(hidden[channel]).abs() / scale))
}

/// What becomes of a row of weights.
#[derive(Debug, Clone, PartialEq)]
pub struct Redistributed {
    /// The share of the span's weight that is on sinks; 0 where the span has none.
    pub share: f64,
    /// The weight on the span.
    pub mass: f64,
    /// Whether the row is changed.
    pub edited: bool,
    /// The row.
    pub row: Vec<f64>,
}

impl VarConfig {
    /// Redistributes a row; rows of the prompt before the end of the span are never changed.
    pub fn redistribute(&self, row: &[f32], is_sink: &[bool], span: Range<usize>, behind_span: bool) -> Redistributed {
        let sink = |key: usize| is_sink.get(key).copied().unwrap_or(false);
        let own: Vec<f64> = row.iter().map(|&weight| f64::from(weight)).collect();
        let of_span = |wanted: bool| span.clone().filter(|&key| sink(key) == wanted).map(|key| own[key]).sum::<f64>();
        let (on_sinks, on_others) = (of_span(true), of_span(false));
        let mass = on_sinks + on_others;
        let there = span.clone().any(sink);
        let share = if there { on_sinks / (mass + self.eps_share * span.len() as f64) } else { 0.0 };
        let edited = there && behind_span && share <= self.rho && mass >= self.least_mass;
        if !edited {
            return Redistributed { share, mass, edited, row: own };
        }
        let freed = (0..own.len()).filter(|&key| sink(key)).map(|key| own[key]).sum::<f64>() * (1.0 - self.p);
        let changed = |(key, &weight): (usize, &f64)| match key {
            key if sink(key) => weight * self.p,
            key if span.contains(&key) && on_others > 0.0 => weight + freed * weight / on_others,
            _ => weight,
        };
        Redistributed { share, mass, edited, row: own.iter().enumerate().map(changed).collect() }
    }
}
