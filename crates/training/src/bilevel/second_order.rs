//! The gradient through the inner loop, by differences of first-order gradients: not the authors'.
//!
//! With φ_K a function of θ, the outer gradient has further terms, one for every inner step, each a product of a second
//! derivative with a vector: `∂²L/∂θ∂φ · u`. On a tape of first order such a product is the difference of two gradients,
//! at φ + εu and φ - εu. Held constant: the clipping factors, and what the first adapted layer reads.

use polyhead_models::{Batch, Decoder};

use super::BilevelConfig;
use super::inner::{Adapted, FastWeights, slopes, upper_loss};
use crate::gradients::backward;
use crate::update::Step;

/// How far to step aside, as a share of the fast weights' norm: of 0.001, 0.003 and 0.01, in f32 this came closest to the
/// exact gradient (7e-6 to 6e-5).
const ASIDE: f64 = 0.003;

/// Adds what is missing to the gradients in `step`. `outer` are the outer loss's slopes at the last fast weights.
pub(super) fn correct(
    model: &Decoder,
    batch: &Batch,
    config: &BilevelConfig,
    adapted: &Adapted,
    outer: FastWeights,
    step: &mut Step<'_>,
) {
    let Some(below) = &adapted.below else { return };
    let mut towards = outer;
    for (fast, inner) in adapted.trajectory.iter().zip(&adapted.steps).rev() {
        if inner.slopes.is_none() {
            continue;
        }
        let mut factors = inner.factors.iter();
        let direction = towards.map(|x| x.clone() * factors.next().expect("one each").clone());
        let [size, length] = [fast, &direction].map(|x| x.square().map_or(0.0, |sum| sum.into_scalar::<f32>().sqrt()));
        if !(size > 0.0 && length > 0.0) {
            continue;
        }
        let aside = ASIDE * f64::from(size / length);
        for sign in [1.0, -1.0] {
            let leaves = fast.zip(&direction, |x, u| x + u * (sign * aside)).lifted(true);
            let mask = batch.mask(config.context_mask);
            let loss = upper_loss(model, batch, &mask, below.clone(), &leaves);
            let grads = backward(loss * (-config.inner_lr * sign / (2.0 * aside)));
            towards = towards.zip(&slopes(&leaves, &grads), |x, change| x + change);
            step.add(grads, model);
        }
    }
}
