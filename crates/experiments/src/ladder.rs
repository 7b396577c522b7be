//! What arms reached on a ladder, and the power law that follows for larger budgets (Kaplan et al. 2020, arXiv 2001.08361;
//! Hoffmann et al. 2022, arXiv 2203.15556).

use super::comparison::ladder::{Ladder, PASSES};
use super::law::{Law, Point, fit};
use super::outcome::Outcome;
use super::statistics::Summary;

/// An arm over all rungs.
pub struct ArmLadder {
    /// Its place among the arms of a rung.
    pub arm: usize,
    /// For each budget the rung with the best mean: its operations, and the metric of every seed.
    pub rungs: Vec<(f64, Vec<f64>)>,
    /// The law, or why there is none.
    pub law: Result<Law, String>,
}

impl Outcome {
    /// The law of every arm, where the comparison is a ladder. What should grow is turned around: of accuracy, the share of errors.
    pub fn ladders(&self) -> Vec<ArmLadder> {
        let Some(ladder) = &self.comparison.ladder else { return Vec::new() };
        let arms = self.comparison.groups()[0].1.len();
        (0..arms).map(|arm| self.ladder_of(arm, ladder)).collect()
    }

    fn ladder_of(&self, arm: usize, ladder: &Ladder) -> ArmLadder {
        let (metric, grows) = (self.comparison.metric.metric(), self.comparison.metric.grows());
        let reached = |group: &std::ops::Range<usize>| -> Option<(f64, Vec<f64>)> {
            let at = group.start + arm;
            let runs = self.arms[at].runs.iter().filter_map(|run| run.end.as_ref().ok());
            let flops: Vec<f64> = runs.map(|run| PASSES * run.flops_per_token as f64 * run.tokens as f64).collect();
            let values = self.values(at, metric).into_iter().map(|(_, value)| if grows { 1.0 - value } else { value });
            Some((Summary::of(&flops)?.mean, values.collect()))
        };
        let of_rungs: Vec<Option<(f64, Vec<f64>)>> =
            self.comparison.groups().iter().map(|(_, group)| reached(group)).collect();
        let rungs = ladder.rungs();
        let mean = |values: &[f64]| Summary::of(values).map_or(f64::INFINITY, |summary| summary.mean);
        // Of each budget the best size; without budgets every size is one of its own.
        let budgets = if ladder.flops.is_empty() { ladder.size.len() } else { ladder.flops.len() };
        let best = |budget: usize| {
            let own = rungs.iter().zip(&of_rungs).filter(|(rung, _)| rung.budget.unwrap_or(rung.size) == budget);
            own.filter_map(|(_, found)| found.clone()).min_by(|a, b| mean(&a.1).total_cmp(&mean(&b.1)))
        };
        let rungs: Vec<(f64, Vec<f64>)> = (0..budgets).filter_map(best).collect();
        let points: Vec<Point> =
            rungs.iter().flat_map(|(flops, values)| values.iter().map(move |value| (*flops, *value))).collect();
        ArmLadder { arm, law: fit(&points, ladder.irreducible), rungs }
    }
}
