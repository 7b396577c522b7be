//! The coefficients c_m of EES.

use std::f64::consts::{FRAC_2_PI, FRAC_PI_2, PI};

/// Nodes of the interpolation that gives the shifted coefficients; more change nothing in 64 bits up to 128 terms.
const NODES: usize = 256;

/// c_0 to c_M of ln(λ + α), λ in `[0, 1]`, in T_m(2λ - 1).
pub fn shifted(terms: usize, alpha: f64) -> Vec<f64> {
    let nodes = NODES.max(2 * terms);
    let angle = |k: usize| (k as f64 + 0.5) * PI / nodes as f64;
    let logarithms: Vec<f64> = (0..nodes).map(|k| (0.5 * angle(k).cos() + 0.5 + alpha).ln()).collect();
    let coefficient = |m: usize| {
        let sum: f64 = logarithms.iter().enumerate().map(|(k, log)| log * (m as f64 * angle(k)).cos()).sum();
        sum * if m == 0 { 1.0 } else { 2.0 } / nodes as f64
    };
    (0..=terms).map(coefficient).collect()
}

/// c_0 to c_M of the dual basis on `[0, 1]`: 2/((1 + [m = 0]) π) ∫ ln(x) T_m(x) / √(1 - x²) dx.
pub fn dual(terms: usize) -> Vec<f64> {
    let coefficient = |m: usize| {
        let factor = if m == 0 { 0.5 } else { 1.0 } * FRAC_2_PI;
        // x = sin φ, so T_m(x) = cos(m (π/2 - φ)).
        factor * integral(|phi| phi.sin().ln() * (m as f64 * (FRAC_PI_2 - phi)).cos())
    };
    (0..=terms).map(coefficient).collect()
}

/// c_1 to c_M as published: 2/π ∫ ln(x) cos(m x) / √(1 - x²) dx, which has cos(m x) where T_m(x) is meant.
pub fn official(terms: usize) -> Vec<f64> {
    (1..=terms).map(|m| FRAC_2_PI * integral(|phi| phi.sin().ln() * (m as f64 * phi.sin()).cos())).collect()
}

/// ∫ f from 0 to π/2 by the double exponential rule (Takahasi and Mori 1974), for an f with a logarithm at 0.
fn integral(f: impl Fn(f64) -> f64) -> f64 {
    const STEP: f64 = 1.0 / 128.0;
    let term = |k: i32| {
        let t = f64::from(k) * STEP;
        let u = FRAC_PI_2 * t.sinh();
        // Written so that nodes near 0 keep all their digits.
        let phi = FRAC_PI_2 * u.exp() / (2.0 * u.cosh());
        f(phi) * FRAC_PI_2 * FRAC_PI_2 * t.cosh() / (2.0 * u.cosh().powi(2))
    };
    // Beyond 4 the weights are below 1e-36.
    (-512..=512).map(term).sum::<f64>() * STEP
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn even_dual_coefficients_have_a_closed_form() {
        let c = dual(12);
        assert!((c[0] + 2f64.ln() / 2.0).abs() < 1e-13);
        for k in 1..=6usize {
            let sign = if k % 2 == 1 { 1.0 } else { -1.0 };
            assert!((c[2 * k] - sign / (2 * k) as f64).abs() < 1e-13, "c_{}: {}", 2 * k, c[2 * k]);
        }
    }
}
