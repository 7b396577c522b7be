//! The expected best of k trials (Dodge et al. 2019, arXiv 1909.03004): what an arm would have reached if only k of its settings
//! had been tried. A tuned number without it says little about arms that need more tuning than others.
//!
//! The estimate is the one without bias (Tang et al. 2020, arXiv 2007.00077, drawn without replacement): the mean over all ways
//! to take k of the trials, of what the best on the selection half reached on the reporting half. Intervals are of the bootstrap
//! over trials. Trials that failed count as tried.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Resamples of an interval; chosen by us.
const RESAMPLES: usize = 1000;

/// What a setting reached.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Trial {
    /// On the half that chooses.
    pub selection: f64,
    /// On the half that is reported.
    pub reporting: f64,
}

/// The expected best of some trials.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct BestOf {
    /// How many are tried.
    pub trials: usize,
    /// What the chosen one reaches on the reporting half, on average.
    pub mean: f64,
    /// The lower end of the 95 % interval.
    pub low: f64,
    /// Its upper end.
    pub high: f64,
}

/// The expected best of 1, 2, ... trials; `None` is a trial that failed. Nothing where all failed.
pub fn expected_best(trials: &[Option<Trial>], grows: bool) -> Vec<BestOf> {
    let chances: Vec<Vec<f64>> = (1..=trials.len()).map(|k| chances(trials.len(), k)).collect();
    let means = |trials: &[Option<Trial>]| -> Vec<Option<f64>> {
        let ranked = ranked(trials, grows);
        chances.iter().map(|chances| mean(&ranked, chances)).collect()
    };
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let mut resampled: Vec<Vec<f64>> = vec![Vec::new(); trials.len()];
    for _ in 0..RESAMPLES {
        let drawn: Vec<_> = trials.iter().map(|_| trials[rng.random_range(0..trials.len())]).collect();
        resampled.iter_mut().zip(means(&drawn)).for_each(|(of, mean)| of.extend(mean));
    }
    let of = |((at, mean), values): ((usize, Option<f64>), &mut Vec<f64>)| {
        let [low, high] = crate::statistics::percentile_interval(values)?;
        Some(BestOf { trials: at + 1, mean: mean?, low, high })
    };
    means(trials).into_iter().enumerate().zip(&mut resampled).filter_map(of).collect()
}

/// From the best to the worst on the selection half, failures last.
fn ranked(trials: &[Option<Trial>], grows: bool) -> Vec<Option<f64>> {
    let mut order = trials.to_vec();
    let worth =
        |trial: &Option<Trial>| trial.map_or(f64::INFINITY, |it| if grows { -it.selection } else { it.selection });
    order.sort_by(|a, b| worth(a).total_cmp(&worth(b)));
    order.into_iter().map(|trial| trial.map(|it| it.reporting)).collect()
}

/// How likely the best of `k` out of `n` is the first, the second, ... of all.
fn chances(n: usize, k: usize) -> Vec<f64> {
    let first = k as f64 / n as f64;
    let next = |chance: &f64, rank: usize| Some(chance * (n - rank + 1).saturating_sub(k) as f64 / (n - rank) as f64);
    std::iter::successors(Some((first, 1)), |(chance, rank)| Some((next(chance, *rank)?, rank + 1)))
        .take(n)
        .map(|(chance, _)| chance)
        .collect()
}

/// The mean over those that did not fail.
fn mean(ranked: &[Option<f64>], chances: &[f64]) -> Option<f64> {
    let known = || ranked.iter().zip(chances).filter_map(|(value, chance)| Some(((*value)?, *chance)));
    let all: f64 = known().map(|(_, chance)| chance).sum();
    (all > 0.0).then(|| known().map(|(value, chance)| value * chance).sum::<f64>() / all)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trial(selection: f64, reporting: f64) -> Option<Trial> {
        Some(Trial { selection, reporting })
    }

    /// Every subset counted one by one.
    fn by_hand(trials: &[Option<Trial>], k: usize) -> f64 {
        let (mut sum, mut count) = (0.0, 0.0);
        for set in 0u32..1 << trials.len() {
            if set.count_ones() as usize == k {
                let inside = (0..trials.len()).filter(|at| (set >> at) & 1 == 1).filter_map(|at| trials[at]);
                if let Some(best) = inside.min_by(|a, b| a.selection.total_cmp(&b.selection)) {
                    (sum, count) = (sum + best.reporting, count + 1.0);
                }
            }
        }
        sum / count
    }

    #[test]
    fn it_is_the_mean_over_all_subsets() {
        let trials = [trial(3.0, 3.1), None, trial(1.0, 1.5), trial(2.0, 1.25), trial(2.5, 9.0), None];
        let found = expected_best(&trials, false);
        assert_eq!(found.len(), trials.len());
        for best in &found {
            let expected = by_hand(&trials, best.trials);
            assert!((best.mean - expected).abs() < 1e-12, "{best:?}, not {expected}");
            assert!(best.low <= best.mean + 1e-12 && best.mean <= best.high + 1e-12, "{best:?}");
        }
        assert_eq!(found[5].mean, 1.5, "of all, the one that was chosen");
        let grown: Vec<_> =
            trials.iter().map(|one| one.map(|one| Trial { selection: -one.selection, ..one })).collect();
        assert_eq!(expected_best(&grown, true), found);
        assert!(expected_best(&[None, None], false).is_empty() && expected_best(&[], false).is_empty());
    }

    #[test]
    fn chances_add_up() {
        for (n, k) in [(1, 1), (5, 1), (5, 3), (5, 5), (64, 8)] {
            assert!((chances(n, k).iter().sum::<f64>() - 1.0).abs() < 1e-12, "{n} {k}");
        }
    }
}
