//! Secondary attention sinks: tokens whose residual stream turns into the direction of the first one, over which layers
//! (JeffreyWong20/Secondary-Attention-Sinks; its functions are followed).
//!
//! The sink is the token with the largest norm among the first ones; it is on from the layer behind the largest rise of its norm up to
//! the layer behind the steepest fall. A later token is a member in the layers between in which |cos| to it is above 0.9.

use std::ops::Range;

/// What tokens are by how long they are sinks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Never one.
    None,
    /// In few layers.
    Noise,
    /// In some.
    Secondary,
    /// In nearly all.
    Primary,
}

/// Where sinks are told apart. The authors' numbers are for 28 to 64 layers: primary from all but 15 layers on, noise up to 4.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SinkRule {
    /// |cos| that members are above.
    pub cosine: f64,
    /// Layers that a primary sink has at least.
    pub primary: usize,
    /// Layers that noise has at most.
    pub noise: usize,
}

impl SinkRule {
    /// The authors', for a model of so many layers.
    pub fn published(n_layers: usize) -> Self {
        Self { cosine: 0.9, primary: n_layers.saturating_sub(15), noise: 4 }
    }
}

/// The sinks of a text.
#[derive(Debug, Clone, PartialEq)]
pub struct Sinks {
    /// The position of the first sink.
    pub first: usize,
    /// The layers in which it is on.
    pub on: Range<usize>,
    /// `[layers][tokens]`: the cosine to the first sink.
    pub cosine: Vec<Vec<f64>>,
    /// `[layers][tokens]`: whether a token is a member.
    pub member: Vec<Vec<bool>>,
    /// `[tokens]`: the number of layers in which it is one.
    pub lifetime: Vec<usize>,
    /// `[tokens]`: the first of them.
    pub birth: Vec<Option<usize>>,
    /// `[tokens]`: what it is.
    pub kind: Vec<Kind>,
}

/// The sinks by what layers write, `[layers][tokens][d_model]`, the first one among `candidates`.
pub fn sinks(hidden: &[Vec<Vec<f32>>], candidates: &[usize], rule: SinkRule) -> Sinks {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum::<f64>();
    let norm = |x: &[f32]| dot(x, x).sqrt();
    let mean_norm = |token: usize| hidden.iter().map(|layer| norm(&layer[token])).sum::<f64>();
    let first = candidates.iter().copied().max_by(|&a, &b| mean_norm(a).total_cmp(&mean_norm(b)).then(b.cmp(&a)));
    let first = first.unwrap_or_default();
    let norms: Vec<f64> = hidden.iter().map(|layer| norm(&layer[first])).collect();
    let steps: Vec<f64> = norms.windows(2).map(|pair| pair[1] - pair[0]).collect();
    let largest = |from: usize, sign: f64| {
        let order = |a: &usize, b: &usize| (sign * steps[*a]).total_cmp(&(sign * steps[*b])).then(b.cmp(a));
        (from..steps.len()).max_by(order).map_or(hidden.len(), |step| step + 1)
    };
    let start = largest(0, 1.0);
    let on = start..largest(start, -1.0);
    let tokens = hidden.first().map_or(0, Vec::len);
    let cosine: Vec<Vec<f64>> = hidden
        .iter()
        .map(|layer| {
            let of = |token: usize| {
                dot(&layer[token], &layer[first]) / (norm(&layer[token]) * norm(&layer[first])).max(f64::MIN_POSITIVE)
            };
            (0..tokens).map(of).collect()
        })
        .collect();
    let belongs = |layer: usize, token: usize| {
        on.contains(&layer) && (token == first || (token > first && cosine[layer][token].abs() > rule.cosine))
    };
    let member: Vec<Vec<bool>> =
        (0..hidden.len()).map(|layer| (0..tokens).map(|token| belongs(layer, token)).collect()).collect();
    let lifetime: Vec<usize> = (0..tokens).map(|token| member.iter().filter(|layer| layer[token]).count()).collect();
    let birth = (0..tokens).map(|token| member.iter().position(|layer| layer[token])).collect();
    let kind = lifetime.iter().map(|&lifetime| match lifetime {
        0 => Kind::None,
        layers if layers >= rule.primary => Kind::Primary,
        layers if layers > rule.noise => Kind::Secondary,
        _ => Kind::Noise,
    });
    let kind = kind.collect();
    Sinks { first, on, cosine, member, lifetime, birth, kind }
}
