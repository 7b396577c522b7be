//! Power laws with intervals of the bootstrap.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use super::comparison::ladder::{FEWEST, Fit, Irreducible};
use super::statistics::percentile_interval;

/// Resamples of an interval; chosen by us.
const RESAMPLES: usize = 500;
/// Where exponents are sought; chosen by us.
const EXPONENTS: [f64; 2] = [-1.0, 4.0];
/// The same beside a part that does not fall, from which an exponent near 0 could not be told.
const BESIDE_A_FLOOR: [f64; 2] = [0.005, 4.0];

/// A power law: `irreducible + scale * (flops / middle)^-exponent`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Law {
    /// How fast the metric falls with training operations.
    pub exponent: f64,
    /// The 95 % interval of the exponent.
    pub interval: [f64; 2],
    /// The geometric mean of the operations that it was fitted to.
    pub middle: f64,
    /// What is above the irreducible part there.
    pub scale: f64,
    /// The part that does not fall.
    pub irreducible: f64,
    /// Runs that it was fitted to.
    pub n: usize,
}

impl Law {
    /// The metric after so many operations.
    pub fn at(&self, flops: f64) -> f64 {
        self.irreducible + self.scale * (flops / self.middle).powf(-self.exponent)
    }
}

/// A run, or the mean of some: training operations and the metric.
pub type Point = (f64, f64);

/// The law that fits best by least squares, with the interval of a bootstrap over residuals.
///
/// # Errors
/// Why there is none.
pub fn fit(points: &[Point], irreducible: Irreducible) -> Result<Law, String> {
    let budgets = points.iter().enumerate().filter(|(at, point)| points[..*at].iter().all(|other| other.0 != point.0));
    let (budgets, unknown) = (budgets.count(), if irreducible == Irreducible::Sought(Fit::Fit) { 3 } else { 2 });
    if budgets < FEWEST.max(unknown) || points.len() <= unknown {
        return Err(format!("{} runs at {budgets} budgets are too few for a law", points.len()));
    }
    if points.iter().any(|(flops, value)| !(flops.is_finite() && value.is_finite() && *flops > 0.0)) {
        return Err("a run has no finite metric".into());
    }
    if let Irreducible::Known(floor) = irreducible
        && let Some((_, below)) = points.iter().find(|(_, value)| *value < floor)
    {
        return Err(format!("irreducible ({floor}) is above {below}, which a run reached"));
    }
    let middle = (points.iter().map(|(flops, _)| flops.ln()).sum::<f64>() / points.len() as f64).exp();
    let xs: Vec<f64> = points.iter().map(|(flops, _)| (flops / middle).ln()).collect();
    let ys: Vec<f64> = points.iter().map(|(_, value)| *value).collect();
    let fitting = Fitting::new(&xs, irreducible);
    let best = fitting.best(&ys);
    let law = Law {
        exponent: best.exponent,
        interval: [best.exponent; 2],
        middle,
        scale: best.scale,
        irreducible: best.floor,
        n: points.len(),
    };
    let fitted: Vec<f64> = points.iter().map(|(flops, _)| law.at(*flops)).collect();
    // A fit is nearer to its points than the truth is: residuals are drawn as large as they would be around that.
    let wider = (points.len() as f64 / (points.len() - unknown) as f64).sqrt();
    let residuals: Vec<f64> = ys.iter().zip(&fitted).map(|(y, fitted)| wider * (y - fitted)).collect();
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let mut exponents: Vec<f64> = (0..RESAMPLES)
        .map(|_| {
            let drawn: Vec<f64> =
                fitted.iter().map(|value| value + residuals[rng.random_range(0..residuals.len())]).collect();
            fitting.best(&drawn).exponent
        })
        .collect();
    let interval = percentile_interval(&mut exponents).ok_or("no resample has a law")?;
    Ok(Law { interval, ..law })
}

/// What fits best.
struct Best {
    exponent: f64,
    scale: f64,
    floor: f64,
}

/// Least squares over the same points along the horizontal axis: for an exponent, scale and floor follow; the exponent is sought
/// on a grid, then by golden section.
struct Fitting<'a> {
    xs: &'a [f64],
    irreducible: Irreducible,
    /// Exponents, each with how the law falls at every x.
    grid: Vec<(f64, Vec<f64>)>,
}

impl<'a> Fitting<'a> {
    const GRID: usize = 100;
    /// Golden sections: the exponent is known to a ten-millionth of the grid's range.
    const SECTIONS: usize = 30;

    fn new(xs: &'a [f64], irreducible: Irreducible) -> Self {
        let [low, high] = if irreducible == Irreducible::Sought(Fit::Fit) { BESIDE_A_FLOOR } else { EXPONENTS };
        let exponents = (0..=Self::GRID).map(|step| low + (high - low) * step as f64 / Self::GRID as f64);
        Self { xs, irreducible, grid: exponents.map(|exponent| (exponent, falls(xs, exponent))).collect() }
    }

    fn best(&self, ys: &[f64]) -> Best {
        let of = |exponent: f64| linear(&falls(self.xs, exponent), ys, self.irreducible);
        let errors: Vec<f64> = self.grid.iter().map(|(_, falls)| linear(falls, ys, self.irreducible).2).collect();
        let nearest = (0..errors.len()).min_by(|&a, &b| errors[a].total_cmp(&errors[b])).unwrap_or(0);
        let end = |step: usize| self.grid[step.min(Self::GRID)].0;
        let (mut left, mut right) = (end(nearest.saturating_sub(1)), end(nearest + 1));
        let golden = (5f64.sqrt() - 1.0) / 2.0;
        let tried = |exponent: f64| (exponent, of(exponent).2);
        let mut below = tried(right - golden * (right - left));
        let mut above = tried(left + golden * (right - left));
        for _ in 0..Self::SECTIONS {
            if below.1 <= above.1 {
                (right, above) = (above.0, below);
                below = tried(right - golden * (right - left));
            } else {
                (left, below) = (below.0, above);
                above = tried(left + golden * (right - left));
            }
        }
        let exponent = (left + right) / 2.0;
        let (scale, floor, _) = of(exponent);
        Best { exponent, scale, floor }
    }
}

/// How a law of this exponent falls along the horizontal axis, which is logarithmic.
fn falls(xs: &[f64], exponent: f64) -> Vec<f64> {
    xs.iter().map(|x| (-exponent * x).exp()).collect()
}

/// Scale, floor and the sum of squared errors of the best law that falls like this. A floor is never below 0.
fn linear(falls: &[f64], ys: &[f64], irreducible: Irreducible) -> (f64, f64, f64) {
    let n = falls.len() as f64;
    let with_floor = |floor: f64| {
        let (products, squares) = falls
            .iter()
            .zip(ys)
            .fold((0.0, 0.0), |(products, squares), (fall, y)| (products + fall * (y - floor), squares + fall * fall));
        (products / squares, floor)
    };
    let (scale, floor) = match irreducible {
        Irreducible::Known(floor) => with_floor(floor),
        Irreducible::Sought(_) => {
            let (mean_fall, mean_y) = (falls.iter().sum::<f64>() / n, ys.iter().sum::<f64>() / n);
            let products: f64 = falls.iter().zip(ys).map(|(fall, y)| (fall - mean_fall) * (y - mean_y)).sum();
            let squares: f64 = falls.iter().map(|fall| (fall - mean_fall).powi(2)).sum();
            let scale = products / squares;
            let floor = mean_y - scale * mean_fall;
            if floor >= 0.0 { (scale, floor) } else { with_floor(0.0) }
        }
    };
    let error = falls.iter().zip(ys).map(|(fall, y)| (y - floor - scale * fall).powi(2)).sum();
    (scale, floor, error)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::simulation::Noise;

    const FIT: Irreducible = Irreducible::Sought(Fit::Fit);

    /// Runs of a law with noise: budgets four times apart, three seeds each.
    fn runs(budgets: usize, [floor, scale, exponent]: [f64; 3], spread: f64, noise: &mut Noise) -> Vec<Point> {
        let flops = (0..budgets).map(|at| 1e12 * 4f64.powi(at as i32));
        flops
            .flat_map(|flops| {
                let value = floor + scale * (flops / 1e12).powf(-exponent);
                (0..3).map(|_| (flops, value + spread * noise.draw())).collect::<Vec<_>>()
            })
            .collect()
    }

    #[test]
    fn an_exponent_is_found_again() {
        let mut noise = Noise::new(0);
        for (floor, known) in [(0.0, Irreducible::default()), (1.7, Irreducible::Known(1.7)), (1.7, FIT)] {
            let law = fit(&runs(6, [floor, 4.0, 0.15], 0.0, &mut noise), known).unwrap();
            assert!((law.exponent - 0.15).abs() < 1e-4 && (law.irreducible - floor).abs() < 1e-2, "{law:?}");
            assert!((law.at(1e12) - floor - 4.0).abs() < 1e-2, "{law:?}");
        }
    }

    #[test]
    fn intervals_cover_the_exponent_that_is_there() {
        const COUNT: usize = 100;
        for (floor, known) in [(0.0, Irreducible::default()), (1.5, FIT)] {
            let mut noise = Noise::new(5);
            let covers = |_: &usize| {
                let law = fit(&runs(5, [floor, 3.0, 0.2], 0.02, &mut noise), known).unwrap();
                (law.interval[0]..=law.interval[1]).contains(&0.2)
            };
            let covered = (0..COUNT).filter(covers).count();
            assert!(covered >= 90, "{covered} of {COUNT} intervals cover the exponent, floor {floor}");
        }
        // One like it, to look at: the interval is narrow too.
        let law = fit(&runs(5, [0.0, 3.0, 0.2], 0.02, &mut Noise::new(1)), Irreducible::default()).unwrap();
        assert!(law.interval[1] - law.interval[0] < 0.02 && (law.exponent - 0.2).abs() < 0.01, "{law:?}");
    }

    #[test]
    fn too_little_has_no_law() {
        let points = |count: usize| (0..count).map(|at| (1e12 * 2f64.powi(at as i32), 3.0)).collect::<Vec<_>>();
        assert!(fit(&points(2), Irreducible::default()).unwrap_err().contains("2 runs at 2 budgets are too few"));
        assert!(fit(&points(3), FIT).is_err() && fit(&[], FIT).is_err());
        assert!(fit(&[(1.0, f64::NAN), (2.0, 1.0), (3.0, 1.0)], Irreducible::default()).is_err());
        // A floor above a run would turn the law over: what is left above it would grow.
        let below = fit(&points(4), Irreducible::Known(3.5)).unwrap_err();
        assert_eq!(below, "irreducible (3.5) is above 3, which a run reached");
        let flat = fit(&points(4), Irreducible::default()).unwrap();
        assert!(flat.exponent.abs() < 1e-6, "{flat:?}");
    }
}
